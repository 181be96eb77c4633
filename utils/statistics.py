"""Does one quantity predict another: correlations with a permutation test, and the verdict in words."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

PERMUTATIONS = 10_000
SIGNIFICANT = 0.05


def correlate(x: Sequence[float], y: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Pearson r, Spearman rho, and two-sided p-values by permuting y (10,000 seeded permutations, exact in the limit).

    A p-value is (hits + 1) / (permutations + 1), never 0 (Phipson and Smyth, 2010). With fewer than three points or a
    constant quantity nothing can be said: r and rho are NaN, p is 1.
    """
    from scipy import stats  # takes a while, and no --help needs it

    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"n": len(x), "pearson": np.nan, "pearson_p": 1.0, "spearman": np.nan, "spearman_p": 1.0}
    pearson, pearson_p = _permutation_test(x, y, seed)
    spearman, spearman_p = _permutation_test(stats.rankdata(x), stats.rankdata(y), seed)
    return {"n": len(x), "pearson": pearson, "pearson_p": pearson_p, "spearman": spearman, "spearman_p": spearman_p}


def _permutation_test(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[float, float]:
    x, y = (values - values.mean() for values in (x, y))
    scale = np.sqrt((x @ x) * (y @ y))
    observed = x @ y / scale
    shuffled = np.random.RandomState(seed).rand(PERMUTATIONS, len(y)).argsort(axis=1)
    hits = np.count_nonzero(np.abs(y[shuffled] @ x) / scale >= abs(observed) - 1e-12)
    return float(observed), (hits + 1) / (PERMUTATIONS + 1)


def verdict(result: dict[str, Any], cause: str, effect: str) -> str:
    """One sentence that follows the numbers, 'no evidence' included."""
    if np.isnan(result["pearson"]):
        return f"too few different points ({result['n']}) to say whether {cause} predicts {effect}"
    numbers = (f"Pearson r {result['pearson']:+.2f} (p {result['pearson_p']:.3f}), Spearman rho "
               f"{result['spearman']:+.2f} (p {result['spearman_p']:.3f}), {result['n']} points")
    significant = [result[name] for name in ("pearson", "spearman") if result[f"{name}_p"] < SIGNIFICANT]
    if len(significant) == 2 and significant[0] * significant[1] > 0:
        direction = "higher" if significant[0] > 0 else "lower"
        return f"higher {cause} goes with {direction} {effect}: {numbers}"
    if significant:
        return f"weak evidence only (the two tests do not agree) that {cause} predicts {effect}: {numbers}"
    return f"no evidence that {cause} predicts {effect}: {numbers}"


CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 10_000


def paired_difference(arm: Sequence[float], control: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """What ``arm - control`` (paired by seed, in points) says.

    Returns mean, standard deviation, the 95 % intervals of the paired t test and of the percentile bootstrap (10,000
    seeded resamples), the two-sided p of the t test, the verdict ('better', 'worse' or 'indistinguishable', by the t
    interval), and the smallest true effect that this many pairs of this spread would have shown with a power of 80 %.
    With a single pair nothing can be said: the intervals are infinite. Raises ValueError for unequal lengths or none.
    """
    if len(arm) != len(control) or not len(arm):
        raise ValueError(f"need pairs, got {len(arm)} and {len(control)} values")
    differences = np.asarray(arm, float) - np.asarray(control, float)
    n, mean = len(differences), float(differences.mean())
    if n == 1:
        interval, spread, p, detectable = (-np.inf, np.inf), float("nan"), 1.0, np.inf
    else:
        spread = float(differences.std(ddof=1))
        interval, p, detectable = _t_test(mean, spread, n)
    low, high = _bootstrap(differences, seed) if n > 1 else interval
    return {"pairs": n, "mean": mean, "std": spread, "t_low": interval[0], "t_high": interval[1], "bootstrap_low": low,
            "bootstrap_high": high, "p": p, "detectable": detectable, "verdict": _verdict(*interval)}


def _t_test(mean: float, spread: float, n: int) -> tuple[tuple[float, float], float, float]:
    """Interval, p-value and smallest detectable effect of a paired t test (Student, 1908)."""
    from scipy import stats  # takes a while, and no --help needs it

    error = spread / np.sqrt(n)
    quantile = stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    detectable = float((quantile + stats.t.ppf(POWER, n - 1)) * error)
    return (float(mean - quantile * error), float(mean + quantile * error)), p, detectable


def _bootstrap(differences: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the mean (Efron, 1979); too narrow for a handful of pairs, so the verdict ignores it."""
    picks = np.random.RandomState(seed).randint(len(differences), size=(RESAMPLES, len(differences)))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(differences[picks].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)


def _verdict(low: float, high: float) -> str:
    if low > 0:
        return "better"
    return "worse" if high < 0 else "indistinguishable"


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for testing several arms at once (Holm, 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
