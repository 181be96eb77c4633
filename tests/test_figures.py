"""What the figures show: ticks at the data, legends that name what is drawn and cover nothing, values told apart."""
from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest

from experiments.vgg16_tables import ENTRIES, beside_published, chosen_entries
from tests.conftest import REPOSITORY
from utils import plots
from utils.allocation import AllocationProblem
from utils.benchmark import stage_rows
from utils.statistics import paired_difference


@pytest.fixture
def drawn(monkeypatch):
    """Every figure that would be written."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def overlapping(boxes) -> bool:
    return any(one.overlaps(other) for one, other in combinations(boxes, 2))


def visible_ticks(axes) -> list:
    right, left = sorted(axes.get_xlim())
    return [label for label in axes.get_xticklabels() if right <= label.get_position()[0] <= left]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# --- sparsities ----------------------------------------------------------------------------------------------------


def table(*words: str) -> list[dict]:
    rows = [{"row": entry, "test_acc": 90 - ENTRIES[entry][1]} for entry in chosen_entries(words)]
    return beside_published(rows, "vgg16")


@pytest.mark.parametrize("words", [("A:0.64",), ("B:0.95", "R:0.98"), ("A", "B", "R")])
def test_every_row_of_the_tables_lies_inside_an_axis_whose_labels_stay_apart(drawn, tmp_path, words):
    rows = table(*words)
    plots.plot_tables(rows, tmp_path / "t.png", "title")
    axes = drawn[0].axes[0]
    drawn[0].draw_without_rendering()
    left, right = axes.get_xlim()
    assert all(right < 1 - row["sparsity"] < left for row in rows)
    settings = {row["row"][0] for row in rows}
    assert len({bars.lines[0].get_marker() for bars in axes.containers}) == len(settings)
    shown = visible_ticks(axes)
    assert shown and not overlapping([label.get_window_extent() for label in shown])


# --- pruning and regrowth ------------------------------------------------------------------------------------------


def test_a_dense_model_alone_has_no_sparsity_axis(drawn, tmp_path, recwarn):
    row = {"pruner": "none", "schedule": "", "sparsity": 0.0, "val_acc": 50.0, "test_acc": "", "seed": 0}
    plots.plot_bidirectional([row], [], tmp_path / "d.png", "title")
    assert len(drawn[0].axes[0].get_xticks()) == 0 and legend(drawn[0]) == ["dense, 50.00 %"] and not recwarn.list


def test_regrown_models_of_equal_accuracy_stay_visible_and_nothing_is_covered(drawn, tmp_path):
    card = {"schedule": "one-shot", "seed": 0, "val_acc": 50.0, "test_acc": 55.0}
    pruning = [{**card, "pruner": "none", "schedule": "", "sparsity": 0.0, "test_acc": 90.0}]
    pruning += [{**card, "pruner": "magnitude", "sparsity": sparsity} for sparsity in (0.97, 0.99)]
    regrown = [{"method": method, "allocation": rule, "sparsity_before": 0.99, "sparsity": 0.97, "start_test_acc": 50.0,
                "test_acc": 55.0, "val_acc": 1.0, "val_acc_before": 1.0}
               for method in ("reference", "saliency") for rule in ("uniform", "greedy", "random")]
    plots.plot_bidirectional(pruning, regrown, tmp_path / "b.png", "title")
    figure = drawn[0]
    figure.draw_without_rendering()
    axes = figure.axes[0]
    marks = [container[0] for container in axes.containers[1:]]  # the first is the pruning curve
    assert [tuple(mark.get_xydata()[0]) for mark in marks] == [(1 - 0.97, 55.0)] * 6  # each at its sparsity
    sizes = [mark.get_markersize() for mark in sorted(marks, key=lambda mark: mark.get_zorder())]
    assert all(behind - front > 1.5 for behind, front in zip(sizes, sizes[1:]))  # points: each has a visible rim
    assert not figure.legends[0].get_window_extent().overlaps(axes.get_tightbbox())
    assert len(legend(figure)) == 8 and axes.get_ylabel() == "test accuracy (%)"


# --- the search ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_the_baseline_is_named_only_where_it_is_drawn(drawn, tmp_path, updates):
    problem = AllocationProblem(layers=("a", "b"), capacities=(5, 5), budget=4, sizes=(6, 6), fan=(1, 1),
                                drift=(0.1, 0.2))
    history = [{"episode": number + 1, "source": "rl", "reward": 0.5, "best": 0.5, "fidelity": 1,
                "baseline": 0.4 if number >= 4 - updates else None} for number in range(4)]
    history.append({"episode": 5, "source": "promotion", "reward": 0.6, "best": 0.6, "fidelity": 3, "baseline": 0.4})
    plots.plot_search(history, problem, [2, 2], tmp_path / "s.png")
    named = [label for label in legend(drawn[0]) if "baseline" in label]
    assert len(named) == (updates > 0)


# --- single layers -------------------------------------------------------------------------------------------------


def test_the_marks_of_single_layers_are_explained_and_a_gain_of_zero_has_one(drawn, tmp_path):
    layers = [{"layer": f"layer{number}", "ssim": number / 5, "capacity": 100 * (number + 1), "capped": number % 2,
               "immediate_gain": -float(number), "final_gain": 0.0 if number == 1 else 1.0} for number in range(5)]
    results = [{"gain": gain, "unit": "points", "pearson": 0.1, "pearson_p": 0.5, "spearman": 0.1, "spearman_p": 0.5}
               for gain in ("immediate_gain", "final_gain")]
    plots.plot_single_layer(layers, results, tmp_path / "s.png", "title")
    assert any("capped" in label for label in legend(drawn[0])) and any("whole" in label for label in legend(drawn[0]))
    assert not any("orange" in axes.get_title() for axes in drawn[0].axes)
    for axes in drawn[0].axes:  # the same marks in every panel
        whole, capped, *_ = axes.collections
        assert (len(whole.get_offsets()), len(capped.get_offsets())) == (3, 2)
        assert whole.get_facecolors().tolist() != capped.get_facecolors().tolist()
        assert len(whole.get_paths()[0].vertices) != len(capped.get_paths()[0].vertices)  # other marks, to print in grey
    assert [list(offset) for offset in drawn[0].axes[2].collections[1].get_offsets()][0] == [1.0, 0.0]


# --- saliency ------------------------------------------------------------------------------------------------------


def test_small_numbers_of_the_heat_map_are_told_apart(drawn, tmp_path):
    means = {"a": 1.0, "b": 0.005, "c": 0.009, "d": 0.00002, "e": 0.0, "f": -0.0}
    rows = [{"layer": layer, "class": name, "mean": mean} for layer in ("one", "two") for name, mean in means.items()]
    plots.plot_heat_map(rows, tmp_path / "h.png", "title")
    shown = [text.get_text() for text in drawn[0].axes[0].texts][:6]
    assert len(set(shown)) == 5 and shown[0] == "5.9" and shown[1] == "0.03" and shown[4:] == ["0", "0"]


# --- benchmark -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [1, 3])
def test_a_benchmark_of_one_run_speaks_of_no_spread(drawn, tmp_path, runs):
    seconds = {method: [{"loading": 0.1 + number, "drift": 1.0 + number} for number in range(runs)]
               for method in ("reference", "saliency")}
    rows = [row for row in stage_rows(seconds) if row["stage"] != "end to end"]
    plots.plot_benchmark(rows, tmp_path / "b.png", "title")
    words = drawn[0].get_suptitle()
    assert ("fastest" in words, "median" in words, "one run" in words) == (runs > 1, runs > 1, runs == 1)


# --- matched compute -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [1, 3])
def test_verdicts_of_seven_arms_are_all_legible(drawn, tmp_path, pairs):
    random = np.random.RandomState(0)
    results = [{"arm": f"proportional+arm_{number}",
                **paired_difference(70 + 9 * random.randn(pairs), 70 + random.randn(pairs))} for number in range(7)]
    plots.plot_differences(results, tmp_path / "d.png", "title")
    figure = drawn[0]
    figure.draw_without_rendering()
    axes = figure.axes[0]
    ticks = axes.get_yticklabels()
    assert all(row["arm"] in tick.get_text() and row["verdict"] in tick.get_text()
               for row, tick in zip(results, ticks))
    assert not overlapping([tick.get_window_extent() for tick in ticks])
    low, high = axes.get_xlim()
    shown = [row[key] for row in results for key in ("mean", "t_low", "t_high") if np.isfinite(row[key])]
    assert np.isfinite([low, high]).all() and low < min(shown) and max(shown) < high
    assert ("no interval" in figure.legends[0].get_title().get_text()) == (pairs == 1)
    for box in (axes.get_tightbbox(), figure.legends[0].get_window_extent()):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


# --- what the environment and odd data do --------------------------------------------------------------------------


def card_row(sparsity: float, **more: object) -> dict:
    return {"pruner": "magnitude", "schedule": "one-shot", "sparsity": sparsity, "val_acc": 50.0, "test_acc": 49.0,
            "seed": 0, **more}


@pytest.mark.parametrize("sparsities, named", [
    ([0.99], ["99"]), ([0.97, 0.99], ["97", "98", "99"]),
    ([0.99, 0.9999, 0.99996, 1.0], ["99", "99.5", "99.7", "99.8", "99.9", "99.95", "99.97", "99.98", "99.99", "99.995",
                                    "99.997"]),
    ([0.5, 0.9999], ["50", "80", "90", "95", "98", "99", "99.5", "99.8", "99.9", "99.95", "99.98", "99.99"])])
def test_ticks_are_round_sparsities_that_stay_apart(drawn, tmp_path, sparsities, named):
    plots.plot_bidirectional([card_row(sparsity) for sparsity in sparsities], [], tmp_path / "p.png", "title")
    drawn[0].draw_without_rendering()
    shown = sorted(visible_ticks(drawn[0].axes[0]), key=lambda label: -label.get_position()[0])
    assert [label.get_text() for label in shown] == named
    assert not overlapping([label.get_window_extent() for label in shown])


NASTY = "a$b_{c ^2$ \udce9"


def test_names_with_signs_of_formulas_are_written_as_they_are(tmp_path, recwarn):
    plots.plot_bidirectional([card_row(0.9, run=NASTY), card_row(0.99, run=NASTY)], [], tmp_path / "p.png", NASTY)
    quantiles = dict.fromkeys(("q05", "q25", "median", "q75", "q95", "mean"), 0.5)
    rows = [{"layer": f"{NASTY}.{layer}", "class": name, "weights": 4, **quantiles}
            for layer in range(7) for name in (NASTY, "$x_$")]
    for draw in (plots.plot_distributions, plots.plot_layer_means):
        draw(rows, tmp_path / f"{draw.__name__}.png", NASTY, "saliency")
    plots.plot_heat_map(rows, tmp_path / "h.png", NASTY)
    assert len(list(tmp_path.glob("*.png"))) == 4 and not recwarn.list


def test_powers_of_ten_stay_formulas(tmp_path, monkeypatch):
    figure = plots.new_figure()
    axes = figure.subplots()
    axes.set(yscale="log", ylim=(1e-3, 1e3), title="$1")
    plots.save_figure(figure, tmp_path / "f.png")
    labels = [text for text in axes.get_yticklabels() if text.get_text()]
    assert labels and all(text.get_parse_math() for text in labels) and not axes.title.get_parse_math()


def test_a_notebooks_backend_is_not_needed(tmp_path):
    code = ("import sys; from pathlib import Path; from utils import plots; assert 'matplotlib' not in sys.modules; "
            "plots.save_figure(plots.new_figure(), Path(sys.argv[1]))")
    subprocess.run([sys.executable, "-c", code, tmp_path / "f.png"], cwd=REPOSITORY, check=True,
                   env={**os.environ, "MPLBACKEND": "module://no_such_package.backend", "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "f.png").stat().st_size > 100


def test_a_figure_without_data_has_no_legend(drawn, tmp_path):
    plots.plot_bidirectional([], [], tmp_path / "e.png", "title")
    assert not drawn[0].legends


def test_few_pairs_have_no_bootstrap_interval(drawn, tmp_path):
    """Of three pairs it goes from the smallest to the largest difference, which is no interval of 95 %."""
    for pairs in (3, 8):
        values = [float(value % 3) for value in range(pairs)]
        row = {"arm": "gradual", **paired_difference(values, [0.0] * pairs)}
        plots.plot_differences([row], tmp_path / "d.png", "title")
    assert [any("bootstrap" in text for text in legend(figure)) for figure in drawn] == [False, True]
    assert [len(figure.axes[0].lines) for figure in drawn] == [1 + 2 + 2, 1 + 3 + 3]
