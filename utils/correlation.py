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
