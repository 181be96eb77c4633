"""How the mask moves while a model trains: gradual pruning, exchange of weights, dense and sparse phases, and pruning
past the target with regrowth.

At every update a schedule, one function and one line in `MASK_SCHEDULES`, says how sparse the model is to be and which
fraction of its survivors changes places. `move_masks` carries that out exactly, by a pruning rule of `PRUNERS`, a
selection rule of `SELECTORS`, an allocation and values of `INITIALISERS`; `MaskMover` does so while a `Trainer` runs.
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.allocation import ALLOCATORS, AllocationProblem, apportion
from utils.analysis_utils import (
    BlockwiseFeatureExtractor,
    add_masks,
    clone_model,
    compute_block_ssim,
    count_pruned_params,
    get_masks,
    prunable_layers,
    set_masks,
    surviving_by_layer,
)
from utils.common import RunFailed, UserError, derive_seed, fraction, generator, numbers, positive_int, steps_or_share
from utils.data_loader import BatchLoader
from utils.pruning import PRUNERS, lacking_weights, needed, prune_to
from utils.regrowth import INITIALISERS, SELECTORS, Evidence, WeightRegrowth, layer_capacities
from utils.selection import Positions, Ranking, exact_k_masks, top_indices
from utils.training import Trainer, TrainingHook

# ---- schedules -----------------------------------------------------------------------------------------------------


class Move(NamedTuple):
    """What a schedule wants of an update: the sparsity after it, and the fraction of the survivors that changes places.
    """

    sparsity: float
    exchange: float = 0.0


@dataclass(frozen=True)
class MaskPlan:
    """A schedule with all that it needs to know.

    schedule: name in `MASK_SCHEDULES`. start, target: sparsity before training and after the last update. pruner:
    which weights go, of `PRUNERS`. update_every: steps from one update to the next (of acdc: of a phase), below 1 a
    fraction of the training. update_until: fraction of it after which the mask stays. ramp_until: fraction of it after
    which the sparsity is the target's and weights only change places; None: update_until. exchange: fraction of the
    survivors that changes places in the first update. regrow_rule, regrow_values: which weights return, and how.
    regrow_allocation: 'layer' (every layer gets back what it gave up, by |w|), 'global' (the best scores of the
    network), or a name of `ALLOCATORS`. evidence_steps: training batches before an update over which gradients are
    averaged.
    """

    schedule: str
    start: float
    target: float
    pruner: str = "magnitude"
    update_every: float = 40
    update_until: float = 0.6
    ramp_until: float | None = None
    exchange: float = 0.3
    regrow_rule: str = "gradient"
    regrow_allocation: str = "layer"
    regrow_values: str = "zero"
    evidence_steps: int = 1

    def every(self, total_steps: int) -> int:
        """Steps from one update to the next."""
        return int(self.update_every) or max(1, round(self.update_every * total_steps))

    def last_update(self, total_steps: int) -> int:
        """Number of steps after which the mask moves for the last time."""
        return max(1, round(self.update_until * total_steps))

    def move(self, step: int, total_steps: int) -> Move:
        """What is to happen after `step` of `total_steps` steps, a step at which an update is due."""
        t = min(1.0, step / self.last_update(total_steps))
        return MASK_SCHEDULES[self.schedule].move(self, t, step // self.every(total_steps))


def cubic_sparsity(t: float, start: float, target: float) -> float:
    """s_f + (s_0 - s_f)(1 - t)^3 for t in [0, 1] (Zhu and Gupta, 2017, equation 1)."""
    return target + (start - target) * (1.0 - t) ** 3


def cosine_exchange(t: float, first: float) -> float:
    """first / 2 * (1 + cos(pi t)) for t in [0, 1] (Evci et al., ICML 2020, section 3)."""
    return first / 2.0 * (1.0 + math.cos(math.pi * t))


def _gradual(plan: MaskPlan, t: float, number: int) -> Move:
    return Move(cubic_sparsity(t, plan.start, plan.target))


def _late(plan: MaskPlan, t: float, number: int) -> Move:
    return Move(plan.target if t >= 1 else plan.start)


def _rigl(plan: MaskPlan, t: float, number: int) -> Move:
    return Move(plan.target, cosine_exchange(t, plan.exchange))


def _granet(plan: MaskPlan, t: float, number: int) -> Move:
    ramp = 1.0 if plan.ramp_until is None else plan.ramp_until / plan.update_until
    return Move(cubic_sparsity(min(1.0, t / ramp), plan.start, plan.target), cosine_exchange(t, plan.exchange))


def _acdc(plan: MaskPlan, t: float, number: int) -> Move:
    return Move(plan.start if number % 2 and t < 1 else plan.target)


class MaskSchedule(NamedTuple):
    """A schedule: what it wants at t in [0, 1] and update `number` (from 0, before training), and its own defaults.

    ignores: fields of the plan that mean nothing to it.
    """

    move: Callable[[MaskPlan, float, int], Move]
    defaults: Mapping[str, Any]
    ignores: tuple[str, ...] = ()


MASK_SCHEDULES: dict[str, MaskSchedule] = {
    # Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878
    "gradual": MaskSchedule(_gradual, {}, ignores=("ramp_until", "exchange", "regrow_rule", "regrow_allocation",
                                                   "regrow_values", "evidence_steps")),
    # A control: at once, but only at `update_until`, so that what is pruned has been trained for longer
    "late": MaskSchedule(_late, {"update_until": 0.3}, ignores=("update_every", "ramp_until", "exchange", "regrow_rule",
                                                               "regrow_allocation", "regrow_values", "evidence_steps")),
    # Evci et al., "Rigging the lottery", ICML 2020: constant sparsity, grown by |gradient|, returning at zero
    "rigl": MaskSchedule(_rigl, {"update_until": 0.75}, ignores=("ramp_until",)),
    # Liu et al., "Sparse training via boosting pruning plasticity with neuroregeneration", NeurIPS 2021
    "granet": MaskSchedule(_granet, {}),
    # Peste et al., "AC/DC", NeurIPS 2021: on ImageNet phases of 5 of the 100 epochs, the last 15 sparse
    "acdc": MaskSchedule(_acdc, {"update_every": 0.05, "update_until": 0.85, "regrow_rule": "random",
                                 "regrow_allocation": "proportional"},
                         ignores=("ramp_until", "exchange", "regrow_rule", "regrow_allocation", "evidence_steps")),
    # arXiv 2511.11675 taken into training: prune past the target, regrow the margin by any evidence and allocation. The
    # defaults are ahead of gradual, though what they regrow does not stay, and at random does nearly as well (results/)
    "bidirectional": MaskSchedule(_granet, {"evidence_steps": 8}),
}

MASK_FIELDS = ("update_every", "update_until", "ramp_until", "exchange", "regrow_rule", "regrow_allocation",
               "regrow_values", "evidence_steps")  # of a plan, that are free to choose


def plan_fields(schedule: str, **given: Any) -> dict[str, Any]:
    """`schedule` and every field of `MASK_FIELDS` that it reads: as given, else its own default, else the plan's.

    What would be None is left out. UserError for a ramp that ends after the last update.
    """
    row = MASK_SCHEDULES[schedule]
    plain = {name: getattr(MaskPlan, name) for name in MASK_FIELDS if name not in row.ignores}
    fields = {name: value for name, value in {**plain, **row.defaults, **given}.items() if value is not None}
    if fields.get("ramp_until", 0.0) > fields["update_until"]:
        raise UserError(f"--ramp_until {fields['ramp_until']} lies after --update_until {fields['update_until']}, from "
                        "where on the mask stays; take a smaller one")
    return {"schedule": schedule, **fields}


# ---- options of the scripts ----------------------------------------------------------------------------------------


def add_mask_options(parser: argparse.ArgumentParser, text: str = "fixed prunes before the finetuning; the others "
                     "start from the unpruned model", several: bool = False) -> None:
    """`--mask_schedule`, of which the help says `text`, and what it takes; None where not given; see `mask_options`.
    several: whether every option takes a list of values."""
    group = parser.add_argument_group("mask schedule", "how the mask moves while the model is finetuned; defaults are "
                                      "those of the schedule")
    add = partial(group.add_argument, **({"nargs": "+"} if several else {}))
    add("--mask_schedule", choices=["fixed", *MASK_SCHEDULES], default=["fixed"] if several else "fixed", help=text)
    add("--update_every", type=steps_or_share, metavar="STEPS",
        help="steps from one update of the mask to the next (acdc: of a phase); below 1: as a fraction of the training")
    add("--update_until", type=fraction, help="fraction of the training after which the mask stays")
    add("--ramp_until", type=fraction, help="fraction of the training after which the sparsity is the target's and "
        "weights only change places (default: that of --update_until)")
    add("--exchange", type=fraction, help="fraction of the survivors that changes places at first, falling to 0")
    add("--regrow_rule", choices=list(SELECTORS), help="which weights return")
    add("--regrow_allocation", choices=["layer", "global", *ALLOCATORS],
        help="how many return to each layer: as many as it gave up, the best of the network, or a rule")
    add("--regrow_values", choices=list(INITIALISERS), help="values that weights return with")
    add("--evidence_steps", type=positive_int, metavar="STEPS",
        help="training batches over which gradients are gathered before an update")


def mask_options(args: argparse.Namespace, finetune_epochs: int, pruner: str, at_target: bool = False
                 ) -> dict[str, Any] | None:
    """The mask schedule's name and the options that are given, completed by its defaults; None for 'fixed'.

    finetune_epochs: of the training in which the mask moves; pruner: which weights go, of `PRUNERS`; at_target: whether
    the model has the sparsity of the target from the start. UserError for options that mean nothing together.
    """
    given = {name: value for name in MASK_FIELDS if (value := getattr(args, name)) is not None}
    if args.mask_schedule == "fixed":
        if given:
            raise UserError(f"--{next(iter(given))} needs a --mask_schedule: {', '.join(MASK_SCHEDULES)}")
        return None
    schedule = MASK_SCHEDULES[args.mask_schedule]
    if at_target and "exchange" in schedule.ignores:
        able = ", ".join(name for name, row in MASK_SCHEDULES.items() if "exchange" not in row.ignores)
        raise UserError(f"--mask_schedule {args.mask_schedule} only leads from one sparsity to another, and a regrown "
                        f"model has the target's already; schedules that exchange weights at one sparsity are {able}")
    if at_target and "ramp_until" in given:
        raise UserError("--ramp_until is about the way to a sparsity, and a regrown model has the target's already; "
                        "leave it out")
    unused = [name for name in given if name in schedule.ignores]
    if unused:
        raise UserError(f"--{unused[0]} means nothing to --mask_schedule {args.mask_schedule}; leave it out")
    if needed(PRUNERS.get(pruner)):
        raise UserError(f"--pruner {pruner} looks at data once, before the finetuning; with --mask_schedule take "
                        "magnitude or another rule of the weights")
    if not finetune_epochs:
        raise UserError(f"--mask_schedule {args.mask_schedule} moves the mask during finetuning, of which "
                        "--finetune_epochs 0 leaves none")
    return plan_fields(args.mask_schedule, **given)


# ---- one update ----------------------------------------------------------------------------------------------------


class Moved(NamedTuple):
    """Layer -> bool: where a weight is active now and was not before the update, and where one was given up by it and
    came back at once, with the value that it had."""

    returned: dict[str, Tensor]
    handed_back: dict[str, Tensor]


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
    for name, count in _allocate(model, missing, plan, evidence, seed, amounts).items():
        amounts[name] = amounts.get(name, 0) + count
    low = get_masks(model)
    WeightRegrowth(model, plan.regrow_rule, evidence, plan.regrow_values, seed).apply_regrowth(amounts, number)
    with torch.no_grad():
        for name, layer in prunable_layers(model).items():
            layer.weight_orig.copy_(torch.where(before[name], weights[name], layer.weight_orig))
    grown = {name: mask & ~low[name] for name, mask in get_masks(model).items()}
    return Moved({name: mask & ~before[name] for name, mask in grown.items()},
                 {name: mask & before[name] for name, mask in grown.items()})


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


def _allocate(model: nn.Module, budget: int, plan: MaskPlan, evidence: Evidence, seed: int,
              spoken_for: Mapping[str, int]) -> dict[str, int]:
    """How many of `budget` weights each layer gets, by the plan's allocation; spoken_for: what its capacity already has
    to give."""
    if budget < 1:
        return {}
    layers = prunable_layers(model)
    capacities = {name: free - spoken_for.get(name, 0) for name, free in layer_capacities(model, layers).items()}
    if plan.regrow_allocation == "global":
        return _by_best_scores(layers, capacities, budget, plan.regrow_rule, evidence)
    rule = ALLOCATORS["proportional" if plan.regrow_allocation == "layer" else plan.regrow_allocation]
    drift = evidence.make("drift") if getattr(rule, "by_drift", False) else None
    order = sorted(layers, key=lambda name: drift[name]) if drift else list(layers)
    lacking = getattr(rule, "by_reference", False) and lacking_weights(
        model, evidence.reference, count_pruned_params(model).surviving + budget)
    problem = AllocationProblem(
        layers=tuple(order), capacities=tuple(capacities[name] for name in order), budget=budget,
        sizes=tuple(layers[name].weight_mask.numel() for name in order),
        fan=tuple(sum(layers[name].weight_mask.shape) for name in order),
        drift=drift and tuple(drift[name] for name in order),
        lacking=tuple(lacking[name] for name in order) if lacking else None)
    return dict(zip(order, rule(problem, generator(seed, "allocation")), strict=True))


def _by_best_scores(layers: Mapping[str, nn.Module], capacities: Mapping[str, int], budget: int, rule: str,
                    evidence: Evidence) -> dict[str, int]:
    """How many of the network's `budget` best scores lie in each layer; in proportion where a rule has no scores."""
    selector = SELECTORS[rule]
    for kind in selector.needs:
        evidence.make(kind)
    rankings = [selector.rank(name, layer, evidence) for name, layer in layers.items()]
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
    (positions that changed), handed_back (of `Moved`), `came_back`, then the survivors of every layer.
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
        self.history: list[dict[str, Any]] = []
        self._sums: dict[str, Tensor] = {}

    @property
    def _power(self) -> int:
        """Of the gradients that the rule looks at: 1, 2 for saliency, 0 where it needs none."""
        ignored = "regrow_rule" in MASK_SCHEDULES[self.plan.schedule].ignores
        needs = () if ignored else SELECTORS[self.plan.regrow_rule].needs
        return 2 if "saliency" in needs else int("gradient" in needs)

    def begin(self, trainer: Trainer) -> None:
        """A training that starts from a denser model than the schedule wants is pruned first."""
        if trainer.step == 0:
            self._update(trainer, self.plan.move(0, trainer.total_steps)._replace(exchange=0.0))

    def before_step(self, trainer: Trainer) -> None:
        """Has the gradients of the effective weights kept in the last `evidence_steps` steps before an update."""
        ahead = self._next_update(trainer) - trainer.step  # the coming step is the ahead-th before it, 1 the last
        self.watching = self._power > 0 and 0 < ahead <= self.plan.evidence_steps

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
            self._sums = {}

    @torch.no_grad()
    def _gather(self) -> None:
        for name, layer in prunable_layers(self.model).items():
            grad = getattr(layer.weight, "grad", None)  # None: a layer that never runs
            grad = torch.zeros_like(layer.weight_orig) if grad is None else grad ** self._power
            self._sums[name] = grad if name not in self._sums else self._sums[name] + grad

    def _evidence(self) -> Evidence:
        def saliency() -> dict[str, Tensor]:
            """g^2 w^2 of the sparse model, at pruned positions by the value that the weight had."""
            layers = prunable_layers(self.model)
            return {name: total * layers[name].weight_orig.detach() ** 2 for name, total in self._sums.items()}

        def drift() -> dict[str, float]:
            maps = [BlockwiseFeatureExtractor(model, list(self.ever_regrown), self.precision).extract(self.sample)
                    for model in (self.reference, self.model)]
            return compute_block_ssim(*maps)

        return Evidence(reference=self.reference, gradient=lambda: self._sums, saliency=saliency, drift=drift)

    def _update(self, trainer: Trainer, move: Move) -> None:
        layers, before = prunable_layers(self.model).values(), get_masks(self.model)
        if not all(numbers(layer.weight_orig.isfinite().all() for layer in layers)):
            raise RunFailed(f"weights are not finite after {trainer.step} steps: the training diverged; the last good "
                            "checkpoint is kept. Try a lower learning rate or --precision fp32")
        keep, number = round((1.0 - move.sparsity) * self.total), len(self.history) + 1
        returned, handed_back = move_masks(self.model, keep, move.exchange, self.plan, self._evidence(),
                                           seed=derive_seed(self.seed, "mask update"), number=number)
        after, counts = get_masks(self.model), surviving_by_layer(self.model)
        self.ever_regrown = {name: ever | returned[name] for name, ever in self.ever_regrown.items()}
        self.history.append({
            "step": trainer.step, "epoch": trainer.step / max(1, len(trainer.train_loader)),
            "sparsity": 1.0 - sum(counts.values()) / self.total, "survivors": sum(counts.values()),
            "pruned": _total({name: before[name] & ~mask for name, mask in after.items()}),
            "regrown": _total(returned), "handed_back": _total(handed_back), "came_back": self.came_back,
            **counts})
        trainer.hold_pruned(returned)

    @property
    def came_back(self) -> int:
        """How many weights are active now that were pruned earlier in the training."""
        return _total(self._stayed())

    def _stayed(self) -> dict[str, Tensor]:
        """Layer -> bool, True where a weight is active that has come back."""
        return {name: mask & self.ever_regrown[name] for name, mask in get_masks(self.model).items()}

    def shares_regrown(self) -> dict[str, tuple[float, float]]:
        """Of each layer's weights the share, in [0, 1], that has come back at least once; and of those that are active
        now, the share that has."""
        active = surviving_by_layer(self.model)
        return {name: (self.ever_regrown[name].float().mean().item(), stayed.sum().item() / max(1, active[name]))
                for name, stayed in self._stayed().items()}

    def counts(self, trainer: Trainer) -> bool:
        """Only epochs that end at the target's sparsity may be the best."""
        return self.history[-1]["survivors"] == round((1.0 - self.plan.target) * self.total)

    def state_dict(self) -> dict[str, Any]:
        """Rows so far, gathered gradients, where weights have come back."""
        return {"history": self.history, "sums": self._sums, "ever_regrown": self.ever_regrown}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`; the masks themselves come with the model."""
        device = next(self.model.parameters()).device
        self.history = list(state["history"])
        self._sums, self.ever_regrown = ({name: value.to(device) for name, value in state[key].items()}
                                         for key in ("sums", "ever_regrown"))
