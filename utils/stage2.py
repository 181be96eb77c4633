"""Stage 2: from a pruned checkpoint to a regrown one; everything that `rl_regrowth_nas.py` and
`rl_saliency_regrowth.py` share. What they do not share, which rule selects weights within a layer and with what values
they return, is a `Method`.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from utils import checkpoint, plots, stage1
from utils.allocation import ALLOCATORS, AllocationProblem
from utils.analysis_utils import (
    BlockwiseFeatureExtractor,
    clone_model,
    compute_block_ssim,
    count_pruned_params,
    has_masks,
    prunable_layers,
)
from utils.channels import count_live
from utils.common import UserError, derive_seed, generator
from utils.controller import RegrowthPolicyGradient
from utils.data_loader import BatchLoader
from utils.distributed import World
from utils.methods import Method, search_config
from utils.regrowth import (
    BEST_ENTRIES,
    Evidence,
    RegrowthRecord,
    SaliencyComputer,
    WeightRegrowth,
    dead_positions_taken,
    layer_capacities,
    reference_magnitudes,
    regrowth_budget,
    target_layers,
)
from utils.run import RECIPE_NUMBERS, Run, prerequisite
from utils.search import Found, search_allocation
from utils.stage import Stage, check_same_files, hold_folder
from utils.stage1 import Outcome, PruneStep
from utils.training import Recipe, Trainer, accuracy_with_new_statistics, evaluate

SAMPLE = "class-balanced sample"  # part of what results depend on: earlier ones looked at the first batches only
DRIFT_BATCH, SALIENCY_BATCH = 500, 128  # images
KINDS = (None, "oneshot", "iterative")  # of `--starting_checkpoint` that are no files
Regrower = Callable[[nn.Module], WeightRegrowth]  # gives the rule that regrows weights in this model


@dataclass(frozen=True)
class Step:
    """One regrowth: where it starts, how many weights return, where its artifacts go."""

    number: int
    start: Outcome
    budget: int
    sparsity_after: float
    folder: Path
    artifact: Path


# --- where it starts -----------------------------------------------------------------------------------------------


def load_dense(run: Run, args: argparse.Namespace) -> Outcome:
    """The dense model of stage 1; UserError with the command that makes it when it is missing."""
    return stage1.load_outcome(run, _found(run, args, "dense", checkpoint.dense_path(run.root, run.m_name)))


def _found(run: Run, args: argparse.Namespace, kind: str, path: Path) -> Path:
    """The path; UserError if nothing lies there, with the command that makes all that is missing under the root.

    Where the pruned model is there, or is a file of the user's, that is the dense model alone.
    """
    if path.is_file():
        return path
    start, words = start_path(run, args), ["--pruner", "none"]
    if path == start or not start.is_file() and args.starting_checkpoint in KINDS:
        words = ["--sparsity", checkpoint.format_sparsity(args.start_sparsity), "--pruner", "magnitude", "--iter_end",
                 "10" if args.starting_checkpoint == "iterative" else "1"]
    raise UserError(f"no {kind} checkpoint at {path}; {prerequisite(args, path, *words)}")


def start_path(run: Run, args: argparse.Namespace) -> Path:
    """The file of `--starting_checkpoint`, or of `--start_sparsity` under the root."""
    if args.starting_checkpoint in KINDS:
        return checkpoint.pruned_path(run.root, run.m_name, args.start_sparsity)
    return Path(args.starting_checkpoint)


def load_start(run: Run, args: argparse.Namespace) -> Outcome:
    """The pruned model to start from: a path, or the checkpoint of `--start_sparsity` under the root.

    UserError when it is missing (with the command that makes it), is of another kind than asked for (naming the kind
    that is there), or is not a pruned model.
    """
    kind, path = args.starting_checkpoint, start_path(run, args)
    if kind not in KINDS and not path.is_file():
        raise UserError(f"no pruned checkpoint at {path}")
    start = stage1.load_outcome(run, _found(run, args, "pruned", path))
    config = start.card.get("config", {})
    found = config.get("schedule", "unknown").replace("-", "")
    if kind in ("oneshot", "iterative") and found != kind:
        made = f"{found}, pruned by {config['pruner']}" if "pruner" in config else "of unknown origin (no run card)"
        raise UserError(f"{path} is {made}, not {kind}; ask for what is there, give a path to "
                        "--starting_checkpoint, or keep several under different --root folders")
    if not has_masks(start.model):
        raise UserError(f"{path} is a dense model; regrowth starts from a pruned one (with weight_mask entries)")
    return start


def plan_step(run: Run, args: argparse.Namespace, method: Method, start: Outcome, number: int) -> Step:
    """Budget, sparsity and folder of step `number` of `--regrow_iterations`."""
    counts = count_pruned_params(start.model)
    if args.target_sparsity is None:
        budget = regrowth_budget(start.model, regrow_step=args.regrow_step)
    else:
        left = args.regrow_iterations - number + 1
        target = counts.sparsity - (counts.sparsity - args.target_sparsity) / left
        budget = regrowth_budget(start.model, target_sparsity=args.target_sparsity if left == 1 else target)
    capacity = sum(_capacities(start.model, args).values())
    if not capacity and args.only_live:
        raise UserError("--only_live: no weight could return, since no path leads from the image to the output; leave "
                        "the option out")
    after = 1.0 - (counts.surviving + min(budget, capacity)) / counts.total
    folder = save_folder(run, args, method) / (f"step_{number}" if args.regrow_iterations > 1 else ".")
    artifact = folder / f"regrown_{run.m_name}_{checkpoint.format_sparsity(after)}.pth"
    return Step(number, start, budget, after, folder, artifact)


def save_folder(run: Run, args: argparse.Namespace, method: Method) -> Path:
    """`--save_dir`, or the method's default folder under the root."""
    return args.save_dir or run.root / method.save_dir / run.m_name


def _capacities(model: nn.Module, args: argparse.Namespace) -> dict[str, int]:
    """Weights that may return per target layer: at most `--max_ratio` of what is pruned there.

    With `--only_live`, of those that would be on a live path.
    """
    with dead_positions_taken(model) if args.only_live else nullcontext():
        capacities = layer_capacities(model, target_layers(model, args.target_layers))
    ratio = Fraction(str(args.max_ratio))  # as it was written: 0.29 * 100 is just below 29 in floating point
    return {name: int(ratio * capacity) for name, capacity in capacities.items()}


# --- evidence ------------------------------------------------------------------------------------------------------


def reference_path(run: Run, name: str | None) -> Path | None:
    """The file of `--reference_model`, named by path or by its sparsity under the root; None: the dense model.

    UserError when it is missing, for a sparsity with what makes it.
    """
    if name is None:
        return None
    try:
        path = checkpoint.pruned_path(run.root, run.m_name, float(name))
    except ValueError:
        path = Path(name)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; --reference_model takes a file, or a sparsity that main.py "
                        "--sparsity has made under this root (add --resume there, to keep the dense model)")
    return path


def reference_config(run: Run, name: str | None) -> dict[str, str]:
    """What a result depends on through `--reference_model`: the file's digest, none for the dense model."""
    path = reference_path(run, name)
    return {"reference": checkpoint.file_digest(path)} if path else {}


def evidence_maker(run: Run, args: argparse.Namespace, dense: nn.Module) -> Callable[[nn.Module], Evidence]:
    """Gives the evidence about a pruned model; what comes from the dense or the reference model alone is made once.

    All models see the same class-balanced sample of the training images, un-augmented. Saliency is that of the dense
    model, or of the pruned one by `--saliency_source`; the gradient is the pruned model's. UserError if the reference
    cannot be loaded.
    """
    path = reference_path(run, getattr(args, "reference_model", None))
    reference = stage1.load_outcome(run, path).model if path else dense

    def sample(batches: int, size: int) -> BatchLoader:
        return run.train.balanced_sample(batches * size, size, derive_seed(run.seed, "evidence"))

    def pass_over(model: nn.Module, source: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        computer = SaliencyComputer(model, sample(args.saliency_max_batches, SALIENCY_BATCH), precision=run.precision,
                                    source=source)
        return computer.compute(), computer.gradients

    def maps(model: nn.Module) -> dict[str, np.ndarray]:
        extractor = BlockwiseFeatureExtractor(model, list(prunable_layers(model)), run.precision)
        return extractor.extract(sample(args.ssim_batches, DRIFT_BATCH))
    dense_pass, dense_maps, magnitude = (cache(partial(*call)) for call in (
        (pass_over, dense, "dense"), (maps, dense), (reference_magnitudes, reference)))

    def about(pruned: nn.Module) -> Evidence:
        pruned_pass = cache(partial(pass_over, pruned, "pruned"))
        return Evidence(reference=reference, magnitude=magnitude,
                        saliency=lambda: (dense_pass if args.saliency_source == "dense" else pruned_pass)()[0],
                        gradient=lambda: pruned_pass()[1],
                        drift=lambda: compute_block_ssim(dense_maps(), maps(pruned)))
    return about


def regrower_of(run: Run, args: argparse.Namespace, method: Method, evidence: Evidence) -> Regrower:
    """The method's rule on this evidence; what it needs is made at its first use."""
    rule, init_strategy = method.rule(args)
    seed = derive_seed(run.seed, "regrowth")
    return lambda model: WeightRegrowth(model, rule, evidence, init_strategy, seed, args.only_live)


def allocation_problem(args: argparse.Namespace, step: Step, evidence: Evidence) -> AllocationProblem:
    """Target layers in the order of their drift (lowest SSIM first) with capacities and sizes."""
    model, capacities = step.start.model, _capacities(step.start.model, args)
    drift = evidence.make("drift")
    order = sorted(capacities, key=lambda name: drift[name])
    weights = {name: layer.weight for name, layer in prunable_layers(model).items()}
    return AllocationProblem(
        layers=tuple(order), capacities=tuple(capacities[name] for name in order), budget=step.budget,
        sizes=tuple(weights[name].numel() for name in order), fan=tuple(sum(weights[name].shape) for name in order),
        drift=tuple(drift[name] for name in order))


# --- one step ------------------------------------------------------------------------------------------------------


def regrow(run: Run, args: argparse.Namespace, method: Method, passes: int = 0,
           world: World | None = None) -> list[Outcome]:
    """All steps of a stage-2 script, each from the model before; returns the starting and the regrown models.

    passes: over the training images before the final finetuning, which sees them in the order of a finetuning that has
    had so many (`stage1.prune_and_finetune` begins with none); world: the processes that train the trials of a search
    (default: this one), all of which call this; the leader does everything else.
    """
    world = world or World()
    dense, start = load_dense(run, args), load_start(run, args)
    run.held.add(hold_folder(save_folder(run, args, method), "--save_dir"))
    about, outcomes = evidence_maker(run, args, dense.model), [start]
    for number in range(1, args.regrow_iterations + 1):
        step = plan_step(run, args, method, outcomes[-1], number)
        config = {**step_config(run, args, method, step, dense), "passes_before": passes}
        check_same_files(world, config)
        if world.leads:
            outcomes.append(_regrow_step(run, args, method, step, config, about, world))
            world.share()
        else:
            regrower = regrower_of(run, args, method, about(step.start.model))
            while layers := world.share():  # a search begins; None: the step is finished
                world.serve(partial(trial_reward, run, args, step, regrower, layers))
            outcomes.append(stage1.load_outcome(run, step.artifact))
    return outcomes


def step_config(run: Run, args: argparse.Namespace, method: Method, step: Step, dense: Outcome) -> dict[str, Any]:
    """The arguments that determine a regrown model."""
    names = ("allocation", "max_ratio", "target_layers", "ssim_batches", *method.options)
    if args.allocation == "rl":
        names += ("num_epochs", "batch_size", "learning_rate", "hidden_size", "reward_temperature", "start_beta",
                  "end_beta", "decay_fraction", "action_space_size", "mini_finetune_epochs", "search_budget",
                  "warm_start")
        if args.action_space != "ratio":  # searches of earlier versions, all by ratios, do not say
            names += ("action_space",)
    names += ("only_live",) if args.only_live else ()  # not where it is off, so that what was made before it still fits
    names += ("mask",) if args.mask else ()
    options = {name: getattr(args, name) for name in names}
    return {"stage": "regrow", "method": method.name, **run.identity(), "budget": step.budget,
            "evidence": SAMPLE, **reference_config(run, getattr(args, "reference_model", None)),
            "start": step.start.digest, "dense": dense.digest,
            "recipe": final_recipe(args).as_dict(), **{key: str(value) if isinstance(value, Path) else value
                                                       for key, value in options.items()}}


def final_recipe(args: argparse.Namespace) -> Recipe:
    """The final finetuning, by the recipe and what the command line changes; `args` are complete."""
    numbers = {field: getattr(args, f"finetune_{field}") for field in RECIPE_NUMBERS}
    return Recipe(**numbers, epochs=args.finetune_epochs, batch_size=args.finetune_batch_size, patience=args.patience)


def _regrow_step(run: Run, args: argparse.Namespace, method: Method, step: Step, config: Mapping[str, Any],
                 about: Callable[[nn.Module], Evidence], world: World) -> Outcome:
    stage = Stage(step.artifact, config, resume=args.resume is not None, overwrite=args.overwrite)
    if stage.finished:
        return stage1.reuse(run, stage)
    started, start = time.perf_counter(), step.start
    evidence = about(start.model)
    problem, regrower = allocation_problem(args, step, evidence), regrower_of(run, args, method, evidence)
    found = _find_allocation(run, args, method, step, problem, regrower, config, world)
    before = evaluate(start.model, run.val, run.precision).accuracy
    model, record = apply_allocation(start.model, problem.layers, found.allocation, regrower, step.number)
    regrown = evaluate(model, run.val, run.precision).accuracy
    reestimated = accuracy_with_new_statistics(model, run.train, run.val, run.precision)
    regrowth = {"val_acc_after_regrowth": regrown, "val_acc_after_regrowth_bn": reestimated,
                "allocation": dict(zip(problem.layers, found.allocation))}
    checkpoint.save_checkpoint(  # `BEST_ENTRIES` says what each entry is; the record replays it on the start
        {"epoch": found.epoch, "reward": found.reward, "accuracy": regrown / 100, **regrowth, **record.state_dict(),
         "timestamp": time.strftime("%Y-%m-%d %H:%M:%S"), "starting_checkpoint": str(start.artifact),
         "starting_digest": start.digest, "entries": BEST_ENTRIES},
        step.folder / method.best_file.format(m_name=run.m_name))
    sparsity_before = count_pruned_params(start.model).sparsity
    print(f"{record.count} weights returned: sparsity {sparsity_before:.5g} -> "
          f"{count_pruned_params(model).sparsity:.5g}, validation {before:.2f} % -> {regrown:.2f} %, "
          f"{reestimated:.2f} % with batch-norm statistics re-estimated, before finetuning")
    live = count_live(model, record.masks(model))
    label, mover = f"finetune {checkpoint.format_sparsity(step.sparsity_after)}", None
    if args.mask:
        label = f"{args.mask['schedule']}, {label}"
        moves = PruneStep("magnitude", args.mask["schedule"], step.number, step.sparsity_after, mask=args.mask)
        mover = stage1.mask_mover(run, model, moves, stage1.pruning_seed(run, moves), evidence.reference)
    facts = stage1.finetune(run, stage, model, final_recipe(args), label, seed=stage1.finetuning_seed(run), mover=mover,
                            passes_before=config["passes_before"])
    facts |= {"val_acc_before": before, **regrowth, "sparsity_before": sparsity_before, "regrown": record.count,
              "regrown_live": live, "starting_checkpoint": str(start.artifact),
              "start_test_acc": start.card.get("test_acc"), "drift": dict(zip(problem.layers, problem.drift)),
              "search_epochs": found.epochs_spent, "allocation_source": found.source,
              "seconds": time.perf_counter() - started}
    stage.finish(model.state_dict(), run.card(**facts))
    return Outcome(model, step.artifact, stage.card)


def _find_allocation(run: Run, args: argparse.Namespace, method: Method, step: Step, problem: AllocationProblem,
                     regrower: Regrower, config: Mapping[str, Any], world: World) -> Found:
    if args.allocation != "rl":
        chosen = ALLOCATORS[args.allocation](problem, generator(run.seed, "allocation"))
        return Found(chosen, None, 0, 0, args.allocation)
    reward = partial(trial_reward, run, args, step, regrower, problem.layers)
    search = RegrowthPolicyGradient(problem, reward, search_config(args), derive_seed(run.seed, "search"), world)
    world.share(problem.layers)
    found = search_allocation(search, args, config, step.folder / method.search_stem, step.sparsity_after)
    world.share()
    return found


def trial_reward(run: Run, args: argparse.Namespace, step: Step, regrower: Regrower, layers: Sequence[str],
                 allocation: Sequence[int], seed: int, epochs: float) -> float:
    """Of an allocation to the layers: best validation accuracy (fraction) of a mini-finetuning of so many epochs."""
    model, _ = apply_allocation(step.start.model, layers, allocation, regrower, step.number)
    recipe = replace(final_recipe(args), epochs=epochs, schedule="constant", patience=None)
    trainer = Trainer(model, run.train, run.val, recipe, seed=derive_seed(seed, "episode"), precision=run.precision)
    return trainer.run(show=False).accuracy / 100


def apply_allocation(pruned: nn.Module, layers: Sequence[str], allocation: Sequence[int], regrower: Regrower,
                     number: int) -> tuple[nn.Module, RegrowthRecord]:
    """A copy of the pruned model with so many weights regrown in each layer, and the record of what returned."""
    model = clone_model(pruned)
    record = regrower(model).apply_regrowth(dict(zip(layers, allocation)), step=number)
    return model, record


# --- what it came to -----------------------------------------------------------------------------------------------


def report(run: Run, folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Reads the test set once for each regrown model, prints the table and writes CSV and figure.

    outcomes: the starting model, then the regrown ones in order; folder: the run's `--save_dir`.
    """
    stage1.read_test(run, outcomes[1:])
    rows = [table_row(run, outcome) for outcome in outcomes[1:] if "method" in outcome.card["config"]]
    checkpoint.save_csv(rows, folder / "regrowth_results.csv")
    plots.plot_bidirectional(stage1.summary_rows(run.root, run.m_name), rows, folder / "regrowth_results.png",
                             title=f"{run.m_name} on {run.data_label}")
    print(f"\n{run.m_name} on {run.data_label}, seed {run.seed}, {run.precision}")
    for row in rows:
        test = "" if row["start_test_acc"] == "" else f", test {row['start_test_acc']:.2f} %"
        bn = row["val_acc_after_regrowth_bn"]
        again = "" if bn == "" else f", {bn:.2f} % with batch-norm statistics re-estimated"
        live = "" if row["regrown_live"] == "" else f" of which {row['regrown_live']:,} on a live path"
        print(f"before           sparsity {row['sparsity_before']:.5g}  validation {row['val_acc_before']:.2f} %"
              f"{test}\n"
              f"after regrowth   sparsity {row['sparsity']:.5g}  validation {row['val_acc_after_regrowth']:.2f} %"
              f"{again}  ({row['regrown']:,} weights{live}, {row['method']}, {plots.allocation_name(row)})\n"
              f"after finetuning sparsity {row['sparsity']:.5g}  validation {row['val_acc']:.2f} %, "
              f"test {row['test_acc']:.2f} %  ({row['epochs']} epochs)")
        if row["one_shot_test_acc"] != "":
            print(f"one-shot pruned  sparsity {row['sparsity']:.5g}  validation {row['one_shot_val_acc']:.2f} %, "
                  f"test {row['one_shot_test_acc']:.2f} %  ({row['one_shot_epochs']} epochs since the dense model)")
    print(f"models, cards, allocation, table and figures: {folder}")
    for outcome in outcomes[1:]:
        if "method" not in outcome.card["config"]:
            print(f"{outcome.artifact.name}, without a run card: sparsity {outcome.card['sparsity']:.4f}  validation "
                  f"{outcome.card['val_acc']:.2f} %, test {outcome.card['test_acc']:.2f} %")


def table_row(run: Run, outcome: Outcome) -> dict[str, Any]:
    """A row of ``regrowth_results.csv``; empty what older cards do not say or there is no one-shot model for."""
    card, config = outcome.card, outcome.card["config"]
    one_shot = checkpoint.read_card(checkpoint.pruned_path(run.root, run.m_name, card["sparsity"])) or {}
    if one_shot.get("config", {}).get("schedule") != "one-shot":
        one_shot = {}
    moved = f", {config['mask']['schedule']}" if "mask" in config else ""  # how, while the model was finetuned
    row = {"method": config.get("selection", config["method"]) + moved, "allocation": config["allocation"],
           "found_by": card.get("allocation_source"),
           **{name: card[name] for name in ("sparsity_before", "sparsity")},
           "effective_sparsity": card.get("effective_sparsity"), "regrown": card["regrown"],
           "regrown_live": card.get("regrown_live"),
           **{name: card[name] for name in ("surviving", "val_acc_before", "val_acc_after_regrowth")},
           "val_acc_after_regrowth_bn": card.get("val_acc_after_regrowth_bn"), "val_acc": card["val_acc"],
           "start_test_acc": card.get("start_test_acc"), "test_acc": card["test_acc"],
           **{f"one_shot_{name}": one_shot.get(name) for name in ("val_acc", "test_acc", "epochs")},
           "search_epochs": card["search_epochs"], "epochs": card["epochs"], "seed": config["seed"],
           "dataset": config["dataset"], "seconds": card["seconds"], "checkpoint": outcome.artifact.name}
    return {name: "" if value is None else value for name, value in row.items()}
