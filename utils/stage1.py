"""Stage 1: pretrain, prune, finetune and report, shared by `main.py` and `iclr2021_solution/iterate.py`."""
from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from utils import checkpoint, plots
from utils.analysis_utils import (
    GRADIENT_KINDS,
    Evidence,
    SaliencyComputer,
    clone_model,
    count_pruned_params,
    empty_layers,
    has_masks,
    layer_sparsity,
)
from utils.channels import effective_sparsity
from utils.common import UserError, note, one_line
from utils.mask_mover import MaskMover, MaskPlan
from utils.model_loader import load_model_state
from utils.pruning import check_reach, prune_to, weights_left
from utils.run import KINDS, Run, prerequisite
from utils.stage import Stage, differences, hold_folder
from utils.training import Recipe, Trainer, evaluate

SUMMARY = ("pruner", "schedule", "iteration", "sparsity", "effective_sparsity", "surviving", "total",
           "val_acc_after_pruning", "val_acc", "test_acc", "best_epoch", "epochs", "seed", "dataset", "precision",
           "seconds", "checkpoint")  # columns of ``pruning_results.csv``
DRIFT_IMAGES, GRADIENT_BATCH = 500, 128  # images: drift of mask schedules; a batch of pruning rules (50 batches)


@dataclass
class Outcome:
    """A finished stage with its model (best-validation weights, on the run's device)."""

    model: nn.Module
    artifact: Path
    card: dict[str, Any]  # empty for a checkpoint that came without one

    @property
    def digest(self) -> str:
        """SHA-256 of the artifact, as its card has it."""
        return self.card.get("sha256") or checkpoint.file_digest(self.artifact)


@dataclass(frozen=True)
class PruneStep:
    """One pruning: `sparsity` is the nominal overall sparsity that it ends at; iteration 1 starts from dense."""

    pruner: str
    schedule: str  # 'one-shot' | 'iterative'
    iteration: int
    sparsity: float
    previous: float = 0.0  # nominal sparsity of the checkpoint that the step starts from; 0: the dense model
    mask: Mapping[str, Any] | None = None  # schedule of the mask while finetuning (`mask_options`); None: fixed


def sweep_steps(pruner: str, sparsities: Iterable[float], mask: Mapping[str, Any] | None = None) -> list[PruneStep]:
    """Prunings of the dense model, one-shot or by a mask schedule, by sparsity.

    Raises UserError if two would share a file.
    """
    schedule = mask["schedule"] if mask else "one-shot"
    steps = [PruneStep(pruner, schedule, 1, sparsity, mask=mask) for sparsity in sorted(sparsities)]
    _check_names([step.sparsity for step in steps], "give values of --sparsity that are further apart")
    return steps


def iterative_steps(pruner: str, amount: float, start: int, end: int,
                    mask: Mapping[str, Any] | None = None) -> list[PruneStep]:
    """Iterations start..end, each removing `amount` of the surviving weights: sparsity 1 - (1 - amount)^i after i.

    Raises UserError if two would share a file, or the first that of the iteration before.
    """
    after = [1.0 - (1.0 - amount) ** iteration for iteration in range(end + 1)]
    _check_names(after[max(1, start - 1):], "take fewer iterations or another rate")
    schedule = f"iterative {mask['schedule']}" if mask else "iterative"
    return [PruneStep(pruner, schedule, i, after[i], after[i - 1], mask) for i in range(start, end + 1)]


def _check_names(sparsities: Sequence[float], remedy: str) -> None:
    for first, second in pairwise(sparsities):
        if (name := checkpoint.pruned_path(Path(), "", first).name) == checkpoint.pruned_path(Path(), "", second).name:
            raise UserError(f"sparsity {first:.12g} and {second:.12g} would share the file {name}, whose name has four "
                            f"decimals; {remedy}")


def check_steps(run: Run, steps: Sequence[PruneStep], option: str, recipe: Recipe) -> None:
    """Raises UserError before anything is trained: a missing starting checkpoint, an unreachable sparsity, a padding of
    the finetuning `recipe` that its images do not allow. option: what chose the sparsities, for the message."""
    if not steps:
        return
    if steps[0].previous and not _parent_path(run, steps[0]).is_file():
        raise UserError(f"iteration {steps[0].iteration} starts from {_parent_path(run, steps[0])}, which does not "
                        f"exist; run iterations 1 to {steps[0].iteration - 1} first (--iter_start 1)")
    model = run.new_model()
    total, least = count_pruned_params(model).total, []
    for step in steps:
        asked = f"{option}: iteration {step.iteration}" if step.previous else f"{option} {step.sparsity:.12g}"
        least.append(weights_left(total, round((1.0 - step.previous) * total), step.sparsity, asked))
        if step.mask:
            plan = MaskPlan(start=step.previous, target=step.sparsity, pruner=step.pruner, **step.mask)
            least.append(max(1, round(plan.least_density() * total)))
    check_reach(model, least, steps[-1].pruner)
    run.train.with_padding(recipe.padding)


def check_stages(run: Run, dense: Stage, steps: Sequence[PruneStep], recipe: Recipe) -> None:
    """Raises, before anything is trained, the UserError that a stage of `steps` would raise later; dense: of
    `dense_stage`; recipe: of finetuning."""
    stages = {dense.artifact: dense}
    for step in [] if run.overwrite else steps:
        parent, artifact = _parent_path(run, step), checkpoint.pruned_path(run.root, run.m_name, step.sparsity)
        if parent in stages and not stages[parent].finished:
            config = _config_of_follower(run, step, recipe, artifact, stages[parent])
        else:
            config = _prune_config(run, step, recipe, checkpoint.file_digest(parent))
        stages[artifact] = Stage(artifact, config, resume=run.resume)


def _config_of_follower(run: Run, step: PruneStep, recipe: Recipe, artifact: Path, parent: Stage) -> dict[str, Any]:
    """The configuration of a step whose parent is not made yet; the one that its artifact records is assumed.

    UserError for a finished artifact that cannot be kept then, not even by --resume.
    """
    progress = checkpoint.progress_path(artifact)
    interrupted = checkpoint.load_checkpoint(progress) if progress.exists() else None
    made = (interrupted or checkpoint.read_card(artifact) or {}).get("config", {})
    config = _prune_config(run, step, recipe, made.get("parent"))
    if interrupted or not made:
        return config
    old = checkpoint.read_card(parent.artifact) or {}
    replaced = old and old["sha256"] == config["parent"] and old.get("config") != parent.config
    if changed := differences(old.get("config", {}), parent.config) if replaced else differences(made, config):
        raise UserError(f"{artifact} exists and was made with other arguments: {changed}. It cannot be kept, because "
                        f"{parent.artifact.name} is trained first and will not be what it came from. Use --root for "
                        "another place, or --overwrite to redo everything")
    return config


def _parent_path(run: Run, step: PruneStep) -> Path:
    if not step.previous:
        return checkpoint.dense_path(run.root, run.m_name)
    return checkpoint.pruned_path(run.root, run.m_name, step.previous)


def _prune_config(run: Run, step: PruneStep, recipe: Recipe, parent: str | None) -> dict[str, Any]:
    """What determines a pruned artifact; parent: digest of the checkpoint that it starts from."""
    fields = {name: value for name, value in vars(step).items() if name != "mask" or value}
    return {"stage": "prune", **run.identity(), **fields, "parent": parent, "recipe": recipe.as_dict()}


def open_stage(run: Run, artifact: Path, config: Mapping[str, Any], resume: bool = False) -> Stage:
    """The stage that makes an artifact of this run; UserError when what is on disk does not fit it.

    resume: also where the run does not ask for it. What this run has made is never made again.
    """
    return Stage(artifact, config, resume=run.resume or resume,
                 overwrite=False if artifact in run.made else run.overwrite)


def dense_stage(run: Run, recipe: Recipe, resume: bool = False) -> Stage:
    """The stage that `pretrain` carries out, as of `open_stage`; UserError when another process is at work in the
    model's folder, which is held from here on."""
    run.held.add(hold_folder(run.root / run.m_name))
    config = {"stage": "pretrain", **run.identity(), "recipe": recipe.as_dict()}
    return open_stage(run, checkpoint.dense_path(run.root, run.m_name), config, resume)


def pretrain(run: Run, recipe: Recipe, stage: Stage | None = None) -> Outcome:
    """Trains the dense model into ``{m_name}/checkpoint/ckpt.pth``, or reuses it.

    stage: of `dense_stage`, where it is open already.
    """
    stage = stage or dense_stage(run, recipe)
    if stage.finished:
        return reuse(run, stage)
    model = run.new_model()
    facts, trainer = train(run, stage, model, recipe, f"pretrain {run.m_name}", seed=run.derive_seed("pretrain"))
    state = trainer.state_dict()
    content = {"net": model.state_dict(), "acc": facts["val_acc"], "epoch": facts["best_epoch"], "args": stage.config,
               "input": run.model_input(),
               **{key: state[key] for key in ("optimizer", "scheduler", "loader", "global_rng")}}
    return finish(run, stage, model, facts, content)


def prune_steps(run: Run, dense: Outcome, steps: Sequence[PruneStep], recipe: Recipe) -> list[Outcome]:
    """Carries out `steps` in order, each from its parent."""
    outcomes = {dense.artifact: dense}
    for step in steps:
        parent = _parent_path(run, step)
        outcome = prune_and_finetune(run, outcomes.get(parent) or load_outcome(run, parent), step, recipe)
        outcomes[outcome.artifact] = outcome
        write_summary(run)
    return list(outcomes.values())[1:]


def prune_and_finetune(run: Run, parent: Outcome, step: PruneStep, recipe: Recipe) -> Outcome:
    """Prunes a copy of the parent's model to exactly ``step.sparsity`` and finetunes it, or reuses the artifact."""
    artifact = checkpoint.pruned_path(run.root, run.m_name, step.sparsity)
    stage = open_stage(run, artifact, _prune_config(run, step, recipe, parent.digest))
    if stage.finished:
        return reuse(run, stage)
    model = clone_model(parent.model)
    label, facts, mover = f"{step.pruner} {checkpoint.format_sparsity(step.sparsity)}", {}, None
    if step.mask:
        mover = mask_mover(run, model, step)
        label = f"{step.mask['schedule']}, {label}"
    else:
        counts = count_pruned_params(model)
        keep = weights_left(counts.total, counts.surviving, step.sparsity, f"sparsity {step.sparsity:.12g}")
        prune_to(model, keep, step.pruner, pruning_seed(run, step), pruning_evidence(run, model))
        if empty := empty_layers(model):
            print(one_line(f"warning: no weight is left at sparsity {step.sparsity:.5g} in {', '.join(empty)}; "
                           "signals that need it are lost"))
        facts["val_acc_after_pruning"] = evaluate(model, run.val, run.precision).accuracy
        print(f"{label}: {keep} weights kept, validation after pruning {facts['val_acc_after_pruning']:.2f} %")
    trained, _ = train(run, stage, model, recipe, label, seed=finetuning_seed(run, step.iteration), mover=mover)
    return finish(run, stage, model, {**facts, **trained})


def train(run: Run, stage: Stage, model: nn.Module, recipe: Recipe, label: str, *, seed: int,
          mover: MaskMover | None = None, **options: Any) -> tuple[dict[str, Any], Trainer]:
    """Trains the stage's model, from its interrupted state if there is one; returns what its run card says of it.

    mover: moves the mask meanwhile, and leaves a table and a figure beside the artifact; options: more of `Trainer`.
    """
    trainer = Trainer(model, run.train, run.val, recipe, seed=seed, precision=run.precision, hook=mover, **options)
    result = stage.fit(trainer, label)
    facts = describe(model, result.accuracy)
    if mover:
        table = stage.artifact.with_name(f"{stage.artifact.stem}_mask_updates.csv")
        checkpoint.save_csv(mover.history, table)
        plots.plot_mask_updates(mover.history, trainer.history, mover.shares_regrown(), table.with_suffix(".png"),
                                label)
        facts |= {"mask_updates": table.name, "came_back": mover.came_back}
    facts |= {"epochs": result.epochs, "best_epoch": result.best_epoch, "seconds": trainer.seconds}
    return facts, trainer


def finish(run: Run, stage: Stage, model: nn.Module, facts: Mapping[str, Any], content: Any = None) -> Outcome:
    """Saves the stage's artifact (default: the model's state) with a run card of these facts."""
    stage.finish(content or model.state_dict(), run.card(**facts))
    run.made.add(stage.artifact)
    return Outcome(model, stage.artifact, stage.card)


def pruning_seed(run: Run, step: PruneStep) -> int:
    """Of what a pruning rule or a mask schedule draws at random."""
    return run.derive_seed("prune", step.pruner, step.schedule, step.iteration)


def finetuning_seed(run: Run, iteration: int = 1) -> int:
    """Of the order of the images in a finetuning: every model of a seed that is compared sees them alike."""
    return run.derive_seed("finetune", iteration)


def mask_mover(run: Run, model: nn.Module, step: PruneStep, reference: nn.Module | None = None) -> MaskMover:
    """The hook that moves the model's mask from its sparsity of now to that of the step; reference: of `MaskMover`."""
    plan = MaskPlan(start=count_pruned_params(model).sparsity, target=step.sparsity, pruner=step.pruner, **step.mask)
    sample = run.evidence_sample(DRIFT_IMAGES, DRIFT_IMAGES)
    return MaskMover(model, plan, pruning_seed(run, step), sample, run.precision, reference)


def pruning_evidence(run: Run, model: nn.Module) -> Evidence:
    """What pruning rules may look at: the model's gradients over a class-balanced sample, made if a rule asks."""
    @cache
    def gradients() -> dict[str, dict[str, Tensor]]:
        sample = run.evidence_sample(50 * GRADIENT_BATCH, GRADIENT_BATCH)
        source = "pruned" if count_pruned_params(model).pruned else "dense"
        return SaliencyComputer(model, sample, precision=run.precision, source=source).evidence()
    return Evidence(**{kind: lambda kind=kind: gradients()[kind] for kind in GRADIENT_KINDS})


def load_outcome(run: Run, artifact: Path, weights: Mapping[str, Tensor] | None = None) -> Outcome:
    """An existing artifact with its model; weights: what is in the file, where it has been read already.

    UserError when it is missing, damaged or another model's, or was trained on what the run holds out.
    """
    model = run.new_model()
    weights, card = weights or checkpoint.load_checkpoint(artifact, run.device), checkpoint.read_card(artifact) or {}
    check_data(run, artifact, card)
    load_model_state(model, weights, str(artifact))
    return Outcome(model, artifact, card)


def load_pruned(run: Run, artifact: Path) -> Outcome:
    """`load_outcome` of a model that regrowth starts from. UserError for a dense one."""
    outcome = load_outcome(run, artifact)
    if not has_masks(outcome.model):
        raise UserError(f"{artifact} is a dense model; regrowth starts from a pruned one (with weight_mask entries)")
    return outcome


def load_models(run: Run, args: argparse.Namespace) -> tuple[Outcome, Outcome]:
    """The dense model, and the pruned one that regrowth starts from: a file, or that of `--start_sparsity`.

    UserError when one is missing (with the command that makes all that is missing, where that is under the root), or
    the pruned one is dense or of another kind than asked for (naming the kind that is there).
    """
    kind, dense = args.starting_checkpoint, checkpoint.dense_path(run.root, run.m_name)
    ours = kind in KINDS
    start = checkpoint.pruned_path(run.root, run.m_name, args.start_sparsity) if ours else Path(kind)
    words = ["--sparsity", checkpoint.format_sparsity(args.start_sparsity), "--pruner", "magnitude", "--iter_end",
             "10" if kind == "iterative" else "1"]
    if not dense.is_file():
        words = words if ours and not start.is_file() else ["--pruner", "none"]
        raise UserError(f"no dense checkpoint at {dense}; {prerequisite(args, dense, *words)}")
    if not start.is_file():
        raise UserError(f"no pruned checkpoint at {start}" + (f"; {prerequisite(args, start, *words)}" if ours else ""))
    models = load_outcome(run, dense), load_pruned(run, start)
    if has_masks(models[0].model):
        raise UserError(f"{dense} is pruned; regrowth needs the dense model there. Train it under another --root")
    config = models[1].card.get("config", {})
    found = config.get("schedule", "unknown").replace("-", "")
    if ours and kind not in (None, found):
        made = f"{found}, pruned by {config['pruner']}" if "pruner" in config else "of unknown origin (no run card)"
        raise UserError(f"{start} is {made}, not {kind}; ask for what is there, give a path to "
                        "--starting_checkpoint, or keep several under different --root folders")
    return models


def check_data(run: Run, artifact: Path, card: Mapping[str, Any]) -> None:
    """UserError when an artifact's card says that it was trained on another data set, or on another split of this one.

    With another split its training images would be among the run's validation images, and every choice made on them
    too good. Other images of the same data set (such as a JPEG copy) are only warned of.
    """
    config, split = card.get("config", {}), card.get("config", {}).get("val_split")
    if run.timing_only or "data_fingerprint" not in config:
        return
    if config["data_fingerprint"] == run.data.fingerprint:
        if split not in (None, run.val_split):
            raise UserError(f"{artifact} was trained with --val_split {split:g}; with {run.val_split:g} images that it "
                            f"was trained on would count as validation. Use --val_split {split:g}, or train it anew")
        return
    saved, here = card.get("input", {}), run.model_input()  # older cards do not say what the input is
    name = config["dataset"].rpartition(", ")[0]
    if name == run.data.name and all(saved.get(key, here[key]) == here[key] for key in ("classes", "image_size")):
        print(f"warning: {artifact} was trained on other images ({config['dataset']}) than this run reads "
              f"({run.data_label}); it may have seen some that are held out here")
        return
    trained, read = (f"{label} ({len(facts['classes'])} classes, {facts['image_size']} pixels)" if facts else label
                     for label, facts in ((config["dataset"], saved), (run.data_label, here)))
    options = f"--dataset {saved.get('dataset', name)}"
    if saved.get("dataset") == "folder":
        options += f" --data_dir {saved['data_dir']} --image_size {saved['image_size']}"
    raise UserError(f"{artifact} was trained on another data set: {trained}, and this run reads {read}; use {options}, "
                    "or another --root")


def reuse(run: Run, stage: Stage) -> Outcome:
    """The artifact of a finished stage, which is said."""
    print(stage.reuse_note())
    return load_outcome(run, stage.artifact)


def describe(model: nn.Module, val_acc: float) -> dict[str, Any]:
    """Entries of a run card that every model has: validation accuracy (%), weights and sparsity per layer."""
    counts = count_pruned_params(model)
    return {"val_acc": val_acc, "sparsity": counts.sparsity,
            "effective_sparsity": effective_sparsity(model), "surviving": counts.surviving, "total": counts.total,
            "layer_sparsity": layer_sparsity(model), "empty_layers": empty_layers(model)}


# --- the report ----------------------------------------------------------------------------------------------------


def report(run: Run, outcomes: Sequence[Outcome]) -> None:
    """Reads the test set for every model that has no test accuracy yet; writes and prints a table of all artifacts."""
    read_test(run, outcomes)
    rows, folder = write_summary(run, outcomes), run.root / run.m_name
    print(f"\n{run.m_name} on {run.data_label}, seed {run.seed}, {run.precision}")
    print(f"{'pruner':>10} {'schedule':>9} {'sparsity':>9} {'effective':>9} {'weights':>10} {'val %':>7} {'test %':>7}")
    for row in rows:
        test = f"{row['test_acc']:7.2f}" if row["test_acc"] != "" else f"{'-':>7}"
        effective = "-" if (found := row["effective_sparsity"]) == "" else checkpoint.format_sparsity(found)
        print(f"{row['pruner']:>10} {row['schedule']:>9} {checkpoint.format_sparsity(row['sparsity']):>9} "
              f"{effective:>9} {row['surviving']:10,} {row['val_acc']:7.2f} {test}")
    print(f"checkpoints and run cards: {folder / 'checkpoint'}, {folder / 'ckpt_after_prune'}\n"
          f"table and figure: {folder / 'pruning_results.csv'}, {folder / 'pruning_results.png'}")


def read_test(run: Run, outcomes: Iterable[Outcome]) -> None:
    """Reads the test set once for each model whose run card has no test accuracy yet, and writes it there.

    A model that came without a run card gets one in memory, so that reports name it; on disk it stays without.
    """
    for outcome in outcomes:
        if "test_acc" in outcome.card:
            continue
        came_without = not outcome.card
        if came_without:
            outcome.card.update(describe(outcome.model, evaluate(outcome.model, run.val, run.precision).accuracy),
                                config=run.identity(), epochs="", best_epoch="", seconds="")
        elif "val_acc" not in outcome.card:  # of rounded weights
            outcome.card["val_acc"] = evaluate(outcome.model, run.val, run.precision).accuracy
        test = run.test.read_as(str(outcome.artifact))
        outcome.card["test_acc"] = evaluate(outcome.model, test, run.precision).accuracy
        if not came_without:
            checkpoint.save_json(outcome.card, checkpoint.card_path(outcome.artifact))


def write_summary(run: Run, outcomes: Iterable[Outcome] = ()) -> list[dict[str, Any]]:
    """Collects the model's run cards under the root, and in `outcomes`, into ``pruning_results.csv`` and ``.png``."""
    rows = summary_rows(run.root, run.m_name, {outcome.artifact: outcome.card for outcome in outcomes})
    table = run.root / run.m_name / "pruning_results.csv"
    checkpoint.save_csv(rows, table)
    plots.plot_bidirectional(rows, [], table.with_suffix(".png"), title=f"{run.m_name} on {run.data_label}")
    return rows


def summary_rows(root: Path, m_name: str, cards: Mapping[Path, dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """One row for the dense model and each pruned one that has a run card, by pruner, schedule and sparsity.

    cards: of models that have none on disk. What cannot be read, or has another card, is left out with a note.
    """
    pruned = sorted(checkpoint.pruned_path(root, m_name, 0.5).parent.glob("pruned_finetuned_mask_*.pth"))
    rows = []
    for path in [checkpoint.dense_path(root, m_name), *pruned]:
        try:
            if card := checkpoint.read_card(path) or (cards or {}).get(path):
                rows.append(_row(path, card))
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "its run card is not one of this project"
            note(f"{path} is left out of tables and figures: {reason}")
    return sorted(rows, key=lambda row: (row["pruner"] != "none", row["pruner"], row["schedule"], row["sparsity"]))


def _row(path: Path, card: dict[str, Any]) -> dict[str, Any]:
    """Raises one of many errors where the card is not of this project."""
    config = card["config"]
    facts = {"pruner": "unknown" if card["sparsity"] else "none", "schedule": "", "iteration": 0,
             "val_acc_after_pruning": "", "effective_sparsity": None, "test_acc": "", **config, **card,
             "checkpoint": path.name}
    row = {name: "" if facts[name] is None else facts[name] for name in SUMMARY}  # None: the paths are unknown
    if not (0 <= row["sparsity"] <= 1 and math.isfinite(row["val_acc"]) and float(row["test_acc"] or 0) >= 0
            and all(isinstance(row[key], str) for key in ("pruner", "schedule", "dataset"))):
        raise ValueError(path)
    return row
