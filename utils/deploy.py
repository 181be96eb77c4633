"""What a pruned model costs in the forms in which it can be run: numbers stored, bytes, multiplications, speed.

The forms are the dense model (speed does not depend on values, so that it is the pruned one without masks), the masked
one, the compact network (`utils.compact`) and PyTorch's sparse matrices (CSR).
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils import benchmark, export
from utils.analysis_utils import clone_model, count_pruned_params, prunable_layers, remove_masks
from utils.channels import SIDE, effective_sparsity
from utils.checkpoint import checkpoint_bytes
from utils.common import generator
from utils.compact import compact, largest_difference
from utils.compact_network import content

MEASURED_S = 0.3  # that one measurement takes at least, by doing the work several times
EAGER, ONNX = "PyTorch", "onnxruntime"
Key = tuple[str, str]  # form, engine


class SparseProduct(nn.Module):
    """A convolution (of one group) or linear layer as the product of a CSR matrix and the patches of its input."""

    def __init__(self, layer: nn.Module):
        """layer: without a mask, zero-padded."""
        super().__init__()
        self.bias, self.convolution = layer.bias, layer if isinstance(layer, nn.Conv2d) else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that PyTorch calls CSR beta
            self.matrix = layer.weight.detach().flatten(1).to_sparse_csr()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) or (B, inputs), as the layer takes it."""
        if self.convolution is None:
            return (self.matrix @ x.T).T + self.bias
        conv = self.convolution
        sizes = [(size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for size, pad, dilation, kernel, stride in
                 zip(x.shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride)]
        patches = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
        out = self.matrix @ patches.transpose(0, 1).flatten(1)
        out = out.view(len(out), len(x), *sizes).transpose(0, 1)
        return out if self.bias is None else out + self.bias.view(1, -1, 1, 1)


def sparse_products(model: nn.Module) -> nn.Module:
    """A copy without masks in which every layer that CSR can do is a `SparseProduct`."""
    copy = without_masks(model).to(memory_format=torch.contiguous_format)
    for name, layer in prunable_layers(copy).items():
        if getattr(layer, "groups", 1) == 1:
            parent, _, child = name.rpartition(".")
            setattr(copy.get_submodule(parent), child, SparseProduct(layer))
    return copy


def without_masks(model: nn.Module) -> nn.Module:
    """A dense copy, in evaluation mode."""
    copy = clone_model(model).eval()
    remove_masks(copy)
    return copy


@torch.no_grad()
def multiplications(model: nn.Module, side: int = SIDE) -> int:
    """Multiply-accumulate operations of convolutions and linear layers for one image; in CSR, of weights not zero."""
    counts: list[int] = []

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        weights = layer.matrix.values() if isinstance(layer, SparseProduct) else layer.weight
        counts.append(weights.numel() * math.prod(output.shape[2:]))
    layers = [layer for layer in model.modules() if isinstance(layer, (SparseProduct, nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    model(torch.zeros(1, 3, side, side))
    for handle in handles:
        handle.remove()
    return sum(counts)


def stored(model: nn.Module) -> list[Tensor]:
    """Every tensor that a forward pass reads, masks and the indices of sparse matrices included."""
    sparse = [layer for layer in model.modules() if isinstance(layer, SparseProduct)]
    dense = {id(layer.convolution.weight) for layer in sparse if layer.convolution is not None}
    parts = [[layer.matrix.values(), layer.matrix.col_indices(), layer.matrix.crow_indices()] for layer in sparse]
    kept = [value for value in (*model.parameters(), *model.buffers()) if id(value) not in dense]
    return [*kept, *(part for three in parts for part in three)]


def measure(label: str, model: nn.Module, threads: list[int], batches: list[int], repeats: int) -> list[dict[str, Any]]:
    """A row for each form, engine, number of threads and batch size of a pruned model.

    bytes: of the file, for CSR of its tensors in memory (values float32, indices int64); macs: for one image;
    difference: to the masked model's logits, in units of the largest; speedup: over the dense model in the same engine.
    All that is compared is measured in turn. onnxruntime is measured where the packages of
    ``requirements-export.txt`` are there.
    """
    made = compact(model)
    forms = {"dense": without_masks(model), "masked": model.eval(), "compact": made.network,
             "CSR": sparse_products(model)}
    facts = {form: {"model": label, "sparsity": count_pruned_params(model).sparsity,
                    "effective_sparsity": effective_sparsity(model), "form": form, **_size(network),
                    "macs": multiplications(network),
                    "difference": largest_difference(model, network, _images(8))} for form, network in forms.items()}
    facts["compact"]["bytes"] = len(checkpoint_bytes(content(made.steps, made.network.state_dict())))
    before, rows = torch.get_num_threads(), []
    for number in threads:
        torch.set_num_threads(number)
        sessions = _sessions({form: forms[form] for form in ("dense", "compact")}, number)
        for batch in batches:
            seconds = time_all(_works(forms, sessions, _images(batch)), repeats)
            rows += [{**facts[form], "engine": engine, "threads": number, "batch": batch,
                      "images_per_s": batch / taken, "speedup": seconds["dense", engine] / taken}
                     for (form, engine), taken in seconds.items()]
    torch.set_num_threads(before)
    return rows


def _works(forms: Mapping[str, nn.Module], sessions: Mapping[str, Any], images: Tensor) -> dict[Key, Callable[[], Any]]:
    """A forward pass of the images through each form, in each engine that it has."""
    works = {(form, EAGER): torch.no_grad()(partial(network, images)) for form, network in forms.items()}
    inputs = {"images": images.contiguous().numpy()}
    return works | {(form, ONNX): partial(session.run, None, inputs) for form, session in sessions.items()}


def _size(network: nn.Module) -> dict[str, int]:
    tensors = stored(network)
    if any(isinstance(layer, SparseProduct) for layer in network.modules()):
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    else:
        size = len(checkpoint_bytes(network.state_dict()))
    return {"parameters": sum(tensor.numel() for tensor in tensors), "bytes": size}


def _images(count: int) -> Tensor:
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator(0, "deploy"))
    return images.to(memory_format=torch.channels_last)


def _sessions(networks: Mapping[str, nn.Module], threads: int) -> dict[str, Any]:
    """onnxruntime's sessions of networks without masks, none where its packages are missing."""
    if any(find_spec(package) is None for package in export.ONNX_PACKAGES):
        return {}
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    files = {form: export.onnx_bytes(clone_model(network), SIDE)[0] for form, network in networks.items()}
    return {form: onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            for form, file in files.items()}


def time_all(works: Mapping[Key, Callable[[], Any]], repeats: int) -> dict[Key, float]:
    """Median seconds of each, measured in turn; quick ones are done several times at once."""
    def several(work: Callable[[], Any], times: int) -> None:
        for _ in range(times):
            work()
    cpu = torch.device("cpu")
    first = benchmark.measure(list(works.values()), cpu, repeats=1)
    times = [max(1, round(MEASURED_S / row["median_s"])) for row in first]
    jobs = [partial(several, work, number) for work, number in zip(works.values(), times)]
    rows = benchmark.measure(jobs, cpu, repeats=repeats)
    return {key: row["median_s"] / number for key, row, number in zip(works, rows, times)}
