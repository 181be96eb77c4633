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

WARM_UP = 3  # steps before a recording, in which cuDNN and cuBLAS choose algorithms and take their memory
Passes = Callable[[Tensor, Tensor, bool], Tensor]


class StepGraph:
    """Calls `passes` on a batch or, on a GPU, replays their recorded kernels on it.

    passes: (inputs, targets, watched) -> result, computes the gradients of a model and leaves them in `.grad`: if
    watched also those of the masked `weight` of its prunable layers. Tensors that they use must keep their addresses:
    weights, masks and statistics may be changed in place between batches, but not replaced. Python code in them, module
    hooks included, is not replayed; CUDA random draws are fresh.
    """

    def __init__(self, model: nn.Module, passes: Passes):
        """passes: called as they are on a CPU, in the first steps, and for batches of another size."""
        self.model, self.passes = model, passes
        self.possible, self._shape = next(model.parameters()).is_cuda, None
        self.forget()

    def forget(self) -> None:
        """Drops what is recorded, and with it the memory that recordings keep to themselves."""
        self.recordings: dict[bool, Recording] = {}  # by whether they are watched
        self._warm, self._places = 0, []

    def __call__(self, inputs: Tensor, targets: Tensor, watched: bool = False) -> Tensor:
        """The result for a batch; it holds until the next call."""
        if not self.possible or self._shape not in (None, inputs.shape):
            return self.passes(inputs, targets, watched)
        self._shape, self._warm = inputs.shape, self._warm + 1
        if self._warm <= WARM_UP or not self._recorded(inputs, targets, watched):
            return self.passes(inputs, targets, watched)
        return self.recordings[watched].replay(inputs, targets)

    def check(self) -> None:
        """After a change of masks: records anew if a tensor of the model has been replaced."""
        if self.recordings and self._places != self._tensors():
            self.forget()

    def _tensors(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.model.state_dict().values()]

    def _recorded(self, inputs: Tensor, targets: Tensor, watched: bool) -> bool:
        """Whether there is a recording; it is made if it can be."""
        if watched not in self.recordings:
            try:
                self.recordings[watched] = Recording(self.model, self.passes, inputs, targets, watched)
            except RuntimeError as error:
                note(f"training steps are not recorded as a CUDA graph, and are slower without: {error}")
                self.possible = False
            self._places = self._tensors()
        return self.possible


class Recording:
    """The passes of one batch as a CUDA graph, and the tensors that it reads and writes."""

    def __init__(self, model: nn.Module, passes: Passes, inputs: Tensor, targets: Tensor, watched: bool):
        """As of `StepGraph`; nothing is computed yet. RuntimeError where passes do what no graph can."""
        self.inputs, self.targets, self.graph = inputs.clone(), targets.clone(), torch.cuda.CUDAGraph()
        self._forget_history(model)
        with torch.cuda.graph(self.graph):
            self.result = passes(self.inputs, self.targets, watched)
        self.grads = [(param, param.grad) for param in model.parameters() if param.grad is not None]
        self.watched = {layer: layer.weight.grad for layer in prunable_layers(model).values()
                        if not layer.weight.is_leaf and layer.weight.retains_grad} if watched else {}
        self._forget_history(model)

    def _forget_history(self, model: nn.Module) -> None:
        """Masked weights hold on to the stream in which they were computed."""
        for layer in prunable_layers(model).values():
            if hasattr(layer, "weight_mask"):
                refresh_weight(layer)

    def replay(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The result for this batch; its gradients are in their places."""
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        self.graph.replay()
        for param, grad in self.grads:  # after a batch of another size these are others
            param.grad = grad
        for layer, grad in self.watched.items():
            layer.weight.grad = grad
        return self.result
