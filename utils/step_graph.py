"""Forward and backward pass of a training step as one CUDA graph.

A step of a small network on a GPU is some hundred kernels of a few microseconds each, and Python cannot start them as
fast as they run. Recorded once, they are started as one.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils.analysis_utils import prunable_layers, refresh_weight
from utils.common import note

WARM_UP = 3  # steps before the recording, in which cuDNN and cuBLAS choose algorithms and take their memory
Passes = Callable[[Tensor, Tensor], Tensor]


class StepGraph:
    """Calls `passes` for a batch, or repeats on a GPU what they did, on the batch's own images.

    passes: (inputs, targets) -> result, computes the gradients of a model and leaves them in `.grad`. What they read
    and write must stay in its place: weights, masks and statistics may change between two batches, but not be replaced.
    Nothing that Python does in them, hooks of modules included, is repeated; draws from CUDA's generator are made anew.
    """

    def __init__(self, model: nn.Module, passes: Passes):
        """passes: called as they are on a CPU, in the first steps, and for batches of another size."""
        self.model, self.passes = model, passes
        self.possible = next(model.parameters()).is_cuda
        self._forget()

    def _forget(self) -> None:
        self._graph, self._shape, self._warm, self._places = None, None, 0, []

    def __call__(self, inputs: Tensor, targets: Tensor, watched: bool = False) -> Tensor:
        """The result for a batch; it holds until the next call. watched: Python is to run, for hooks of modules."""
        if not self.possible or watched or self._shape not in (None, inputs.shape):
            return self.passes(inputs, targets)
        if self._graph is None:
            self._shape, self._warm = inputs.shape, self._warm + 1
            if self._warm <= WARM_UP or not self._record(inputs, targets):
                return self.passes(inputs, targets)
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        self._graph.replay()
        for param, grad in self._grads:  # after a batch of another size these are others
            param.grad = grad
        return self._result

    def check(self) -> None:
        """After a change of masks: records anew if a tensor of the model has been replaced."""
        if self._graph is not None and self._places != self._tensors():
            self._forget()

    def _tensors(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.model.state_dict().values()]

    def _record(self, inputs: Tensor, targets: Tensor) -> bool:
        """Whether the passes could be recorded; they do not run meanwhile."""
        for layer in prunable_layers(self.model).values():
            if hasattr(layer, "weight_mask"):
                refresh_weight(layer)  # its history holds on to the stream of earlier steps
        self._inputs, self._targets, graph = inputs.clone(), targets.clone(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._result = self.passes(self._inputs, self._targets)
        except RuntimeError as error:
            note(f"training steps are not recorded as a CUDA graph, and are slower without: {error}")
            self.possible = False
            return False
        self._grads = [(param, param.grad) for param in self.model.parameters() if param.grad is not None]
        self._graph, self._places = graph, self._tensors()
        return True
