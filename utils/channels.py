"""Channels of a network: which of them each layer reads, found by following their numbers through the network.

The model is traced (`torch.fx`) and run once on an image-shaped tensor of numbers instead of values. Every operation
that computes (a convolution, an activation, a sum) starts new channels; operations that only move channels (slices,
concatenations, shuffles, flattening) are run on the numbers themselves, and so need no rule of their own. What is left
is a list of `Layer`s that read each other's channels, whatever the architecture.
"""
from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from utils.analysis_utils import clone_model, get_masks, remove_masks
from utils.common import SIDE, UserError

PLACE = 1 << 24  # ids per channel; in it, the position is row * ROW + column
ROW = 1 << 12

# What only moves channels, run on numbers; dropout does nothing in evaluation.
MOVES = {
    nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d, nn.ChannelShuffle, F.dropout, F.dropout2d, F.channel_shuffle,
    torch.cat, torch.concat, torch.stack, torch.chunk, torch.split, torch.narrow, torch.flatten, torch.reshape,
    torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, operator.getitem, getattr,
    "chunk", "split", "narrow", "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze",
    "contiguous", "size", "clone",
}
# What computes each channel from the same channel of its operands: by kind, first the function that does it.
TARGETS = {
    "relu": (F.relu, torch.relu, nn.ReLU, "relu", "relu_"),
    "relu6": (F.relu6, nn.ReLU6),
    "silu": (F.silu, nn.SiLU),
    "sigmoid": (torch.sigmoid, F.sigmoid, nn.Sigmoid, "sigmoid"),
    "tanh": (torch.tanh, F.tanh, nn.Tanh, "tanh"),
    "hardswish": (F.hardswish, nn.Hardswish),
    "hardsigmoid": (F.hardsigmoid, nn.Hardsigmoid),
    "add": (torch.add, operator.add, operator.iadd, "add", "add_"),
    "mul": (torch.mul, operator.mul, operator.imul, "mul", "mul_"),
    "max_pool": (F.max_pool2d, torch.max_pool2d, nn.MaxPool2d),
    "avg_pool": (F.avg_pool2d, nn.AvgPool2d),
    "adaptive_avg_pool": (F.adaptive_avg_pool2d, nn.AdaptiveAvgPool2d),
    "mean": (torch.mean, "mean"),
}
POOLS = {  # the names of their options, in the order of the function's arguments
    "max_pool": ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "avg_pool": ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptive_avg_pool": ("output_size",),
    "mean": ("dim", "keepdim"),
}
MODULES = {"conv": nn.Conv2d, "linear": nn.Linear, "batch_norm": nn.BatchNorm2d, "batch_norm_1d": nn.BatchNorm1d}
FUNCTIONS = {kind: targets[0] for kind, targets in TARGETS.items()}
KINDS = {target: kind for kind, targets in TARGETS.items() for target in targets}
KINDS |= {module: kind for kind, module in MODULES.items()}


@dataclass
class Layer:
    """One tensor that the network computes, (B, channels, ...), and the channels that it is computed from.

    Channels are numbered through the whole network: this layer's are first ... first + channels - 1. reads: for each
    operand, the numbers of its channels in order. module: of what has weights, and path, its name in the model.
    """

    name: str
    kind: str  # 'input', 'output', 'flatten' (maps to features), or a value of `KINDS`
    first: int
    channels: int
    spatial: tuple[int, ...]
    reads: list[Tensor] = field(default_factory=list)
    module: nn.Module | None = None
    path: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def span(self) -> slice:
        """Its channels' numbers."""
        return slice(self.first, self.first + self.channels)


class _Numbering(fx.Interpreter):
    """Runs a traced model on channel numbers and collects its layers."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.extra_traceback = False  # would be put into the messages of errors
        self.layers: list[Layer] = []
        self.owners: list[Layer] = []  # of each channel

    def run_node(self, node: fx.Node) -> Any:
        """The channel numbers of a node's result; UserError for an operation that is not known."""
        inputs = [self.env[source] for source in node.all_input_nodes]
        target = type(self.module.get_submodule(node.target)) if node.op == "call_module" else node.target
        if node.op == "placeholder":
            return self._start(node, "input", [])
        if node.op == "output":
            return self._start(node, "output", [self._channels(value, node) for value in inputs])
        if target in MOVES or not any(isinstance(value, (Tensor, tuple, list)) for value in inputs):
            return self._move(node, inputs)
        if target not in KINDS or not all(isinstance(value, Tensor) for value in inputs):
            raise _unknown(node, "is no operation that can be followed")
        return self._compute(node, KINDS[target], inputs)

    def _move(self, node: fx.Node, inputs: list[Any]) -> Any:
        """The operation on the numbers; where it turns maps into features, the features are new channels."""
        result = super().run_node(node)
        source = inputs[0] if inputs else None
        if isinstance(result, Tensor) and isinstance(source, Tensor) and (result.dim(), source.dim()) == (2, 4):
            if not torch.equal(result, source.flatten(1)):
                raise _unknown(node, "makes features of maps in another order than theirs")
            return self._start(node, "flatten", [self._channels(source, node)])
        return result

    def _compute(self, node: fx.Node, kind: str, inputs: list[Tensor]) -> Tensor:
        reads = [self._channels(value, node) for value in inputs]
        if len(reads) == 1 and node.args[1:] == node.args[:1]:
            reads *= 2  # x + x
        ranks, widths = {value.dim() for value in inputs}, {value.shape[1] for value in inputs} - {1}
        if len(ranks) > 1 or len(widths) > 1 or kind == "linear" and ranks != {2}:
            raise _unknown(node, "takes operands of other shapes than (B, channels, ...)")
        names = POOLS.get(kind, ())
        if node.op == "call_module":
            module = self.module.get_submodule(node.target)
            options = {name: getattr(module, name) for name in names}
            return self._start(node, kind, reads, options, module if kind in MODULES else None)
        given = node.args[len(inputs):] if len(reads) == len(inputs) else ()
        options = {**dict(zip(names, given)), **node.kwargs}
        options.pop("inplace", None)
        if len(given) > len(names) or set(options) - set(names):
            raise _unknown(node, "has arguments that cannot be followed")
        if kind == "mean" and options.get("dim") not in ([2, 3], (2, 3), [-2, -1], (-2, -1)):
            raise _unknown(node, "is a mean over other dimensions than height and width")
        return self._start(node, kind, reads, options)

    def _start(self, node: fx.Node, kind: str, reads: list[Tensor], options: Mapping[str, Any] | None = None,
               module: nn.Module | None = None) -> Tensor:
        """A new layer; returns the numbers of its elements, of the shape that it has for one image."""
        shape = node.meta["tensor_meta"].shape
        layer = Layer(node.name, kind, len(self.owners), shape[1], tuple(shape[2:]), reads, module,
                      str(node.target) if module is not None else "", dict(options or {}))
        self.layers.append(layer)
        self.owners += [layer] * layer.channels
        channels = torch.arange(layer.first, layer.first + layer.channels).mul(PLACE)
        return (channels.view(1, -1, *[1] * len(layer.spatial)) + _places(layer.spatial)).clone()

    def _channels(self, numbers: Tensor, node: fx.Node) -> Tensor:
        """The channels along dimension 1. UserError unless each is one whole channel, its map as it was computed."""
        spatial = tuple(numbers.shape[2:])
        if numbers.dim() in (2, 4):
            channels = numbers[(0, slice(None), *[0] * len(spatial))].div(PLACE, rounding_mode="floor")
            whole = channels.view(1, -1, *[1] * len(spatial)) * PLACE + _places(spatial)
            if torch.equal(numbers, whole) and all(self.owners[i].spatial == spatial for i in channels.tolist()):
                return channels
        raise _unknown(node, "reads something else than whole channels, along dimension 1")


def _unknown(node: fx.Node, problem: str) -> UserError:
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return UserError(f"{node.name} ({called}) {problem}; channels are followed through what moves them, and through "
                     f"{', '.join(sorted(set(KINDS.values())))}")


def _places(spatial: tuple[int, ...]) -> Tensor:
    """The position of each element in a map (or of a single feature), for broadcasting over (1, C, *spatial)."""
    if len(spatial) != 2:
        return torch.zeros([1] * (2 + len(spatial)), dtype=torch.int64)
    return torch.arange(spatial[0])[:, None] * ROW + torch.arange(spatial[1])


def trace(model: nn.Module, side: int = SIDE) -> list[Layer]:
    """The layers of a model for images (B, 3, side, side), in the order in which they run.

    The model is not changed; the layers' modules are those of a clone in float64, with masks multiplied out. UserError,
    with the operation's name, where the model cannot be traced (its forward pass depends on the values of tensors, say)
    or does what `KINDS` and `MOVES` lack.
    """
    dense = clone_model(model).eval().to("cpu", torch.float64)
    remove_masks(dense)
    try:
        traced = fx.symbolic_trace(dense)
        ShapeProp(traced).propagate(torch.zeros(1, 3, side, side, dtype=torch.float64))
    except (fx.proxy.TraceError, RuntimeError, TypeError, NameError) as error:
        raise UserError(f"the model cannot be traced for images of {side}x{side}: {error}") from error
    numbering = _Numbering(traced)
    numbering.run(torch.zeros(1), enable_io_processing=False)
    return numbering.layers


# --- which channels depend on which ---------------------------------------------------------------------------------


def positions(layer: Layer) -> Tensor:
    """For what has weights between channels, (outputs, inputs per group): the place in its operand that each reads."""
    outputs, inputs = layer.module.weight.shape[:2]
    groups = getattr(layer.module, "groups", 1)
    group = torch.arange(outputs).div(outputs // groups, rounding_mode="floor")
    return group[:, None] * inputs + torch.arange(inputs)


def links(weight: Tensor) -> Tensor:
    """bool (outputs, inputs per group): whether any weight other than 0 joins the two, of a weight or a mask."""
    return (weight != 0).flatten(2).any(2) if weight.dim() > 2 else weight != 0


def sources(layer: Layer, operand: Tensor) -> Tensor:
    """The operand's channel that each channel of a layer without weights between channels is computed from."""
    if layer.kind == "flatten":
        return operand.repeat_interleave(layer.channels // len(operand))
    return operand.expand(layer.channels)


def joined_channels(layer: Layer, joined: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Pairs of channels: one that the layer reads, and its own that depends on it. joined: `links` by layer."""
    own = torch.arange(layer.first, layer.first + layer.channels)
    if layer.path in joined:
        outputs, inputs = joined[layer.path].nonzero(as_tuple=True)
        return layer.reads[0][positions(layer)[outputs, inputs]], own[outputs]
    read = [sources(layer, operand) for operand in layer.reads]
    return torch.cat(read or [own]), own.repeat(max(1, len(read)))


def on_paths(layers: Sequence[Layer], joined: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """bool, by channel: whether any path of joined channels leads from the image to it, and from it to the output."""
    pairs = [joined_channels(layer, joined) for layer in layers]
    reached, leading = torch.zeros(2, layers[-1].span.stop, dtype=torch.bool)
    reached[layers[0].span] = leading[layers[-1].span] = True
    for read, own in pairs:
        reached[own[reached[read]]] = True
    for read, own in reversed(pairs):
        leading[read[leading[own]]] = True
    return reached, leading


# --- which channels are constant -------------------------------------------------------------------------------------


class Split(NamedTuple):
    """The inputs of a convolution (or linear layer, as a 1x1 one), split into image-dependent and constant ones.

    weight: (outputs, inputs per group, height, width), float64. varies: bool (outputs, inputs per group), where a
    weight reads a channel that depends on the image. folded: (outputs, height, width), by output and tap the sum of
    weight * constant. border: bool (outputs,), whether zero padding makes it differ near a map's border.
    """

    weight: Tensor
    varies: Tensor
    folded: Tensor
    border: Tensor


def split(layer: Layer, constant: Tensor) -> Split:
    """constant: the values of all channels, NaN where they depend on the image."""
    weight, edges = layer.module.weight.detach(), torch.zeros(1, 1, dtype=torch.bool)
    if layer.kind == "conv":
        edges = edge_taps(layer.module)
    else:
        weight = weight[:, :, None, None]
    values = constant[layer.reads[0]][positions(layer)]
    folded = (weight * values.nan_to_num(nan=0.0)[:, :, None, None]).sum(1)
    return Split(weight, links(weight) & values.isnan(), folded, (folded[:, edges] != 0).any(1))


def edge_taps(conv: nn.Conv2d) -> Tensor:
    """bool (kernel height, kernel width): the taps that read zero padding somewhere, in maps of one size or another."""
    edges = []
    for axis, size in enumerate(conv.kernel_size):
        offsets, pad = torch.arange(size) * conv.dilation[axis], 0
        if conv.padding_mode == "zeros" and conv.padding != "valid":
            pad = conv.dilation[axis] * (size - 1) if conv.padding == "same" else conv.padding[axis]
        edges.append((offsets < pad) | (offsets.flip(0) < pad))
    return edges[0][:, None] | edges[1]


def constants(layers: Sequence[Layer]) -> Tensor:
    """The value of each channel that is the same at all positions and for all images, NaN for the others; float64."""
    values = torch.full((layers[-1].span.stop,), torch.nan, dtype=torch.float64)
    for layer in layers:
        if layer.kind in ("conv", "linear"):
            parts = split(layer, values)
            found = bias_of(layer.module) + parts.folded.flatten(1).sum(1)
            values[layer.span] = found.masked_fill(parts.varies.any(1) | parts.border, torch.nan)
        elif layer.kind != "input":
            values[layer.span] = _constant(layer, [values[sources(layer, operand)] for operand in layer.reads])
    return values


def _constant(layer: Layer, operands: list[Tensor]) -> Tensor:
    """The constants of a layer whose channels are each computed from one channel of each operand."""
    first, norm = operands[0], layer.module
    if layer.kind.startswith("batch_norm"):
        if norm.running_var is None:
            raise UserError("a batch norm without running statistics mixes the images of a batch; it cannot be "
                            "compacted")
        found = norm(first.view(1, -1, *[1] * len(layer.spatial))).flatten()
        return torch.where(norm.weight == 0, norm.bias, found) if norm.affine else found
    if layer.kind in FUNCTIONS and layer.kind not in POOLS:
        found = FUNCTIONS[layer.kind](*operands)  # NaN where any of them is
        return found.masked_fill(torch.stack(operands).eq(0).any(0), 0.0) if layer.kind == "mul" else found
    options = layer.options
    if layer.kind == "avg_pool" and (options.get("padding", 0) not in (0, (0, 0)) or options.get("ceil_mode")
                                     or options.get("divisor_override") is not None):
        return first.masked_fill(first != 0, torch.nan)  # its windows average padding, too
    return first


def bias_of(module: nn.Module) -> Tensor:
    """Its bias, zeros where it has none."""
    return module.weight.new_zeros(len(module.weight)) if module.bias is None else module.bias.detach()


# --- effective sparsity ---------------------------------------------------------------------------------------------


def live_positions(model: nn.Module, side: int = SIDE) -> dict[str, Tensor]:
    """By prunable layer, a bool tensor of the weight's shape: True where a weight, if it were active, would lie on a
    path of active weights from the image to the output. Layers that never run have none.

    UserError as `trace`.
    """
    layers, masks = trace(model, side), {name: mask.cpu() for name, mask in get_masks(model).items()}
    joined = {name: links(mask) for name, mask in masks.items()}
    above, below = on_paths(layers, joined)
    live = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    for layer in layers:
        if layer.path in live:
            both = above[layer.reads[0]][positions(layer)] & below[layer.span][:, None]
            live[layer.path] |= both.view(*both.shape, *[1] * (live[layer.path].dim() - 2))
    return live


def count_live(model: nn.Module, weights: Mapping[str, Tensor], side: int = SIDE) -> int | None:
    """How many of these weights lie on a path of active weights from the image to the output.

    weights: by prunable layer, bool of the weight's shape. None for a model that cannot be followed (`trace`).
    """
    try:
        live = live_positions(model, side)
    except UserError:
        return None
    return sum(int((live[name] & chosen.cpu()).sum()) for name, chosen in weights.items())


def effective_sparsity(model: nn.Module, side: int = SIDE) -> float | None:
    """1 - (active weights on a path of active weights from the image to the output) / weights, in [0, 1].

    Vysogorets and Kempe, "Connectivity matters: neural network pruning through the lens of effective sparsity" (JMLR
    2023): it is at least the sparsity, since a weight whose input or output is cut off does nothing. Masks decide, not
    values: a weight that was just regrown at zero counts as active. None for a model that cannot be followed (`trace`).
    """
    masks = get_masks(model)
    live = count_live(model, masks, side)
    return None if live is None else 1 - live / sum(mask.numel() for mask in masks.values())
