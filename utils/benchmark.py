"""What the benchmark scripts measure: the stages of a regrowth episode, our versions against straightforward ones, and
the bars that the figures must reach.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils import checkpoint, regrowth_run
from utils.allocation import ALLOCATORS
from utils.analysis_utils import clone_model, prunable_layers, set_masks
from utils.baselines import argsort_lamp_masks, elementwise_regrowth, plain_dataloader, plain_training_epoch
from utils.data_loader import BatchLoader, balanced_indices, channel_statistics
from utils.datasets import CIFAR10_CLASSES, ImageDataset, load_dataset
from utils.model_loader import model_loader
from utils.regrowth import SELECTORS, WeightRegrowth
from utils.run import Run, open_run
from utils.saliency import stored_weight
from utils.seeding import generator
from utils.selection import exact_k_masks
from utils.timing import StageClock, Timing, measure, measure_in_turn
from utils.training import FINETUNE_FINAL, PRETRAIN, Trainer

STAGES = ("loading", "drift (SSIM)", "evidence", "selection", "mask and values", "mini-finetuning")
FAIR_IMAGES = 2_000  # fewer are over before a loader or an epoch is in its stride: no bar is judged by them
EPOCH_IMAGES = 40_000  # training images of CIFAR-10 after the split
Row = dict[str, Any]
Limit = tuple[str, float, float, bool]  # unit, figure, limit, whether the figure must be at least the limit

# --- what is measured on -------------------------------------------------------------------------------------------


def synthetic_dataset(num_images: int, seed: int) -> ImageDataset:
    """Random pixels in the shape of CIFAR-10: as good as any for timing, and for nothing else."""
    random = np.random.RandomState(seed)
    images = random.randint(256, size=(num_images + 100, 32, 32, 3), dtype=np.uint8)
    targets = random.randint(len(CIFAR10_CLASSES), size=len(images))
    return ImageDataset("synthetic", "random pixels", images[:num_images], targets[:num_images], images[num_images:],
                        targets[num_images:], CIFAR10_CLASSES)


def first_images(data: ImageDataset, num_images: int) -> ImageDataset:
    """The data set with at most `num_images` training images, class-balanced and mixed."""
    picks = balanced_indices(data.train_images, data.train_targets, num_images, seed=0)
    return replace(data, train_images=data.train_images[picks], train_targets=data.train_targets[picks])


def write_synthetic_checkpoints(run: Run, sparsity: float) -> None:
    """An untrained dense model under the run's root, and one pruned to `sparsity` by magnitude."""
    model = run.new_model()
    checkpoint.save_checkpoint({"net": model.state_dict(), "acc": 0.0, "epoch": 0},
                               checkpoint.dense_path(run.root, run.m_name))
    weights = {name: layer.weight.detach().abs() for name, layer in prunable_layers(model).items()}
    keep = round((1 - sparsity) * sum(weight.numel() for weight in weights.values()))
    set_masks(model, dict(zip(weights, exact_k_masks(list(weights.values()), keep), strict=True)))
    checkpoint.save_checkpoint(model.state_dict(), checkpoint.pruned_path(run.root, run.m_name, sparsity))


def open_benchmark(args: argparse.Namespace, temporary: Path) -> Run:
    """A run over the checkpoints of stage 1, or over synthetic weights and data where `--synthetic` asks for them or
    there are no checkpoints (said in a line); those are written to `temporary`, which then is the run's root.
    """
    needed = [checkpoint.dense_path(args.root, args.m_name),
              checkpoint.pruned_path(args.root, args.m_name, args.start_sparsity)]
    missing = [path for path in needed if not path.is_file()]
    if missing and not args.synthetic:
        print(f"no checkpoint at {missing[0]}: timing synthetic weights and data, as --synthetic does")
    if not missing and not args.synthetic:
        run = open_run(args, first_images(load_dataset(args.dataset, args.data_dir, args.image_size), args.num_images))
    else:
        run = open_run(args, synthetic_dataset(args.num_images, args.seed))
        run.root = temporary
        write_synthetic_checkpoints(run, args.start_sparsity)
    run.timing_only = True
    return run


# --- the stages of an episode --------------------------------------------------------------------------------------


@dataclass
class Episode:
    """One regrowth episode: seconds per stage, and what is needed to repeat its update."""

    seconds: dict[str, float]
    start: nn.Module  # the pruned model
    allocation: dict[str, int]
    regrower: regrowth_run.Regrower


def run_episode(run: Run, args: argparse.Namespace, method: regrowth_run.Method) -> Episode:
    """From checkpoints on disk to a model finetuned for one epoch, by the same calls as the stage-2 scripts.

    args: of the stage-2 parsers. Evidence is what the method looks at: gradients, or the reference model. The
    allocation is the proportional one, so that both methods move the same number of weights in each layer.
    """
    clock = StageClock(run.device)
    with clock.stage("loading"):
        dense, start = regrowth_run.load_dense(run, args), regrowth_run.load_start(run, args)
    step = regrowth_run.plan_step(run, args, method, start, 1)
    with clock.stage("drift (SSIM)"):
        evidence = regrowth_run.evidence_maker(run, args, dense.model)(start.model)
        problem = regrowth_run.allocation_problem(args, step, evidence)
    with clock.stage("evidence"):
        for kind in SELECTORS[method.rule(args)[0]].needs:
            evidence.make(kind)
        regrower = regrowth_run.regrower_of(run, args, method, evidence)
    amounts = ALLOCATORS["proportional"](problem, generator(run.seed, "allocation"))
    model, allocation = clone_model(start.model), dict(zip(problem.layers, amounts, strict=True))
    regrowth = regrower(model)
    with clock.stage("selection"):
        chosen = regrowth.select(allocation)
    with clock.stage("mask and values"):
        regrowth.write(chosen)
    recipe = replace(FINETUNE_FINAL, epochs=1, schedule="constant", patience=None)
    trainer = Trainer(model, run.train, run.val, recipe, seed=run.seed, precision=run.precision)
    with clock.stage("mini-finetuning"):
        trainer.run(show=False)
    return Episode({name: clock.seconds[name] for name in STAGES}, start.model, allocation, regrower)


# --- ours against the straightforward version ----------------------------------------------------------------------


def compared(name: str, ours: Timing, plain: Timing, work: float, unit: str) -> Row:
    """A row: both versions' seconds, their rates (`work` units per repeat) and the ratio, from the medians."""
    return {"measurement": name, "ratio": plain.median / ours.median, "unit": unit, "ours": work / ours.median,
            "plain": work / plain.median, "ours_median_s": ours.median, "ours_fastest_s": ours.fastest,
            "ours_slowest_s": ours.slowest, "plain_median_s": plain.median, "plain_fastest_s": plain.fastest,
            "plain_slowest_s": plain.slowest, "ours_repeats": ours.repeats, "plain_repeats": plain.repeats}


def update_row(name: str, episode: Episode, device: torch.device, repeats: int) -> Row:
    """Selection, masks and initial values of an episode, against the element-wise loop; weights as work."""
    regrowth = episode.regrower(clone_model(episode.start))
    records = []

    def undo() -> WeightRegrowth:
        if records:
            records.pop().undo(regrowth.model)
        return regrowth
    ours = measure(lambda rule: records.append(rule.apply_regrowth(episode.allocation)), device,
                   repeats=max(10, repeats), warmup=3, prepare=undo)
    undo()
    plain = measure(partial(_elementwise, episode.allocation), device, repeats=1, warmup=0,
                    prepare=lambda: _plain_tensors(regrowth, episode.allocation))
    return compared(f"regrowth, {name}", ours, plain, sum(episode.allocation.values()), "weights/s")


def _plain_tensors(regrowth: WeightRegrowth, allocation: Mapping[str, int]) -> list[list[Tensor]]:
    """Per layer: copies of weight, mask, scores and values for the loop; the same evidence as the rule's."""
    layers, evidence = prunable_layers(regrowth.model), regrowth.evidence
    parts = []
    for name in allocation:
        layer = layers[name]
        values = stored_weight(evidence.reference_layer(name, layer))
        scores = evidence.tensor(*SELECTORS[regrowth.rule].needs, name)
        tensors = (layer.weight_orig.detach(), layer.weight_mask, scores, values)
        parts.append([tensor.clone() for tensor in tensors])
    return parts


def _elementwise(allocation: Mapping[str, int], parts: Sequence[Sequence[Tensor]]) -> None:
    for tensors, count in zip(parts, allocation.values(), strict=True):
        elementwise_regrowth(*tensors, count)


def loader_row(ours: BatchLoader, plain: torch.utils.data.DataLoader, repeats: int) -> Row:
    """Augmented batches from memory, against a DataLoader with worker processes."""
    def consume(loader: Any) -> None:
        for _ in loader:
            pass
    timings = measure_in_turn([partial(consume, ours), partial(consume, plain)], ours.device, repeats=repeats)
    return compared("loader", *timings, work=ours.num_images, unit="images/s")


def training_row(run: Run, ours: BatchLoader, plain: torch.utils.data.DataLoader, repeats: int) -> Row:
    """A training epoch, data included, against the plain loop."""
    recipe = replace(PRETRAIN, epochs=1, patience=None)
    nothing = ours.unaugmented(batch_size=500)
    nothing.images, nothing.targets = nothing.images[:1], nothing.targets[:1]

    def fast(model: nn.Module) -> None:
        Trainer(model, ours, nothing, recipe, seed=0, precision=run.precision).run(show=False)

    def slow(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        plain_training_epoch(model.to(memory_format=torch.contiguous_format), plain, optimizer)
    timings = measure_in_turn([fast, slow], run.device, repeats=repeats, prepare=run.new_model)
    return compared(f"training {run.m_name}", *timings, work=ours.num_images, unit="images/s")


def lamp_row(pruner: Callable[..., None], device: torch.device, repeats: int) -> Row:
    """LAMP to a sparsity of 0.99 on VGG16, against sorting all scores; pruner: of `weight_pruner_loader`."""
    def plain(model: nn.Module) -> None:
        weights = [layer.weight for layer in prunable_layers(model).values()]
        argsort_lamp_masks(weights, round(0.01 * sum(weight.numel() for weight in weights)))
    timings = measure_in_turn([lambda model: pruner(model, 0.99), plain], device, repeats=repeats,
                              prepare=lambda: model_loader("vgg16", device, seed=0))
    return compared("LAMP 0.99, vgg16", *timings, work=1, unit="prunings/s")


def loaders_to_compare(run: Run) -> tuple[BatchLoader, torch.utils.data.DataLoader]:
    """Ours and the plain loader over the same training images, batches of 128."""
    images, targets = run.data.train_images, run.data.train_targets
    mean, std = channel_statistics(images)
    ours = BatchLoader(images, targets, PRETRAIN.batch_size, mean=mean, std=std, device=run.device, augment=True,
                       shuffle=True)
    return ours, plain_dataloader(images, targets, PRETRAIN.batch_size, mean / 255, std / 255)


# --- bars ----------------------------------------------------------------------------------------------------------


def bars(run: Run, rows: Sequence[Row]) -> list[Row]:
    """The bars that apply to this model, device and precision, each with its figure and whether it is met."""
    results = []
    for row in rows:
        limits = next(found for beginning, found in LIMITS.items() if row["measurement"].startswith(beginning))
        results += [{"bar": row["measurement"], "unit": unit, "value": value, "limit": limit, "at_least": at_least,
                     "met": value >= limit if at_least else value <= limit}
                    for unit, value, limit, at_least in limits(run, row)]
    return results


def _regrowth_limits(run: Run, row: Row) -> list[Limit]:
    if run.m_name != "vgg16":
        return []
    most = 1 if run.device.type == "cuda" else 30
    return [("ms", 1e3 * row["ours_median_s"], most, False), ("x the loop", row["ratio"], 100, True)]


def _loader_limits(run: Run, row: Row) -> list[Limit]:
    if run.device.type == "cuda" or len(run.data.train_images) < FAIR_IMAGES:
        return []
    return [("images/s", row["ours"], 40_000, True), ("x the DataLoader", row["ratio"], 8, True)]


def _lamp_limits(run: Run, row: Row) -> list[Limit]:
    if run.device.type == "cuda":
        return []
    return [("s", row["ours_median_s"], 0.5, False), ("x the argsort", row["ratio"], 10, True)]


def _training_limits(run: Run, row: Row) -> list[Limit]:
    if len(run.data.train_images) < FAIR_IMAGES:
        return []
    if run.device.type == "cuda":
        seconds = {"resnet20": 1, "vgg16": 2}.get(run.m_name)
        return [(f"s for {EPOCH_IMAGES:,} images", EPOCH_IMAGES / row["ours"], seconds, False)] if seconds else []
    if run.m_name != "resnet20" or run.precision != "bf16":
        return []
    return [("images/s", row["ours"], 1_200, True), ("x the plain loop", row["ratio"], 3, True)]


LIMITS: dict[str, Callable[[Run, Row], list[Limit]]] = {  # by how the measurement's name begins
    "regrowth": _regrowth_limits, "loader": _loader_limits, "training": _training_limits, "LAMP": _lamp_limits,
}
