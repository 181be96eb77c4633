"""A study's table of runs, made by one process or by those that torchrun has started."""
from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from utils.checkpoint import card_path
from utils.common import UserError, resolve_precision
from utils.distributed import world
from utils.run import Run, open_run, resolve_device
from utils.stage import ResumableTable
from utils.stage1 import Outcome

Row = dict[str, Any]


def trained(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Epochs and seconds of the trainings since the dense model, of the models that these made one after the other.

    UserError where a run card that says so is lost.
    """
    for outcome in outcomes:
        if outcome.card.get("epochs", "") == "":
            raise UserError(f"{outcome.artifact} has no run card that says how long it was trained. Restore "
                            f"{card_path(outcome.artifact).name} beside it, or remove the model to have it made again")
    return {name: sum(outcome.card[name] for outcome in outcomes) for name in ("epochs", "seconds")}


def make_rows(args: argparse.Namespace, folder: Path, config: Mapping[str, Any], keys: Sequence[str],
              groups: Sequence[Sequence[tuple]], prepare: Callable[[Run], Any],
              measure: Callable[..., Row]) -> list[Row]:
    """All rows of ``runs.csv`` in the folder, after those that it lacks have been made; [] in a process that follows.

    First what the rows of a seed have in common is made, for all seeds side by side, then the rows. Models lie in
    ``seed_{n}`` and are written by the process that trains them, the table by the leader.

    Args:
        args: `resume`, `overwrite` and the options of `open_run`.
        config: what rows depend on, for `ResumableTable`; the precision is added as it comes out on this machine.
        keys: names of the columns that tell rows apart, 'seed' last.
        groups: keys of rows; one process makes those of a group, in their order.
        prepare: called with the run of a seed, makes what its rows begin with.
        measure: called with that run and the key but for the seed, returns the row; all values JSON-able.
    """
    total = sum(map(len, groups))
    places = {key: place for place, key in enumerate((key for group in groups for key in group), 1)}

    @lru_cache(1)
    def run_of(seed: int) -> Run:
        return open_run(argparse.Namespace(**{**vars(args), "seed": seed, "root": folder / f"seed_{seed}"}))

    def common(seed: int) -> list[str]:
        prepare(run_of(seed))
        return [str(path) for path in run_of(seed).made]

    def group_rows(made: Sequence[str], group: Sequence[Sequence[Any]]) -> list[tuple[Row, Row]]:
        run = run_of(group[0][-1])
        run.made.update(map(Path, made))  # so that --overwrite does not make them again
        rows = []
        for key in map(tuple, group):
            words = ", ".join(f"{name} {value}" for name, value in zip(keys, key, strict=True))
            print(f"\n{words} ({places[key]} of {total})", flush=True)
            rows.append((measure(run, *key[:-1]), run.card()))
        return rows

    processes = world()
    if not processes.leads:
        processes.serve(common)
        processes.serve(group_rows)
        return []
    config = {**config, "precision": resolve_precision(args.precision, resolve_device(args.device))}
    table = ResumableTable(folder / "runs.csv", keys, config, resume=args.resume, overwrite=args.overwrite)
    missing = [left for group in groups if (left := [key for key in group if not table.has(*key)])]
    seeds, made = sorted({group[0][-1] for group in missing}), {}
    if seeds:
        run = run_of(seeds[0])
        table.check_data(run.data_label, run.data.fingerprint)
    processes.run(common, [(seed,) for seed in seeds], lambda number, files, _: made.update({seeds[number]: files}))
    processes.share()
    processes.run(group_rows, [(made[group[0][-1]], group) for group in missing],
                  lambda _, rows, __: [table.add(*row) for row in rows])
    processes.share()
    return table.rows
