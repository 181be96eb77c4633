"""The controller's network: an LSTM that walks through the layers and says for each how much of the budget it gets.

What its actions mean is an action space: `ShareActions`, factors around the shares of a plain rule, or the published
`RatioActions`, ratios of what a layer could take.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.allocation import AllocationProblem, apportion, ratios_to_allocation, spend_ratio
from utils.common import generator
from utils.ladder import Allocation

SPREAD = 1.0  # standard deviation, in factors of two, of what a fresh `share` controller chooses around a factor of 1
ZERO_LOGIT = -3.0  # of the factor 0, before anything is learned; a factor of 1 has 0


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
        return [0.0] + [2 ** ((action - number // 2) / 2) for action in range(1, number)]

    @classmethod
    def prior(cls, number: int) -> Tensor:
        """Logits of a normal distribution (`SPREAD`) of the factor's logarithm around that of 1, and `ZERO_LOGIT`."""
        octaves = torch.tensor(cls._factors(number)[1:]).log2()
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
