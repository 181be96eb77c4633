#!/usr/bin/env python
"""What is in a checkpoint; with --finetune, training goes on from it, on single weights where the options say so;
with --export its model is written to a file for use elsewhere.

Recognises models (dense, pruned, regrown), best allocations, controller checkpoints and interrupted stages, those of
this project and the published formats. A best allocation is applied to its starting checkpoint before finetuning.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import export, finetuning, inspection
from utils.inspection import load_artifact
from utils.run import ArgumentParser, open_run, script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("--file", type=Path, required=True, help="artifact to look at or to finetune")
    parser.add_argument("--type", choices=["checkpoint", "best", "auto"], default="auto",
                        help="insist on a best allocation, or on a checkpoint of any other kind")
    parser.add_argument("--json", action="store_true", help="print the description as one JSON object")
    parser.add_argument("--finetune", action="store_true", help="train from the artifact; the options below say how")
    export.add_options(parser)
    defaults = finetuning.add_options(parser)
    args = parser.parse_args(argv)
    export.check_options(args)
    finetuning.check_options(args, defaults)
    return args


def report(card: Mapping[str, Any], folder: Path) -> None:
    """Accuracies before and after, by the run card of what was finetuned, and where its files are."""
    if card:
        before, how = "", "no run card says how it was made"
        if "val_acc_before" in card:
            before = f"{card['val_acc_before']:.2f} % -> "
            how = f"best of {card['epochs']} epochs: {card['best_epoch']}"
        test = f", test {card['test_acc']:.2f} %" if "test_acc" in card else ""
        print(f"after finetuning: sparsity {card['sparsity']:.5g}, validation {before}{card['val_acc']:.2f} %{test} "
              f"({how})")
    print(f"model, card and training log: {folder}")


def main(argv: Sequence[str] | None = None) -> None:
    """Describes the file, exports it, or finetunes from it."""
    args = parse_args(argv)
    artifact = load_artifact(args.file, args.type, args.m_name)
    if args.export:
        print(export.export(artifact, args.export, args.out, args.dtype or "float32", args.overwrite,
                            args.compact))
        return
    if not args.finetune:
        description = inspection.describe(artifact)
        print(json.dumps(description, indent=2) if args.json else inspection.render(description))
        return
    args.m_name = args.m_name or finetuning.recognise_model(args, artifact)
    finetuning.take_data(args, artifact)
    outcome = finetuning.finetune(open_run(args), artifact, args)
    report(outcome.card, outcome.artifact.parent)


if __name__ == "__main__":
    script(main, resumable="--finetune" in sys.argv)
