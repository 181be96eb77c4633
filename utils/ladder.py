"""Trials of a search: rewards per candidate and training length, what they cost, and who is trained for longer."""
from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from utils.common import UserError

Allocation = tuple[int, ...]
Trial = tuple[Allocation, float]  # what is trained, for how many epochs
ROUNDED = 9  # decimals of sums of fractions of an epoch, which floating point has not exactly


class Ladder:
    """Rewards per candidate and rung, the epochs they cost, and who goes on to the next rung.

    Once there are no new candidates, the best 1/eta of each rung go on to the next (successive halving, Jamieson and
    Talwalkar, AISTATS 2016). While a search still improves, every new leader would earn more epochs at once, and use up
    those of candidates to come. A trial is trained from the start, so it costs its epochs whatever the candidate had
    before. `rewards` holds every paid trial, {epochs: {allocation: reward}}, in the order of
    payment: it is the cache and the whole state of the ladder.

    rungs: training lengths in epochs, increasing. eta: see above. budget: epochs over all trials, None for no limit.
    batch: candidates that arrive together. Rungs that the best of one batch could not climb to within the budget are
    left out. Raises UserError when the budget does not even pay one batch at the first rung.
    """

    def __init__(self, rungs: Sequence[float], eta: int, budget: int | None = None, batch: int = 1):
        """An empty ladder."""
        limit = math.inf if budget is None else budget
        if batch * rungs[0] > limit:
            raise UserError(f"a search budget of {budget} epochs does not pay one batch: {batch} candidates for "
                            f"{rungs[0]} epochs take {batch * rungs[0]}; raise the budget or lower the others")
        self.rungs = tuple(rung for level, rung in enumerate(rungs)
                           if batch * rungs[0] + sum(rungs[1:level + 1]) <= limit)
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

        At least one candidate of every rung goes on, and the reserve is spent: all but what the climb from the next
        rung to the top takes. What is then left of a budget goes to the leaders too: the share of a rung that goes on
        grows from 1/eta to 2/eta and so on, until the budget is spent or everybody has been at the top.

        standards: candidates to be compared with, of which the two best at the first rung go on behind its leader, and
        the best one at each rung after it, as far as the budget pays them.
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
        """New trials at the rung after `level` that the budget pays, with what is left for the way to the top: that of
        one candidate after those who go first, a leader and standards; that of two, if there are any, after others.
        """
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

    def load_state_dict(self, rewards: dict[float, dict[Allocation, float]]) -> None:
        """Takes up rewards of an earlier search; those of rungs that are not climbed here count as spent."""
        self.rewards = {epochs: dict(rewards.get(epochs, {})) for epochs in {**dict.fromkeys(self.rungs), **rewards}}

    def _unpaid(self, allocations: Iterable[Allocation], level: int) -> Iterable[Trial]:
        trials = ((allocation, self.rungs[level]) for allocation in allocations)
        return (trial for trial in trials if self.reward(trial) is None)
