"""Does one quantity predict another, does one arm beat another: scipy's tests, and the verdicts in words."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SIGNIFICANT = 0.05
CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 10_000


def correlate(x: Sequence[float], y: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Pearson r, Spearman rho, and two-sided p-values by permuting y: all orders where there are at most 10,000 (seven
    points), else 10,000 seeded ones, where p is (hits + 1) / (permutations + 1) (Phipson and Smyth, 2010).

    With fewer than three points or a constant quantity nothing can be said: r and rho are NaN, p is 1.
    """
    from scipy import stats  # takes a while, and no --help needs it

    def covariance(shuffled: np.ndarray, axis: int) -> np.ndarray:
        return np.abs((shuffled * centred).sum(axis))  # ordered as |r| is under permutation

    result = {"n": len(x), "pearson": np.nan, "pearson_p": 1.0, "spearman": np.nan, "spearman_p": 1.0}
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return result
    for name, first, second in (("pearson", x, y), ("spearman", stats.rankdata(x), stats.rankdata(y))):
        centred = first - np.mean(first)
        test = stats.permutation_test((second,), covariance, permutation_type="pairings", alternative="greater",
                                      n_resamples=RESAMPLES, random_state=np.random.RandomState(seed))
        result |= {name: float(stats.pearsonr(first, second).statistic), f"{name}_p": float(test.pvalue)}
    return result


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


def paired_difference(arm: Sequence[float], control: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """What ``arm - control`` (paired by seed, in points) says.

    Returns mean, standard deviation, the 95 % intervals of the paired t test and of the percentile bootstrap (Efron,
    1979; 10,000 seeded resamples, too narrow for a handful of pairs), the two-sided p of the t test, the verdict
    ('better', 'worse' or 'indistinguishable', by the t interval), and the smallest true effect that this many pairs of
    this spread would have shown with a power of 80 %. With a single pair ('one pair, no verdict'), or differences
    without any spread, nothing can be said: the intervals are infinite. Raises ValueError for unequal lengths or none.
    """
    if len(arm) != len(control) or not len(arm):
        raise ValueError(f"need pairs, got {len(arm)} and {len(control)} values")
    from scipy import stats  # takes a while, and no --help needs it

    differences = np.subtract(arm, control)
    n, mean = len(differences), float(differences.mean())
    std = float(differences.std(ddof=1)) if n > 1 else np.nan
    low, high, bootstrap, p, detectable = -np.inf, np.inf, (-np.inf, np.inf), 1.0, np.inf
    if np.ptp(differences) > 1e-3:  # more than the rounding of saved tables, to six digits
        test = stats.ttest_rel(arm, control)
        (low, high), p = test.confidence_interval(CONFIDENCE), test.pvalue
        bootstrap = stats.bootstrap((differences,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE,
                                    method="percentile", random_state=np.random.RandomState(seed)).confidence_interval
        detectable = _detectable_shift(n - 1) * std / np.sqrt(n)
    decided = "better" if low > 0 else "worse" if high < 0 else "indistinguishable"
    numbers = {"t_low": low, "t_high": high, "bootstrap_low": bootstrap[0], "bootstrap_high": bootstrap[1], "p": p,
               "detectable": detectable}
    return {"pairs": n, "mean": mean, "std": std, **{name: float(value) for name, value in numbers.items()},
            "verdict": decided if n > 1 else "one pair, no verdict"}


def _detectable_shift(freedom: int) -> float:
    """The true mean, in standard errors, that a two-sided t test with so many degrees of freedom shows with `POWER`.

    The power of a shift d is P(Z > t sqrt(V / freedom) - d) with Z normal and V chi-squared, by 10,000 quantiles of V
    (scipy's noncentral t fails for few degrees of freedom); the other tail is negligible.
    """
    from scipy import optimize, stats  # takes a while, and no --help needs it

    t, quantiles = stats.t.ppf(0.5 + CONFIDENCE / 2, freedom), (np.arange(RESAMPLES) + 0.5) / RESAMPLES
    bounds = t * np.sqrt(stats.chi2.ppf(quantiles, freedom) / freedom)
    return optimize.brentq(lambda shift: stats.norm.sf(bounds - shift).mean() - POWER, 0, 2 * t + 2)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for testing several arms at once (Holm, 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.arange(len(order), 0, -1) * np.asarray(p_values, float)[order]
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted.tolist()


def compare_arms(rows: Sequence[Mapping[str, Any]], control: str, arms: Sequence[str]) -> list[dict[str, Any]]:
    """A row per sparsity and arm: `paired_difference` of test accuracy to the control, p adjusted for all that are
    tested, by two pairs or more (Holm). What is 'better' or 'worse' by itself but not by that p is 'not shown'.

    rows: a dict per run: arm, target (its sparsity), seed, test_acc (%), seconds of training after pretraining and
    epochs of a search, of which the means go along. arms: names in the order in which they are given back, before
    others, of arms that there were when their rows were made.
    """
    places = {arm: place for place, arm in enumerate(arms)}
    by_key = {(row["target"], row["arm"], row["seed"]): row for row in rows}
    results = []
    for target, arm in sorted({key[:2] for key in by_key},
                              key=lambda key: (key[0], places.get(key[1], len(places)), key[1])):
        own = [row for key, row in by_key.items() if key[:2] == (target, arm) and (target, control, key[2]) in by_key]
        if arm != control and own:
            controls = [by_key[target, control, row["seed"]]["test_acc"] for row in own]
            means = {key: float(np.mean([row[key] for row in own])) for key in ("search_epochs", "seconds")}
            difference = paired_difference([row["test_acc"] for row in own], controls)
            results.append({"arm": arm, "target": target, **difference, **means, "p_holm": 1.0})
    tested = [row for row in results if row["pairs"] > 1]
    for result, adjusted in zip(tested, holm([row["p"] for row in tested]), strict=True):
        result["p_holm"] = adjusted
        if adjusted >= SIGNIFICANT and result["verdict"] in ("better", "worse"):
            result["verdict"] = "not shown"
    return results
