"""A smaller network instead of a sparser one: `compact(model)` removes what the masks have killed, exactly.

Three analyses over the layers of `utils.channels`, none of which knows an architecture:

1. Constants. A channel that no path of weights joins to the image has the same value everywhere, which is computed (a
   batch norm makes it nonzero). Padding ends that: a convolution that reads a nonzero constant over zero padding sees
   the border, unless only weights that never reach the padding read it.
2. Needs. Backwards from the logits: which channels a later layer reads. What nobody reads goes.
3. Folding. Constants that a layer reads go into its bias where that is exact. Where padding forbids it, all constants
   that a convolution reads become one: sum of v_c * w_c over the constants c, divided by the v of the one that stays.
   A sum of which one operand is constant keeps a vector; constants beside computed channels in a sum stay, made by a
   filter of zeros. Removing these would not be exact, or would cost copies.

Channel shuffles, slices and concatenations disappear into the order in which weights are stored.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from utils.analysis_utils import clone_model
from utils.channels import POINTWISE, SIDE, Layer, Network, links, positions, sources, trace
from utils.common import RunFailed, UserError
from utils.compact_network import FUNCTIONS, Step, build

CONV_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
TOLERANCE = 1e-6  # of the largest logit, in float64


@dataclass(frozen=True)
class Compact:
    """A compact network: the module, its description (see `utils.compact_network`), and what went.

    layers: for each Conv2d and Linear that runs in the model, its outputs, inputs (of a group) and weights before and
    after (0 where it went), and its active weights; constants: channels that turned out to be constant;
    kept_constants: those of them that had to stay.
    """

    network: fx.GraphModule
    steps: list[Step]
    layers: list[dict[str, Any]]
    constants: int
    kept_constants: int


@torch.no_grad()
def compact(model: nn.Module, side: int = SIDE) -> Compact:
    """A dense network that gives the same logits in evaluation mode, with nothing in it that does nothing.

    model: pruned, with or without masks (exact zeros count as pruned); it is not changed. The result works for every
    image size that the model does. Raises UserError where the model cannot be traced for images of side x side, or has
    an operation that is not known (`utils.channels`), RunFailed if the result's logits differ from the model's.
    """
    plan = _Plan(trace(model, side))
    writer = _Writer(plan)
    _check(model, build(writer.steps, writer.state), side)
    dtype = next(model.parameters()).dtype
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in writer.state.items()}
    network = build(writer.steps, state)
    known = ~plan.constant.isnan()
    return Compact(network, writer.steps, writer.rows, int(known.sum()), int((known & plan.kept).sum()))


def _check(model: nn.Module, network: nn.Module, side: int) -> None:
    """RunFailed unless the two give the same logits in float64, where rounding cannot be mistaken for more."""
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    difference = largest_difference(clone_model(model).cpu().double(), network, images)
    if not difference < TOLERANCE:
        raise RunFailed(f"the compact network's logits differ from the model's by {difference:.2g} of the largest one; "
                        "the model does something that its operations do not show")


@torch.no_grad()
def largest_difference(model: nn.Module, other: nn.Module, images: Tensor) -> float:
    """max |difference of the logits| / max |logit of the model| over the images, in evaluation mode."""
    expected, found = clone_model(model).eval()(images), other.eval()(images)
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))


# --- constants ------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """What a convolution or linear layer reads, split into what depends on the image and what is constant.

    weight: (outputs, inputs per group, ...), float64. varies: bool (outputs, inputs per group), where a weight reads a
    channel that depends on the image. folded: (outputs, ...), by output and tap the sum of weight * constant.
    """

    weight: Tensor
    varies: Tensor
    folded: Tensor

    def border(self, module: nn.Module) -> Tensor:
        """bool (outputs,): whether constants make an output that differs near the border of a map."""
        if self.folded.dim() == 1:
            return torch.zeros(len(self.folded), dtype=torch.bool)
        return (self.folded[:, edge_taps(module)] != 0).any(1)


def split(layer: Layer, constant: Tensor) -> Split:
    """constant: the values of all channels, NaN where they depend on the image."""
    weight, values = layer.module.weight.detach(), constant[layer.reads[0]][positions(layer)]
    known = values.nan_to_num(nan=0.0)
    folded = (weight * known.view(*known.shape, *[1] * (weight.dim() - 2))).sum(1)
    return Split(weight, links(weight) & values.isnan(), folded)


def edge_taps(conv: nn.Conv2d) -> Tensor:
    """bool (kernel height, kernel width): the taps that read zero padding somewhere, in maps of one size or another."""
    edges = []
    for axis, size in enumerate(conv.kernel_size):
        offsets, pad = torch.arange(size) * conv.dilation[axis], 0
        if conv.padding_mode == "zeros" and conv.padding != "valid":
            pad = conv.dilation[axis] * (size - 1) if conv.padding == "same" else conv.padding[axis]
        edges.append((offsets < pad) | (offsets.flip(0) < pad))
    return edges[0][:, None] | edges[1]


def constants(network: Network) -> Tensor:
    """The value of each channel that is the same at all positions and for all images, NaN for the others; float64."""
    values = torch.full((network.channels,), torch.nan, dtype=torch.float64)
    for layer in network.layers:
        if layer.kind in ("conv", "linear"):
            parts = split(layer, values)
            depends = parts.varies.any(1) | parts.border(layer.module)
            values[layer.span] = (_bias(layer.module) + _sum_taps(parts.folded)).masked_fill(depends, torch.nan)
        elif layer.kind != "input":
            values[layer.span] = _constant(layer, [values[sources(layer, operand)] for operand in layer.reads])
    return values


def _constant(layer: Layer, operands: list[Tensor]) -> Tensor:
    """The constants of a layer whose channels are each computed from one channel of each operand."""
    first = operands[0]
    if layer.kind.startswith("batch_norm"):
        scale, shift = _affine(layer.module)
        return torch.where(scale == 0, shift, first * scale + shift)
    if layer.kind in POINTWISE:
        found = FUNCTIONS[layer.kind](*operands)  # NaN where any of them is
        zero = layer.kind == "mul" and torch.stack(operands).eq(0).any(0)
        return torch.where(torch.as_tensor(zero), 0.0, found)
    if layer.kind == "avg_pool" and not _is_plain_average(layer.options):
        return first.masked_fill(first != 0, torch.nan)
    return first


def _is_plain_average(options: dict[str, Any]) -> bool:
    """Whether every window averages pixels only: no padding counted, no divisor of its own."""
    padding = options.get("padding", 0)
    unpadded = padding == 0 or padding == (0, 0)
    return unpadded and not options.get("ceil_mode") and options.get("divisor_override") is None


def _bias(module: nn.Module) -> Tensor:
    """Its bias in float64, zeros where it has none."""
    if module.bias is None:
        return torch.zeros(module.weight.shape[0], dtype=torch.float64)
    return module.bias.detach()


def _sum_taps(folded: Tensor) -> Tensor:
    return folded.flatten(1).sum(1) if folded.dim() > 1 else folded


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in evaluation mode, float64. UserError if it has no running statistics."""
    if norm.running_var is None:
        raise UserError("a batch norm without running statistics mixes the images of a batch; it cannot be compacted")
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is None:
        return scale, -norm.running_mean * scale
    scale = scale * norm.weight
    return scale, norm.bias - norm.running_mean * scale


# --- needs ----------------------------------------------------------------------------------------------------------


class _Plan:
    """Which channels stay.

    kept: bool, by channel; carriers: for a convolution that sees constants over padding, the place in its operand of
    the one constant that stays for all.
    """

    def __init__(self, network: Network):
        self.network, self.constant = network, constants(network)
        self.kept = torch.zeros(network.channels, dtype=torch.bool)
        self.carriers: dict[str, int] = {}
        for layer in reversed(network.layers):
            self._mark(layer)

    def _mark(self, layer: Layer) -> None:
        """Marks what the layer reads for those of its channels that stay."""
        if layer.kind in ("input", "output") or is_grouped(layer) and self.kept[layer.span].any():
            self.kept[layer.span] = True
        stays = self.kept[layer.span]
        if layer.kind == "flatten":
            maps = stays.view(len(layer.reads[0]), -1)
            maps[:] = maps.any(1, keepdim=True)  # all features of a map, or none
        if not stays.any():
            return
        if layer.kind in ("conv", "linear") and not is_depthwise(layer):
            self._mark_weighted(layer, stays)
        else:
            for operand in self.computed(layer):
                self.kept[sources(layer, operand)[stays]] = True

    def _mark_weighted(self, layer: Layer, stays: Tensor) -> None:
        reads, parts = layer.reads[0], split(layer, self.constant)
        if is_grouped(layer):
            self.kept[reads] = True
            return
        self.kept[reads[parts.varies[stays].any(0)]] = True
        if parts.border(layer.module)[stays].any():
            values = self.constant[reads].nan_to_num(nan=0.0).abs() * links(parts.weight)[stays].any(0)
            already = values * self.kept[reads]
            self.carriers[layer.name] = int((already if already.any() else values).argmax())
            self.kept[reads[self.carriers[layer.name]]] = True
        if not self.kept[reads].any():
            self.kept[reads[0]] = True  # an output that reads nothing still needs a map's size

    def computed(self, layer: Layer) -> list[Tensor]:
        """The operands that are computed: all but those of which everything that is read is constant."""
        stays = self.kept[layer.span]
        varying = [operand for operand in layer.reads
                   if self.constant[sources(layer, operand)[stays]].isnan().any()]
        return varying or layer.reads[:1]


def is_depthwise(layer: Layer) -> bool:
    """Whether each map is filtered by itself."""
    return layer.kind == "conv" and layer.module.groups == layer.module.in_channels == layer.module.out_channels


def is_grouped(layer: Layer) -> bool:
    """Whether it is a convolution of several groups that are not single maps: it is left as it is."""
    return layer.kind == "conv" and layer.module.groups > 1 and not is_depthwise(layer)


# --- the network that is left ---------------------------------------------------------------------------------------


class _Writer:
    """Writes the steps of what stays, and their tensors. A step may hold its channels in another order than the model.

    rows: see `Compact.layers`.
    """

    def __init__(self, plan: _Plan):
        self.plan, self.steps, self.state = plan, [], {}
        self.rows: list[dict[str, Any]] = []
        self.results: dict[int, tuple[str, int]] = {}  # first channel of a layer -> step, its channels
        self.fetched: dict[tuple[int, ...], str] = {}
        count = plan.network.channels
        self.owners, self.at = torch.empty(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
        for layer in plan.network.layers:
            self.owners[layer.span] = layer.first
            stays = plan.kept[layer.span]
            if stays.any():
                self._write(layer, stays)
            elif layer.kind in ("conv", "linear"):
                self._report(layer, layer.module.weight[:0, :0])

    def _write(self, layer: Layer, stays: Tensor) -> None:
        if layer.kind == "input":
            self._hold(layer, self._step(layer.name, "input", []), torch.arange(layer.channels))
        elif layer.kind == "output":
            self._step(layer.name, "output", [self._fetch(layer.reads[0])])
        elif layer.kind == "flatten":
            self._write_flatten(layer, stays)
        elif layer.kind in ("conv", "linear") and not is_depthwise(layer):
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
        computed, left = self.plan.computed(layer), stays.nonzero().flatten()
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
            self._write_conv(layer, inputs, layer.module.weight.detach()[left], _bias(layer.module)[left], len(left))
        elif layer.module is not None:
            self._write_norm(layer, inputs, left)
        else:
            self._step(layer.name, layer.kind, inputs, **layer.options)
        self._hold(layer, self.steps[-1]["name"], left)

    def _write_norm(self, layer: Layer, inputs: list[str], left: Tensor) -> None:
        norm = layer.module
        name = self._step(layer.path, layer.kind, inputs, num_features=len(left), eps=norm.eps, momentum=norm.momentum,
                          affine=norm.affine)
        for key, value in norm.state_dict().items():
            self.state[f"{name}.{key}"] = value[left] if value.dim() else value

    def _write_weighted(self, layer: Layer, stays: Tensor) -> None:
        """A convolution or linear layer that mixes channels; what it reads of constants is folded."""
        reads, parts, bias = layer.reads[0], split(layer, self.plan.constant), _bias(layer.module)[stays]
        if is_grouped(layer):
            self._write_conv(layer, [self._fetch(reads)], parts.weight, bias, layer.module.groups)
        else:
            carrier = self.plan.carriers.get(layer.name)
            columns = self._columns(reads, parts.varies[stays].any(0), carrier)
            varies = parts.varies[stays][:, columns]
            weight = parts.weight[stays][:, columns]
            weight *= varies.view(*varies.shape, *[1] * (weight.dim() - 2))
            folded = parts.folded[stays]
            if carrier is None:
                bias = bias + _sum_taps(folded)
            else:
                weight[:, columns == carrier] = folded[:, None] / self.plan.constant[reads[carrier]]
            write = self._write_conv if layer.kind == "conv" else self._write_linear
            write(layer, [self._fetch(reads[columns])], weight, bias)
        self._hold(layer, self.steps[-1]["name"], stays.nonzero().flatten())

    def _columns(self, reads: Tensor, used: Tensor, carrier: int | None) -> Tensor:
        """The places in the operand of what is read, at least one, in the order in which they come cheapest."""
        used = used.clone()
        if carrier is not None:
            used[carrier] = True
        if not used.any():
            used[int(self.plan.kept[reads].long().argmax())] = True
        places = used.nonzero().flatten()
        return places[self._order(reads[places])]

    def _write_conv(self, layer: Layer, inputs: list[str], weight: Tensor, bias: Tensor, groups: int = 1) -> None:
        conv = layer.module
        options = {"in_channels": weight.shape[1] * groups, "out_channels": len(weight), "groups": groups}
        options |= {name: getattr(conv, name) for name in CONV_OPTIONS}
        self._write_parameters(layer, inputs, weight, bias, options)

    def _write_linear(self, layer: Layer, inputs: list[str], weight: Tensor, bias: Tensor) -> None:
        options = {"in_features": weight.shape[1], "out_features": len(weight)}
        self._write_parameters(layer, inputs, weight, bias, options)

    def _write_parameters(self, layer: Layer, inputs: list[str], weight: Tensor, bias: Tensor,
                          options: dict[str, Any]) -> None:
        with_bias = layer.module.bias is not None or bool(bias.any())
        name = self._step(layer.path, layer.kind, inputs, **options, bias=with_bias)
        self.state[f"{name}.weight"] = weight.contiguous()
        if with_bias:
            self.state[f"{name}.bias"] = bias
        self._report(layer, weight)

    def _report(self, layer: Layer, left: Tensor) -> None:
        before = layer.module.weight
        self.rows.append({"layer": layer.path, "outputs": len(before), "outputs_left": len(left),
                          "inputs": before.shape[1], "inputs_left": left.shape[1], "weights": before.numel(),
                          "active": int((before != 0).sum()), "weights_left": left.numel()})
