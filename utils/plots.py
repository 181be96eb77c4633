"""Every figure of the project but those of saliency by class; each function takes plain rows and writes one PNG."""
from __future__ import annotations

import io
import os
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.allocation import AllocationProblem
from utils.checkpoint import rounded_sparsity, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D

SHORTEST = 1e-4  # seconds; a stage that takes less has nothing to do and is not drawn
TICK_GAP = 0.065  # of the width of an axis: labels closer than this would run into each other
MARK_SIZES = 16, 6  # points, of regrown models of one sparsity: from the largest, behind, to the smallest, in front
COLUMNS = {"test": ("start_test_acc", "test_acc"), "validation": ("val_acc_before", "val_acc")}  # before, after
SHAPES = "*PXph8"  # of regrown models, by method
ARROWS = "arrows: from the pruned to the regrown model; the higher of one sparsity has the smaller mark"


def new_figure(**options: Any) -> Figure:
    """An empty matplotlib figure, which no window and no notebook shows; options: of `matplotlib.figure.Figure`.

    matplotlib is imported here, when it is first needed, since that takes a while; and without MPLBACKEND, which may
    name a backend that only a notebook has.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
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


def legend_below(figure: Figure, axes: Axes, title: str | None = None) -> None:
    """A legend under the axes, where it covers nothing; the figure (constrained layout) grows by its height."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    labels = [textwrap.fill(label, 100) for label in labels]
    columns = 2 if len(labels) > 3 and max(map(len, labels)) <= 52 else 1
    lines = sum(label.count("\n") + 1 for label in labels) / columns + (2 + title.count("\n") if title else 1)
    figure.set_figheight(figure.get_figheight() + 0.18 * lines)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, title=title,
                  title_fontsize=8)


def _key(**style: Any) -> Line2D:
    """An entry of a legend that stands for nothing drawn."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def sparsity_axis(axes: Axes, sparsities: Iterable[float]) -> None:
    """An x axis over density on a log scale, sparser to the right, with a tick at each of the sparsities, in %.

    A label that would run into its neighbour goes one or two lines down; where all are full, the tick has none.
    """
    found = sorted({rounded for sparsity in sparsities if (rounded := rounded_sparsity(sparsity)) < 1})
    if not found:
        axes.set_xticks([])
        return
    axes.set_xscale("log")
    left, right = (1 - found[0]) * 1.25, (1 - found[-1]) / 1.25
    axes.set_xlim(left, right)
    labels, ends = [], [-np.inf] * 3  # ends: place of the last label of each line
    for sparsity in found:
        place = np.log(left / (1 - sparsity)) / np.log(left / right)
        line = next((line for line, last in enumerate(ends) if place - last >= TICK_GAP), None)
        labels.append("" if line is None else "\n" * line + f"{100 * sparsity:.10g}")
        if line is not None:
            ends[line] = place
    axes.set_xticks([1 - sparsity for sparsity in found], labels)
    axes.minorticks_off()
    axes.set_xlabel("sparsity (% of prunable weights removed)")


def lacks_test(row: Mapping[str, Any]) -> bool:
    """Whether a row has no test accuracy, or is of a regrown model whose start has none."""
    return row["test_acc"] == "" or row.get("start_test_acc") == ""


def plot_bidirectional(pruning: Sequence[Mapping[str, Any]], regrown: Sequence[Mapping[str, Any]], path: Path,
                       title: str) -> None:
    """The pruning curves, and for each regrown model an arrow from where it started to where it ended.

    pruning: rows of `utils.stage1.summary_rows`; regrown: rows of ``regrowth_results.csv``. Rows that agree in all
    but the seed are drawn as their mean with bars from the lowest to the highest; a column ``run``, where there is one,
    keeps runs apart. Test accuracy (%) is drawn where every model has it, else validation accuracy.
    """
    figure = new_figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    kind = "validation" if any(lacks_test(row) for row in (*pruning, *regrown)) else "test"  # never both in one figure
    sparsities = [float(row["sparsity"]) for row in pruning if row["pruner"] != "none"]
    sparsities += [float(row[key]) for row in regrown for key in ("sparsity", "sparsity_before")]
    sparsity_axis(axes, sparsities)
    lines = _draw_pruning(axes, pruning, COLUMNS[kind][1])
    if regrown:
        _draw_regrown(axes, regrown, COLUMNS[kind], lines)
    axes.set(ylabel=f"{kind} accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    notes = [ARROWS] if regrown else []
    if any("mean of" in label for label in axes.get_legend_handles_labels()[1]):
        notes.append("bars and bands: from the lowest to the highest seed")
    legend_below(figure, axes, "\n".join(notes) or None)
    save_figure(figure, path)


def _grouped(rows: Iterable[Mapping[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Rows by the values of these columns, sparsities rounded as in file names; an absent column counts as empty."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(rounded_sparsity(float(row[name])) if "sparsity" in name else row.get(name, "") for name in keys)
        groups.setdefault(key, []).append(row)
    return groups


def _spread(rows: Iterable[Mapping[str, Any]], column: str) -> tuple[float, float, float]:
    """Mean, and how far the lowest and the highest value lie from it."""
    values = [float(row[column]) for row in rows]
    mean = sum(values) / len(values)
    return mean, mean - min(values), max(values) - mean


def _seeds(groups: Iterable[Sequence[Any]]) -> str:
    """What a label says about seeds: nothing where each group has one."""
    counts = sorted({len(rows) for rows in groups})
    if counts[-1] == 1:
        return ""
    return f"mean of {f'{counts[0]} to ' if len(counts) > 1 else ''}{counts[-1]} seeds"


def _label(name: str, run: str, *more: str) -> str:
    return ", ".join([f"{name} [{run}]" if run else name, *(words for words in more if words)])


def _draw_pruning(axes: Axes, rows: Sequence[Mapping[str, Any]], column: str) -> int:
    """Draws the column; returns how many colours are taken."""
    dense = _grouped((row for row in rows if row["pruner"] == "none"), "run")
    for number, ((run,), group) in enumerate(dense.items()):
        mean, below, above = _spread(group, column)
        style = {"color": str(0.25 + 0.15 * (number // 4 % 4)), "linestyle": ("--", ":", "-.", (0, (8, 3)))[number % 4]}
        axes.axhline(mean, **style, label=_label("dense", run, f"{mean:.2f} %", _seeds([group])))
        if len(group) > 1:
            axes.axhspan(mean - below, mean + above, color=style["color"], alpha=0.15, linewidth=0)
    lines = _grouped((row for row in rows if row["pruner"] != "none"), "pruner", "schedule", "run")
    for number, ((pruner, schedule, run), line) in enumerate(sorted(lines.items())):
        points = dict(sorted(_grouped(line, "sparsity").items())).values()
        means, *ends = zip(*(_spread(point, column) for point in points))
        seeds = _seeds(points)
        axes.errorbar([1 - float(point[0]["sparsity"]) for point in points], means, ends if seeds else None,
                      marker="osD^v"[number % 5], capsize=3, color=f"C{number}",
                      label=_label(f"{pruner}, {schedule}", run, seeds))
    return len(lines)


def _draw_regrown(axes: Axes, rows: Sequence[Mapping[str, Any]], columns: tuple[str, str], first_color: int) -> None:
    """An arrow and a mark for each group of regrown models, on a sparsity axis that is set up already."""
    groups = _grouped(rows, "method", "allocation", "run", "sparsity_before", "sparsity")
    ordered = sorted(groups.items(), key=lambda item: _spread(item[1], columns[1])[0])  # so that arrows rarely cross
    methods = sorted({key[0] for key in groups})
    drawn: dict[float, int] = {}  # marks at each sparsity so far
    for number, ((method, _, run, before, after), group) in enumerate(ordered):
        place, number_here = drawn.setdefault(after, 0), sum(key[-1] == after for key in groups)
        drawn[after] += 1
        color, share = f"C{(first_color + number) % 10}", place / max(1, number_here - 1)  # from 0 to 1
        start, (end, *ends) = _spread(group, columns[0])[0], _spread(group, columns[1])
        bend = 0.3 * (share - 0.5) if number_here > 1 else 0.0  # arrows between the same ends stay apart
        axes.annotate("", (1 - after, end), (1 - before, start), zorder=2.5,
                      arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.4, "shrinkA": 3, "shrinkB": 6,
                                  "connectionstyle": f"arc3,rad={bend}"})
        seeds = _seeds([group])
        axes.errorbar(1 - after, end, np.reshape(ends, (2, 1)) if seeds else None, zorder=4 + share, capsize=4,
                      color=color, marker=SHAPES[methods.index(method) % len(SHAPES)], markeredgecolor="k",
                      markersize=np.interp(share, (0, 1), MARK_SIZES), markeredgewidth=0.6, linestyle="none",
                      label=_label(f"regrown: {method}, {_allocation_names(group)}", run, f"{end:.2f} %", seeds))


def _allocation_names(rows: Sequence[Mapping[str, Any]]) -> str:
    """As `allocation_name`, for rows that agree in the allocation: every finder once."""
    found_by = " / ".join(sorted({str(row.get("found_by") or "") for row in rows} - {""}))
    return allocation_name({**rows[0], "found_by": found_by})


def allocation_name(row: Mapping[str, Any]) -> str:
    """How weights were allotted: a rule, or the search with who found what it chose (the controller, or a rule)."""
    found_by = row.get("found_by", "")
    return f"rl, best: {found_by}" if row["allocation"] == "rl" and found_by else str(row["allocation"])


def plot_search(history: Sequence[Mapping[str, Any]], problem: AllocationProblem, allocation: Sequence[int],
                path: Path) -> None:
    """Left: reward of every episode, the best so far and the controller's baseline; right: the best allocation.

    history: rows of `utils.controller.RegrowthPolicyGradient`; allocation: weights per layer of `problem`.
    """
    figure = new_figure(figsize=(12, max(4.5, 0.24 * len(allocation) + 1.2)), layout="constrained")
    halves = figure.subfigures(1, 2)
    left, right = (half.subplots() for half in halves)
    for number, fidelity in enumerate(sorted({row["fidelity"] for row in history})):
        rows = [row for row in history if row["fidelity"] == fidelity]
        episodes = [row["episode"] for row in rows]
        label = f"{fidelity} epoch{'s' if fidelity > 1 else ''}"
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
    _draw_allocation(right, problem, allocation)
    for half in halves:
        _legend_of_half(half)
    save_figure(figure, path)


def _legend_of_half(half: SubFigure) -> None:
    """A legend under one of two panels that stand side by side."""
    half.legend(*half.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


def _draw_allocation(axes: Axes, problem: AllocationProblem, allocation: Sequence[int]) -> None:
    positions = np.arange(len(allocation))
    axes.barh(positions, problem.capacities, color="0.88", label="capacity")
    axes.barh(positions, allocation, color="C0", label="regrown")
    axes.set_yticks(positions, [f"{name} ({drift:.2f})" for name, drift in zip(problem.layers, problem.drift)],
                    fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="weights", xscale="symlog", xlim=(0, 2 * max(1, *problem.capacities)),
             title="best allocation, layers by SSIM (in brackets), lowest first")


def plot_mask_updates(updates: Sequence[Mapping[str, Any]], epochs: Sequence[Mapping[str, Any]],
                      regrown: Mapping[str, float], path: Path, title: str) -> None:
    """Left: sparsity after every update of the mask, and validation accuracy, over epochs; right: by layer, the share
    of the weights that have come back at least once, and the density in the end.

    updates: `utils.mask_schedule.MaskMover.history`; epochs: `Trainer.history`; regrown: layer -> share in [0, 1].
    """
    figure = new_figure(figsize=(12, max(4.5, 0.24 * len(regrown) + 1.2)), layout="constrained")
    figure.suptitle(title)
    halves = figure.subfigures(1, 2)
    left, right = (half.subplots() for half in halves)
    left.step([row["epoch"] for row in updates], [100 * row["sparsity"] for row in updates], where="post", color="C0",
              label="sparsity (left axis)")
    left.set(xlabel="epoch", ylabel="sparsity (% of prunable weights)")
    accuracy = left.twinx()
    accuracy.plot([row["epoch"] for row in epochs], [row["val_acc"] for row in epochs], color="C1", marker=".",
                  linestyle="--", label="validation accuracy (right axis)")
    accuracy.set_ylabel("validation accuracy (%)")
    left.grid(alpha=0.3)
    handles = [axes.get_legend_handles_labels() for axes in (left, accuracy)]
    halves[0].legend(handles[0][0] + handles[1][0], handles[0][1] + handles[1][1], loc="outside lower center", ncols=2,
                     fontsize=8)
    places, names = np.arange(len(regrown)), list(regrown)
    right.barh(places, [100 * regrown[name] for name in names], color="C0", label="came back at least once")
    sizes = {name: updates[-1][name] for name in names}
    right.plot([100 * sizes[name] / max(1, sum(sizes.values())) for name in names], places, "k|", markersize=8,
               label="of all survivors, those in this layer")
    right.set_yticks(places, [printable(name) for name in names], fontsize=7)
    right.invert_yaxis()
    right.set(xlabel="%", xlim=(0, None), title="by layer: % of its weights that came back; % of all survivors in it")
    _legend_of_half(halves[1])
    save_figure(figure, path)


def plot_single_layer(layers: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]], path: Path,
                      title: str) -> None:
    """Four panels: SSIM against the final and the immediate gain with trend and p, gain by layer in SSIM order, and
    gain against capacity; layers that took the whole budget in one colour, those capped by their capacity in another.

    layers: rows of `single_layer_regrowth_analysis.by_layer`, in SSIM order; results: its correlations, the rows in
    points (not per weight) are shown.
    """
    figure = new_figure(figsize=(13, 10.4), layout="constrained")
    figure.suptitle(title)
    (first, second), (third, fourth) = figure.subplots(2, 2)
    shown = {row["gain"]: row for row in results if row["unit"] == "points"}
    ssim, capacity, final = ([row[key] for row in layers] for key in ("ssim", "capacity", "final_gain"))
    colors = ["C1" if row["capped"] else "C0" for row in layers]
    for axes, gain, words in ((first, "final_gain", "after finetuning, over the control (points)"),
                              (second, "immediate_gain",
                               "right after regrowth,\nbatch-norm statistics re-estimated (points)")):
        values = [row[gain] for row in layers]
        axes.scatter(ssim, values, c=colors)
        _draw_trend(axes, ssim, values, shown[gain])
        axes.set(xlabel="SSIM of the layer (lower: more drift)", ylabel=f"gain {words}")
    positions = np.arange(len(layers))
    third.vlines(positions, 0, final, colors=colors, linewidth=5)
    third.scatter(positions, final, c=colors, s=50, zorder=3)  # shows the colour of a gain of zero too
    third.set_xticks(positions, [row["layer"] for row in layers], rotation=90, fontsize=8)
    third.set(ylabel="gain after finetuning, over the control (points)", title="layers by SSIM, lowest first")
    fourth.scatter(capacity, final, c=colors)
    fourth.set(xscale="log", xlabel="capacity of the layer (pruned weights)",
               ylabel="gain after finetuning, over the control (points)", title="gain against capacity")
    for axes in (first, second, third, fourth):
        axes.set_axisbelow(True)
        axes.grid(alpha=0.3)
        axes.axhline(0, color="0.5", linewidth=0.8, zorder=0.9)
    dot = {"marker": "o", "linestyle": "none"}
    figure.legend(handles=[_key(color="C0", label="layer that took the whole budget", **dot),
                           _key(color="C1", label="layer capped by its capacity: took fewer weights", **dot),
                           _key(color="C3", linestyle="--", label="least-squares line")],
                  loc="outside lower center", ncols=3)
    save_figure(figure, path)


def _draw_trend(axes: Axes, x: Sequence[float], y: Sequence[float], result: Mapping[str, Any]) -> None:
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
    fastest and slowest where there are several runs.

    rows: method, stage, median_s, fastest_s, slowest_s, repeats; the same stages in the same order for every method.
    """
    methods, stages = (list(dict.fromkeys(row[key] for row in rows)) for key in ("method", "stage"))
    table, repeats = {(row["method"], row["stage"]): row for row in rows}, max(row["repeats"] for row in rows)
    figure = new_figure(figsize=(12, 5), layout="constrained")
    figure.suptitle(title)
    halves = figure.subfigures(1, 2)
    left, right = (half.subplots() for half in halves)
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
        right.errorbar(places, values, [values - fastest, slowest - values] if repeats > 1 else None, fmt="o",
                       capsize=3, color=f"C{number}", label=method)
    left.invert_yaxis()
    left.set(title="end to end",
             xlabel=f"seconds of one episode ({f'medians of {repeats} runs' if repeats > 1 else 'one run'}, stacked)")
    right.set_xticks(range(len(stages)), stages, rotation=20, fontsize=8)
    right.set(yscale="log", ylabel="seconds", title="each stage: " + (
        f"median of {repeats} runs, bars: fastest to slowest" if repeats > 1 else "one run"))
    right.grid(alpha=0.3, axis="y")
    for half in halves:
        _legend_of_half(half)
    save_figure(figure, path)


def plot_differences(results: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """A line per arm: mean paired difference to the control with its t interval (thin) and bootstrap interval (thick).

    results: rows of `experiments.matched_compute.compare`; infinite intervals (a single seed) are left out.
    """
    figure = new_figure(figsize=(8.5, 0.42 * len(results) + 1.8), layout="constrained")
    axes = figure.subplots()
    colors = {"better": "C2", "worse": "C3", "indistinguishable": "0.4"}
    for position, row in enumerate(results):
        color = colors[row["verdict"]]
        if np.isfinite(row["t_low"]):
            axes.plot([row["t_low"], row["t_high"]], [position] * 2, color=color, linewidth=1, marker="|")
            axes.plot([row["bootstrap_low"], row["bootstrap_high"]], [position] * 2, color=color, linewidth=5,
                      alpha=0.5, solid_capstyle="butt")
        axes.plot(row["mean"], position, marker="o", color=color)
    axes.axvline(0, color="0.3", linewidth=0.8)
    seeds = [f"{row['pairs']} seed{'s' if row['pairs'] > 1 else ''}" for row in results]
    axes.set_yticks(range(len(results)), [f"{row['arm']}: {row['verdict']}\n({row['mean']:+.2f}, {number})"
                                          for row, number in zip(results, seeds)], fontsize=8)
    for tick, row in zip(axes.get_yticklabels(), results):
        tick.set_color(colors[row["verdict"]])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.margins(x=0.1)
    axes.set_xlabel("test accuracy over one-shot pruning (points)")
    axes.grid(alpha=0.3, axis="x")
    figure.suptitle(title, fontsize=11)
    handles = [_key(color="k", label="mean", marker="o", linestyle="none")]
    if any(np.isfinite(row["t_low"]) for row in results):
        handles += [_key(color="k", linewidth=1, marker="|", label="95 % t interval (decides the verdict)"),
                    _key(color="k", linewidth=5, alpha=0.5, label="95 % bootstrap interval")]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8,
                  title=None if len(handles) > 1 else "one seed: no interval, so no verdict is possible",
                  title_fontsize=8)
    save_figure(figure, path)


def plot_tables(results: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Test accuracy against sparsity for each setting of `experiments.vgg16_tables`: ours filled, published hollow.

    results: rows of its `beside_published`; bars are standard deviations, where there are several seeds.
    """
    figure = new_figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    sparsity_axis(axes, [row["sparsity"] for row in results])
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
    axes.set(ylabel="test accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    spread = any(row["std"] or row["published_std"] for row in results)
    legend_below(figure, axes, "bars: standard deviation over seeds" if spread else None)
    save_figure(figure, path)
