"""Every figure of the project; each function takes plain rows and writes one PNG."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

SPARSITY_TICKS = (0.4, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=150, bbox_inches="tight")
    temporary.replace(path)


def sparsity_axis(axes: Axes, lowest: float, highest: float) -> None:
    """An x axis over density on a log scale, sparser to the right, labelled with sparsity in %."""
    axes.set_xscale("log")
    axes.set_xlim((1 - lowest) * 1.25, (1 - highest) / 1.25)
    ticks = [tick for tick in SPARSITY_TICKS if lowest - 0.02 <= tick <= highest + 0.002]
    axes.xaxis.set_major_locator(FixedLocator([1 - tick for tick in ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda density, _: f"{100 * (1 - density):.4g}"))
    axes.set_xlabel("sparsity (% of prunable weights removed)")


def plot_pruning(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Accuracy against sparsity, a line per pruner and schedule, the dense model as a dashed line.

    rows: as of `utils.pipeline.summary_rows`; test accuracy is drawn where every row of a line has it, else validation.
    """
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    pruned = [row for row in rows if row["pruner"] != "none"]
    for row in rows:
        if row["pruner"] == "none":
            value, kind = _accuracy([row])
            axes.axhline(value[0], color="0.4", linestyle="--", label=f"dense ({kind} {value[0]:.2f} %)")
    for number, key in enumerate(sorted({(row["pruner"], row["schedule"]) for row in pruned})):
        line = [row for row in pruned if (row["pruner"], row["schedule"]) == key]
        values, kind = _accuracy(line)
        axes.plot([1 - row["sparsity"] for row in line], values, marker="o", color=f"C{number}",
                  label=f"{key[0]}, {key[1]} ({kind})")
    if pruned:
        sparsities = [row["sparsity"] for row in pruned]
        sparsity_axis(axes, min(sparsities), max(sparsities))
    axes.set(ylabel="accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, str]:
    kind = "test" if all(row["test_acc"] != "" for row in rows) else "validation"
    key = {"test": "test_acc", "validation": "val_acc"}[kind]
    return np.array([float(row[key]) for row in rows]), kind
