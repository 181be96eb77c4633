"""How the mask moves while a model trains: gradual pruning, exchange of weights, dense and sparse phases, and pruning
past the target with regrowth.

At every update a schedule, one function and one line in `MASK_SCHEDULES`, says how sparse the model is to be and which
fraction of its survivors is exchanged: pruned, and as many regrown. `utils.mask_mover` carries that out, by a pruning
rule of `PRUNERS`, a selection rule of `SELECTORS`, an allocation and values of `INITIALISERS`.
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from utils.allocation import ALLOCATORS
from utils.analysis_utils import GRADIENT_KINDS
from utils.common import UserError, fraction, needed, positive_int, steps_or_share
from utils.pruning import PRUNERS
from utils.regrowth import INITIALISERS, SELECTORS

# ---- schedules -----------------------------------------------------------------------------------------------------


class Move(NamedTuple):
    """What a schedule wants of an update: the sparsity after it, and the fraction of survivors that is exchanged."""

    sparsity: float
    exchange: float = 0.0


@dataclass(frozen=True)
class MaskPlan:
    """A schedule with all that it needs to know.

    schedule: name in `MASK_SCHEDULES`. start, target: sparsity before training and after the last update. pruner:
    which weights go, of `PRUNERS`. update_every: steps from one update to the next (of acdc: of a phase), below 1 a
    fraction of the training. update_until: fraction of it after which the mask is fixed. ramp_until: fraction of it
    after which the sparsity is the target's and weights are only exchanged; None: update_until. exchange: fraction of
    the survivors that is exchanged in the first update. regrow_rule, regrow_values: which weights return, and how.
    regrow_allocation: 'layer' (every layer gives up its smallest |w|, whatever the pruner, and gets as many back),
    'global' (the best scores of the network), or a name of `ALLOCATORS`. evidence_steps: training batches before an
    update over which gradients are averaged.
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

    @property
    def looks_at(self) -> set[str]:
        """The kinds of evidence that its rule and its values for what returns need."""
        ignored = MASK_SCHEDULES[self.schedule].ignores
        return {kind for field, registry in (("regrow_rule", SELECTORS), ("regrow_values", INITIALISERS))
                if field not in ignored for kind in needed(registry[getattr(self, field)])}

    def least_density(self) -> float:
        """The smallest fraction of the weights that an update prunes to before any of them returns, in (0, 1).

        UserError for a schedule that does not end at the target, where no epoch would count.
        """
        moves = [MASK_SCHEDULES[self.schedule].move(self, step / 1000, step) for step in range(1001)]
        if not math.isclose(moves[-1].sparsity, self.target, abs_tol=1e-10):
            raise UserError(f"mask schedule {self.schedule} is wrong: at t = 1, its last update, it asks for sparsity "
                            f"{moves[-1].sparsity:.12g} instead of the target's, {self.target:.12g}")
        return min((1.0 - move.sparsity) * (1.0 if self.regrow_allocation == "layer" else 1.0 - move.exchange)
                   for move in moves)

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

    At t = 1, the last update, that has to be the plan's target: only epochs that end there count. ignores: fields of
    the plan that mean nothing to it.
    """

    move: Callable[[MaskPlan, float, int], Move]
    defaults: Mapping[str, Any]
    ignores: tuple[str, ...] = ()

    @property
    def exchanges(self) -> bool:
        """Whether weights are exchanged where the sparsity is the target's from the start."""
        plan = MaskPlan("", 0.9, 0.9)
        return any(self.move(plan, t, 1).exchange > 0 for t in (0.0, 0.5))


# Fields that mean nothing where no weight returns
RETURNS = ("ramp_until", "exchange", "regrow_rule", "regrow_allocation", "regrow_values", "evidence_steps")
MASK_SCHEDULES: dict[str, MaskSchedule] = {
    # Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878
    "gradual": MaskSchedule(_gradual, {}, ignores=RETURNS),
    # A control: at once, but only at `update_until`, so that what is pruned has been trained for longer
    "late": MaskSchedule(_late, {"update_until": 0.3}, ignores=("update_every", *RETURNS)),
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
    if fields.get("ramp_until", 0.0) > fields.get("update_until", MaskPlan.update_until):
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
    add("--update_until", type=fraction, help="fraction of the training after which the mask is fixed")
    add("--ramp_until", type=fraction, help="fraction of the training after which the sparsity is the target's and "
        "weights are only exchanged (default: that of --update_until)")
    add("--exchange", type=fraction, help="initial fraction of the survivors that is pruned and regrown, falling to 0")
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
    if at_target and not schedule.exchanges:
        able = ", ".join(name for name, row in MASK_SCHEDULES.items() if row.exchanges)
        raise UserError(f"--mask_schedule {args.mask_schedule} only changes the sparsity, and a regrown model already "
                        f"has the target's; schedules that work at constant sparsity are {able}")
    if at_target and "ramp_until" in given:
        raise UserError("--ramp_until is about the way to a sparsity, and a regrown model has the target's already; "
                        "leave it out")
    unused = [name for name in given if name in schedule.ignores]
    if unused:
        raise UserError(f"--{unused[0]} does nothing with --mask_schedule {args.mask_schedule}; leave it out")
    if needed(PRUNERS.get(pruner)):
        raise UserError(f"--pruner {pruner} looks at data once, before the finetuning; with --mask_schedule take "
                        "magnitude or another rule of the weights")
    if not finetune_epochs:
        raise UserError(f"--mask_schedule {args.mask_schedule} moves the mask during finetuning, of which "
                        "--finetune_epochs 0 leaves none")
    fields = plan_fields(args.mask_schedule, **given)
    looks_at = MaskPlan(start=0.0, target=0.5, **fields).looks_at
    if "evidence_steps" in given and not looks_at.intersection(GRADIENT_KINDS):
        raise UserError(f"--evidence_steps is for rules that look at gradients; leave it out with --regrow_rule "
                        f"{fields['regrow_rule']}")
    return fields
