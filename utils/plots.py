"""Every figure of the project; each function takes plain rows and writes one PNG."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from utils.allocation import AllocationProblem

SHORTEST = 1e-4  # seconds; a stage that takes less has nothing to do and is not drawn
SPARSITY_TICKS = (0.4, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)


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

    rows: as of `utils.pipeline.summary_rows`; test accuracy is drawn where every row has it, else validation.
    """
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    _draw_pruning(axes, rows)
    sparsities = [float(row["sparsity"]) for row in rows if row["pruner"] != "none"]
    if sparsities:
        sparsity_axis(axes, min(sparsities), max(sparsities))
    axes.set(ylabel="accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def _draw_pruning(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Test accuracy where every model has it, else validation: never one beside the other."""
    kind, column = ("test", "test_acc") if all(row["test_acc"] != "" for row in rows) else ("validation", "val_acc")
    for row in rows:
        if row["pruner"] == "none":
            value = float(row[column])
            axes.axhline(value, color="0.4", linestyle="--", label=f"dense ({kind} {value:.2f} %)")
    pruned = [row for row in rows if row["pruner"] != "none"]
    for number, key in enumerate(sorted({(row["pruner"], row["schedule"]) for row in pruned})):
        line = [row for row in pruned if (row["pruner"], row["schedule"]) == key]
        axes.plot([1 - float(row["sparsity"]) for row in line], [float(row[column]) for row in line], marker="o",
                  color=f"C{number}", label=f"{key[0]}, {key[1]} ({kind})")


def plot_bidirectional(pruning: Sequence[Mapping[str, Any]], regrown: Sequence[Mapping[str, Any]], path: Path,
                       title: str) -> None:
    """The pruning curves, and for each regrown model an arrow from where it started to where it ended.

    pruning: rows of `utils.pipeline.summary_rows`; regrown: rows of ``regrowth_results.csv``. Test accuracy is drawn
    where it is known, else validation.
    """
    figure = Figure(figsize=(7.5, 5))
    axes = figure.subplots()
    _draw_pruning(axes, pruning)
    for number, row in enumerate(regrown):
        known = row["start_test_acc"] != "" and row["test_acc"] != ""
        kind = "test" if known else "validation"
        start, end = (float(row[key]) for key in (("start_test_acc", "test_acc") if known
                                                  else ("val_acc_before", "val_acc")))
        color = f"C{4 + number % 6}"
        ends = (1 - float(row["sparsity"]), end), (1 - float(row["sparsity_before"]), start)
        axes.annotate("", *ends, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.8,
                                             "shrinkA": 3, "shrinkB": 7})
        axes.plot(*ends[0], marker="*", markersize=12, color=color, linestyle="none",
                  label=f"regrown: {row['method']}, {allocation_name(row)} ({kind} {end:.2f} %)")
    sparsities = [float(row["sparsity"]) for row in pruning if row["pruner"] != "none"]
    sparsities += [float(row[key]) for row in regrown for key in ("sparsity", "sparsity_before")]
    if sparsities:
        sparsity_axis(axes, min(sparsities), max(sparsities))
    axes.set(ylabel="accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def allocation_name(row: Mapping[str, Any]) -> str:
    """How weights were allotted: a rule, or the search with who found what it chose (the controller, or a rule)."""
    found_by = row.get("found_by", "")
    return f"rl, best: {found_by}" if row["allocation"] == "rl" and found_by else str(row["allocation"])


def plot_search(history: Sequence[Mapping[str, Any]], problem: AllocationProblem, allocation: Sequence[int],
                path: Path) -> None:
    """Left: reward of every episode, the best so far and the controller's baseline; right: the best allocation.

    history: rows of `utils.controller.RegrowthPolicyGradient`; allocation: weights per layer of `problem`.
    """
    figure = Figure(figsize=(12, max(4.5, 0.24 * len(allocation) + 1.2)), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, fidelity in enumerate(sorted({row["fidelity"] for row in history})):
        rows = [row for row in history if row["fidelity"] == fidelity]
        episodes = [row["episode"] for row in rows]
        label = f"{fidelity} epoch{'s' if fidelity > 1 else ''}"
        left.scatter(episodes, [100 * row["reward"] for row in rows], s=16, color=f"C{number}",
                     label=f"reward, {label}")
        left.step(episodes, [100 * row["best"] for row in rows], where="post", color=f"C{number}", alpha=0.5,
                  label=f"best, {label}")
    based = [row for row in history if row["baseline"] is not None and row["source"] == "rl"]
    left.plot([row["episode"] for row in based], [100 * row["baseline"] for row in based], color="0.3", linestyle="--",
              marker=".", label="baseline")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(xlabel="episode", ylabel="validation accuracy (%)", title="search")
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    _draw_allocation(right, problem, allocation)
    save_figure(figure, path)


def _draw_allocation(axes: Axes, problem: AllocationProblem, allocation: Sequence[int]) -> None:
    positions = np.arange(len(allocation))
    axes.barh(positions, problem.capacities, color="0.88", label="capacity")
    axes.barh(positions, allocation, color="C0", label="regrown")
    axes.set_yticks(positions, [f"{name} ({drift:.2f})" for name, drift in zip(problem.layers, problem.drift)],
                    fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="weights", xscale="symlog", xlim=(0, 2 * max(1, *problem.capacities)),
             title="best allocation, layers by SSIM (in brackets), lowest first")
    axes.legend(fontsize=8)


def plot_single_layer(layers: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]], path: Path,
                      title: str) -> None:
    """Four panels: SSIM against the final and the immediate gain with trend and p, gain by layer in SSIM order, and
    gain against capacity.

    layers: rows of `single_layer_regrowth_analysis.by_layer`, in SSIM order; results: its correlations, the rows in
    points (not per weight) are shown.
    """
    figure = Figure(figsize=(13, 10), layout="constrained")
    figure.suptitle(title)
    (first, second), (third, fourth) = figure.subplots(2, 2)
    shown = {row["gain"]: row for row in results if row["unit"] == "points"}
    for axes, gain, words in ((first, "final_gain", "after finetuning, over the control (points)"),
                              (second, "immediate_gain", "right after regrowth (points)")):
        _scatter_trend(axes, [row["ssim"] for row in layers], [row[gain] for row in layers], shown[gain])
        axes.set(xlabel="SSIM of the layer (lower: more drift)", ylabel=f"gain {words}")
    positions = np.arange(len(layers))
    colors = ["C1" if row["capped"] else "C0" for row in layers]
    third.bar(positions, [row["final_gain"] for row in layers], color=colors)
    third.set_xticks(positions, [row["layer"] for row in layers], rotation=90, fontsize=8)
    third.set(ylabel="gain after finetuning, over the control (points)",
              title="layers by SSIM, lowest first (orange: capped by its capacity)")
    fourth.scatter([row["capacity"] for row in layers], [row["final_gain"] for row in layers], c=colors)
    fourth.set(xscale="log", xlabel="capacity of the layer (pruned weights)",
               ylabel="gain after finetuning, over the control (points)",
               title="gain against capacity (orange: capped by it)")
    for axes in (first, second, third, fourth):
        axes.set_axisbelow(True)
        axes.grid(alpha=0.3)
        axes.axhline(0, color="0.5", linewidth=0.8)
    save_figure(figure, path)


def _scatter_trend(axes: Axes, x: Sequence[float], y: Sequence[float], result: Mapping[str, Any]) -> None:
    axes.scatter(x, y)
    if np.isnan(result["pearson"]):
        axes.set_title("no correlation: too few layers, or all alike", fontsize=10)
        return
    if np.ptp(x) > 0:
        slope, intercept = np.polyfit(x, y, 1)
        ends = np.array([min(x), max(x)])
        axes.plot(ends, slope * ends + intercept, color="C3", linestyle="--")
    axes.set_title(f"Pearson r = {result['pearson']:+.2f} (p = {result['pearson_p']:.3f}), "
                   f"Spearman = {result['spearman']:+.2f} (p = {result['spearman_p']:.3f})", fontsize=10)


def plot_benchmark(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Left: a bar per method, its stages stacked (seconds); right: every stage by itself on a log axis, median with
    fastest and slowest.

    rows: method, stage, median_s, fastest_s, slowest_s; the same stages in the same order for every method.
    """
    methods, stages = (list(dict.fromkeys(row[key] for row in rows)) for key in ("method", "stage"))
    table = {(row["method"], row["stage"]): row for row in rows}
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    for number, method in enumerate(methods):
        start = 0.0
        for color, stage in enumerate(stages):
            seconds = table[method, stage]["median_s"]
            left.barh(method, seconds, left=start, color=f"C{color}", label=None if number else stage)
            start += seconds
        values, fastest, slowest = (np.array([table[method, stage][key] for stage in stages])
                                    for key in ("median_s", "fastest_s", "slowest_s"))
        places = np.arange(len(stages)) + 0.8 * (number - (len(methods) - 1) / 2) / len(methods)
        values = np.where(values < SHORTEST, np.nan, values)
        right.errorbar(places, values, [values - fastest, slowest - values], fmt="o", capsize=3, color=f"C{number}",
                       label=method)
    left.invert_yaxis()
    left.set(xlabel="seconds of one episode (medians, stacked)", title="end to end")
    left.legend(fontsize=8)
    right.set_xticks(range(len(stages)), stages, rotation=20, fontsize=8)
    right.set(yscale="log", ylabel="seconds", title="each stage: median, fastest and slowest")
    right.grid(alpha=0.3, axis="y")
    right.legend(fontsize=8)
    save_figure(figure, path)


def plot_differences(results: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """A line per arm: mean paired difference to the control with its t interval (thin) and bootstrap interval (thick).

    results: rows of `experiments.matched_compute.compare`; infinite intervals (a single seed) are left out.
    """
    figure = Figure(figsize=(8, 0.4 * len(results) + 1.6), layout="constrained")
    axes = figure.subplots()
    colors = {"better": "C2", "worse": "C3", "indistinguishable": "0.4"}
    for position, row in enumerate(results):
        color = colors[row["verdict"]]
        if np.isfinite(row["t_low"]):
            axes.plot([row["t_low"], row["t_high"]], [position] * 2, color=color, linewidth=1)
            axes.plot([row["bootstrap_low"], row["bootstrap_high"]], [position] * 2, color=color, linewidth=4,
                      alpha=0.5)
        axes.plot(row["mean"], position, marker="o", color=color)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(results)), [f"{row['arm']} ({row['verdict']})" for row in results], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="test accuracy over one-shot pruning (points); thin: 95 % t interval, thick: bootstrap",
             title=title)
    axes.grid(alpha=0.3, axis="x")
    save_figure(figure, path)


def plot_tables(results: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Test accuracy against sparsity for each setting of `experiments.vgg16_tables`: ours filled, published hollow.

    results: rows of its `beside_published`; bars are standard deviations, where there are several seeds.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    names = {"A": "iterative, 40 % each", "B": "one-shot", "R": "regrown from 99 %"}
    for number, (setting, name) in enumerate(names.items()):
        rows = [row for row in results if row["row"].startswith(setting)]
        for mean, std, style, label in (("mean", "std", {"fmt": "o-"}, "ours"),
                                        ("published", "published_std", {"fmt": "s--", "mfc": "none"}, "published")):
            known = [row for row in rows if row[mean] != ""]
            if known:
                spread = [row[std] or 0 for row in known] if any(row[std] for row in known) else None
                axes.errorbar([1 - row["sparsity"] for row in known], [row[mean] for row in known], spread,
                              color=f"C{number}", capsize=3, alpha=0.8, label=f"{name} ({label})", **style)
    sparsity_axis(axes, min(row["sparsity"] for row in results), max(row["sparsity"] for row in results))
    axes.set(ylabel="test accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)
