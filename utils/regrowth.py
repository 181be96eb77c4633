"""Regrowth: how many pruned weights return, which ones, with which values; and a record that undoes or repeats it.

A rule of `SELECTORS` ranks the pruned positions of a layer, an initialiser of `INITIALISERS` gives the chosen ones
values, and `WeightRegrowth` writes them. The allocation is the caller's. Indices are flat: row-major in the weight.
"""
from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.analysis_utils import (  # noqa: F401  (the computer of saliency is published here)
    Evidence,
    SaliencyComputer,
    count_pruned_params,
    prunable_layers,
    stored_weight,
)
from utils.channels import live_positions
from utils.common import UserError, derive_seed, generator, map_tensors, move_all, needed, needs, numbers
from utils.selection import Positions, Ranking, random_indices, top_indices

# What a best allocation's entries beside the record are; the first six are the published ones. Kept in the file.
BEST_ENTRIES = {
    "epoch": "controller updates when the search ended, 0 without a search",
    "reward": "best validation accuracy (fraction) in the mini-finetuning of the best episode, None without a search",
    "accuracy": "val_acc_after_regrowth as a fraction: right after regrowth, before any finetuning",
    "allocation": "layer -> number of weights that returned",
    "regrow_indices": "layer -> flat (row-major) positions in the weight of those that returned, ascending",
    "timestamp": "local time of saving",
    "val_acc_after_regrowth": "validation accuracy (%) before finetuning, batch-norm statistics of the pruned model",
    "val_acc_after_regrowth_bn": "the same with batch-norm statistics re-estimated on augmented training batches",
}


class LayerRecord(NamedTuple):
    """The regrown weights of one layer, (n,) each, by ascending index."""

    indices: Tensor  # int64, flat (row-major) in the weight
    sources: Tensor  # uint8, which of `RegrowthRecord.source_names` chose it
    steps: Tensor  # int32, in which step it returned
    values: Tensor  # written to `weight_orig`
    previous: Tensor  # stood there before


def masked_layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Layers by name. Raises ValueError for one that the model does not have or that has no mask."""
    known = {name: layer for name, layer in prunable_layers(model).items() if hasattr(layer, "weight_mask")}
    names = list(names)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"the model has no masked layer {unknown[0]!r}; it has: {', '.join(known) or 'none'}")
    return {name: known[name] for name in names}


def write_weights(layer: nn.Module, positions: Positions, values: Tensor, active: bool = True) -> None:
    """Put values and mask of a masked layer at the positions; `weight` follows there, without being made anew."""
    positions.write(layer.weight_orig, values)
    positions.write(layer.weight_mask, float(active))
    positions.write(layer.weight, values * active)


@dataclass(frozen=True)
class RegrowthRecord:
    """What one or several regrowth steps did to a model."""

    layers: dict[str, LayerRecord]
    source_names: tuple[str, ...]  # what the codes in `LayerRecord.sources` stand for

    @property
    def allocation(self) -> dict[str, int]:
        """Layer name -> number of regrown weights."""
        return {name: len(layer.indices) for name, layer in self.layers.items()}

    @property
    def count(self) -> int:
        """Number of regrown weights."""
        return sum(self.allocation.values())

    @property
    def filled(self) -> int:
        """How many were drawn at random because the rule ranked too few positions."""
        return sum(numbers((layer.sources == self.source_names.index(FILL)).sum() for layer in self.layers.values()))

    def replay(self, model: nn.Module) -> None:
        """Regrow the same weights, with the same values, in another copy of the pruned model.

        Raises ValueError, with the model unchanged, if a layer is missing or a position is active already.
        """
        self._write(model, active=True)

    def undo(self, model: nn.Module) -> None:
        """Prune the regrown weights again and give `weight_orig` the values from before, bit for bit.

        Raises ValueError, with the model unchanged, if a layer is missing or a position is pruned already.
        """
        self._write(model, active=False)

    def _write(self, model: nn.Module, active: bool) -> None:
        layers = masked_layers(model, self.layers)
        positions = {name: self._positions(name, layer) for name, layer in layers.items()}
        clashes = numbers((positions[name].read(layer.weight_mask) == active).any() for name, layer in layers.items())
        for name, clash in zip(layers, clashes, strict=True):
            if clash:
                raise ValueError(f"{name}: some recorded positions are {'active' if active else 'pruned'} already")
        for name, layer in layers.items():
            values = self.layers[name].values if active else self.layers[name].previous
            write_weights(layer, positions[name], values.to(layer.weight_orig), active)

    def _positions(self, name: str, layer: nn.Module) -> Positions:
        return Positions(self.layers[name].indices.to(layer.weight.device))

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """Every prunable layer's regrown positions: bool of the weight's shape, True where a weight returned."""
        layers = prunable_layers(model)
        masks = {name: torch.zeros_like(layer.weight, dtype=torch.bool) for name, layer in layers.items()}
        for name in self.layers:
            self._positions(name, layers[name]).write(masks[name], True)
        return masks

    def state_dict(self) -> dict[str, Any]:
        """Plain dicts, tensors and strings: `regrow_<column>`, layer name -> tensor, for each of `LayerRecord`."""
        columns = {f"regrow_{column}": {name: getattr(layer, column) for name, layer in self.layers.items()}
                   for column in LayerRecord._fields}
        return {**columns, "regrow_source_names": list(self.source_names)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RegrowthRecord:
        """The record back from `state_dict`; other entries are ignored. Raises ValueError if one is missing."""
        try:
            columns = [state[f"regrow_{column}"] for column in LayerRecord._fields]
            layers = {name: LayerRecord(*(column[name] for column in columns)) for name in columns[0]}
            return cls(layers, tuple(state["regrow_source_names"]))
        except KeyError as error:
            raise ValueError(f"not a regrowth record: {error} is missing") from error


# ---- targets, capacity, budget -------------------------------------------------------------------------------------


def target_layers(model: nn.Module, patterns: Sequence[str] | None = None) -> list[str]:
    """Names of the prunable layers that match any of the patterns (exact names or `fnmatch`), in model order.

    None means all. Raises UserError, with the known names, for a pattern that matches nothing.
    """
    names = list(prunable_layers(model))
    chosen = set(names) if patterns is None else set()
    for pattern in patterns or ():
        matched = {name for name in names if name == pattern or fnmatchcase(name, pattern)}
        if not matched:
            raise UserError(f"no prunable layer is called or matches '{pattern}'; the model has: {', '.join(names)}")
        chosen |= matched
    return [name for name in names if name in chosen]


def free_positions(model: nn.Module, layers: Iterable[str], only_live: bool = False) -> dict[str, Tensor]:
    """Layer -> bool of the weight's shape, True where a weight may return: pruned, and with `only_live` on a path of
    active weights from the image to the output (`utils.channels.live_positions`).

    Raises ValueError for an unknown name or a layer without a mask, UserError for a model that cannot be followed.
    """
    pruned = {name: layer.weight_mask == 0 for name, layer in masked_layers(model, layers).items()}
    live = live_positions(model) if only_live else {}
    return {name: mask & live[name].to(mask.device) if only_live else mask for name, mask in pruned.items()}


def layer_capacities(model: nn.Module, layers: Iterable[str], only_live: bool = False) -> dict[str, int]:
    """How many weights may return to each named layer; arguments and errors as of `free_positions`."""
    free = free_positions(model, layers, only_live)
    return dict(zip(free, numbers(mask.sum() for mask in free.values()), strict=True))


def regrowth_budget(model: nn.Module, *, target_sparsity: float | None = None, regrow_step: float | None = None,
                    steps: int = 1) -> int:
    """K, how many weights return; N is the number of prunable weights.

    target_sparsity: the model is to end with exactly round((1 - target) * N) surviving weights, which is what pruning
    to this sparsity keeps. regrow_step: K = round(step * N), which may exceed what is pruned: the caller's allocation
    caps it; steps: how many of this size are to come. Raises UserError if nothing is pruned or would be before the
    last step, the target is not below the model's sparsity, the step is not in (0, 1], or K < 1; ValueError unless
    exactly one of the two is given.
    """
    if (target_sparsity is None) == (regrow_step is None):
        raise ValueError("give either target_sparsity or regrow_step")
    counts = count_pruned_params(model)
    if not counts.pruned:
        raise UserError("nothing is pruned in this model, so no weight can return; start from a pruned checkpoint")
    if target_sparsity is not None:
        if not 0 <= target_sparsity < counts.sparsity:
            raise UserError(f"target sparsity {target_sparsity} is not below that of the model, {counts.sparsity:.6g}")
        budget = round((1 - target_sparsity) * counts.total) - counts.surviving
    else:
        if not 0 < regrow_step <= 1:
            raise UserError(f"regrow step {regrow_step} must be a fraction of all weights in (0, 1], such as 0.02")
        budget = round(regrow_step * counts.total)
    if budget < 1:
        raise UserError(f"that step is less than one of the {counts.total} weights; ask for a larger one")
    if (steps - 1) * budget >= counts.pruned:
        raise UserError(f"{steps} steps of {regrow_step} are too many: nothing is pruned any more before the last; "
                        "take fewer or smaller ones")
    return budget


# ---- which weights: a rule is one function and one line in SELECTORS -------------------------------------------------


@needs("saliency")
def _by_saliency(name: str, layer: nn.Module, evidence: Evidence) -> Ranking:
    return Ranking(evidence.tensor("saliency", name), layer.weight_mask)


@needs("magnitude")
def _by_reference(name: str, layer: nn.Module, evidence: Evidence) -> Ranking:
    """Pruned here and active in the reference, by the reference's |w|."""
    reference, mask = evidence.reference_layer(name, layer), layer.weight_mask
    if hasattr(reference, "weight_mask"):
        mask = mask - reference.weight_mask + 1  # free, that is 0, where it is 0 here and 1 there
    known = evidence.get("magnitude") or {}
    return Ranking(known[name] if name in known else stored_weight(reference).abs(), mask)


def reference_magnitudes(reference: nn.Module) -> dict[str, Tensor]:
    """|w| of every prunable layer of a reference, at pruned positions of what it stores; of the weight's shape."""
    return {name: stored_weight(layer).abs() for name, layer in prunable_layers(reference).items()}


@needs("gradient")
def _by_gradient(name: str, layer: nn.Module, evidence: Evidence) -> Ranking:
    """|gradient| of the sparse model where it is pruned, as RigL grows (Evci et al., ICML 2020)."""
    return Ranking(evidence.tensor("gradient", name).abs(), layer.weight_mask)


@needs("gradient")
def _by_relative_gradient(name: str, layer: nn.Module, evidence: Evidence) -> Ranking:
    """|gradient| times the norm of the filter's active weights: the gradient for a filter scaled to norm 1.

    Batch normalisation takes the size out of a filter, so that gradients are inversely as large (van Laarhoven, arXiv
    1706.05350): plain ones prefer filters of which little is left. Here those with nothing left come last.
    """
    kernel = tuple(range(1, layer.weight_mask.dim()))
    norms = torch.linalg.vector_norm(layer.weight_orig.detach() * layer.weight_mask, dim=kernel, keepdim=True)
    return Ranking(evidence.tensor("gradient", name).abs() * norms, layer.weight_mask)


def _by_magnitude(name: str, layer: nn.Module, evidence: Evidence) -> Ranking:
    """|weight_orig|: what the weight was when it was pruned."""
    return Ranking(stored_weight(layer).abs(), layer.weight_mask)


# A rule says which kinds of evidence it `needs`. Where it ranks too few, the rest of a layer's budget is drawn.
SELECTORS: dict[str, Callable[[str, nn.Module, Evidence], Ranking | None]] = {
    "saliency": _by_saliency,
    "reference": _by_reference,
    "gradient": _by_gradient,
    "relative_gradient": _by_relative_gradient,
    "magnitude": _by_magnitude,
    "random": lambda name, layer, evidence: None,  # ranks nothing: all are drawn
}
FILL = "random fill"  # the source of what another rule did not rank


# ---- with which values: an initialiser is one function and one line in INITIALISERS, and says what it `needs`, too ---


class Site(NamedTuple):
    """Where weights return: n positions of one layer."""

    name: str
    layer: nn.Module
    positions: Positions
    previous: Tensor  # (n,), what `weight_orig` holds there
    evidence: Evidence
    seed: int  # of this layer and step


def _kaiming(site: Site) -> Tensor:
    """N(0, 2 / fan_in), as `torch.nn.init.kaiming_normal_`."""
    return _normal(site, math.sqrt(2 / _fans(site.layer)[0]))


def _xavier(site: Site) -> Tensor:
    """N(0, 2 / (fan_in + fan_out)), as `torch.nn.init.xavier_normal_`."""
    return _normal(site, math.sqrt(2 / sum(_fans(site.layer))))


def _copy(site: Site) -> Tensor:
    """The reference's weight; Kaiming where the reference itself is pruned and has none."""
    reference = site.evidence.reference_layer(site.name, site.layer)
    copied = site.positions.read(stored_weight(reference))
    if not hasattr(reference, "weight_mask"):
        return copied
    return torch.where(site.positions.read(reference.weight_mask) != 0, copied, _kaiming(site))


def _fans(layer: nn.Module) -> tuple[int, int]:
    """(fan_in, fan_out) of the dense tensor, as PyTorch defines them."""
    outputs, inputs, *kernel = layer.weight_mask.shape
    return inputs * math.prod(kernel), outputs * math.prod(kernel)


def _normal(site: Site, std: float) -> Tensor:
    """Drawn on the CPU, so that a seed means the same on every device."""
    return torch.randn(len(site.previous), generator=generator(site.seed)).mul_(std).to(site.previous)


INITIALISERS: dict[str, Callable[[Site], Tensor]] = {
    "zero": lambda site: torch.zeros_like(site.previous),
    "kaiming": _kaiming,
    "xavier": _xavier,
    "magnitude": lambda site: site.previous,
    "reference": _copy,
}

# ---- regrowth ------------------------------------------------------------------------------------------------------


# What is to return in a layer, by ascending index: flat indices, int64 (n,), and sources, uint8 (n,), codes into
# `RegrowthRecord.source_names`.
Chosen = tuple[Tensor, Tensor]


class WeightRegrowth:
    """Regrows weights of a pruned model, in place, by one rule of `SELECTORS` and one of `INITIALISERS`."""

    def __init__(self, model: nn.Module, rule: str, evidence: Evidence, init_strategy: str = "zero", seed: int = 0,
                 only_live: bool = False):
        """only_live: as of `free_positions`. ValueError for an unknown name."""
        for kind, name, registry in (("rule", rule, SELECTORS), ("initialisation", init_strategy, INITIALISERS)):
            if name not in registry:
                raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(registry)}")
        self.model, self.rule, self.evidence = model, rule, evidence
        self.init_strategy, self.seed, self.only_live = init_strategy, seed, only_live

    def apply_regrowth(self, allocation: Mapping[str, int], step: int = 1) -> RegrowthRecord:
        """Regrow exactly allocation[layer] weights in each named layer; the order of the names does not matter.

        Raises ValueError, with the model unchanged, for an unknown layer, a negative count or one above the layer's
        capacity, missing or NaN evidence, and initial values of another shape. `step` goes into the record and into
        what is drawn at random.
        """
        return self.write(self.select(allocation, step), step)

    def select(self, allocation: Mapping[str, int], step: int = 1) -> dict[str, Chosen]:
        """The first half of `apply_regrowth`: which weights return in each layer. Changes nothing."""
        layers = masked_layers(self.model, allocation)
        counts = {name: operator.index(count) for name, count in allocation.items() if count}
        if any(count < 0 for count in counts.values()):
            raise ValueError(f"an allocation must not be negative: {counts}")
        rule = SELECTORS[self.rule]
        for kind in needed(rule):
            self.evidence.make(kind)
        live = free_positions(self.model, counts, only_live=True) if self.only_live else {}

        def ranking(name: str) -> Ranking | None:
            found = rule(name, layers[name], self.evidence)
            return Ranking(found.scores, (found.taken != 0) | ~live[name]) if live and found else found
        best = top_indices([partial(ranking, name) for name in counts], list(counts.values()),
                           next(self.model.parameters()).device)
        ranked = {name: indices for name, indices in zip(counts, best, strict=True) if indices is not None}
        taken = {name: ~live[name] if live else layers[name].weight_mask != 0
                 for name, count in counts.items() if len(ranked.get(name, ())) < count}
        drawn = self._draw(counts, taken, ranked, step)
        return {name: self._chosen(ranked.get(name), drawn.get(name)) for name in counts}

    def _draw(self, counts: Mapping[str, int], taken: Mapping[str, Tensor], ranked: Mapping[str, Tensor],
              step: int) -> dict[str, Tensor]:
        """Random free positions of the layers where fewer are ranked than return, as many as are missing.

        taken: bool, of these layers, True where no weight may return; what is ranked is added. Drawn on the CPU: all
        masks go there in one transfer, and all positions back in one.
        """
        missing = {name: counts[name] - len(ranked.get(name, ())) for name in taken}
        for name in ranked.keys() & taken.keys():
            Positions(ranked[name]).write(taken[name], True)

        def draw(name: str, count: int, taken: Tensor) -> Tensor:
            try:
                return random_indices(taken, count, generator(self.seed, "positions", name, step))
            except ValueError as error:
                capacity = layer_capacities(self.model, [name], self.only_live)[name]
                raise ValueError(f"{name}: {counts[name]} weights cannot return, its capacity is {capacity}") from error

        device, host = next(self.model.parameters()).device, torch.device("cpu")
        drawn = map_tensors(draw, host, missing, missing.values(), move_all(list(taken.values()), host))
        return dict(zip(missing, move_all(drawn, device), strict=True))

    def _chosen(self, ranked: Tensor | None, drawn: Tensor | None) -> Chosen:
        """What the rule ranked (None: it has no scores), and what was drawn where that is too little."""
        own, fill = (_source_names().index(source) for source in (self.rule, FILL))
        if ranked is None or drawn is None:
            indices, by_rule = (ranked, True) if drawn is None else (drawn, self.rule == "random")
            return indices, torch.full_like(indices, own if by_rule else fill, dtype=torch.uint8)
        indices, order = torch.cat([ranked, drawn]).sort()
        return indices, torch.where(order < len(ranked), own, fill).to(torch.uint8)

    def write(self, chosen: Mapping[str, Chosen], step: int = 1) -> RegrowthRecord:
        """The second half of `apply_regrowth`: initial values, masks and weights of what `select` chose."""
        layers = masked_layers(self.model, chosen)
        device = next(self.model.parameters()).device
        for kind in needed(INITIALISERS[self.init_strategy]):
            self.evidence.make(kind)
        plans = map_tensors(partial(self._plan, step), device, layers, layers.values(), chosen.values())
        positions, records = [at for at, _ in plans], {name: plan[1] for name, plan in zip(layers, plans, strict=True)}
        map_tensors(write_weights, device, layers.values(), positions, [record.values for record in records.values()])
        return RegrowthRecord(records, _source_names())

    def _plan(self, step: int, name: str, layer: nn.Module, chosen: Chosen) -> tuple[Positions, LayerRecord]:
        """What will be written where in one layer."""
        indices, sources = chosen
        positions = Positions(indices)
        previous = positions.read(layer.weight_orig)
        site = Site(name, layer, positions, previous, self.evidence, derive_seed(self.seed, "values", name, step))
        values = INITIALISERS[self.init_strategy](site)
        if not isinstance(values, Tensor) or values.shape != previous.shape:
            raise ValueError(f"initialisation {self.init_strategy!r} has to give a tensor of shape "
                             f"{tuple(previous.shape)} in {name}, not {values!r:.60}")
        steps = torch.full_like(sources, step, dtype=torch.int32)
        return positions, LayerRecord(indices, sources, steps, values, previous)


def _source_names() -> tuple[str, ...]:
    return (*SELECTORS, FILL)


class SaliencyBasedRegrowth(WeightRegrowth):
    """Regrows the pruned weights of highest saliency."""

    def __init__(self, model: nn.Module, saliency: Mapping[str, Tensor], init_strategy: str = "zero", seed: int = 0,
                 reference: nn.Module | None = None):
        """saliency: layer name -> tensor of the weight's shape (`SaliencyComputer.compute`); reference: for
        init_strategy 'reference'."""
        super().__init__(model, "saliency", Evidence(saliency=saliency, reference=reference), init_strategy, seed)


class ReferenceBasedRegrowth(WeightRegrowth):
    """Regrows what is active in a reference model (dense or less pruned), largest |w| first, then a random fill."""

    def __init__(self, model: nn.Module, reference: nn.Module, init_strategy: str = "reference", seed: int = 0,
                 magnitudes: Mapping[str, Tensor] | None = None):
        """Filled positions of a pruned reference, which has no weight to copy there, start from Kaiming values;
        magnitudes: `reference_magnitudes(reference)`, for callers that regrow by one reference many times."""
        super().__init__(model, "reference", Evidence(reference=reference, magnitude=magnitudes), init_strategy, seed)
