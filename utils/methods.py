"""The registry of stage-2 methods, all that tells `rl_regrowth_nas.py` and `rl_saliency_regrowth.py` apart, and the
command line that they share.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.allocation import ALLOCATORS
from utils.analysis_utils import GRADIENT_KINDS
from utils.common import (
    UserError,
    count,
    epoch_count,
    fraction,
    needed,
    not_negative,
    positive_float,
    positive_int,
    unit_interval,
)
from utils.controller import ACTION_SPACES, SearchConfig
from utils.mask_schedule import add_mask_options, mask_options
from utils.regrowth import INITIALISERS, SELECTORS
from utils.run import KINDS, add_recipe_numbers, add_start_options, recipe_changes, run_parser
from utils.training import RECIPES


@dataclass(frozen=True)
class Method:
    """The names of a script's artifacts, and how weights are chosen within a layer.

    rule: the names, in `SELECTORS` and `INITIALISERS`, that the arguments ask for; add_options: adds the method's own
    options to a parser, of names that no other method has; options: their names, for run cards.
    """

    name: str
    save_dir: str
    search_stem: str
    best_file: str
    rule: Callable[[argparse.Namespace], tuple[str, str]]
    add_options: Callable[[argparse.ArgumentParser], None]
    options: tuple[str, ...]


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

SEARCH_OPTIONS = ("num_epochs", "batch_size", "learning_rate", "hidden_size", "reward_temperature", "start_beta",
                  "end_beta", "decay_fraction", "action_space_size", "mini_finetune_epochs", "search_budget",
                  "warm_start", "action_space")


# --- the command line that all methods share -------------------------------------------------------------------------


def parse_regrowth_args(name: str, description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line of a method's script; UserError for values that contradict each other."""
    parser = regrowth_parser(description, METHODS[name])
    args = parser.parse_args(argv)
    changed = [option for option in (*SEARCH_OPTIONS, "save_freq")
               if getattr(args, option) != parser.get_default(option)]
    changed += ["resume FILE"] if args.resume not in (None, "latest") else []
    if changed and args.allocation != "rl":
        option = changed[0].replace("warm_start", "no_warm_start")
        raise UserError(f"--{option} is for the search, which --allocation {args.allocation} does without; leave it "
                        "out, or take --allocation rl")
    check_start(args, parser)
    _check_evidence_options(args, METHODS[name], parser)
    complete(args, METHODS[name])
    _check_resumed(args)
    return args


def check_start(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """UserError for a `--start_sparsity` beside a file, which has a sparsity of its own."""
    if args.starting_checkpoint not in KINDS and args.start_sparsity != parser.get_default("start_sparsity"):
        raise UserError("--start_sparsity finds the checkpoint under --root, and --starting_checkpoint gives a file; "
                        "leave one of them out")


def _check_resumed(args: argparse.Namespace) -> None:
    """UserError for a `--resume FILE` that is none of the steps'."""
    if args.resume in (None, "latest") or args.regrow_iterations == 1:
        return
    steps = {(args.save_dir / f"step_{number}").resolve() for number in range(1, args.regrow_iterations + 1)}
    if Path(args.resume).resolve().parent not in steps:
        raise UserError(f"--resume {args.resume} lies in no folder of a step, such as {args.save_dir / 'step_1'}; "
                        "without a name the latest checkpoint is taken")


def _check_evidence_options(args: argparse.Namespace, method: Method, parser: argparse.ArgumentParser) -> None:
    """UserError for options about evidence that neither the selection nor the initial values look at."""
    selection, values = method.rule(args)
    looks_at = {*needed(SELECTORS[selection]), *needed(INITIALISERS[values])} & {*GRADIENT_KINDS}
    readers = {"saliency_source": looks_at - {"gradient"}, "saliency_max_batches": looks_at}  # gradient: of the pruned
    for option, found in readers.items():
        if option in method.options and not found and getattr(args, option) != parser.get_default(option):
            raise UserError(f"--{option} does nothing with --selection {selection}; leave it out")


def regrowth_arguments(name: str, **given: Any) -> argparse.Namespace:
    """What a method's script would have read, for studies that call stage 2 themselves: its defaults, but `given`.

    given: at least m_name; also options of the other methods. Raises ValueError for an unknown option, and UserError
    as the command line does.
    """
    defaults = vars(regrowth_parser("", *METHODS.values()).parse_args(["--m_name", given["m_name"]]))
    if unknown := given.keys() - defaults.keys():
        raise ValueError(f"stage 2 has no option {', '.join(sorted(unknown))}")
    return complete(argparse.Namespace(**{**defaults, **given}), METHODS[name])


def complete(args: argparse.Namespace, method: Method) -> argparse.Namespace:
    """The arguments with what follows from them: `method`, `finetuning` (the final recipe), `search` (its
    configuration), `episode_schedule` (of the learning rate in its trainings), `mask` (how it moves in the final
    finetuning), a `save_dir`, and `decisive` (the options that a regrown model depends on, beside its recipe).
    UserError for values that contradict each other.
    """
    args.method = method
    args.save_dir = args.save_dir or args.root / method.save_dir / args.m_name
    args.finetuning = replace(RECIPES[args.recipe].final, **recipe_changes(args, "finetune_"))
    args.episode_schedule = RECIPES[args.recipe].episode_schedule
    args.mask = mask_options(args, args.finetuning.epochs, "magnitude", at_target=True)
    for option in ("only_live", "target_layers"):
        if args.mask and getattr(args, option):
            raise UserError(f"--{option} says where weights may return, and --mask_schedule {args.mask['schedule']} "
                            "has them return anywhere during the finetuning; leave one of them out")
    search = {name: getattr(args, name) for name in SEARCH_OPTIONS}
    rungs = tuple(search.pop("mini_finetune_epochs"))
    args.search = SearchConfig(**{**search, "rungs": rungs, "search_budget": args.search_budget or None})
    if args.allocation == "rl":  # raises where the budget pays no batch
        args.search.ladder()
    if args.target_sparsity is not None and args.target_sparsity >= args.start_sparsity \
            and args.starting_checkpoint in KINDS:
        raise UserError(f"--target_sparsity {args.target_sparsity} is not below --start_sparsity "
                        f"{args.start_sparsity}; regrowth makes a model denser")
    if args.max_ratio == 0:
        raise UserError("--max_ratio 0 lets no weight return; use a fraction up to 1")
    names = ["allocation", "max_ratio", "target_layers", "ssim_batches", *method.options]
    if args.allocation == "rl":
        names += [name for name in SEARCH_OPTIONS if name != "action_space" or args.action_space != "ratio"]
    names += [name for name in ("only_live", "mask") if getattr(args, name)]  # older artifacts, without, still fit
    if args.allocation == "rl" and args.episode_schedule != "constant":  # likewise
        names += ["episode_schedule"]
    args.decisive = {name: getattr(args, name) for name in names}
    return args


def regrowth_parser(description: str, *methods: Method) -> argparse.ArgumentParser:
    """A parser with the options that all methods share, and those of `methods`, of which the first names the folder."""
    parser = run_parser(description, resumable=False)
    _add_start(parser)
    _add_search(parser)
    group = parser.add_argument_group("final finetuning")
    group.add_argument("--recipe", choices=list(RECIPES), default="published",
                       help="defaults of the options below; short: few epochs, for a laptop")
    group.add_argument("--finetune_epochs", type=count, help="epochs after the weights have returned")
    add_recipe_numbers(group, "finetune_", "final")
    group.add_argument("--finetune_batch_size", type=positive_int, help="images, default: the recipe's")
    group.add_argument("--patience", type=positive_int,
                       help="epochs without a better validation accuracy before it stops")
    add_mask_options(parser, "fixed keeps the mask of the regrown model; the others go on from there")
    group = parser.add_argument_group("artifacts")
    group.add_argument("--save_dir", type=Path, help=f"default: {methods[0].save_dir}/{{m_name}} under --root")
    group.add_argument("--save_freq", type=positive_int, default=1, help="controller updates between two checkpoints")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", nargs="?", const="latest", metavar="FILE",
                        help="continue an interrupted run, from this controller checkpoint or from the latest")
    either.add_argument("--overwrite", action="store_true", help="redo steps whose artifacts exist already")
    for method in methods:
        method.add_options(parser)
    return parser


def _add_start(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("regrowth")
    add_start_options(group)
    amount = group.add_mutually_exclusive_group()
    amount.add_argument("--target_sparsity", type=fraction,
                        help="sparsity after the last step, instead of --regrow_step")
    amount.add_argument("--regrow_step", type=fraction, default=0.02,
                        help="weights that return in a step, as a fraction of all prunable weights")
    group.add_argument("--regrow_iterations", type=positive_int, default=1,
                       help="steps, each from the model that the one before left")
    group.add_argument("--target_layers", nargs="+", metavar="NAME",
                       help="layers that weights may return to, by name or pattern; default: all")
    group.add_argument("--max_ratio", type=unit_interval, default=1.0,
                       help="largest fraction of a layer's pruned weights that may return in a step")
    group.add_argument("--only_live", action="store_true", help="let weights return only where they lie on a path of "
                       "active weights from the image to the output; default: how many do is reported")
    group.add_argument("--ssim_batches", type=positive_int, default=10,
                       help="batches of 500 training images over which drift is measured")


def _add_search(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    group.add_argument("--allocation", choices=["rl", *ALLOCATORS], default="rl",
                       help="how many weights each layer gets: the controller's search, or a rule")
    group.add_argument("--search_budget", type=count, help="training epochs over all episodes; 0 for no limit")
    group.add_argument("--mini_finetune_epochs", type=epoch_count, nargs="+", default=list(SearchConfig.rungs),
                       help="epochs of an episode (fractions allowed); several: rungs of successive halving, by 3 "
                       "(published: 50)")
    group.add_argument("--no_warm_start", dest="warm_start", action="store_false",
                       help="do not try the deterministic rules as first candidates (published)")
    group.add_argument("--num_epochs", type=positive_int, help="controller updates")
    group.add_argument("--batch_size", type=positive_int, help="episodes per controller update")
    group.add_argument("--learning_rate", type=positive_float, help="of the controller")
    group.add_argument("--hidden_size", type=positive_int, help="of its LSTM cell")
    group.add_argument("--action_space_size", type=positive_int, help="actions that it chooses from for each layer")
    group.add_argument("--action_space", choices=list(ACTION_SPACES),
                       help="share: an action scales the layer's share under the best rule; ratio: it is a fraction of "
                       "what the layer can take (published)")
    group.add_argument("--reward_temperature", type=positive_float,
                       help="accuracy (fraction) above the baseline that counts as an advantage of 1")
    group.add_argument("--start_beta", type=not_negative, help="entropy bonus at the start")
    group.add_argument("--end_beta", type=not_negative, help="entropy bonus at the end")
    group.add_argument("--decay_fraction", type=unit_interval,
                       help="fraction of the updates over which the entropy bonus falls")
    parser.set_defaults(**{name: getattr(SearchConfig, name) for name in SEARCH_OPTIONS if hasattr(SearchConfig, name)})
