"""Tables of the benchmark scripts, and the comparison with an earlier run."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.timing import summarise

TOTAL = "end to end"
Row = dict[str, Any]


def stage_rows(seconds: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Row]:
    """A row per method and stage, and one per method for the whole episode, over its repeats.

    seconds: method -> repeats -> stage -> seconds.
    """
    rows = []
    for method, repeats in seconds.items():
        for stage in (*repeats[0], TOTAL):
            values = [sum(once.values()) if stage == TOTAL else once[stage] for once in repeats]
            rows.append({"method": method, "stage": stage, **summarise(values).as_dict()})
    return rows


def print_stages(rows: Sequence[Row]) -> None:
    """Stages by methods: median with fastest and slowest, in milliseconds; - where there is nothing to do."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    print(f"\n{'stage (ms)':<18}" + "".join(f"{method:>34}" for method in methods))
    for stage in dict.fromkeys(row["stage"] for row in rows):
        cells = []
        for row in (row for row in rows if row["stage"] == stage):
            median, low, high = (1e3 * row[key] for key in ("median_s", "fastest_s", "slowest_s"))
            spread = f" [{low:,.1f} .. {high:,.1f}]" if row["repeats"] > 1 else ""
            cells.append(f"{median:,.1f}{spread}" if median >= 0.1 else "-")
        print(f"{stage:<18}" + "".join(f"{cell:>34}" for cell in cells))


def print_comparisons(rows: Sequence[Row]) -> None:
    """A line per measurement: ours, the straightforward version, and the ratio."""
    print(f"\n{'against the straightforward version':<36} {'ours (ms)':>12} {'plain (ms)':>12} {'ratio':>8}")
    for row in rows:
        print(f"{row['measurement']:<36} {1e3 * row['ours_median_s']:12,.2f} {1e3 * row['plain_median_s']:12,.1f} "
              f"{row['ratio']:7.1f}x   {row['ours']:,.0f} {row['unit']}")


def print_bars(rows: Sequence[Row]) -> None:
    """A line per bar: what this project aims at on such hardware, its figure, reached or not."""
    if rows:
        print("\nspeeds that this project aims at on such hardware")
    for row in rows:
        sign = ">=" if row["at_least"] else "<="
        print(f"  {row['bar']:<24} {row['value']:12,.2f} {sign} {row['limit']:8,g} {row['unit']:<22} "
              f"{'reached' if row['met'] else 'not reached here'}")


def load_earlier(path: Path) -> Row:
    """An earlier run's JSON. UserError in one line when it is none."""
    try:
        earlier = json.loads(path.read_text())
        return {"device": earlier["environment"]["device"], "setting": earlier["setting"],
                "stages": {(row["method"], row["stage"]): row["median_s"] for row in earlier["stages"]},
                "comparisons": {row["measurement"]: row["ours_median_s"] for row in earlier["comparisons"]}}
    except OSError as error:
        raise UserError(f"--compare {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--compare {path} is not the JSON of a benchmark run (benchmark.json)") from error


def print_changes(earlier: Row, setting: Row, device: str, stages: Sequence[Row], comparisons: Sequence[Row]) -> None:
    """Earlier seconds over today's, so that above 1 is faster now; says what makes the two runs incomparable."""
    print("\nagainst the earlier run (its time / this one's; above 1: faster now)")
    there = {**earlier["setting"], "device": earlier["device"]}
    unlike = [f"{key} was {there.get(key)}, is {value}" for key, value in {**setting, "device": device}.items()
              if there.get(key) != value]
    if unlike:
        print(f"  note: the runs differ: {'; '.join(unlike)}")
    now = {(row["method"], row["stage"]): row["median_s"] for row in stages}
    pairs = [(" / ".join(key), earlier["stages"][key], value) for key, value in now.items() if key in earlier["stages"]]
    pairs += [(row["measurement"], earlier["comparisons"][row["measurement"]], row["ours_median_s"])
              for row in comparisons if row["measurement"] in earlier["comparisons"]]
    for name, before, after in pairs:
        print(f"  {name:<36} {before / after:6.2f}x   ({1e3 * before:,.1f} -> {1e3 * after:,.1f} ms)")
