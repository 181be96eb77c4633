"""The figures of per-class saliency: distributions, layer means and a heat map; each takes the rows by layer and
class of `utils.saliency_analysis` and writes one PNG.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.plots import new_figure, printable, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[dict[str, Any]]
LOWEST = 1e-8  # of the largest value: where a log axis ends at the latest
CELLS_WITH_NUMBERS = 600  # a larger heat map is legible by its colours only


def _names(rows: Rows) -> tuple[list[str], list[str]]:
    """Layers and classes, each in the order of the rows."""
    return tuple(list(dict.fromkeys(printable(row[key]) for row in rows)) for key in ("layer", "class"))


def _table(rows: Rows, key: str) -> np.ndarray:
    """One figure of every row as float64 (layers, classes)."""
    return np.array([row[key] for row in rows], dtype=float).reshape([len(names) for names in _names(rows)])


def _saliency_axis(axes: Axes, *tables: np.ndarray) -> None:
    """A log y axis for the tables' numbers, none of which is negative."""
    values = np.concatenate([table.ravel() for table in tables])
    values = values[np.isfinite(values) & (values > 0)]
    largest = values.max(initial=0) or 1.0
    axes.set(yscale="log", ylim=(max(values.min(initial=largest), LOWEST * largest) / 1.5, 1.5 * largest))


def plot_distributions(rows: Rows, path: Path, title: str, label: str) -> None:
    """A panel per layer, a column per class: median, 25-75 % and 5-95 % of the weights' saliency.

    Log axes (see `_saliency_axis`), one for each row of panels.
    """
    layers, classes = _names(rows)
    quantiles = {key: _table(rows, key) for key in ("q05", "q25", "median", "q75", "q95")}
    weights = _table(rows, "weights")[:, 0]
    columns = min(len(layers), 5 if len(layers) <= 30 else 8)
    lines = math.ceil(len(layers) / columns)
    width, height = max(6.0, columns * (0.17 * len(classes) + 0.3) + 1.0), 1.7 * lines + 1.7
    figure = new_figure(figsize=(width, height))  # placed by hand: constrained layout takes seconds for many panels
    figure.subplots_adjust(0.8 / width, 0.9 / height, 1 - 0.1 / width, 1 - 0.95 / height, wspace=0.06, hspace=0.28)
    panels = figure.subplots(lines, columns, sharex=True, sharey="row", squeeze=False).ravel()
    panels[0].set_xticks(range(len(classes)), classes)
    for number, axes in enumerate(panels):
        if number % columns == 0:  # one axis for the panels of a row
            _saliency_axis(axes, *(table[number:number + columns] for table in quantiles.values()))
            axes.minorticks_off()
        if number >= len(layers):
            axes.set_visible(False)
            continue
        _draw_bands(axes, {key: table[number] for key, table in quantiles.items()})
        axes.set_title(f"{layers[number]} ({int(weights[number]):,})", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.tick_params("x", labelrotation=90, labelbottom=number + columns >= len(layers))
    figure.supylabel(label, fontsize=9, x=0.05 / width)
    figure.suptitle(f"{title}\nlayers (active weights); dot: median, thick: 25–75 %, thin: 5–95 % of the weights\n"
                    "an axis for each row of panels; lines that reach the bottom go on to zero",
                    fontsize=9, y=1 - 0.1 / height)
    save_figure(figure, path)


def _draw_bands(axes: Axes, quantiles: dict[str, np.ndarray]) -> None:
    places = np.arange(len(quantiles["median"]))
    for low, high, width, color in (("q05", "q95", 1.0, "0.55"), ("q25", "q75", 4.0, "C0")):
        ends = [np.maximum(quantiles[end], axes.get_ylim()[0]) for end in (low, high)]  # zero has no place on the axis
        axes.vlines(places, *ends, color=color, linewidth=width)
    axes.plot(places, quantiles["median"], linestyle="none", marker="o", markersize=2.5, color="k")
    axes.grid(axis="y", alpha=0.3)


def plot_layer_means(rows: Rows, path: Path, title: str, label: str) -> None:
    """Mean saliency of a layer's active weights, a line per class and one for their mean, on a log axis."""
    (layers, classes), means = _names(rows), _table(rows, "mean")
    figure = new_figure(figsize=(max(8, 0.24 * len(layers) + 3), 5), layout="constrained")
    axes = figure.subplots()
    _saliency_axis(axes, means)
    from matplotlib import colormaps

    colors = colormaps["tab10" if len(classes) <= 10 else "turbo"]
    for number, name in enumerate(classes):
        color = colors(number if len(classes) <= 10 else number / (len(classes) - 1))
        axes.plot(means[:, number], color=color, linewidth=1, marker=".", markersize=4, label=name)
    axes.plot(means.mean(axis=1), color="k", linewidth=2, label="mean of classes")
    axes.set_ylabel(f"mean over a layer's weights: {label}")
    axes.set_title(title, fontsize=10)
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    save_figure(figure, path)


def plot_heat_map(rows: Rows, path: Path, title: str) -> None:
    """Layers by classes: mean saliency for the class over the layer's mean for all classes."""
    (layers, classes), means = _names(rows), _table(rows, "mean")
    scale = means.mean(axis=1, keepdims=True)
    relative = np.divide(means, scale, out=np.full_like(means, np.nan), where=scale > 0)
    figure = new_figure(figsize=(max(6, 0.5 * len(classes) + 3.5), max(3.5, 0.2 * len(layers) + 2)),
                        layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.set_title(title, fontsize=10)
    if relative.size <= CELLS_WITH_NUMBERS:
        for (line, column), value in np.ndenumerate(relative):
            axes.text(column, line, _short(value), ha="center", va="center", fontsize=6,
                      color="w" if abs(value - 1) > 0.65 else "k")  # white on the dark ends of the scale
    figure.colorbar(image, label="class mean / layer mean (1: the average class)",
                    extend="max" if (relative > 2).any() else "neither")
    save_figure(figure, path)


def _short(value: float) -> str:
    """One decimal; two significant digits below 1, so that small values can be told apart."""
    if abs(value) >= 0.95:
        return f"{value:.1f}"
    return f"{value + 0.0:.2g}"  # without a minus at zero
