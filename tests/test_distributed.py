"""Two processes do the work of one, and end together: a toy whose jobs take no time, and a search on tiny images."""
from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main as stage_one
import rl_saliency_regrowth
from tests.conftest import REPOSITORY
from utils import distributed
from utils.checkpoint import load_checkpoint, read_csv
from utils.common import UserError
from utils.distributed import World
from utils.run import ArgumentParser

TOY = """
import os, signal, sys, time
from utils import distributed
from utils.common import UserError
from utils.distributed import world
from utils.run import script

def job(number, text):
    time.sleep(0.1 if world().leads else 0.02)  # so that the other has jobs too where it starts late
    if text == f"fail on {world().rank}":
        raise UserError("no such job")
    distributed.BEAT, distributed.SILENCE = 0.2, 1.0 if text == "die" else 30.0
    if text == "die" and world().rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return [number / 10, text, world().rank]

def main(_):
    assert world().share([1.5, "x"] if world().leads else None) == [1.5, "x"]
    print(f"process {world().rank} of {world().size}")
    if not world().leads:
        world().serve(job)
        world().serve(job)
        return
    for text in sys.argv[1:]:
        results = {}
        world().run(job, [(number, text) for number in range(20)], lambda number, *got: results.update({number: got}))
        assert [results[number][0][0] for number in range(20)] == [number / 10 for number in range(20)]
        assert all(0.01 < seconds < 60 for _, seconds in results.values())
        print(text, "by", sorted({value[2] for value, _ in results.values()}))
    world().share()
    world().share()

if __name__ == "__main__":
    script(main, several=sys.argv[1] != "one process")
"""


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture
def toy(tmp_path):
    """Runs the toy in two processes, without torchrun; returns their exit codes, stdout and lines on stderr."""
    path = tmp_path / "toy.py"
    path.write_text(TOY)

    def run(*texts: str) -> tuple[list[int], str, list[str]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in ("0", "1"):
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                    "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            processes.append(subprocess.Popen([sys.executable, path, *texts], env={**environment(), **told}, text=True,
                                              stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        outputs = [process.communicate(timeout=240) for process in processes]
        return ([process.returncode for process in processes], "".join(out for out, _ in outputs),
                [line for _, err in outputs for line in err.splitlines() if line])
    return run


def test_one_process_alone_does_every_job_in_order():
    results = []
    World().run(lambda a, b: a + b, [(1, 2), (3, 4)], lambda number, value, seconds: results.append((number, value)))
    assert results == [(0, 3), (1, 7)] and World().share("x") == "x" and World().leads
    assert type(distributed.world()) is World and distributed.world() is distributed.world()


def test_two_processes_share_the_jobs_of_every_round_and_the_leader_alone_prints(toy):
    codes, out, err = toy("first", "second")
    assert codes == [0, 0] and err == []
    assert out.splitlines() == ["process 0 of 2", "first by [0, 1]", "second by [0, 1]"]


def test_an_error_of_a_process_that_does_not_lead_ends_all_with_its_line(toy):
    codes, _, err = toy("first", "fail on 1")
    assert codes == [130, 2] and err == ["error: no such job"]


def test_a_lost_process_ends_the_others_with_a_line_on_how_to_go_on(toy):
    codes, _, err = toy("first", "die")
    assert codes == [130, -signal.SIGKILL] and len(err) == 1
    assert re.fullmatch("stopped: another process of this run ended; what was finished is saved. Continue "
                        "with: torchrun --standalone --nproc_per_node 2 .*toy.py first die --resume", err[0])


def test_a_script_that_knows_of_one_process_only_says_so(toy):
    codes, _, err = toy("one process")
    assert 2 in codes and err == ["error: toy.py runs as one process; start it with python, not with torchrun"]


# --- a search ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def search(image_folder, tmp_path_factory):
    """Words of a small search, without its --save_dir, and what it ends in when one process does it all."""
    root = tmp_path_factory.mktemp("search")
    words = ["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(root), "--device", "cpu"]
    stage_one.main([*words, "--max_epochs", "1", "--finetune_epochs", "1", "--batch_size", "16"])
    words += ["--num_epochs", "2", "--batch_size", "2", "--mini_finetune_epochs", "1", "3", "--search_budget", "18",
              "--finetune_lr", "0.01", "--finetune_epochs", "1", "--ssim_batches", "1", "--saliency_max_batches", "1"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rl_saliency_regrowth.main([*words, "--save_dir", str(root / "one")])
    torch.set_num_threads(threads)
    return words, root / "one"


def assert_same_end(folder: Path, other: Path) -> None:
    name = "regrown_resnet20_0.97.pth"
    assert (folder / name).read_bytes() == (other / name).read_bytes()
    tables = [[{key: text for key, text in row.items() if key != "seconds"}
               for row in read_csv(place / "search.csv", {}, "")] for place in (folder, other)]
    assert tables[0] == tables[1] and len(tables[0]) > 8
    assert len({row["reward"] for row in tables[0]}) > 1  # so that allocations make a difference


def trained(folder: Path) -> dict:
    """The trials of the latest controller checkpoint."""
    latest = max(folder.glob("*_epoch_*.pth"), key=lambda path: path.stat().st_mtime_ns, default=None)
    return load_checkpoint(latest)["search"]["known"] if latest else {}


def test_two_processes_end_in_the_same_bytes_as_one_also_after_a_kill(search, tmp_path):
    """`kill -9` of one: the other ends with a line; torchrun starts both again; no finished trial is trained anew."""
    words, one = search
    script = ["--max_restarts", "1", REPOSITORY / "rl_saliency_regrowth.py", *words, "--save_dir", tmp_path]
    with subprocess.Popen(command(*script), env=environment(), text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        while len(trained(tmp_path)) < 3:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        os.kill(worker(process.pid, 1), signal.SIGKILL)
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert len(re.findall("^stopped: another process .* --resume$", err, re.MULTILINE)) == 1
    assert_same_end(one, tmp_path)
    assert "continuing the search" in out
    rows = read_csv(tmp_path / "search.csv", {"seconds": "number"}, "")
    assert sum(float(row["seconds"]) == 0 for row in rows) >= 3  # not trained in this run


def worker(agent: int, rank: int) -> int:
    """The process of a rank that this torchrun has started."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return next(int(child) for child in children
                if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes())


# --- what torchrun tells -------------------------------------------------------------------------------------------


def test_a_restart_goes_on_but_not_after_an_error_of_the_users(tmp_path, monkeypatch):
    parser, plain = ArgumentParser(), ArgumentParser()
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    for attempt in (0, 1):
        (tmp_path / f"attempt_{attempt}/0").mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0/0/error.json"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not distributed.restarted() and parser.parse_args(["--overwrite"]).overwrite
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert distributed.restarted()
    os.utime(tmp_path / "attempt_0", (1000.5, 1000.5))
    for words in (["--overwrite"], ["--overwrite=1970-01-01T00:16:40+00:00"]):  # as from the first attempt on
        again = parser.parse_args(words)
        assert again.resume and again.overwrite == 1000 and plain.parse_args([]) is not None
    assert parser.parse_args([]).overwrite is False and parser.parse_args([]).resume
    distributed.keep_error("the file exists")  # of the attempt before
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_1/0/error.json"))
    assert not distributed.restarted()


def test_processes_divide_the_cores_unless_the_user_has_given_threads(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for count, given in (("1", False), ("4", True), ("4", False), ("32", False)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        monkeypatch.setattr(distributed, "_threads_given", lambda given=given: given)
        distributed.use_own_part(torch.device("cpu"))
    assert chosen == [4, 1]


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for count in ("1", "4"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        distributed.use_own_part(torch.device("cuda"))
        distributed.use_own_part(torch.device("cuda:2"))  # as the user says, alone too
    distributed.use_own_part(torch.device("cpu", 0))
    assert chosen == [torch.device("cuda:2"), 3, torch.device("cuda:2")]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match="8 processes on a machine with 4 GPUs"):
        distributed.use_own_part(torch.device("cuda"))


def test_the_command_that_goes_on_names_where_several_machines_meet(monkeypatch):
    for name, value in (("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "4"), ("MASTER_ADDR", "node1"),
                        ("TORCHELASTIC_RUN_ID", "job"), ("TORCHELASTIC_MAX_RESTARTS", "3")):
        monkeypatch.setenv(name, value)
    assert " ".join(distributed.launcher()) == ("torchrun --nnodes 2 --rdzv_backend c10d --rdzv_id job --rdzv_endpoint "
                                                "node1:29500 --nproc_per_node 4 --max_restarts 3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert distributed.launcher()[:2] == ["torchrun", "--standalone"]
