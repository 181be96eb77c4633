#!/usr/bin/env python
"""Stage 2a, reference-based regrowth: a controller decides how many weights return to each layer, a reference model
which ones and with what values.

Starts from the pruned checkpoint that `main.py --m_name ... --pruner magnitude --iter_end 1` leaves. Layers stand in
the order of their SSIM drift; an episode is regrowth, a short finetuning and the validation accuracy as reward.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence

from utils import stage2
from utils.distributed import world
from utils.methods import METHODS, parse_regrowth_args, regrowth_parser
from utils.run import open_run, script

METHOD = METHODS["reference"]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = regrowth_parser(__doc__, METHOD.save_dir)
    METHOD.add_options(parser)
    return parse_regrowth_args(parser, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Finds an allocation, regrows by it, finetunes, reports."""
    args = parse_args(argv)
    run = open_run(args)
    outcomes = stage2.regrow(run, args, METHOD, world=world())
    if world().leads:
        stage2.report(run, stage2.save_folder(run, args, METHOD), outcomes)


if __name__ == "__main__":
    script(main, several=True)
