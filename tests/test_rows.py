"""A study's table: what is made first, by whom, and what is not made again. Nothing is trained here."""
from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import rows
from utils.checkpoint import read_csv
from utils.common import UserError
from utils.distributed import World
from utils.stage1 import Outcome


class Backwards(World):
    """Does the jobs of a round from the last to the first."""

    def run(self, function, jobs, on_result):
        for number in reversed(range(len(jobs))):
            on_result(number, function(*jobs[number]), 0.0)


DATA = SimpleNamespace(fingerprint="1f")


@pytest.mark.parametrize("processes", [World(), Backwards()])
def test_what_seeds_have_in_common_comes_first_and_finished_rows_are_not_made_again(processes, tmp_path, monkeypatch):
    done = []

    def open_run(args):
        return SimpleNamespace(seed=args.seed, root=args.root, made=set(), card=dict, data_label="tiny", data=DATA)

    def prepare(run):
        done.append(("common", run.seed))
        run.made.add(run.root / "dense")

    def measure(run, name):
        assert run.made == {run.root / "dense"}
        done.append((name, run.seed))
        return {"row": name, "seed": run.seed, "value": 2.5}

    monkeypatch.setattr(rows, "open_run", open_run)
    monkeypatch.setattr(rows, "world", lambda: processes)
    groups = [[("a", 0), ("b", 0)], [("c", 0)], [("c", 1)]]

    def make(count: int, resume: bool):
        args = argparse.Namespace(resume=resume, overwrite=False, precision="fp32", device="cpu")
        return rows.make_rows(args, tmp_path, {}, ("row", "seed"), groups[:count], prepare, measure)

    assert [(row["row"], row["seed"]) for row in make(1, resume=False)] == [("a", 0), ("b", 0)]
    assert done == [("common", 0), ("a", 0), ("b", 0)]  # in the order of the group
    assert len(make(3, resume=True)) == 4 and set(done[3:5]) == {("common", 0), ("common", 1)}
    assert sorted(done[5:]) == [("c", 0), ("c", 1)]
    assert len(read_csv(tmp_path / "runs.csv", {}, "")) == 4 and len(make(3, resume=True)) == 4 and len(done) == 7


def test_a_table_goes_on_in_its_precision_and_with_other_seeds(tmp_path, monkeypatch):
    run = SimpleNamespace(made=set(), card=dict, data_label="tiny", data=DATA)
    monkeypatch.setattr(rows, "open_run", lambda args: run)

    def make(seed: int, resolved: str, resume: bool = True):
        monkeypatch.setattr(rows, "resolve_precision", lambda name, device: resolved)
        args = argparse.Namespace(resume=resume, overwrite=False, precision="auto", device="cpu")
        return rows.make_rows(args, tmp_path, {"precision": "auto"}, ("seed",), [[(seed,)]], lambda run: None,
                              lambda run: {"seed": seed})
    make(0, "bf16", resume=False)
    with pytest.raises(UserError, match=r"other arguments: precision bf16 \(asked: fp32\)"):
        make(0, "fp32")
    assert [row["seed"] for row in make(3, "bf16")] == [0, 3]


def test_the_trainings_since_the_dense_model_add_up_and_a_lost_run_card_is_named():
    made = [Outcome(None, Path(f"{name}.pth"), {"epochs": 3, "seconds": seconds})
            for name, seconds in (("start", 1.5), ("end", 2))]
    assert rows.trained(made) == {"epochs": 6, "seconds": 3.5}
    for card in ({}, {"epochs": "", "seconds": ""}):  # as `stage1.read_test` leaves one without a card
        with pytest.raises(UserError, match=r"start.pth has no run card .* start.json"):
            rows.trained([Outcome(None, Path("start.pth"), card), made[1]])
