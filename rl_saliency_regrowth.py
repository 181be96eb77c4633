#!/usr/bin/env python
"""Stage 2b, saliency-based regrowth: a controller decides how many weights return to each layer, their saliency
(gradient squared times weight squared) which ones.

Starts from the pruned checkpoint that `main.py --m_name ... --pruner magnitude --iter_end 1` leaves. Layers stand in
the order of their SSIM drift; an episode is regrowth, a short finetuning and the validation accuracy as reward.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence

from utils.methods import parse_regrowth_args
from utils.run import script
from utils.stage2 import run_script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    return parse_regrowth_args("saliency", __doc__, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Finds an allocation, regrows by it, finetunes, reports."""
    run_script(parse_args(argv))


if __name__ == "__main__":
    script(main, several=True)
