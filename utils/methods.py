"""The registry of stage-2 methods: all that tells `rl_regrowth_nas.py` and `rl_saliency_regrowth.py` apart.

A method is a row of `METHODS`; the two scripts, the benchmarks and the studies take it from there.
"""
from __future__ import annotations

import argparse
from typing import Any

from utils.regrowth import INITIALISERS, SELECTORS
from utils.run import check_regrowth_args, positive_int, regrowth_parser
from utils.stage2 import Method


def _add_reference_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference_model", metavar="FILE|SPARSITY", help="model whose mask and weights are copied: a "
                        "checkpoint, or the sparsity of one under the root, such as 0.95; default: the dense model")


def _add_saliency_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--selection", choices=list(SELECTORS), default="saliency",
                        help="rule that chooses the weights within a layer")
    parser.add_argument("--init_strategy", choices=list(INITIALISERS), default="zero",
                        help="values that weights return with")
    parser.add_argument("--saliency_source", choices=["dense", "pruned"], default="dense",
                        help="model that saliency is computed on")
    parser.add_argument("--saliency_max_batches", type=positive_int, default=50,
                        help="batches of 128 training images that saliency or gradients are averaged over")


METHODS: dict[str, Method] = {
    "reference": Method(
        name="reference", save_dir="rl_regrow_savedir", search_stem="rl_training_checkpoint",
        best_file="best_allocation_{m_name}.pth", rule=lambda args: ("reference", "reference"),
        add_options=_add_reference_options, options=("reference_model",)),
    "saliency": Method(
        name="saliency", save_dir="rl_saliency_regrow_savedir", search_stem="saliency_rl_checkpoint",
        best_file="best_saliency_allocation.pth", rule=lambda args: (args.selection, args.init_strategy),
        add_options=_add_saliency_options,
        options=("selection", "init_strategy", "saliency_source", "saliency_max_batches")),
}


def regrowth_arguments(**given: Any) -> argparse.Namespace:
    """What the stage-2 scripts would have read, for studies that call stage 2 themselves: their defaults, but `given`.

    given: at least m_name. Raises ValueError for an unknown option, and UserError as the command line does.
    """
    parser = regrowth_parser("", "")
    for method in METHODS.values():
        method.add_options(parser)
    defaults = vars(parser.parse_args(["--m_name", given["m_name"]]))
    if unknown := given.keys() - defaults.keys():
        raise ValueError(f"stage 2 has no option {', '.join(sorted(unknown))}")
    return check_regrowth_args(argparse.Namespace(**{**defaults, **given}))
