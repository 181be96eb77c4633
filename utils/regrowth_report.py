"""What a stage-2 run came to: test accuracy, the table before/after, and the curve with the regrowth arrows."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils import checkpoint, pipeline, plots
from utils.pipeline import Outcome
from utils.run import Run


def report(run: Run, folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Reads the test set once for each regrown model, prints the table and writes CSV and figure.

    outcomes: the starting model, then the regrown ones in order; folder: the run's `--save_dir`.
    """
    pipeline.read_test(run, outcomes[1:])
    rows = [_row(run, outcome) for outcome in outcomes[1:] if "method" in outcome.card["config"]]
    checkpoint.save_csv(rows, folder / "regrowth_results.csv")
    plots.plot_bidirectional(pipeline.summary_rows(run.root, run.m_name), rows, folder / "regrowth_results.png",
                             title=f"{run.m_name} on {run.data_label}")
    _print(run, rows, folder)
    for outcome in outcomes[1:]:
        if "method" not in outcome.card["config"]:
            print(f"{outcome.artifact.name}, without a run card: sparsity {outcome.card['sparsity']:.4f}  validation "
                  f"{outcome.card['val_acc']:.2f} %, test {outcome.card['test_acc']:.2f} %")


def _row(run: Run, outcome: Outcome) -> dict[str, Any]:
    card = outcome.card
    same = one_shot_card(run, card["sparsity"])
    config = card["config"]
    return {"method": config.get("selection", config["method"]), "allocation": config["allocation"],
            "found_by": card.get("allocation_source", ""),
            "sparsity_before": card["sparsity_before"], "sparsity": card["sparsity"], "regrown": card["regrown"],
            "surviving": card["surviving"], "val_acc_before": card["val_acc_before"],
            "val_acc_after_regrowth": card["val_acc_after_regrowth"],
            "val_acc_after_regrowth_bn": _or_empty(card.get("val_acc_after_regrowth_bn")), "val_acc": card["val_acc"],
            "start_test_acc": _or_empty(card.get("start_test_acc")), "test_acc": card["test_acc"],
            "one_shot_val_acc": _or_empty(same.get("val_acc")), "one_shot_test_acc": _or_empty(same.get("test_acc")),
            "one_shot_epochs": _or_empty(same.get("epochs")),
            "search_epochs": card["search_epochs"], "epochs": card["epochs"], "seed": card["config"]["seed"],
            "dataset": card["config"]["dataset"], "seconds": card["seconds"], "checkpoint": outcome.artifact.name}


def one_shot_card(run: Run, sparsity: float) -> dict[str, Any]:
    """Run card of the one-shot pruned model of a sparsity under the root, {} when there is none."""
    card = checkpoint.read_card(checkpoint.pruned_path(run.root, run.m_name, sparsity)) or {}
    return card if card.get("config", {}).get("schedule") == "one-shot" else {}


def _or_empty(value: float | None) -> float | str:
    return "" if value is None else value


def _print(run: Run, rows: Sequence[dict[str, Any]], folder: Path) -> None:
    print(f"\n{run.m_name} on {run.data_label}, seed {run.seed}, {run.precision}")
    for row in rows:
        test = "" if row["start_test_acc"] == "" else f", test {row['start_test_acc']:.2f} %"
        bn = row["val_acc_after_regrowth_bn"]
        again = "" if bn == "" else f", {bn:.2f} % with batch-norm statistics re-estimated"
        print(f"before           sparsity {row['sparsity_before']:.5g}  validation {row['val_acc_before']:.2f} %"
              f"{test}\n"
              f"after regrowth   sparsity {row['sparsity']:.5g}  validation {row['val_acc_after_regrowth']:.2f} %"
              f"{again}  ({row['regrown']:,} weights, {row['method']}, {plots.allocation_name(row)})\n"
              f"after finetuning sparsity {row['sparsity']:.5g}  validation {row['val_acc']:.2f} %, "
              f"test {row['test_acc']:.2f} %  ({row['epochs']} epochs)")
        if row["one_shot_test_acc"] != "":
            print(f"one-shot pruned  sparsity {row['sparsity']:.5g}  validation {row['one_shot_val_acc']:.2f} %, "
                  f"test {row['one_shot_test_acc']:.2f} %  ({row['one_shot_epochs']} epochs since the dense model)")
    print(f"models, cards, allocation, table and figures: {folder}")
