"""Models for use outside of this repository: dense state dicts, sparse files (`utils.sparse_file`), ONNX; of the model
as it is, or of the smaller network that does the same (`utils.compact`). And `--size_budget`: how many weights may
survive so that the sparse file just fits.
"""
from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import sparse_file, stage1
from utils.analysis_utils import clone_model, count_pruned_params, is_binary, prunable_layers, remove_masks, set_masks
from utils.checkpoint import card_path, checkpoint_bytes, ensure_writable, save_json
from utils.common import SIDE, RunFailed, UserError, generator, note, write_atomic
from utils.compact import Compact, compact, content, largest_difference
from utils.inspection import Artifact, fitting_models, layer_rows, load_artifact
from utils.model_loader import has_mask_entries, load_model_state, model_loader
from utils.pruning import check_reach, prune_to
from utils.run import Run
from utils.stage1 import Outcome, PruneStep

ACCURACIES = ("val_acc", "test_acc")  # in a run card
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_TOLERANCE = 1e-4  # of logits, and of the largest of them where that is above 1
LARGEST_SIDE = 1024  # pixels of an image; what asks for more can only be damaged
ONNX_BATCHES = (1, 2, 5)  # images, on which PyTorch and onnxruntime are compared
UNITS = {"KB": 1000, "KiB": 1024, "MB": 1000**2, "MiB": 1024**2}
WEIGHT = 4  # bytes of a float32
LAYER = 32  # at most so many bytes a layer for longer index entries and byte padding

Export = tuple[bytes, str]  # what becomes a file, and what there is to say about it


# --- options -------------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of exports, None unless given."""
    group = parser.add_argument_group("export")
    group.add_argument("--export", choices=list(FORMATS), help="dense: a state dict for plain PyTorch; sparse: a "
                       "sparse file, which every script reads; onnx: for other programs")
    group.add_argument("--out", type=Path, metavar="FILE", help="the file to write")
    group.add_argument("--compact", action="store_true", help="with dense or onnx: the smaller network that is left "
                       "when all is removed that the masks have killed; dense is then a description and a state dict")
    group.add_argument("--dtype", choices=list(sparse_file.FLOATS), help="of the weights in a sparse file, default: "
                       "float32, which keeps every bit")


def check_options(args: argparse.Namespace) -> None:
    """UserError for options without an export, an export without a file, and a --dtype that the form does not have."""
    given = [name for name in ("out", "compact", "dtype") if getattr(args, name)]
    if given and not args.export:
        raise UserError(f"--{given[0]} has no effect without --export")
    if args.export and not args.out:
        raise UserError(f"--export {args.export} needs a file to write: --out FILE")
    if args.export and (args.finetune or args.json):
        raise UserError(f"--export writes what --file holds; leave out --{'finetune' if args.finetune else 'json'}")
    if args.compact and args.export not in COMPACT:
        raise UserError(f"--compact is for --export {' and '.join(COMPACT)}: what is left is dense")
    if args.dtype and args.export != "sparse":
        raise UserError(f"--dtype is for --export sparse; --export {args.export} has none")


# --- the flow ------------------------------------------------------------------------------------------------------


def export(artifact: Artifact, form: str, out: Path, dtype: str = "float32", overwrite: bool = False,
           smaller: bool = False) -> str:
    """Writes the model of an artifact to `out` in a form of `FORMATS`, with its run card, if it has one, beside it.

    dtype: of a sparse file's weights, 'float32' or 'float16', which rounds them: its card then lacks `ACCURACIES`,
    measured on other weights, so that they are measured when needed; smaller: write the compact network in its place,
    in a form of `COMPACT`. Returns a line that says what was written. Raises UserError for an artifact without a sound
    model, for files that are there already unless `overwrite`, and where packages are missing; RunFailed when the model
    cannot be exported. Files are written last, whole or not at all.
    """
    ensure_writable(out.parent, "--out")
    if out.exists() and artifact.path.exists() and out.samefile(artifact.path):
        raise UserError(f"--out {out} is the file that is exported; give another name")
    existing = [path for path in (out, card_path(out)) if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]} exists; give --out another name, or --overwrite")
    _check_sound(artifact)
    content, remark = (COMPACT if smaller else FORMATS)[form](artifact, dtype)
    write_atomic(out, content)
    if artifact.card:
        origin = {"format": f"compact {form}" if smaller else form, "dtype": dtype, "from": artifact.card["sha256"]}
        facts = {key: value for key, value in artifact.card.items() if dtype == "float32" or key not in ACCURACIES}
        save_json({**facts, "sha256": hashlib.sha256(content).hexdigest(), "exported": origin}, card_path(out))
    else:
        card_path(out).unlink(missing_ok=True)  # of what stood there before
    return f"{out}: {len(content):,} bytes; {remark}"


def _check_sound(artifact: Artifact) -> None:
    """UserError for values that are not finite and for masks of other values than 0 and 1."""
    for key, value in artifact.weights.items():
        if not bool(value.isfinite().all()):
            raise UserError(f"{artifact.path}: {key} has values that are not finite (NaN or infinite); no use can be "
                            "made of the model")
        if key.endswith("weight_mask") and not is_binary(value):
            raise UserError(f"{artifact.path}: {key} has values other than 0 and 1")


# --- dense and compact ---------------------------------------------------------------------------------------------


def dense_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without masks, contiguous: pruned weights are 0."""
    dense = {}
    for key, value in state.items():
        mask = state.get(f"{key.removesuffix('_orig')}_mask") if key.endswith("weight_orig") else None
        if mask is not None:
            dense[key.removesuffix("_orig")] = torch.where(mask != 0, value, 0).contiguous()
        elif not key.endswith("weight_mask"):
            dense[key] = value.contiguous()
    return dense


def _dense(artifact: Artifact, dtype: str) -> Export:
    return checkpoint_bytes(dense_state(artifact.weights)), (
        f"{_counts(artifact)}; plain PyTorch reads it: model.load_state_dict(torch.load(FILE, weights_only=True))")


def _sparse(artifact: Artifact, dtype: str) -> Export:
    state, dense = artifact.weights, dense_state(artifact.weights)
    try:
        content = sparse_file.encode(state, dtype)
    except ValueError as error:
        remedy = "; leave out --dtype float16" if dtype == "float16" else ""
        raise UserError(f"{artifact.path}: {error}{remedy}") from error
    if any(value.dtype == torch.float64 and not torch.equal(value, value.float().double()) for value in dense.values()):
        note(f"{artifact.path}: its float64 values are rounded to {dtype}")
    size = sum(value.numel() * value.element_size() for value in dense.values())
    lost = "; the values that pruned weights had are not in it" if has_mask_entries(state) else ""
    return content, (f"{_counts(artifact)}, {size / len(content):.1f} times smaller than their {size:,} bytes{lost}; "
                     "every script reads it like a checkpoint")


def _counts(artifact: Artifact) -> str:
    rows = layer_rows(artifact.weights, artifact.layers)
    return f"{sum(row['active'] for row in rows):,} of {sum(row['weights'] for row in rows):,} weights"


# --- ONNX ----------------------------------------------------------------------------------------------------------


def _onnx(artifact: Artifact, dtype: str, smaller: bool = False) -> Export:
    check_onnx_packages()
    if smaller:
        made, counts = _compact(artifact)
        model = made.network
    else:
        model, counts = network_of(artifact), _counts(artifact)
        remove_masks(model)
    content, difference = onnx_bytes(model, side_of(artifact), artifact.input)
    return content, (f"{counts}; images (batch, 3, side, side) -> logits (batch, classes); onnxruntime's logits are "
                     f"PyTorch's within {difference:.1g}")


def network_of(artifact: Artifact) -> nn.Module:
    """The artifact's network, with masks where it has them. UserError if it is none of this project's."""
    if artifact.network is None:
        several = ", ".join(fitting_models(artifact.weights))
        raise UserError(f"{artifact.path} fits {several}, and no run card says which it is; name it with --m_name"
                        if several else f"{artifact.path} fits none of this project's models, and this needs the "
                        "network itself; add it to MODELS in utils/models/__init__.py")
    model = model_loader(artifact.network[0], num_classes=artifact.network[1], seed=0)
    load_model_state(model, artifact.weights, str(artifact.path))
    return model


def side_of(artifact: Artifact) -> int:
    """Pixels of the images that the model was trained on. UserError for what cannot be a size."""
    side = artifact.input.get("image_size", SIDE)
    if type(side) is not int or not 0 < side <= LARGEST_SIDE:
        raise UserError(f"{artifact.path} was trained on images of image_size {side!r}, by its own account; a number "
                        f"of pixels from 1 to {LARGEST_SIDE} would be right")
    return side


def check_onnx_packages() -> None:
    """UserError that says what to install where ONNX files cannot be made or checked."""
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install -r requirements-export.txt")


def onnx_bytes(model: nn.Module, image_size: int, known: Mapping[str, Any] | None = None) -> tuple[bytes, float]:
    """An ONNX file of a model without masks, by PyTorch's exporter, and how far onnxruntime's logits are from
    PyTorch's.

    It maps `images` (batch, 3, image_size, image_size), any batch, to `logits` (batch, classes). known: what a model
    needs to know of its input, into the file's metadata as JSON. The difference is the largest of random images, in
    units of the largest logit where that is above 1. Raises RunFailed when the exporter fails, or the difference is
    above `ONNX_TOLERANCE`.
    """
    import onnx  # an optional extra

    model = model.to("cpu", memory_format=torch.contiguous_format).eval()
    image = torch.zeros(2, 3, image_size, image_size)
    try:
        proto = _quietly(lambda: torch.onnx.export(
            model, (image,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=["images"],
            output_names=["logits"], verbose=False).model_proto)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise RunFailed(f"PyTorch's ONNX exporter failed: {type(error).__name__}: {reason[:200]}") from error
    for node in proto.graph.node:  # the exporter's own stack traces, with the paths of this machine
        del node.metadata_props[:]
    onnx.helper.set_model_props(proto, {"input": json.dumps(known)} if known else {})
    content = proto.SerializeToString(deterministic=True)
    difference = _onnx_difference(content, model, image_size)
    if not difference <= ONNX_TOLERANCE:
        raise RunFailed(f"onnxruntime's logits differ from PyTorch's by {difference:.2g}, more than {ONNX_TOLERANCE:g}")
    return content, difference


def _quietly(make: Callable[[], Any]) -> Any:
    """What `make` returns, without what the exporter prints, logs and warns of."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return make()
    finally:
        logging.disable(disabled)


def _onnx_difference(content: bytes, model: nn.Module, image_size: int) -> float:
    import onnxruntime  # an optional extra

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    dice, largest = generator(0, "onnx"), 0.0
    for batch in ONNX_BATCHES:
        images = torch.randn(batch, 3, image_size, image_size, generator=dice)
        with torch.no_grad():
            expected = model(images)
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        scale = max(1.0, float(expected.abs().max()))
        largest = max(largest, float((expected - found).abs().max()) / scale)
    return largest


# --- the compact network -------------------------------------------------------------------------------------------


def _compact_dense(artifact: Artifact, dtype: str) -> Export:
    made, counts = _compact(artifact)
    packed = content(made.steps, made.network.state_dict(), input=artifact.input)
    return checkpoint_bytes(packed), f"{counts}; utils.compact.load_network(FILE) builds it"


def _compact(artifact: Artifact) -> tuple[Compact, str]:
    """The compact network, and what it has of the model's weights, in words."""
    model, side = network_of(artifact), side_of(artifact)
    made = compact(model, side)
    images = torch.randn(8, 3, side, side, generator=generator(0, "compact"))
    difference = largest_difference(model, made.network, images)
    after, before = ([layer.weight for layer in prunable_layers(each).values()] for each in (made.network, model))
    left, total = (sum(weight.numel() for weight in weights) for weights in (after, before))
    filters, outputs = (sum(len(weight) for weight in weights) for weights in (after, before))
    gone = "no filter is dead, nothing was removed" if left == total else f"{filters:,} of {outputs:,} filters are left"
    return made, (f"{_counts(artifact)}, now a dense network of {left:,}: {gone}; its logits are the model's "
                  f"within {difference:.1g}")


FORMATS: dict[str, Callable[[Artifact, str], Export]] = {"dense": _dense, "sparse": _sparse, "onnx": _onnx}
COMPACT = {"dense": _compact_dense, "onnx": partial(_onnx, smaller=True)}


# --- as many weights as fit into a size ----------------------------------------------------------------------------
# Where the mask moves while the model trains, or is made in several iterations, the positions are unknown beforehand
# and the worst are provided for. One-shot prunings of the dense model are tried on copies: not one weight more fits.


def byte_size(text: str) -> int:
    """An argparse type: the bytes of ``64KB``, ``1.2MiB`` and the like."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", text)
    if not found or float(found[1]) * UNITS[found[2]] < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no size in {', '.join(UNITS)}, such as 64KB or 1.2MiB")
    return int(float(found[1]) * UNITS[found[2]])


def worst_sizes(model: nn.Module) -> Callable[[int], int]:
    """An upper bound on the sparse file's bytes by the number of surviving weights, wherever they lie.

    With one shift l for all layers, n survivors of N weights take n (l + 1) + (N - n) / 2^l bits or fewer, as the gaps
    of all layers add up to N - n at most; with the shift that is best for each layer they take no more.
    """
    layers, total = prunable_layers(model), count_pruned_params(model).total
    empty = clone_model(model)
    set_masks(empty, {name: torch.zeros_like(layer.weight) for name, layer in layers.items()})
    fixed = len(sparse_file.encode(empty.state_dict())) + LAYER * len(layers)

    def size_of(keep: int) -> int:
        bits = min(keep * (shift + 1) + ((total - keep) >> shift) for shift in range(sparse_file.LARGEST_SHIFT + 1))
        return fixed + keep * WEIGHT + bits // 8
    return size_of


def safe_sparsity(model: nn.Module, pruner: str, budget: int) -> float:
    """The least sparsity at which the sparse file fits into `budget` bytes, whichever weights survive.

    UserError where the fewest weights that the pruner can leave take more, with the smallest budget that works, and
    where all weights fit.
    """
    total, size_of = count_pruned_params(model).total, worst_sizes(model)
    keep = bisect_right(range(1, total), budget, key=size_of)
    if keep == total - 1:
        raise UserError(f"--size_budget: {budget:,} bytes hold all {total:,} weights; there is nothing to prune")
    fewest = _fewest(model, pruner)
    if keep < fewest:
        raise UserError(f"--size_budget: {budget:,} bytes are too few for this model and pruner; the smallest budget "
                        f"that works is {size_of(fewest) / 1000 + 0.05:.1f}KB, for {fewest:,} of {total:,} weights and "
                        "all that is never pruned")
    return 1.0 - keep / total


def _fewest(model: nn.Module, pruner: str) -> int:
    """The fewest weights that the pruner can leave; 1 for most."""
    total = count_pruned_params(model).total

    def works(keep: int) -> bool:
        try:
            check_reach(clone_model(model), [keep], pruner)
        except UserError:
            return False
        return True
    return 1 if works(1) else 1 + bisect_right(range(1, total), False, key=works)


def fit(run: Run, dense: Outcome, step: PruneStep, budget: int) -> PruneStep:
    """The one-shot step with the least sparsity that fits `budget` bytes: with one weight more it would not.

    step: with the sparsity of `safe_sparsity`. Which weights survive says its pruner on a copy of the dense model;
    finetuning changes their values only, which have one size.
    """
    total, evidence = count_pruned_params(dense.model).total, stage1.pruning_evidence(run, dense.model)

    def size_of(keep: int) -> int:
        model = clone_model(dense.model)
        prune_to(model, keep, step.pruner, stage1.pruning_seed(run, step), evidence)
        return len(sparse_file.encode(model.state_dict()))
    fewest, most = round((1.0 - step.sparsity) * total), min(total, budget // WEIGHT + 2)
    keep = fewest - 1 + bisect_right(range(fewest, most), budget, key=size_of)
    return replace(step, sparsity=1.0 - keep / total)


def write_within(outcome: Outcome, budget: int) -> str:
    """Writes the sparse file of a finished model beside it; returns a line about it.

    RunFailed when it does not fit, as when another model was there already and taken as it is.
    """
    path = outcome.artifact.with_suffix(".sparse")
    facts = export(load_artifact(outcome.artifact), "sparse", path, overwrite=True).partition(";")[0]
    if path.stat().st_size > budget:
        raise RunFailed(f"{facts}, more than the budget of {budget:,}; {outcome.artifact} was made with other "
                        "arguments: use --overwrite to redo it, or --root for another place")
    return f"{facts} of {budget:,}"
