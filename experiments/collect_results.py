#!/usr/bin/env python
"""Gathers what several runs left under their roots into one table and one figure: the pruning curves of all roots and
an arrow for each regrown model. Runs that differ in nothing but the seed become one line through their mean; others of
the same pruner, or of the same method and allocation, are told apart by their folder. Trains nothing.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

from utils import checkpoint, plots, stage1  # noqa: E402
from utils.common import UserError  # noqa: E402
from utils.run import ArgumentParser, add_model_option, script  # noqa: E402

Row = dict[str, Any]
ANCESTORS = ("parent", "start", "dense")  # entries of a card's config: digests of what the model was made from
NO_SETTING = {*ANCESTORS, "seed", "dataset", "data_fingerprint", "sparsity", "previous", "iteration", "budget"}
REGROWTH_COLUMNS = {**dict.fromkeys(("method", "allocation", "checkpoint"), "text"),
                    **dict.fromkeys(("seed", "sparsity_before", "sparsity", "val_acc_before", "val_acc"), "number")}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = ArgumentParser(__doc__)
    add_model_option(parser)
    parser.add_argument("--roots", type=Path, nargs="+", default=[Path(".")], help="--root of the runs to gather")
    parser.add_argument("--save_dir", type=Path, default=Path("results"), help="where the tables and the figure go")
    parser.add_argument("--name", default="bidirectional", help="file name of the figure and beginning of the tables'")
    return parser.parse_args(argv)


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
        before = checkpoint.rounded_sparsity(float(self.row["sparsity_before"]))
        return self.row["method"], self.row["allocation"], before

    @property
    def sparsity(self) -> float:
        """Rounded as in file names."""
        return checkpoint.rounded_sparsity(float(self.row["sparsity"]))

    @property
    def name(self) -> str:
        """As the printed table calls it."""
        name = (f"{self.row['pruner']} {self.row['schedule']}".strip().replace("none", "dense") if "pruner" in self.row
                else f"regrown: {self.row['method']}, {plots.allocation_name(self.row)}")
        return name + (f" [{self.row['run']}]" if self.row["run"] else "")


def models_under(root: Path, m_name: str) -> tuple[list[Model], list[Model]]:
    """The dense and pruned models under a root that have run cards, and one for each row of its regrowth tables."""
    dense, folder = checkpoint.dense_path(root, m_name), checkpoint.pruned_path(root, m_name, 0.5).parent
    others = {path.parents[2] for path in root.rglob(str(dense.relative_to(root))) if path != dense}  # roots below
    pruned = [Model(row, root, _card(dense if row["pruner"] == "none" else folder / row["checkpoint"]))
              for row in stage1.summary_rows(root, m_name)]
    regrown = [Model(row, table.parent, _card(table.parent / row["checkpoint"]))
               for table in sorted(root.rglob("regrowth_results.csv")) if not others.intersection(table.parents)
               for row in checkpoint.read_csv(table, REGROWTH_COLUMNS)
               if row["checkpoint"].startswith(f"regrown_{m_name}_")]
    return pruned, regrown


def _card(artifact: Path) -> Row:
    """The artifact's run card; of several regrowth steps, which have folders of their own, that of its step."""
    places = artifact, *sorted(artifact.parent.glob(f"step_*/{artifact.name}"))
    return next((card for place in places if (card := checkpoint.read_card(place))), {})


def gather(roots: Sequence[Path], m_name: str) -> tuple[list[Model], list[Model]]:
    """The dense and pruned models of all roots, and the regrown ones, in the order of the tables, with a column `run`;
    what several roots share stands there once.

    UserError when a root does not exist or holds no results of the model, when none holds a dense or pruned one, or
    when they are of several data sets, whose accuracies must not share an axis.
    """
    pruned: list[Model] = []
    regrown: list[Model] = []
    for root in roots:
        if not root.is_dir():
            raise UserError(f"--roots {root} is no folder; give the --root of finished runs")
        found = models_under(root, m_name)
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
    pruned, regrown = _unique(pruned), _unique(regrown)
    name_runs([*pruned, *regrown], Path(os.path.commonpath([root.absolute() for root in roots])))
    pruned.sort(key=lambda model: (*model.key, model.row["run"], model.sparsity, int(model.row["seed"])))
    regrown.sort(key=lambda model: (model.sparsity, *model.key, model.row["run"], int(model.row["seed"])))
    return pruned, regrown


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


def name_runs(models: Sequence[Model], base: Path) -> None:
    """Fills the column `run`: the folders, from `base`, where models of one key were made in several ways, else ''."""
    cards = {model.card["sha256"]: model.card for model in models if "sha256" in model.card}
    lines, taken = {}, set()  # the first: way -> its models
    for model in models:
        made = _made(model.card, cards) if model.card else [model.row.get(name) for name in ("epochs", "search_epochs")]
        way = model.key, json.dumps(made, sort_keys=True)
        place = *way, model.sparsity, str(model.row["seed"])
        lines.setdefault((*way, model.folder) if place in taken else way, []).append(model)  # a repetition is no seed
        taken.add(place)
    names = {way: listed(base.name if model.folder.samefile(base) else os.path.relpath(model.folder, base)
                         for model in line) for way, line in lines.items()}
    for way, line in lines.items():
        alone = len({name for other, name in names.items() if other[0] == way[0]}) == 1
        for model in line:
            model.row["run"] = "" if alone else names[way]


def _made(card: Row, cards: Mapping[str, Row]) -> list[Any]:
    """How a model was made, and those that it was made from: all but seed, data and sparsity."""
    config = card.get("config", {})
    own = {name: value for name, value in config.items() if name not in NO_SETTING}
    return [own, *(_made(cards.get(config[name], {}), cards) for name in ANCESTORS if name in config)]


def listed(words: Iterable[str], most: int = 4) -> str:
    """The words in a row, each once; of many the first few, and how many more there are."""
    words = list(dict.fromkeys(words))
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def print_table(models: Sequence[Model]) -> None:
    """A line per model: how it was made, seed, sparsity, accuracy on validation and test."""
    width = max(len(model.name) for model in models)
    print(f"{'model':<{width}} {'seed':>5} {'sparsity %':>10} {'val %':>8} {'test %':>8}")
    for model in models:
        row = model.row
        test = f"{float(row['test_acc']):8.2f}" if row["test_acc"] != "" else f"{'-':>8}"
        print(f"{model.name:<{width}} {row['seed']:>5} {100 * model.sparsity:>10.10g} "
              f"{float(row['val_acc']):8.2f} {test}")
    lacking = [f"{model.name} at {100 * model.sparsity:.10g} %" if "pruner" in model.row
               else f"{model.name} or its start" for model in models if plots.lacks_test(model.row)]
    if 0 < len(lacking) < len(models):
        print(f"the figure shows validation accuracy for all, since {len(lacking)} of {len(models)} models lack a test "
              f"accuracy: {listed(lacking)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Gathers, writes, says where."""
    args = parse_args(argv)
    pruned, regrown = gather(args.roots, args.m_name)
    pruning_rows, regrowth_rows = [model.row for model in pruned], [model.row for model in regrown]
    figure = args.save_dir / f"{args.name}.png"
    checkpoint.save_csv(pruning_rows, args.save_dir / f"{args.name}_pruning.csv")
    if regrown:
        checkpoint.save_csv(regrowth_rows, args.save_dir / f"{args.name}_regrowth.csv")
    plots.plot_bidirectional(pruning_rows, regrowth_rows, figure, f"{args.m_name} on {pruning_rows[0]['dataset']}")
    print_table([*pruned, *regrown])
    print(f"{len(pruned)} pruned or dense and {len(regrown)} regrown models: {figure}, tables in {args.save_dir}")


if __name__ == "__main__":
    script(main, resumable=False)
