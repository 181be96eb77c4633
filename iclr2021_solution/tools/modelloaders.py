"""What `iterate.py` uses for each model: prune rate, batch size and recipes, one table row a model."""
from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from utils.errors import UserError
from utils.model_loader import model_loader
from utils.training import FINETUNE_ITERATIVE, PRETRAIN, Recipe


class Settings(NamedTuple):
    """Prune rate per iteration, batch size of both stages, learning rate of pretraining (SGD) and after it (AdamW)."""

    amount: float
    batch_size: int = 100
    lr_pre: float = PRETRAIN.lr
    lr_post: float = FINETUNE_ITERATIVE.lr


TO_99_IN_TEN = 1.0 - 0.01**0.1  # ten iterations leave exactly 1 % of the weights

# To add a model: add it to `utils.models.MODELS`, and a row here.
SETTINGS: dict[str, Settings] = {
    "resnet20": Settings(TO_99_IN_TEN),
    "resnet32": Settings(TO_99_IN_TEN),
    "resnet44": Settings(TO_99_IN_TEN),
    "resnet56": Settings(TO_99_IN_TEN),
    "resnet18": Settings(TO_99_IN_TEN),
    "vgg16": Settings(0.4),  # setting A of arXiv 2511.11675
    "alexnet": Settings(TO_99_IN_TEN, lr_pre=0.01),  # no batch normalisation: 0.1 diverges
    "densenet": Settings(TO_99_IN_TEN),
    "googlenet": Settings(TO_99_IN_TEN),
    "effnet": Settings(TO_99_IN_TEN, lr_pre=0.05),
    "shufflenetv2": Settings(TO_99_IN_TEN),
}


def model_and_opt_loader(name: str, device: str | torch.device = "cpu", num_classes: int = 10,
                         seed: int | None = None) -> tuple[nn.Module, float, int, Recipe, Recipe]:
    """(model, amount, batch_size, opt_pre, opt_post) of a row of `SETTINGS`.

    amount: fraction of the surviving weights that an iteration removes; opt_pre, opt_post: recipes of pretraining and
    of finetuning after each pruning. Raises UserError for a model without a row.
    """
    if name not in SETTINGS:
        raise UserError(f"no settings for model '{name}'; known: {', '.join(SETTINGS)}")
    row = SETTINGS[name]
    return (model_loader(name, device, num_classes=num_classes, seed=seed), row.amount, row.batch_size,
            replace(PRETRAIN, lr=row.lr_pre, batch_size=row.batch_size),
            replace(FINETUNE_ITERATIVE, lr=row.lr_post, batch_size=row.batch_size))
