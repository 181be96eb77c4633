"""Pruning rules. Each takes three steps: score the weights, allocate counts to the layers, mask by exact k.

A rule is a function (layers, keep, seed) -> one bool mask a layer, with `keep` True in all and only where the layer is
alive; `exact_k_masks` sees to that, equal scores by position. To add one, write it here and give it a line in
`PRUNERS`, from which the scripts take their choices. For instance, keep the largest signed weights:

    def positive(layers: Layers, keep: int, seed: int) -> list[Tensor]:
        "Negative weights go first."
        return exact_k_masks(layers.weights, keep, layers.alive)

    PRUNERS["positive"] = positive

A rule that looks at data says at what, `@needs("gradient")`, any of `GRADIENT_KINDS`, and reads
`layers.evidence.tensor("gradient", name)`; `snip` is an example. `make_pruner(rule)` prunes by a rule without a line.
"""
from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from utils.allocation import apportion
from utils.analysis_utils import (
    GRADIENT_KINDS,
    Evidence,
    count_pruned_params,
    empty_layers,
    get_masks,
    prunable_layers,
    set_masks,
    stored_weight,
    surviving_by_layer,
)
from utils.common import UserError, needed, needs, numbers
from utils.selection import exact_k_mask, exact_k_masks


class Layers:
    """What a rule sees of the prunable layers, in order: one list entry per layer."""

    def __init__(self, model: nn.Module, evidence: Evidence):
        """Raises UserError if a weight is not finite."""
        found, self.model = prunable_layers(model), model  # to look at, for rules that follow signals through it
        self.names, self.evidence = list(found), evidence  # the weights below are the model's own, with signs
        self.is_conv = [isinstance(layer, nn.Conv2d) for layer in found.values()]
        self.weights = [getattr(layer, "weight_orig", layer.weight) for layer in found.values()]
        self.magnitudes = [weight.detach().abs() for weight in self.weights]
        self.alive = list(get_masks(model).values())  # bool, True where not pruned yet
        self.totals = [mask.numel() for mask in self.alive]
        self.survivors: list[int] = numbers(mask.count_nonzero() for mask in self.alive)
        for name, largest in zip(self.names, numbers(values.max() for values in self.magnitudes), strict=True):
            if not math.isfinite(largest):
                raise UserError(f"layer {name} has weights that are not finite: its training diverged")


Rule = Callable[[Layers, int, int], list[Tensor]]
Pruner = Callable[..., None]


def weight_pruner_loader(name: str) -> Pruner:
    """The pruner of that name: a function `pruner(model, amount, seed=0, evidence=None)`.

    It removes the fraction `amount` of the surviving weights in place, so that exactly
    `round((1 - amount) * surviving)` stay; masks are put on where absent, pruned weights never return, and `seed`
    matters to random rules only. A layer left without weights is named in a UserWarning. It raises UserError, with
    the model unchanged, if `amount` is not in (0, 1), a weight is not finite, the rule cannot prune so far or leaves
    another number of weights, or `evidence` lacks what it needs; listing the known ones, for an unknown name.
    """
    if name not in PRUNERS:
        raise UserError(f"unknown pruner {name!r}; known are {', '.join(PRUNERS)}")
    return make_pruner(PRUNERS[name])


def make_pruner(rule: Rule) -> Pruner:
    """The pruner of a rule, in `PRUNERS` or not; `weight_pruner_loader` says what it does."""
    def pruner(model: nn.Module, amount: float, seed: int = 0, evidence: Evidence | None = None) -> None:
        if not 0 < amount < 1:
            raise UserError(f"prune amount {amount} is not a fraction between 0 and 1 (both excluded)")
        keep = round((1 - amount) * count_pruned_params(model).surviving)
        _prune(model, rule, keep, seed, evidence)
        if empty := empty_layers(model):
            warnings.warn(f"no weight is left in layer {', '.join(empty)}: nothing passes through it", stacklevel=2)

    return pruner


def prune_to(model: nn.Module, keep: int, pruner: str, seed: int = 0, evidence: Evidence | None = None) -> None:
    """Prunes by the rule of `PRUNERS` until exactly `keep` weights survive; nothing where that many or fewer do.

    What leaves a layer empty is not warned of. Raises UserError as `weight_pruner_loader` says.
    """
    if keep < count_pruned_params(model).surviving:
        _prune(model, PRUNERS[pruner], keep, seed, evidence)


def check_reach(model: nn.Module, counts: Iterable[int], pruner: str) -> None:
    """UserError if the rule cannot leave any of these `counts` of weights; tried on `model`, which changes, with dummy
    evidence."""
    equal = {name: torch.ones_like(layer.weight) for name, layer in prunable_layers(model).items()}
    for keep in sorted(counts, reverse=True):
        prune_to(model, keep, pruner, evidence=Evidence(**dict.fromkeys(GRADIENT_KINDS, equal)))


def _prune(model: nn.Module, rule: Rule, keep: int, seed: int, evidence: Evidence | None) -> None:
    evidence = evidence or Evidence()
    for kind in needed(rule):
        if evidence.make(kind) is None:
            raise UserError(f"this pruning rule looks at {kind}: give evidence=Evidence({kind}=...), by layer name"
                            f" (the scripts have {', '.join(GRADIENT_KINDS)})")
    layers = Layers(model, evidence)
    with torch.no_grad():  # rules may compute with the parameters themselves
        masks = dict(zip(layers.names, rule(layers, keep, seed), strict=True))
    alive = dict(zip(layers.names, layers.alive, strict=True))
    counts = numbers(each.count_nonzero() for name, mask in masks.items()
                     for each in (mask, mask.bool() & ~alive[name]))
    kept, revived = sum(counts[::2]), sum(counts[1::2])
    if kept != keep or revived:
        raise UserError(f"this pruning rule is wrong: it keeps {kept:,} weights, {revived:,} of them pruned before, "
                        f"where {keep:,} of those that are left are to stay; `exact_k_masks` sees to that")
    set_masks(model, masks)


def weights_left(total: int, surviving: int, sparsity: float, asked: str) -> int:
    """round((1 - sparsity) * total); UserError, in which `asked` names the wish, unless 0 < that < surviving."""
    keep = round((1.0 - sparsity) * total)
    if keep < 1:
        scale = 10 ** (len(str(total)) + 1)
        highest = math.floor((1 - 1 / total) * scale) / scale
        raise UserError(f"{asked} would leave 0 of {total:,} weights; {highest:.12g} leaves one")
    if keep >= surviving:
        raise UserError(f"{asked} would prune none of the {surviving:,} weights that are left; each pruning must raise "
                        f"the sparsity by {1 / total:.2g}, one of {total:,} weights, or more")
    return keep


def lacking_weights(model: nn.Module, reference: nn.Module, keep: int) -> dict[str, int]:
    """Layer -> how many more weights than the model has one-shot global magnitude pruning of a reference of the same
    architecture to `keep` weights (or all it has, if fewer) would leave there; 0 where it would not leave more."""
    layers, known = prunable_layers(reference), get_masks(reference)
    magnitudes = [stored_weight(layer).abs() for layer in layers.values()]
    masks = exact_k_masks(magnitudes, min(keep, count_pruned_params(reference).surviving), list(known.values()))
    alive = surviving_by_layer(model)
    return {name: max(0, count - alive[name])
            for name, count in zip(layers, numbers(mask.count_nonzero() for mask in masks), strict=True)}


def _mask_layers(layers: Layers, scores: list[Tensor], counts: list[int]) -> list[Tensor]:
    """The mask step of the layerwise rules: keep `counts[i]` weights of layer i, highest score first."""
    return [exact_k_mask(s, k, alive) for s, k, alive in zip(scores, counts, layers.alive, strict=True)]


def magnitude(layers: Layers, keep: int, seed: int) -> list[Tensor]:
    """Global magnitude pruning (Han et al., NeurIPS 2015): the largest |w| of the whole network stay."""
    return exact_k_masks(layers.magnitudes, keep, layers.alive)


def random(layers: Layers, keep: int, seed: int) -> list[Tensor]:
    """A control: uniformly random scores over the whole network.

    A weight's score depends on the seed and its position only, so with one seed the masks of all amounts are nested,
    however many iterations they took.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(w.shape, generator=generator).to(w.device) for w in layers.magnitudes]
    return exact_k_masks(scores, keep, layers.alive)


def lamp(layers: Layers, keep: int, seed: int) -> list[Tensor]:
    """Layer-adaptive magnitude pruning (Lee et al., ICLR 2021): the highest LAMP scores of the network stay.

    score(u) = w_u^2 / sum of w_v^2 over the surviving v of the layer with |w_v| >= |w_u|. Within a layer that is the
    order of |w|, so only each layer's count has to be found; and no layer can have more than `keep` of the winners,
    so only its `keep` largest weights need a score.
    """
    parts = zip(layers.magnitudes, layers.survivors, layers.alive, strict=True)
    largest = [_largest(w, min(keep, count), alive) for w, count, alive in parts]
    winners = exact_k_masks([_lamp_scores(values) for values in largest], keep)
    return _mask_layers(layers, layers.magnitudes, numbers(won.count_nonzero() for won in winners))


def _largest(magnitudes: Tensor, k: int, alive: Tensor) -> Tensor:
    """The k largest surviving magnitudes and all that equal the smallest of these, (n,), in decreasing order."""
    top = magnitudes[exact_k_mask(magnitudes, k, alive)]
    if not k:
        return top
    if top.device.type == "cpu":  # NumPy sorts several times as fast as PyTorch there
        top = torch.from_numpy(-np.sort(-top.to(torch.promote_types(top.dtype, torch.float32)).numpy()))
    else:
        top = top.sort(descending=True).values
    ties = (alive & (magnitudes == top[-1])).count_nonzero() - (top == top[-1]).count_nonzero()
    return torch.cat([top, top[-1:].expand(int(ties))])


def _lamp_scores(decreasing: Tensor) -> Tensor:
    """LAMP scores (float64) of a layer's magnitudes, given in decreasing order; a zero weight scores 0."""
    squares = decreasing.double() ** 2
    _, lengths = decreasing.unique_consecutive(return_counts=True)
    sums = squares.cumsum(0)[lengths.cumsum(0) - 1].repeat_interleave(lengths)  # equal magnitudes share one denominator
    return torch.where(squares > 0, squares / sums, 0.0)


def unif(layers: Layers, keep: int, seed: int) -> list[Tensor]:
    """Uniform: the same fraction of every layer's survivors stays, by |w|; counts by largest remainder."""
    return _mask_layers(layers, layers.magnitudes, apportion(layers.survivors, keep, layers.survivors))


def unifplus(layers: Layers, keep: int, seed: int) -> list[Tensor]:
    """Unif+ (Gale et al., 2019; Lee et al., ICLR 2021): first convolution dense, last layer at least 20 % dense.

    The rest is uniform, by |w|. Raises UserError if `keep` is less than these two layers must have.
    """
    first, last = layers.is_conv.index(True) if any(layers.is_conv) else 0, len(layers.names) - 1
    least = [0] * len(layers.names)
    least[last] = min(-(-layers.totals[last] // 5), layers.survivors[last])  # 20 %, rounded up
    least[first] = layers.survivors[first]
    if keep < sum(least):
        total = sum(layers.totals)
        raise UserError(f"unifplus keeps {layers.names[first]} dense and 20 % of {layers.names[last]}, so it reaches a "
                        f"sparsity of at most {math.floor((1 - sum(least) / total) * 1e4) / 1e4:.4f} here, not "
                        f"{1 - keep / total:.4f}")
    return _mask_layers(layers, layers.magnitudes, _uniform_above(least, layers.survivors, keep))


def _uniform_above(least: list[int], survivors: list[int], keep: int) -> list[int]:
    """Counts of one surviving fraction for all layers, except that those it would leave below `least` get that."""
    raised: set[int] = set()
    while True:
        room = [0 if i in raised else n for i, n in enumerate(survivors)]
        counts = apportion(room, keep - sum(least[i] for i in raised), room)
        counts = [least[i] if i in raised else count for i, count in enumerate(counts)]
        low = [i for i, count in enumerate(counts) if count < least[i]]
        if not low:
            return counts
        raised.update(low)


def erk(layers: Layers, keep: int, seed: int) -> list[Tensor]:
    """Erdos-Renyi kernel (Mocanu et al., 2018; Evci et al., ICML 2020), then by |w| within the layer.

    Layer density is proportional to (sum of the weight's dimensions) / (product of them), so the count to the sum;
    layers that would exceed their survivors keep them all, and the rest is rescaled.
    """
    counts = apportion([sum(w.shape) for w in layers.magnitudes], keep, layers.survivors)
    return _mask_layers(layers, layers.magnitudes, counts)


@needs("gradient")
def snip(layers: Layers, keep: int, seed: int) -> list[Tensor]:
    """SNIP (Lee, Ajanthan and Torr, ICLR 2019): the largest |g w| of the network stay, g the gradient of the loss.

    g is averaged over the class-balanced sample of the training images, in evaluation mode. The paper divides by the
    sum over the network, which changes no order, and prunes before training; here the model is pruned as it comes.
    """
    gradients = [layers.evidence.tensor("gradient", name) for name in layers.names]
    scores = [(weight.detach() * gradient).abs() for weight, gradient in zip(layers.weights, gradients, strict=True)]
    return exact_k_masks(scores, keep, layers.alive)


PRUNERS: dict[str, Rule] = {
    "magnitude": magnitude,
    "glob": magnitude,
    "lamp": lamp,
    "unif": unif,
    "unifplus": unifplus,
    "erk": erk,
    "random": random,
    "snip": snip,
}
