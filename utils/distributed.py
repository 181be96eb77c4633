"""Processes that share the work of a run: torchrun starts them, process 0 leads, all do jobs, and all end together.

The leader posts the jobs of a round, whoever is free takes the next one, and the leader collects what they gave. That
is JSON of a few numbers, so all of it goes through torch.distributed's store: no process group is formed, and there is
no backend to choose. The leader alone decides and prints.
"""
from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from utils.common import UserError

POLL, BEAT, SILENCE = 0.05, 2.0, 30.0  # seconds: polling interval, heartbeat interval, heartbeat timeout
Function = Callable[..., Any]
OnResult = Callable[[int, Any, float], None]  # number of the job in its round, what it gave, seconds it took


class Stopped(BaseException):
    """Another process of the run has ended, or this one was told to (SIGTERM)."""


LOST = (Stopped, distributed.DistError)  # the latter where the store has gone with another process


class World:
    """The processes of a run; of this class, one alone. Jobs, results and what is shared are JSON-able."""

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that decides and prints."""
        return self.rank == 0

    def share(self, value: Any = None) -> Any:
        """The leader's value, for every process; all call this in the same order."""
        return value

    def run(self, function: Function, jobs: Sequence[Sequence[Any]], on_result: OnResult) -> None:
        """For the leader: has ``function(*job)`` done for all jobs of a round, and tells each result as it comes."""
        for number, job in enumerate(jobs):
            on_result(number, *_timed(function, job))

    def serve(self, function: Function) -> None:
        """For the others: takes part in round after round, until the leader shares None."""

    def end(self, error: str | None = None) -> None:
        """Before the process exits: prints the error unless another process has printed one."""
        if error:
            print(error, file=sys.stderr)


def _timed(function: Function, job: Sequence[Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(*job), time.perf_counter() - start


class Processes(World):
    """Those that torchrun has started; all end within about half a minute after one is lost."""

    def __init__(self) -> None:
        """Joins them."""
        store, self.rank, self.size = next(distributed.rendezvous("env://"))
        self.store = self._join(store)
        self._watched = range(1, self.size) if self.leads else (0,)
        self._shared, self._over, self._stderr = 0, threading.Event(), sys.stderr
        if not self.leads:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        signal.signal(signal.SIGTERM, self._stop)
        threading.Thread(target=self._watch, daemon=True).start()

    def _join(self, store: distributed.Store) -> distributed.Store:
        """Waits for all others; returns this attempt's part of the store, which outlives restarts."""
        start = seat = 0
        while not (start and seat < self.size and store.check([f"begun {start}"])):  # no seat: a stale attempt
            time.sleep(POLL)
            if self.leads:
                start = start or store.add("starts", 1)
                if store.add(f"seats {start}", 0) >= self.size - 1:
                    store.set(f"begun {start}", "")
            elif (latest := store.add("starts", 0)) > start:
                start, seat = latest, store.add(f"seats {latest}", 1)
        return distributed.PrefixStore(f"start {start}", store)

    def share(self, value: Any = None) -> Any:
        """As of `World`."""
        self._shared += 1
        key = f"shared {self._shared}"
        if self.leads:
            self.store.set(key, json.dumps(value))
        while not self.store.check([key]):
            time.sleep(POLL)
        return json.loads(self.store.get(key))

    def run(self, function: Function, jobs: Sequence[Sequence[Any]], on_result: OnResult) -> None:
        """As of `World`."""
        jobs = self.share(jobs)
        with ThreadPoolExecutor(1) as pool:  # results are taken in while this process is busy with a job of its own
            collecting = pool.submit(self._collect, len(jobs), on_result)
            try:
                self._work(function, jobs, collecting)
                collecting.result()
            except BaseException:
                self._over.set()
                raise

    def serve(self, function: Function) -> None:
        """As of `World`."""
        while (jobs := self.share()) is not None:
            self._work(function, jobs)

    def _work(self, function: Function, jobs: Sequence[Any], collecting: Future | None = None) -> None:
        while (number := self.store.add(f"taken {self._shared}", 1) - 1) < len(jobs):
            result = json.dumps((number, *_timed(function, jobs[number])))
            self.store.set(f"result {self._shared}.{self.store.add(f'done {self._shared}', 1)}", result)
            if collecting and collecting.done():  # it has failed
                return

    def _collect(self, count: int, on_result: OnResult) -> None:
        for number in range(1, count + 1):
            key = f"result {self._shared}.{number}"
            while not self.store.check([key]):
                if self._over.wait(POLL) and not self.store.check([key]):
                    return
            on_result(*json.loads(self.store.get(key)))

    def end(self, error: str | None = None) -> None:
        """As of `World`."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._over.set()
        try:
            if error and self.store.add("ended", 1) == 1:
                print(error, file=self._stderr)
            self.store.set(f"beat {self.rank}", "left")
            limit = time.monotonic() + (1.5 * BEAT if self.leads else 0)  # the store may be the leader's: it goes last
            while time.monotonic() < limit and set(self._beats().values()) != {"left"}:
                time.sleep(POLL)
        except RuntimeError:  # the store is gone with its machine: a line from each of the others
            if error and os.environ.get("LOCAL_RANK") == "0":
                print(error, file=self._stderr)

    def _stop(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Stopped

    def _beats(self) -> dict[int, str]:
        """The last sign of life of every process that this one watches."""
        keys = {rank: f"beat {rank}" for rank in self._watched}
        return {rank: self.store.get(key).decode() if self.store.check([key]) else "" for rank, key in keys.items()}

    def _watch(self) -> None:
        """Gives signs of life, and stops this process when another has ended or gives none."""
        beats, heard, lost = {}, dict.fromkeys(self._watched, time.monotonic()), False
        while not lost and not self._over.wait(BEAT):
            try:
                self.store.set(f"beat {self.rank}", str(time.monotonic()))
                before, beats, now = beats, self._beats(), time.monotonic()
                heard |= {rank: now for rank, beat in beats.items() if beat != before.get(rank, "") or beat == "left"}
                lost = self.store.check(["ended"]) or now - min(heard.values()) > SILENCE
            except RuntimeError:  # the store is gone
                lost = True
        if not self._over.is_set():
            os.kill(os.getpid(), signal.SIGTERM)


@cache
def world() -> World:
    """The processes of this run; joins them at the first call."""
    return Processes() if int(os.environ.get("WORLD_SIZE", 1)) > 1 else World()


# --- what torchrun tells a process, and what the process tells torchrun -----------------------------------------------


def use_own_part(device: torch.device) -> None:
    """Selects this process's GPU ('cuda': by local rank), or limits it to its share of the CPU cores; a lone process
    uses all.

    UserError where a machine has fewer GPUs than processes.
    """
    number, count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if count > 1 and device.type == "cpu" and not _threads_given():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // count))
    elif device.index is not None and device.type == "cuda":  # graphs and random numbers are the current GPU's
        torch.cuda.set_device(device)
    elif count > 1 and device.type == "cuda":
        if count > torch.cuda.device_count():
            raise UserError(f"{count} processes on a machine with {torch.cuda.device_count()} GPUs; start as many as "
                            "there are GPUs, with torchrun's --nproc_per_node")
        torch.cuda.set_device(number)


def _threads_given() -> bool:
    """Whether the user has set OMP_NUM_THREADS; where it is not, torchrun has set it to 1."""
    try:
        return b"\0OMP_NUM_THREADS=" in b"\0" + Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:  # no Linux
        return False


def launcher() -> list[str]:
    """The words before a script's name that have started this process."""
    size, here = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if size == 1:
        return ["python"]
    place = ["--standalone"]
    if size > here:  # the port of the meeting is not told; any free one will do
        place = ["--nnodes", str(size // here), "--rdzv_backend", "c10d", "--rdzv_id",
                 os.environ.get("TORCHELASTIC_RUN_ID", "1"), "--rdzv_endpoint", f"{os.environ['MASTER_ADDR']}:29500"]
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    return ["torchrun", *place, "--nproc_per_node", str(here),
            *(["--max_restarts", restarts] if restarts != "0" else [])]


def restarted() -> bool:
    """Whether torchrun has started this process after it had lost one, and not after an error that would come again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and not any(
        any(folder.glob("*/error.json")) for folder in _attempts())


def _attempts() -> list[Path]:
    """The folders that torchrun has made so far, one at each start of the processes."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_1/0/error.json, of process 0 after one restart
    return [*Path(file).parent.parent.parent.glob("attempt_*")] if file else []


def resumed(words: Sequence[str], began: float) -> list[str]:
    """A command's words to go on with it: with `--resume`, or with the time when its `--overwrite` began.

    began: when this process did; of torchrun's processes, those of the first attempt count.
    """
    start = datetime.fromtimestamp(min([began, *(path.stat().st_mtime for path in _attempts())])).astimezone()
    words = [f"{word}={start.isoformat(timespec='seconds')}" if word == "--overwrite" else word for word in words]
    goes_on = {"--resume", "-r", "--overwrite"}.intersection(word.split("=")[0] for word in words)
    return words if goes_on else [*words, "--resume"]


def continued(words: Sequence[str]) -> tuple[list[str], float | None]:
    """The words, after a restart by torchrun those to go on with; of an ``--overwrite=TIME`` among them the time in
    seconds, and `--resume` instead. UserError where it is no time."""
    words = resumed(words, time.time()) if restarted() else words
    times = [word for word in words if word.startswith("--overwrite=")]
    if not times:
        return list(words), None
    try:
        since = datetime.fromisoformat(times[-1].partition("=")[2]).timestamp()
    except (ValueError, OverflowError) as error:
        raise UserError(f"{times[-1]} does not give a time as in --overwrite=2026-01-31T12:00:00") from error
    return resumed([word for word in words if word not in times], since), since


def keep_error(line: str) -> None:
    """Tells torchrun, which shows it, and `restarted` of an error that would come again."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
