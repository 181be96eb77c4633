#!/usr/bin/env python
"""Which recipe reaches the most on validation in a given number of epochs? One row per combination of the values given.

Without --sparsity the network is trained from its start; with it, the dense model under --root is pruned, at once or by
each --mask_schedule, and finetuned. An option of the mask schedules goes to those of them that read it. Only validation
is read. Interrupted, it goes on after the last row with --resume.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

from utils import checkpoint, stage1  # noqa: E402, I001  first: it says which packages are missing

import torch  # noqa: E402

from utils.analysis_utils import clone_model, count_pruned_params  # noqa: E402
from utils.common import UserError, fraction, needed, positive_int, resolve_precision  # noqa: E402
from utils.mask_schedule import MASK_FIELDS, MASK_SCHEDULES, MaskPlan, add_mask_options, plan_fields  # noqa: E402
from utils.pruning import PRUNERS, prune_to  # noqa: E402
from utils.run import RECIPE_NUMBERS, Run, open_run, resolve_device, run_parser, script  # noqa: E402
from utils.stage import ResumableTable  # noqa: E402
from utils.stage1 import Outcome, PruneStep  # noqa: E402
from utils.training import RECIPES, Recipe, Trainer, accuracy_with_new_statistics  # noqa: E402

RECIPE = ("epochs", "optimizer", "lr", "schedule", "batch_size", "weight_decay", "label_smoothing", "padding")
KEYS = ("sparsity", "pruner", "mask_schedule", *MASK_FIELDS, *RECIPE, "average")
AVERAGED_SHARE = 0.35  # of the steps: those after the last update of the mask, by most schedules' defaults


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = run_parser(__doc__)
    start = RECIPES["short"].pretrain
    several = {"nargs": "+"}
    parser.add_argument("--sparsity", type=fraction, default=[0.0], help="default: pretraining", **several)
    parser.add_argument("--pruner", choices=[name for name, score in PRUNERS.items() if not needed(score)],
                        help="which weights go (default: magnitude)", **several)
    add_mask_options(parser, "how the mask moves in finetuning; fixed: pruned at once", several=True)
    parser.add_argument("--epochs", type=positive_int, default=[start.epochs], help="of training", **several)
    parser.add_argument("--batch_size", type=positive_int, default=[start.batch_size], help="images", **several)
    for name, (text, words) in RECIPE_NUMBERS.items():
        parser.add_argument(f"--{name}", default=[getattr(start, name)], help=text, **words, **several)
    parser.add_argument("--average", type=fraction, metavar="DECAY", help="take an exponential average of the weights "
                        f"over the last {AVERAGED_SHARE} of the steps (default: the best epoch's weights)", **several)
    parser.add_argument("--num_seeds", type=positive_int, default=1, help="seeds --seed, --seed + 1, ...")
    parser.add_argument("--save_dir", type=Path, help="default: recipe_sweep/{m_name} under --root")
    args = parser.parse_args(argv)
    if args.sparsity == [0.0] and args.mask_schedule != ["fixed"]:
        raise UserError("--mask_schedule moves the mask of a finetuning; give a --sparsity")
    if args.sparsity == [0.0] and args.pruner:
        raise UserError("--pruner prunes before a finetuning; give a --sparsity")
    schedules = [MASK_SCHEDULES[name] for name in args.mask_schedule if name != "fixed"]
    for name in MASK_FIELDS:
        if getattr(args, name) and all(name in schedule.ignores for schedule in schedules):
            raise UserError(f"--{name} does nothing with --mask_schedule {' '.join(args.mask_schedule)}; leave it out")
    return args


def combinations(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every different combination of the values given, by `KEYS`; '' for what means nothing to pretraining, or to its
    mask schedule."""
    lists = {name: getattr(args, name) or [None] for name in KEYS}
    found = {}
    for values in product(*lists.values()):
        asked = dict(zip(KEYS, values, strict=True))
        asked["pruner"] = asked["pruner"] or ("magnitude" if asked["sparsity"] else "")
        plan = {}
        if asked["mask_schedule"] != "fixed":
            ignored = MASK_SCHEDULES[asked["mask_schedule"]].ignores
            plan = plan_fields(asked["mask_schedule"], **{name: asked[name] for name in MASK_FIELDS
                                                          if asked[name] is not None and name not in ignored})
        if asked["average"] and plan.get("update_until", 0.0) > 1.0 - AVERAGED_SHARE:
            raise UserError(f"--average takes the last {AVERAGED_SHARE} of the steps, in which the mask of "
                            f"--mask_schedule {asked['mask_schedule']} still moves; give --update_until 0.6")
        whole = {**asked, **{name: plan.get(name, "") for name in MASK_FIELDS}, "average": asked["average"] or ""}
        found[tuple(whole.values())] = whole
    return list(found.values())


class WeightAverage:
    """Exponential average of the parameters that a `Trainer` trains, over the last `AVERAGED_SHARE` of its steps.

    plan: of the mask, which has moved for the last time before the first of them.
    """

    def __init__(self, trainer: Trainer, decay: float, plan: MaskPlan | None = None):
        self.trainer, self.decay, self.model = trainer, decay, None
        self.first = max((1.0 - AVERAGED_SHARE) * trainer.total_steps,
                         plan.last_update(trainer.total_steps) + 1 if plan else 0)
        trainer.optimizer.register_step_post_hook(self._add)

    @torch.no_grad()
    def _add(self, *_: Any) -> None:
        trainer = self.trainer
        if trainer.step + 1 >= self.first:  # the step that is done is not counted yet
            self.model = self.model or clone_model(trainer.model)
            for value, parameter in zip(self.model.parameters(), trainer.model.parameters(), strict=True):
                value.lerp_(parameter, 1.0 - self.decay)

    def accuracy(self) -> float:
        """Validation accuracy (%) of the averaged weights, with batch-norm statistics of their own."""
        trainer = self.trainer
        return accuracy_with_new_statistics(self.model, trainer.train_loader, trainer.val, trainer.precision)


def roots_of(args: argparse.Namespace) -> dict[int, Path]:
    """Seed -> folder of its dense model: ``seed_{n}`` under `--root`, or for the first seed also `--root` itself."""
    own = {seed: args.root / f"seed_{seed}" for seed in range(args.seed, args.seed + args.num_seeds)}
    if not checkpoint.dense_path(own[args.seed], args.m_name).is_file():
        own[args.seed] = args.root
    return own


def start_of(run: Run, table: ResumableTable, known: dict[str, str]) -> Outcome:
    """The dense model that the finetunings of the run's seed start from. UserError where earlier rows had another.

    known: seed -> digest, of the table's card; this model's goes into it.
    """
    dense = stage1.load_outcome(run, checkpoint.dense_path(run.root, run.m_name))
    if known.setdefault(str(run.seed), dense.digest) != dense.digest:
        raise UserError(f"{table.path} has rows of seed {run.seed} that start from another dense model than "
                        f"{dense.artifact}. Use --save_dir for another place, or --overwrite to redo it")
    return dense


def step_of(asked: dict[str, Any]) -> PruneStep:
    """The pruning of a finetuning, and how the mask moves."""
    schedule, pruner, sparsity = asked["mask_schedule"], asked["pruner"], asked["sparsity"]
    if schedule == "fixed":
        return PruneStep(pruner, "one-shot", 1, sparsity)
    fields = {name: asked[name] for name in MASK_FIELDS if asked[name] != ""}
    return PruneStep(pruner, schedule, 1, sparsity, mask=plan_fields(schedule, **fields))


def train(run: Run, asked: dict[str, Any], dense: Outcome | None) -> dict[str, Any]:
    """Trains one model and returns what came out: best and last validation accuracy (%), surviving weights and how many
    of them had been pruned on the way ('' where the mask does not move), seconds. dense: what a finetuning starts from.
    """
    sparsity, pruner, mask_schedule = asked["sparsity"], asked["pruner"], asked["mask_schedule"]
    recipe = Recipe(**{name: asked[name] for name in RECIPE})
    seed, hook = run.derive_seed("pretrain"), None
    if not sparsity:
        model = run.new_model()
    else:
        model = clone_model(dense.model)
        seed, step = stage1.finetuning_seed(run), step_of(asked)
        if mask_schedule == "fixed":
            keep = round((1.0 - sparsity) * count_pruned_params(model).total)
            prune_to(model, keep, pruner, stage1.pruning_seed(run, step))
        else:
            hook = stage1.mask_mover(run, model, step)
    trainer = Trainer(model, run.train, run.val, recipe, seed=seed, precision=run.precision, hook=hook)
    average = WeightAverage(trainer, asked["average"], hook and hook.plan) if asked["average"] else None
    result = trainer.run(f"{recipe.optimizer} {recipe.lr:g}, {mask_schedule} {sparsity:g}")
    return {"val_acc": average.accuracy() if average else result.accuracy,
            "last_val_acc": trainer.history[-1]["val_acc"], "surviving": count_pruned_params(model).surviving,
            "came_back": hook.came_back if hook else "", "seconds": trainer.seconds, "dataset": run.data_label}


def main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing, combination by combination, and prints the best of each sparsity and length."""
    args = parse_args(argv)
    folder, roots = args.save_dir or args.root / "recipe_sweep" / args.m_name, roots_of(args)
    config = {name: getattr(args, name) for name in ("m_name", "dataset", "image_size", "val_split")}
    config["precision"] = resolve_precision(args.precision, resolve_device(args.device))
    table = ResumableTable(folder / "sweep.csv", (*KEYS, "seed"), config, resume=args.resume, overwrite=args.overwrite)
    card = table.path.with_suffix(".json")
    known = json.loads(card.read_bytes()).get("dense", {}) if table.rows else {}
    missing = {seed: [asked for asked in combinations(args) if not table.has(*asked.values(), seed)] for seed in roots}
    starts = [checkpoint.dense_path(roots[seed], args.m_name) for seed, rows in missing.items()
              if any(asked["sparsity"] for asked in rows)]
    if lacking := [start for start in starts if not start.is_file()]:
        raise UserError(f"no dense model at {lacking[0]}; main.py --pruner none makes it, with the seed and --root")
    for args.seed, args.root in roots.items():
        run = open_run(args)
        table.check_data(run.data_label, run.data.fingerprint)
        dense = start_of(run, table, known) if any(asked["sparsity"] for asked in missing[run.seed]) else None
        for asked in missing[run.seed]:
            recipe = Recipe(**{name: asked[name] for name in RECIPE})
            stage1.check_steps(run, [step_of(asked)] if asked["sparsity"] else [], "--sparsity", recipe)
        for asked in missing[run.seed]:
            table.add({**asked, "seed": run.seed, **train(run, asked, dense)}, run.card(dense=known))
    for row in sorted(table.rows, key=lambda row: (row["sparsity"], row["epochs"], -row["val_acc"])):
        told = ", ".join(f"{name} {row[name]}" for name in KEYS[1:] if row[name] != "" and name != "epochs")
        print(f"{row['sparsity']:<6} {row['epochs']:>3} epochs {row['val_acc']:6.2f} % validation  seed {row['seed']}, "
              f"{told}")
    print(f"table: {folder / 'sweep.csv'}")


if __name__ == "__main__":
    script(main)
