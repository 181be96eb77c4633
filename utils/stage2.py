"""Stage 2: from a pruned checkpoint to a regrown one, what `rl_regrowth_nas.py` and `rl_saliency_regrowth.py` do.

From top to bottom: `run_script` opens a run and reports, `regrow` goes from step to step, `Step` turns the target
sparsity into a budget and an allocation into a regrown model, `regrow_step` finds the allocation, applies it, finetunes
and saves; what they need stands below. Which rule selects weights within a layer, and with what values they return, is
up to the arguments' `Method`.
"""
from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from utils import checkpoint, plots, stage1
from utils.allocation import AllocationProblem, allocate
from utils.analysis_utils import (
    GRADIENT_KINDS,
    BlockwiseFeatureExtractor,
    Evidence,
    SaliencyComputer,
    clone_model,
    compute_block_ssim,
    count_pruned_params,
    prunable_layers,
)
from utils.channels import count_live
from utils.common import Progress, UserError, derive_seed, generator, note
from utils.controller import MAY_CHANGE, RegrowthPolicyGradient, SearchResult
from utils.distributed import World, world
from utils.pruning import lacking_weights
from utils.regrowth import (
    BEST_ENTRIES,
    RegrowthRecord,
    WeightRegrowth,
    layer_capacities,
    reference_magnitudes,
    regrowth_budget,
    target_layers,
)
from utils.run import Run, open_run
from utils.stage import check_same_files, differences, hold_folder, kept
from utils.stage1 import Outcome, PruneStep
from utils.training import Trainer, accuracy_with_new_statistics, evaluate

SAMPLE = "class-balanced sample"  # part of the config: earlier versions used the first batches only
DRIFT_BATCH, SALIENCY_BATCH = 500, 128  # images
TABLE = ("method", "allocation", "found_by", "sparsity_before", "sparsity", "effective_sparsity", "regrown",
         "regrown_live", "surviving", "val_acc_before", "val_acc_after_regrowth", "val_acc_after_regrowth_bn",
         "val_acc", "start_test_acc", "test_acc", "one_shot_val_acc", "one_shot_test_acc", "one_shot_epochs",
         "search_epochs", "epochs", "seed", "dataset", "seconds", "checkpoint")  # columns of ``regrowth_results.csv``


def run_script(args: argparse.Namespace) -> None:
    """All that a stage-2 script does after reading its command line; of several processes the leader reports."""
    run, processes = open_run(args), world()
    outcomes = regrow(run, args, processes=processes)
    if processes.leads:
        report(run, args, outcomes)


def regrow(run: Run, args: argparse.Namespace, passes: int = 0, processes: World | None = None) -> list[Outcome]:
    """All steps of a stage-2 script, each from the model before; returns the starting and the regrown models.

    args: of `utils.methods`; passes: epochs to skip in the image order of the final finetuning, as if it continued a
    finetuning of that length; processes: those that train a search's trials (default: this one); all call this, the
    leader does the rest.
    """
    processes = processes or World()
    dense, *outcomes = stage1.load_models(run, args)
    run.held.add(hold_folder(args.save_dir, "--save_dir"))
    about = evidence_maker(run, args, dense.model)
    for number in range(1, args.regrow_iterations + 1):
        if number > 1 and not any(capacities(outcomes[-1].model, args).values()):
            note(f"steps from {number} of {args.regrow_iterations} on are left out: no weight can return any more")
            break  # the steps before are trained, and reported
        step = Step(run, args, outcomes[-1], about(outcomes[-1].model), number)
        config = {**step_config(step, dense), "passes_before": passes}
        check_same_files(processes, config)
        if processes.leads:
            outcomes.append(regrow_step(step, config, processes))
            processes.share()
        else:
            while problem := processes.share():  # a search begins; None: the step is finished
                step.problem = AllocationProblem(**problem)
                processes.serve(step.reward)
            outcomes.append(stage1.load_outcome(run, step.artifact))
    return outcomes


def first_step(run: Run, args: argparse.Namespace) -> Step:
    """The first step of a stage-2 script, for studies."""
    dense, start = stage1.load_models(run, args)
    return Step(run, args, start, evidence_maker(run, args, dense.model)(start.model))


class Step:
    """One regrowth: where it starts, how many weights return, by which rule, where its artifacts go.

    budget: weights that are to return; capacities: of each target layer; sparsity_after: with as many of the budget as
    there is room for; evidence: about the model that it starts from.
    """

    def __init__(self, run: Run, args: argparse.Namespace, start: Outcome, evidence: Evidence, number: int = 1):
        """Step `number` of `--regrow_iterations`; UserError where nothing can return."""
        self.run, self.args, self.start, self.evidence, self.number = run, args, start, evidence, number
        counts, left = count_pruned_params(start.model), args.regrow_iterations - number + 1
        if args.target_sparsity is None:
            self.budget = regrowth_budget(start.model, regrow_step=args.regrow_step, steps=left)
        else:  # its share of the way that is left
            target = args.target_sparsity
            if left > 1 and target < counts.sparsity:  # else the budget's error is to name what was asked for
                target = counts.sparsity - (counts.sparsity - target) / left
            self.budget = regrowth_budget(start.model, target_sparsity=target)
        self.capacities = capacities(start.model, args)
        room = sum(self.capacities.values())
        if not room:
            raise UserError("no weight can return: " + (
                "--only_live, and no path leads from the image to the output; leave the option out" if args.only_live
                else "--target_layers or --max_ratio leave no room; name other layers or a larger ratio"))
        if room < self.budget:
            note(f"{self.budget:,} weights are to return, and only {room:,} can: --target_layers, --max_ratio or "
                 "--only_live leave no more room")
        self.surviving_after = counts.surviving + min(self.budget, room)
        self.sparsity_after = 1.0 - self.surviving_after / counts.total
        self.folder = args.save_dir / (f"step_{number}" if args.regrow_iterations > 1 else ".")
        name = f"regrown_{run.m_name}_{checkpoint.format_sparsity(self.sparsity_after)}.pth"
        self.artifact = self.folder / name

    @cached_property
    def problem(self) -> AllocationProblem:
        """Target layers in the order of their drift (lowest SSIM first) with capacities and sizes."""
        drift = self.evidence.make("drift")
        order = sorted(self.capacities, key=lambda name: drift[name])
        layers = prunable_layers(self.start.model)
        weights = [layers[name].weight for name in order]
        lacking = lacking_weights(self.start.model, self.evidence.reference, self.surviving_after)
        return AllocationProblem(
            layers=tuple(order), capacities=tuple(self.capacities[name] for name in order), budget=self.budget,
            sizes=tuple(weight.numel() for weight in weights), fan=tuple(sum(weight.shape) for weight in weights),
            drift=tuple(drift[name] for name in order), lacking=tuple(lacking[name] for name in order))

    def regrower(self, model: nn.Module) -> WeightRegrowth:
        """What regrows weights in this model by the method's rule; the evidence it needs is made at its first use."""
        rule, init_strategy = self.args.method.rule(self.args)
        seed = self.run.derive_seed("regrowth")
        return WeightRegrowth(model, rule, self.evidence, init_strategy, seed, self.args.only_live)

    def apply(self, allocation: Sequence[int]) -> tuple[nn.Module, RegrowthRecord]:
        """A copy of the pruned model with so many weights regrown in each layer, and the record of what returned."""
        model = clone_model(self.start.model)
        return model, self.regrower(model).apply_regrowth(dict(zip(self.problem.layers, allocation)), step=self.number)

    def reward(self, allocation: Sequence[int], seed: int, epochs: float) -> float:
        """Best validation accuracy (fraction) in a mini-finetuning of so many epochs after the allocation."""
        model, _ = self.apply(allocation)
        recipe = replace(self.args.finetuning, epochs=epochs, schedule=self.args.episode_schedule,
                         patience=None)
        trainer = Trainer(model, self.run.train, self.run.val, recipe, seed=derive_seed(seed, "episode"),
                          precision=self.run.precision)
        return trainer.run(show=False).accuracy / 100


def capacities(model: nn.Module, args: argparse.Namespace) -> dict[str, int]:
    """Weights that may return per target layer: at most `--max_ratio` of what is pruned there.

    With `--only_live`, of those that would be on a live path.
    """
    free = layer_capacities(model, target_layers(model, args.target_layers), args.only_live)
    ratio = Fraction(str(args.max_ratio))  # as it was written: 0.29 * 100 is just below 29 in floating point
    return {name: int(ratio * capacity) for name, capacity in free.items()}


def step_config(step: Step, dense: Outcome) -> dict[str, Any]:
    """The arguments that determine a regrown model."""
    run, args = step.run, step.args
    return {"stage": "regrow", "method": args.method.name, **run.identity(), "budget": step.budget, "evidence": SAMPLE,
            **reference_config(run, getattr(args, "reference_model", None)), "start": step.start.digest,
            "dense": dense.digest, "recipe": args.finetuning.as_dict(), **args.decisive}


def regrow_step(step: Step, config: Mapping[str, Any], processes: World) -> Outcome:
    """Finds an allocation, regrows by it and finetunes, or takes what is there; leaves ``best_allocation…``, the model
    and its card."""
    run, args, start = step.run, step.args, step.start
    stage = stage1.open_stage(run, step.artifact, config)
    if stage.finished:
        return stage1.reuse(run, stage)
    best, stem = step.folder / args.method.best_file.format(m_name=run.m_name), step.folder / args.method.search_stem
    if not (run.resume or run.overwrite):
        for left in (*saved_searches(stem).values(), best):
            if left.exists():
                raise UserError(f"{left} is there, of an interrupted search or of another regrowth. Use --resume to go "
                                "on with it, --overwrite to replace it, or --save_dir for another place")
    found = search_allocation(step, config, processes) if args.allocation == "rl" else Found(
        allocate(args.allocation, step.problem, generator(run.seed, "allocation", step.number)), args.allocation)
    before = evaluate(start.model, run.val, run.precision).accuracy
    model, record = step.apply(found.allocation)
    regrown = evaluate(model, run.val, run.precision).accuracy
    as_trained = run.train.with_padding(args.finetuning.padding)
    reestimated = accuracy_with_new_statistics(model, as_trained, run.val, run.precision)
    regrowth = {"val_acc_after_regrowth": regrown, "val_acc_after_regrowth_bn": reestimated,
                "allocation": dict(zip(step.problem.layers, found.allocation))}
    checkpoint.save_checkpoint(  # `BEST_ENTRIES` says what each entry is; the record replays it on the start
        {"epoch": found.updates, "reward": found.reward, "accuracy": regrown / 100, **regrowth, **record.state_dict(),
         "timestamp": time.strftime("%Y-%m-%d %H:%M:%S"), "starting_checkpoint": str(start.artifact),
         "starting_digest": start.digest, "entries": BEST_ENTRIES}, best)
    sparsity_before = count_pruned_params(start.model).sparsity
    filled = f" ({record.filled} drawn at random for want of others)" if record.filled else ""
    print(f"{record.count} weights returned{filled}: sparsity {sparsity_before:.5g} -> {step.sparsity_after:.5g}; "
          f"validation {before:.2f} % -> {regrown:.2f} % ({reestimated:.2f} % with batch-norm statistics re-estimated)")
    live = count_live(model, record.masks(model))
    label, mover = f"finetune {checkpoint.format_sparsity(step.sparsity_after)}", None
    if args.mask:
        label = f"{args.mask['schedule']}, {label}"
        moves = PruneStep("magnitude", args.mask["schedule"], step.number, step.sparsity_after, mask=args.mask)
        mover = stage1.mask_mover(run, model, moves, step.evidence.reference)
    facts, _ = stage1.train(run, stage, model, args.finetuning, label, seed=stage1.finetuning_seed(run), mover=mover,
                            passes_before=config["passes_before"])
    facts |= {"val_acc_before": before, **regrowth, "sparsity_before": sparsity_before, "regrown": record.count,
              "regrown_live": live, "starting_checkpoint": str(start.artifact),
              "start_test_acc": start.card.get("test_acc"), "drift": dict(zip(step.problem.layers, step.problem.drift)),
              "search_epochs": found.epochs_spent, "allocation_source": found.source}
    return stage1.finish(run, stage, model, facts)


# --- the search ----------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """An allocation, and what gave it: 'controller' or a rule, also one that the search tried first.

    Of a search also the allocation's reward, the epochs of all its trials, and the controller's updates.
    """

    allocation: tuple[int, ...]
    source: str
    reward: float | None = None
    epochs_spent: float = 0
    updates: int = 0


def search_allocation(step: Step, config: Mapping[str, Any], processes: World) -> Found:
    """Searches the best allocation, from a saved search if `--resume` says so; leaves CSV, figure and checkpoints."""
    args, stem = step.args, step.folder / step.args.method.search_stem
    seed = step.run.derive_seed("search")
    search = RegrowthPolicyGradient(step.problem, step.reward, args.search, seed, processes)
    if step.run.resume:
        named = args.resume not in (None, "latest") and (
            args.regrow_iterations == 1 or Path(args.resume).resolve().parent == step.folder.resolve())
        load_search(search, [Path(args.resume)] if named else
                    [path for path in saved_searches(stem).values() if kept(path, step.run.overwrite)], config)
    processes.share(asdict(step.problem))
    result = run_search(search, stem, config, args.save_freq, step.sparsity_after)
    processes.share()
    if step.run.overwrite:  # what is left of the search before this one
        for updates, old in saved_searches(stem).items():
            if updates > search.epoch:
                old.unlink()
    plots.plot_search(search.history, search.problem, result.allocation, step.folder / "search.png")
    source = next(row["source"] for row in search.history if row["allocation"] == result.allocation)
    return Found(result.allocation, "controller" if source == "rl" else source, result.reward, result.epochs_spent,
                 search.epoch)


def run_search(search: RegrowthPolicyGradient, stem: Path, config: Mapping[str, Any], save_freq: int,
               sparsity: float) -> SearchResult:
    """Runs a search to its end; saves its table and its state after every trial.

    stem: path that artifact names begin with; config: of the step, kept in the checkpoints; save_freq: one checkpoint
    in so many updates is kept, besides the latest; sparsity: that all episodes have in common, for the table.
    """
    budget = search.config.search_budget
    progress = Progress("search", budget, text="episode 0",
                        done=search.history[-1]["epochs_spent"] if search.history else 0)

    def path_after(updates: int) -> Path:
        return stem.with_name(f"{stem.name}_epoch_{updates}.pth")

    def after_episode(row: Mapping[str, Any]) -> None:
        progress.advance(row["epochs_spent"] - progress.done)
        spent = f"{row['epochs_spent']}/{budget}" if budget else row["epochs_spent"]
        progress.say(f"episode {row['episode']}  {spent} epochs  val {100 * row['reward']:.2f} % after "
                     f"{row['fidelity']}  best {100 * row['best']:.2f} %")

    def save() -> None:
        rows = [{**{key: value for key, value in row.items() if key != "allocation"}, "sparsity": sparsity,
                 "allocation": " ".join(map(str, row["allocation"]))} for row in search.history]
        checkpoint.save_csv(rows, stem.parent / "search.csv")
        checkpoint.save_checkpoint({"config": dict(config), "search": search.state_dict()}, path_after(search.epoch))

    def after_update(number: int) -> None:
        save()
        if number == 1 or (number - 1) % save_freq:
            path_after(number - 1).unlink(missing_ok=True)

    with progress:
        result = search.run(after_episode, after_update, save)
    save()
    return result


def saved_searches(stem: Path) -> dict[int, Path]:
    """Number of updates -> controller checkpoint, most updates first."""
    found = {int(path.stem.rpartition("_")[2]): path for path in stem.parent.glob(f"{stem.name}_epoch_*.pth")
             if path.stem.rpartition("_")[2].isdigit()}
    return dict(sorted(found.items(), reverse=True))


def load_search(search: RegrowthPolicyGradient, paths: Sequence[Path], config: Mapping[str, Any]) -> None:
    """Loads the first saved search whose rewards were made with these arguments, if any were saved.

    An interrupted `--overwrite` leaves checkpoints of two searches side by side. UserError when a file is no search or
    none of them fits.
    """
    wanted, refused = reward_config(config), []
    for path in paths:
        state = checkpoint.load_checkpoint(path)
        if not isinstance(state, dict) or not {"config", "search"} <= set(state):
            raise UserError(f"{path} is not a controller checkpoint of this project")
        changed = differences(reward_config(state["config"]), wanted)
        if not changed:
            search.load_state_dict(state["search"])
            print(f"continuing the search of {path} after {search.epoch} updates")
            return
        refused.append(f"the search at {path} was made with other arguments: {changed}")
    if refused:
        raise UserError(f"{refused[0]}. Repeat them with --resume, or use --overwrite to search anew")


def reward_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What rewards depend on: the configuration of a step but for the length of the search and the final finetuning."""
    kept = {key: value for key, value in config.items() if key not in {*MAY_CHANGE, "mask"}}
    recipe = {key: value for key, value in config["recipe"].items() if key not in ("epochs", "schedule", "patience")}
    return json.loads(json.dumps({**kept, "recipe": recipe}))  # lists for tuples, as in what was saved


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
    """Gives the evidence about a pruned model; what comes from the dense model alone is made once.

    All models see the same class-balanced sample of the training images, un-augmented. Saliency is that of the dense
    model, or of the pruned one by `--saliency_source`; the gradient is the pruned model's. UserError if the reference
    cannot be loaded.
    """
    path = reference_path(run, getattr(args, "reference_model", None))
    reference = stage1.load_outcome(run, path).model if path else dense

    def pass_over(model: nn.Module, source: str) -> dict[str, dict[str, Tensor]]:
        sample = run.evidence_sample(args.saliency_max_batches * SALIENCY_BATCH, SALIENCY_BATCH)
        return SaliencyComputer(model, sample, precision=run.precision, source=source).evidence()

    def maps(model: nn.Module) -> dict[str, np.ndarray]:
        extractor = BlockwiseFeatureExtractor(model, list(prunable_layers(model)), run.precision)
        return extractor.extract(run.evidence_sample(args.ssim_batches * DRIFT_BATCH, DRIFT_BATCH))
    dense_pass, dense_maps = cache(partial(pass_over, dense, "dense")), cache(partial(maps, dense))

    def about(pruned: nn.Module) -> Evidence:
        pruned_pass = cache(partial(pass_over, pruned, "pruned"))
        from_dense = getattr(args, "saliency_source", "dense") == "dense"
        passes = {kind: dense_pass if from_dense and kind != "gradient" else pruned_pass for kind in GRADIENT_KINDS}
        return Evidence(reference=reference, magnitude=partial(reference_magnitudes, reference),
                        drift=lambda: compute_block_ssim(dense_maps(), maps(pruned)),
                        **{kind: lambda kind=kind, made=made: made()[kind] for kind, made in passes.items()})
    return about


# --- what it came to -----------------------------------------------------------------------------------------------


def report(run: Run, args: argparse.Namespace, outcomes: Sequence[Outcome]) -> None:
    """Reads the test set once for each regrown model, prints the table and writes CSV and figure.

    outcomes: the starting model, then the regrown ones in order.
    """
    for start, outcome in zip(outcomes, outcomes[1:]):
        if outcome.card and "test_acc" in start.card:  # of a step after the first it is known only now
            outcome.card["start_test_acc"] = start.card["test_acc"]
        stage1.read_test(run, [outcome])
    rows = [table_row(run, outcome) for outcome in outcomes[1:] if "method" in outcome.card["config"]]
    checkpoint.save_csv(rows, args.save_dir / "regrowth_results.csv")
    plots.plot_bidirectional(stage1.summary_rows(run.root, run.m_name), rows, args.save_dir / "regrowth_results.png",
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
    print(f"models, cards, allocation, table and figures: {args.save_dir}")
    for outcome in (each for each in outcomes[1:] if "method" not in each.card["config"]):
        print(f"{outcome.artifact.name}, without a run card: sparsity {outcome.card['sparsity']:.4f}  validation "
              f"{outcome.card['val_acc']:.2f} %, test {outcome.card['test_acc']:.2f} %")


def table_row(run: Run, outcome: Outcome) -> dict[str, Any]:
    """A row of ``regrowth_results.csv``; empty what older cards do not say or there is no one-shot model for."""
    card, config = outcome.card, outcome.card["config"]
    one_shot = checkpoint.read_card(checkpoint.pruned_path(run.root, run.m_name, card["sparsity"])) or {}
    if one_shot.get("config", {}).get("schedule") != "one-shot":
        one_shot = {}
    moved = f", {config['mask']['schedule']}" if "mask" in config else ""  # how, while the model was finetuned
    facts = {**config, **card, "method": config.get("selection", config["method"]) + moved,
             "allocation": config["allocation"], "found_by": card.get("allocation_source"),
             **{f"one_shot_{name}": one_shot.get(name) for name in ("val_acc", "test_acc", "epochs")},
             "checkpoint": outcome.artifact.name}
    return {name: "" if facts.get(name) is None else facts[name] for name in TABLE}
