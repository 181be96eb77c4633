"""What several runs left under their roots, as models of one table: which belong to one line, which are told apart.

Used by `collect_results.py`; reads run cards and regrowth tables, never a model.
"""
from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import checkpoint, plots, stage1
from utils.checkpoint import rounded_sparsity
from utils.common import UserError

Row = dict[str, Any]
ANCESTORS = ("parent", "start", "dense")  # entries of a card's config: digests of what the model was made from
NO_SETTING = {*ANCESTORS, "seed", "dataset", "data_fingerprint", "sparsity", "previous", "iteration", "budget"}
REGROWTH_COLUMNS = {**dict.fromkeys(("method", "allocation", "checkpoint"), "text"),
                    **dict.fromkeys(("seed", "sparsity_before", "sparsity", "val_acc_before", "val_acc"), "number")}
NAMED = 4  # models or folders that are listed by name


def gather(roots: Sequence[Path], m_name: str) -> tuple[list[Model], list[Model]]:
    """Pruned and regrown models in the order of the tables, with their column `run`.

    UserError as of `read_models`.
    """
    pruned, regrown = read_models(roots, m_name)
    settings = settings_of([*pruned, *regrown])
    base = Path(os.path.commonpath([root.absolute() for root in roots]))
    for models in (pruned, regrown):
        name_runs(models, settings, base)
    pruned.sort(key=lambda model: (*model.key, model.row["run"], model.sparsity, int(model.row["seed"])))
    regrown.sort(key=lambda model: (model.sparsity, *model.key, model.row["run"], int(model.row["seed"])))
    return pruned, regrown


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A row of a table, the folder it comes from (a root, or that of a regrowth table), its run card ({}: none)."""

    row: Row
    folder: Path
    card: Row

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a line of the figure: pruner and schedule, or method, allocation and where regrowth started."""
        if "pruner" in self.row:
            return self.row["pruner"] != "none", self.row["pruner"], self.row["schedule"]
        return self.row["method"], self.row["allocation"], rounded_sparsity(float(self.row["sparsity_before"]))

    @property
    def sparsity(self) -> float:
        """Rounded as in file names."""
        return rounded_sparsity(float(self.row["sparsity"]))

    @property
    def name(self) -> str:
        """As the printed table calls it."""
        name = (f"{self.row['pruner']} {self.row['schedule']}".strip().replace("none", "dense") if "pruner" in self.row
                else f"regrown: {self.row['method']}, {plots.allocation_name(self.row)}")
        return name + (f" [{self.row['run']}]" if self.row.get("run") else "")


def pruned_models(root: Path, m_name: str) -> list[Model]:
    """The dense and pruned models under a root that have run cards."""
    dense, folder = checkpoint.dense_path(root, m_name), checkpoint.pruned_path(root, m_name, 0.5).parent
    return [Model(row, root, _card(dense if row["pruner"] == "none" else folder / row["checkpoint"]))
            for row in stage1.summary_rows(root, m_name)]


def regrown_models(root: Path, m_name: str) -> list[Model]:
    """A model for each row of every regrowth_results.csv under a root that is of this model."""
    return [Model(row, table.parent, _card(table.parent / row["checkpoint"]))
            for table in sorted(root.rglob("regrowth_results.csv"))
            for row in checkpoint.read_csv(table, REGROWTH_COLUMNS)
            if row["checkpoint"].startswith(f"regrown_{m_name}_")]


def _card(artifact: Path) -> Row:
    """The artifact's run card; of several regrowth steps, which have folders of their own, that of its step."""
    places = artifact, *sorted(artifact.parent.glob(f"step_*/{artifact.name}"))
    return next((card for place in places if (card := checkpoint.read_card(place))), {})


def read_models(roots: Sequence[Path], m_name: str) -> tuple[list[Model], list[Model]]:
    """The dense and pruned models of all roots, and the regrown ones; what several roots share stands there once.

    UserError when a root does not exist or holds no results of the model, when none holds a dense or pruned one, or
    when they are of several data sets, whose accuracies must not share an axis.
    """
    pruned: list[Model] = []
    regrown: list[Model] = []
    for root in roots:
        if not root.is_dir():
            raise UserError(f"--roots {root} is no folder; give the --root of finished runs")
        found = pruned_models(root, m_name), regrown_models(root, m_name)
        if not any(found):
            raise UserError(f"--roots {root} holds no run cards and no regrowth tables of {m_name}; run main.py first, "
                            "or leave this root out")
        pruned += found[0]
        regrown += found[1]
    if not pruned:
        raise UserError(f"no run cards of {m_name} under {', '.join(map(str, roots))}; run main.py first")
    columns = dict.fromkeys(name for model in regrown for name in model.row)
    for model in regrown:  # tables of earlier versions have fewer
        model.row = {name: model.row.get(name, "") for name in columns}
    for model in (*pruned, *regrown):
        _check_data(pruned[0], model)
    return _unique(pruned), _unique(regrown)


def _check_data(first: Model, model: Model) -> None:
    fingerprints = [each.card.get("config", {}).get("data_fingerprint") for each in (first, model)]
    labels = [each.row.get("dataset", "") for each in (first, model)]
    known = fingerprints if all(fingerprints) else labels  # the same images may have come by two ways, with two labels
    if all(known) and known[0] != known[1]:
        note = " with other images" if labels[0] == labels[1] else ""
        raise UserError(f"--roots hold different data sets: {labels[0]} ({first.folder}) and {labels[1]}{note} "
                        f"({model.folder}); gather each by itself")


def _unique(models: Sequence[Model]) -> list[Model]:
    """Equal artifacts are one model, wherever they lie; without a run card, equal rows are."""
    first: dict[Any, Model] = {}
    for model in models:
        first.setdefault(model.card.get("sha256") or tuple(model.row.items()), model)
    return list(first.values())


# --- which runs differ in the seed alone ---------------------------------------------------------------------------


def settings_of(models: Sequence[Model]) -> dict[int, str]:
    """By id(model), how it was made, and the models that it was made from: all but seed, data and sparsity."""
    cards = {model.card["sha256"]: model.card for model in models if "sha256" in model.card}

    def made(card: Row) -> list[Any]:
        config = card.get("config", {})
        own = {name: value for name, value in config.items() if name not in NO_SETTING}
        return [own, *(made(cards.get(config[name], {})) for name in ANCESTORS if name in config)]

    return {id(model): json.dumps(made(model.card) if model.card else [model.row.get("epochs"),
                                  model.row.get("search_epochs")], sort_keys=True) for model in models}


def name_runs(models: Sequence[Model], settings: dict[int, str], base: Path) -> None:
    """Fills the column `run`: the folders, from `base`, where models of one key form several lines, else nothing."""
    for key in dict.fromkeys(model.key for model in models):
        folders: dict[Path, list[Model]] = {}
        for model in models:
            if model.key == key:
                folders.setdefault(model.folder, []).append(model)
        lines: list[list[Model]] = []
        for new in folders.values():
            line = next((line for line in lines if _same_but_seed(line, new, settings)), None)
            if line is None:
                lines.append(new)
            else:
                line += new
        for line in lines:
            names = listed([_relative(folder, base) for folder in dict.fromkeys(model.folder for model in line)])
            for model in line:
                model.row["run"] = names if len(lines) > 1 else ""


def _same_but_seed(line: Sequence[Model], new: Sequence[Model], settings: dict[int, str]) -> bool:
    """Whether the models of another folder belong to the line: other seeds of it, or more sparsities of the same."""
    shared = [(old, model) for old in line for model in new if old.sparsity == model.sparsity]
    if not shared:
        return len({(settings[id(model)], str(model.row["seed"])) for model in (*line, *new)}) == 1
    return all(settings[id(old)] == settings[id(model)] and old.row["seed"] != model.row["seed"]
               for old, model in shared)


def _relative(folder: Path, base: Path) -> str:
    name = os.path.relpath(folder, base)
    return folder.absolute().name if name == "." else name


def listed(words: Sequence[str]) -> str:
    """The words in a row, the first few by name."""
    return ", ".join(words[:NAMED]) + (f" and {len(words) - NAMED} more" if len(words) > NAMED else "")
