#!/usr/bin/env python
"""The whole regrowth budget on one layer at a time: which layers repay it, and does SSIM drift predict which?

From the pruned checkpoint, K = (start - target sparsity) of all weights return to one layer (fewer where its capacity
is smaller), copied from the reference; accuracy right after, with the batch-norm statistics as they are and
re-estimated, and after finetuning. A row '(none)' is finetuned without regrowth, so that the gain of the weights can
be told from the gain of training on.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import utils  # noqa: F401  (first: it says which packages are missing)

# isort: split
from torch import nn

from utils import checkpoint, plots, stage1, stage2
from utils.analysis_utils import clone_model
from utils.common import UserError
from utils.methods import check_start
from utils.regrowth import Evidence, WeightRegrowth, layer_capacities, regrowth_budget, target_layers
from utils.run import (
    Run,
    add_start_options,
    count,
    fraction,
    open_run,
    positive_float,
    positive_int,
    run_parser,
    script,
)
from utils.stage import ResumableTable
from utils.statistics import correlate, verdict
from utils.training import FINETUNE_FINAL, Trainer, accuracy_with_new_statistics, evaluate

CONTROL = "(none)"
IMMEDIATE = ("immediate_gain_as_is", "immediate_gain")  # with stale batch-norm statistics, and with new ones


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = run_parser(__doc__)
    add_start_options(parser)
    parser.add_argument("--target_sparsity", type=fraction, default=0.97, help="sparsity that the budget would reach")
    parser.add_argument("--reference_model", metavar="FILE|SPARSITY",
                        help="whose weights return; default: the dense model")
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="layers by name or pattern; default: all")
    parser.add_argument("--num_seeds", type=positive_int, default=1, help="finetunings of each layer")
    parser.add_argument("--finetune_epochs", type=count, default=10, help="epochs of each finetuning")
    parser.add_argument("--finetune_lr", type=positive_float, default=FINETUNE_FINAL.lr,
                        help="its learning rate (AdamW)")
    parser.add_argument("--ssim_batches", type=positive_int, default=10, help="batches of 500 images for the drift")
    parser.add_argument("--save_dir", type=Path, help="default: single_layer_savedir/{m_name} under --root")
    args = parser.parse_args(argv)
    check_start(args, parser)
    return args


def configuration(run: Run, args: argparse.Namespace, start: Path, dense: Path) -> dict[str, Any]:
    """The arguments that every row depends on."""
    return {**run.identity(), "start": checkpoint.file_digest(start), "dense": checkpoint.file_digest(dense),
            **stage2.reference_config(run, args.reference_model), "evidence": stage2.SAMPLE,
            "target_sparsity": args.target_sparsity, "reference_model": args.reference_model, "layers": args.layers,
            "ssim_batches": args.ssim_batches, "finetune_epochs": args.finetune_epochs, "finetune_lr": args.finetune_lr}


def regrow_layer(run: Run, args: argparse.Namespace, start: nn.Module, evidence: Evidence, layer: str, number: int,
                 seed: int) -> tuple[float, float, float]:
    """Validation accuracy (%) right after `number` weights returned to `layer`, the same with batch-norm statistics
    re-estimated, and after finetuning.

    Every layer sees the same order of the same images for a seed.
    """
    model, derived = clone_model(start), run.derive_seed("single layer", seed)
    if number:
        WeightRegrowth(model, "reference", evidence, "reference", derived).apply_regrowth({layer: number})
    immediate = evaluate(model, run.val, run.precision).accuracy
    reestimated = accuracy_with_new_statistics(model, run.train, run.val, run.precision)
    recipe = replace(FINETUNE_FINAL, epochs=args.finetune_epochs, lr=args.finetune_lr, patience=None)
    if not recipe.epochs:
        return immediate, reestimated, reestimated
    trainer = Trainer(model, run.train, run.val, recipe, seed=derived, precision=run.precision)
    return immediate, reestimated, trainer.run(f"{layer}, seed {seed}").accuracy


def measure_layers(run: Run, args: argparse.Namespace, start: nn.Module, dense: nn.Module,
                   table: ResumableTable) -> None:
    """A row for every layer with capacity and every seed that the table does not have yet."""
    capacities = layer_capacities(start, target_layers(start, args.layers))
    capacities = {name: capacity for name, capacity in capacities.items() if capacity}
    if not capacities:
        where = f"--layers {' '.join(args.layers)}" if args.layers else "the starting model"
        raise UserError(f"{where}: no weight is pruned there, so none can return; name others")
    evidence = stage2.evidence_maker(run, args, dense)(start)
    drift = evidence.make("drift")
    budget = regrowth_budget(start, target_sparsity=args.target_sparsity)
    before = evaluate(start, run.val, run.precision).accuracy
    jobs = [(layer, seed) for layer in [CONTROL, *capacities] for seed in range(args.num_seeds)]
    jobs = [job for job in jobs if not table.has(*job)]
    for job, (layer, seed) in enumerate(jobs, 1):
        capacity = capacities.get(layer, 0)
        number = min(budget, capacity)
        immediate, reestimated, final = regrow_layer(run, args, start, evidence, layer, number, seed)
        print(f"{job}/{len(jobs)}  {layer}, seed {seed}: validation {before:.2f} -> {reestimated:.2f} -> {final:.2f} %",
              flush=True)
        table.add({"layer": layer, "seed": seed, "ssim": drift.get(layer, 1.0), "capacity": capacity,
                   "budget": budget, "regrown": number, "capped": int(number < budget), "val_acc_before": before,
                   "val_acc_immediate": immediate, "val_acc_immediate_bn": reestimated, "val_acc_final": final,
                   "immediate_gain_as_is": immediate - before, "immediate_gain": reestimated - before,
                   "final_gain": final - before}, run.card(data=run.data_label))


def by_layer(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, a row per layer in SSIM order; the final gain is over the control's of the same seed, the
    immediate one is with batch-norm statistics re-estimated."""
    control = {row["seed"]: row["final_gain"] for row in rows if row["layer"] == CONTROL}
    means = []
    for layer in dict.fromkeys(row["layer"] for row in rows if row["layer"] != CONTROL):
        own = [row for row in rows if row["layer"] == layer]
        gain = sum(row["final_gain"] - control[row["seed"]] for row in own) / len(own)
        means.append({**{key: own[0][key] for key in ("layer", "ssim", "capacity", "regrown", "capped")},
                      **{key: sum(row[key] for row in own) / len(own) for key in IMMEDIATE}, "final_gain": gain})
    return sorted(means, key=lambda row: row["ssim"])


def correlations(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """SSIM against both gains: per layer, per 1,000 regrown weights (capped layers receive fewer), and per layer among
    those that took the whole budget, where size cannot pass for drift."""
    whole = [row for row in layers if not row["capped"]]
    results = []
    for gain, when in (("immediate_gain", "right after regrowth, batch-norm statistics re-estimated"),
                       ("final_gain", "after finetuning")):
        for unit, rows, per in (("points", layers, False), ("points per 1,000 weights", layers, True),
                                ("points, uncapped layers only", whole, False)):
            values = [row[gain] / (row["regrown"] / 1000 if per else 1) for row in rows]
            found = correlate([row["ssim"] for row in rows], values)
            results.append({"gain": gain, "unit": unit, **found,
                            "verdict": verdict(found, "SSIM", f"gain {when} ({unit})")})
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every layer, then correlates, draws and says what came out."""
    args = parse_args(argv)
    run = open_run(args)
    dense, start = stage1.load_models(run, args)
    folder = args.save_dir or run.root / "single_layer_savedir" / run.m_name
    config = configuration(run, args, start.artifact, dense.artifact)
    table = ResumableTable(folder / "single_layer.csv", ("layer", "seed"), config,
                           resume=args.resume, overwrite=args.overwrite)
    measure_layers(run, args, start.model, dense.model, table)
    layers = by_layer(table.rows)
    results = correlations(layers)
    checkpoint.save_csv(layers, folder / "by_layer.csv")
    checkpoint.save_csv(results, folder / "correlations.csv")
    plots.plot_single_layer(layers, results, folder / "single_layer.png", f"{run.m_name} on {run.data_label}")
    for row in sorted(layers, key=lambda row: -row["final_gain"]):
        print(f"{row['layer']:<28} SSIM {row['ssim']:6.3f}  {row['regrown']:>7,} weights  "
              f"immediate {row['immediate_gain']:+6.2f} (as is {row['immediate_gain_as_is']:+6.2f})  "
              f"final {row['final_gain']:+6.2f} points over the control")
    print(*(row["verdict"] for row in results), f"tables and figure: {folder}", sep="\n")


if __name__ == "__main__":
    script(main)
