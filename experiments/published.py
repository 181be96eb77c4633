"""The published tables of arXiv 2511.11675 (VGG16 on CIFAR-10), and ours beside them."""
from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from utils.checkpoint import format_sparsity
from utils.common import UserError

PUBLISHED_MODEL = "vgg16"
# setting -> sparsity -> test accuracy in %, mean and standard deviation (None: not given); arXiv 2511.11675
PUBLISHED: dict[str, dict[float, tuple[float, float | None]]] = {
    "A": {0.4: (92.09, 0.28), 0.64: (92.43, 0.12), 0.784: (92.60, 0.15), 0.8704: (92.68, 0.18), 0.9222: (92.68, 0.19),
          0.9533: (92.49, 0.26), 0.972: (92.35, 0.02), 0.9832: (91.92, 0.09), 0.9899: (91.01, 0.05),
          0.994: (90.31, 0.18)},
    "B": {0.95: (92.43, 0.10), 0.96: (92.41, 0.22), 0.97: (92.27, 0.06), 0.98: (91.93, 0.17), 0.99: (91.03, 0.17),
          0.995: (89.53, 0.10), 0.999: (81.08, 0.85)},
    "R": {0.98: (92.33, None), 0.97: (92.41, None), 0.96: (92.57, None), 0.95: (92.73, None)},
}


class Entry(NamedTuple):
    """A row of the published tables: setting A (iterative), B (one-shot) or R (regrowth), and nominal sparsity."""

    setting: str
    sparsity: float

    @property
    def label(self) -> str:
        """As `--rows` takes it."""
        return f"{self.setting}:{format_sparsity(self.sparsity)}"


ENTRIES = [Entry(setting, sparsity) for setting in ("B", "A", "R") for sparsity in PUBLISHED[setting]]


def chosen_entries(words: Sequence[str]) -> list[Entry]:
    """The rows that words like ``B`` (all of a setting) or ``A:0.64`` name, in the tables' order; else UserError."""
    known = {entry.label: [entry] for entry in ENTRIES}
    known |= {setting: [entry for entry in ENTRIES if entry.setting == setting] for setting in PUBLISHED}
    for word in words:
        if word not in known:
            raise UserError(f"--rows {word} is no row; take {', '.join(PUBLISHED)} or one of {', '.join(known)}")
    chosen = {entry for word in words for entry in known[word]}
    return [entry for entry in ENTRIES if entry in chosen]


def beside_published(rows: Sequence[dict[str, Any]], m_name: str) -> list[dict[str, Any]]:
    """A row per measured entry: ours (mean, standard deviation, seeds), published, difference, whether it lies within
    the published standard deviation. Nothing unmeasured is in it."""
    results = []
    for entry in ENTRIES:
        values = [row["test_acc"] for row in rows if row["row"] == entry.label]
        if not values:
            continue
        mean, std = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else ""
        result = {"row": entry.label, "sparsity": entry.sparsity, "seeds": len(values), "mean": mean, "std": std,
                  "published": "", "published_std": "", "difference": "", "within_published_spread": ""}
        if m_name == PUBLISHED_MODEL:
            theirs, spread = PUBLISHED[entry.setting][entry.sparsity]
            result |= {"published": theirs, "difference": mean - theirs}
            if spread is not None:
                result |= {"published_std": spread, "within_published_spread": int(abs(mean - theirs) <= spread)}
        results.append(result)
    return results


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """A line per row: ours beside the published figure."""
    print(f"\n{'row':<10} {'ours (test %)':>16} {'seeds':>6} {'published':>16} {'difference':>11}")
    for row in results:
        ours = f"{row['mean']:.2f}" + (f" ± {row['std']:.2f}" if row["std"] != "" else "")
        theirs = "-" if row["published"] == "" else f"{row['published']:.2f}"
        theirs += f" ± {row['published_std']:.2f}" if row["published_std"] != "" else ""
        difference = f"{row['difference']:+.2f}" if row["difference"] != "" else "-"
        within = {1: "  within its spread", 0: "  outside its spread", "": ""}[row["within_published_spread"]]
        print(f"{row['row']:<10} {ours:>16} {row['seeds']:>6} {theirs:>16} {difference:>11}{within}")
