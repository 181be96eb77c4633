"""A CSV that grows row by row and can be continued: what studies of many trainings write."""
from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.checkpoint import save_csv, save_json
from utils.errors import UserError
from utils.stage import differences, hold_folder


class ResumableTable:
    """Rows by key in ``{path}``, and in ``{path stem}.json`` the configuration that they were made with.

    Raises UserError when the file exists and neither `resume` nor `overwrite` is asked for, or when it was made with
    another configuration.
    """

    def __init__(self, path: Path, keys: Sequence[str], config: Mapping[str, Any], *, resume: bool, overwrite: bool):
        """keys: the columns that identify a row; config: JSON-able."""
        self.path, self.keys = path, tuple(keys)
        self.config = json.loads(json.dumps(config))
        self.rows: list[dict[str, Any]] = []
        self.lock = hold_folder(path.parent, "--save_dir")
        if path.exists() and not overwrite:
            self._take_up(resume)

    def _take_up(self, resume: bool) -> None:
        there = self._saved_config()
        if there != self.config:
            raise UserError(f"{self.path} was made with other arguments: {differences(there, self.config)}. Use "
                            "--overwrite to redo it, or --save_dir for another place")
        if not resume:
            raise UserError(f"{self.path} exists. Use --resume to go on after its last row, or --overwrite to redo it")
        try:
            with open(self.path, newline="") as file:
                self.rows = [{name: _number(text) for name, text in row.items()}
                             for row in csv.DictReader(file, strict=True)]
        except (csv.Error, TypeError) as error:  # an open quote, a row of another length
            raise self._damaged(self.path) from error

    def _saved_config(self) -> dict[str, Any]:
        card = self.path.with_suffix(".json")
        try:
            return json.loads(card.read_text())["config"] if card.exists() else {}
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(card) from error

    @staticmethod
    def _damaged(path: Path) -> UserError:
        names = f"{path.with_suffix('.csv').name} and {path.with_suffix('.json').name}"
        return UserError(f"{path} is damaged. Restore it, or remove {names} and use --resume: finished models are then "
                         "taken as they are")

    def has(self, *key: Any) -> bool:
        """Whether there is a row with this key."""
        return any(tuple(str(row[name]) for name in self.keys) == tuple(map(str, key)) for row in self.rows)

    def add(self, row: Mapping[str, Any], card: Mapping[str, Any]) -> None:
        """Appends a row and saves table and card; equal columns in every row."""
        self.rows.append({name: _number(f"{value:.6g}") if isinstance(value, float) else value
                          for name, value in row.items()})
        save_json({**card, "config": self.config}, self.path.with_suffix(".json"))
        save_csv(self.rows, self.path)


def _number(text: str) -> Any:
    """An int or a float where the text is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
