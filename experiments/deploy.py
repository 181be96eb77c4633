#!/usr/bin/env python
"""What sparsity is worth outside of this repository: one model as it is dense, masked, compact and in PyTorch's sparse
CSR, its size and its images per second in PyTorch and (with the packages of ``requirements-export.txt``) onnxruntime,
all measured in turn; a table and a figure. Dense is the pruned model without masks: speed does not depend on values.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any working directory

from utils import checkpoint, export, plots  # noqa: E402, I001  first: it says which packages are missing

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from experiments.csr import multiplications, sparse_products, without_masks  # noqa: E402
from utils.analysis_utils import clone_model, count_pruned_params  # noqa: E402
from utils.benchmark import measure  # noqa: E402
from utils.channels import effective_sparsity  # noqa: E402
from utils.common import SIDE, UserError, generator  # noqa: E402
from utils.compact import compact, content, largest_difference  # noqa: E402
from utils.inspection import load_artifact  # noqa: E402
from utils.model_loader import model_loader  # noqa: E402
from utils.models import MODELS  # noqa: E402
from utils.pruning import PRUNERS, weight_pruner_loader  # noqa: E402
from utils.run import ArgumentParser, cpu_name, positive_int, script  # noqa: E402

SHIPPED = Path(__file__).resolve().parents[1] / "results/checkpoints"
MODELS_MEASURED = [str(SHIPPED / name) for name in (
    "resnet20/ckpt_after_prune/pruned_finetuned_mask_0.99.pth", "vgg16/bidirectional_0.99.sparse",
    "vgg16/bidirectional_0.995.sparse")]
MEASURED_S = 0.3  # that one measurement takes at least, by doing the work several times
EAGER, ONNX = "PyTorch", "onnxruntime"
TICKS = (0.1, 0.2, 0.5, 1, 2, 5)  # of speed
Row = dict[str, Any]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS_MEASURED, metavar="FILE|NAME:PRUNER:SPARSITY",
                        help="pruned checkpoints, default: those that are shipped; or untrained models to prune, "
                        "of which only the speed is meaningful")
    parser.add_argument("--batch_sizes", type=positive_int, nargs="+", default=[1, 128])
    parser.add_argument("--threads", type=positive_int, nargs="+", default=[1, 2])
    parser.add_argument("--num_runs", type=positive_int, default=7, help="repeats, of which the median counts")
    parser.add_argument("--save_dir", type=Path, default=Path("deploy"), help="where the table and the figure go")
    return parser.parse_args(argv)


def pruned_model(word: str) -> tuple[str, nn.Module, int]:
    """What to call a model, the pruned model itself, the side of its images in pixels. UserError for what is neither a
    file nor a description."""
    name, _, rest = word.partition(":")
    pruner, _, sparsity = rest.partition(":")
    if name in MODELS and pruner in PRUNERS:
        try:
            wanted = float(sparsity)
        except ValueError as error:
            raise UserError(f"'{sparsity}' is no sparsity; --models takes files, and words such as "
                            "vgg16:lamp:0.99") from error
        model = model_loader(name, seed=0)
        weight_pruner_loader(pruner)(model, wanted)
        return f"{name} untrained, {pruner} {sparsity}", model, SIDE
    artifact = load_artifact(Path(word))
    model, name = export.network_of(artifact), artifact.network[0]
    sparsity = checkpoint.format_sparsity(count_pruned_params(model).sparsity)
    return f"{name} {sparsity}", model, export.side_of(artifact)


def measure_forms(label: str, model: nn.Module, side: int, args: argparse.Namespace) -> list[Row]:
    """A row for each form, engine, number of threads and batch size of a pruned model for images of `side` pixels.

    bytes: of the file, for CSR of its tensors in memory (values float32, indices int64); macs: for one image;
    difference: to the masked model's logits, in units of the largest; speedup: over the dense model in the same engine.
    """
    made = compact(model, side)
    forms = {"dense": without_masks(model), "masked": model.eval(), "compact": made.network,
             "CSR": sparse_products(model)}
    files = {"dense": forms["dense"].state_dict(), "masked": model.state_dict(),
             "compact": content(made.steps, made.network.state_dict())}
    facts = {}
    for form, network in forms.items():
        tensors = [*network.parameters(), *network.buffers()]  # all that a forward pass reads
        facts[form] = {"model": label, "sparsity": count_pruned_params(model).sparsity,
                       "effective_sparsity": effective_sparsity(model), "form": form,
                       "parameters": sum(tensor.numel() for tensor in tensors),
                       "bytes": len(checkpoint.checkpoint_bytes(files[form])) if form in files else
                       sum(tensor.nbytes for tensor in tensors), "macs": multiplications(network, side),
                       "difference": largest_difference(model, network, images(8, side))}
    has_onnx = all(map(find_spec, export.ONNX_PACKAGES))
    both = ("dense", "compact") if has_onnx else ()
    exported = {form: export.onnx_bytes(clone_model(forms[form]), side)[0] for form in both}
    before, rows = torch.get_num_threads(), []
    for threads, batch in product(args.threads, args.batch_sizes):
        torch.set_num_threads(threads)
        inputs = images(batch, side)
        works = {(form, EAGER): torch.no_grad()(partial(network, inputs)) for form, network in forms.items()}
        works |= {(form, ONNX): onnx_work(file, threads, inputs) for form, file in exported.items()}
        seconds = dict(zip(works, median_seconds(list(works.values()), args.num_runs), strict=True))
        rows += [{**facts[form], "engine": engine, "threads": threads, "batch": batch, "images_per_s": batch / taken,
                  "speedup": seconds["dense", engine] / taken} for (form, engine), taken in seconds.items()]
    torch.set_num_threads(before)
    return rows


def images(count: int, side: int) -> Tensor:
    """(count, 3, side, side), always the same."""
    return torch.randn(count, 3, side, side, generator=generator(0, "deploy")).to(memory_format=torch.channels_last)


def onnx_work(file: bytes, threads: int, inputs: Tensor) -> Callable[[], Any]:
    """A forward pass through an ONNX file."""
    import onnxruntime  # an optional extra

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {"images": inputs.contiguous().numpy()})


def median_seconds(works: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Of each, measured in turn; quick ones are done several times at once."""
    def several(work: Callable[[], Any], number: int) -> None:
        for _ in range(number):
            work()
    cpu = torch.device("cpu")
    numbers = [max(1, round(MEASURED_S / row["median_s"])) for row in measure(works, cpu, repeats=1)]
    rows = measure([partial(several, *job) for job in zip(works, numbers)], cpu, repeats=repeats)
    return [row["median_s"] / number for row, number in zip(rows, numbers)]


def print_table(rows: Sequence[Row]) -> None:
    """Every form of every model with its size, and its speed over the dense model's in every setting."""
    for label, form in dict.fromkeys((row["model"], row["form"]) for row in rows):
        own = [row for row in rows if (row["model"], row["form"]) == (label, form)]
        if form == "dense":
            print(f"\n{label}: sparsity {own[0]['sparsity']:.5g}, effective {own[0]['effective_sparsity']:.5g}")
        print(f"  {form:<8} {own[0]['parameters']:>12,} numbers {own[0]['bytes']:>12,} bytes "
              f"{own[0]['macs'] / 1e6:>9.2f} M multiplications")
        for row in own:
            print(f"    {row['engine']:<12} {row['threads']} threads, batch {row['batch']:<4} "
                  f"{row['images_per_s']:>10,.1f} images/s  {row['speedup']:5.2f}x")


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Speed over the dense model's by form and setting, a panel per model, on a log axis."""
    labels, forms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "form"))
    settings = [f"{row['engine']}, threads: {row['threads']}, batch {row['batch']}" for row in rows]
    places = {setting: place for place, setting in enumerate(dict.fromkeys(settings))}
    figure, grid = plots.panels((5 * len(labels), 4.5), title, columns=len(labels), sharey=True, squeeze=False)
    for axes, label in zip(grid.flat, labels):
        axes.axvline(1, color="0.3", linewidth=0.8)
        for number, form in enumerate(forms[1:]):
            own = [(row["speedup"], places[setting]) for row, setting in zip(rows, settings)
                   if (row["model"], row["form"]) == (label, form)]
            axes.plot(*zip(*own), "osD"[number % 3], color=f"C{number}", label=form)
        axes.set_yticks(range(len(places)), places)
        axes.set(xscale="log", title=label, xlabel="images/s over the dense model's")
        axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    plots.legend_below(figure)
    plots.save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes, says what came out."""
    args = parse_args(argv)
    checkpoint.ensure_writable(args.save_dir, "--save_dir")
    models = [pruned_model(word) for word in args.models]
    labels, rows = [label for label, *_ in models], []
    for number, (label, model, side) in enumerate(models, 1):
        name = label if labels.count(label) == 1 else f"{label}, model {number}"  # two of one kind and sparsity
        print(f"measuring {name} ({number} of {len(models)})", flush=True)
        rows += measure_forms(name, model, side, args)
    checkpoint.save_csv(rows, args.save_dir / "deploy.csv")
    plot(rows, args.save_dir / "deploy.png", f"{cpu_name()}, medians of {args.num_runs} runs")
    print_table(rows)
    print(f"\ntable and figure: {args.save_dir}")


if __name__ == "__main__":
    script(main, resumable=False)
