#!/usr/bin/env python
"""What is in a checkpoint; with --finetune, training goes on from it, on single weights where the options say so;
with --export its model is written to a file for use elsewhere.

Recognises models (dense, pruned, regrown), best allocations, controller checkpoints and interrupted stages, those of
this project and the published formats. A best allocation is applied to its starting checkpoint before finetuning.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from utils import export, finetuning, inspection
from utils.checkpoint import read_card
from utils.common import UserError
from utils.datasets import DATASETS
from utils.finetuning import Phase
from utils.inspection import Artifact, guess_model, load_artifact, models_with_layers
from utils.run import (
    ArgumentParser,
    add_model_option,
    add_overwrite_options,
    add_run_options,
    open_run,
    positive_float,
    positive_int,
    script,
)
from utils.stage1 import Outcome
from utils.training import FINETUNE_FINAL

LR_ORIGINAL, LR_REGROWN = 1e-4, 1e-3
PHASE_EPOCHS = 10, 30
DATA = ("dataset", "data_dir", "image_size", "val_split", "precision")  # options that a run card answers too


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("--file", type=Path, required=True, help="artifact to look at or to finetune")
    parser.add_argument("--type", choices=["checkpoint", "best", "auto"], default="auto",
                        help="insist on a best allocation, or on a checkpoint of any other kind")
    parser.add_argument("--json", action="store_true", help="print the description as one JSON object")
    parser.add_argument("--finetune", action="store_true", help="train from the artifact; the options below say how")
    export.add_options(parser)
    optional = _add_finetuning(parser)
    add_run_options(parser)
    add_overwrite_options(parser)
    # None: not given, so that the run card of the artifact decides first
    parser.set_defaults(defaults={name: parser.get_default(name) for name in DATA}, **dict.fromkeys(DATA))
    args = parser.parse_args(argv)
    export.check_options(args)
    check_options(args, [*optional, "resume", "overwrite"])
    return args


def _add_finetuning(parser: argparse.ArgumentParser) -> list[str]:
    """Adds the options of finetuning, which are None or False unless given; returns their names."""
    group = parser.add_argument_group("finetuning")
    single = group.add_mutually_exclusive_group()
    options = [
        add_model_option(group, text="default: recognised", required=False),
        group.add_argument("--epochs", type=positive_int, help=f"default: {FINETUNE_FINAL.epochs}"),
        group.add_argument("--lr", type=positive_float, help=f"learning rate, default: {FINETUNE_FINAL.lr}"),
        group.add_argument("--patience", type=positive_int, help="epochs without a better validation accuracy before "
                           f"training stops, default: {FINETUNE_FINAL.patience}"),
        group.add_argument("--save_dir", type=Path, help="default: finetune_savedir/{m_name} under --root"),
        group.add_argument("--starting_checkpoint", type=Path, metavar="FILE", help="pruned checkpoint that regrowth "
                           "started from; default: the recorded one"),
        group.add_argument("--reference_model", type=Path, metavar="FILE", help="values for a best allocation that has "
                           "none; default: the dense model under --root"),
        group.add_argument("--reset_bn_stats", action="store_true", help="estimate batch-norm statistics anew first"),
        single.add_argument("--freeze_original", action="store_true", help="train regrown weights only"),
        single.add_argument("--differential_lr", action="store_true", help="regrown weights at a rate of their own"),
        single.add_argument("--progressive_unfreezing", action="store_true", help="regrown weights first, then all"),
        group.add_argument("--lr_original", type=positive_float, help=f"of --differential_lr, default: {LR_ORIGINAL}"),
        group.add_argument("--lr_regrown", type=positive_float, help=f"of --differential_lr, default: {LR_REGROWN}"),
    ]
    options += [group.add_argument(f"--phase{number}_epochs", type=positive_int,
                                   help=f"of --progressive_unfreezing, default: {epochs}")
                for number, epochs in enumerate(PHASE_EPOCHS, start=1)]
    return [option.dest for option in options]


def check_options(args: argparse.Namespace, finetuning_only: Sequence[str]) -> None:
    """UserError for options that would have no effect or contradict each other."""
    given = {name for name in finetuning_only if getattr(args, name)} - ({"overwrite"} if args.export else set())
    if given and not args.finetune:
        raise UserError(f"--{min(given)} has no effect without --finetune")
    if args.finetune and args.json:
        raise UserError("--json describes a file; leave out --finetune, or --json")
    for owner, options in (("differential_lr", {"lr_original", "lr_regrown"}),
                           ("progressive_unfreezing", {"phase1_epochs", "phase2_epochs"})):
        if given & options and not getattr(args, owner):
            raise UserError(f"--{min(given & options)} has no effect without --{owner}")
    if args.differential_lr and args.lr:
        raise UserError("--differential_lr takes --lr_original and --lr_regrown; leave out --lr")
    if args.progressive_unfreezing and args.epochs:
        raise UserError("--progressive_unfreezing takes --phase1_epochs and --phase2_epochs; leave out --epochs")


def phases(args: argparse.Namespace) -> tuple[Phase, ...]:
    """The trainings of the command line, by the published final recipe with what the command line changes."""
    recipe = replace(FINETUNE_FINAL, epochs=args.epochs or FINETUNE_FINAL.epochs, lr=args.lr or FINETUNE_FINAL.lr,
                     patience=args.patience or FINETUNE_FINAL.patience)
    if args.progressive_unfreezing:
        first, second = args.phase1_epochs or PHASE_EPOCHS[0], args.phase2_epochs or PHASE_EPOCHS[1]
        return Phase("regrown", replace(recipe, epochs=first)), Phase("all", replace(recipe, epochs=second))
    if args.differential_lr:
        recipe = replace(recipe, lr=args.lr_regrown or LR_REGROWN)
        return (Phase("two rates", recipe, lr_original=args.lr_original or LR_ORIGINAL),)
    return (Phase("regrown" if args.freeze_original else "all", recipe),)


def recognise_model(args: argparse.Namespace, artifact: Artifact) -> str:
    """The model's name, by what is in the artifact or else in its starting checkpoint; UserError if unclear."""
    if artifact.kind.is_best:
        names = models_with_layers(artifact.content["regrow_indices"])
        if len(names) == 1:
            return names[0]
        start = finetuning.find_start(artifact, args.starting_checkpoint, args.root)
        weights = load_artifact(start).weights if start else {}
    else:
        weights = artifact.weights
    guess = guess_model(weights)
    if guess is None:
        raise UserError(f"{artifact.path} does not tell which model it belongs to; name it with --model")
    return guess[0]


def take_data(args: argparse.Namespace, artifact: Artifact) -> None:
    """Fills the options of the data that were not given: from the run card, said in a line, else the defaults.

    The card is the artifact's own or, where it has none, as a best allocation, that of its starting checkpoint.
    """
    start = finetuning.find_start(artifact, args.starting_checkpoint, args.root) if artifact.kind.is_best else None
    card = artifact.card or (start and read_card(start)) or {}
    config, known = card.get("config", {}), card.get("input", {})
    found = {name: config[name] for name in ("val_split", "precision") if name in config}
    dataset = known.get("dataset") or config.get("dataset", "").rpartition(", ")[0]
    if dataset in DATASETS:
        found |= {"dataset": dataset, **{name: known[name] for name in ("data_dir", "image_size") if name in known}}
    if args.dataset not in (None, found.get("dataset")):
        found = {name: value for name, value in found.items() if name not in ("data_dir", "image_size")}
    if not Path(found.get("data_dir", "")).expanduser().is_dir():
        found.pop("data_dir", None)  # the card may come from another machine
    taken = {name: value for name, value in found.items() if getattr(args, name) is None}
    if taken:
        print(f"from the run card: {' '.join(f'--{name} {taken[name]}' for name in DATA if name in taken)}")
    for name in DATA:
        if getattr(args, name) is None:
            setattr(args, name, taken.get(name, args.defaults[name]))
    args.data_dir = Path(args.data_dir)


def print_report(outcome: Outcome) -> None:
    """Accuracies before and after, and where the files are."""
    card = outcome.card
    if card:
        test = f", test {card['test_acc']:.2f} %" if "test_acc" in card else ""
        print(f"after finetuning: sparsity {card['sparsity']:.5g}, validation {card['val_acc_before']:.2f} % -> "
              f"{card['val_acc']:.2f} %{test} (best of {card['epochs']} epochs: {card['best_epoch']})")
    print(f"model, card and training log: {outcome.artifact.parent}")


def main(argv: Sequence[str] | None = None) -> None:
    """Describes the file, exports it, or finetunes from it."""
    args = parse_args(argv)
    artifact = load_artifact(args.file, args.type)
    if args.export:
        print(export.export(artifact, args.export, args.out, args.dtype or "float32", args.overwrite,
                            args.compact))
        return
    if not args.finetune:
        description = inspection.describe(artifact)
        print(json.dumps(description, indent=2) if args.json else inspection.render(description))
        return
    args.m_name = args.m_name or recognise_model(args, artifact)
    take_data(args, artifact)
    print_report(finetuning.finetune(open_run(args), artifact, phases(args), args))


if __name__ == "__main__":
    script(main)
