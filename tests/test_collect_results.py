"""Results of several roots in one table and one figure: seeds become one line, other runs stay apart."""
from __future__ import annotations

import csv
from pathlib import Path

import pytest

from experiments import collect_results
from utils import checkpoint
from utils.common import UserError


def add_model(root: Path, sparsity: float, seed: int, test: float | None, *, epochs: int = 5, pruner: str = "magnitude",
              data: tuple[str, str] = ("tiny", "abc"), val: float = 50.0) -> None:
    """A dense (sparsity 0) or pruned model with a run card as stage 1 leaves it; the artifact is no network."""
    dense = checkpoint.dense_path(root, "resnet20")
    path = checkpoint.pruned_path(root, "resnet20", sparsity) if sparsity else dense
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f"{sparsity} {seed} {test} {epochs} {pruner} {data}".encode())
    config = {"seed": seed, "dataset": data[0], "data_fingerprint": data[1], "precision": "fp32",
              "recipe": {"epochs": epochs}}
    if sparsity:
        config |= {"pruner": pruner, "schedule": "one-shot", "iteration": 1, "sparsity": sparsity}
        config |= {"parent": checkpoint.file_digest(dense)} if dense.exists() else {}
    card = {"sha256": checkpoint.file_digest(path), "config": config, "sparsity": sparsity, "val_acc": val,
            "surviving": round(1000 * (1 - sparsity)), "total": 1000, "best_epoch": 1, "epochs": epochs, "seconds": 1.0}
    checkpoint.save_json(card | ({} if test is None else {"test_acc": test}), checkpoint.card_path(path))


def add_regrown(folder: Path, seed: int, test: float, *, start_test: float | str = 30.0, **more: object) -> None:
    row = {"method": "saliency", "allocation": "rl", "found_by": "proportional", "sparsity_before": 0.99,
           "sparsity": 0.97, "val_acc_before": 30.0, "val_acc": test, "start_test_acc": start_test, "test_acc": test,
           "epochs": 4, "search_epochs": 2, "seed": seed, "dataset": "tiny",
           "checkpoint": "regrown_resnet20_0.97.pth"}
    checkpoint.save_csv([{**row, **more}], folder / "regrowth_results.csv")


def sweep(root: Path, seed: int, shift: float, **options: object) -> Path:
    for sparsity, test in ((0.0, 90.0), (0.9, 80.0), (0.99, 30.0)):
        add_model(root, sparsity, seed, test + shift, **options)
    return root


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of every figure that is written, instead of the figure."""
    figures = []
    monkeypatch.setattr(collect_results.plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def collect(tmp_path: Path, *roots: Path) -> None:
    collect_results.main(["--m_name", "resnet20", "--roots", *map(str, roots), "--save_dir", str(tmp_path / "out")])


def legend(figure) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]


def curves(figure) -> list[list[float]]:
    """The accuracies of every curve of pruned models."""
    return [list(container[0].get_ydata()) for container in figure.axes[0].containers
            if container[0].get_linestyle() != "None"]


def test_seeds_become_one_line_through_their_mean(tmp_path, drawn, capsys):
    roots = [sweep(tmp_path / f"seed_{seed}", seed, shift) for seed, shift in enumerate((0.0, 1.0, -4.0))]
    for seed, root in enumerate(roots):
        add_regrown(root / "any", seed, 60.0 + seed)
    collect(tmp_path, *roots)
    assert curves(drawn[0]) == [[79.0, 29.0]]
    bars = drawn[0].axes[0].containers[0][2][0].get_segments()
    assert [sorted(bar[:, 1]) for bar in bars] == [[76.0, 81.0], [26.0, 31.0]]
    assert legend(drawn[0]) == [
        "dense, 89.00 %, mean of 3 seeds",
        "magnitude, one-shot, mean of 3 seeds",
        "regrown: saliency, rl, best: proportional, 61.00 %, mean of 3 seeds"]
    assert "9 pruned or dense and 3 regrown models" in capsys.readouterr().out


def test_other_settings_stay_apart_and_are_told_by_their_root(tmp_path, drawn):
    roots = [sweep(tmp_path / "short", 0, 0.0), sweep(tmp_path / "long", 1, 2.0, epochs=50)]
    roots += [sweep(tmp_path / "other_long", 2, 4.0, epochs=50)]
    collect(tmp_path, *roots)
    assert sorted(curves(drawn[0])) == [[80.0, 30.0], [83.0, 33.0]]
    assert legend(drawn[0]) == [
        "dense [long, other_long], 93.00 %, mean of 2 seeds", "dense [short], 90.00 %",
        "magnitude, one-shot [long, other_long], mean of 2 seeds",
        "magnitude, one-shot [short]"]
    with open(tmp_path / "out/bidirectional_pruning.csv") as file:
        assert {row["run"] for row in csv.DictReader(file)} == {"short", "long, other_long"}


def test_only_the_dense_training_differs(tmp_path, drawn):
    for name, seed, epochs in (("a", 0, 5), ("b", 1, 30)):
        add_model(tmp_path / name, 0.0, seed, 90.0 + seed, epochs=epochs)
        add_model(tmp_path / name, 0.9, seed, 80.0 + seed)
    collect(tmp_path, tmp_path / "a", tmp_path / "b")
    assert sorted(curves(drawn[0])) == [[80.0], [81.0]]


def test_what_two_roots_share_is_drawn_once_and_parts_of_a_sweep_are_one_line(tmp_path, drawn, capsys):
    sweep(tmp_path / "a", 0, 0.0)
    for sparsity, test in ((0.0, 90.0), (0.95, 70.0)):
        add_model(tmp_path / "b", sparsity, 0, test)
    collect(tmp_path, tmp_path / "a", tmp_path / "b", tmp_path / "a")
    assert curves(drawn[0]) == [[80.0, 70.0, 30.0]] and legend(drawn[0]) == ["dense, 90.00 %", "magnitude, one-shot"]
    assert "4 pruned or dense" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["nowhere", "empty"])
def test_a_root_without_results_is_named(tmp_path, missing):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"--roots .*{missing} "):
        collect(tmp_path, sweep(tmp_path / "a", 0, 0.0), tmp_path / missing)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", [("photos", "def"), ("tiny", "def")])
def test_two_data_sets_in_one_figure_are_refused(tmp_path, other):
    roots = sweep(tmp_path / "a", 0, 0.0), sweep(tmp_path / "b", 1, 0.0, data=other)
    with pytest.raises(UserError, match=rf"different data sets: tiny \(.*/a\) and {other[0]}.* \(.*/b\)"):
        collect(tmp_path, *roots)


def test_the_same_images_by_another_way_are_one_data_set(tmp_path, drawn):
    roots = sweep(tmp_path / "a", 0, 0.0), sweep(tmp_path / "b", 1, 2.0, data=("tiny, image folder", "abc"))
    collect(tmp_path, *roots)
    assert curves(drawn[0]) == [[81.0, 31.0]]


def test_regrown_models_of_another_data_set_are_refused(tmp_path):
    add_regrown(sweep(tmp_path / "a", 0, 0.0) / "regrown", 0, 60.0, dataset="photos")
    with pytest.raises(UserError, match="different data sets"):
        collect(tmp_path, tmp_path / "a")


@pytest.mark.parametrize("lacking", ["pruned", "start"])
def test_validation_is_never_beside_test(tmp_path, drawn, capsys, lacking):
    root = sweep(tmp_path / "a", 0, 0.0)
    if lacking == "pruned":
        add_model(root, 0.95, 0, None)
    add_regrown(root / "regrown", 0, 60.0, start_test="" if lacking == "start" else 30.0)
    collect(tmp_path, root)
    assert drawn[0].axes[0].get_ylabel() == "validation accuracy (%)" and set(curves(drawn[0])[0]) == {50.0}
    notes = [line for line in capsys.readouterr().out.splitlines() if "validation accuracy for all" in line]
    name = "magnitude one-shot at 95 %" if lacking == "pruned" else "regrown: saliency, rl, best: proportional or its"
    assert len(notes) == 1 and name in notes[0]


def test_with_test_accuracy_everywhere_nothing_is_said(tmp_path, drawn, capsys):
    collect(tmp_path, sweep(tmp_path / "a", 0, 0.0))
    assert drawn[0].axes[0].get_ylabel() == "test accuracy (%)" and "validation accuracy" not in capsys.readouterr().out


def test_the_columns_of_the_printed_table_are_aligned(tmp_path, drawn, capsys):
    add_regrown(sweep(tmp_path / "a", 0, 0.0) / "regrown", 0, 60.0, found_by="proportional, and a name beyond it")
    collect(tmp_path, tmp_path / "a")
    lines = capsys.readouterr().out.splitlines()[:5]
    assert "beyond it" in lines[-1] and len({len(line) for line in lines}) == 1
    assert all(line[len("regrown: saliency, rl, best: proportional, and a name beyond it")] == " " for line in lines)


def test_odd_artifacts_in_a_root_are_named_and_left_out(tmp_path, drawn, capsys, monkeypatch):
    root = sweep(tmp_path / "root", 0, 0.0)
    for number, change in enumerate(({"sparsity": None}, {"val_acc": float("nan")}, {"config": {}}, {"config": []},
                                     {"sparsity": 1.5}, {"test_acc": "good"})):
        add_model(root, 0.5 + number / 100, 0, 50.0)
        path = checkpoint.card_path(checkpoint.pruned_path(root, "resnet20", 0.5 + number / 100))
        checkpoint.save_json({**checkpoint.read_card(path.with_suffix(".pth")), **change}, path)
    add_model(root, 0.6, 0, 50.0)
    closed, digest = checkpoint.pruned_path(root, "resnet20", 0.6), checkpoint.file_digest

    def refuse(path: Path) -> str:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return digest(path)
    monkeypatch.setattr(checkpoint, "file_digest", refuse)
    collect(tmp_path, root)
    assert curves(drawn[0]) == [[80.0, 30.0]]
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 7 and all("is left out of tables and figures: " in note for note in notes)
    assert any("mask_0.6.pth" in note and note.endswith("Permission denied") for note in notes)


def test_a_regrowth_table_from_a_spreadsheet(tmp_path, drawn):
    root = sweep(tmp_path / "root", 0, 0.0)
    add_regrown(root / "any", 0, 60.5)
    table = root / "any" / "regrowth_results.csv"
    text = table.read_text()
    table.write_bytes(text.replace(",", ";").replace(".", ",").replace("0,97,pth", "0.97.pth").replace(
        "0.97,pth", "0.97.pth").encode("utf-16"))
    collect(tmp_path, root)
    assert any("60.50 %" in label for label in legend(drawn[0]))
    for old, new, said in (("sparsity_before", "before", "no column 'sparsity_before'"), ("60.5", "Juni 5", "number")):
        table.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=f"regrowth_results.csv is damaged: .*{said}"):
            collect(tmp_path, root)


def test_what_lies_under_another_root_is_not_of_this_one(tmp_path, drawn):
    """Such as the demo's folder in the repository."""
    root = sweep(tmp_path / "root", 0, 0.0)
    add_regrown(root / "savedir", 0, 50.0)
    add_regrown(sweep(root / "demo", 0, 0.0, data=("photos", "other")) / "savedir", 0, 60.0, dataset="photos")
    collect(tmp_path, root)
    assert len(checkpoint.read_csv(tmp_path / "out/bidirectional_regrowth.csv", {})) == 1
