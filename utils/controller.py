"""The search for how many weights each layer gets back: an LSTM controller learns from the rewards of its episodes.

An episode is an allocation and its reward. The controller samples allocations (`RegrowthAgent`), `evaluate` trains and
measures them, and REINFORCE moves the controller towards the better ones (`RegrowthPolicyGradient`). Every episode is
trained for the few epochs of the first rung, and only those that stay ahead for more (`Ladder`); the controller learns
from the first rung alone, where all rewards are comparable. A trial that was paid for is looked up, never trained
again.

The search goes in rounds: the plain rules, then each batch of episodes, at last, rung by rung, those that have earned
more epochs and the best rules, to compare with. All trials of a round are trained side by side by the processes there
are (`World`). Decisions fall between rounds, so that the number of processes changes nothing but the time.

Few episodes teach an LSTM little. So by default the controller starts around the best of the plain rules, and of many
episodes that it samples those are trained which a surrogate of the trials so far finds `most_promising`. REINFORCE then
learns from chosen episodes, not from a fair sample. The published search, with ratios for actions, has neither.
"""
from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.agent import (
    ACTION_SPACES,
    ActionSpace,
    Allocation,
    Ladder,
    RatioActions,
    RegrowthAgent,
    Rollout,
    ShareActions,
    Trial,
    most_promising,
)
from utils.allocation import ALLOCATORS, AllocationProblem, allocate, proportional, shares_near
from utils.common import UserError, derive_seed, generator
from utils.distributed import World

ADVANTAGE_LIMIT = 100.0
WARM_START = tuple(name for name in ALLOCATORS if name != "random")
MAY_CHANGE = {"num_epochs", "search_budget"}  # of the configuration, when a search is resumed
TOWARDS_PROPORTIONAL = 0.1  # how far the shares of the best rule are moved, so that no layer's is 0
SCREENED = 128  # episodes that are sampled for each batch, of which the surrogate picks the most promising
REMEMBERED = 200  # trials, the latest, that the surrogate is made from

Evaluate = Callable[[Allocation, int, float], float]  # (allocation, seed, epochs) -> reward in [0, 1]
Row = dict[str, Any]


@dataclass(frozen=True)
class SearchConfig:
    """How to search; the command line's flags of the same names.

    Attributes:
        num_epochs: controller updates.
        batch_size: episodes per update.
        learning_rate: Adam's, for the controller.
        hidden_size, action_space_size: of the `RegrowthAgent`.
        reward_temperature: a reward this much above the baseline has advantage 1.
        start_beta, end_beta, decay_fraction: weight of the entropy bonus (mean per decision, nats), see `beta`.
        baseline_decay: weight of the past in the moving average of the rewards.
        rungs: epochs of mini-finetuning, increasing, fractions allowed; every candidate gets the first, those ahead
            the next ones. One rung means no halving (published: 50).
        eta: one in eta candidates goes on to the next rung.
        search_budget: epochs over all candidates and rungs, None for no limit.
        action_space: name in `ACTION_SPACES`. With `share` a fresh controller spreads around the best rule, and a
            surrogate picks its most promising new episodes; `ratio` is the published search.
        warm_start: the deterministic allocations (proportional, uniform, greedy, ERK, magnitude) are candidates too.
            The controller does not learn from them. False (`--no_warm_start`): the published search, without them.

    The defaults are a small budget: 60 epochs pay about 20 candidates for 1 epoch, 6 for 3 and 2 for 9. Raises
    UserError for values that make no sense.
    """

    num_epochs: int = 10
    batch_size: int = 2
    learning_rate: float = 5e-3
    hidden_size: int = 64
    action_space_size: int = 11
    reward_temperature: float = 0.005
    start_beta: float = 0.4
    end_beta: float = 0.04
    decay_fraction: float = 0.4
    baseline_decay: float = 0.9
    rungs: tuple[float, ...] = (1, 3, 9)
    eta: int = 3
    search_budget: int | None = 60
    warm_start: bool = True
    action_space: str = "share"

    def __post_init__(self) -> None:
        """Checks on entry."""
        least_values = {"num_epochs": 1, "batch_size": 1, "hidden_size": 1, "action_space_size": 2, "eta": 2}
        for name, least in least_values.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("learning_rate", "reward_temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("decay_fraction", "baseline_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be between 0 and 1")
        if self.action_space not in ACTION_SPACES:
            raise UserError(f"action_space is {self.action_space}; it must be {' or '.join(ACTION_SPACES)}")
        if not self.rungs or self.rungs[0] <= 0 or list(self.rungs) != sorted(set(self.rungs)):
            raise UserError(f"rungs, the epochs of an episode (--mini_finetune_epochs), are {self.rungs}; they must "
                            "be positive and increasing, such as 1 3 9")

    def beta(self, epoch: int) -> float:
        """Weight of the entropy bonus: linear from start_beta to end_beta over the first decay_fraction of updates."""
        span = self.decay_fraction * self.num_epochs
        progress = min(1.0, epoch / span) if span > 0 else 1.0
        return (1 - progress) * self.start_beta + progress * self.end_beta

    def ladder(self) -> Ladder:
        """The rungs that trials climb; UserError where the budget pays no batch."""
        return Ladder(self.rungs, self.eta, self.search_budget, self.batch_size)


class SearchResult(NamedTuple):
    """What a search found: the best allocation, its reward after `fidelity` epochs, episodes run, epochs trained."""

    allocation: Allocation
    reward: float
    fidelity: float
    episodes: int
    epochs_spent: float


def scaled_advantages(rewards: Tensor, baseline: float, temperature: float) -> Tensor:
    """(reward - baseline) / temperature, clipped to ± `ADVANTAGE_LIMIT`; same shape as `rewards`."""
    return ((rewards - baseline) / temperature).clamp(-ADVANTAGE_LIMIT, ADVANTAGE_LIMIT)


class Episode(NamedTuple):
    """What a round is to look up or train, who asked for it, and the entropy of the controller's decisions."""

    trial: Trial
    source: str
    entropy: float | None = None


class RegrowthPolicyGradient:
    """REINFORCE over allocations; can be stopped anywhere and continued bit for bit on the CPU.

    Args:
        problem: layers, capacities and budget.
        evaluate: (allocation, seed, epochs) -> reward in [0, 1], a pure function of these three.
        config: see `SearchConfig`.
        seed: determines the search together with `evaluate`; every episode gets this same seed, so that allocations
            are compared under the same random numbers.

    `history` has a dict per evaluation: episode (from 1), epoch (controller updates before it), source ('rl', the name
    of a warm-start allocation, or 'promotion'), reward, best (highest reward at this fidelity so far), baseline (None
    before the first update), entropy (nats per decision) and beta (both None where the controller had no part),
    fidelity (epochs), cached (0 or 1), epochs_spent (so far, this one included), seconds, allocation.
    """

    def __init__(self, problem: AllocationProblem, evaluate: Evaluate, config: SearchConfig, seed: int,
                 world: World | None = None):
        """A search that has not begun. world: the processes that train its trials; default: this one alone."""
        self.problem, self.evaluate, self.config, self.seed = problem, evaluate, config, seed
        self.world = world or World()
        self.agent = RegrowthAgent(config.action_space_size, config.hidden_size, derive_seed(seed, "controller"),
                                   config.action_space)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), config.learning_rate)
        self.ladder = config.ladder()
        self.epoch = 0
        self.baseline: float | None = None
        self.history: list[Row] = []
        self._sampler = generator(seed, "controller", "actions")
        self._known: dict[Trial, float] = {}  # all that were trained, those of a saved search too
        self._seconds: dict[Trial, float] = {}  # that this run's trials took
        self._settle()

    def run(self, on_episode: Callable[[Row], None] | None = None, on_epoch: Callable[[int], None] | None = None,
            on_trial: Callable[[], None] | None = None) -> SearchResult:
        """Searches from where it stands to the end of `num_epochs` or of the budget.

        Args:
            on_episode: called with each new row of `history`; rows come in the order of their round.
            on_epoch: called after each controller update with the number of updates.
            on_trial: called whenever a trial has been trained, after the rows that this allowed; with several
                processes from another thread, while `run` waits or trains.

        `state_dict` may be taken in all of them, and after an interruption.
        """
        self._on_episode, self._on_trial = on_episode or (lambda row: None), on_trial or (lambda: None)
        if self.config.warm_start and not self.history:
            self._round(self._deterministic())
        while self.epoch < self.config.num_epochs and self._update():
            if on_epoch:
                on_epoch(self.epoch)
        rules = {row["allocation"] for row in self._rules()}
        while trials := self.ladder.promotions(rules):
            self._round([Episode(trial, "promotion") for trial in trials])
        allocation, fidelity = leader = self.ladder.leader()
        self._settle()
        return SearchResult(allocation, self.ladder.reward(leader), fidelity, len(self.history), self.ladder.spent)

    def state_dict(self) -> dict[str, Any]:
        """Everything that continues the search, from its last controller update on; tensors and plain containers.

        The rows of `history` after the first `settled` ones came since: a search that loads this runs their episodes
        again, but looks their rewards up in `known`.
        """
        return {
            "problem": asdict(self.problem), "config": asdict(self.config), "seed": self.seed,
            "agent": copy.deepcopy(self.agent.state_dict()), "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "sampler": self._settled_sampler, "epoch": self.epoch, "baseline": self.baseline,
            "history": list(self.history), "settled": self._settled, "rewards": self.ladder.state_dict(),
            "known": dict(self._known),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved search. Raises UserError if it was for another problem, configuration or seed.

        `num_epochs` and `search_budget` may differ, to search on.
        """
        requested = {"seed": self.seed, **asdict(self.problem), **asdict(self.config)}
        older = {"action_space": "ratio", "lacking": self.problem.lacking}  # what saved searches did not name
        saved = {"seed": state["seed"], **older, **state["problem"], **state["config"]}
        differ = [f"{key} {saved.get(key)} (asked: {requested[key]})" for key in requested.keys() - MAY_CHANGE
                  if saved.get(key) != requested[key]]
        if differ:
            raise UserError(f"the saved search was made with other arguments: {', '.join(sorted(differ))}")
        self.agent.load_state_dict(state["agent"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self._sampler.set_state(state["sampler"])
        self.epoch, self.baseline = state["epoch"], state["baseline"]
        settled = state.get("settled", len(state["history"]))  # checkpoints of earlier versions: all rows
        self.history = state["history"][:settled]
        for row in self.history:
            self.ladder.record((row["allocation"], row["fidelity"]), row["reward"])
        self._known = dict(state["known"])
        self._settle()

    def _settle(self) -> None:
        """Marks where a saved search resumes; only between such marks do controller and generator change."""
        self._settled, self._settled_sampler = len(self.history), self._sampler.get_state()

    def _update(self) -> bool:
        """One round with a batch, and one step of the controller; False, without either, if the batch is too dear."""
        rollout = self._sample(self._action_space())
        entropies = rollout.entropies.detach().sum(dim=1) / rollout.decides.sum(dim=1).clamp(min=1)
        batch = [Episode((allocation, self.ladder.rungs[0]), "rl", entropy)
                 for allocation, entropy in zip(rollout.allocations, entropies.tolist(), strict=True)]
        if not self.ladder.affords(episode.trial for episode in batch):
            self._sampler.set_state(self._settled_sampler)
            return False
        self._learn(rollout, self._round(batch))
        self.epoch += 1
        self._settle()
        return True

    def _deterministic(self) -> list[Episode]:
        """The rules' allocations, as many as the budget pays; the first batch starts from the best."""
        episodes: list[Episode] = []
        for name in WARM_START:
            trial = allocate(name, self.problem, self._sampler), self.ladder.rungs[0]
            if self.ladder.affords([*(episode.trial for episode in episodes), trial]):
                episodes.append(Episode(trial, name))
        return episodes

    def _rules(self) -> list[Row]:
        return [row for row in self.history if row["source"] in ALLOCATORS]

    def _action_space(self) -> ActionSpace:
        """What actions mean: shares are those of the rule that was best at the first rung, if any was tried."""
        number = self.config.action_space_size
        if self.config.action_space == "ratio":
            return RatioActions(self.problem, number)
        best = max(self._rules(), key=lambda row: row["reward"], default=None)
        best = best["allocation"] if best else proportional(self.problem, self._sampler)
        return ShareActions(self.problem, number, shares_near(self.problem, best, TOWARDS_PROPORTIONAL))

    def _sample(self, space: ActionSpace) -> Rollout:
        """A batch of episodes; with shares the most promising new ones of many, once two candidates are known."""
        number, seen = self.config.batch_size, self.ladder.rewards[self.ladder.rungs[0]]
        if isinstance(space, RatioActions):
            return self.agent(space, number, self._sampler)
        rollout = self.agent(space, max(SCREENED, 2 * number), self._sampler)
        sampled = rollout.allocations
        new = [row for row, allocation in enumerate(sampled) if allocation not in {*seen, *sampled[:row]}]
        if len(new) < number or len(seen) < 2:  # hardly another is possible, or nothing to make a surrogate from
            return rollout.part([*new, *range(number)][:number])
        latest = list(seen)[-REMEMBERED:]
        chosen = most_promising([self._place(allocation) for allocation in latest], list(map(seen.get, latest)),
                                [self._place(sampled[row]) for row in new], number)
        return rollout.part([new[choice] for choice in chosen])

    def _place(self, allocation: Allocation) -> list[float]:
        """Where an allocation lies for the surrogate: the logarithms of its shares, none 0."""
        return [math.log(share) for share in shares_near(self.problem, allocation, TOWARDS_PROPORTIONAL) if share > 0]

    def _learn(self, rollout: Rollout, rewards: list[float]) -> None:
        """A step of REINFORCE: gain is the advantage times the log-probability of the whole episode (a sum over its
        decisions), the entropy bonus the mean over all decisions that had an effect. Then the baseline follows (it
        starts as the first batch's mean).
        """
        mean = sum(rewards) / len(rewards)
        baseline = mean if self.baseline is None else self.baseline
        advantages = scaled_advantages(torch.tensor(rewards), baseline, self.config.reward_temperature)
        gain = (advantages * rollout.log_probs.sum(dim=1)).mean()
        decisions = rollout.decides.sum().clamp(min=1)
        bonus = self.config.beta(self.epoch) * rollout.entropies.sum() / decisions  # the mean per decision
        self.optimizer.zero_grad()
        (-gain - bonus).backward()
        self.optimizer.step()
        self.baseline = self.config.baseline_decay * baseline + (1 - self.config.baseline_decay) * mean

    def _round(self, episodes: Sequence[Episode]) -> list[float]:
        """Trains side by side what is new among the trials; rows and rewards in the order of the episodes."""
        waiting = deque(episodes)
        new = [trial for trial in dict.fromkeys(episode.trial for episode in episodes) if trial not in self._known]

        def keep(number: int, reward: float, seconds: float) -> None:
            if not 0 <= reward <= 1:
                raise ValueError(f"a reward must be an accuracy as a fraction between 0 and 1, not {reward}")
            self._known[new[number]] = reward
            self._seconds[new[number]] = seconds
            self._write_rows(waiting)
            self._on_trial()
        self._write_rows(waiting)
        self.world.run(self.evaluate, [(allocation, self.seed, epochs) for allocation, epochs in new], keep)
        return [self.ladder.reward(episode.trial) for episode in episodes]

    def _write_rows(self, waiting: deque[Episode]) -> None:
        """Takes episodes from the front, as far as their rewards are known, and writes their rows."""
        while waiting and waiting[0].trial in self._known:
            trial, source, entropy = waiting.popleft()
            allocation, fidelity = trial
            cached = self.ladder.reward(trial) is not None
            reward = self._known[trial]
            self.ladder.record(trial, reward)
            self.history.append({
                "episode": len(self.history) + 1, "epoch": self.epoch, "source": source, "reward": reward,
                "best": max(self.ladder.rewards[fidelity].values()), "baseline": self.baseline, "entropy": entropy,
                "beta": None if entropy is None else self.config.beta(self.epoch), "fidelity": fidelity,
                "cached": int(cached), "epochs_spent": self.ladder.spent,
                "seconds": 0.0 if cached else self._seconds.get(trial, 0.0), "allocation": allocation,
            })
            self._on_episode(self.history[-1])
