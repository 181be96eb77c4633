"""Finetune an artifact so that single weights, not layers, are frozen or have a learning rate of their own.

The weights that regrowth returned are those the record of a best allocation lists or, for a regrown model, those that
are active in it and pruned in the checkpoint that regrowth started from. All others are original weights.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils import checkpoint, stage1
from utils.analysis_utils import get_masks, has_masks, hold_weights, prunable_layers
from utils.common import UserError, positive_float, positive_int
from utils.datasets import DATASETS
from utils.inspection import Artifact, load_artifact, models_with_layers
from utils.regrowth import LayerRecord, RegrowthRecord
from utils.run import Run, add_model_option, add_overwrite_options, add_run_options
from utils.stage import hold_folder
from utils.stage1 import Outcome
from utils.training import FINETUNE_FINAL, Recipe, evaluate, reestimate_batch_norm

LR_ORIGINAL, LR_REGROWN = 1e-4, 1e-3
PHASE_EPOCHS = 10, 30
DATA = ("dataset", "data_dir", "image_size", "val_split", "precision")  # options that a run card answers too

Masks = Mapping[str, Tensor]  # layer name -> bool, True where the weight was regrown
Constrain = Callable[[Optimizer], Any]


@dataclass(frozen=True)
class Phase:
    """One training with an optimizer of its own; `trained` is a name of `TRAINED`.

    lr_original: learning rate of the original weights, where it differs from the recipe's.
    """

    trained: str
    recipe: Recipe
    lr_original: float | None = None


@dataclass
class Source:
    """The model to finetune, the artifact it is from, which of its weights were regrown (None: unknown), and path and
    SHA-256 of the checkpoint that regrowth started from, as far as they are known.

    reference: the model that gave a best allocation its values, where it has none.
    """

    model: nn.Module
    artifact: Path
    regrown: Masks | None = None
    start: str | None = None
    start_digest: str | None = None
    reference: Path | None = None


# --- options -------------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The options of finetuning, None or False unless given, and those of a run; returns their names and defaults.

    The options of `DATA` are None unless given too, for `take_data` to fill in, and their defaults in `defaults`.
    """
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
    add_run_options(parser)
    add_overwrite_options(parser)
    parser.set_defaults(defaults={name: parser.get_default(name) for name in DATA}, **dict.fromkeys(DATA))
    names = [*(option.dest for option in options), *DATA, "seed", "device", "root", "resume", "overwrite"]
    return {name: parser.get_default(name) for name in names}


def check_options(args: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """UserError for options that would have no effect or contradict each other; defaults: of `add_options`."""
    given = {name for name, default in defaults.items() if getattr(args, name) != default}
    given -= {"overwrite", "m_name"} if args.export else set()
    if given and not args.finetune:
        also = " or --export" if min(given) == "m_name" else ""
        raise UserError(f"--{min(given)} has no effect without --finetune{also}")
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


# --- the flow ------------------------------------------------------------------------------------------------------


def finetune(run: Run, artifact: Artifact, args: argparse.Namespace) -> Outcome:
    """Carries out the `phases` in order; the last one leaves ``finetuned_{stem}.pth`` with its run card.

    An earlier phase leaves ``finetuned_{stem}_phase_1.pth``. The test set is read once, for the final model.
    """
    plan = phases(args)
    source = load_source(run, artifact, plan, args)
    folder = args.save_dir or run.root / "finetune_savedir" / run.m_name
    run.held.add(hold_folder(folder, "--save_dir"))
    for number, phase in enumerate(plan, 1):
        suffix = "" if number == len(plan) else f"_phase_{number}"
        path = folder / f"finetuned_{artifact.path.stem}{suffix}.pth"
        outcome = _run_phase(run, source, phase, number, path, args)
        source.model, source.artifact = outcome.model, path
    stage1.read_test(run, [outcome])
    return outcome


def _run_phase(run: Run, source: Source, phase: Phase, number: int, path: Path, args: argparse.Namespace) -> Outcome:
    reset = args.reset_bn_stats and number == 1
    config = {"stage": "finetune", "phase": number, **run.identity(), "trained": phase.trained,
              "source": checkpoint.file_digest(source.artifact), "start": source.start_digest, "reset_bn_stats": reset,
              "reference": source.reference and checkpoint.file_digest(source.reference),
              "lr_original": phase.lr_original, "recipe": phase.recipe.as_dict()}
    stage = stage1.open_stage(run, path, config)
    if stage.finished:
        return stage1.reuse(run, stage)
    model = source.model
    facts = {"val_acc_before": evaluate(model, run.val, run.precision).accuracy}
    print(f"validation before finetuning {facts['val_acc_before']:.2f} %")
    if reset:
        if not reestimate_batch_norm(model, run.train, run.precision):
            raise UserError("--reset_bn_stats: the model has no batch normalisation; leave it out")
        facts["val_acc_after_bn_reset"] = evaluate(model, run.val, run.precision).accuracy
        print(f"validation with new batch-norm statistics {facts['val_acc_after_bn_reset']:.2f} %")
    if source.regrown is not None:
        facts["regrown"] = sum(int(mask.sum()) for mask in source.regrown.values())
    if phase.trained == "regrown":
        print(f"only the {facts['regrown']:,} regrown weights train; original weights, biases and affine parameters "
              "keep every bit, while the running statistics of batch normalisation adapt")
    params, constrain = TRAINED[phase.trained](model, source.regrown, phase)
    trained, _ = stage1.train(run, stage, model, phase.recipe, f"finetune {phase.trained}",
                              seed=stage1.finetuning_seed(run, number), params=params, constrain=constrain)
    model.requires_grad_(True)
    return stage1.finish(run, stage, model, {**trained, **facts, "starting_checkpoint": source.start})


# --- where the model comes from ------------------------------------------------------------------------------------


def recorded_start(artifact: Artifact) -> tuple[str | None, str | None]:
    """Path and SHA-256 of the starting checkpoint, by a best allocation or by the run card of a regrown model."""
    if artifact.kind.is_best:
        return artifact.content.get("starting_checkpoint"), artifact.content.get("starting_digest")
    return artifact.card.get("starting_checkpoint"), artifact.card.get("config", {}).get("start")


def find_start(artifact: Artifact, given: Path | None, root: Path) -> Path | None:
    """The starting checkpoint: `given`, or the recorded one, as it was named, under `root` or where stage 1 puts it
    there (the root may have moved); None if none is known.

    Raises UserError when it is missing, or is another file than the recorded digest says.
    """
    path, digest = recorded_start(artifact)
    if given is None and path is None:
        return None
    recorded = Path(str(path))
    candidates = [given] if given else [recorded, root / recorded, root.joinpath(*recorded.parts[-3:])]
    found = [path for path in candidates if path.is_file()]
    if not found:
        raise UserError(f"no starting checkpoint at {candidates[0]}, from which {artifact.path} was regrown; name it "
                        "with --starting_checkpoint FILE")
    right = [path for path in found if digest in (None, checkpoint.file_digest(path))]
    if not right:
        raise UserError(f"{found[0]} is not the checkpoint that {artifact.path} was regrown from (its SHA-256 differs "
                        "from the recorded one); name the right one with --starting_checkpoint FILE")
    return right[0]


def recognise_model(args: argparse.Namespace, artifact: Artifact) -> str:
    """The model's name, by what is in the artifact or else in its starting checkpoint; UserError if unclear."""
    if artifact.kind.is_best:
        names = models_with_layers(artifact.content["regrow_indices"])
        if len(names) == 1:
            return names[0]
        start = find_start(artifact, args.starting_checkpoint, args.root)
        network = load_artifact(start).network if start else None
    else:
        network = artifact.network
    if network is None:
        raise UserError(f"{artifact.path} does not tell which model it belongs to; name it with --model")
    return network[0]


def take_data(args: argparse.Namespace, artifact: Artifact) -> None:
    """Fills the options of the data that were not given: from the run card, said in a line, else the defaults.

    The card is the artifact's own or, where it has none, as a best allocation, that of its starting checkpoint.
    """
    start = find_start(artifact, args.starting_checkpoint, args.root) if artifact.kind.is_best else None
    card = artifact.card or (start and checkpoint.read_card(start)) or {}
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


def load_source(run: Run, artifact: Artifact, phases: Sequence[Phase], args: argparse.Namespace) -> Source:
    """The artifact's model, a best allocation replayed on its starting checkpoint, with the regrown weights.

    Raises UserError when it is another model's, something it needs is missing, or a phase needs to know the regrown
    weights and they are unknown.
    """
    needs_regrown = any(phase.trained != "all" for phase in phases)
    source = _replay(run, artifact, args) if artifact.kind.is_best else _load_model(run, artifact, needs_regrown, args)
    if needs_regrown and not any(bool(mask.any()) for mask in source.regrown.values()):
        raise UserError(f"{artifact.path} has no regrown weights: all that are active in it are active in "
                        f"{source.start} too")
    return source


def _load_model(run: Run, artifact: Artifact, needs_regrown: bool, args: argparse.Namespace) -> Source:
    if args.reference_model is not None:
        raise UserError(f"--reference_model gives values to a best allocation without any; {artifact.path} is a "
                        f"{artifact.kind.name} and has its own")
    model = stage1.load_outcome(run, artifact.path, artifact.weights).model
    if not (needs_regrown or args.starting_checkpoint):
        return Source(model, artifact.path, None, *recorded_start(artifact))
    start = find_start(artifact, args.starting_checkpoint, run.root)
    if start is None:
        raise UserError(f"it is unknown which weights of {artifact.path} were regrown; name the checkpoint that "
                        "regrowth started from with --starting_checkpoint FILE")
    if not has_masks(model):
        raise UserError(f"{artifact.path} is a dense model without masks; no weight of it counts as regrown")
    pruned = stage1.load_pruned(run, start)
    before = get_masks(pruned.model)
    regrown = {name: mask & ~before[name] for name, mask in get_masks(model).items()}
    return Source(model, artifact.path, regrown, str(start), pruned.digest)


def _replay(run: Run, artifact: Artifact, args: argparse.Namespace) -> Source:
    start = find_start(artifact, args.starting_checkpoint, run.root)
    if start is None:
        raise UserError(f"{artifact.path} does not say which pruned checkpoint it is for; name it with "
                        "--starting_checkpoint FILE")
    pruned, reference = stage1.load_pruned(run, start), None
    if "regrow_values" not in artifact.content:
        reference = args.reference_model or checkpoint.dense_path(run.root, run.m_name)
    elif args.reference_model is not None:
        raise UserError(f"{artifact.path} has the values of its regrown weights; leave --reference_model out")
    values = reference and stage1.load_outcome(run, reference).model
    try:
        record = record_from(artifact.content["regrow_indices"], pruned.model, values) if reference else \
            RegrowthRecord.from_state_dict(artifact.content)
        record.replay(pruned.model)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(f"{artifact.path} does not fit {start}: {' '.join(str(error).split())}; name the right one "
                        "with --starting_checkpoint FILE") from error
    return Source(pruned.model, artifact.path, record.masks(pruned.model), str(start), pruned.digest, reference)


def record_from(indices: Mapping[str, Any], model: nn.Module, reference: nn.Module) -> RegrowthRecord:
    """The record of a published allocation without values: the weights at the indices come back as in the reference.

    indices: layer name -> positions, as a list, array or tensor of flat positions (n,) or of coordinates (n, weight's
    dimensions); model: the pruned one. Raises ValueError (or what PyTorch raises) for an unknown layer or a position
    outside of the weight.
    """
    layers, values, records = prunable_layers(model), prunable_layers(reference), {}
    for name, where in indices.items():
        if name not in layers:
            raise ValueError(f"it names a layer '{name}', which the model does not have")
        weight = layers[name].weight
        where = torch.as_tensor(where, dtype=torch.int64, device="cpu").numpy()
        try:
            flat = np.ravel_multi_index(tuple(where.T), weight.shape) if where.ndim == 2 else where
            np.unravel_index(flat, weight.shape)
        except ValueError as error:
            raise ValueError(f"positions outside of a weight of shape {tuple(weight.shape)}") from error
        chosen = torch.from_numpy(np.unique(flat)).to(weight.device)
        zeros = torch.zeros_like(chosen)
        records[name] = LayerRecord(chosen, zeros.byte(), zeros.short() + 1, values[name].weight.detach().take(chosen),
                                    layers[name].weight_orig.detach().take(chosen))
    return RegrowthRecord(records, ("reference",))


# --- which weights train: rules (model, regrown, phase) -> params and constrain of a `Trainer` ---------------------


def train_regrown(model: nn.Module, regrown: Masks, phase: Phase) -> tuple[Any, Constrain]:
    """Only regrown weights train; original weights, biases and affine parameters keep every bit.

    During a step the held weights and their gradients are 0, so that no optimizer gathers momentum, second moments or
    weight decay there; afterwards they get their values back. Running statistics of batch normalisation still adapt.
    """
    layers = prunable_layers(model)
    pairs = [(layers[name].weight_orig, mask) for name, mask in regrown.items() if bool(mask.any())]
    params = [param for param, _ in pairs]
    model.requires_grad_(False)  # spares the work for gradients that nobody uses
    for param in params:
        param.requires_grad_(True)
    keeps = [torch.empty_like(param).copy_(mask) for param, mask in pairs]

    @torch.no_grad()
    def hide_held(*_: object) -> None:
        torch._foreach_mul_(params, keeps)
        for param, keep in zip(params, keeps, strict=True):
            if param.grad is not None:  # else its layer did not run
                param.grad.mul_(keep)

    def constrain(optimizer: Optimizer) -> None:
        hold_weights(optimizer, pairs)
        optimizer.register_step_pre_hook(hide_held)

    return params, constrain


def train_at_two_rates(model: nn.Module, regrown: Masks, phase: Phase) -> tuple[Any, Constrain]:
    """Regrown weights move at the recipe's learning rate, all other parameters at `phase.lr_original`.

    Within one tensor every element's update is scaled by the ratio of its rate to the recipe's: the updates of SGD and
    AdamW, weight decay included, are proportional to the learning rate. Pruned weights have rate 0.
    """
    ratio = phase.lr_original / phase.recipe.lr
    mixed, scales = [], []
    for name, layer in prunable_layers(model).items():
        mixed.append(layer.weight_orig)
        scales.append(torch.where(regrown[name], 1.0, ratio * layer.weight_mask).to(layer.weight_orig))
    before = [torch.empty_like(param) for param in mixed]

    @torch.no_grad()
    def remember(*_: object) -> None:
        torch._foreach_copy_(before, mixed)

    @torch.no_grad()
    def scale_updates(*_: object) -> None:
        torch._foreach_lerp_(before, mixed, scales)
        torch._foreach_copy_(mixed, before)

    def constrain(optimizer: Optimizer) -> None:
        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(scale_updates)

    whole = {id(param) for param in mixed}
    rest = [param for param in model.parameters() if id(param) not in whole]
    return [{"params": mixed}, {"params": rest, "lr": phase.lr_original}], constrain


TRAINED: dict[str, Callable[[nn.Module, Any, Phase], tuple[Any, Any]]] = {
    "all": lambda *_: (None, None), "regrown": train_regrown, "two rates": train_at_two_rates}
