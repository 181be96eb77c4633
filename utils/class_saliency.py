"""Saliency of every weight for every class: what would this class lose without this weight?

After FairPrune (Wu et al., MICCAI 2022, arXiv 2203.02110). For the images i of one class, with the cross-entropy loss
l_i of one image, its gradient g_i = dl_i/dtheta and a weight theta:

- gradient: mean_i |g_i|. The absolute value stands inside the mean: the mean of g_i itself vanishes where a model has
  been trained to, whatever its weights are worth.
- fisher: mean_i g_i^2 * theta^2. The squared gradient of each image in place of the Hessian's diagonal.
- hessian: 1/2 H theta^2, H the diagonal of the Hessian of mean_i l_i: the change of the loss when the weight is set to
  zero, to second order (LeCun et al., "Optimal brain damage", 1990). Signed; H is estimated by Hutchinson's method.

The model is in evaluation mode, so that no image influences another one's gradient. A pruned weight has theta = 0, and
so no saliency of second order; of first order it has that of a weight about to return.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn import functional as F

from utils.analysis_utils import clone_model, prunable_layers, remove_masks
from utils.progress import Progress
from utils.seeding import derive_seed

MEASURES = {  # name -> axis label; losses are in nats
    "gradient": "mean |g| (nats per unit of weight)",
    "fisher": "mean g²θ² (nats²)",
    "hessian": "½Hθ² (nats)",
}
PER_IMAGE: dict[str, Callable[[Tensor], Tensor]] = {"gradient": torch.abs, "fisher": torch.square}
CHUNK_MEMORY = 1 << 30  # bytes that the per-image gradients of a chunk may take; VGG16 then stays under 4 GB in all
LARGEST_CHUNK = 64  # images; larger chunks are not faster
PROBE_GROUP = 8  # images of a class that share a Rademacher vector; smaller groups: more vectors for a class
Loader = Iterable[tuple[Tensor, Tensor]]
Weights = dict[str, Tensor]


@dataclass
class ClassSaliency:
    """One measure for all classes.

    matrices: layer -> float32 (classes, weights of the layer), weights in row-major order; images: images seen per
    class. Of `hessian` alone: probes: Rademacher vectors per class; noise: layer -> per class, the RMS standard error
    of the weights' estimates over their RMS value (near 1: mostly noise); mean_error: layer -> per class, the standard
    error of the mean over the layer's weights. Both errors come from the spread over the vectors and their images.
    """

    measure: str
    matrices: Weights
    images: list[int]
    probes: list[int] | None = None
    noise: dict[str, list[float]] = field(default_factory=dict)
    mean_error: dict[str, list[float]] = field(default_factory=dict)


class WeightFunction:
    """A model in evaluation mode as a function of its prunable weights; masks are folded in, the model is not touched.

    weights: layer name -> effective weight; `losses` takes such a dict. All in float32: under `vmap`, batch
    normalisation refuses bfloat16 inputs, and squares of small gradients need the digits.
    """

    def __init__(self, model: nn.Module):
        """model: dense or pruned; a copy of it is used."""
        self.model = clone_model(model)
        remove_masks(self.model)
        self.model.eval().requires_grad_(False)
        self.weights: Weights = {name: layer.weight.detach() for name, layer in prunable_layers(self.model).items()}
        self.device = next(self.model.parameters()).device

    def losses(self, weights: Weights, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of every image (B,), in nats."""
        replaced = {f"{name}.weight".lstrip("."): weight for name, weight in weights.items()}
        return F.cross_entropy(functional_call(self.model, replaced, (inputs,)), targets, reduction="none")

    def per_image_gradients(self, inputs: Tensor, targets: Tensor) -> Weights:
        """Gradients of each image's own loss, layer -> (B, *weight shape)."""
        def loss_of_one(weights: Weights, image: Tensor, target: Tensor) -> Tensor:
            return self.losses(weights, image[None], target[None])[0]
        return vmap(grad(loss_of_one), in_dims=(None, 0, 0))(self.weights, inputs, targets)

    def zeros(self, num_classes: int) -> Weights:
        """layer -> (num_classes, weights) of zeros."""
        return {name: weight.new_zeros(num_classes, weight.numel()) for name, weight in self.weights.items()}

    def chunk_size(self, image: Tensor, memory: int = CHUNK_MEMORY) -> int:
        """Images whose gradients fit in `memory` bytes together, at least 1; image: one input (1, C, H, W).

        By measurement an image takes about twice its gradient and eight times its activations.
        """
        weights = sum(weight.numel() for weight in self.weights.values())
        return max(1, min(LARGEST_CHUNK, memory // (4 * (2 * weights + 8 * self._activations(image)))))

    @torch.no_grad()
    def _activations(self, image: Tensor) -> int:
        """Numbers that the modules without children give out for one image."""
        sizes: list[int] = []
        leaves = [module for module in self.model.modules() if not any(module.children())]
        handles = [leaf.register_forward_hook(lambda _, __, output: sizes.append(output.numel())) for leaf in leaves]
        try:
            self.model(image)
        finally:
            for handle in handles:
                handle.remove()
        return sum(sizes)


def compute_parameter_saliency_per_class(model: nn.Module, loader: Loader, num_classes: int,
                                         use_second_order: bool = False, **options) -> ClassSaliency:
    """The published interface: `gradient`, or with `use_second_order` `fisher`; options as of `gradient_saliency`."""
    measure = "fisher" if use_second_order else "gradient"
    return gradient_saliency(model, loader, num_classes, [measure], **options)[measure]


def gradient_saliency(model: nn.Module, loader: Loader, num_classes: int,
                      measures: Sequence[str] = tuple(PER_IMAGE), *, chunk: int | None = None,
                      show: bool = False) -> dict[str, ClassSaliency]:
    """First-order and Fisher saliency of all classes from per-image gradients, in one pass over the data.

    loader: un-augmented batches (inputs (B, C, H, W), targets (B,)); measures: names of `PER_IMAGE`; chunk: images
    whose gradients are held at a time, by default what `CHUNK_MEMORY` allows (the results do not depend on it); show:
    a progress bar. The row of a class without images is zero. Raises ValueError for an empty loader.
    """
    network = WeightFunction(model)
    sums = {measure: network.zeros(num_classes) for measure in measures}
    images = torch.zeros(num_classes, dtype=torch.int64, device=network.device)
    with _progress(loader, "gradients", show) as progress:
        for inputs, targets in loader:
            chunk = chunk or network.chunk_size(inputs[:1])
            for part, labels in zip(inputs.split(chunk), targets.split(chunk), strict=True):
                gradients = network.per_image_gradients(part, labels)
                _add_rows(sums, gradients, labels)
                images += labels.bincount(minlength=num_classes)
                progress.advance(len(labels))
    for measure, matrices in sums.items():
        _average(matrices, images, network.weights if measure == "fisher" else {})
    return {measure: ClassSaliency(measure, matrices, images.tolist()) for measure, matrices in sums.items()}


def _add_rows(sums: Mapping[str, Weights], gradients: Weights, labels: Tensor) -> None:
    """Adds what each image contributes to the row of its class; lets go of the gradients layer by layer."""
    for name in list(gradients):
        rows = gradients.pop(name).flatten(1)
        for measure, matrices in sums.items():
            matrices[name].index_add_(0, labels, PER_IMAGE[measure](rows))


def _average(matrices: Weights, images: Tensor, weights: Weights) -> None:
    """Sums to means over the images of a class, in place; layers in `weights` are also multiplied by theta^2."""
    if not images.any():
        raise ValueError("the loader gave no image")
    for name, matrix in matrices.items():
        matrix /= images.clamp_min(1)[:, None]
        if name in weights:
            matrix *= weights[name].square().flatten()


def _progress(loader: Loader, label: str, show: bool) -> Progress:
    return Progress(f"images, {label}", getattr(loader, "num_images", None), show=show)


# --- the Hessian's diagonal ----------------------------------------------------------------------------------------


def diagonal_probes(loss: Callable[[Weights], Tensor], weights: Weights, probes: int,
                    generator: torch.Generator) -> Iterator[Weights]:
    """`probes` times z * (H z), H the Hessian of the scalar `loss` at `weights`, z a fresh vector of random signs.

    Each is an unbiased estimate of H's diagonal, exact where H is diagonal (Hutchinson 1990; Bekas et al., "An
    estimator for the diagonal of a matrix", 2007). Same shapes as the weights; the generator is on their device.
    """
    _, pull_back = vjp(grad(loss), weights)
    for _ in range(probes):
        signs = {name: _random_signs(weight, generator) for name, weight in weights.items()}
        (products,) = pull_back(signs)
        yield {name: signs[name] * products[name] for name in weights}


def _random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """-1 and 1 with equal probability, in the tensor's shape and on its device."""
    return torch.empty(like.shape, device=like.device).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def hessian_saliency(model: nn.Module, loader: Loader, num_classes: int, *, probes: int = 1, seed: int = 0,
                     group: int = PROBE_GROUP, show: bool = False) -> ClassSaliency:
    """1/2 H theta^2 of all classes in one pass over the data; H by Hutchinson's method.

    Every `group` images of a class get `probes` Rademacher vectors of their own, so that a class of n images averages
    over about probes * n / group of them. loader: as of `gradient_saliency`; batches sorted by class give full groups.
    The row of a class without images is zero. Raises ValueError for an empty loader.
    """
    network = WeightFunction(model)
    sums = _ProbeSums(network, num_classes)
    signs = torch.Generator(network.device).manual_seed(derive_seed(seed, "hutchinson"))
    with _progress(loader, "hessian", show) as progress:
        for label, part, targets in _class_groups(loader, group):
            def loss(weights: Weights, part: Tensor = part, targets: Tensor = targets) -> Tensor:
                return network.losses(weights, part, targets).sum()
            for diagonal in diagonal_probes(loss, network.weights, probes, signs):
                sums.add(label, diagonal, 1.0 / probes)
            sums.images[label] += len(part)
            progress.advance(len(part))
    return sums.result()


def _class_groups(loader: Loader, group: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(class, up to `group` images of it, their targets) for every class of every batch."""
    for inputs, targets in loader:
        for label in targets.unique().tolist():
            same = targets == label
            for part, labels in zip(inputs[same].split(group), targets[same].split(group), strict=True):
                yield label, part, labels


class _ProbeSums:
    """Running sums over the vectors of each class, and of their squares, from which the errors follow."""

    def __init__(self, network: WeightFunction, num_classes: int):
        self.halves = {name: 0.5 * weight.square() for name, weight in network.weights.items()}
        self.matrices = network.zeros(num_classes)
        self.images, self.vectors = torch.zeros(2, num_classes, dtype=torch.int64, device=network.device)
        # per class: sum over the vectors of |e|^2, and of (sum of e)^2, for the estimates e of a layer
        self.squares = {name: torch.zeros(2, num_classes, device=network.device) for name in self.halves}

    def add(self, label: int, diagonal: Weights, share: float) -> None:
        """Adds a vector's estimate of the Hessian's diagonal, as 1/2 H theta^2, multiplied by `share`."""
        self.vectors[label] += 1
        for name, half in self.halves.items():
            estimate = (diagonal[name] * half).mul_(share).flatten()
            self.matrices[name][label] += estimate
            self.squares[name][:, label] += torch.stack([estimate.square().sum(), estimate.sum().square()])

    def result(self) -> ClassSaliency:
        """Means over the images of each class, with their errors."""
        noise, mean_error = {}, {}
        for name, matrix in self.matrices.items():
            norms = torch.stack([matrix.square().sum(1), matrix.sum(1).square()])
            errors = self._errors(self.squares[name], norms)
            noise[name] = (errors[0] / norms[0].sqrt().clamp_min(torch.finfo(matrix.dtype).tiny)).tolist()
            active = (self.halves[name] > 0).sum().clamp_min(1)
            mean_error[name] = (errors[1] / self.images.clamp_min(1) / active).tolist()
        _average(self.matrices, self.images, {})
        return ClassSaliency("hessian", self.matrices, self.images.tolist(), self.vectors.tolist(), noise, mean_error)

    def _errors(self, squares: Tensor, norms: Tensor) -> Tensor:
        """Standard errors of sums over the vectors, NaN where there are fewer than two.

        The variance of a sum of k independent estimates is k times their sample variance.
        """
        k = self.vectors
        variance = (squares - norms / k) * k / (k - 1)
        return torch.where(k > 1, variance.clamp_min(0).sqrt(), torch.nan)
