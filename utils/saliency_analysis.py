"""Which weights matter for which class: saliency of every prunable weight for every class, its statistics per layer
and class, and the weights that only few classes need.

Run as ``python -m utils.saliency_analysis --m_name resnet20`` from the repository; works on the dense checkpoint of
`main.py` or, with --checkpoint, on any dense or pruned one. Measures: see `utils.saliency_analysis`.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn import functional as F

from utils import checkpoint, plots, stage1
from utils.analysis_utils import clone_model, count_pruned_params, get_masks, prunable_layers, remove_masks
from utils.common import Progress, UserError, derive_seed
from utils.data_loader import BatchLoader, balanced_indices
from utils.run import (
    ArgumentParser,
    Run,
    add_model_option,
    add_run_options,
    count,
    open_run,
    positive_float,
    positive_int,
    prerequisite,
    script,
)

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


QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}
NOISY = 0.5  # relative error of single weights above which they are not counted in words
Row = dict[str, Any]

# --- statistics ----------------------------------------------------------------------------------------------------


class FewClassCounts(NamedTuple):
    """Weights of one layer above `threshold`: for each class, of these for few classes only; and for any class."""

    threshold: float
    important: np.ndarray  # int (classes,): weights above the threshold for the class
    few: np.ndarray  # int (classes,): of these, weights above it for at most `few_classes` classes
    important_any: int  # weights above it for at least one class
    few_any: int  # of these, for at most `few_classes` classes


def count_few_class(values: np.ndarray, percentile: float, few_classes: int) -> FewClassCounts:
    """Counts the weights that are important for at least one and at most `few_classes` classes.

    values: (classes, weights) of one layer. Important means above the percentile of all values of the layer, one
    threshold for all classes, so that a class whose saliency is small throughout has few important weights.
    """
    if not values.size:  # a layer without active weights
        none = np.zeros(len(values), dtype=int)
        return FewClassCounts(float("nan"), none, none, 0, 0)
    threshold = float(np.percentile(values, percentile))
    above = values > threshold
    classes = above.sum(axis=0)
    few = (classes >= 1) & (classes <= few_classes)
    return FewClassCounts(threshold, above.sum(axis=1), (above & few).sum(axis=1), int((classes >= 1).sum()),
                          int(few.sum()))


def same_scale(values: np.ndarray) -> np.ndarray:
    """Rows divided by their mean absolute value: which weights a class needs, whatever the size of its gradients."""
    scale = np.abs(values).sum(axis=1, keepdims=True) / max(1, values.shape[1])
    return np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)


def analyse(saliency: ClassSaliency, masks: Mapping[str, torch.Tensor], classes: Sequence[str], percentile: float,
            few_classes: int) -> tuple[list[Row], list[Row]]:
    """Statistics of one measure: a row per layer and class, and a row per layer.

    masks: layer -> bool, True where active; statistics are over the active weights, the pruned ones are counted apart.
    `share` is the layer's part of the class's total (of a signed measure it may lie outside of [0, 1]); `*_scaled`
    counts weights after `same_scale`.
    """
    by_class, by_layer = [], []
    for name, matrix in saliency.matrices.items():
        active = masks[name].flatten()
        values = matrix[:, active.to(matrix.device)].cpu().numpy()
        counts, scaled = (count_few_class(numbers, percentile, few_classes)
                          for numbers in (values, same_scale(values)))
        size = {"layer": name, "weights": values.shape[1], "pruned": active.numel() - values.shape[1]}
        by_layer.append({**size, "threshold": counts.threshold, "important": counts.important_any,
                         "few_class": counts.few_any, "important_scaled": scaled.important_any,
                         "few_class_scaled": scaled.few_any,
                         **{f"few_class_{label}": int(few) for label, few in zip(classes, counts.few)}})
        spread = _spread(values)
        for number, label in enumerate(classes):
            by_class.append({**size, "class": label, "images": saliency.images[number],
                             **{key: float(column[number]) for key, column in spread.items()},
                             "important": int(counts.important[number]), "few_class": int(counts.few[number]),
                             **_hutchinson(saliency, name, number)})
    return _with_shares(by_class), by_layer


def _spread(values: np.ndarray) -> dict[str, np.ndarray]:
    """Sum, mean, standard deviation, quantiles and largest value of every row; NaN where there are no weights."""
    if not values.shape[1]:
        values = np.full((len(values), 1), np.nan)
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=1)
    return {"share": np.nan_to_num(values.sum(axis=1, dtype=np.float64)), "mean": values.mean(axis=1, dtype=np.float64),
            "std": values.std(axis=1, dtype=np.float64), **dict(zip(QUANTILES, quantiles)), "max": values.max(axis=1)}


def _hutchinson(saliency: ClassSaliency, layer: str, number: int) -> Row:
    """The sample count and errors of a Hutchinson estimate, nothing for the other measures."""
    if saliency.probes is None:
        return {}
    return {"probes": saliency.probes[number], "noise": saliency.noise[layer][number],
            "mean_error": saliency.mean_error[layer][number]}


def _with_shares(rows: list[Row]) -> list[Row]:
    """Rows whose `share`, so far the layer's sum, is divided by the class's sum over all layers."""
    totals: dict[str, float] = {}
    for row in rows:
        totals[row["class"]] = totals.get(row["class"], 0.0) + row["share"]
    return [{**row, "share": row["share"] / totals[row["class"]] if totals[row["class"]] else 0.0} for row in rows]


def verdict(by_layer: Sequence[Row], classes: Sequence[str], percentile: float, few_classes: int) -> str:
    """What the few-class counts say, in words that follow the numbers.

    Whether classes need the same weights is judged on one scale for all (`same_scale`): the share of few-class weights
    lies between 0 (all agree) and what a binomial gives when each class draws its important weights at random.
    """
    important, few, important_scaled, few_scaled = (
        sum(row[key] for row in by_layer) for key in ("important", "few_class", "important_scaled", "few_class_scaled"))
    if not important or not important_scaled:
        return "no weight stands out for any class"
    from scipy.stats import binom  # takes a while, and no --help needs it

    chance = binom(len(classes), 1 - percentile / 100)
    independent = (chance.cdf(few_classes) - chance.pmf(0)) / chance.sf(0)
    share = few_scaled / important_scaled
    words = ("most important weights serve most classes", "classes share part of their important weights",
             "most important weights serve few classes")[min(2, int(3 * share / independent))]
    text = (f"{important:,} weights are important (above the {percentile:g}th percentile of their layer) for a class, "
            f"{few:,} of them ({few / important:.1%}) for at most {few_classes} of {len(classes)} classes. With every "
            f"class brought to the same mean saliency in a layer it is {share:.1%} (0 % if all classes agreed, "
            f"{independent:.1%} if each had drawn its own): {words}")
    if not few:
        return text
    per_class = {label: sum(row[f"few_class_{label}"] for row in by_layer) for label in classes}
    most, fewest = max(per_class, key=per_class.get), min(per_class, key=per_class.get)
    return (f"{text}. Most few-class weights serve '{most}' ({per_class[most]:,}), fewest '{fewest}' "
            f"({per_class[fewest]:,}): a score averaged over classes follows '{most}' rather than '{fewest}'")


def noise_warning(by_class: Sequence[Row]) -> str | None:
    """A sentence when a Hutchinson estimate is too noisy for single weights; None if it is not, or no estimate."""
    noise = [row["noise"] for row in by_class if np.isfinite(row.get("noise", np.nan))]
    if "noise" not in by_class[0] or (noise and np.median(noise) <= NOISY):
        return None
    size = f"{np.median(noise):.2f}" if noise else "unknown"
    vectors = min(row["probes"] for row in by_class)
    return (f"single weights are mostly noise (relative standard error {size} with {vectors} Rademacher vectors for a "
            "class; it falls with the square root of their number), so weights are not counted by class in words; "
            "read the layers' means with their errors, or raise --probes and --samples_per_class")


# --- the script ----------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = ArgumentParser(__doc__)
    parser.prog = "python -m utils.saliency_analysis"
    add_model_option(parser)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE",
                        help="dense or pruned model; default: {m_name}/checkpoint/ckpt.pth under --root")
    parser.add_argument("--measure", choices=list(MEASURES), nargs="+", default=list(MEASURES),
                        help="gradient: first order |g|; fisher: g^2 theta^2; hessian: H theta^2 / 2 by Hutchinson")
    parser.add_argument("--samples_per_class", type=count, default=100,
                        help="un-augmented training images of each class, drawn by --seed; 0 takes all")
    parser.add_argument("--chunk", type=positive_int,
                        help="images whose gradients are held at a time; default: as many as fit in 1 GB")
    parser.add_argument("--probes", type=positive_int, default=2,
                        help="Rademacher vectors for every 8 images of a class (hessian)")
    parser.add_argument("--threshold_percentile", type=positive_float, default=90.0,
                        help="a weight is important for a class above this percentile of its layer")
    parser.add_argument("--few_classes", type=positive_int,
                        help="how many classes are few; default: three in ten of them")
    parser.add_argument("--save_dir", type=Path, help="default: saliency_analysis/{m_name} under --root")
    add_run_options(parser)
    args = parser.parse_args(argv)
    if args.threshold_percentile >= 100:
        raise UserError(f"--threshold_percentile {args.threshold_percentile:g} leaves no weight above it; use a number "
                        "below 100")
    if args.precision == "bf16":
        raise UserError("--precision bf16: saliency is computed in fp32 only; leave the option out")
    args.precision = "fp32"
    args.measure = [measure for measure in MEASURES if measure in args.measure]
    return args


def default_few_classes(classes: int) -> int:
    """How many of the data set's classes are few: three in ten, at least one."""
    return max(1, round(0.3 * classes))


def load_model(run: Run, args: argparse.Namespace) -> stage1.Outcome:
    """The model of `--checkpoint`, or the dense one; UserError with the command that makes it when it is missing."""
    dense = checkpoint.dense_path(run.root, run.m_name)
    if args.checkpoint is None and not dense.is_file():
        raise UserError(f"no dense checkpoint at {dense}; name another with --checkpoint, or "
                        f"{prerequisite(args, dense, '--pruner', 'none')}")
    return stage1.load_outcome(run, args.checkpoint or dense)


def class_sample(loader: BatchLoader, per_class: int, seed: int) -> BatchLoader:
    """Un-augmented batches of at most `per_class` images of each class (0: all), sorted by class; shares no state."""
    targets = loader.targets.cpu().numpy()
    order = balanced_indices(loader.images, targets, len(targets), derive_seed(seed, "evidence"))
    return loader.subset(np.concatenate([order[targets[order] == label][:per_class or None]
                                         for label in range(targets.max() + 1)]))


def compute(run: Run, args: argparse.Namespace, model: nn.Module, sample: BatchLoader) -> Iterator[ClassSaliency]:
    """The measures asked for, one after the other; those of per-image gradients share one pass over the data."""
    classes = len(run.data.classes)
    by_image = [measure for measure in args.measure if measure in PER_IMAGE]
    found = gradient_saliency(model, sample, classes, by_image, chunk=args.chunk, show=True) if by_image else {}
    for measure in by_image:
        yield found.pop(measure)  # VGG16's matrices take 590 MB each: none is kept here
    if "hessian" in args.measure:
        yield hessian_saliency(model, sample, classes, probes=args.probes, seed=run.seed, show=True)


def report(run: Run, args: argparse.Namespace, saliency: ClassSaliency, masks: Mapping[str, torch.Tensor],
           folder: Path) -> Row:
    """Writes the CSV files and figures of one measure, prints its table; returns what the card says about it."""
    classes, measure = run.data.classes, saliency.measure
    by_class, by_layer = analyse(saliency, masks, classes, args.threshold_percentile, args.few_classes)
    checkpoint.save_csv(by_class, folder / f"{measure}_by_class.csv")
    checkpoint.save_csv(by_layer, folder / f"{measure}_few_classes.csv")
    label, title = MEASURES[measure], f"{run.m_name} on {run.data_label}: {measure} saliency"
    if saliency.probes is not None:
        title += f"\nestimated from {min(saliency.probes)} or more Rademacher vectors per class"
    plots.plot_distributions(by_class, folder / f"{measure}_distributions.png", title, label)
    plots.plot_layer_means(by_class, folder / f"{measure}_layers.png", title, label)
    plots.plot_heat_map(by_class, folder / f"{measure}_heatmap.png", title)
    words = noise_warning(by_class) or verdict(by_layer, classes, args.threshold_percentile, args.few_classes)
    print_table(measure, by_class, by_layer, args.few_classes)
    print(f"{measure}: {words}.")
    return {"verdict": words, "images": saliency.images, "probes": saliency.probes}


def print_table(measure: str, by_class: Sequence[Row], by_layer: Sequence[Row], few_classes: int) -> None:
    """One line per layer: weights, mean saliency, the class it matters most to, weights that few classes need."""
    estimated = "noise" in by_class[0]
    print(f"\n{MEASURES[measure]}\n{'layer':>30} {'active':>10} {'pruned':>10} {'mean':>10}  {'most for':<20} "
          f"{f'<= {few_classes} classes':>12}{'   mean error  noise' if estimated else ''}")
    for layer in by_layer:
        rows = [row for row in by_class if row["layer"] == layer["layer"]]
        top, mean = max(rows, key=lambda row: row["mean"]), np.mean([row["mean"] for row in rows])
        share = f"{layer['few_class'] / layer['important']:.1%}" if layer["important"] else "-"
        errors, error = "", 0.0
        if estimated:
            error = np.sqrt(np.sum([row["mean_error"] ** 2 for row in rows])) / len(rows)
            errors = f"  {error:11.2g} {np.mean([row['noise'] for row in rows]):6.2f}"
        times = f" ({top['mean'] / mean:.1f}x)" if mean > 2 * error else ""  # else the mean may as well be 0
        print(f"{layer['layer']:>30} {layer['weights']:10,} {layer['pruned']:10,} {mean:10.3g}  "
              f"{top['class'] + times:<20} {share:>12}{errors}")


def main(argv: Sequence[str] | None = None) -> None:
    """Computes the measures, analyses them, writes CSV files, figures and a card."""
    args = parse_args(argv)
    run = open_run(args)
    args.few_classes = args.few_classes or default_few_classes(len(run.data.classes))
    if args.few_classes >= len(run.data.classes):
        raise UserError(f"--few_classes {args.few_classes} is not few of {len(run.data.classes)} classes; "
                        "use a smaller number")
    outcome = load_model(run, args)
    folder = args.save_dir or run.root / "saliency_analysis" / run.m_name
    checkpoint.ensure_writable(folder, "--save_dir")
    sample, masks = class_sample(run.train, args.samples_per_class, run.seed), get_masks(outcome.model)
    sparsity = count_pruned_params(outcome.model).sparsity
    print(f"{outcome.artifact}: sparsity {sparsity:.5g}, {sample.num_images} training images of "
          f"{len(run.data.classes)} classes, {run.precision}")
    if len(sample.targets.unique()) < len(run.data.classes):
        print("warning: a class without training images has zero saliency throughout")
    found = {saliency.measure: report(run, args, saliency, masks, folder)
             for saliency in compute(run, args, outcome.model, sample)}
    options = {name: getattr(args, name) for name in ("samples_per_class", "threshold_percentile", "few_classes")}
    checkpoint.save_json(run.card(checkpoint=str(outcome.artifact), sparsity=sparsity, **run.identity(), **options,
                                  classes=list(run.data.classes), measures=found), folder / "saliency_analysis.json")
    print(f"\ntables, figures and card: {folder}")


if __name__ == "__main__":
    script(main, resumable=False)
