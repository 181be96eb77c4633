"""`--size_budget`: how many weights may survive so that the compact file (`utils.sparse_file`) just fits.

Where the mask moves while the model trains, or is made in several iterations, the positions are unknown beforehand and
the worst are provided for. One-shot prunings of the dense model are tried on copies, so that not one weight more fits.
"""
from __future__ import annotations

import argparse
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from utils import export, sparse_file, stage1
from utils.analysis_utils import Evidence, clone_model, count_pruned_params, prunable_layers, set_masks
from utils.common import RunFailed, UserError
from utils.inspection import load_artifact
from utils.pruning import prune_to
from utils.run import Run
from utils.stage1 import Outcome, PruneStep

UNITS = {"KB": 1000, "KiB": 1024, "MB": 1000**2, "MiB": 1024**2}
WEIGHT = 4  # bytes of a float32
LAYER = 32  # bytes of a layer, at most, for longer numbers in the index and for bits that fill no byte


def size(text: str) -> int:
    """An argparse type: the bytes of ``64KB``, ``1.2MiB`` and the like."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is no size in {', '.join(UNITS)}, such as 64KB or 1.2MiB")
    return int(float(found[1]) * UNITS[found[2]])


def worst_sizes(model: nn.Module) -> Callable[[int], int]:
    """The bytes, at most, that the compact file of the model takes with so many surviving weights, wherever they lie.

    With one shift l for all layers, n survivors of N weights take n (l + 1) + (N - n) / 2^l bits or fewer, as the gaps
    of all layers add up to N - n at most; with the shift that is best for each layer they take no more.
    """
    layers, total = prunable_layers(model), count_pruned_params(model).total
    empty = clone_model(model)
    set_masks(empty, {name: torch.zeros_like(layer.weight) for name, layer in layers.items()})
    fixed = len(sparse_file.encode(empty.state_dict())) + LAYER * len(layers)

    def size_of(keep: int) -> int:
        bits = min(keep * (shift + 1) + ((total - keep) >> shift) for shift in range(sparse_file.LARGEST_SHIFT + 1))
        return fixed + keep * WEIGHT + bits // 8
    return size_of


def safe_sparsity(model: nn.Module, pruner: str, budget: int) -> float:
    """The least sparsity at which the compact file fits into `budget` bytes, whichever weights survive.

    UserError where the fewest weights that the pruner can leave take more, with the smallest budget that works, and
    where all weights fit.
    """
    total, size_of = count_pruned_params(model).total, worst_sizes(model)
    keep = bisect_right(range(1, total), budget, key=size_of)
    if keep == total - 1:
        raise UserError(f"--size_budget: {budget:,} bytes hold all {total:,} weights; there is nothing to prune")
    fewest = _fewest(model, pruner)
    if keep < fewest:
        raise UserError(f"--size_budget: {budget:,} bytes are too few for this model and pruner; the smallest budget "
                        f"that works is {size_of(fewest) / 1000 + 0.05:.1f}KB, for {fewest:,} of {total:,} weights and "
                        "all that is never pruned")
    return 1.0 - keep / total


def _fewest(model: nn.Module, pruner: str) -> int:
    """The fewest weights that the pruner can leave; 1 for most."""
    total = count_pruned_params(model).total
    equal = Evidence(gradient={name: torch.ones_like(layer.weight) for name, layer in prunable_layers(model).items()})

    def works(keep: int) -> bool:
        try:
            prune_to(clone_model(model), keep, pruner, evidence=equal)
        except UserError:
            return False
        return True
    return 1 if works(1) else 1 + bisect_right(range(1, total), False, key=works)


def fit(run: Run, dense: Outcome, step: PruneStep, budget: int) -> PruneStep:
    """The one-shot step with the least sparsity that fits `budget` bytes: with one weight more it would not.

    step: with the sparsity of `safe_sparsity`. Which weights survive says its pruner on a copy of the dense model;
    finetuning changes their values only, which have one size.
    """
    total, evidence = count_pruned_params(dense.model).total, stage1.pruning_evidence(run, dense.model)

    def size_of(keep: int) -> int:
        model = clone_model(dense.model)
        prune_to(model, keep, step.pruner, stage1.pruning_seed(run, step), evidence)
        return len(sparse_file.encode(model.state_dict()))
    fewest, most = round((1.0 - step.sparsity) * total), min(total, budget // WEIGHT + 2)
    keep = fewest - 1 + bisect_right(range(fewest, most), budget, key=size_of)
    return replace(step, sparsity=1.0 - keep / total)


def write(outcome: Outcome, budget: int) -> str:
    """Writes the compact file of a finished model beside it; returns a line about it.

    RunFailed when it does not fit, as when another model was there already and taken as it is.
    """
    path = outcome.artifact.with_suffix(".sparse")
    facts = export.export(load_artifact(outcome.artifact), "sparse", path, overwrite=True).partition(";")[0]
    if path.stat().st_size > budget:
        raise RunFailed(f"{facts}, more than the budget of {budget:,}; {outcome.artifact} was made with other "
                        "arguments: use --overwrite to redo it, or --root for another place")
    return f"{facts} of {budget:,}"
