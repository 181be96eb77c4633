"""Which weights matter for which class: saliency of every prunable weight for every class, its statistics per layer
and class, and the weights that only few classes need.

Run as ``python -m utils.saliency_analysis --m_name resnet20`` from the repository; works on the dense checkpoint of
`main.py` or, with --checkpoint, on any dense or pruned one. Measures: first order, mean |g|, and Fisher, mean g²θ²,
from the gradient g of each image's own loss.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from utils import checkpoint, plots, stage1
from utils.analysis_utils import clone_model, count_pruned_params, get_masks, prunable_layers, remove_masks
from utils.common import Progress, UserError, derive_seed, move_all
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
from utils.stage import hold_folder

MEASURES = {  # name -> axis label; losses are in nats
    "gradient": "mean |g| (nats per unit of weight)",
    "fisher": "mean g²θ² (nats²)",
}
PER_IMAGE: dict[str, Callable[[Tensor], Tensor]] = {"gradient": torch.abs, "fisher": torch.square}
CHUNK_MEMORY = 1 << 30  # bytes that the per-image gradients of a chunk may take; VGG16 then stays under 4 GB in all
LARGEST_CHUNK = 64  # images; larger chunks are not faster
QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}
Loader = Iterable[tuple[Tensor, Tensor]]
Weights = dict[str, Tensor]
Row = dict[str, Any]

# --- saliency of every weight for every class -----------------------------------------------------------------------


class ClassSaliency(NamedTuple):
    """One measure for all classes.

    matrices: layer -> float32 (classes, weights of the layer), weights in row-major order; images: images seen per
    class.
    """

    measure: str
    matrices: Weights
    images: list[int]


def compute_parameter_saliency_per_class(model: nn.Module, loader: Loader, num_classes: int,
                                         use_second_order: bool = False, **options) -> ClassSaliency:
    """The published interface: `gradient`, or with `use_second_order` `fisher`; options as of `gradient_saliency`."""
    measure = "fisher" if use_second_order else "gradient"
    return gradient_saliency(model, loader, num_classes, [measure], **options)[measure]


def gradient_saliency(model: nn.Module, loader: Loader, num_classes: int,
                      measures: Sequence[str] = tuple(PER_IMAGE), *, chunk: int | None = None,
                      show: bool = False) -> dict[str, ClassSaliency]:
    """First-order and Fisher saliency of all classes from per-image gradients of the cross-entropy, in one pass.

    model: a copy in evaluation mode, with the masks folded in, is used. loader: un-augmented batches (inputs
    (B, C, H, W), targets (B,)); measures: names of `PER_IMAGE`; chunk: images whose gradients are held at a time, by
    default `chunk_size` (the results do not depend on it); show: a progress bar. All is in float32: under `vmap`, batch
    normalisation refuses bfloat16 inputs, and squares of small gradients need the digits. The row of a class without
    images is zero. Raises ValueError for an empty loader.
    """
    model = clone_model(model)
    remove_masks(model)
    model.eval().requires_grad_(False)
    weights = {name: layer.weight.detach() for name, layer in prunable_layers(model).items()}

    def loss_of_one(weights: Weights, image: Tensor, target: Tensor) -> Tensor:
        replaced = {f"{name}.weight".lstrip("."): weight for name, weight in weights.items()}
        return F.cross_entropy(functional_call(model, replaced, (image[None],)), target[None])
    gradients_of = vmap(grad(loss_of_one), in_dims=(None, 0, 0))
    sums = {measure: {name: weight.new_zeros(num_classes, weight.numel()) for name, weight in weights.items()}
            for measure in measures}
    seen = []
    with Progress("images, gradients", getattr(loader, "num_images", None), show=show) as progress:
        for inputs, targets in loader:
            chunk = chunk or chunk_size(model, inputs[:1])
            for part, labels in zip(inputs.split(chunk), targets.split(chunk), strict=True):
                gradients = gradients_of(weights, part, labels)
                for name in weights:
                    rows = gradients.pop(name).flatten(1)  # lets go of them layer by layer
                    for measure, matrices in sums.items():
                        matrices[name].index_add_(0, labels, PER_IMAGE[measure](rows))
                seen.append(labels)
                progress.advance(len(labels))
    if not seen:
        raise ValueError("the loader gave no image")
    images = torch.cat(seen).bincount(minlength=num_classes)
    for measure, matrices in sums.items():
        for name, matrix in matrices.items():
            matrix /= images.clamp_min(1)[:, None]
            if measure == "fisher":
                matrix *= weights[name].square().flatten()
    return {measure: ClassSaliency(measure, matrices, images.tolist()) for measure, matrices in sums.items()}


def chunk_size(model: nn.Module, image: Tensor, memory: int = CHUNK_MEMORY) -> int:
    """Images whose gradients fit in `memory` bytes together, at least 1; image: one input (1, C, H, W).

    By measurement an image takes about twice its gradient and eight times its activations.
    """
    model, outputs = clone_model(model).eval(), []
    for leaf in (module for module in model.modules() if not any(module.children())):
        leaf.register_forward_hook(lambda _, __, output: outputs.append(output.numel()))
    with torch.no_grad():
        model(image)
    weights = sum(layer.weight.numel() for layer in prunable_layers(model).values())
    return max(1, min(LARGEST_CHUNK, memory // (4 * (2 * weights + 8 * sum(outputs)))))


# --- statistics ----------------------------------------------------------------------------------------------------


def find_few_class(values: np.ndarray, percentile: float, few_classes: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Which weights of a layer are important, and which of these for at least one and at most `few_classes` classes.

    values: (classes, weights). Important means above the percentile of all values of the layer, one threshold for all
    classes, so that a class whose saliency is small throughout has few important weights. Returns the threshold (NaN
    for a layer without active weights) and two bool arrays (classes, weights).
    """
    threshold = float(np.percentile(values, percentile)) if values.size else float("nan")
    important = values > threshold
    return threshold, important, important & (important.sum(axis=0) <= few_classes)


def same_scale(values: np.ndarray) -> np.ndarray:
    """Rows divided by their mean: which weights a class needs, whatever the size of its gradients."""
    scale = values.sum(axis=1, keepdims=True) / max(1, values.shape[1])
    return np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)


def analyse(saliency: ClassSaliency, masks: Mapping[str, Tensor], classes: Sequence[str], percentile: float,
            few_classes: int) -> tuple[list[Row], list[Row]]:
    """Statistics of one measure over the active weights: a row per layer and class, and a row per layer.

    masks: layer -> bool, True where active. `share` is the layer's part of the class's total; `*_scaled` counts weights
    after `same_scale`.
    """
    cpu = torch.device("cpu")
    matrices = move_all(list(saliency.matrices.values()), cpu)
    active = move_all([masks[name].flatten() for name in saliency.matrices], cpu)
    layers = [matrix[:, kept].numpy() for matrix, kept in zip(matrices, active)]
    totals = np.sum([values.sum(axis=1, dtype=np.float64) for values in layers], axis=0)
    by_class, by_layer = [], []
    for name, kept, values in zip(saliency.matrices, active, layers):
        threshold, important, few = find_few_class(values, percentile, few_classes)
        _, important_scaled, few_scaled = find_few_class(same_scale(values), percentile, few_classes)
        size = {"layer": name, "weights": values.shape[1], "pruned": len(kept) - values.shape[1]}
        chosen_by = {"important": important, "few_class": few, "important_scaled": important_scaled,
                     "few_class_scaled": few_scaled}
        counts = {key: int(chosen.any(axis=0).sum()) for key, chosen in chosen_by.items()}
        by_layer.append({**size, "threshold": threshold, **counts,
                         **{f"few_class_{label}": int(chosen.sum()) for label, chosen in zip(classes, few)},
                         **counts})  # again: a class may be called 'scaled'
        sums = values.sum(axis=1, dtype=np.float64)
        columns = {"share": np.divide(sums, totals, out=np.zeros_like(sums), where=totals > 0), **_spread(values),
                   "important": important.sum(axis=1), "few_class": few.sum(axis=1)}
        by_class += [{**size, "class": label, "images": saliency.images[number],
                      **{key: column[number].item() for key, column in columns.items()}}
                     for number, label in enumerate(classes)]
    return by_class, by_layer


def _spread(values: np.ndarray) -> dict[str, np.ndarray]:
    """Mean, standard deviation, quantiles and largest value of every row; NaN where there are no weights."""
    if not values.shape[1]:
        values = np.full((len(values), 1), np.nan)
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=1)
    return {"mean": values.mean(axis=1, dtype=np.float64), "std": values.std(axis=1, dtype=np.float64),
            **dict(zip(QUANTILES, quantiles)), "max": values.max(axis=1)}


def verdict(by_layer: Sequence[Row], classes: Sequence[str], percentile: float, few_classes: int) -> str:
    """How many weights are important, and for how few classes; on one scale for all classes (`same_scale`) the share
    lies between 0 (all agree) and what a binomial gives when each class draws its weights at random."""
    important, few, important_scaled, few_scaled = (
        sum(row[key] for row in by_layer) for key in ("important", "few_class", "important_scaled", "few_class_scaled"))
    if not important or not important_scaled:
        return "no weight stands out for any class"
    from scipy.stats import binom  # takes a while, and no --help needs it

    chance = binom(len(classes), 1 - percentile / 100)
    independent = (chance.cdf(few_classes) - chance.pmf(0)) / chance.sf(0)
    return (f"{important:,} weights are important (above the {percentile:g}th percentile of their layer) for a class, "
            f"{few / important:.1%} of them for at most {few_classes} of {len(classes)} classes; with every class "
            f"brought to the same mean saliency in a layer {few_scaled / important_scaled:.1%} (0 % if all classes "
            f"agreed, {independent:.1%} if each had drawn its own)")


# --- the script ----------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = ArgumentParser(__doc__)
    parser.prog = "python -m utils.saliency_analysis"
    add_model_option(parser)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE",
                        help="dense or pruned model; default: {m_name}/checkpoint/ckpt.pth under --root")
    parser.add_argument("--measure", choices=list(MEASURES), nargs="+", default=list(MEASURES), metavar="MEASURE",
                        help="gradient: first order |g|; fisher: g^2 theta^2")
    parser.add_argument("--samples_per_class", type=count, default=1000,
                        help="un-augmented training images of each class, drawn by --seed; 0: all; a hundred are too "
                        "few, since a few misclassified images dominate squared gradients")
    parser.add_argument("--chunk", type=positive_int,
                        help="images whose gradients are held at a time; default: as many as fit in 1 GB")
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


def class_sample(loader: BatchLoader, per_class: int, seed: int) -> BatchLoader:
    """Un-augmented batches of at most `per_class` images of each class (0: all), sorted by class; shares no state."""
    targets = loader.targets.cpu().numpy()
    order = balanced_indices(loader.images, targets, len(targets), derive_seed(seed, "evidence"))
    return loader.subset(np.concatenate([order[targets[order] == label][:per_class or None]
                                         for label in range(targets.max() + 1)]))


def report(run: Run, args: argparse.Namespace, saliency: ClassSaliency, masks: Mapping[str, Tensor],
           folder: Path) -> Row:
    """Writes the CSV files and figures of one measure, prints its table; returns what the card says about it."""
    classes, measure = run.data.classes, saliency.measure
    by_class, by_layer = analyse(saliency, masks, classes, args.threshold_percentile, args.few_classes)
    checkpoint.save_csv(by_class, folder / f"{measure}_by_class.csv")
    checkpoint.save_csv(by_layer, folder / f"{measure}_few_classes.csv")
    label, title = MEASURES[measure], f"{run.m_name} on {run.data_label}: {measure} saliency"
    plots.plot_distributions(by_class, folder / f"{measure}_distributions.png", title, label)
    plots.plot_layer_means(by_class, folder / f"{measure}_layers.png", title, label)
    plots.plot_heat_map(by_class, folder / f"{measure}_heatmap.png", title)
    words = verdict(by_layer, classes, args.threshold_percentile, args.few_classes)
    print_table(measure, by_class, by_layer, args.few_classes)
    print(f"{measure}: {words}.")
    return {"verdict": words, "images": saliency.images}


def print_table(measure: str, by_class: Sequence[Row], by_layer: Sequence[Row], few_classes: int) -> None:
    """One line per layer: weights, mean saliency, the class it matters most to, weights that few classes need."""
    print(f"\n{MEASURES[measure]}\n{'layer':>30} {'active':>10} {'pruned':>10} {'mean':>10}  {'most for':<20} "
          f"{f'<= {few_classes} classes':>12}")
    for layer in by_layer:
        rows = [row for row in by_class if row["layer"] == layer["layer"]]
        top, mean = max(rows, key=lambda row: row["mean"]), np.mean([row["mean"] for row in rows])
        most_for = "-" if np.isnan(mean) else top["class"] + (f" ({top['mean'] / mean:.1f}x)" if mean > 0 else "")
        share = f"{layer['few_class'] / layer['important']:.1%}" if layer["important"] else "-"
        print(f"{layer['layer']:>30} {layer['weights']:10,} {layer['pruned']:10,} {mean:10.3g}  "
              f"{most_for:<20} {share:>12}")


def main(argv: Sequence[str] | None = None) -> None:
    """Computes the measures, analyses them, writes CSV files, figures and a card."""
    args = parse_args(argv)
    run = open_run(args)
    classes, dense = list(run.data.classes), checkpoint.dense_path(run.root, run.m_name)
    args.few_classes = args.few_classes or max(1, round(0.3 * len(classes)))
    if args.few_classes >= len(classes):
        raise UserError(f"--few_classes {args.few_classes} is not few of {len(classes)} classes; use a smaller number")
    if args.checkpoint is None and not dense.is_file():
        raise UserError(f"no dense checkpoint at {dense}; name another with --checkpoint, or "
                        f"{prerequisite(args, dense, '--pruner', 'none')}")
    outcome = stage1.load_outcome(run, args.checkpoint or dense)
    folder = args.save_dir or run.root / "saliency_analysis" / run.m_name
    run.held.add(hold_folder(folder, "--save_dir"))
    sample, masks = class_sample(run.train, args.samples_per_class, run.seed), get_masks(outcome.model)
    sparsity = count_pruned_params(outcome.model).sparsity
    print(f"{outcome.artifact}: sparsity {sparsity:.5g}, {sample.num_images} training images of {len(classes)} "
          f"classes, {run.precision}")
    if len(sample.targets.unique()) < len(classes):
        print("warning: a class without training images has zero saliency throughout")
    found = gradient_saliency(outcome.model, sample, len(classes), args.measure, chunk=args.chunk, show=True)
    measures = {measure: report(run, args, found.pop(measure), masks, folder) for measure in args.measure}
    options = {name: getattr(args, name) for name in ("samples_per_class", "threshold_percentile", "few_classes")}
    checkpoint.save_json(run.card(checkpoint=str(outcome.artifact), sparsity=sparsity, **run.identity(), **options,
                                  classes=classes, measures=measures), folder / "saliency_analysis.json")
    print(f"\ntables, figures and card: {folder}")


if __name__ == "__main__":
    script(main, resumable=False)
