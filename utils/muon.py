"""Muon, an optimizer whose steps on convolutions' kernels are made orthogonal."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose step on a convolution's kernel is made orthogonal; SGD with Nesterov momentum for the rest.

    A kernel (out, in, h, w) is treated as a matrix (out, in * h * w); the singular values of its step are near
    `KERNEL_RATE` * lr. Kernels have no weight decay; each step rescales them to their initial norm (unless that is 0),
    and steps shrink by the same factor. Batch normalisation makes this equivalent to no rescaling, but for magnitude
    pruning kernels two to four times as large would leave nothing of a classifier at 0.99.
    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. PyTorch's own (2.9) takes matrices
    only and is not in the oldest version that we support.
    """

    KERNEL_RATE, KERNEL_MOMENTUM, MOMENTUM = 0.5, 0.95, 0.9

    def __init__(self, params: Any, lr: float, weight_decay: float):
        """params: as of every optimizer of PyTorch."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; parameters without a gradient stay."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._move(param, group["lr"], group["weight_decay"])

    def _move(self, param: Tensor, lr: float, weight_decay: float) -> None:
        kernel = param.dim() == 4
        momentum = self.KERNEL_MOMENTUM if kernel else self.MOMENTUM
        grad = param.grad if kernel else param.grad.add(param, alpha=weight_decay)
        state = self.state[param]
        if "growth" not in state:
            state.update(momentum_buffer=torch.zeros_like(param), norm=param.norm(), growth=param.new_ones(()))
        direction = grad.add(state["momentum_buffer"].mul_(momentum).add_(grad), alpha=momentum)
        if not kernel:
            param.add_(direction, alpha=-lr)
            return
        step = orthogonalised(direction.flatten(1)).view_as(param).div_(state["growth"])
        param.add_(step, alpha=-self.KERNEL_RATE * lr)
        growth = torch.where(state["norm"] > 0, param.norm() / state["norm"], 1.0)
        param.div_(growth)
        state["growth"].mul_(growth)


def orthogonalised(matrix: Tensor, steps: int = 3) -> Tensor:
    """`matrix` (rows, columns) with its singular values brought near 1, by Newton-Schulz iterations of degree 5.

    The coefficients (Jordan et al., 2024) take values in (0, 1] into about [0.7, 1.2] within five iterations; three are
    enough for training. An iteration multiplies the matrix x by a polynomial of the square matrix x x.T; all of these
    commute, so they are gathered on the short side and only two products have the long one.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    gram, one = x @ x.T, torch.eye(len(x), dtype=x.dtype, device=x.device)
    factor = one
    for _ in range(steps):
        step = 3.4445 * one - 4.7750 * gram + 2.0315 * gram @ gram
        factor, gram = step @ factor, step @ gram @ step
    x = factor @ x
    return x.T if tall else x
