"""Carries out what a mask schedule wants: prunes and regrows exactly, once (`move_masks`) and while a `Trainer` runs
(`MaskMover`).
"""
from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.allocation import ALLOCATORS, AllocationProblem, allocate, apportion
from utils.analysis_utils import (
    GRADIENT_KINDS,
    BlockwiseFeatureExtractor,
    Evidence,
    add_masks,
    clone_model,
    compute_block_ssim,
    count_pruned_params,
    get_masks,
    gradient_evidence,
    prunable_layers,
    set_masks,
    surviving_by_layer,
)
from utils.common import RunFailed, derive_seed, generator, needed, numbers
from utils.data_loader import BatchLoader
from utils.mask_schedule import MaskPlan, Move
from utils.pruning import lacking_weights, prune_to
from utils.regrowth import SELECTORS, WeightRegrowth, layer_capacities, reference_magnitudes
from utils.selection import Positions, Ranking, exact_k_masks, top_indices
from utils.training import Trainer, TrainingHook

# ---- one update ----------------------------------------------------------------------------------------------------


class Moved(NamedTuple):
    """Bool masks by layer, for one update: weights that became active; weights that it pruned and regrew at once, with
    their old values; and weights of either kind in filters that pruning had emptied."""

    returned: dict[str, Tensor]
    handed_back: dict[str, Tensor]
    to_dead_filters: dict[str, Tensor]


def move_masks(model: nn.Module, keep: int, exchange: float, plan: MaskPlan, evidence: Evidence, *, seed: int,
               number: int) -> Moved:
    """Prunes and regrows in place so that exactly `keep` prunable weights survive.

    With allocation 'layer' the model is pruned to `keep`, then every layer gives up `exchange` of its survivors, least
    |w| first, and gets as many back (RigL, GraNet). With any other it is pruned past `keep` by `exchange` of it, and
    the margin is regrown by the allocation. What was given up may come back, with the value it had; all that comes back
    from an earlier pruning gets the plan's initial value. seed, number: of the update, for what is drawn at random.
    """
    before = get_masks(model)
    weights = {name: layer.weight_orig.detach().clone() for name, layer in prunable_layers(model).items()}
    by_layer = plan.regrow_allocation == "layer"
    margin = 0 if by_layer else min(round(exchange * keep), keep - 1)
    prune_to(model, keep - margin, plan.pruner, seed)
    amounts = _give_up(model, exchange) if by_layer else {}
    missing = keep - count_pruned_params(model).surviving - sum(amounts.values())
    draws = generator(seed, "allocation", number)
    for name, count in _allocate(model, missing, plan, evidence, draws, amounts).items():
        amounts[name] = amounts.get(name, 0) + count
    low = get_masks(model)
    WeightRegrowth(model, plan.regrow_rule, evidence, plan.regrow_values, seed).apply_regrowth(amounts, number)
    with torch.no_grad():
        for name, layer in prunable_layers(model).items():
            layer.weight_orig.copy_(torch.where(before[name], weights[name], layer.weight_orig))
    grown = {name: mask & ~low[name] for name, mask in get_masks(model).items()}
    dead = {name: ~mask.flatten(1).any(1).view(-1, *[1] * (mask.dim() - 1)) for name, mask in low.items()}
    return Moved({name: mask & ~before[name] for name, mask in grown.items()},
                 {name: mask & before[name] for name, mask in grown.items()},
                 {name: mask & dead[name] for name, mask in grown.items()})


def _give_up(model: nn.Module, exchange: float) -> dict[str, int]:
    """Prunes round(exchange * survivors) of every layer, least |w| first; returns how many in each."""
    if not exchange:
        return {}
    layers, alive = prunable_layers(model), surviving_by_layer(model)
    counts = {name: round(exchange * number) for name, number in alive.items()}
    by_size = [lambda layer=layer: Ranking(layer.weight_orig.abs(), layer.weight_mask == 0)
               for layer in layers.values()]
    largest = top_indices(by_size, [alive[name] - count for name, count in counts.items()],
                          next(model.parameters()).device)
    masks = {name: torch.zeros_like(layer.weight_mask, dtype=torch.bool) for name, layer in layers.items()}
    for mask, indices in zip(masks.values(), largest, strict=True):
        Positions(indices).write(mask, True)
    set_masks(model, masks)
    return {name: count for name, count in counts.items() if count}


def _allocate(model: nn.Module, budget: int, plan: MaskPlan, evidence: Evidence, draws: torch.Generator,
              spoken_for: Mapping[str, int]) -> dict[str, int]:
    """How many of `budget` weights each layer gets, by the plan's allocation; spoken_for: what its capacity already has
    to give."""
    if budget < 1:
        return {}
    layers = prunable_layers(model)
    capacities = {name: free - spoken_for.get(name, 0) for name, free in layer_capacities(model, layers).items()}
    if plan.regrow_allocation == "global":
        return _by_best_scores(layers, capacities, budget, plan.regrow_rule, evidence)
    rule = "proportional" if plan.regrow_allocation == "layer" else plan.regrow_allocation
    looks_at = needed(ALLOCATORS[rule])
    drift = evidence.make("drift") if "drift" in looks_at else None
    order = sorted(layers, key=lambda name: drift[name]) if drift else list(layers)
    lacking = "lacking" in looks_at and lacking_weights(
        model, evidence.reference, count_pruned_params(model).surviving + budget)
    problem = AllocationProblem(
        layers=tuple(order), capacities=tuple(capacities[name] for name in order), budget=budget,
        sizes=tuple(layers[name].weight_mask.numel() for name in order),
        fan=tuple(sum(layers[name].weight_mask.shape) for name in order),
        drift=drift and tuple(drift[name] for name in order),
        lacking=tuple(lacking[name] for name in order) if lacking else None)
    return dict(zip(order, allocate(rule, problem, draws), strict=True))


def _by_best_scores(layers: Mapping[str, nn.Module], capacities: Mapping[str, int], budget: int, rule: str,
                    evidence: Evidence) -> dict[str, int]:
    """How many of the network's `budget` best scores lie in each layer; in proportion where a rule has no scores."""
    rank = SELECTORS[rule]
    for kind in needed(rank):
        evidence.make(kind)
    rankings = [rank(name, layer, evidence) for name, layer in layers.items()]
    free = [None if ranking is None else ranking.taken == 0 for ranking in rankings]
    if any(ranking is None for ranking in rankings) or sum(numbers(one.sum() for one in free)) < budget:
        return dict(zip(layers, apportion(list(capacities.values()), budget, list(capacities.values())), strict=True))
    masks = exact_k_masks([ranking.scores for ranking in rankings], budget, free)
    return dict(zip(layers, numbers(mask.count_nonzero() for mask in masks), strict=True))


def _total(masks: Mapping[str, Tensor]) -> int:
    """How many are True, by one transfer."""
    return sum(numbers(mask.count_nonzero() for mask in masks.values()))


# ---- while training ------------------------------------------------------------------------------------------------


class MaskMover(TrainingHook):
    """Moves the mask of a model while a `Trainer` trains it, by a `MaskPlan`.

    Gradients at pruned positions are those of the training batches themselves. Weights that return have no momentum;
    pruned ones do not move. `history` has a dict per update: step, epoch, sparsity, survivors, pruned and regrown
    (positions that changed), handed_back and to_dead_filters (of `Moved`), `came_back`, then the survivors of every
    layer.
    `ever_regrown`: layer -> bool, True where a weight has come back at least once.
    """

    def __init__(self, model: nn.Module, plan: MaskPlan, seed: int, sample: BatchLoader | None = None,
                 precision: str = "fp32", reference: nn.Module | None = None):
        """model: as it stands before training; masks are put on. sample: un-augmented images over which drift is
        measured, for plans that allocate by it. reference: what rules and drift look at (default: a copy of model)."""
        self.plan, self.seed, self.sample, self.precision = plan, seed, sample, precision
        self.model, self.reference = model, reference or clone_model(model)
        add_masks(model)
        self.total = count_pruned_params(model).total
        self.ever_regrown = {name: ~torch.ones_like(mask) for name, mask in get_masks(model).items()}
        self._at_best: dict[str, Tensor] = {}  # `ever_regrown` when the epoch ended that is the best
        self.history: list[dict[str, Any]] = []
        self._powers = {power for kind, (power, _) in GRADIENT_KINDS.items() if kind in plan.looks_at}
        self._sums: dict[int, dict[str, Tensor]] = {}  # power -> layer -> sum of the batches' gradients to this power
        self._gathered = 0  # batches in these sums

    def begin(self, trainer: Trainer) -> None:
        """A training that starts from a denser model than the schedule wants is pruned first."""
        if trainer.step == 0:
            self._update(trainer, self.plan.move(0, trainer.total_steps)._replace(exchange=0.0))

    def before_step(self, trainer: Trainer) -> None:
        """Has the gradients of the effective weights kept in the last `evidence_steps` steps before an update."""
        ahead = self._next_update(trainer) - trainer.step  # the coming step is the ahead-th before it, 1 the last
        self.watching = bool(self._powers) and 0 < ahead <= self.plan.evidence_steps

    def _next_update(self, trainer: Trainer) -> int:
        """Steps done at the next update; not after `trainer.step` when there is none."""
        every, last = self.plan.every(trainer.total_steps), self.plan.last_update(trainer.total_steps)
        return min((trainer.step // every + 1) * every, last)

    def on_step(self, trainer: Trainer) -> None:
        """Gathers evidence, and moves the mask where an update is due."""
        if self.watching:
            self._gather()
        last = self.plan.last_update(trainer.total_steps)
        if trainer.step == last or (trainer.step < last and trainer.step % self.plan.every(trainer.total_steps) == 0):
            self._update(trainer, self.plan.move(trainer.step, trainer.total_steps))
            self._sums, self._gathered = {}, 0

    @torch.no_grad()
    def _gather(self) -> None:
        self._gathered += 1
        for name, layer in prunable_layers(self.model).items():
            grad = getattr(layer.weight, "grad", None)  # None: a layer that never runs
            grad = torch.zeros_like(layer.weight_orig) if grad is None else grad
            for power in self._powers:
                sums = self._sums.setdefault(power, {})
                sums[name] = sums.get(name, 0.0) + grad ** power

    def _evidence(self) -> Evidence:
        """Evidence about the sparse model; pruned positions use their stored values."""
        @cache
        def gradients() -> dict[str, dict[str, Tensor]]:
            return gradient_evidence(self.model, self._sums, self._gathered)

        def drift() -> dict[str, float]:
            maps = [BlockwiseFeatureExtractor(model, list(self.ever_regrown), self.precision).extract(self.sample)
                    for model in (self.reference, self.model)]
            return compute_block_ssim(*maps)

        return Evidence(reference=self.reference, magnitude=partial(reference_magnitudes, self.reference), drift=drift,
                        **{kind: lambda kind=kind: gradients().get(kind) for kind in GRADIENT_KINDS})

    def _update(self, trainer: Trainer, move: Move) -> None:
        layers, before = prunable_layers(self.model).values(), get_masks(self.model)
        if not all(numbers(layer.weight_orig.isfinite().all() for layer in layers)):
            raise RunFailed(f"weights are not finite after {trainer.step} steps: the training diverged; what was "
                            "saved before is kept. Try a lower learning rate or --precision fp32")
        keep, number = round((1.0 - move.sparsity) * self.total), len(self.history) + 1
        returned, handed_back, to_dead = move_masks(
            self.model, keep, move.exchange, self.plan, self._evidence(),
            seed=derive_seed(self.seed, "mask update"), number=number)
        after, counts = get_masks(self.model), surviving_by_layer(self.model)
        self.ever_regrown = {name: ever | returned[name] for name, ever in self.ever_regrown.items()}
        moved = {"pruned": {name: before[name] & ~mask for name, mask in after.items()}, "regrown": returned,
                 "handed_back": handed_back, "to_dead_filters": to_dead, "came_back": self._stayed(self.ever_regrown)}
        totals = numbers(torch.stack([mask.count_nonzero() for mask in masks.values()]).sum()
                         for masks in moved.values())
        self.history.append({
            "step": trainer.step, "epoch": trainer.step / max(1, len(trainer.train_loader)),
            "sparsity": 1.0 - sum(counts.values()) / self.total, "survivors": sum(counts.values()),
            **dict(zip(moved, totals, strict=True)), **counts})
        trainer.hold_pruned(returned)

    @property
    def came_back(self) -> int:
        """Of the trained model, that of the best epoch: how many of its weights had been pruned before."""
        return _total(self._stayed(self._at_best or self.ever_regrown))

    def _stayed(self, regrown: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layer -> bool, True where a weight is active that has come back."""
        return {name: mask & regrown[name] for name, mask in get_masks(self.model).items()}

    def shares_regrown(self) -> dict[str, tuple[float, float]]:
        """By layer, the fractions in [0, 1] of all weights that were regrown at least once, and of the active weights,
        which are those of the best epoch after the training."""
        active, stayed = surviving_by_layer(self.model), self._stayed(self._at_best or self.ever_regrown)
        return {name: (self.ever_regrown[name].float().mean().item(), mask.sum().item() / max(1, active[name]))
                for name, mask in stayed.items()}

    def counts(self, trainer: Trainer) -> bool:
        """Only epochs that end at the target's sparsity may be the best."""
        return self.history[-1]["survivors"] == round((1.0 - self.plan.target) * self.total)

    def on_best(self, trainer: Trainer) -> None:
        """Remembers where weights had come back by then."""
        self._at_best = self.ever_regrown

    def state_dict(self) -> dict[str, Any]:
        """Rows so far, gathered gradients, where weights have come back."""
        return {"history": self.history, "sums": self._sums, "gathered": self._gathered,
                "ever_regrown": self.ever_regrown, "at_best": self._at_best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`; the masks themselves come with the model."""
        device = next(self.model.parameters()).device
        self.history = list(state["history"])
        self.ever_regrown, self._at_best = ({name: value.to(device) for name, value in state.get(key, {}).items()}
                                            for key in ("ever_regrown", "at_best"))  # earlier versions lack the second
        self._sums = {power: {name: value.to(device) for name, value in sums.items()}
                      for power, sums in state["sums"].items() if isinstance(sums, dict)}  # not of earlier versions
        self._gathered = state.get("gathered", 1)  # likewise
