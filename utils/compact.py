"""A smaller network instead of a sparser one: `compact(model)` removes what the masks have killed, exactly.

Three analyses over the layers of `utils.channels`, none of which knows an architecture:

1. Constants. A channel that no path of weights joins to the image has the same value everywhere, which is computed (a
   batch norm makes it nonzero). Padding ends that: a convolution that reads a nonzero constant over zero padding sees
   the border, unless only weights that never reach the padding read it.
2. Needs. Backwards from the logits: which channels a later layer reads. What nobody reads goes.
3. Folding. Constants that a layer reads go into its bias where that is exact. Where padding forbids it, all constants
   that a convolution reads become one: sum of v_c * w_c over the constants c, divided by the v of the one that stays.
   A sum with one constant operand keeps it as a vector; single constant channels in a sum stay, as filters of zeros.
   Removing these would not be exact, or would cost copies.

Channel shuffles, slices and concatenations disappear into the order in which weights are stored.

The result is written as a list of steps, plain data that any loader can check, in the order in which they run:

    {"name": "layer1.0.conv1", "kind": "conv", "inputs": ["relu"], "options": {"in_channels": 9, ...}}

`name` is what later steps call the result by, and where its tensors lie in the state dict. Kinds are those of
`utils.channels.KINDS`, and `take` (some channels, in some order), `cat`, `constant`, `flatten`, `input`, `output`.
"""
from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from utils.analysis_utils import clone_model
from utils.channels import FUNCTIONS, MODULES, Layer, bias_of, constants, links, sources, split, trace
from utils.checkpoint import load_checkpoint
from utils.common import SIDE, RunFailed, UserError

Step = dict[str, Any]
FORMAT = "compact network 1"
TOLERANCE = 1e-6  # of the largest logit, in float64
CONV_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
PADDINGS = ("same", "valid", "zeros", "reflect", "replicate", "circular")
FRESH = ("conv", "batch_norm", "add", "mul")  # kinds whose result an activation may overwrite in place


class Compact(NamedTuple):
    """A compact network and its description."""

    network: fx.GraphModule
    steps: list[Step]


@torch.no_grad()
def compact(model: nn.Module, side: int = SIDE) -> Compact:
    """A dense network that gives the same logits in evaluation mode, with nothing in it that does nothing.

    model: pruned, with or without masks (exact zeros count as pruned); it is not changed. The result works for every
    image size that the model does. Raises UserError where the model cannot be traced for images of side x side, or has
    an operation that is not known (`utils.channels`), RunFailed if the result's logits differ from the model's.
    """
    writer = _Writer(_Plan(trace(model, side)))
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    difference = largest_difference(clone_model(model).cpu().double(), build(writer.steps, writer.state), images)
    if not difference < TOLERANCE:  # in float64, where rounding cannot be mistaken for more
        raise RunFailed(f"the compact network's logits differ from the model's by {difference:.2g} of the largest one; "
                        "the model does something that its operations do not show")
    dtype = next(model.parameters()).dtype
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in writer.state.items()}
    return Compact(build(writer.steps, state), writer.steps)


@torch.no_grad()
def largest_difference(model: nn.Module, other: nn.Module, images: Tensor) -> float:
    """max |difference of the logits| / max |logit of the model| over the images, in evaluation mode."""
    expected, found = clone_model(model).eval()(images), other.eval()(images)
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))


# --- needs ----------------------------------------------------------------------------------------------------------


class _Plan:
    """Which channels stay.

    kept: bool, by channel; columns: for a convolution or linear layer that is written anew, bool, the places in its
    operand that it reads; carriers: where it sees constants over padding, the place of the one that stays for all.
    """

    def __init__(self, layers: list[Layer]):
        self.layers, self.constant = layers, constants(layers)
        self.spatial = [layer.spatial for layer in layers for _ in range(layer.channels)]
        self.kept = torch.zeros(len(self.constant), dtype=torch.bool)
        self.columns: dict[str, Tensor] = {}
        self.carriers: dict[str, int] = {}
        for layer in reversed(layers):
            self._mark(layer)

    def _mark(self, layer: Layer) -> None:
        """Marks what the layer reads for those of its channels that stay."""
        stays = self.kept[layer.span]  # a view
        if layer.kind in ("input", "output") or is_grouped(layer) and stays.any():
            stays[:] = True
        if layer.kind == "flatten":
            maps = stays.view(len(layer.reads[0]), -1)
            maps[:] = maps.any(1, keepdim=True)  # all features of a map, or none
        if not stays.any():
            return
        if is_grouped(layer):
            self.kept[layer.reads[0]] = True
        elif mixes_channels(layer):
            self._mark_weighted(layer, stays)
        else:
            for operand in self.computed(layer):
                self.kept[sources(layer, operand)[stays]] = True

    def _mark_weighted(self, layer: Layer, stays: Tensor) -> None:
        reads, parts = layer.reads[0], split(layer, self.constant)
        used = parts.varies[stays].any(0)
        if parts.border[stays].any():
            values = self.constant[reads].nan_to_num(nan=0.0).abs() * links(parts.weight)[stays].any(0)
            already = values * self.kept[reads]
            self.carriers[layer.name] = int((already if already.any() else values).argmax())
            used[self.carriers[layer.name]] = True
        if not used.any():
            used[self.kept[reads].long().argmax()] = True  # an output that reads nothing still needs a map's size
        self.columns[layer.name] = used
        self.kept[reads[used]] = True

    def computed(self, layer: Layer) -> list[Tensor]:
        """The operands to compute: all but those that are constant wherever they are read, unless they set the map's
        size (a gate of 1x1 does not)."""
        stays = self.kept[layer.span]
        varying = [operand for operand in layer.reads
                   if self.constant[sources(layer, operand)[stays]].isnan().any()]
        for chosen in [varying] if varying else [[operand] for operand in layer.reads]:
            spatial = torch.broadcast_shapes(*(self.spatial[int(operand[0])] for operand in chosen))
            if spatial == layer.spatial != (1, 1):  # 1x1 maps may grow with the image
                return chosen
        return layer.reads


def mixes_channels(layer: Layer) -> bool:
    """Whether it is a linear layer or a convolution, unless that filters each map by itself."""
    depthwise = layer.kind == "conv" and layer.module.groups == layer.module.in_channels == layer.module.out_channels
    return layer.kind in ("conv", "linear") and not depthwise


def is_grouped(layer: Layer) -> bool:
    """Whether it is a convolution of several groups that are not single maps: it is left as it is."""
    return layer.kind == "conv" and layer.module.groups > 1 and mixes_channels(layer)


# --- the network that is left ---------------------------------------------------------------------------------------


class _Writer:
    """Writes the steps of what stays, and their tensors. A step may hold channels in another order than the model."""

    def __init__(self, plan: _Plan):
        self.plan, self.steps, self.state = plan, [], {}
        self.results: dict[int, tuple[str, int]] = {}  # first channel of a layer -> step, its channels
        self.fetched: dict[tuple[int, ...], str] = {}
        count = len(plan.kept)
        self.owners, self.at = torch.empty(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
        for layer in plan.layers:
            self.owners[layer.span] = layer.first
            stays = plan.kept[layer.span]
            if stays.any():
                self._write(layer, stays)

    def _write(self, layer: Layer, stays: Tensor) -> None:
        if layer.kind == "input":
            self._hold(layer, self._step(layer.name, "input", []), torch.arange(layer.channels))
        elif layer.kind == "output":
            self._step(layer.name, "output", [self._fetch(layer.reads[0])])
        elif layer.kind == "flatten":
            self._write_flatten(layer, stays)
        elif mixes_channels(layer):
            self._write_weighted(layer, stays)
        else:
            self._write_each(layer, stays)

    def _step(self, name: str, kind: str, inputs: list[str], **options: Any) -> str:
        """Adds a step under a name that no other has; returns it."""
        taken = {step["name"] for step in self.steps}
        free = next(each for each in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 1))) if each not in taken)
        self.steps.append({"name": free, "kind": kind, "inputs": inputs, "options": options})
        return free

    def _hold(self, layer: Layer, step: str, local: Tensor) -> None:
        """From now on the step holds these channels of the layer, in this order."""
        self.results[layer.first] = step, len(local)
        self.at[layer.first + local] = torch.arange(len(local))

    def _order(self, channels: Tensor) -> Tensor:
        """The order in which channels come cheapest: by layer, and as its step holds them."""
        return torch.argsort(self.owners[channels] + self.at[channels], stable=True)

    def _fetch(self, channels: Tensor) -> str:
        """A step that holds these channels in this order."""
        key = tuple(channels.tolist())
        if key not in self.fetched:
            owners = self.owners[channels]
            firsts = list(dict.fromkeys(owners.tolist()))
            parts = [self._take(*self.results[first], self.at[channels[owners == first]]) for first in firsts]
            step = parts[0] if len(parts) == 1 else self._step("cat", "cat", parts)
            order = torch.cat([(owners == first).nonzero().flatten() for first in firsts])
            self.fetched[key] = self._take(step, len(key), order.argsort())
        return self.fetched[key]

    def _take(self, step: str, held: int, index: Tensor) -> str:
        """A step with some of the channels of another, which holds so many."""
        if torch.equal(index, torch.arange(held)):
            return step
        if torch.equal(index, index[0] + torch.arange(len(index))):
            return self._step("take", "take", [step], start=int(index[0]), length=len(index))
        taken = self._step("take", "take", [step])
        self.state[taken] = index
        return taken

    def _write_flatten(self, layer: Layer, stays: Tensor) -> None:
        maps = stays.view(len(layer.reads[0]), -1)
        left = maps.any(1).nonzero().flatten()
        left = left[self._order(layer.reads[0][left])]
        step = self._step(layer.name, "flatten", [self._fetch(layer.reads[0][left])])
        self._hold(layer, step, (left[:, None] * maps.shape[1] + torch.arange(maps.shape[1])).flatten())

    def _write_each(self, layer: Layer, stays: Tensor) -> None:
        """A layer whose channels are each computed from one channel of each operand."""
        computed, left, module = self.plan.computed(layer), stays.nonzero().flatten(), layer.module
        left = left[self._order(sources(layer, computed[0])[left])]
        inputs = []
        for operand in layer.reads:
            wanted = sources(layer, operand)[left]
            if any(operand is other for other in computed):
                inputs.append(self._fetch(wanted))
            else:
                inputs.append(self._step("constant", "constant", []))
                self.state[inputs[-1]] = self.plan.constant[wanted].view(1, -1, *[1] * len(layer.spatial))
        if layer.kind == "conv":
            self._write_weights(layer, inputs, module.weight.detach()[left], bias_of(module)[left], len(left))
        elif module is None:
            self._step(layer.name, layer.kind, inputs, **layer.options)
        else:
            name = self._step(layer.path, layer.kind, inputs, num_features=len(left), eps=module.eps,
                              momentum=module.momentum, affine=module.affine)
            for key, value in module.state_dict().items():
                self.state[f"{name}.{key}"] = value[left] if value.dim() else value
        self._hold(layer, self.steps[-1]["name"], left)

    def _write_weighted(self, layer: Layer, stays: Tensor) -> None:
        """A convolution or linear layer that mixes channels; what it reads of constants is folded."""
        reads, parts, bias = layer.reads[0], split(layer, self.plan.constant), bias_of(layer.module)[stays]
        if is_grouped(layer):
            self._write_weights(layer, [self._fetch(reads)], parts.weight, bias, layer.module.groups)
        else:
            columns = self.plan.columns[layer.name].nonzero().flatten()
            columns = columns[self._order(reads[columns])]
            weight = (parts.weight * parts.varies[:, :, None, None])[stays][:, columns]
            folded, carrier = parts.folded[stays], self.plan.carriers.get(layer.name)
            if carrier is None:
                bias = bias + folded.flatten(1).sum(1)
            else:
                weight[:, columns == carrier] = folded[:, None] / self.plan.constant[reads[carrier]]
            self._write_weights(layer, [self._fetch(reads[columns])], weight, bias)
        self._hold(layer, self.steps[-1]["name"], stays.nonzero().flatten())

    def _write_weights(self, layer: Layer, inputs: list[str], weight: Tensor, bias: Tensor, groups: int = 1) -> None:
        """A convolution or linear layer with these parameters, of the shapes of `Split`."""
        if layer.kind == "conv":
            options = {"in_channels": weight.shape[1] * groups, "out_channels": len(weight), "groups": groups}
            options |= {name: getattr(layer.module, name) for name in CONV_OPTIONS}
        else:
            options, weight = {"in_features": weight.shape[1], "out_features": len(weight)}, weight.flatten(1)
        with_bias = layer.module.bias is not None or bool(bias.any())
        name = self._step(layer.path, layer.kind, inputs, **options, bias=with_bias)
        self.state[f"{name}.weight"] = weight.contiguous()
        if with_bias:
            self.state[f"{name}.bias"] = bias


# --- from its description to the network ----------------------------------------------------------------------------


def build(steps: Sequence[Step], state: Mapping[str, Tensor]) -> fx.GraphModule:
    """The network of a description, in evaluation mode, with the tensors of `state`, which it shares.

    It maps images (B, 3, S, S) to logits. Raises UserError for a description that is not one, or a state dict that does
    not fit it, before anything is allocated. PyTorch turns a graph into Python code and runs that: names and options
    are checked first.
    """
    try:
        graph, root = _graph(steps, state)
        network = fx.GraphModule(root, graph)
        network.load_state_dict(state, assign=True)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, SyntaxError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"this is not the description of a compact network, or it is damaged: {reason}") from error
    return network.eval().to(memory_format=torch.channels_last)


def _graph(steps: Sequence[Step], state: Mapping[str, Tensor]) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph of all steps, and what it calls or reads by name; the modules hold no memory yet."""
    graph, root, nodes = fx.Graph(), {}, {}
    users = [name for step in steps for name in step["inputs"]]
    kinds = {step["name"]: step["kind"] for step in steps}
    for step in steps:
        _check(step)
        name, kind, options = step["name"], step["kind"], dict(step["options"])
        inputs = [nodes[source] for source in step["inputs"]]
        if kind == "input":
            nodes[name] = graph.placeholder("images")
        elif kind == "output":
            graph.output(*inputs)
        elif kind in MODULES:
            root[name] = MODULES[kind](**options, device="meta")
            nodes[name] = graph.call_module(name, tuple(inputs))
        elif kind == "constant":
            root[name] = state[name]
            nodes[name] = graph.get_attr(name)
        elif kind == "take" and options:  # neighbouring channels, as a view
            part = slice(options["start"], options["start"] + options["length"])
            nodes[name] = graph.call_function(operator.getitem, (*inputs, (slice(None), part)))
        elif kind == "take":
            root[name] = state[name]
            nodes[name] = graph.call_function(torch.index_select, (*inputs, 1, graph.get_attr(name)))
        elif kind == "cat":
            nodes[name] = graph.call_function(torch.cat, (inputs,), {"dim": 1})
        elif kind == "flatten":
            nodes[name] = graph.call_function(torch.flatten, tuple(inputs), {"start_dim": 1})
        else:
            source = step["inputs"][0]
            if kind in ("relu", "relu6", "silu") and users.count(source) == 1 and kinds[source] in FRESH:
                options["inplace"] = True
            nodes[name] = graph.call_function(FUNCTIONS[kind], tuple(inputs), options)
    return graph, root


def _check(step: Step) -> None:
    """ValueError unless name and options are no more than names and plain values."""
    names = [step["name"], *step["options"]]
    if bad := [name for name in names if not isinstance(name, str) or not NAME.fullmatch(name)]:
        raise ValueError(f"{bad[0]!r} is no name")
    for value in step["options"].values():
        parts = value if isinstance(value, (tuple, list)) else [value]
        if not all(part is None or type(part) in (int, float, bool) or part in PADDINGS for part in parts):
            raise ValueError(f"step {step['name']} has an option {value!r}")


def content(steps: Sequence[Step], state: Mapping[str, Tensor], **facts: Any) -> dict[str, Any]:
    """What a file of a compact network holds: format, facts (plain values), description, state dict."""
    return {"format": FORMAT, **facts, "steps": list(steps), "state_dict": dict(state)}


def is_compact(loaded: Any) -> bool:
    """Whether a loaded checkpoint is a compact network, of this version or another."""
    return isinstance(loaded, Mapping) and str(loaded.get("format", "")).startswith(FORMAT.rpartition(" ")[0])


def network_of(loaded: Mapping[str, Any]) -> fx.GraphModule:
    """The network in a loaded file. UserError if it is of another version, or damaged."""
    if loaded["format"] != FORMAT:
        raise UserError(f"this is a {loaded['format']!r}, and this version reads {FORMAT!r}")
    return build(loaded.get("steps", ()), loaded.get("state_dict", {}))


def load_network(path: Path) -> fx.GraphModule:
    """The network in a file that `inspect_checkpoint.py --compact --export dense` wrote, in evaluation mode.

    UserError for any other file; nothing in it is executed.
    """
    loaded = load_checkpoint(path)
    if not is_compact(loaded):
        raise UserError(f"{path} is no compact network; inspect_checkpoint.py --compact --export dense makes one")
    return network_of(loaded)
