"""A Gaussian process over the trials so far: which of many candidates are worth training?

Rasmussen and Williams, Gaussian Processes for Machine Learning (2006): posterior eq. 2.25, 2.26, marginal likelihood
eq. 2.30; expected improvement: Jones, Schonlau and Welch (1998).
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

LENGTHS = (0.3, 0.5, 1.0, 2.0)  # of the kernel, in root mean square differences of features
NOISES = (0.1, 0.3, 1.0)  # standard deviation of a reward's error, in those of the process
WORST = -2.0  # rewards further below the median than so many standard deviations count as that


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

    One after the other, each as if those before had given what the process expects (Ginsbourger et al., 2010).

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
