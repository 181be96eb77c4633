"""The controller's search as a stage-2 script runs it: progress, CSV, figure, controller checkpoints, resume.

The search itself, on plain numbers, is in `utils.controller`.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils import checkpoint, plots
from utils.common import Progress, UserError
from utils.controller import MAY_CHANGE, RegrowthPolicyGradient, SearchResult
from utils.stage import differences


class Found(NamedTuple):
    """An allocation, its reward (None when nothing was searched), the epochs it took and the controller's update.

    source: 'controller', or the rule that gave the allocation, also where the search tried it first.
    """

    allocation: tuple[int, ...]
    reward: float | None
    epochs_spent: float
    epoch: int
    source: str


def search_path(stem: Path, epoch: int) -> Path:
    """The controller checkpoint after `epoch` updates."""
    return stem.with_name(f"{stem.name}_epoch_{epoch}.pth")


def saved_searches(stem: Path) -> dict[int, Path]:
    """Number of updates -> controller checkpoint, most updates first."""
    found = {int(path.stem.rpartition("_")[2]): path for path in stem.parent.glob(f"{stem.name}_epoch_*.pth")
             if path.stem.rpartition("_")[2].isdigit()}
    return dict(sorted(found.items(), reverse=True))


def latest_search(stem: Path, config: Mapping[str, Any]) -> Path | None:
    """The controller checkpoint with the most updates, of those made with these arguments if there are any.

    An interrupted `--overwrite` leaves checkpoints of two searches side by side.
    """
    paths = list(saved_searches(stem).values())
    wanted = reward_config(config)
    fitting = (path for path in paths if reward_config(_read_search(path)["config"]) == wanted)
    return next(fitting, paths[0] if paths else None)


def reward_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What rewards depend on: the configuration of a step but for the length of the search and the final finetuning."""
    kept = {key: value for key, value in config.items() if key not in {*MAY_CHANGE, "mask"}}
    recipe = {key: value for key, value in config["recipe"].items() if key not in ("epochs", "schedule", "patience")}
    return json.loads(json.dumps({**kept, "recipe": recipe}))  # lists for tuples, as in what was saved


def _read_search(path: Path) -> dict[str, Any]:
    state = checkpoint.load_checkpoint(path)
    if not isinstance(state, dict) or not {"config", "search"} <= set(state):
        raise UserError(f"{path} is not a controller checkpoint of this project")
    return state


def run_search(search: RegrowthPolicyGradient, stem: Path, config: Mapping[str, Any], save_freq: int,
               sparsity: float) -> SearchResult:
    """Runs a search to its end; saves its table and its state after every trial.

    stem: path that artifact names begin with; config: of the step, kept in the checkpoints; save_freq: one checkpoint
    in so many updates is kept, besides the latest; sparsity: that all episodes have in common, for the table.
    """
    budget = search.config.search_budget
    progress = Progress("search", budget, text="episode 0",
                        done=search.history[-1]["epochs_spent"] if search.history else 0)

    def save() -> None:
        content = {"config": dict(config), "search": search.state_dict()}
        checkpoint.save_checkpoint(content, search_path(stem, search.epoch))

    def after_episode(row: Mapping[str, Any]) -> None:
        progress.advance(row["epochs_spent"] - progress.done)
        spent = f"{row['epochs_spent']}/{budget}" if budget else row["epochs_spent"]
        progress.say(f"episode {row['episode']}  {spent} epochs  val {100 * row['reward']:.2f} % after "
                     f"{row['fidelity']}  best {100 * row['best']:.2f} %")

    def after_trial() -> None:
        checkpoint.save_csv(table_rows(search.history, sparsity), stem.parent / "search.csv")
        save()

    def after_update(number: int) -> None:
        save()
        if number == 1 or (number - 1) % save_freq:
            search_path(stem, number - 1).unlink(missing_ok=True)

    with progress:
        result = search.run(after_episode, after_update, after_trial)
    save()
    return result


def table_rows(history: Sequence[Mapping[str, Any]], sparsity: float) -> list[dict[str, Any]]:
    """The history as CSV rows: allocations as text, missing values empty, the sparsity that all have in common."""
    rows = []
    for row in history:
        plain = {key: "" if value is None else value for key, value in row.items() if key != "allocation"}
        rows.append({**plain, "sparsity": sparsity, "allocation": " ".join(map(str, row["allocation"]))})
    return rows


def load_search(search: RegrowthPolicyGradient, path: Path, config: Mapping[str, Any]) -> None:
    """Takes up a saved search; UserError when the file is no search or its rewards came from other arguments."""
    state = _read_search(path)
    saved, wanted = reward_config(state["config"]), reward_config(config)
    if saved != wanted:
        raise UserError(f"the search at {path} was made with other arguments: {differences(saved, wanted)}. Repeat "
                        "them with --resume, or use --overwrite to search anew")
    search.load_state_dict(state["search"])
    print(f"continuing the search of {path} after {search.epoch} updates")


def search_allocation(search: RegrowthPolicyGradient, args: argparse.Namespace, config: Mapping[str, Any], stem: Path,
                      sparsity: float) -> Found:
    """Searches the best allocation, from a saved search if `--resume` says so; leaves CSV, figure and checkpoints.

    config, stem, sparsity: as of `run_search`.
    """
    path = latest_search(stem, config) if args.resume == "latest" else args.resume and Path(args.resume)
    if path:
        load_search(search, path, config)
    result = run_search(search, stem, config, args.save_freq, sparsity)
    if args.overwrite:  # what is left of the search before this one
        for updates, old in saved_searches(stem).items():
            if updates > search.epoch:
                old.unlink()
    table = stem.parent / "search.csv"
    checkpoint.save_csv(table_rows(search.history, sparsity), table)  # also of a finished search that is taken up
    plots.plot_search(search.history, search.problem, result.allocation, table.with_suffix(".png"))
    source = next(row["source"] for row in search.history if row["allocation"] == result.allocation)
    return Found(result.allocation, result.reward, result.epochs_spent, search.epoch,
                 "controller" if source == "rl" else source)
