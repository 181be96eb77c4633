"""One training loop and one evaluation for everything that trains: pretraining, finetuning, episodes of the search."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from utils.analysis_utils import clone_model, evaluating, forget_momentum, hold_pruned_weights, used_weights
from utils.common import Progress, RunFailed, autocast, derive_seed, global_rng_state, set_global_rng_state
from utils.data_loader import PADDING, BatchLoader
from utils.muon import Muon
from utils.step_graph import StepGraph


@dataclass(frozen=True)
class Recipe:
    """How to train: optimizer and schedule (names of `OPTIMIZERS` and `SCHEDULES`), learning rate, epochs, batch size.

    epochs: a fraction is a last epoch of fewer steps;
    patience: epochs without a better validation accuracy before training stops; None never stops early;
    label_smoothing: of the training loss (Szegedy et al., CVPR 2016), in [0, 1];
    padding: pixels of zeros on each side of an image before its random crop.
    """

    optimizer: str
    lr: float
    epochs: float
    batch_size: int
    schedule: str = "constant"
    weight_decay: float = 0.0
    patience: int | None = None
    label_smoothing: float = 0.0
    padding: int = PADDING

    def as_dict(self) -> dict[str, Any]:
        """The fields, for run cards and for comparing runs; smoothing and padding only where they are not usual, as
        cards have always had it."""
        usual = {"label_smoothing": 0.0, "padding": PADDING}
        return {name: value for name, value in asdict(self).items() if name not in usual or value != usual[name]}


# The published recipes of arXiv 2511.11675; AdamW's weight decay is PyTorch's default.
PRETRAIN = Recipe("sgd", lr=0.1, epochs=200, batch_size=128, schedule="cosine", weight_decay=5e-4, patience=30)
FINETUNE_ONE_SHOT = Recipe("adamw", lr=3e-4, epochs=400, batch_size=100, weight_decay=1e-2, patience=30)
FINETUNE_ITERATIVE = Recipe("adamw", lr=3e-4, epochs=40, batch_size=100, weight_decay=1e-2, patience=30)
FINETUNE_FINAL = Recipe("adamw", lr=3e-4, epochs=400, batch_size=100, schedule="warmup_cosine", weight_decay=1e-2,
                        patience=30)
# For a laptop; chosen on validation (results/README.md), to be searched further by `experiments/recipe_sweep.py`. Muon
# makes a better dense model, which pruning by magnitude spoils.
SHORT_PRETRAIN = Recipe("nesterov", lr=0.2, epochs=15, batch_size=128, schedule="triangular", weight_decay=5e-4,
                        label_smoothing=0.1, padding=2)
SHORT_FINETUNE = Recipe("nesterov", lr=0.1, epochs=12, batch_size=128, schedule="warmup_cosine", weight_decay=5e-4,
                        padding=2)


class Recipes(NamedTuple):
    """Recipes for the dense model, after one-shot pruning, for each pruning iteration and after regrowth; episodes of a
    search use the last, with a schedule of their own (at a constant high rate accuracy is mostly noise)."""

    pretrain: Recipe
    one_shot: Recipe
    iterative: Recipe
    final: Recipe
    episode_schedule: str


RECIPES = {
    "published": Recipes(PRETRAIN, FINETUNE_ONE_SHOT, FINETUNE_ITERATIVE, FINETUNE_FINAL, "constant"),
    "short": Recipes(SHORT_PRETRAIN, SHORT_FINETUNE, SHORT_FINETUNE, SHORT_FINETUNE, "warmup_cosine"),
}


def _sgd(groups: Any, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=recipe.optimizer == "nesterov",
                           weight_decay=recipe.weight_decay, fused=True)


def _adamw(groups: Any, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def _muon(groups: Any, recipe: Recipe) -> torch.optim.Optimizer:
    return Muon(groups, recipe.lr, recipe.weight_decay)


OPTIMIZERS: dict[str, Callable[[Any, Recipe], torch.optim.Optimizer]] = {
    "sgd": _sgd, "nesterov": _sgd, "adamw": _adamw, "muon": _muon}


def _cosine(step: int, total: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(step, total) / max(1, total)))


def _warmup_cosine(step: int, total: int) -> float:
    warmup = max(1, round(0.05 * total))  # 5 % linear warm-up, then cosine to zero
    return (step + 1) / warmup if step < warmup else _cosine(step - warmup, max(1, total - warmup))


def _triangular(step: int, total: int) -> float:
    warmup = max(1, round(0.2 * total))  # 20 % linear warm-up, then linear to zero
    return (step + 1) / warmup if step < warmup else max(0.0, (total - step) / max(1, total - warmup))


# name -> factor on the learning rate at a step of a training of `total` steps
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda step, total: 1.0,
    "cosine": _cosine,
    "warmup_cosine": _warmup_cosine,
    "triangular": _triangular,
}


class Evaluation(NamedTuple):
    """Mean cross-entropy loss (nats) and accuracy (%)."""

    loss: float
    accuracy: float


class TrainResult(NamedTuple):
    """Best validation accuracy (%), the 1-based epoch it was reached in (0: before training), and epochs trained."""

    accuracy: float
    best_epoch: int
    epochs: int


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], precision: str = "fp32") -> Evaluation:
    """Loss and accuracy of `model` over one pass of `loader`; every module is left in the mode it was in."""
    device = next(model.parameters()).device
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    with evaluating(model), autocast(device, precision):
        for inputs, targets in loader:
            logits = model(inputs)
            totals += _batch_totals(F.cross_entropy(logits, targets), logits, targets)
    loss_sum, correct, seen = totals.tolist()
    return Evaluation(loss_sum / seen, 100.0 * correct / seen)


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, loader: BatchLoader, precision: str = "fp32") -> bool:
    """Estimates the running statistics of batch normalisation anew, over one pass of `loader`; nothing else changes.

    loader: the training loader, so augmented and shuffled as in training; the same images come for every model, and
    its generator stays where it is. While it runs, batches are normalised by their own statistics, as in training, but
    dropout is off. Mean and unbiased variance are over all values pooled; `torch.optim.swa_utils.update_bn` averages
    within-batch variances, which omits the variance between batch means.
    Returns whether there are such statistics; layers that never run keep theirs.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    sums: dict[_BatchNorm, Tensor] = {}  # float64 (3, channels): number of values, their sum, sum of their squares

    def add(norm: _BatchNorm, inputs: tuple[Tensor], _: Tensor) -> None:
        number, mean, variance = inputs[0][:, 0].numel(), norm.running_mean.double(), norm.running_var.double()
        squares = variance * (number - 1) + number * mean**2
        sums[norm] = sums.get(norm, 0) + torch.stack([torch.full_like(mean, number), number * mean, squares])

    momenta = [norm.momentum for norm in norms]
    batches, hooks = loader.with_batch_size(loader.batch_size), [norm.register_forward_hook(add) for norm in norms]
    batches.reseed(0)
    with evaluating(model), autocast(next(model.parameters()).device, precision):
        for norm in norms:
            norm.train().momentum = 1.0  # the running statistics are then those of the batch
        for inputs, _ in batches if norms else ():
            model(inputs)
    for norm, hook, momentum in zip(norms, hooks, momenta, strict=True):
        hook.remove()
        norm.momentum = momentum
    for norm, (number, total, squares) in sums.items():
        norm.running_mean.copy_(total / number)
        norm.running_var.copy_((squares - total**2 / number) / (number - 1))
    return bool(norms)


def accuracy_with_new_statistics(model: nn.Module, train: BatchLoader, val: BatchLoader, precision: str) -> float:
    """Accuracy (%) on `val` of a copy of the model whose batch-norm statistics are re-estimated on `train`."""
    copy = clone_model(model)
    reestimate_batch_norm(copy, train, precision)
    return evaluate(copy, val, precision).accuracy


def _batch_totals(mean_loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """float64 (3,): summed loss, number correct, number seen; stays on the device."""
    correct = (logits.argmax(1) == targets).sum()
    seen = torch.full_like(correct, len(targets))
    return torch.stack([mean_loss.double() * len(targets), correct.double(), seen.double()])


class TrainingHook:
    """What a method does while a model trains. Every method of this base does nothing; override those that matter.

    `on_step` may change weights and masks in place; after a change of masks it calls `trainer.hold_pruned()`. What it
    must know to go on after an interruption is its `state_dict` (tensors and plain containers). It sets `watching`
    for a step after which `layer.weight.grad` is to have the gradient of the masked weight, where it is pruned too.
    On a GPU a step is repeated without Python (`utils.step_graph`): hooks of modules do not run then, and the masked
    `layer.weight` is that of an earlier step.
    """

    watching = False

    def begin(self, trainer: Trainer) -> None:
        """Before the first step of this process, also after `load_state_dict`."""

    def before_step(self, trainer: Trainer) -> None:
        """Before the forward pass of a training step; `trainer.step` steps are done."""

    def on_step(self, trainer: Trainer) -> None:
        """After the optimizer's step; `trainer.step` counts it. Gradients of this batch are still there."""

    def counts(self, trainer: Trainer) -> bool:
        """Whether the epoch that has just ended may be kept as the best one; others do not use up the patience."""
        return True

    def on_best(self, trainer: Trainer) -> None:
        """After an epoch with the best accuracy so far, whose weights and masks the model may end with."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on exactly."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""


class Trainer:
    """Trains a model by a `Recipe` and leaves it with the weights of its best validation accuracy.

    A pure function of the model's weights, the loaders' data, the recipe and the seed (on a CPU: bit for bit, for one
    thread count). Pruned weights never move. `state_dict` after any epoch continues it exactly in another process.
    """

    def __init__(self, model: nn.Module, train: BatchLoader, val: BatchLoader, recipe: Recipe, *, seed: int,
                 precision: str = "fp32", params: Any = None, passes_before: int = 0,
                 constrain: Callable[[torch.optim.Optimizer], Any] | None = None, hook: TrainingHook | None = None):
        """params: optimizer parameter groups (default: all parameters); passes_before: epochs of this seed's image
        order to skip first; constrain: called with the optimizer to register step hooks (default: hold pruned weights);
        hook: a method that acts while the model trains. ValueError for a hook beside `constrain`, since what is held
        changes with the masks."""
        if hook and constrain:
            raise ValueError("a hook that moves masks goes with the default `constrain` only")
        self.model, self.val, self.recipe, self.precision = model, val, recipe, precision
        self.train_loader = train.with_batch_size(recipe.batch_size).with_padding(recipe.padding)
        self.train_loader.reseed(derive_seed(seed, "train"))
        self.train_loader.skip(passes_before)
        torch.manual_seed(derive_seed(seed, "dropout"))
        self.device = next(model.parameters()).device
        self.optimizer = OPTIMIZERS[recipe.optimizer](model.parameters() if params is None else params, recipe)
        self._constrained = constrain is not None
        self._held = (constrain or (lambda optimizer: hold_pruned_weights(model, optimizer)))(self.optimizer)
        self.hook, self.total_steps = hook or TrainingHook(), \
            max(int(recipe.epochs > 0), round(recipe.epochs * len(self.train_loader)))
        self._passes = StepGraph(model, self._gradients)
        factor = SCHEDULES[recipe.schedule]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: factor(step, self.total_steps))
        self.epoch, self.best_accuracy, self.best_epoch, self.best_state, self._waited = 0, -1.0, 0, {}, 0
        self.history: list[dict[str, float]] = []

    def run(self, label: str = "train", on_epoch: Callable[[Trainer], None] | None = None,
            show: bool = True) -> TrainResult:
        """Trains to the end of the recipe or of its patience; `on_epoch` is called after every epoch.

        Raises RunFailed on a non-finite training or validation loss, and where the hook counts no epoch; what
        `on_epoch` has saved by then stays.
        """
        steps = len(self.train_loader)
        if self.recipe.epochs == 0:
            self.best_accuracy = evaluate(self.model, self.val, self.precision).accuracy
        self.hook.begin(self)
        with Progress(label, self.total_steps, done=self.epoch * steps, show=show,
                      text=f"epoch {self.epoch}/{self.recipe.epochs}") as progress:
            while not self.finished:
                row = self._run_epoch(progress)
                self._keep_best(row["val_acc"])
                self.history.append(row)
                best = f"{self.best_accuracy:.2f} %" if self.best_accuracy >= 0 else "none yet"
                progress.say(f"epoch {self.epoch}/{self.recipe.epochs}  val {row['val_acc']:.2f} %  best {best}  "
                             f"loss {row['train_loss']:.3f}")
                if on_epoch is not None:
                    on_epoch(self)
        self.optimizer.zero_grad(set_to_none=True)
        self._passes.forget()
        if self.best_accuracy < 0:
            raise RunFailed(f"none of the {self.epoch} epochs counts: each ended at another sparsity than the target's")
        if self.best_state:
            self.model.load_state_dict(self.best_state)
        return TrainResult(self.best_accuracy, self.best_epoch, self.epoch)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or the patience is spent."""
        done = self.epoch >= self.recipe.epochs or self.step >= self.total_steps
        return done or (self.recipe.patience is not None and self._waited >= self.recipe.patience)

    @property
    def step(self) -> int:
        """Optimizer steps done, of `total_steps`."""
        return self.scheduler.last_epoch

    @property
    def seconds(self) -> float:
        """Training time so far, validation not included, over all processes that an interrupted training took."""
        return sum(row["seconds"] for row in self.history)

    def _run_epoch(self, progress: Progress) -> dict[str, float]:
        start, lr = time.perf_counter(), self.optimizer.param_groups[0]["lr"]
        images = min(self.train_loader.num_images, (self.total_steps - self.step) * self.recipe.batch_size)
        loss, accuracy = self._train_epoch(progress)
        seconds = time.perf_counter() - start
        self._check_finite("training", loss, lr)
        val = evaluate(self.model, self.val, self.precision)
        self._check_finite("validation", val.loss, lr)
        self.epoch += 1
        return {"epoch": self.epoch, "lr": lr, "train_loss": loss, "train_acc": accuracy, "val_loss": val.loss,
                "val_acc": val.accuracy, "images_per_s": images / seconds, "seconds": seconds}

    def _check_finite(self, name: str, loss: float, lr: float) -> None:
        if not math.isfinite(loss):
            raise RunFailed(f"the {name} loss became {loss} in epoch {self.epoch + 1} (learning rate {lr:.3g}); "
                            "what was saved before is kept. Try a lower learning rate or --precision fp32")

    def _train_epoch(self, progress: Progress) -> Evaluation:
        """One pass; losses are summed on the device and read once at the end, so that no step waits for the host."""
        self.model.train()
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        for inputs, targets in islice(self.train_loader, self.total_steps - self.step):
            self.hook.before_step(self)
            totals += self._passes(inputs, targets, self.hook.watching)
            self.optimizer.step()
            self.scheduler.step()
            self.hook.on_step(self)
            progress.advance()
        loss_sum, correct, seen = totals.tolist()
        return Evaluation(loss_sum / seen, 100.0 * correct / seen)

    def _gradients(self, inputs: Tensor, targets: Tensor, watched: bool) -> Tensor:
        """`_batch_totals` of a batch, whose gradients it leaves in the parameters."""
        with used_weights(self.model) if watched else nullcontext({}) as used, autocast(self.device, self.precision):
            logits = self.model(inputs)
            loss = F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing)
        for weight in chain(*used.values()):
            weight.retain_grad()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for weights in used.values():
            if len(weights) > 1:  # a layer that ran several times
                weights[-1].grad = sum(weight.grad for weight in weights if weight.grad is not None)
        return _batch_totals(loss.detach(), logits.detach(), targets)

    def hold_pruned(self, returned: Mapping[str, Tensor] | None = None) -> None:
        """Holds the weights that are pruned now, and lets go of those that no longer are.

        returned: layer -> bool, True where a weight has come back; it starts without the momentum of its former life.
        """
        if returned:
            forget_momentum(self.model, self.optimizer, returned)
        self._passes.check()
        self._held.remove()
        self._held = hold_pruned_weights(self.model, self.optimizer)

    def _keep_best(self, accuracy: float) -> None:
        if not self.hook.counts(self):
            return
        self._waited += 1
        if accuracy > self.best_accuracy:
            self.best_accuracy, self.best_epoch, self._waited = accuracy, self.epoch, 0
            self.best_state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.hook.on_best(self)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs: weights, best weights, optimizer, schedule, generators, progress."""
        return {"model": self.model.state_dict(), "best_state": self.best_state, "best_accuracy": self.best_accuracy,
                "best_epoch": self.best_epoch, "epoch": self.epoch, "waited": self._waited,
                "optimizer": self.optimizer.state_dict(),
                "scheduler": {"last_epoch": self.scheduler.last_epoch}, "loader": self.train_loader.state_dict(),
                "global_rng": global_rng_state(), "history": self.history,
                "hook": self.hook.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`; the trainer must have been built from the same arguments."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for param, kept in self.optimizer.state.items():  # saved contiguous; fused steps need the parameter's strides
            kept.update({key: torch.empty_like(param).copy_(value) for key, value in kept.items()
                         if isinstance(value, Tensor) and value.shape == param.shape})
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        self.train_loader.load_state_dict(state["loader"])
        set_global_rng_state(state["global_rng"])
        self.best_accuracy, self.best_epoch, self.epoch = state["best_accuracy"], state["best_epoch"], state["epoch"]
        self.best_state = {name: value.to(self.device) for name, value in state["best_state"].items()}
        self._waited = state.get("waited", self.epoch - self.best_epoch)
        self.history = list(state["history"])
        self.hook.load_state_dict(state.get("hook", {}))
        if not self._constrained:
            self.hold_pruned()
