"""The straightforward versions that our speed is measured against, kept simple on purpose; nothing else uses them."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

from utils.data_loader import PAD


class PilDataset(torch.utils.data.Dataset):
    """Images as PIL objects through a transform, one by one, as ``torchvision.datasets`` gives them."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, transform: transforms.Compose):
        """images: uint8 (N, H, W, 3); targets: (N,)."""
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.targets[index])


def plain_dataloader(images: np.ndarray, targets: np.ndarray, batch_size: int, mean: Sequence[float],
                     std: Sequence[float], workers: int = 2) -> torch.utils.data.DataLoader:
    """The usual CIFAR-10 pipeline: RandomCrop(32, 4), flip, ToTensor, Normalize in worker processes.

    mean, std: per channel, in [0, 1] units.
    """
    transform = transforms.Compose([transforms.RandomCrop(images.shape[1], padding=PAD),
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
        squares = weight.detach().flatten().double() ** 2
        order = torch.argsort(squares, descending=True)
        score = torch.empty_like(squares)
        score[order] = squares[order] / squares[order].cumsum(0)
        scores.append(score)
    best = torch.argsort(torch.cat(scores), descending=True)[:keep]
    mask = torch.zeros(sum(weight.numel() for weight in weights), dtype=torch.bool, device=weights[0].device)
    mask[best] = True
    return [part.view(weight.shape) for part, weight in zip(mask.split([w.numel() for w in weights]), weights)]


def elementwise_regrowth(weight: Tensor, mask: Tensor, scores: Tensor, values: Tensor, k: int) -> None:
    """Regrows the k best-scored pruned weights of one layer one index at a time, as the published scripts do; in place.

    weight, mask (1 active, 0 pruned), scores and values (what a weight returns with): tensors of one shape, in any
    memory format, so that positions are coordinates.
    """
    candidates = torch.where(mask == 0, scores, -torch.inf)
    for index in torch.topk(candidates.flatten(), k).indices.tolist():
        position = np.unravel_index(index, mask.shape)
        mask[position] = 1.0
        weight[position] = values[position]
