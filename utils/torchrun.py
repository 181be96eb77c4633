"""What torchrun tells a process that it has started, and what the process tells torchrun."""
from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from utils.common import UserError


def use_own_part(device: torch.device) -> None:
    """Makes 'cuda' this process's own GPU, or leaves it its share of the processor's cores; alone it has everything.

    UserError where a machine has fewer GPUs than processes.
    """
    number, count = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if count > 1 and device.type == "cpu" and not _threads_given():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // count))
    elif count > 1 and device.type == "cuda" and device.index is None:
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
    place = ["--nnodes", str(size // here)] if size > here else ["--standalone"]
    return ["torchrun", *place, "--nproc_per_node", str(here)]


def restarted() -> bool:
    """Whether torchrun has started this process after it had lost one, and not after an error that would come again."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_1/0/error.json, of process 0 after one restart
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and not (
        file and any(Path(file).parents[2].glob("attempt_*/*/error.json")))


def keep_error(line: str) -> None:
    """Tells torchrun, which shows it, and `restarted` of an error that would come again."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
