"""One stage of a run: an artifact, the arguments that determine it, its unfinished state and its run card.

Stages are what makes a run safe to kill and cheap to repeat: a finished stage with the same arguments is reused, an
interrupted one continues, and nothing on disk is replaced before its successor is complete.
"""
from __future__ import annotations

import copy
import json
import os
import shlex
import socket
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import checkpoint
from utils.checkpoint import read_csv, save_csv, save_json
from utils.common import UserError, flattened, note
from utils.distributed import World, world
from utils.training import Trainer, TrainResult

LINEAGE = ("parent", "start", "dense", "source", "reference")  # digests of the models that a stage starts from
SAVE_SHARE = 0.05  # at most this share of the time goes into saving progress


class FolderLock:
    """A folder that no other process may take as long as this object lives; see `hold_folder`."""

    held: weakref.WeakValueDictionary[Path, FolderLock] = weakref.WeakValueDictionary()  # by this process

    def __init__(self, folder: Path):
        """Takes the lock; UserError with the name of its holder if another process has it."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        file, path = None, folder / ".lock"  # says who holds the folder, and is there only while somebody does
        while file is None or not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
            file = open(path, "a+", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            file.seek(0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{folder} is in use by {file.read() or 'another process'}. Wait until that has "
                                "ended, or give this run a folder of its own") from error
            except OSError as error:
                note(f"two runs in {folder} at a time would not be noticed ({error.strerror})")
                _release(file, path, os.getpid())
                return
            # gone or another file by now: its last holder has just removed it
        if holder := file.read():
            note(f"{folder} was left by {holder}, which was killed; this run takes it over")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}: "
                   f"{shlex.join(sys.argv)}"[:300])
        file.flush()
        weakref.finalize(self, _release, file, path, os.getpid())


def _release(file: Any, path: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a process that was forked from it
        path.unlink(missing_ok=True)
    file.close()


def hold_folder(folder: Path, option: str = "--root") -> FolderLock | None:
    """Keeps other processes from writing to `folder` for as long as the result is kept; within a process anybody may.

    The system gives the lock (flock) back when the process ends, however it ends; what is left of a killed one is taken
    over with a note. Over NFS it works between machines; where there are no such locks, a note says so, and on Windows
    nothing is locked. UserError when another process holds the folder, saying which, or when it cannot be written
    (`option` chooses another). Of the processes of one run the leader alone holds folders; the others get None.
    """
    if not world().leads:
        return None
    checkpoint.ensure_writable(folder, option)
    folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    lock = FolderLock.held.get(key) or FolderLock(folder)
    FolderLock.held[key] = lock
    return lock


class Stage:
    """An artifact on disk that is new, interrupted or finished.

    config: JSON-able arguments that determine the artifact; resume: continue an interrupted stage, take a finished one
    as it is; overwrite: redo it; with a time: redo only what is older or was made with other arguments.
    Raises UserError when what is on disk does not match and neither was asked for.
    """

    def __init__(self, artifact: Path, config: Mapping[str, Any], *, resume: bool = False,
                 overwrite: bool | float = False):
        """Looks at the disk and decides."""
        self.artifact, self.config = artifact, json.loads(json.dumps(config))
        self.progress = checkpoint.progress_path(artifact)
        self.card: dict[str, Any] | None = None
        self._state: dict[str, Any] | None = None
        self._saved_at, self._save_cost = 0.0, 0.0
        self._unsaved: dict[str, Any] | None = None  # a finished epoch that is not on disk yet
        self._load_existing(resume, overwrite)

    @property
    def finished(self) -> bool:
        """Whether the artifact is there and to be used as it is; `card` then holds its run card (or {})."""
        return self.card is not None

    def reuse_note(self) -> str:
        """A line on the finished stage: its artifact, its accuracy, and the arguments in which it differs."""
        known = f" (validation {self.card['val_acc']:.2f} %)" if "val_acc" in self.card else ""
        made = self.card.get("config", self.config)
        other = f", made with other arguments: {differences(made, self.config)}" if made != self.config else ""
        return f"reusing {self.artifact}{known}{other}"

    def _load_existing(self, resume: bool, overwrite: bool | float) -> None:
        card = checkpoint.read_card(self.artifact) if kept(self.artifact, overwrite) else None
        made = (card or {}).get("config", {})
        if card is not None and made == self.config:
            self.card = card
            if self._own_progress():  # of an interrupted --overwrite
                self.progress.unlink()
        elif overwrite:
            self._state = self._own_progress() if kept(self.progress, overwrite) else None
        elif self.progress.exists():
            self._load_progress(resume)
        elif self.artifact.exists():
            if card is None and checkpoint.was_changed(self.artifact):
                card_name = checkpoint.card_path(self.artifact).name
                raise UserError(f"{self.artifact} is not the file that {card_name} beside it describes: it was damaged "
                                "or replaced. Restore it, remove that card to have the file taken as it is with "
                                "--resume, or use --overwrite to redo it")
            if not resume:
                how = "without a run card that says how it was made" if card is None else \
                    f"and was made with other arguments: {differences(made, self.config)}"
                raise UserError(f"{self.artifact} exists {how}. Use --resume to take it as it is, --overwrite to redo "
                                "it, or --root for another place")
            for key in LINEAGE:  # as after a new dense training
                if made.get(key) and self.config.get(key) and made[key] != self.config[key]:
                    raise UserError(f"{self.artifact} was made from another {key} model than the one that is there "
                                    "now. Remove it to have it redone, use --overwrite to redo everything, or --root "
                                    "for another place")
            self.card = card or {}

    def _own_progress(self) -> dict[str, Any] | None:
        """The interrupted state, where there is one that can be read and has these very arguments."""
        try:
            state = checkpoint.load_checkpoint(self.progress)
        except UserError:
            return None
        return state if isinstance(state, dict) and state.get("config") == self.config else None

    def _load_progress(self, resume: bool) -> None:
        if not resume:
            raise UserError(f"an interrupted stage lies at {self.progress}. Use --resume to continue it or --overwrite "
                            "to start anew")
        self._state = checkpoint.load_checkpoint(self.progress)
        made = self._state.get("config", {}) if isinstance(self._state, dict) else {}
        if made != self.config:
            raise UserError(f"the interrupted stage at {self.progress} was started with other arguments: "
                            f"{differences(made, self.config)}. Repeat them with --resume, or use --overwrite to start "
                            "anew")

    def fit(self, trainer: Trainer, label: str) -> TrainResult:
        """Trains, from the interrupted state if there is one; saves progress and a CSV row per epoch as it goes.

        Where saving takes too large a share of the time, the last finished epoch is kept in memory and saved when the
        training stops for whatever reason (a kill excepted).
        """
        if self._state is not None:
            trainer.load_state_dict(self._state["trainer"])
            print(f"{label}: continuing after epoch {trainer.epoch}")
        try:
            return trainer.run(label, on_epoch=self._save_progress)
        finally:
            if self._unsaved is not None:  # stopped by Ctrl-C or a failure: what throttling held back
                self._write_progress(self._unsaved)

    def _save_progress(self, trainer: Trainer) -> None:
        checkpoint.save_csv(trainer.history, checkpoint.training_log_path(self.artifact))
        if not trainer.finished and time.perf_counter() - self._saved_at < self._save_cost / SAVE_SHARE:
            self._unsaved = copy.deepcopy(trainer.state_dict())  # training goes on in these very tensors
        else:
            self._write_progress(trainer.state_dict())

    def _write_progress(self, state: Mapping[str, Any]) -> None:
        start = time.perf_counter()
        checkpoint.save_checkpoint({"config": self.config, "trainer": state}, self.progress)
        self._unsaved, self._saved_at = None, time.perf_counter()
        self._save_cost = self._saved_at - start

    def finish(self, content: Any, card: Mapping[str, Any]) -> None:
        """Saves the artifact and its card, then forgets the progress.

        The card names the artifact's digest, so that a kill between the two leaves an interrupted stage rather than
        a card that describes other bytes.
        """
        checkpoint.save_checkpoint(content, self.artifact)
        self.card = {"sha256": checkpoint.file_digest(self.artifact), "config": self.config, **card}
        checkpoint.save_json(self.card, checkpoint.card_path(self.artifact))
        self.progress.unlink(missing_ok=True)


def kept(path: Path, overwrite: bool | float) -> bool:
    """Whether the file exists and is kept: with True none is, with a time those that are at least as new."""
    return overwrite is not True and path.exists() and path.stat().st_mtime >= overwrite


def differences(saved: Mapping[str, Any], requested: Mapping[str, Any]) -> str:
    """The differing entries of two nested configurations in words: ``epochs 30 (asked: 200), seed 0 (asked: 1)``.

    Entries that only one of them has are named only where nothing else differs; None, of an option that is not given or
    that an earlier version did not have, is as good as no entry.
    """
    saved, requested = flattened(saved), flattened(requested)
    keys = [key for key in {**saved, **requested} if saved.get(key) != requested.get(key)]
    keys = [key for key in keys if key in saved and key in requested] or keys
    return ", ".join(f"{key} {saved.get(key)} (asked: {requested.get(key)})" for key in keys)


def check_same_files(world: World, config: Mapping[str, Any]) -> None:
    """UserError where this process has other data or models than the leader (config: JSON-able, with their digests)."""
    own = json.loads(json.dumps(config))
    if (leaders := world.share(own)) != own:
        raise UserError(f"process {world.rank} on {socket.gethostname()} finds other files than process 0: "
                        f"{differences(leaders, own)}. All need the same --root and --data_dir")


class ResumableTable:
    """Rows by key in ``{path}``, and in ``{path stem}.json`` the configuration that they were made with.

    resume, overwrite: as of `Stage`. Raises UserError when the file exists and neither is asked for, or when it was
    made with another configuration. A mapping in the configuration has an entry for each kind of row; entries of new
    kinds are added.
    """

    def __init__(self, path: Path, keys: Sequence[str], config: Mapping[str, Any], *, resume: bool,
                 overwrite: bool | float):
        """keys: the columns that identify a row; config: JSON-able."""
        self.path, self.keys = path, tuple(keys)
        self.config = json.loads(json.dumps(config))
        self.rows: list[dict[str, Any]] = []
        self.fingerprint: str | None = None  # of the data that rows were made on
        self.lock = hold_folder(path.parent, "--save_dir")
        if kept(path, overwrite):
            self._load_rows(resume, overwrite)

    def _load_rows(self, resume: bool, overwrite: bool | float) -> None:
        card = self._card()
        parts = {key: part for key, part in self.config.items() if isinstance(part, dict)}
        saved = {key: {**part, **card["config"].get(key, {})} for key, part in parts.items()}
        config = self.config | {key: {**saved[key], **part} for key, part in parts.items()}
        if changed := differences({**card["config"], **saved}, config):
            if overwrite:
                return
            raise UserError(f"{self.path} was made with other arguments: {changed}. Use --overwrite to redo it, or "
                            "--save_dir for another place")
        if not resume:
            raise UserError(f"{self.path} exists. Use --resume to go on after its last row, or --overwrite to redo it")
        self.config = config
        self.fingerprint = card.get("data_fingerprint")
        columns = card.get("columns") or dict.fromkeys(self.keys, "text")  # tables of earlier versions do not say
        self.rows = [{name: text if columns.get(name) == "words" else _number(text) for name, text in row.items()
                      if name in columns or not card.get("columns")}
                     for row in read_csv(self.path, columns, self._remedy)]

    def _card(self) -> dict[str, Any]:
        path = self.path.with_suffix(".json")
        if not path.exists():
            return {"config": {}}
        try:
            card = json.loads(path.read_bytes())
            return {"columns": dict(card.get("columns", {})), "config": dict(card["config"]),
                    "data_fingerprint": card.get("data_fingerprint")}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged. {self._remedy}") from error

    @property
    def _remedy(self) -> str:
        return (f"Restore it, or remove {self.path.name} and {self.path.with_suffix('.json').name} and use --resume: "
                "finished models are then taken as they are")

    def check_data(self, label: str, fingerprint: str) -> None:
        """UserError where a row was made on other data than this: by its column `dataset` (`Run.data_label`), or by the
        images themselves (`ImageDataset.fingerprint`)."""
        others = {row.get("dataset", label) for row in self.rows} - {label}
        if others or self.fingerprint not in (None, fingerprint):
            found = f"and this run reads {label}" if others else "which has changed since"
            raise UserError(f"{self.path} has rows of other data: {min(others, default=label)}, {found}. Use "
                            "--save_dir for another place, or --overwrite to redo it")
        self.fingerprint = fingerprint

    def has(self, *key: Any) -> bool:
        """Whether there is a row with this key; what a row of an earlier version lacks counts as ''."""
        asked = tuple(str(_as_saved(value)) for value in key)
        return any(tuple(str(row.get(name, "")) for name in self.keys) == asked for row in self.rows)

    def add(self, row: Mapping[str, Any], card: Mapping[str, Any]) -> None:
        """Appends a row and saves table and card."""
        self.rows.append({name: _as_saved(value) for name, value in row.items()})
        names = dict.fromkeys(name for line in self.rows for name in line)
        kinds = {name: _kind({type(line.get(name)) for line in self.rows}) for name in names}
        save_json({**card, "config": self.config, "columns": kinds, "data_fingerprint": self.fingerprint},
                  self.path.with_suffix(".json"))
        save_csv(self.rows, self.path)


def _kind(types: set[type]) -> str:
    """Of a column, for reading it: 'number', 'words' (also such as '3'), or 'text', which is of both."""
    return "number" if types <= {int, float} else "words" if types == {str} else "text"


def _as_saved(value: Any) -> Any:
    """The value as it is after a table was written and read: six digits of a float, 1.0 as 1."""
    return _number(f"{value:.6g}") if isinstance(value, float) else value


def _number(text: str) -> Any:
    """An int or a float where the text is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
