"""What `iterate.py` uses for each model: prune rate, batch size, recipes; a table row where a model needs its own."""
from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from utils.model_loader import model_loader
from utils.training import FINETUNE_ITERATIVE, PRETRAIN, Recipe


class Settings(NamedTuple):
    """Prune rate per iteration, batch size of both stages, learning rate of pretraining (SGD) and after it (AdamW)."""

    amount: float
    batch_size: int = 100
    lr_pre: float = PRETRAIN.lr
    lr_post: float = FINETUNE_ITERATIVE.lr


TO_99_IN_TEN = 1.0 - 0.01**0.1  # ten iterations leave exactly 1 % of the weights

# Every model of `utils.models.MODELS` without a row below, so also one that is added there.
DEFAULT = Settings(TO_99_IN_TEN)

SETTINGS: dict[str, Settings] = {
    "vgg16": Settings(0.4),  # setting A of arXiv 2511.11675
    "alexnet": Settings(TO_99_IN_TEN, lr_pre=0.01),  # no batch normalisation: 0.1 diverges
    "effnet": Settings(TO_99_IN_TEN, lr_pre=0.05),
}


def recipes_of(row: Settings) -> tuple[Recipe, Recipe]:
    """Recipes of pretraining and of finetuning after each pruning."""
    return (replace(PRETRAIN, lr=row.lr_pre, batch_size=row.batch_size),
            replace(FINETUNE_ITERATIVE, lr=row.lr_post, batch_size=row.batch_size))


def model_and_opt_loader(name: str, device: str | torch.device = "cpu", num_classes: int = 10,
                         seed: int | None = None) -> tuple[nn.Module, float, int, Recipe, Recipe]:
    """(model, amount, batch_size, opt_pre, opt_post) of the model's row of `SETTINGS`, or else of `DEFAULT`.

    amount: fraction of the surviving weights that an iteration removes; opt_pre, opt_post: see `recipes_of`. Raises
    UserError for a name that is not in `utils.models.MODELS`.
    """
    row = SETTINGS.get(name, DEFAULT)
    return (model_loader(name, device, num_classes=num_classes, seed=seed), row.amount, row.batch_size,
            *recipes_of(row))
