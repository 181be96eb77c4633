#!/usr/bin/env python
"""What sparsity is worth outside of this repository: one model as it is dense, masked, compact and in PyTorch's sparse
CSR, its size and its images per second in PyTorch and onnxruntime, all measured in turn; a table and a figure.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

from utils import checkpoint, deploy, plots  # noqa: E402
from utils.analysis_utils import count_pruned_params  # noqa: E402
from utils.common import UserError  # noqa: E402
from utils.inspection import guess_model, load_artifact  # noqa: E402
from utils.model_loader import load_model_state, model_loader  # noqa: E402
from utils.models import MODELS  # noqa: E402
from utils.pruning import PRUNERS, weight_pruner_loader  # noqa: E402
from utils.run import ArgumentParser, cpu_name, positive_int, script  # noqa: E402

SHIPPED = Path(__file__).resolve().parents[1] / "results/checkpoints/resnet20/ckpt_after_prune"
TICKS = (0.1, 0.2, 0.5, 1, 2, 5)  # of speed
MEASURED = (str(SHIPPED / "pruned_finetuned_mask_0.99.pth"), "vgg16:lamp:0.99", "vgg16:lamp:0.999")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("--models", nargs="+", default=MEASURED, metavar="FILE|NAME:PRUNER:SPARSITY",
                        help="pruned checkpoints, or models that are pruned untrained; default: the shipped resnet20, "
                        "and VGG16 at two sparsities")
    parser.add_argument("--batch_sizes", type=positive_int, nargs="+", default=[1, 128])
    parser.add_argument("--threads", type=positive_int, nargs="+", default=[1, 2])
    parser.add_argument("--num_runs", type=positive_int, default=7, help="repeats, of which the median counts")
    parser.add_argument("--save_dir", type=Path, default=Path("deploy"), help="where the table and the figure go")
    return parser.parse_args(argv)


def pruned_model(word: str) -> tuple[str, nn.Module]:
    """What to call a model, and the pruned model itself. UserError for what is neither a file nor a description."""
    name, _, rest = word.partition(":")
    pruner, _, sparsity = rest.partition(":")
    if name in MODELS and pruner in PRUNERS:
        model = model_loader(name, seed=0)
        weight_pruner_loader(pruner)(model, _fraction(sparsity))
        return f"{name} untrained, {pruner} {sparsity}", model
    weights = load_artifact(Path(word)).weights
    guess = guess_model(weights)
    if guess is None:
        raise UserError(f"{word} fits none of this project's models")
    model = model_loader(guess[0], num_classes=guess[1], seed=0)
    load_model_state(model, weights, word)
    return f"{guess[0]} {checkpoint.format_sparsity(count_pruned_params(model).sparsity)}", model


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"'{text}' is no sparsity; --models takes files, and words such as vgg16:lamp:0.99") from error


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """A line per form with its size, and its speed over the dense model's in every setting."""
    settings = list(dict.fromkeys((row["engine"], row["threads"], row["batch"]) for row in rows))
    for label in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == label]
        print(f"\n{label}: sparsity {mine[0]['sparsity']:.5g}, effective {mine[0]['effective_sparsity']:.5g}")
        for form in dict.fromkeys(row["form"] for row in mine):
            found = {(row["engine"], row["threads"], row["batch"]): row for row in mine if row["form"] == form}
            facts = next(iter(found.values()))
            print(f"  {form:<8} {facts['parameters']:>12,} numbers {facts['bytes']:>12,} bytes "
                  f"{facts['macs'] / 1e6:>9.2f} M multiplications")
            for engine, threads, batch in settings:
                if row := found.get((engine, threads, batch)):
                    print(f"    {engine:<12} {threads} threads, batch {batch:<4} {row['images_per_s']:>10,.1f} images/s"
                          f"  {row['speedup']:5.2f}x")


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Speed over the dense model's by form and setting, a panel per model, on a log axis."""
    labels, forms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "form"))
    settings = list(dict.fromkeys((row["engine"], row["threads"], row["batch"]) for row in rows))
    figure = plots.new_figure(figsize=(5 * len(labels), 4.5), layout="constrained")
    figure.suptitle(title)
    for axes, label in zip(figure.subplots(1, len(labels), sharey=True, squeeze=False)[0], labels):
        axes.axvline(1, color="0.3", linewidth=0.8)
        for number, form in enumerate(forms[1:]):
            mine = [row for row in rows if (row["model"], row["form"]) == (label, form)]
            places = [settings.index((row["engine"], row["threads"], row["batch"])) for row in mine]
            axes.plot([row["speedup"] for row in mine], places, "osD"[number % 3], color=f"C{number}", label=form)
        axes.set_yticks(range(len(settings)), [f"{engine}, threads: {threads}, batch {batch}"
                                               for engine, threads, batch in settings])
        axes.set(xscale="log", title=label, xlabel="images/s over the dense model's")
        axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    plots.legend_below(figure)
    plots.save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes, says what came out."""
    args = parse_args(argv)
    checkpoint.ensure_writable(args.save_dir, "--save_dir")
    models = [pruned_model(word) for word in args.models]
    rows = [row for label, model in models
            for row in deploy.measure(label, model, args.threads, args.batch_sizes, args.num_runs)]
    checkpoint.save_csv(rows, args.save_dir / "deploy.csv")
    plot(rows, args.save_dir / "deploy.png", f"{cpu_name()}, medians of {args.num_runs} runs")
    print_table(rows)
    print(f"\ntable and figure: {args.save_dir}")


if __name__ == "__main__":
    script(main, resumable=False)
