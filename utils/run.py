"""Opens a run from parsed arguments: seed, device, precision, loaders, models; and the options that scripts share."""
from __future__ import annotations

import argparse
import io
import os
import platform
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from utils.checkpoint import dense_path, ensure_writable, progress_path, read_card
from utils.common import (
    PRECISIONS,
    SIDE,
    UserError,
    count,
    cpu_info,
    derive_seed,
    fraction,
    not_negative,
    one_line,
    positive_float,
    positive_int,
    resolve_precision,
    unit_interval,
)
from utils.data_loader import BatchLoader, TestLoader, loaders_from
from utils.datasets import DATASETS, ImageDataset, load_dataset
from utils.distributed import LOST, World, continued, keep_error, launcher, resumed, use_own_part, world
from utils.model_loader import check_image_size, model_loader
from utils.models import MODELS
from utils.training import FINETUNE_ITERATIVE, FINETUNE_ONE_SHOT, OPTIMIZERS, PRETRAIN, RECIPES, SCHEDULES, Recipe

# --- options -------------------------------------------------------------------------------------------------------


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Wraps paragraphs and long choices at the terminal's width; shows a default where there is one."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(super(_Formatter, self)._fill_text(part, width, indent) for part in text.split("\n\n"))

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Callable[[int], tuple[str, ...]]:
        if _has_many_choices(action):
            return lambda number: (default_metavar,) * number
        return super()._metavar_formatter(action, default_metavar)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {None: action.dest.upper(), Path: "PATH"}.get(action.type, "N")

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if text and _has_many_choices(action):
            text += f"; one of {', '.join(action.choices)}"
        if text and isinstance(action.default, list):
            text += f" (default: {' '.join(map(str, action.default))})"
        elif text and action.default not in (None, argparse.SUPPRESS) and not isinstance(action.default, bool):
            text += " (default: %(default)s)"
        return text


def _has_many_choices(action: argparse.Action) -> bool:
    """Whether the choices would make a word too long for a line; the help names them instead."""
    return action.metavar is None and len(",".join(action.choices or ())) > (20 if action.nargs == "+" else 36)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors, default values in the help, ``~`` in every path, and no abbreviated flags."""

    def __init__(self, description: str | None = None):
        """description: usually the script's docstring."""
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Formatter)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse; ``~/x`` and ``--option=~/x`` mean the home folder, also where no shell has replaced it.

        A command that is `continued` has `--resume` among its words, and as `overwrite` the time that it gives.
        """
        words, since = [_at_home(word) for word in (sys.argv[1:] if args is None else args)], None
        if {"--resume", "--overwrite"} <= set(self._option_string_actions):
            words, since = continued(words)
        parsed = super().parse_known_args(words, namespace)
        if since is not None:
            parsed[0].overwrite = since
        return parsed

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with code 2."""
        self.exit(2, f"error: {one_line(f'{message} (see {Path(self.prog).name} --help)')}\n")


def _at_home(word: str) -> str:
    option, equals, value = word.partition("=")
    return option + equals + os.path.expanduser(value) if option.startswith("-") else os.path.expanduser(word)


def run_parser(description: str | None, *, model: str | None = None, seed: bool = True,
               resumable: bool = True) -> ArgumentParser:
    """A parser with what nearly every script takes: `add_model_option`, `add_run_options`, `add_overwrite_options`.

    model: default of the model's name; seed, resumable: whether there are `--seed`, `--resume` and `--overwrite`.
    """
    parser = ArgumentParser(description)
    add_model_option(parser, model)
    add_run_options(parser, seed)
    if resumable:
        add_overwrite_options(parser)
    return parser


def add_model_option(parser: Any, default: str | None = None, text: str = "network to use", **more: Any) -> Any:
    """The model's name, `--m_name` or `--model`; required unless there is a default or `more` says otherwise."""
    return parser.add_argument("--m_name", "--model", dest="m_name", choices=list(MODELS), default=default, help=text,
                               **{"required": default is None, **more})


def add_run_options(parser: argparse.ArgumentParser, seed: bool = True) -> None:
    """What every script takes: data, device, precision, seed and where artifacts go.

    seed: whether there is a `--seed` (a script may have an option of its own for several).
    """
    group = parser.add_argument_group("run")
    group.add_argument("--dataset", choices=list(DATASETS), default="cifar10",
                       help="cifar10, photos (embedded, needs no network), or folder: images of your own, "
                       "train|test/<class>/* in --data_dir")
    group.add_argument("--data_dir", type=Path, default=Path("data"),
                       help="where the data lies, and where CIFAR-10 is downloaded to")
    group.add_argument("--image_size", type=positive_int, default=SIDE,
                       help="side of the square images in pixels, to which those of a folder are resized")
    group.add_argument("--val_split", type=fraction, default=0.2,
                       help="fraction of the training images held out for validation")
    if seed:
        group.add_argument("--seed", type=count, default=0,
                           help="seed of initial weights, order, augmentation and search")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--precision", choices=PRECISIONS, default="auto",
                       help="auto: bf16 where the hardware multiplies it natively, else fp32")
    group.add_argument("--root", type=Path, default=Path("."), help="folder under which artifacts are written")


KINDS = (None, "oneshot", "iterative")  # values of `--starting_checkpoint` that are no files


def add_start_options(parser: Any) -> None:
    """The pruned checkpoint that regrowth starts from: `--start_sparsity` and `--starting_checkpoint`."""
    parser.add_argument("--start_sparsity", type=fraction, default=0.99, help="sparsity of the starting checkpoint")
    parser.add_argument("--starting_checkpoint", metavar="{oneshot,iterative,FILE}",
                        help="require a kind of starting checkpoint, or give a file; default: whichever exists")


def add_overwrite_options(parser: argparse.ArgumentParser) -> None:
    """`--resume` and `--overwrite` for scripts whose stages are kept on disk."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", "-r", action="store_true",
                       help="continue an interrupted stage, and take finished ones as they are")
    group.add_argument("--overwrite", action="store_true", help="redo stages whose artifacts exist; =TIME: only "
                       "those older than that, and continue the others")


# --- the run -------------------------------------------------------------------------------------------------------


def resolve_device(name: str) -> torch.device:
    """'auto' takes a GPU when there is one. UserError for an unknown name or a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device '{name}'; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{name}' is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= (found := torch.cuda.device_count()):
        raise UserError(f"--device {name}: this machine has {found or 'no'} CUDA GPU{'s' if found > 1 else ''} that "
                        "PyTorch can use; take --device cpu or auto")
    return device


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for run cards and results."""
    packages = {name: metadata.version(name) for name in ("torch", "torchvision", "numpy", "scikit-image")}
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"python": platform.python_version(), **packages, "device": hardware,
            "threads": torch.get_num_threads(), "system": platform.system()}


def cpu_name() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    return cpu_info("model name") or platform.processor() or platform.machine()


@dataclass
class Run:
    """What one script run works with; made by `open_run`."""

    m_name: str
    seed: int
    val_split: float
    device: torch.device
    precision: str
    root: Path
    data: ImageDataset
    train: BatchLoader
    val: BatchLoader
    test: TestLoader
    place: dict[str, str] = field(default_factory=dict)  # the options that name the data
    held: set[Any] = field(default_factory=set)  # folders that this run keeps to itself, of `utils.stage.hold_folder`
    made: set[Path] = field(default_factory=set)  # artifacts of this run: --overwrite redoes none of them twice
    resume: bool = False  # continue interrupted stages, and take finished ones as they are
    overwrite: bool | float = False  # redo them instead; a time: those that were made before it
    timing_only: bool = False  # no accuracy of the run counts, so checkpoints of other images will do

    @property
    def data_label(self) -> str:
        """The data as it is named in results, e.g. ``cifar10, image folder (JPEG)``."""
        return f"{self.data.name}, {self.data.source}"

    def identity(self) -> dict[str, Any]:
        """The arguments that every result of this run depends on."""
        return {"m_name": self.m_name, "dataset": self.data_label, "data_fingerprint": self.data.fingerprint,
                "val_split": self.val_split, "seed": self.seed, "precision": self.precision}

    def derive_seed(self, *purpose: object) -> int:
        """The seed of one purpose (`common.derive_seed`) under the run's."""
        return derive_seed(self.seed, *purpose)

    def new_model(self) -> nn.Module:
        """A freshly initialised model on the run's device, the same for the same seed."""
        return model_loader(self.m_name, self.device, len(self.data.classes), self.derive_seed("init"))

    def evidence_sample(self, num_images: int, batch_size: int) -> BatchLoader:
        """The class-balanced sample of un-augmented training images that all evidence comes from."""
        return self.train.balanced_sample(num_images, batch_size, self.derive_seed("evidence"))

    def model_input(self) -> dict[str, Any]:
        """What a model needs to know of its input, for checkpoints and cards: side of the images in pixels, class
        names, mean and standard deviation of each channel where a pixel is 0..1 (as of torchvision's `Normalize`).
        """
        return {"image_size": self.data.image_size, "classes": list(self.data.classes),
                "mean": (self.train.mean / 255).tolist(), "std": (self.train.std / 255).tolist()}

    def card(self, **entries: Any) -> dict[str, Any]:
        """A run card: the given entries, then the model's input and its place, the command, versions and hardware."""
        return {**entries, "input": {**self.model_input(), **self.place}, "command": command_line(),
                "environment": environment(self.device), "finished": time.strftime("%Y-%m-%d %H:%M:%S")}


def open_run(args: argparse.Namespace, data: ImageDataset | None = None) -> Run:
    """Checks device and output folder, then loads the data; UserError in one line for whatever cannot be used.

    args: a namespace with the options of `run_parser`; data: instead of what these name. Only an empty folder is made.
    """
    sys.stderr = sys.stderr or io.StringIO()  # a program without a console has none; bars and notes need one
    device = resolve_device(args.device)
    use_own_part(device)
    precision = resolve_precision(args.precision, device)
    ensure_writable(args.root)
    torch.backends.cudnn.benchmark = True  # fixed batch shapes: let cuDNN choose its fastest kernels
    data = data or load_dataset(args.dataset, args.data_dir, args.image_size)
    if data.image_size != SIDE:
        check_image_size(args.m_name, data.image_size)
    train, val, test = loaders_from(data, val_split=args.val_split, seed=args.seed, device=device)
    return Run(args.m_name, args.seed, args.val_split, device, precision, args.root, data, train, val, test,
               place={"dataset": args.dataset, "data_dir": str(args.data_dir)},
               resume=bool(getattr(args, "resume", False)), overwrite=getattr(args, "overwrite", False))


def command_line() -> str:
    """The command that runs this process, as a shell takes it; a module as ``python -m name``, without its path."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    started = ["-m", spec.name] if spec and sys.argv[0].endswith(".py") else sys.argv[:1]
    return shlex.join([*launcher(), *started, *sys.argv[1:]])


DATA_OPTIONS = ("dataset", "data_dir", "image_size", "val_split", "seed")  # which images, and which are held out


def prerequisite(args: argparse.Namespace, missing: Path, *words: str) -> str:
    """``make it with: COMMAND (what it costs)``: the shell command of stage 1 for what is missing, for this folder.

    It has the options of this run, and `--resume` where there is a dense model, which then is taken as it is, whatever
    its recipe. The cost is in epochs, at most, and in time where the dense model's run card tells what an epoch takes.
    Where the training of the dense or of the `missing` model was interrupted, only the command that began it goes on.
    """
    for begun in map(progress_path, (dense_path(args.root, args.m_name), missing)):
        if begun.is_file():
            return f"its training was interrupted ({begun}): repeat the command that began it, with --resume"
    script, dense = Path(__file__).resolve().parents[1] / "main.py", dense_path(args.root, args.m_name)
    command = ["python", script.name if script.parent == Path.cwd() else str(script), "--m_name", args.m_name, *words]
    for name, default in (("dataset", "cifar10"), ("data_dir", Path("data")), ("image_size", SIDE), ("root", Path(".")),
                          ("seed", 0), ("val_split", 0.2), ("device", "auto"), ("precision", "auto")):
        if getattr(args, name) != default:
            command += [f"--{name}", str(getattr(args, name))]
    iterations = int(words[words.index("--iter_end") + 1]) if "--iter_end" in words else 1
    epochs = 0 if "none" in words else FINETUNE_ONE_SHOT.epochs if iterations == 1 else \
        iterations * FINETUNE_ITERATIVE.epochs
    took = ""
    if not dense.is_file():
        epochs += PRETRAIN.epochs
    else:
        command.append("--resume")
        card = read_card(dense) or {}
        if card.get("seconds") and card.get("epochs"):
            took = f", {epochs * card['seconds'] / card['epochs'] / 60:.0f} minutes at the pace of the dense model"
    return (f"make it with: {shlex.join(command)} (up to {epochs} epochs{took}; --max_epochs and --finetune_epochs "
            "shorten it)")


class _Pipe(io.FileIO):
    """An output whose reader may leave, as ``| head`` does: what is written after that is dropped."""

    def write(self, data: Any) -> int:
        """As of `io.FileIO`."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def _make_output_safe() -> None:
    """Nothing that is printed stops a run, though its reader has left or the encoding lacks a name's letters. An output
    that is not Python's own, as in a notebook, stays as it is."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:
            stream.reconfigure(errors="backslashreplace")
            if not stream.isatty():
                pipe = io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False))
                setattr(sys, name, io.TextIOWrapper(pipe, stream.encoding, "backslashreplace", line_buffering=True))


def script(main: Callable[[Sequence[str] | None], None], resumable: bool = True, several: bool = False) -> NoReturn:
    """Runs a script's main: user errors become a line and exit code 2, Ctrl-C and SIGTERM a way on and 130.

    What the system refuses is a user error too. resumable, several: whether it has `--resume`, and torchrun may run it.
    """
    _make_output_safe()
    began, processes, line, code = time.time(), World(), None, 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's time limit; `Processes` have their own
    try:
        processes = world()
        if processes.size > 1 and not several:
            raise UserError(f"{Path(sys.argv[0]).name} runs as one process; start it with python, not with torchrun")
        main(None)
    except (KeyboardInterrupt, Exception, *LOST) as error:
        stop = error.__context__ if isinstance(error.__context__, KeyboardInterrupt) else error  # cleaning up failed
        if isinstance(stop, (KeyboardInterrupt, *LOST)):
            for number in (signal.SIGINT, signal.SIGTERM):  # a second one changes nothing any more
                signal.signal(number, signal.SIG_IGN)
            what = "stopped: another process of this run ended" if isinstance(stop, LOST) else "interrupted"
            again = shlex.join(resumed(shlex.split(command_line()), began))
            again = f"what was finished is saved. Continue with: {again}" if resumable else "run the same command again"
            line, code = f"\n{what}; {again}", 130
        else:
            line, code = _line_and_code(error)
    processes.end(line)
    sys.exit(code)


def _line_and_code(error: Exception) -> tuple[str, int]:
    """What to print and to exit with: a line where the error is the user's or the system's, else a traceback."""
    if isinstance(error, OSError) and error.errno is not None:  # None: raised by a library, not by the system
        error = UserError(": ".join(map(str, filter(None, (error.filename, (error.strerror or str(error)).lower())))))
    if not isinstance(error, UserError):
        return "".join(traceback.format_exception(error)), 1
    keep_error(str(error))
    return f"error: {error}", error.exit_code


def add_iteration_options(parser: argparse.ArgumentParser, iter_end: int, amount: str) -> None:
    """`--iter_start`, `--iter_end` (with its default) and `--amount` (with its help)."""
    parser.add_argument("--amount", type=fraction, help=amount)
    parser.add_argument("--iter_start", type=positive_int, default=1,
                        help="first iteration; above 1 starts from the checkpoint of the iteration before")
    parser.add_argument("--iter_end", type=positive_int, default=iter_end, help="last iteration")


def check_iterations(args: argparse.Namespace) -> None:
    """UserError for iterations that end before they start."""
    if args.iter_end < args.iter_start:
        raise UserError(f"--iter_end {args.iter_end} lies before --iter_start {args.iter_start}")


RECIPE_NUMBERS = {  # recipe fields besides epochs, batch size, patience -> help text, argparse keywords
    "optimizer": ("optimizer", {"choices": list(OPTIMIZERS)}),
    "lr": ("learning rate", {"type": positive_float}),
    "schedule": ("learning rate over the epochs", {"choices": list(SCHEDULES)}),
    "weight_decay": ("weight decay", {"type": not_negative}),
    "label_smoothing": ("label smoothing", {"type": unit_interval}),
    "padding": ("pixels of zeros around an image before its random crop", {"type": count}),
}


def _values_of(training: str, number: str) -> str:
    values = [f"{name} {getattr(getattr(recipes, training), number)}" for name, recipes in RECIPES.items()]
    return f"(default: {', '.join(values)})"


def add_recipe_numbers(group: Any, prefix: str, training: str) -> None:
    """Options `--{prefix}lr` and so on; None where not given. training: field of `Recipes` whose values help shows."""
    for name, (text, words) in RECIPE_NUMBERS.items():
        group.add_argument(f"--{prefix}{name}", help=f"{text} {_values_of(training, name)}", **words)


def add_recipe_options(parser: argparse.ArgumentParser, note: str | None = None) -> None:
    """`--recipe` and options that change the recipes of pretraining and of finetuning; None where not given.

    note: what else to say on the defaults.
    """
    group = parser.add_argument_group("training", note)
    group.add_argument("--recipe", choices=list(RECIPES), default="published",
                       help="defaults of the options below; short: few epochs, for a laptop")
    group.add_argument("--max_epochs", type=positive_int,
                       help=f"epochs of pretraining {_values_of('pretrain', 'epochs')}")
    add_recipe_numbers(group, "", "pretrain")
    group.add_argument("--batch_size", type=positive_int, help="of pretraining and finetuning (default: published 128 "
                       "and 100, short 128)")
    group.add_argument("--patience", type=positive_int, help="epochs without a better validation accuracy before a "
                       f"stage stops {_values_of('pretrain', 'patience')}")
    group.add_argument("--finetune_epochs", type=count,
                       help=f"epochs after one-shot pruning {_values_of('one_shot', 'epochs')}, or after each "
                       f"iteration of several {_values_of('iterative', 'epochs')}")
    add_recipe_numbers(group, "finetune_", "one_shot")
    group.add_argument("--finetune_batch_size", type=positive_int, help="of finetuning, instead of --batch_size")


def recipe_changes(args: argparse.Namespace, prefix: str = "") -> dict[str, Any]:
    """Fields of a recipe that options `--{prefix}lr` and so on give; of pretraining, or with 'finetune_' after it."""
    options = {name: f"{prefix}{name}" for name in ("batch_size", *RECIPE_NUMBERS)}
    options |= {"epochs": f"{prefix or 'max_'}epochs", "patience": "patience"}
    return {field: getattr(args, option) for field, option in options.items() if getattr(args, option) is not None}


def stage1_recipes(args: argparse.Namespace, pretrain: Recipe, finetune: Recipe) -> tuple[Recipe, Recipe]:
    """Both recipes with what the command line of `add_recipe_options` changes."""
    both = {} if args.batch_size is None else {"batch_size": args.batch_size}
    return replace(pretrain, **recipe_changes(args)), replace(finetune, **{**both, **recipe_changes(args, "finetune_")})
