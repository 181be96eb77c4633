"""What a search decides with: the controller's network, the surrogate and the ladder of trials.

The network is an LSTM that walks through the layers and says for each how much of the budget it gets. What its actions
mean is an action space: `ShareActions`, factors around the shares of a plain rule, or the published `RatioActions`,
ratios of what a layer could take. The surrogate says which of many allocations are worth training: a Gaussian process
over the trials so far (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006: posterior eq. 2.25, 2.26,
marginal likelihood eq. 2.30; expected improvement: Jones, Schonlau and Welch, 1998). The ladder says which of those
that were trained are trained for longer.
"""
from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from utils.allocation import AllocationProblem, apportion, ratios_to_allocation, spend_ratio
from utils.common import UserError, generator

Allocation = tuple[int, ...]
Trial = tuple[Allocation, float]  # what is trained, for how many epochs
SPREAD = 1.0  # standard deviation, in octaves, of a fresh `share` controller's factors around 1
ZERO_LOGIT = -3.0  # of the factor 0, before anything is learned; a factor of 1 has 0
LENGTHS = (0.3, 0.5, 1.0, 2.0)  # of the kernel, in root mean square differences of features
NOISES = (0.1, 0.3, 1.0)  # standard deviation of a reward's error, in those of the process
WORST = -2.0  # lower limit of a reward, in standard deviations from the median
ROUNDED = 9  # decimals that sums of fractional epochs are rounded to (floating-point error)

# --- the network -----------------------------------------------------------------------------------------------------


class RatioActions:
    """The published actions: ratios, evenly spaced in [0, 1], of what a layer could take when its turn comes."""

    def __init__(self, problem: AllocationProblem, number: int):
        """number: of ratios."""
        self.problem, self.ratios = problem, [action / (number - 1) for action in range(number)]

    @staticmethod
    def prior(number: int) -> Tensor | None:
        """Logits that a fresh controller starts from; None: random ones."""
        return None

    def decides(self, position: int, left: int) -> bool:
        """Whether the action has an effect: the layer has capacity, and some of the budget is left."""
        return self.problem.capacities[position] > 0 and left > 0

    def taken(self, action: int, position: int, left: int) -> int:
        """Weights that the layer takes of those left."""
        return spend_ratio(self.ratios[action], self.problem.capacities[position], left)

    def allocation(self, actions: Sequence[int]) -> Allocation:
        """What the actions of all layers come to, see `ratios_to_allocation`."""
        return ratios_to_allocation([self.ratios[action] for action in actions], self.problem.capacities,
                                    self.problem.budget)


class ShareActions:
    """Factors around each layer's share: 0, and powers of the root of two with 1 among them.

    The budget is divided in proportion to factor times share (`apportion`), so that only the factors' relation counts
    and all of one factor is the rule itself.
    """

    def __init__(self, problem: AllocationProblem, number: int, shares: Sequence[float]):
        """number: of factors; shares: one per layer, in all 1, positive where there is capacity."""
        self.problem, self.factors, self.shares = problem, self._factors(number), shares

    @staticmethod
    def _factors(number: int) -> list[float]:
        if number > 1000:  # the largest would overflow
            raise UserError(f"--action_space_size {number} is too many for --action_space share; take 1000 or fewer")
        return [0.0] + [2 ** ((action - number // 2) / 2) for action in range(1, number)]

    @classmethod
    def prior(cls, number: int) -> Tensor:
        """Logits of a normal distribution (`SPREAD`) of the factor's logarithm around that of 1, and `ZERO_LOGIT`."""
        octaves = torch.tensor([math.log2(factor) for factor in cls._factors(number)[1:]])
        return torch.cat([torch.tensor([ZERO_LOGIT]), -(octaves / SPREAD) ** 2 / 2])

    def decides(self, position: int, left: int) -> bool:
        """Whether the action has an effect: the layer has capacity, and there is a budget."""
        return self.problem.capacities[position] > 0 and self.problem.spend > 0

    def taken(self, action: int, position: int, left: int) -> int:
        """Weights that the layer would take of those left if the others took their shares."""
        wanted = math.floor(self.factors[action] * self.shares[position] * self.problem.spend + 0.5)
        return min(wanted, self.problem.capacities[position], left)

    def allocation(self, actions: Sequence[int]) -> Allocation:
        """What the actions of all layers come to."""
        parts = [self.factors[action] * share for action, share in zip(actions, self.shares, strict=True)]
        return tuple(apportion(parts, self.problem.budget, self.problem.capacities))


ActionSpace = RatioActions | ShareActions
ACTION_SPACES: dict[str, type[ActionSpace]] = {"share": ShareActions, "ratio": RatioActions}


class Rollout(NamedTuple):
    """A batch of episodes; the tensors are (episodes, layers)."""

    actions: Tensor
    log_probs: Tensor
    entropies: Tensor
    decides: Tensor  # False where the action is without effect
    allocations: list[Allocation]

    def part(self, episodes: Sequence[int]) -> Rollout:
        """Some of the episodes, by number."""
        rows = list(episodes)
        return Rollout(*(column[rows] for column in self[:4]), [self.allocations[row] for row in rows])


class RegrowthAgent(nn.Module):
    """LSTM cell that walks through the layers and picks an action for each.

    Input: the previous layer's logits ++ (position, capacity fraction, remaining-budget fraction); output: logits over
    `action_space_size` actions. `seed` determines the initial weights, which are uniform within ± 1/sqrt(hidden_size)
    (PyTorch's default for both parts); the head's biases are those of `action_space` where it has a prior.
    """

    def __init__(self, action_space_size: int = 11, hidden_size: int = 64, seed: int = 0, action_space: str = "ratio"):
        """Builds the network without touching the global random numbers. action_space: a name in `ACTION_SPACES`."""
        super().__init__()
        self.cell = nn.utils.skip_init(nn.LSTMCell, action_space_size + 3, hidden_size)
        self.head = nn.utils.skip_init(nn.Linear, hidden_size, action_space_size)
        weights = generator(seed, "agent")
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -hidden_size ** -0.5, hidden_size ** -0.5, generator=weights)
        if (prior := ACTION_SPACES[action_space].prior(action_space_size)) is not None:
            self.head.bias.data.copy_(prior)

    @property
    def action_space_size(self) -> int:
        """Number of actions to choose from."""
        return self.head.out_features

    def forward(self, space: ActionSpace, episodes: int, sampler: torch.Generator) -> Rollout:
        """Samples a batch of episodes, layer by layer, since the remaining budget depends on what was sampled.

        Args:
            space: what actions mean for the problem, whose layers are in order of priority. The capacity fraction is
                the layer's share of the total capacity.
            episodes: batch size.
            sampler: CPU generator the actions are drawn from.

        Returns:
            A `Rollout`; log-probabilities (of the sampled actions) and entropies (nats) carry gradients and are zero
            where the action is without effect.
        """
        logits = torch.zeros(episodes, self.action_space_size)
        state = None
        remaining = [space.problem.spend] * episodes
        steps = []
        for position in range(len(space.problem.layers)):
            features = torch.cat([logits, _features(space.problem, position, remaining)], dim=1)
            state = self.cell(features, state)
            logits = self.head(state[0])
            log_p = logits.log_softmax(dim=1)
            action = torch.multinomial(log_p.detach().exp(), 1, generator=sampler)
            decides = torch.tensor([space.decides(position, left) for left in remaining])
            steps.append((action[:, 0], log_p.gather(1, action)[:, 0] * decides,
                          -(log_p.exp() * log_p).sum(dim=1) * decides, decides))
            remaining = [left - space.taken(chosen, position, left)
                         for left, chosen in zip(remaining, action[:, 0].tolist(), strict=True)]
        actions, log_probs, entropies, decides = (torch.stack(column, dim=1) for column in zip(*steps, strict=True))
        return Rollout(actions, log_probs, entropies, decides, [space.allocation(row) for row in actions.tolist()])


def _features(problem: AllocationProblem, position: int, remaining: Sequence[int]) -> Tensor:
    """(episodes, 3): position, capacity fraction and remaining-budget fraction, all in [0, 1]."""
    place = position / len(problem.layers)
    capacity = problem.capacities[position] / max(1, sum(problem.capacities))
    return torch.tensor([[place, capacity, left / max(1, problem.spend)] for left in remaining])


# --- the surrogate ---------------------------------------------------------------------------------------------------


class Process(NamedTuple):
    """A Gaussian process with a squared exponential kernel: its data and the parameters of the highest likelihood."""

    features: np.ndarray  # (points, dimensions)
    values: np.ndarray  # (points,)
    length: float
    noise: float
    scale: float  # standard deviation of the process

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the noise-free value at each of (n, dimensions) features."""
        covariance = _kernel(self.features, self.features, self.length) + self.noise**2 * np.eye(len(self.values))
        across = _kernel(features, self.features, self.length)
        solved = np.linalg.solve(covariance, np.column_stack([self.values - self.values.mean(), across.T]))
        variance = 1 - (across * solved[:, 1:].T).sum(axis=1)
        return across @ solved[:, 0] + self.values.mean(), self.scale * np.sqrt(np.maximum(variance, 1e-12))


def fit(features: np.ndarray, values: np.ndarray) -> Process:
    """The process whose length, noise (of a grid) and scale give (n, dimensions) features and n values most likely."""
    centred, best, found = values - values.mean(), -np.inf, None
    for length, noise in product(LENGTHS, NOISES):
        covariance = _kernel(features, features, length) + noise**2 * np.eye(len(values))
        variance = max(centred @ np.linalg.solve(covariance, centred) / len(values), 1e-12)  # the likeliest, given both
        likelihood = -0.5 * (len(values) * np.log(variance) + np.linalg.slogdet(covariance)[1])
        if likelihood > best:
            best, found = likelihood, Process(features, values, length, noise, float(np.sqrt(variance)))
    return found


def _kernel(first: np.ndarray, second: np.ndarray, length: float) -> np.ndarray:
    squares = ((first[:, None] - second[None]) ** 2).mean(axis=2)
    return np.exp(-squares / (2 * length**2))


def most_promising(seen: Sequence[Sequence[float]], rewards: Sequence[float], candidates: Sequence[Sequence[float]],
                   number: int) -> list[int]:
    """The candidates with the highest expected improvement over the best expected reward so far.

    Greedily, with the predicted mean as reward of earlier picks (kriging believer, Ginsbourger et al., 2010).

    Args:
        seen, candidates: features, (n, dimensions) and (m, dimensions).
        rewards: of the seen ones; n >= 2.
        number: how many, at most m.

    Returns:
        Distinct positions among the candidates.
    """
    from scipy.stats import norm  # takes a while, and no --help needs it

    offered, rewards = np.asarray(candidates, float), np.asarray(rewards, float)
    values = np.maximum((rewards - np.median(rewards)) / (rewards.std() + 1e-12), WORST)
    process, chosen = fit(np.asarray(seen, float), values), []
    for _ in range(number):
        mean, deviation = process.predict(offered)
        gap = (mean - process.predict(process.features)[0].max()) / deviation
        improvement = deviation * (gap * norm.cdf(gap) + norm.pdf(gap))
        improvement[chosen] = -1.0
        chosen.append(int(improvement.argmax()))
        process = process._replace(features=np.vstack([process.features, offered[chosen[-1]]]),
                                   values=np.append(process.values, mean[chosen[-1]]))
    return chosen


# --- the ladder ------------------------------------------------------------------------------------------------------


class Ladder:
    """Rewards per candidate and rung, the epochs they cost, and who goes on to the next rung.

    Once there are no new candidates, the best 1/eta of each rung go on to the next (successive halving, Jamieson and
    Talwalkar, AISTATS 2016). Promoting each new leader while the search still improves would use up the budget of later
    candidates. A trial is trained from the start, so it costs its epochs whatever the candidate had before. `rewards`
    holds every paid trial, {epochs: {allocation: reward}}, in the order of payment: it is the cache and the whole state
    of the ladder.

    rungs: training lengths in epochs, increasing. eta: see above. budget: epochs over all trials, None for no limit.
    batch: candidates that arrive together. Rungs that the best of one batch could not climb to within the budget are
    left out. Raises UserError when the budget does not even pay one batch at the first rung.
    """

    def __init__(self, rungs: Sequence[float], eta: int, budget: int | None = None, batch: int = 1):
        """An empty ladder."""
        limit = math.inf if budget is None else budget
        costs = [round(batch * rungs[0] + sum(rungs[1:level + 1]), ROUNDED) for level in range(len(rungs))]
        if costs[0] > limit:
            raise UserError(f"a search budget of {budget} epochs does not pay one batch: {batch} candidates for "
                            f"{rungs[0]} epochs take {costs[0]:g}; raise the budget or lower the others")
        self.rungs = tuple(rung for rung, cost in zip(rungs, costs) if cost <= limit)
        self.eta = eta
        self.budget = budget
        self.rewards: dict[float, dict[Allocation, float]] = {epochs: {} for epochs in self.rungs}

    @property
    def spent(self) -> float:
        """Epochs over all paid trials."""
        return round(sum(epochs * len(paid) for epochs, paid in self.rewards.items()), ROUNDED)

    def reward(self, trial: Trial) -> float | None:
        """What a trial gave, None if it was not paid for."""
        allocation, epochs = trial
        return self.rewards.get(epochs, {}).get(allocation)

    def record(self, trial: Trial, reward: float) -> None:
        """Pays for a trial; a second time changes nothing."""
        allocation, epochs = trial
        self.rewards.setdefault(epochs, {}).setdefault(allocation, reward)

    def affords(self, trials: Iterable[Trial], *, reserve: float | None = None) -> bool:
        """Whether the budget pays what is new among the trials and still holds the reserve afterwards.

        reserve: epochs; by default what one candidate needs from the second rung to the top, so that the search never
        ends with a winner that was only seen for few epochs.
        """
        if self.budget is None:
            return True
        cost = sum(trial[1] for trial in set(trials) if self.reward(trial) is None)
        kept = sum(self.rungs[1:]) if reserve is None else reserve
        return round(self.spent + cost + kept, ROUNDED) <= self.budget

    def ranked(self, epochs: float) -> list[Allocation]:
        """The candidates seen at a rung, best reward first, equals in the order they came."""
        seen = self.rewards.get(epochs, {})
        return sorted(seen, key=seen.__getitem__, reverse=True)

    def promotions(self, standards: Collection[Allocation] = ()) -> list[Trial]:
        """The next trials once no new candidates come, of one rung, the lowest first; none when the ladder is done.

        At least one candidate of every rung is promoted. The reserve may be spent, but for one candidate's epochs from
        the next rung to the top. Budget left over promotes more: the promoted share of a rung grows from 1/eta to 2/eta
        and so on, until the budget is spent or all candidates have reached the top.

        standards: baselines; the best two at the first rung and the best one at each later rung are promoted right
        after the leader, as far as the budget allows.
        """
        for part in range(1, self.eta + 1 if self.budget is not None else 2):
            for level in range(len(self.rungs) - 1):
                seen = self.ranked(self.rungs[level])
                first = [*seen[:1], *[allocation for allocation in seen if allocation in standards][:1 if level else 2]]
                share = seen[:-(-len(seen) * part // self.eta)]
                if trials := self._affordable(first, share, level):
                    return trials
        return []

    def _affordable(self, first: Sequence[Allocation], share: Sequence[Allocation], level: int) -> list[Trial]:
        """Unpaid trials at rung `level + 1` that the budget affords with a reserve for the rungs above: one candidate's
        after a trial in `first` (leader, standards), two after others if there are standards."""
        trials: list[Trial] = []
        climb = sum(self.rungs[level + 2:])
        for trial in self._unpaid(dict.fromkeys([*first, *share]), level + 1):
            if self.affords([*trials, trial], reserve=climb * (1 if trial[0] in first or len(first) < 2 else 2)):
                trials.append(trial)
        return trials

    def leader(self) -> Trial:
        """The best candidate: highest rung reached, then reward, then first come. Raises ValueError if none is seen."""
        if self.spent == 0:
            raise ValueError("no candidate has been evaluated")
        epochs = max(epochs for epochs, paid in self.rewards.items() if paid)
        return self.ranked(epochs)[0], epochs

    def state_dict(self) -> dict[float, dict[Allocation, float]]:
        """A copy of `rewards`."""
        return {epochs: dict(paid) for epochs, paid in self.rewards.items()}

    def _unpaid(self, allocations: Iterable[Allocation], level: int) -> Iterable[Trial]:
        trials = ((allocation, self.rungs[level]) for allocation in allocations)
        return (trial for trial in trials if self.reward(trial) is None)
