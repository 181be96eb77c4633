"""Every figure of the project; each function takes plain rows and writes one PNG."""
from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.checkpoint import rounded_sparsity, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
COLUMNS = {"test": ("start_test_acc", "test_acc"), "validation": ("val_acc_before", "val_acc")}  # before, after
SHAPES = "*PXph8"  # of regrown models, by method
CELLS_WITH_NUMBERS = 600  # a larger heat map is legible by its colours only
ENOUGH_PAIRS = 8  # for a bootstrap interval, which is too narrow for a handful


def new_figure(**options: Any) -> Figure:
    """An empty matplotlib figure, which no window and no notebook shows; options: of `matplotlib.figure.Figure`."""
    backend = os.environ.pop("MPLBACKEND", None)  # may name one that only a notebook has
    try:
        from matplotlib.figure import Figure  # takes a while
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure(**options)


def printable(name: str) -> str:
    """The name without what fonts cannot take: bytes of a folder's name that are no UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG whole or not at all; names of classes and folders are written as they are, also with ``$``."""
    buffer = io.BytesIO()
    for axes in figure.axes:
        axes.get_xticklabels(), axes.get_yticklabels()  # makes them, so that the loop below finds them
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_text(printable(text.get_text()))
        if "$" in text.get_text() and "\\mathdefault" not in text.get_text():  # not a power of ten on a log axis
            text.set_parse_math(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks is drawn as a box
        figure.savefig(buffer, dpi=150, bbox_inches="tight", format="png")
    write_atomic(path, buffer.getvalue())


def legend_below(figure: Figure, title: str | None = None) -> None:
    """A legend of every label in the figure, each once, under its axes; the figure (constrained layout) grows by it."""
    entries = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    if not entries:
        return
    columns = max(1, int(figure.get_figwidth() / (0.6 + 0.06 * max(map(len, entries)))))  # by the widest, in inches
    lines = math.ceil(len(entries) / columns) + len((title or "").splitlines())
    figure.set_figheight(figure.get_figheight() + 0.18 * (lines + 1))
    figure.legend(entries.values(), entries, loc="outside lower center", title=title, ncols=columns, fontsize=8,
                  title_fontsize=8)


def panels(size: tuple[float, float], title: str = "", rows: int = 1, columns: int = 1, **options: Any) -> Any:
    """A figure in constrained layout (size in inches) and its axes, one or an array as of `Figure.subplots`."""
    figure = new_figure(figsize=size, layout="constrained")
    figure.suptitle(title or None)
    return figure, figure.subplots(rows, columns, **options)


# --- pruning, regrowth and studies ----------------------------------------------------------------------------------


def sparsity_axis(axes: Axes, sparsities: Iterable[float]) -> None:
    """An x axis over density on a log scale, sparser to the right, labelled with the sparsity in %."""
    densities = [1 - sparsity for sparsity in sparsities if sparsity < 1]
    if not densities:
        axes.set_xticks([])
        return
    left, right = 1.5 * max(densities), min(densities) / 1.5  # wide enough for at least one tick
    axes.set(xscale="log", xlim=(left, right), xlabel="sparsity (% of prunable weights removed)")
    steps = (1, 2, 3, 5) if left < 1000 * right else (1, 2, 5)
    ticks = [step * 10.0**power for power in range(-12, 1) for step in steps if right <= step * 10.0**power <= left]
    axes.set_xticks(ticks, [f"{100 * (1 - tick):.10g}" for tick in ticks])  # locators differ between versions
    axes.minorticks_off()


def lacks_test(row: Mapping[str, Any]) -> bool:
    """Whether a row has no test accuracy, or is of a regrown model whose start has none."""
    return row["test_acc"] == "" or row.get("start_test_acc") == ""


def plot_bidirectional(pruning: Rows, regrown: Rows, path: Path, title: str) -> None:
    """The pruning curves, and for each regrown model an arrow from where it started to where it ended.

    pruning: rows of `utils.stage1.summary_rows`; regrown: rows of ``regrowth_results.csv``. Rows that agree in all
    but the seed are drawn as their mean with bars from the lowest to the highest; a column ``run``, where there is one,
    keeps runs apart. Test accuracy (%) is drawn where every model has it, else validation accuracy.
    """
    figure, axes = panels((7.5, 4.5))
    kind = "validation" if any(lacks_test(row) for row in (*pruning, *regrown)) else "test"  # never both in one figure
    ends = [row[key] for row in regrown for key in ("sparsity", "sparsity_before")]
    sparsity_axis(axes, map(float, ends + [row["sparsity"] for row in pruning if row["pruner"] != "none"]))
    lines = _draw_pruning(axes, pruning, COLUMNS[kind][1])
    _draw_regrown(axes, regrown, COLUMNS[kind], lines)
    axes.set(ylabel=f"{kind} accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    notes = ["arrows: from the pruned to the regrown model; the higher one has the smaller mark"] if regrown else []
    if any("mean of" in label for label in axes.get_legend_handles_labels()[1]):
        notes.append("bars and bands: from the lowest to the highest seed")
    legend_below(figure, "\n".join(notes) or None)
    save_figure(figure, path)


def _grouped(rows: Iterable[Mapping[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Rows by the values of these columns, sparsities rounded as in file names; an absent column counts as empty."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(rounded_sparsity(float(row[name])) if "sparsity" in name else row.get(name, "") for name in keys)
        groups.setdefault(key, []).append(row)
    return groups


def _spread(rows: Rows, column: str) -> tuple[float, float, float]:
    """Mean, and how far the lowest and the highest value lie from it."""
    values = [float(row[column]) for row in rows]
    mean = sum(values) / len(values)
    return mean, mean - min(values), max(values) - mean


def _label(name: str, run: str, groups: Iterable[Rows], *more: str) -> str:
    """Name, run and more; how many seeds a point is the mean of, where that is not one."""
    counts = sorted({len(rows) for rows in groups})
    seeds = f"mean of {'' if counts[0] == counts[-1] else f'{counts[0]} to '}{counts[-1]} seeds"
    return ", ".join([f"{name} [{run}]" if run else name, *more, *([seeds] if counts[-1] > 1 else [])])


def _draw_pruning(axes: Axes, rows: Rows, column: str) -> int:
    """Draws the column; returns how many colours are taken."""
    dense = _grouped((row for row in rows if row["pruner"] == "none"), "run")
    for number, ((run,), group) in enumerate(dense.items()):
        mean, below, above = _spread(group, column)
        axes.axhline(mean, color="0.25", linestyle=("--", ":", "-.", (0, (8, 3)))[number % 4],
                     label=_label("dense", run, [group], f"{mean:.2f} %"))
        axes.axhspan(mean - below, mean + above, color="0.25", alpha=0.15, linewidth=0)
    lines = _grouped((row for row in rows if row["pruner"] != "none"), "pruner", "schedule", "run")
    for number, ((pruner, schedule, run), line) in enumerate(sorted(lines.items())):
        points = [point for _, point in sorted(_grouped(line, "sparsity").items())]
        means, *ends = zip(*(_spread(point, column) for point in points))
        axes.errorbar([1 - float(point[0]["sparsity"]) for point in points], means, ends if np.any(ends) else None,
                      marker="osD^v"[number % 5], capsize=3, color=f"C{number}",
                      label=_label(f"{pruner}, {schedule}", run, points))
    return len(lines)


def _draw_regrown(axes: Axes, rows: Rows, columns: tuple[str, str], first_color: int) -> None:
    """An arrow and a mark for each group of regrown models, on a sparsity axis that is set up already."""
    groups = _grouped(rows, "method", "allocation", "run", "sparsity_before", "sparsity")
    ordered = sorted(groups.items(), key=lambda item: _spread(item[1], columns[1])[0])  # so that arrows rarely cross
    methods = sorted({key[0] for key in groups})
    for number, ((method, _, run, before, after), group) in enumerate(ordered):
        color, share = f"C{(first_color + number) % 10}", (number + 0.5) / len(ordered)  # from 0 to 1
        start, (end, *ends) = _spread(group, columns[0])[0], _spread(group, columns[1])
        axes.annotate("", (1 - after, end), (1 - before, start), zorder=2.5,  # bent, so that they stay apart
                      arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.4, "shrinkA": 3, "shrinkB": 6,
                                  "connectionstyle": f"arc3,rad={0.3 * (share - 0.5)}"})
        axes.update_datalim([(1 - before, start)])
        found_by = " / ".join(sorted({str(row.get("found_by") or "") for row in group} - {""}))
        allocation = allocation_name({**group[0], "found_by": found_by})
        axes.errorbar(1 - after, end, np.reshape(ends, (2, 1)) if np.any(ends) else None, zorder=4 + share, capsize=4,
                      color=color, marker=SHAPES[methods.index(method) % len(SHAPES)], markeredgecolor="k",
                      markersize=16 - 10 * share, markeredgewidth=0.6, linestyle="none",
                      label=_label(f"regrown: {method}, {allocation}", run, [group], f"{end:.2f} %"))


def allocation_name(row: Mapping[str, Any]) -> str:
    """How weights were allotted: a rule, or the search with who found what it chose (the controller, or a rule)."""
    found_by = row.get("found_by", "")
    return f"rl, best: {found_by}" if row["allocation"] == "rl" and found_by else str(row["allocation"])


def plot_search(history: Rows, problem: Any, allocation: Sequence[int], path: Path) -> None:
    """Left: reward of every episode, the best so far and the controller's baseline; right: the best allocation.

    history: rows of `utils.controller.RegrowthPolicyGradient`; problem: `utils.allocation.AllocationProblem`;
    allocation: weights that return in each of its layers.
    """
    figure, (left, right) = panels((12, max(4.5, 0.24 * len(allocation) + 1.2)), columns=2)
    for number, fidelity in enumerate(sorted({row["fidelity"] for row in history})):
        rows = [row for row in history if row["fidelity"] == fidelity]
        episodes, label = [row["episode"] for row in rows], f"{fidelity} epoch{'s' if fidelity > 1 else ''}"
        left.scatter(episodes, [100 * row["reward"] for row in rows], s=16, color=f"C{number}",
                     label=f"reward, {label}")
        left.step(episodes, [100 * row["best"] for row in rows], where="post", color=f"C{number}", alpha=0.5,
                  label=f"best, {label}")
    based = [row for row in history if row["baseline"] is not None and row["source"] == "rl"]
    if based:  # there is none before the controller's first update
        left.plot([row["episode"] for row in based], [100 * row["baseline"] for row in based], color="0.3",
                  linestyle="--", marker=".", label="baseline of the controller")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set(xlabel="episode", ylabel="validation accuracy (%)", title="search")
    left.grid(alpha=0.3)
    right.barh(range(len(allocation)), problem.capacities, color="0.88", label="capacity")
    right.barh(range(len(allocation)), allocation, color="C0", label="regrown")
    _name_layers(right, [f"{name} ({drift:.2f})" for name, drift in zip(problem.layers, problem.drift)])
    right.set(xlabel="weights", xscale="symlog", xlim=(0, 2 * max(1, *problem.capacities)),
              title="best allocation, layers by SSIM (in brackets), lowest first")
    legend_below(figure)
    save_figure(figure, path)


def _name_layers(axes: Axes, names: Sequence[str]) -> None:
    """Names along the y axis, the first at the top."""
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()


def plot_mask_updates(updates: Rows, epochs: Rows, regrown: Mapping[str, tuple[float, float]], path: Path,
                      title: str) -> None:
    """Left: sparsity after every update of the mask, and validation accuracy, over epochs; right: by layer, the share
    of the weights that have come back at least once, that of the final survivors which have, and the layer's share of
    all survivors.

    updates: `utils.mask_mover.MaskMover.history`; epochs: `Trainer.history`; regrown: layer -> the first two shares,
    in [0, 1] (`MaskMover.shares_regrown`).
    """
    figure, (left, right) = panels((12, max(4.5, 0.24 * len(regrown) + 1.2)), title, columns=2)
    left.step([row["epoch"] for row in updates], [100 * row["sparsity"] for row in updates], where="post", color="C0",
              label="sparsity (left axis)")
    left.set(xlabel="epoch", ylabel="sparsity (% of prunable weights)")
    left.grid(alpha=0.3)
    accuracy = left.twinx()
    accuracy.plot([row["epoch"] for row in epochs], [row["val_acc"] for row in epochs], color="C1", marker=".",
                  linestyle="--", label="validation accuracy (right axis)")
    accuracy.set_ylabel("validation accuracy (%)")
    right.barh(range(len(regrown)), [100 * ever for ever, _ in regrown.values()], color="0.8",
               label="of the layer's weights, those that came back at least once")
    right.barh(range(len(regrown)), [100 * stayed for _, stayed in regrown.values()], color="C0", height=0.4,
               label="of the layer's survivors, those that had come back")
    sizes = np.array([updates[-1][name] for name in regrown])
    right.plot(100 * sizes / max(1, sizes.sum()), range(len(regrown)), "k|", markersize=8,
               label="of all survivors, those in the layer")
    _name_layers(right, list(regrown))
    right.set(xlabel="%", xlim=(0, None), title="by layer")
    legend_below(figure)
    save_figure(figure, path)


def plot_single_layer(layers: Rows, results: Rows, path: Path, title: str) -> None:
    """Four panels: SSIM against the final and the immediate gain with trend and p, gain by layer in SSIM order, and
    gain against capacity; discs are layers that took the whole budget, squares those capped by their capacity.

    layers: rows of `single_layer_regrowth_analysis.by_layer`, in SSIM order; results: its correlations, the rows in
    points (not per weight) are shown.
    """
    figure, grid = panels((13, 10), title, rows=2, columns=2)
    ssim, capacity, immediate, final = (np.array([float(row[key]) for row in layers])
                                        for key in ("ssim", "capacity", "immediate_gain", "final_gain"))
    capped, places = np.array([bool(row["capped"]) for row in layers]), np.arange(len(layers))
    by_final, by_immediate, by_layer, by_capacity = grid.flat
    for axes, x, gain in zip(grid.flat, (ssim, ssim, places, capacity), (final, immediate, final, final)):
        for chosen, color, mark, label in ((~capped, "C0", "o", "layer that took the whole budget"),
                                           (capped, "C1", "s", "layer capped by its capacity: took fewer weights")):
            axes.scatter(x[chosen], gain[chosen], color=color, marker=mark, label=label, zorder=3)
        axes.set(ylabel="gain after finetuning, over the control (points)")
        axes.grid(alpha=0.3)
        axes.axhline(0, color="0.5", linewidth=0.8)
    shown = {row["gain"]: row for row in results if row["unit"] == "points"}
    for axes, gain, result in ((by_final, final, shown["final_gain"]),
                               (by_immediate, immediate, shown["immediate_gain"])):
        axes.set(xlabel="SSIM of the layer (lower: more drift)", title="no correlation: too few layers, or all alike")
        if not np.isnan(result["pearson"]):
            axes.axline((ssim.mean(), gain.mean()), slope=np.polyfit(ssim, gain, 1)[0], color="C3", linestyle="--",
                        label="least-squares line")
            axes.set_title(f"Pearson r = {result['pearson']:+.2f} (p = {result['pearson_p']:.3f}), "
                           f"Spearman = {result['spearman']:+.2f} (p = {result['spearman_p']:.3f})", fontsize=10)
    by_immediate.set_ylabel("gain right after regrowth,\nbatch-norm statistics re-estimated (points)")
    by_layer.vlines(places, 0, final, color="0.7", zorder=1)
    by_layer.set_xticks(places, [row["layer"] for row in layers], rotation=90, fontsize=8)
    by_layer.set_title("layers by SSIM, lowest first", fontsize=10)
    by_capacity.set(xscale="log", xlabel="capacity of the layer (pruned weights)")
    legend_below(figure)
    save_figure(figure, path)


def plot_benchmark(rows: Rows, path: Path, title: str) -> None:
    """Left: a bar per method, its stages stacked (seconds); right: every stage by itself on a log axis, median with
    fastest and slowest where there are several runs.

    rows: method, stage, median_s, fastest_s, slowest_s, repeats; the same stages in the same order for every method.
    """
    methods, stages = (list(dict.fromkeys(row[key] for row in rows)) for key in ("method", "stage"))
    repeats = max(row["repeats"] for row in rows)
    spread = f"medians of {repeats} runs, bars from the fastest to the slowest" if repeats > 1 else "one run"
    figure, (left, right) = panels((12, 4.5), f"{title}\n{spread}", columns=2)
    for number, method in enumerate(methods):
        values, fastest, slowest = np.array([[row[key] for row in rows if row["method"] == method]
                                             for key in ("median_s", "fastest_s", "slowest_s")])
        for color, (stage, start, seconds) in enumerate(zip(stages, values.cumsum() - values, values)):
            left.barh(method, seconds, left=start, color=f"C{color}", label=stage, edgecolor="w",
                      hatch=("", "//", "..", "xx", "--", "\\\\")[color % 6])  # told apart in grey, too
        places = np.arange(len(stages)) + 0.3 * (number - (len(methods) - 1) / 2)
        drawn = np.where(values < 1e-4, np.nan, values)  # a stage that takes less has nothing to do
        ends = [values - fastest, slowest - values] if repeats > 1 else None
        right.errorbar(places, drawn, ends, fmt="osD^v"[number % 5], capsize=3, color="k", label=f"{method} (right)")
    left.invert_yaxis()
    left.set(title="end to end", xlabel="seconds of one episode")
    right.set_xticks(range(len(stages)), stages, rotation=20, fontsize=8)
    right.set(yscale="log", ylabel="seconds", title="each stage")
    right.grid(alpha=0.3, axis="y")
    legend_below(figure)
    save_figure(figure, path)


def plot_differences(results: Rows, path: Path, title: str, against: str = "one-shot pruning") -> None:
    """A line per arm: mean paired difference with its t interval; from `ENOUGH_PAIRS` on, also the bootstrap interval
    (thick). results: rows of `utils.statistics.compare_arms`.
    """
    figure, axes = panels((8.5, 0.42 * len(results) + 1.2))
    axes.axvline(0, color="0.3", linewidth=0.8)
    lines = {"mean": {"marker": "o", "linestyle": "none"},
             "95 % t interval (not adjusted)": {"linewidth": 1, "marker": "|"},
             "95 % bootstrap interval": {"linewidth": 5, "alpha": 0.5, "solid_capstyle": "butt"}}
    colors = {"better": "C2", "worse": "C3"}
    for label, style in list(lines.items())[:3 if any(row["pairs"] >= ENOUGH_PAIRS for row in results) else 2]:
        axes.plot([], [], color="k", label=label, **style)
    for position, row in enumerate(results):
        ends = [row["mean"], (row["t_low"], row["t_high"]), (row["bootstrap_low"], row["bootstrap_high"])]
        for values, style in zip(ends if row["pairs"] >= ENOUGH_PAIRS else ends[:2], lines.values()):
            axes.plot(values, np.full_like(values, position), color=colors.get(row["verdict"], "0.4"), **style)
    _name_layers(axes, [f"{row['arm']}: {row['verdict']}\n({row['mean']:+.2f}, seeds: {row['pairs']})"
                        for row in results])
    axes.margins(x=0.1)
    axes.set(xlabel=f"test accuracy over {against} (points)", title=title, ylim=(len(results) - 0.5, -0.5))
    axes.grid(alpha=0.3, axis="x")
    known = any(np.isfinite(row["t_low"]) for row in results)
    legend_below(figure, "verdicts by p adjusted for all arms and sparsities (Holm)" if known else
                 "one seed: no interval, so no verdict is possible")
    save_figure(figure, path)


def plot_tables(results: Rows, path: Path, title: str) -> None:
    """Test accuracy against sparsity for each setting of `experiments.vgg16_tables`: ours filled, published hollow; the
    settings differ in their marks.

    results: rows of its `beside_published`; bars are standard deviations, where there are several seeds.
    """
    figure, axes = panels((8, 4.5))
    sparsity_axis(axes, [row["sparsity"] for row in results])
    settings = {"A": ("o", "iterative, 40 % each"), "B": ("s", "one-shot"), "R": ("^", "regrown from 99 %")}
    columns = (("ours", "mean", "std", {"linestyle": "-"}),
               ("published", "published", "published_std", {"linestyle": "--", "mfc": "none"}))
    for (number, (setting, (mark, name))), (whose, mean, std, style) in product(enumerate(settings.items()), columns):
        rows = [row for row in results if row["row"].startswith(setting) and row[mean] != ""]
        if rows:
            axes.errorbar([1 - row["sparsity"] for row in rows], [row[mean] for row in rows],
                          [row[std] or np.nan for row in rows], color=f"C{number}", marker=mark, capsize=3,
                          alpha=0.8, label=f"{name} ({whose})", **style)
    axes.set(ylabel="test accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    spread = any(row["std"] or row["published_std"] for row in results)
    legend_below(figure, "bars: standard deviation over seeds" if spread else None)
    save_figure(figure, path)


# --- saliency by class: rows by layer and class of `utils.saliency_analysis` -----------------------------------------


def _by_layer_and_class(rows: Rows, *keys: str) -> tuple[list[str], list[str], list[np.ndarray]]:
    """Layers and classes, each in the order of the rows, and a table (layers, classes) of each column."""
    layers, classes = (list(dict.fromkeys(printable(row[key]) for row in rows)) for key in ("layer", "class"))
    tables = [np.array([row[key] for row in rows], dtype=float).reshape(len(layers), len(classes)) for key in keys]
    return layers, classes, tables


def _log_axis(axes: Axes) -> None:
    """A log y axis over what is drawn, of at most eight decades."""
    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom=max(bottom, 1e-8 * top))


def plot_distributions(rows: Rows, path: Path, title: str, label: str) -> None:
    """A panel per layer, a column per class: median, 25-75 % and 5-95 % of the weights' saliency, on log axes."""
    layers, classes, (weights, *quantiles) = _by_layer_and_class(rows, "weights", "q05", "q25", "median", "q75", "q95")
    columns = min(len(layers), 5 if len(layers) <= 30 else 8)
    lines, places = math.ceil(len(layers) / columns), range(len(classes))
    legend = ("layers (active weights); dot: median, thick: 25–75 %, thin: 5–95 % of the weights\n"
              "an axis for each row of panels; lines that reach the bottom go on to zero")
    figure, grid = panels((columns * (0.21 * len(classes) + 0.4), 2.2 * lines + 1.2), f"{title}: {label}\n{legend}",
                          lines, columns, sharex=True, sharey="row", squeeze=False)
    for number, (axes, name, *(low, lower, median, upper, high)) in enumerate(zip(grid.flat, layers, *quantiles)):
        axes.vlines(places, low, high, color="0.55")
        axes.vlines(places, lower, upper, color="C0", linewidth=4)
        axes.plot(places, median, linestyle="none", marker="o", markersize=2.5, color="k")
        axes.set_title(f"{name} ({int(weights[number, 0]):,})", fontsize=7)
        axes.grid(axis="y", alpha=0.3)
        axes.set_xticks(places, classes, rotation=90)
        axes.tick_params(labelsize=7)
        axes.tick_params("x", labelbottom=number + columns >= len(layers))
    for axes in grid[:, 0]:
        _log_axis(axes)
        axes.minorticks_off()
    for axes in grid.flat[len(layers):]:
        axes.set_visible(False)
    save_figure(figure, path)


def plot_layer_means(rows: Rows, path: Path, title: str, label: str) -> None:
    """Mean saliency of a layer's active weights, a line per class and one for their mean, on a log axis."""
    layers, classes, (means,) = _by_layer_and_class(rows, "mean")
    figure, axes = panels((max(8, 0.24 * len(layers) + 3), 5))
    for number, name in enumerate(classes):
        axes.plot(means[:, number], f"C{number % 10}.", linestyle=("-", "--", ":", "-.")[number // 10 % 4], linewidth=1,
                  markersize=4, label=name)
    axes.plot(means.mean(axis=1), color="k", linewidth=2, label="mean of classes")
    _log_axis(axes)
    axes.set(ylabel=f"mean over a layer's weights: {label}", title=title)
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    save_figure(figure, path)


def plot_heat_map(rows: Rows, path: Path, title: str) -> None:
    """Layers by classes: mean saliency for the class over the layer's mean for all classes."""
    layers, classes, (means,) = _by_layer_and_class(rows, "mean")
    scale = means.mean(axis=1, keepdims=True)
    relative = np.divide(means, scale, out=np.full_like(means, np.nan), where=scale > 0)
    figure, axes = panels((max(6, 0.5 * len(classes) + 3.5), max(3.5, 0.2 * len(layers) + 2)))
    image = axes.imshow(relative, aspect="auto", cmap="cividis", vmin=0, vmax=2)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.set_title(title, fontsize=10)
    for (line, column), value in np.ndenumerate(relative if relative.size <= CELLS_WITH_NUMBERS else np.empty(0)):
        text = f"{value:.1f}" if value >= 0.95 else f"{value + 0.0:.2g}"  # small values told apart; no minus at zero
        axes.text(column, line, text, ha="center", va="center", fontsize=6,
                  color="w" if value < 1 else "k")  # white on the dark half of the scale
    figure.colorbar(image, label="class mean / layer mean (1: the average class)",
                    extend="max" if (relative > 2).any() else "neither")
    save_figure(figure, path)
