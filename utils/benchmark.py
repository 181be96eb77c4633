"""The stages of a regrowth episode, our versions against straightforward ones, and the speeds aimed at."""
from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

from utils import checkpoint, stage2
from utils.allocation import allocate
from utils.analysis_utils import clone_model, prunable_layers
from utils.common import Progress, generator, needed
from utils.data_loader import PADDING, BatchLoader, balanced_indices, channel_statistics
from utils.datasets import CIFAR10_CLASSES, ImageDataset, load_dataset
from utils.mask_mover import MaskMover
from utils.mask_schedule import MASK_SCHEDULES, MaskPlan
from utils.methods import METHODS, regrowth_arguments
from utils.model_loader import model_loader
from utils.pruning import weight_pruner_loader
from utils.regrowth import SELECTORS, WeightRegrowth, stored_weight
from utils.run import Run, add_model_option, add_run_options, fraction, open_run, positive_int
from utils.training import FINETUNE_FINAL, PRETRAIN, Trainer

FAIR_IMAGES = 2_000  # with fewer, start-up time dominates, and no bar is judged
EPOCH_IMAGES = 40_000  # training images of CIFAR-10 after the split
EPOCH_SECONDS = {"resnet20": 1, "vgg16": 2}  # of these images, on a GPU
TOTAL = "end to end"
Row = dict[str, Any]

# --- the clock -----------------------------------------------------------------------------------------------------


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def timed(seconds: dict[str, float], stage: str, device: torch.device) -> Iterator[None]:
    """Adds the seconds that the block takes to those of the stage."""
    start = now(device)
    yield
    seconds[stage] = seconds.get(stage, 0.0) + now(device) - start


def measure(works: Sequence[Callable[..., Any]], device: torch.device, *, repeats: int = 5, warmup: int = 1,
            prepare: Callable[[], Any] | None = None) -> list[Row]:
    """Times ``work(prepare())``, `prepare` aside, or ``work()`` of each version `repeats` times after a warm-up, in
    turn (A B A B ...), so that a machine whose speed drifts treats them alike."""
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(warmup + repeats):
        for own, work in zip(taken, works):
            arguments = [] if prepare is None else [prepare()]
            start = now(device)
            work(*arguments)
            own.append(now(device) - start)
    return [spread(own[warmup:]) for own in taken]


def spread(seconds: Sequence[float]) -> Row:
    """Median, extremes and number of a measurement's repeats. Raises ValueError (statistics) for none."""
    return {"median_s": statistics.median(seconds), "fastest_s": min(seconds), "slowest_s": max(seconds),
            "repeats": len(seconds)}


# --- the straightforward versions ----------------------------------------------------------------------------------


@dataclass
class PilDataset(torch.utils.data.Dataset):
    """Images, uint8 (N, H, W, 3), as PIL objects through a transform, one by one, as in ``torchvision.datasets``."""

    images: np.ndarray
    targets: np.ndarray
    transform: transforms.Compose

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.targets[index])


def plain_dataloader(images: np.ndarray, targets: np.ndarray, batch_size: int, mean: Sequence[float],
                     std: Sequence[float], workers: int = 2) -> torch.utils.data.DataLoader:
    """The usual CIFAR-10 pipeline in worker processes; mean, std: per channel, in [0, 1] units."""
    transform = transforms.Compose([transforms.RandomCrop(images.shape[1], padding=PADDING),
                                    transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                                    transforms.Normalize(mean, std)])
    return torch.utils.data.DataLoader(PilDataset(images, targets, transform), batch_size, shuffle=True,
                                       num_workers=workers, persistent_workers=workers > 0)


def plain_training_epoch(model: nn.Module, loader: torch.utils.data.DataLoader,
                         optimizer: torch.optim.Optimizer) -> float:
    """One epoch in float32 and NCHW, reading the loss at each step; returns the mean loss."""
    device, losses = next(model.parameters()).device, []
    model.train()
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs.to(device)), targets.to(device))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def argsort_lamp_masks(weights: Sequence[Tensor], keep: int) -> list[Tensor]:
    """LAMP (Lee et al., ICLR 2021) by sorting every layer, then all scores; bool masks of the `keep` best weights."""
    scores = []
    for weight in weights:
        squares, order = weight.detach().flatten().double().square().sort(descending=True)
        scores.append(torch.empty_like(squares).scatter_(0, order, squares / squares.cumsum(0)))
    scores = torch.cat(scores)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[torch.argsort(scores, descending=True)[:keep]] = True
    return [part.view(weight.shape) for part, weight in zip(mask.split([w.numel() for w in weights]), weights)]


def plain_tensors(regrowth: WeightRegrowth, allocation: Mapping[str, int]) -> list[list[Tensor]]:
    """Of every layer copies, of one shape, of weight, mask (1 active, 0 pruned), the rule's scores, and the values
    that weights return with."""
    layers, evidence = prunable_layers(regrowth.model), regrowth.evidence
    parts = []
    for name in allocation:
        values = stored_weight(evidence.reference_layer(name, layers[name]))
        ranking = SELECTORS[regrowth.rule](name, layers[name], evidence)
        scores = torch.zeros_like(values) if ranking is None else ranking.scores  # None: it draws
        tensors = (layers[name].weight_orig.detach(), layers[name].weight_mask, scores, values)
        parts.append([tensor.clone() for tensor in tensors])
    return parts


def elementwise_regrowth(allocation: Mapping[str, int], parts: Sequence[Sequence[Tensor]]) -> None:
    """Regrows the best-scored pruned weights one index at a time, as the published scripts do; in place.

    parts: of `plain_tensors`, in any memory format, so that positions are coordinates.
    """
    for (weight, mask, scores, values), count in zip(parts, allocation.values(), strict=True):
        candidates = torch.where(mask == 0, scores, -torch.inf)
        for index in torch.topk(candidates.flatten(), count).indices.tolist():
            position = np.unravel_index(index, mask.shape)
            mask[position] = 1.0
            weight[position] = values[position]


# --- what is measured, and on what ------------------------------------------------------------------------------------


def add_setting_options(parser: argparse.ArgumentParser, num_runs: int, num_images: int) -> None:
    """What is timed, shared with quick_benchmark.py; the numbers are the defaults."""
    add_model_option(parser)
    parser.add_argument("--num_runs", type=positive_int, default=num_runs, help="repeats of an episode that count")
    parser.add_argument("--start_sparsity", type=fraction, default=0.99, help="sparsity of the starting checkpoint")
    parser.add_argument("--target_sparsity", type=fraction, default=0.98, help="sparsity after regrowth")
    parser.add_argument("--num_images", type=positive_int, default=num_images,
                        help="training images, of which --val_split validate; an epoch of mini-finetuning")
    parser.add_argument("--synthetic", action="store_true", help="untrained weights and random images")
    add_run_options(parser)


def stage2_arguments(args: argparse.Namespace, method: str = "reference") -> argparse.Namespace:
    """What a method's script would have read, mostly defaults; UserError if nothing is left to regrow."""
    shared = ("m_name", "start_sparsity", "target_sparsity", "seed", "root")
    return regrowth_arguments(method, **{name: getattr(args, name) for name in shared})


def synthetic_dataset(num_images: int, seed: int) -> ImageDataset:
    """Random pixels in the shape of CIFAR-10: as good as any for timing, and for nothing else."""
    random = np.random.RandomState(seed % 2**32)
    images = random.randint(256, size=(num_images + 100, 32, 32, 3), dtype=np.uint8)
    targets = random.randint(len(CIFAR10_CLASSES), size=len(images))
    return ImageDataset("synthetic", "random pixels", images[:num_images], targets[:num_images], images[num_images:],
                        targets[num_images:], CIFAR10_CLASSES)


def open_benchmark(args: argparse.Namespace, temporary: Path) -> Run:
    """A run over the checkpoints of stage 1, or over synthetic weights and data where `--synthetic` asks for them or
    there are no checkpoints (said in a line); those are written to `temporary`, which then is the run's root.
    """
    dense, pruned = (checkpoint.dense_path(Path(), args.m_name),
                     checkpoint.pruned_path(Path(), args.m_name, args.start_sparsity))
    missing = [args.root / path for path in (dense, pruned) if not (args.root / path).is_file()]
    if missing and not args.synthetic:
        print(f"no checkpoint at {missing[0]}: timing synthetic weights and data, as --synthetic does")
    if missing or args.synthetic:
        run = open_run(args, synthetic_dataset(args.num_images, args.seed))
        run.root, model = temporary, run.new_model()
        checkpoint.save_checkpoint({"net": model.state_dict(), "acc": 0.0, "epoch": 0}, temporary / dense)
        weight_pruner_loader("erk")(model, args.start_sparsity)  # leaves no layer empty
        checkpoint.save_checkpoint(model.state_dict(), temporary / pruned)
    else:
        data = load_dataset(args.dataset, args.data_dir, args.image_size)
        few = balanced_indices(data.train_images, data.train_targets, args.num_images, seed=0)
        run = open_run(args, replace(data, train_images=data.train_images[few], train_targets=data.train_targets[few]))
    run.timing_only = True
    return run


# --- the stages of an episode --------------------------------------------------------------------------------------


@dataclass
class Episode:
    """One regrowth episode: seconds per stage, and what is needed to repeat its update."""

    seconds: dict[str, float]
    start: nn.Module  # the pruned model
    allocation: dict[str, int]
    regrower: Callable[[nn.Module], WeightRegrowth]


def run_episode(run: Run, args: argparse.Namespace) -> Episode:
    """From checkpoints on disk to a model finetuned for one epoch, by the same calls as the stage-2 scripts.

    args: of `stage2_arguments`. Evidence is what the method looks at: gradients, or the reference model. The
    allocation is the proportional one, so that both methods move the same number of weights in each layer.
    """
    seconds: dict[str, float] = {}
    with timed(seconds, "loading", run.device):
        step = stage2.first_step(run, args)
    with timed(seconds, "drift (SSIM)", run.device):
        problem = step.problem
    with timed(seconds, "evidence", run.device):
        for kind in needed(SELECTORS[args.method.rule(args)[0]]):
            step.evidence.make(kind)
    amounts = allocate("proportional", problem, generator(run.seed, "allocation"))
    model, allocation = clone_model(step.start.model), dict(zip(problem.layers, amounts, strict=True))
    regrowth = step.regrower(model)
    with timed(seconds, "selection", run.device):
        chosen = regrowth.select(allocation)
    with timed(seconds, "mask and values", run.device):
        regrowth.write(chosen)
    recipe = replace(FINETUNE_FINAL, epochs=1, schedule="constant", patience=None)
    trainer = Trainer(model, run.train, run.val, recipe, seed=run.seed, precision=run.precision)
    with timed(seconds, "mini-finetuning", run.device):
        trainer.run(show=False)
    return Episode(seconds, step.start.model, allocation, step.regrower)


def time_episodes(run: Run, args: argparse.Namespace, warmups: int = 0,
                  log: Path | None = None) -> tuple[dict[str, list[dict[str, float]]], dict[str, Episode]]:
    """Seconds per stage-2 method, repeat and stage, and the last episode of each method; the methods take turns.

    warmups: episodes of each method that do not count; log: CSV with a row for every finished episode.
    """
    options = {name: stage2_arguments(args, name) for name in METHODS}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    last, rows = {}, []
    jobs = [(number, name) for number in range(1 - warmups, args.num_runs + 1) for name in METHODS]
    with Progress("benchmark", len(jobs)) as progress:
        for number, name in jobs:
            progress.say(f"episode {progress.done + 1}/{len(jobs)}  {name}{'' if number > 0 else ', to warm up'}")
            last[name] = run_episode(run, options[name])
            progress.advance()
            if number > 0:
                seconds[name].append(last[name].seconds)
                rows.append({"run": number, "method": name, **last[name].seconds})
                if log:
                    checkpoint.save_csv(rows, log)
    return seconds, last


# --- ours against the straightforward version ----------------------------------------------------------------------


def compared(name: str, ours: Row, plain: Row, work: float, unit: str) -> Row:
    """A row: both versions' seconds, their rates (`work` units per repeat) and the ratio, from the medians."""
    return {"measurement": name, "ratio": plain["median_s"] / ours["median_s"], "unit": unit,
            "ours": work / ours["median_s"], "plain": work / plain["median_s"],
            **{f"ours_{key}": value for key, value in ours.items()},
            **{f"plain_{key}": value for key, value in plain.items()}}


def update_row(name: str, episode: Episode, device: torch.device, repeats: int) -> Row:
    """Selection, masks and initial values of an episode, against the element-wise loop; weights as work."""
    allocation = episode.allocation

    def start() -> WeightRegrowth:
        return episode.regrower(clone_model(episode.start))
    ours, = measure([lambda regrowth: regrowth.apply_regrowth(allocation)], device, repeats=max(10, repeats), warmup=3,
                    prepare=start)
    parts = plain_tensors(start(), allocation)
    plain, = measure([lambda: elementwise_regrowth(allocation, parts)], device, repeats=1, warmup=0)
    return compared(f"regrowth, {name}", ours, plain, sum(allocation.values()), "weights/s")


def loader_rows(run: Run, repeats: int) -> list[Row]:
    """Augmented batches from memory, against a DataLoader with worker processes; a training epoch, data included,
    against the plain loop. Batches of 128 of the same images."""
    images, targets, batch = run.data.train_images, run.data.train_targets, PRETRAIN.batch_size
    mean, std = channel_statistics(images)
    ours = BatchLoader(images, targets, batch, mean=mean, std=std, device=run.device, augment=True, shuffle=True)
    plain = plain_dataloader(images, targets, batch, mean / 255, std / 255)
    nothing = ours.unaugmented(batch_size=500)
    nothing.images, nothing.targets = nothing.images[:1], nothing.targets[:1]

    def fast(model: nn.Module) -> None:
        recipe = replace(PRETRAIN, epochs=1, patience=None)
        Trainer(model, ours, nothing, recipe, seed=0, precision=run.precision).run(show=False)

    def slow(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        plain_training_epoch(model.to(memory_format=torch.contiguous_format), plain, optimizer)
    batches = measure([lambda: deque(ours, maxlen=0), lambda: deque(plain, maxlen=0)], run.device, repeats=repeats)
    epochs = measure([fast, slow], run.device, repeats=repeats, prepare=run.new_model)
    return [compared(name, *timings, work=len(images), unit="images/s")
            for name, timings in (("loader", batches), (f"training {run.m_name}", epochs))]


def lamp_row(device: torch.device, repeats: int) -> Row:
    """LAMP to a sparsity of 0.99 on VGG16, against sorting all scores."""
    ours = weight_pruner_loader("lamp")

    def plain(model: nn.Module) -> None:
        weights = [layer.weight for layer in prunable_layers(model).values()]
        argsort_lamp_masks(weights, round(0.01 * sum(weight.numel() for weight in weights)))
    timings = measure([lambda model: ours(model, 0.99), plain], device, repeats=repeats,
                      prepare=lambda: model_loader("vgg16", device, seed=0))
    return compared("LAMP 0.99, vgg16", *timings, work=1, unit="prunings/s")


# --- mask schedules ------------------------------------------------------------------------------------------------


class TimedMover(MaskMover):
    """Notes the seconds of steps in which it did nothing (`plain`), of those whose gradients it kept for the update
    after them (`watched`), and of these updates. For plans that look at one step before an update."""

    def __init__(self, model: nn.Module, plan: MaskPlan, seed: int):
        super().__init__(model, plan, seed)
        self.plain, self.watched, self.updates = [], [], []

    def before_step(self, trainer: Trainer) -> None:
        """Starts the clock."""
        super().before_step(trainer)
        self.start = now(trainer.device)

    def on_step(self, trainer: Trainer) -> None:
        """Notes the step's time, and that of an update after it."""
        done, updates = now(trainer.device), len(self.history)
        super().on_step(trainer)
        if len(self.history) == updates:
            self.plain.append(done - self.start)
        else:
            self.watched.append(done - self.start)
            self.updates.append(now(trainer.device) - done)


def schedule_row(run: Run, name: str, target: float) -> Row:
    """What the updates of a mask schedule cost, at its defaults (in 20 epochs), from the dense model to the target.

    Timed in finetuning with an update after every fourth step. `share_percent`: an update, and what keeping gradients
    adds to the `evidence_steps` before it, in per cent of the plain steps from one update to the next. Medians, without
    the first quarter of the plain steps, which warms up.
    """
    plan = MaskPlan(name, 0.0, target, **MASK_SCHEDULES[name].defaults)
    mover = TimedMover(run.new_model(), replace(plan, update_every=4, update_until=1.0, evidence_steps=1), run.seed)
    epochs = math.ceil(6 * FINETUNE_FINAL.batch_size / run.train.num_images)  # one, if it has six steps
    recipe, few = replace(FINETUNE_FINAL, epochs=epochs, patience=None), run.val.subset(np.arange(1))
    Trainer(mover.model, run.train, few, recipe, seed=run.seed, precision=run.precision, hook=mover).run(show=False)
    plain, watched = statistics.median(mover.plain[len(mover.plain) // 4:]), statistics.median(mover.watched)
    update = spread(mover.updates)
    extra = update["median_s"] + plan.evidence_steps * max(0.0, watched - plain)
    every = plan.every(20 * math.ceil(run.train.num_images / FINETUNE_FINAL.batch_size))
    return {"measurement": f"mask updates, {name}", "step_s": plain, "watched_step_s": watched, **update,
            "update_every": every, "share_percent": 100 * extra / (every * plain)}


# --- bars ----------------------------------------------------------------------------------------------------------


def bars(run: Run, rows: Sequence[Row]) -> list[Row]:
    """Speed targets for this model, device and precision: measured value, limit, whether it is met."""
    gpu, enough = run.device.type == "cuda", len(run.data.train_images) >= FAIR_IMAGES
    found = []
    for row in rows:
        kind, limits = row["measurement"].split()[0].strip(","), []  # unit, figure, limit, whether a lower bound
        if kind == "regrowth" and run.m_name == "vgg16":
            limits = [("ms", 1e3 * row["ours_median_s"], 1 if gpu else 30, False),
                      ("x the loop", row["ratio"], 100, True)]
        elif kind == "LAMP" and not gpu:
            limits = [("s", row["ours_median_s"], 0.5, False), ("x the argsort", row["ratio"], 10, True)]
        elif kind == "mask" and enough:
            limits = [("% of training", row["share_percent"], 3, False)]
        elif kind == "loader" and enough and not gpu:
            limits = [("images/s", row["ours"], 40_000, True), ("x the DataLoader", row["ratio"], 8, True)]
        elif kind == "training" and enough and gpu and run.m_name in EPOCH_SECONDS:
            limits = [(f"s for {EPOCH_IMAGES:,} images", EPOCH_IMAGES / row["ours"], EPOCH_SECONDS[run.m_name], False)]
        elif kind == "training" and enough and not gpu and (run.m_name, run.precision) == ("resnet20", "bf16"):
            limits = [("x the plain loop", row["ratio"], 2.2, True)]
        found += [{"bar": row["measurement"], "unit": unit, "value": value, "limit": limit, "at_least": at_least,
                   "met": value >= limit if at_least else value <= limit} for unit, value, limit, at_least in limits]
    return found


# --- tables --------------------------------------------------------------------------------------------------------


def stage_rows(seconds: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Row]:
    """A row per method and stage, and one for the whole episode; seconds: method -> repeats -> stage -> seconds."""
    return [{"method": method, "stage": stage,
             **spread([sum(once.values()) if stage == TOTAL else once[stage] for once in repeats])}
            for method, repeats in seconds.items() for stage in (*repeats[0], TOTAL)]


def print_stages(rows: Sequence[Row]) -> None:
    """Stages by methods: median with fastest and slowest, in milliseconds; - where there is nothing to do."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    print(f"\n{'stage (ms)':<18}" + "".join(f"{method:>34}" for method in methods))
    for stage in dict.fromkeys(row["stage"] for row in rows):
        cells = []
        for row in (row for row in rows if row["stage"] == stage):
            median, low, high = (1e3 * row[key] for key in ("median_s", "fastest_s", "slowest_s"))
            spread = f" [{low:,.1f} .. {high:,.1f}]" if row["repeats"] > 1 else ""
            cells.append(f"{median:,.1f}{spread}" if median >= 0.1 else "-")
        print(f"{stage:<18}" + "".join(f"{cell:>34}" for cell in cells))


def print_comparisons(rows: Sequence[Row]) -> None:
    """A line per measurement: ours, the straightforward version, and the ratio."""
    print(f"\n{'against the straightforward version':<36} {'ours (ms)':>12} {'plain (ms)':>12} {'ratio':>8}")
    for row in rows:
        print(f"{row['measurement']:<36} {1e3 * row['ours_median_s']:12,.2f} {1e3 * row['plain_median_s']:12,.1f} "
              f"{row['ratio']:7.1f}x   {row['ours']:,.0f} {row['unit']}")


def print_bars(rows: Sequence[Row]) -> None:
    """A line per bar: what this project aims at on such hardware, its figure, reached or not."""
    print("\nspeeds that this project aims at on such hardware" if rows else "")
    for row in rows:
        sign = ">=" if row["at_least"] else "<="
        print(f"  {row['bar']:<24} {row['value']:12,.2f} {sign} {row['limit']:8,g} {row['unit']:<22} "
              f"{'reached' if row['met'] else 'not reached here'}")
