"""The two studies of the search: on toys, and how well short trainings tell what long ones do."""
from __future__ import annotations

import csv
import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from experiments import rung_fidelity, search_or_rule, search_scaling, search_toys
from tests.test_regrowth_scripts import make_start
from utils.allocation import ALLOCATORS, AllocationProblem
from utils.common import UserError
from utils.distributed import World


def test_every_allocation_is_listed_once():
    problem = AllocationProblem(("a", "b", "c"), (2, 4, 1), 4, (2, 4, 1), (1, 1, 1))
    expected = [point for point in itertools.product(range(3), range(5), range(2)) if sum(point) == 4]
    assert sorted(map(tuple, search_toys.every_allocation(problem).tolist())) == sorted(expected)


@pytest.mark.parametrize("kind", search_toys.NOISE)
def test_a_toy_rewards_the_same_allocation_equally_and_long_training_truly(kind):
    toy = search_toys.Toy(kind, 3)
    allocation = search_toys.ALLOCATORS["proportional"](toy.problem, torch.Generator())
    assert sum(allocation) == search_toys.BUDGET
    again, other = search_toys.Toy(kind, 3), search_toys.Toy(kind, 4)
    assert toy(allocation, 0, 1) == again(allocation, 5, 1) != other(allocation, 0, 1)
    errors = [abs(toy(allocation, 0, epochs) - toy.expected(np.array(allocation, float), 9)) for epochs in (1, 9)]
    assert errors[1] < 0.01 < errors[0]
    assert toy.optimum() >= toy.best_rule() - 0.005


def test_searches_of_a_toy_spend_the_same_and_are_compared_in_pairs():
    rows = [search_toys.measure(search_toys.Toy(kind, seed), arm) for kind in search_toys.NOISE for seed in (0, 1)
            for arm in ("rules, then random", "random")]
    assert all(55 <= row["epochs"] <= 60 for row in rows)
    assert rows[0]["first_six"] != rows[0]["last_six"]
    full = [{**row, "arm": arm, "reward": row["reward"] + (arm == "default") * (0.01 + 0.001 * row["seed"])}
            for row in rows if row["arm"] == "random" for arm in search_toys.ARMS]
    results = search_toys.summary(full)
    assert len(results) == 12 and all(row["mean"] == pytest.approx(1.05) for row in results)
    assert all(row["p_holm"] == pytest.approx(4 * row["p"]) for row in results)


def test_rungs_are_compared_by_hand():
    last = [1, 2, 3, 4, 5, 6]
    rows = [{"number": i, "source": "near" if i < 3 else "random", "bn": 6 - i, "after_1": value, "after_9": value}
            for i, value in enumerate(last)]
    bn, first = rung_fidelity.compare(rows, [1, 9])
    assert bn["spearman"] == pytest.approx(-1) and bn["spearman_near"] == pytest.approx(-1)
    assert first["spearman"] == pytest.approx(1) and (bn["best_third_kept"], first["best_third_kept"]) == (0, 1)


def test_allocations_are_compared_by_the_repeats_of_both():
    rows = [{"allocation": name, "repeat": repeat, "val_acc": value} for name, repeat, value in [
        ("controller", 3, 70.0), ("controller", 1, 60.0), ("uniform", 1, 59.0), ("controller", 2, 65.0),
        ("uniform", 3, 66.0)]]
    found, = search_or_rule.compare(rows)
    assert (found["against"], found["pairs"], found["mean"]) == ("uniform", 2, 2.5)


def test_one_process_is_always_measured():
    assert search_scaling.parse_args(["--m_name", "resnet20", "--processes", "4", "2"]).processes == [1, 2, 4]


def test_lengths_that_give_no_line_and_allocations_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="two different ones"):
        search_scaling.parse_args(["--m_name", "resnet20", "--mini_finetune_epochs", "0.3", "0.3"])
    problem = AllocationProblem(layers=("a", "b"), capacities=(1, 1), budget=1, sizes=(4, 4), fan=(4, 4),
                                drift=(0.5, 0.6), lacking=(1, 1))
    with pytest.raises(UserError, match="--num_allocations 9: only 2 different ones were found for 1 weights in 2"):
        rung_fidelity.allocations(problem, 9, seed=0)


def test_rung_fidelity_goes_on_where_it_was_interrupted(image_folder, tmp_path, monkeypatch):
    make_start(tmp_path)
    words = ["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--device", "cpu",
             "--precision", "fp32", "--num_allocations", "7", "--num_images", "60", "--rungs", "0.5", "1", "2"]
    real, calls = rung_fidelity.Study.rewards, []

    def interrupted(study, allocation):
        calls.append(allocation)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(study, allocation)
    monkeypatch.setattr(rung_fidelity.Study, "rewards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rung_fidelity.main(words)
    with pytest.raises(UserError, match="--resume"):
        rung_fidelity.main(words)
    rung_fidelity.main([*words, "--resume"])
    assert len(calls) == 8 and len(set(calls)) == 7
    with open(tmp_path / "rung_fidelity/resnet20/rungs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["source"] for row in rows] == ["proportional", "uniform", "greedy", "erk", "magnitude", "near", "random"]
    assert all(float(row["after_1"]) <= float(row["after_2"]) for row in rows)
    with open(tmp_path / "rung_fidelity/resnet20/spearman.csv", newline="") as file:
        assert [row["rung"] for row in csv.DictReader(file)] == ["bn", "after_0.5", "after_1"]


def test_rung_fidelity_refuses_what_cannot_be_compared(tmp_path):
    for words, said in ((["--rungs", "3", "1"], "increasing"), (["--num_allocations", "6"], "7 or more")):
        with pytest.raises(UserError, match=said):
            rung_fidelity.parse_args(["--m_name", "resnet20", "--root", str(tmp_path), *words])


def test_what_the_search_found_is_trained_again_beside_the_best_rules(image_folder, tmp_path, monkeypatch, capsys):
    make_start(tmp_path)
    words = ["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--device", "cpu",
             "--precision", "fp32", "--num_images", "60", "--search_budget", "22", "--repeats", "2", "--rules", "2"]
    seen, stopped, real = [], [], search_or_rule.stage2.Step.reward

    def reward(step, allocation, seed, epochs):
        seen.append((tuple(allocation), seed, epochs))
        if len({trial[1] for trial in seen}) == 3 and not stopped:  # at the second repeat
            stopped.append(True)
            raise KeyboardInterrupt
        return real(step, allocation, seed, 0.5) * 0.5 + 0.001 * len(set(allocation))
    monkeypatch.setattr(search_or_rule.stage2.Step, "reward", reward)
    with pytest.raises(KeyboardInterrupt):
        search_or_rule.main(words)
    search_or_rule.main([*words, "--resume"])
    folder = tmp_path / "search_or_rule/resnet20"
    with open(folder / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["allocation"] for row in rows))
    assert len(rows) == 6 and names[0] == "controller" and set(names[1:]) < set(search_or_rule.WARM_START)
    weights = {row["allocation"]: tuple(map(int, row["weights"].split())) for row in rows}
    assert len(set(weights.values())) == 3 and len({sum(counts) for counts in weights.values()}) == 1
    again = [trial for trial in seen if trial[1] != seen[0][1]]  # each under the same two seeds, not the search's
    assert len(again) == 7  # the interrupted one twice
    assert {(allocation, seed) for allocation, seed, _ in again} == {
        (allocation, seed) for allocation in weights.values() for seed in {trial[1] for trial in again}}
    assert len({trial[1] for trial in again}) == 2
    assert all(epochs == again[0][2] for *_, epochs in again) and again[0][2] > seen[0][2]
    before = len(seen)
    search_or_rule.main([*words, "--resume"])
    assert len(seen) == before and "indistinguishable" in capsys.readouterr().out
    search_or_rule.main([*words, "--overwrite=2100-01-01T00:00:00"])  # an interrupted one goes on: all is older than it
    assert len(seen) > before + len(rows)  # the search is made again, too, not taken from its old checkpoints
    search_or_rule.main([*words, "--overwrite=2000-01-01T00:00:00"])
    assert "indistinguishable" in capsys.readouterr().out
    with pytest.raises(UserError, match="other arguments"):
        search_or_rule.main([*words, "--resume", "--num_images", "50"])


class Told(World):
    """A process that notes what is shared; that follows, if it is told a problem, and else stops before it trains."""

    def __init__(self, problem: AllocationProblem | None = None):
        self.rank, self.shared, self.served = int(problem is not None), [], []
        self.problem = problem and json.loads(json.dumps(asdict(problem)))

    def share(self, value=None):
        self.shared.append(value)
        return value or self.problem

    def run(self, *_):
        raise KeyboardInterrupt

    def serve(self, function):
        self.served.append(function.__self__.problem)


@pytest.mark.parametrize("study, words", [(search_or_rule, []), (search_scaling, ["--round"])])
def test_all_processes_have_the_leaders_order_of_layers(study, words, image_folder, tmp_path, monkeypatch):
    make_start(tmp_path)
    words = ["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--device", "cpu",
             "--precision", "fp32", *words]
    leader, follower = Told(), Told(AllocationProblem(("linear", "conv1"), (1, 2), 3, (640, 432), (74, 25)))
    monkeypatch.setattr(study, "world", lambda: leader)
    with pytest.raises(KeyboardInterrupt):
        study.main(words)
    files, problem = leader.shared
    assert files["data_fingerprint"] and len(files["start"]) == 64 and len(problem["layers"]) == 22
    monkeypatch.setattr(study, "world", lambda: follower)
    study.main(words)
    assert follower.served and all(found.layers == ["linear", "conv1"] for found in follower.served)


def test_the_controllers_best_meets_the_rules_that_came_furthest():
    problem = AllocationProblem(("a", "b", "c"), (4, 6, 8), 6, (4, 6, 8), (1, 1, 1), drift=(0.1, 0.2, 0.3))
    plain = {name: rule(problem, torch.Generator()) for name, rule in ALLOCATORS.items()}
    search = search_or_rule.RegrowthPolicyGradient(problem, lambda *_: 0.5, search_or_rule.SearchConfig(), 0)
    first, second = (0, 0, 6), (0, 6, 0)
    assert not {first, second} & {*plain.values()} - {plain["random"], plain["greedy"]}
    for allocation, epochs, reward in ((plain["proportional"], 1, 0.7), (plain["uniform"], 1, 0.6), (first, 1, 0.9),
                                       (second, 1, 0.5), (second, 3, 0.4), (plain["uniform"], 3, 0.8)):
        search.ladder.record((allocation, epochs), reward)
    assert search.ladder.leader() == (plain["uniform"], 3)  # a rule wins the search
    assert search_or_rule.contenders(search, 2) == {
        "controller": second, "uniform": plain["uniform"], "proportional": plain["proportional"]}


def test_trainings_are_paired_by_repeat_in_whatever_order_they_finished():
    rows = [{"allocation": name, "repeat": repeat, "val_acc": value} for name, repeat, value in (
        ("erk", 2, 50.0), ("controller", 1, 61.0), ("controller", 3, 73.0), ("erk", 1, 60.0), ("controller", 2, 52.0),
        ("erk", 3, 70.0))]
    (result,) = search_or_rule.compare(rows)
    assert (result["against"], result["mean"], result["std"]) == ("erk", pytest.approx(2), pytest.approx(1))
