"""The search on problems whose answer is known: no network is trained here."""
from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.agent import RatioActions, RegrowthAgent, ShareActions, fit, most_promising
from utils.allocation import ALLOCATORS, AllocationProblem, ratios_to_allocation, shares_near
from utils.checkpoint import load_checkpoint, read_csv, save_checkpoint
from utils.common import UserError
from utils.controller import RegrowthPolicyGradient, SearchConfig, scaled_advantages
from utils.distributed import World
from utils.methods import parse_regrowth_args
from utils.stage2 import run_search, saved_searches

SMALL = SearchConfig(num_epochs=8, batch_size=3, hidden_size=8, search_budget=None)


def small_problem(capacities: tuple[int, ...] = (6, 8, 5, 7, 4), budget: int = 12) -> AllocationProblem:
    """Layers half pruned."""
    layers = tuple(f"layer{i}" for i in range(len(capacities)))
    return AllocationProblem(layers, capacities, budget, tuple(max(1, 2 * c) for c in capacities), (3,) * len(layers))


class Trainer:
    """Stands for mini-finetuning: a reward from a hash of its arguments; counts its calls, can be interrupted."""

    def __init__(self, stop_at: int | None = None):
        self.calls: list[tuple] = []
        self.stop_at = stop_at

    def __call__(self, allocation: tuple[int, ...], seed: int, epochs: float) -> float:
        assert all(type(part) is int for part in (*allocation, seed)) and type(epochs) in (int, float)
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append((allocation, epochs))
        return np.random.default_rng([seed, *epochs.as_integer_ratio(), *allocation]).uniform(0.4, 0.6)


class Toy:
    """An enumerable problem: quadratic around a random best point, noisy where trained for few epochs."""

    def __init__(self, seed: int):
        self.problem = small_problem()
        self.space = [point for point in itertools.product(*(range(c + 1) for c in self.problem.capacities))
                      if sum(point) == self.problem.spend]
        rng, points = np.random.default_rng(seed), np.array(self.space)
        truth = 0.9 - 0.01 * ((points - points[rng.integers(len(points))]) ** 2).sum(axis=1)
        self.rewards = {}
        for epochs in (1, 3, 9):
            seen = truth - 0.1 / epochs + 0.02 / epochs * rng.standard_normal(len(points))
            self.rewards[epochs] = dict(zip(self.space, seen.clip(0, 1).tolist(), strict=True))

    def __call__(self, allocation: tuple[int, ...], seed: int, epochs: int) -> float:
        return self.rewards[epochs][allocation]

    def best(self) -> tuple[int, ...]:
        """By exhaustive evaluation at the top rung."""
        return max(self.space, key=self.rewards[9].__getitem__)

    def random_rewards(self, count: int) -> list[float]:
        """Of random allocations after one epoch."""
        draws = torch.Generator().manual_seed(0)
        return [self(ALLOCATORS["random"](self.problem, draws), 0, 1) for _ in range(count)]


@pytest.fixture(scope="module")
def toy_searches() -> list[tuple[Toy, RegrowthPolicyGradient, tuple]]:
    """(toy, search, result) over 12 seeds, each with a budget of 20 % of the exhaustive evaluation."""
    searches = []
    for seed in range(12):
        toy = Toy(seed)
        config = SearchConfig(num_epochs=100, batch_size=16, learning_rate=2e-2, hidden_size=16, eta=4,
                              reward_temperature=0.02, start_beta=20.0, end_beta=10.0,
                              search_budget=9 * len(toy.space) // 5, action_space="ratio")
        search = RegrowthPolicyGradient(toy.problem, toy, config, seed)
        searches.append((toy, search, search.run()))
    return searches


def test_finds_the_best_allocation_within_a_fifth_of_exhaustive_evaluation(toy_searches):
    for toy, _, result in toy_searches:
        assert len(toy.space) == 1055 and result.epochs_spent <= 0.2 * 9 * 1055
        assert result.fidelity == 9 and result.reward == toy.rewards[9][result.allocation]
        assert sum(reward > result.reward for reward in toy.rewards[9].values()) < 10  # the best 1 % at the very least
    assert sum(result.allocation == toy.best() for toy, _, result in toy_searches) >= 10


def test_controller_beats_random_allocation_on_as_many_evaluations(toy_searches):
    gains = []
    for toy, search, _ in toy_searches:
        rewards = [row["reward"] for row in search.history if row["source"] == "rl"]
        gains.append(np.mean(rewards[-64:]) - np.mean(toy.random_rewards(len(rewards))))
    assert min(gains) > 0  # on every seed
    assert np.mean(gains) > 10 * np.std(gains, ddof=1) / math.sqrt(len(gains))
    assert np.mean(gains) > 0.15


def test_agent_reports_the_allocations_and_probabilities_of_its_actions():
    problem, agent = small_problem(), RegrowthAgent(hidden_size=8)
    rollout = agent(RatioActions(problem, 11), 20, torch.Generator().manual_seed(3))
    assert rollout.actions.shape == rollout.log_probs.shape == rollout.entropies.shape == (20, 5)
    assert rollout.actions.min() == 0 and rollout.actions.max() == 10
    for actions, allocation in zip(rollout.actions.tolist(), rollout.allocations, strict=True):
        assert allocation == ratios_to_allocation([a / 10 for a in actions], problem.capacities, problem.budget)
    assert (rollout.log_probs <= 0).all() and (rollout.entropies <= math.log(11) + 1e-6).all()


def test_agent_with_zero_weights_chooses_uniformly():
    agent = RegrowthAgent(action_space_size=4, hidden_size=8)
    for parameter in agent.parameters():
        torch.nn.init.zeros_(parameter)
    rollout = agent(RatioActions(small_problem((50,) * 3, 150), 4), 400, torch.Generator().manual_seed(0))
    live = rollout.decides
    assert torch.allclose(rollout.log_probs[live], torch.tensor(-math.log(4)))
    assert torch.allclose(rollout.entropies[live], torch.tensor(math.log(4)))
    assert (rollout.actions.flatten().bincount() / 1200 - 0.25).abs().max() < 0.05  # 4 standard errors


def test_what_the_agent_is_told_of_a_layer_by_hand():
    """Layer 1 of 4: position 1/4, 5 of the 10 weights that may return; of the 8 to spend 8 or 6 are left."""
    seen: list[torch.Tensor] = []
    agent = RegrowthAgent(action_space_size=2, hidden_size=4)
    agent.cell.register_forward_pre_hook(lambda cell, inputs: seen.append(inputs[0][:, 2:]))
    rollout = agent(RatioActions(small_problem((2, 5, 0, 3), 8), 2), 20, torch.Generator().manual_seed(0))
    left = 1 - 2 / 8 * rollout.actions[:, 0]  # the first layer took none or both of its two
    assert set(rollout.actions[:, 0].tolist()) == {0, 1} and len(seen) == 4
    assert torch.equal(seen[0], torch.tensor([[0.0, 0.2, 1.0]]).expand(20, 3))
    assert torch.equal(seen[1], torch.stack([torch.full((20,), 0.25), torch.full((20,), 0.5), left], dim=1))
    assert (seen[3][:, :2] == torch.tensor([0.75, 0.3])).all()


def test_an_action_without_effect_carries_no_gradient():
    space = RatioActions(small_problem((0, 5, 5), 3), 11)
    rollout = RegrowthAgent(hidden_size=8)(space, 50, torch.Generator().manual_seed(0))
    assert not rollout.decides[:, 0].any() and rollout.decides[:, 1].all()
    assert torch.equal(rollout.decides[:, 2], rollout.actions[:, 1] < 9)  # 0.9 of 3 rounds to all 3
    assert (rollout.log_probs[~rollout.decides] == 0).all() and (rollout.entropies[~rollout.decides] == 0).all()
    assert (rollout.log_probs[rollout.decides] < 0).all()


def test_agent_follows_its_seed_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (RegrowthAgent(seed=seed) for seed in (1, 1, 2))
    first(RatioActions(small_problem(), 11), 4, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)
    assert all(0.1 < parameter.abs().max() <= 64 ** -0.5 for parameter in first.parameters())


def test_entropy_weight_by_hand():
    config = SearchConfig(num_epochs=10)  # falls over the first 4 updates
    assert [config.beta(epoch) for epoch in range(6)] == pytest.approx([0.4, 0.31, 0.22, 0.13, 0.04, 0.04])
    assert SearchConfig(num_epochs=10, decay_fraction=0.0).beta(0) == 0.04


def test_advantages_by_hand():
    rewards = torch.tensor([0.5, 0.51, 0.4, 1.0, 0.0])
    expected = torch.tensor([0.0, 2.0, -20.0, 100.0, -100.0])  # ± 0.5 / 0.005 is just the limit
    assert torch.allclose(scaled_advantages(rewards, 0.5, 0.005), expected, atol=1e-4)
    assert scaled_advantages(torch.tensor([1.0, 0.0]), 0.2, 0.001).tolist() == [100.0, -100.0]


def test_baseline_is_a_moving_average_that_starts_at_the_first_mean():
    rewards = iter([0.2, 0.4, 0.6, 0.8, 0.5, 0.7])
    config = SearchConfig(num_epochs=3, batch_size=2, rungs=(1,), search_budget=None, warm_start=False)
    search = RegrowthPolicyGradient(small_problem((900,) * 4, 1000), lambda *_: next(rewards), config, seed=0)
    search.run()
    # first mean 0.3, which stays 0.3; 0.9 * 0.3 + 0.1 * 0.7 = 0.34; 0.9 * 0.34 + 0.1 * 0.6 = 0.366
    assert [row["baseline"] for row in search.history] == pytest.approx([None, None, 0.3, 0.3, 0.34, 0.34])
    assert search.baseline == pytest.approx(0.366)
    assert [row["best"] for row in search.history] == [0.2, 0.4, 0.6, 0.8, 0.8, 0.8]


def test_one_update_follows_the_gradient_of_the_stated_objective():
    search = RegrowthPolicyGradient(small_problem((6, 0, 8, 5, 7)), Trainer(), SMALL, seed=5)
    search.baseline = 0.5
    rollout = search.agent(RatioActions(search.problem, 11), 2, torch.Generator().manual_seed(1))
    log_p, entropy = rollout.log_probs.sum(dim=1), rollout.entropies.sum(dim=1)
    # Advantages (0.51 - 0.5) / 0.005 = 2 and (0.485 - 0.5) / 0.005 = -3; the mean over two episodes.
    # The entropy bonus is the mean per decision: what has no effect (budget spent, no capacity) is none.
    decisions = int(rollout.decides.sum())
    assert decisions < rollout.decides.numel()
    loss = -(2 * log_p[0] - 3 * log_p[1]) / 2 - 0.4 * (entropy[0] + entropy[1]) / decisions
    expected = torch.autograd.grad(loss, list(search.agent.parameters()), retain_graph=True)
    search._learn(rollout, [0.51, 0.485])
    for parameter, gradient in zip(search.agent.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-4)
    assert search.baseline == pytest.approx(0.9 * 0.5 + 0.1 * 0.4975)


@pytest.mark.parametrize("budget", [6, 13, 14, 40, 60, 61, 200])
@pytest.mark.parametrize("warm_start", [True, False])
def test_the_budget_is_never_exceeded_and_the_winner_was_at_the_top(budget, warm_start):
    trainer = Trainer()
    config = SearchConfig(num_epochs=30, batch_size=3, hidden_size=8, search_budget=budget, warm_start=warm_start)
    search = RegrowthPolicyGradient(small_problem(), trainer, config, seed=1)
    result = search.run()
    assert result.epochs_spent == sum(epochs for _, epochs in trainer.calls) <= budget
    assert result.fidelity == search.ladder.rungs[-1] == (9 if budget >= 15 else 3)
    assert [row["epochs_spent"] for row in search.history] == sorted(row["epochs_spent"] for row in search.history)
    assert search.history[-1]["epochs_spent"] == result.epochs_spent


def test_a_repeated_allocation_is_looked_up():
    trainer = Trainer()
    problem = small_problem((1, 1), 1)  # two allocations in all
    search = RegrowthPolicyGradient(problem, trainer, SMALL, seed=0)
    search.run()
    assert len(trainer.calls) == len(set(trainer.calls)) <= 2 * 3
    assert sum(1 - row["cached"] for row in search.history) == len(trainer.calls)
    rows = [row for row in search.history if row["source"] == "rl"]
    assert len(rows) == 24 and {row["allocation"] for row in rows} == {(1, 0), (0, 1)}
    assert len({(row["allocation"], row["reward"]) for row in rows}) == 2


@pytest.mark.parametrize(("capacities", "budget"), [((0, 0), 5), ((3, 4), 0), ((2, 0, 3), 99)])
def test_a_problem_with_one_solution_is_searched_without_complaint(capacities, budget):
    result = RegrowthPolicyGradient(small_problem(capacities, budget), Trainer(), SMALL, seed=0).run()
    assert result.allocation == tuple(min(c, budget) for c in capacities) and result.fidelity == 9
    assert result.epochs_spent == 1 + 3 + 9


def test_single_fidelity_is_the_published_search():
    trainer = Trainer()
    config = SearchConfig(num_epochs=4, batch_size=2, rungs=(50,), search_budget=None, warm_start=False,
                          action_space="ratio")
    search = RegrowthPolicyGradient(small_problem(), trainer, config, seed=0)
    result = search.run()
    assert {epochs for _, epochs in trainer.calls} == {50} and result.fidelity == 50 and result.episodes == 8
    assert {row["source"] for row in search.history} == {"rl"}
    assert result.reward == max(row["reward"] for row in search.history)


def test_warm_start_adds_candidates_and_leaves_the_controller_alone():
    configs = (SearchConfig(num_epochs=5, hidden_size=8, search_budget=None, warm_start=warm, action_space="ratio")
               for warm in (True, False))
    warm, cold = (RegrowthPolicyGradient(small_problem(), Trainer(), config, seed=4) for config in configs)
    warm.run()
    cold.run()
    assert [row["source"] for row in warm.history[:4]] == ["proportional", "uniform", "greedy", "erk"]
    assert warm.history[2]["allocation"] == (6, 6, 0, 0, 0)
    for a, b in zip(warm.agent.parameters(), cold.agent.parameters(), strict=True):
        assert torch.equal(a, b)


def without_seconds(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def assert_same_search(a: RegrowthPolicyGradient, b: RegrowthPolicyGradient) -> None:
    assert without_seconds(a.history) == without_seconds(b.history)
    assert a.baseline == b.baseline and a.epoch == b.epoch and a.ladder.rewards == b.ladder.rewards
    assert torch.equal(a.state_dict()["sampler"], b.state_dict()["sampler"])
    for x, y in zip(a.agent.parameters(), b.agent.parameters(), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(a.optimizer.state.values(), b.optimizer.state.values(), strict=True):
        assert all(torch.equal(x[key], y[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("budget", [None, 90])
def test_resume_from_any_update_is_bit_for_bit(tmp_path, budget):
    config = SearchConfig(num_epochs=8, batch_size=3, hidden_size=8, search_budget=budget)
    straight = RegrowthPolicyGradient(small_problem(), Trainer(), config, seed=2)
    states = [straight.state_dict()]
    result = straight.run(on_epoch=lambda epoch: states.append(straight.state_dict()))
    assert len(states) > 4
    for number, state in enumerate([*states, straight.state_dict()]):
        save_checkpoint(state, tmp_path / f"{number}.pth")
        resumed = RegrowthPolicyGradient(small_problem(), Trainer(), config, seed=2)
        resumed.load_state_dict(load_checkpoint(tmp_path / f"{number}.pth"))
        assert resumed.run() == result
        assert_same_search(straight, resumed)


def test_an_interrupted_search_repeats_no_training():
    straight = RegrowthPolicyGradient(small_problem(), Trainer(), SMALL, seed=3)
    straight.run()
    total = len(straight.evaluate.calls)
    for stop_at in (0, 2, 5, 17, total - 5, total - 1):
        stopped = RegrowthPolicyGradient(small_problem(), Trainer(stop_at), SMALL, seed=3)
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
        resumed = RegrowthPolicyGradient(small_problem(), Trainer(), SMALL, seed=3)
        resumed.load_state_dict(stopped.state_dict())
        resumed.run()
        assert_same_search(straight, resumed)
        assert len(resumed.evaluate.calls) == total - stop_at


class Shuffled(World):
    """Finishes the trials of a round in any order, as several processes do; keeps how many there were."""

    def __init__(self, seed: int):
        self.order, self.rounds = np.random.default_rng(seed), []

    def run(self, function, jobs, on_result):
        self.rounds.append(len(jobs))
        for number in self.order.permutation(len(jobs)):
            on_result(int(number), function(*jobs[number]), 0.0)


@pytest.mark.parametrize("budget", [None, 90])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_which_the_trials_of_a_round_end_changes_nothing(budget, seed):
    straight, shuffled, resumed = (
        RegrowthPolicyGradient(small_problem(), Trainer(), replace(SMALL, search_budget=budget), 3, world)
        for world in (World(), Shuffled(seed), Shuffled(seed + 9)))
    straight.run()
    saved: list[dict] = []
    shuffled.run(on_trial=lambda: saved.append(shuffled.state_dict()))
    assert_same_search(straight, shuffled)
    assert [len(state["known"]) for state in saved] == list(range(1, len(straight.evaluate.calls) + 1))
    assert any(len(state["history"]) < len(state["known"]) for state in saved)  # rows wait for those before
    resumed.load_state_dict(saved[len(saved) // 2])
    resumed.run()
    assert_same_search(straight, resumed)
    assert len(resumed.evaluate.calls) == len(saved) - len(saved) // 2 - 1


def test_a_round_is_the_rules_a_batch_or_a_rung():
    """Of five equal layers two of the five rules differ; at the end the best 4 of 11 and both rules go to the second
    rung, and 2 of these 6 to the top.
    """
    world = Shuffled(0)
    search = RegrowthPolicyGradient(small_problem((90,) * 5, 200), Trainer(), replace(SMALL, num_epochs=3), 3, world)
    search.run()
    assert world.rounds == [2, 3, 3, 3, 6, 2]
    assert [row["fidelity"] for row in search.history] == [1] * 14 + [3] * 6 + [9] * 2
    assert [row["epoch"] for row in search.history] == [0] * 8 + [1] * 3 + [2] * 3 + [3] * 8


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_a_search_that_is_interrupted_again_while_it_catches_up_repeats_no_training():
    straight, first, second, third = (RegrowthPolicyGradient(small_problem(), Trainer(stop_at), SMALL, seed=3)
                                      for stop_at in (None, 8, None, None))
    straight.run()
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second.load_state_dict(first.state_dict())
    with pytest.raises(KeyboardInterrupt):
        second.run(on_episode=interrupt)
    third.load_state_dict(second.state_dict())
    third.run()
    assert not second.evaluate.calls and len(third.evaluate.calls) == len(straight.evaluate.calls) - 8
    assert_same_search(straight, third)


def test_every_episode_is_on_disk_once_it_is_over(tmp_path):
    """So that a kill, after which nothing can be saved, loses the running one alone."""
    search = RegrowthPolicyGradient(small_problem(), Trainer(stop_at=9), SMALL, seed=3)
    with pytest.raises(KeyboardInterrupt):
        run_search(search, tmp_path / "search", {}, 1, 0.9)
    (latest, *_) = saved_searches(tmp_path / "search").values()
    assert set(load_checkpoint(latest)["search"]["known"]) == set(search.evaluate.calls)
    assert len(read_csv(tmp_path / "search.csv", {}, "")) == len(search.history)


def test_one_checkpoint_in_save_freq_updates_is_kept_and_the_latest(tmp_path):
    config = replace(SMALL, num_epochs=5)
    run_search(RegrowthPolicyGradient(small_problem(), Trainer(), config, seed=3), tmp_path / "search", {}, 2, 0.9)
    assert list(saved_searches(tmp_path / "search")) == [5, 4, 2]


def test_a_search_can_go_on_for_longer_but_not_be_another_one():
    search = RegrowthPolicyGradient(small_problem(), Trainer(), SMALL, seed=0)
    search.run()

    def resumed(problem=search.problem, seed=0, **change):
        other = RegrowthPolicyGradient(problem, Trainer(), SearchConfig(**{**vars(SMALL), **change}), seed)
        other.load_state_dict(search.state_dict())
        return other

    longer = resumed(num_epochs=12)
    longer.run()
    assert longer.epoch == 12 and not set(longer.evaluate.calls) & set(search.evaluate.calls)
    for change, complaint in [({"eta": 4}, r"eta 3 \(asked: 4\)"), ({"seed": 1}, r"seed 0 \(asked: 1\)"),
                              ({"problem": small_problem(budget=11)}, r"budget 12 \(asked: 11\)")]:
        with pytest.raises(UserError, match=complaint):
            resumed(**change)


@pytest.mark.parametrize("reward", [93.5, -0.1, float("nan")])
def test_a_reward_that_is_no_fraction_is_refused(reward):
    with pytest.raises(ValueError, match="fraction"):
        RegrowthPolicyGradient(small_problem(), lambda *_: reward, SMALL, seed=0).run()


@pytest.mark.parametrize("change", [
    {"num_epochs": 0}, {"batch_size": 0}, {"action_space_size": 1}, {"eta": 1}, {"learning_rate": 0.0},
    {"reward_temperature": -1.0}, {"decay_fraction": 1.5}, {"baseline_decay": -0.1}, {"rungs": ()}, {"rungs": (3, 1)},
    {"rungs": (-1, 1)}, {"rungs": (0, 1)}, {"action_space": "shares"}, {"rungs": (2, 2)},
])
def test_impossible_configurations_are_refused_by_name(change):
    with pytest.raises(UserError, match=next(iter(change))):
        SearchConfig(**change)


def test_a_budget_below_one_batch_is_refused():
    config = SearchConfig(batch_size=3, rungs=(50,), search_budget=149)
    with pytest.raises(UserError, match="3 candidates for 50 epochs take 150"):
        RegrowthPolicyGradient(small_problem(), Trainer(), config, seed=0)


def test_the_published_search_is_what_the_readme_says():
    """The options are read from the README's own sentence."""
    readme = " ".join((Path(__file__).resolve().parents[1] / "README.md").read_text().split())
    words = readme.split("The published search")[1].split("is exactly `")[1].split("`")[0].split()
    config = parse_regrowth_args("reference", "", ["--m_name", "resnet20", *words]).search
    assert config == SearchConfig(num_epochs=500, batch_size=1, learning_rate=5e-3, rungs=(50,), search_budget=None,
                                  warm_start=False, action_space="ratio")
    trainer = Trainer()
    search = RegrowthPolicyGradient(small_problem(), trainer, replace(config, num_epochs=5), seed=0)
    assert search.run().episodes == 5 and {row["source"] for row in search.history} == {"rl"}
    assert {epochs for _, epochs in trainer.calls} == {50}
    assert parse_regrowth_args("saliency", "", ["--m_name", "resnet20"]).search == SearchConfig()


def test_shares_by_hand():
    """Shares 0.2, 0.3, 0.5; factors 0, 0.5, 0.7, 1, 1.4, 2, so with actions 3, 5, 0 the budget is divided 2 to 6."""
    space = ShareActions(small_problem((20, 30, 50), 10), 6, [0.2, 0.3, 0.5])
    assert space.factors == pytest.approx([0, 0.5, 0.5 ** 0.5, 1, 2 ** 0.5, 2])
    assert [space.allocation(actions) for actions in ([3, 3, 3], [1, 1, 1], [0, 0, 0])] == [(2, 3, 5)] * 3
    assert space.allocation([3, 5, 0]) == (3, 7, 0)  # 2.5 and 7.5; equal remainders go by position
    assert [space.taken(5, 1, left) for left in (10, 4)] == [6, 4]
    assert space.decides(0, 0) and not ShareActions(small_problem((0, 9), 3), 6, [0.0, 1.0]).decides(0, 3)


def test_many_actions_have_a_prior_and_too_many_are_refused():
    problem = small_problem((20, 30, 50), 10)
    space = ShareActions(problem, 1000, [0.2, 0.3, 0.5])
    assert ShareActions.prior(1000).isfinite().all() and sum(space.allocation([999, 1, 500])) == 10
    with pytest.raises(UserError, match="--action_space_size 1001 is too many.*1000 or fewer"):
        ShareActions(problem, 1001, [0.2, 0.3, 0.5])


def test_every_share_allocation_spends_the_budget_within_the_capacities():
    draws = np.random.default_rng(0)
    for _ in range(100):
        problem = small_problem(tuple(draws.integers(0, 20, 6).tolist()), int(draws.integers(0, 60)))
        space = ShareActions(problem, 11, shares_near(problem, problem.capacities, 0.5))
        allocation = space.allocation(draws.integers(0, 11, 6).tolist())
        assert sum(allocation) == problem.spend and all(type(part) is int for part in allocation)
        assert all(part <= capacity for part, capacity in zip(allocation, problem.capacities))


def test_a_fresh_controller_spreads_around_the_best_rule():
    problem = small_problem((400, 800, 1200, 2000), 400)
    uniform = (100, 100, 100, 100)

    def reward(allocation, seed, epochs):
        return 0.9 - sum(abs(a - b) for a, b in zip(allocation, uniform)) / 1000
    search = RegrowthPolicyGradient(problem, reward, replace(SMALL, num_epochs=1, batch_size=2, rungs=(1,)), seed=0)
    search.run()
    space = search._action_space()
    assert space.shares == pytest.approx([0.9 * 0.25 + 0.1 * part / 4400 for part in problem.capacities])
    rollout = search.agent(space, 500, torch.Generator().manual_seed(0))
    middle = np.median(np.array(rollout.allocations), axis=0)
    assert np.allclose(middle, [92, 95, 99, 108], atol=12)
    assert 1.9 < rollout.entropies.mean().item() < 2.2


@pytest.mark.parametrize("seed", range(3))
def test_the_default_search_trains_better_candidates_than_random_ones(seed):
    """Shares that are best far from every rule; 20 candidates of the search against 20 random ones."""
    problem = small_problem((400, 800, 1200, 2000), 400)
    best = np.array([40, 210, 30, 120])

    def reward(allocation, seed, epochs):
        return float(0.9 - np.abs(np.array(allocation) - best).sum() / 1000)
    search = RegrowthPolicyGradient(problem, reward, SearchConfig(), seed)
    result = search.run()
    draws = torch.Generator().manual_seed(seed)
    others = [reward(ALLOCATORS["random"](problem, draws), 0, 1) for _ in range(20)]
    own = [row["reward"] for row in search.history if row["source"] == "rl"]
    assert np.mean(own[-6:]) > np.mean(others) + 0.02
    assert result.reward > max(row["reward"] for row in search.history if row["source"] in ALLOCATORS)


def test_the_surrogate_prefers_what_resembles_the_best_and_repeats_nothing():
    x = np.linspace(-2, 2, 9)
    offered = [[-1.9], [0.6], [0.4], [1.9]]
    chosen = most_promising(x[:, None], np.exp(-(x - 0.5) ** 2), offered, 3)
    assert set(chosen[:2]) == {1, 2} and len(set(chosen)) == 3
    assert len(set(most_promising([[0.0], [1.0]], [0.5, 0.5], offered, 4))) == 4  # equal rewards say nothing


def test_the_surrogate_goes_through_exact_data_and_knows_nothing_far_away():
    x = np.linspace(0, 3, 7)[:, None]
    process = fit(x, np.sin(x[:, 0]))
    mean, deviation = process.predict(np.array([[1.25], [40.0]]))
    assert mean[0] == pytest.approx(math.sin(1.25), abs=0.05) and mean[1] == pytest.approx(np.sin(x).mean(), abs=1e-6)
    assert deviation[1] == pytest.approx(process.scale) and deviation[0] < 0.2 * deviation[1]


def test_fractions_of_an_epoch_are_rungs():
    trainer = Trainer()
    config = SearchConfig(num_epochs=4, hidden_size=8, rungs=(0.1, 0.25, 1), search_budget=5)
    search = RegrowthPolicyGradient(small_problem(), trainer, config, seed=0)
    result = search.run()
    assert {epochs for _, epochs in trainer.calls} == {0.1, 0.25, 1} and result.fidelity == 1
    assert result.epochs_spent == pytest.approx(sum(epochs for _, epochs in trainer.calls)) and result.epochs_spent <= 5
    assert max(len(repr(row["epochs_spent"])) for row in search.history) <= 5  # 0.3, not 0.30000000000000004


def test_a_search_of_an_earlier_version_goes_on_as_published():
    config = replace(SMALL, action_space="ratio")
    search = RegrowthPolicyGradient(small_problem(), Trainer(), config, seed=0)
    search.run()
    state = search.state_dict()
    del state["config"]["action_space"]
    RegrowthPolicyGradient(small_problem(), Trainer(), config, seed=0).load_state_dict(state)
    with pytest.raises(UserError, match=r"action_space ratio \(asked: share\)"):
        RegrowthPolicyGradient(small_problem(), Trainer(), SMALL, seed=0).load_state_dict(state)
