"""A CSV that grows row by row and can be continued: what studies of many trainings write."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.checkpoint import read_csv, save_csv, save_json
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
        card = self._card()
        if card["config"] != self.config:
            raise UserError(f"{self.path} was made with other arguments: {differences(card['config'], self.config)}. "
                            "Use --overwrite to redo it, or --save_dir for another place")
        if not resume:
            raise UserError(f"{self.path} exists. Use --resume to go on after its last row, or --overwrite to redo it")
        columns = card.get("columns") or dict.fromkeys(self.keys, "text")  # tables of earlier versions do not say
        self.rows = [{name: _number(text) for name, text in row.items() if name in columns or not card.get("columns")}
                     for row in read_csv(self.path, columns, self._remedy)]

    def _card(self) -> dict[str, Any]:
        path = self.path.with_suffix(".json")
        if not path.exists():
            return {"config": {}}
        try:
            card = json.loads(path.read_bytes())
            return {"columns": dict(card.get("columns", {})), "config": dict(card["config"])}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged. {self._remedy}") from error

    @property
    def _remedy(self) -> str:
        return (f"Restore it, or remove {self.path.name} and {self.path.with_suffix('.json').name} and use --resume: "
                "finished models are then taken as they are")

    def has(self, *key: Any) -> bool:
        """Whether there is a row with this key."""
        return any(tuple(str(row[name]) for name in self.keys) == tuple(map(str, key)) for row in self.rows)

    def add(self, row: Mapping[str, Any], card: Mapping[str, Any]) -> None:
        """Appends a row and saves table and card; equal columns in every row."""
        self.rows.append({name: _number(f"{value:.6g}") if isinstance(value, float) else value
                          for name, value in row.items()})
        kinds = {name: "number" if all(isinstance(line[name], (int, float)) and not isinstance(line[name], bool)
                                       for line in self.rows) else "text" for name in row}
        save_json({**card, "config": self.config, "columns": kinds}, self.path.with_suffix(".json"))
        save_csv(self.rows, self.path)


def _number(text: str) -> Any:
    """An int or a float where the text is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
