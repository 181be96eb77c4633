"""Recognise and describe artifacts: those this project writes, and the published formats of the same things."""
from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.analysis_utils import prunable_layers
from utils.channels import effective_sparsity
from utils.checkpoint import load_checkpoint, read_card
from utils.common import UserError, flattened, note, one_line
from utils.compact import is_compact, network_of
from utils.model_loader import find_state, has_mask_entries, is_maskable, load_model_state, model_loader, model_state
from utils.models import MODELS
from utils.regrowth import BEST_ENTRIES, LayerRecord

Sections = dict[str, Any]
CARD_FACTS = ("val_acc", "test_acc", "val_acc_before", "val_acc_after_regrowth", "val_acc_after_regrowth_bn",
              "val_acc_after_pruning", "sparsity", "effective_sparsity", "sparsity_before", "regrown",
              "regrown_live", "came_back", "starting_checkpoint", "epochs", "best_epoch", "seconds", "finished",
              "command")
LISTED = 12  # longer lists are summarised
LEVELS = 32  # maximum nesting of mappings and lists
ROUNDED = 9  # decimals of sums of fractions of an epoch
ANY = 1009  # placeholder for the number of classes: no layer has as many channels

# --- what a file is ------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of artifact: its name, and what is in one.

    describe: content (of a model also what it is called, or None) -> sections; it may raise KeyError, TypeError,
    ValueError and the like on damaged entries.
    """

    name: str
    describe: Callable[..., Sections]
    is_best: bool = False  # what `--type best` asks for
    is_model: bool = False


@dataclass(frozen=True)
class Artifact:
    """A loaded file and what it was recognised as."""

    path: Path
    content: Any
    kind: Kind
    m_name: str | None = None  # of the model, where the user names it

    @cached_property
    def card(self) -> dict[str, Any]:
        """Its run card, {} where it has none of its own."""
        return read_card(self.path) or {}

    @property
    def named(self) -> str | None:
        """What the model is called, by the user or the run card."""
        return self.m_name or self.card.get("config", {}).get("m_name")

    @cached_property
    def network(self) -> tuple[str, int] | None:
        """`guess_model` of a model artifact. UserError for a name given that does not fit, and as of `weights`."""
        state = self._state()
        if self.m_name and self.m_name not in (fitting := fitting_models(state)):
            fits = f"; it fits {', '.join(fitting)}" if fitting else ""
            raise UserError(f"{self.path} does not fit --m_name {self.m_name}{fits}")
        return guess_model(state, self.named)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The `model_state` of a model artifact. UserError for any other kind, saying what would be right."""
        return self._state(self.layers, lambda text: note(f"{self.path}: {text}"))

    @property
    def layers(self) -> frozenset[str] | None:
        """Names of the prunable layers of a model artifact; None where it is not known which model it is."""
        return self.network and _layout(self.network[0]).layers

    def _state(self, layers: Collection[str] | None = None, say: Callable[[str], Any] = str) -> dict[str, Tensor]:
        if not self.kind.is_model:
            raise UserError(f"{self.path} is a {self.kind.name}: it holds no finished model; give a model checkpoint"
                            f"{', or make one of it with --finetune' if self.kind.is_best else ''}")
        return model_state(self.content, self.path, layers, say)

    @property
    def input(self) -> dict[str, Any]:
        """What is known of a model's input (`Run.model_input`), by its run card or its content, as plain values; {} if
        nothing is, or nothing that makes sense."""
        known = self.card.get("input") or (self.content.get("input") if self.kind.is_model else None)
        with suppress(RecursionError):
            return plain(known) if isinstance(known, Mapping) else {}
        return {}


def load_artifact(path: Path, wanted: str = "auto", m_name: str | None = None) -> Artifact:
    """Loads and recognises a file without executing anything in it.

    wanted: 'best' insists on a best allocation, 'checkpoint' on anything else, 'auto' takes both; m_name: of the model,
    where it is known. Raises UserError for a file that cannot be loaded, is no checkpoint, or is of another kind than
    wanted.
    """
    content = load_checkpoint(path)
    kind = _recognise(content)
    if kind is None:
        raise UserError(f"{path} is no checkpoint: it holds a {type(content).__name__}, not a dict of named entries")
    if wanted != "auto" and kind.is_best != (wanted == "best"):
        right = "--type checkpoint" if kind.is_best else "--type best needs a file with allocation and regrow_indices"
        raise UserError(f"{path} is a {kind.name}, not what --type {wanted} asks for; use --type auto ({right})")
    return Artifact(path, content, kind, m_name)


def _recognise(content: Any) -> Kind | None:
    if is_compact(content):
        return KINDS["compact"]
    if _holds(content, "allocation", "regrow_indices"):
        return KINDS["best"]
    if _holds(content, "config", "search") and _holds(content["search"], "problem", "config", "history", "rewards"):
        return KINDS["search"]
    if _holds(content, "config", "trainer") and _holds(content["trainer"], "model", "epoch", "history"):
        return KINDS["progress"]
    state = find_state(content)
    if state is not None:
        bare, masked = state is content, has_mask_entries(state)
        if masked or not bare or any(is_maskable(key, value) for key, value in state.items()):
            return MODEL_KINDS[masked, bare]
    return KINDS["other"] if _holds(content) and content and all(isinstance(key, str) for key in content) else None


def _holds(content: Any, *keys: str) -> bool:
    return isinstance(content, Mapping) and set(keys) <= set(content)


# --- what a model's weights are ------------------------------------------------------------------------------------


def layer_rows(state: Mapping[str, Tensor], layers: Collection[str] | None = None) -> list[dict[str, Any]]:
    """For each Conv2d or Linear weight: layer, shape, weights, active, sparsity (pruned / weights).

    layers: their names, where known. Without a mask, weights that are exactly 0 count as pruned.
    """
    rows = []
    for key, value in state.items():
        if is_maskable(key, value, layers):
            stem, weights = key.removesuffix("_orig").removesuffix("weight"), value.numel()
            active = int(torch.count_nonzero(state.get(f"{stem}weight_mask", value)))
            rows.append({"layer": stem.removesuffix("."), "shape": tuple(value.shape), "weights": weights,
                         "active": active, "sparsity": 1 - active / weights if weights else 0.0})
    return rows


class Layout(NamedTuple):
    """Of a dense model with `ANY` classes: names and shapes of its state dict, names of its prunable layers."""

    shapes: dict[str, torch.Size]
    layers: frozenset[str]


@lru_cache(maxsize=len(MODELS))
def _layout(name: str) -> Layout:
    model = model_loader(name, num_classes=ANY, seed=0)
    return Layout({key: value.shape for key, value in model.state_dict().items()},
                  frozenset(prunable_layers(model, remove_duplicate=False)))


def fitting_models(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Models whose `model_state`, dense or masked, has these names and shapes -> their number of classes.

    No model is built with the classes that a file asks for: they may be any number.
    """
    shapes = {key.removesuffix("_orig") if key.endswith("weight_orig") else key: tuple(value.shape)
              for key, value in state.items() if not key.endswith("weight_mask")}
    fitting = {}
    for name in MODELS:
        known = _layout(name).shapes
        if known.keys() == shapes.keys() and all(len(shapes[key]) == len(shape) for key, shape in known.items()):
            pairs = [pair for key, shape in known.items() for pair in zip(shape, shapes[key], strict=True)]
            classes = {side for wanted, side in pairs if wanted == ANY}
            if len(classes) == 1 and all(side == wanted or wanted == ANY for wanted, side in pairs):
                fitting[name] = classes.pop()
    return fitting


def guess_model(state: Mapping[str, Tensor], named: str | None = None) -> tuple[str, int] | None:
    """Name and number of classes of the model that a `model_state` is of: of those that fit the one that is `named`,
    else the only one; None where none fits, or several do."""
    fitting = fitting_models(state)
    name = next((name for name in fitting if name == named or len(fitting) == 1), None)
    return name and (name, fitting[name])


def models_with_layers(layers: Iterable[str]) -> list[str]:
    """Names of the models that have all these prunable layers; only those that have no others, if there are any."""
    wanted = set(layers)
    return [name for name in MODELS if _layout(name).layers == wanted] or \
        [name for name in MODELS if _layout(name).layers > wanted]


def describe_weights(state: Mapping[str, Tensor], named: str | None = None) -> Sections:
    """Model, sparsity overall and per layer, and what is wrong with the values, of a state dict; named: as of
    `guess_model`."""
    masks, warnings = has_mask_entries(state), []
    plain_state = model_state(state, "state dict")
    name, classes = guess_model(plain_state, named) or (None, None)
    layers = name and _layout(name).layers
    state = model_state(state, "state dict", layers, warnings.append)
    rows = layer_rows(state, layers)
    weights, active = sum(row["weights"] for row in rows), sum(row["active"] for row in rows)
    mask_values = [value for key, value in state.items() if key.endswith("weight_mask")]
    if any(bool(((mask != 0) & (mask != 1)).any()) for mask in mask_values):
        warnings.append("masks hold values other than 0 and 1")
    if not all(bool(torch.isfinite(value).all()) for value in state.values()):
        warnings.append("there are values that are not finite")
    if empty := [row["layer"] for row in rows if not row["active"]]:
        warnings.append(one_line(f"nothing is left in {', '.join(empty)}"))
    effective = None
    if name:
        model = model_loader(name, num_classes=classes, seed=0)
        with suppress(UserError):  # values that make no sense
            load_model_state(model, state)
            effective = effective_sparsity(model)
    return {"model": name, "could be": [] if name else list(fitting_models(plain_state)), "classes": classes,
            "masks": masks, "sparsity": 1 - active / weights if weights else 0.0, "effective_sparsity": effective,
            "weights": weights, "active": active, "layers": rows, "warnings": warnings}


# --- what is in each kind ------------------------------------------------------------------------------------------


def _describe_training_checkpoint(content: Mapping[str, Any], named: str | None = None) -> Sections:
    training = {key: content[key] for key in ("acc", "epoch") if key in content}
    state = find_state(content)
    known = ("acc", "epoch", "args", "input", *(key for key, value in content.items() if value is state))
    return {**describe_weights(state, named), "training": training, "arguments": content.get("args"),
            "other entries": entry_rows(content, skip=known, depth=1)}


def _describe_progress(content: Mapping[str, Any]) -> Sections:
    trainer, recipe = content["trainer"], content["config"].get("recipe", {})
    training = {"epochs_done": trainer["epoch"], "epochs_planned": recipe.get("epochs"),
                "best_val_acc": trainer.get("best_accuracy"), "best_epoch": trainer.get("best_epoch")}
    weights = describe_weights(trainer["model"], content["config"].get("m_name"))
    return {**weights, "training": training, "arguments": content["config"]}


def _describe_search(content: Mapping[str, Any]) -> Sections:
    search, history = content["search"], content["search"]["history"]
    problem, paid = search["problem"], {epochs: seen for epochs, seen in search["rewards"].items() if seen}
    rewards = {"episodes": len(history), "updates": search["epoch"],
               "epochs_spent": round(sum(epochs * len(seen) for epochs, seen in paid.items()), ROUNDED),
               "last": history[-1]["reward"] if history else None, "baseline": search["baseline"]}
    rows = [dict(zip(("layer", "weights", "capacity", "drift_ssim"), values, strict=True)) for values in
            zip(problem["layers"], problem["sizes"], problem["capacities"], problem["drift"], strict=True)]
    if paid:  # the best of those that were trained longest
        longest = max(paid)
        best = max(paid[longest], key=paid[longest].get)
        rewards |= {"best": paid[longest][best], "best_after_epochs": longest}
        for row, amount in zip(rows, best, strict=True):
            row["regrown"] = amount
    return {**_model_by_layers(problem["layers"]), "rewards": rewards, "budget": problem["budget"],
            "allocation": rows, "arguments": content["config"], "search settings": search["config"]}


def _describe_best(content: Mapping[str, Any]) -> Sections:
    indices, allocation = content["regrow_indices"], content["allocation"]
    if not isinstance(allocation, Mapping):  # published: a list in the order of the indices, if it has their length
        names = list(indices) if len(indices) == len(allocation) else map("#{}".format, range(len(allocation)))
        allocation = dict(zip(names, allocation))
    rewards = {key: content[key] for key in BEST_ENTRIES if key not in ("allocation", "regrow_indices")
               and key in content}
    origin = {key: content[key] for key in ("starting_checkpoint", "starting_digest") if key in content}
    codes = [code for layer in content.get("regrow_sources", {}).values() for code in layer.tolist()]
    sources = {name: codes.count(number) for number, name in enumerate(content.get("regrow_source_names", []))
               if number in codes}
    rows = [{"layer": str(name), "regrown": plain(amount), "indices": len(indices.get(name, ()))}
            for name, amount in allocation.items()]
    record = (*LayerRecord._fields, "source_names")  # of `RegrowthRecord.state_dict`
    known = ("allocation", "entries", *rewards, *origin, *(f"regrow_{name}" for name in record))
    return {**_model_by_layers(indices), "rewards": rewards, "regrown": sum(row["indices"] for row in rows),
            "start": origin, "values recorded": "regrow_values" in content, "regrown by source": sources,
            "allocation": rows, "what the entries are": content.get("entries"),
            "other entries": entry_rows(content, skip=known)}


def _describe_compact(content: Mapping[str, Any]) -> Sections:
    state = network_of(content).state_dict()
    rows = [{"layer": step["name"], "kind": step["kind"], "weights": state[f"{step['name']}.weight"].numel(),
             "shape": tuple(state[f"{step['name']}.weight"].shape)}
            for step in content["steps"] if step["kind"] in ("conv", "linear")]
    return {"weights": sum(row["weights"] for row in rows), "parameters": sum(map(Tensor.numel, state.values())),
            "steps": len(content["steps"]), "input": content.get("input"), "layers": rows}


def _model_by_layers(layers: Iterable[str]) -> Sections:
    models = models_with_layers(layers)
    return {"model": models[0]} if len(models) == 1 else {"model": None, "could be": models}


MODEL_KINDS = {  # whether it has masks, whether it is the state dict itself
    (True, True): Kind("masked state dict (a pruned or regrown model)", describe_weights, is_model=True),
    (False, True): Kind("dense state dict", describe_weights, is_model=True),
    (True, False): Kind("masked training checkpoint", _describe_training_checkpoint, is_model=True),
    (False, False): Kind("dense checkpoint", _describe_training_checkpoint, is_model=True),
}
KINDS = {
    "compact": Kind("compact network (for inference)", _describe_compact),
    "best": Kind("best allocation", _describe_best, is_best=True),
    "search": Kind("controller checkpoint", _describe_search),
    "progress": Kind("stage in progress", _describe_progress),
    "other": Kind("checkpoint of another project or version", lambda content: {"entries": entry_rows(content)}),
}


# --- the description -----------------------------------------------------------------------------------------------


def describe(artifact: Artifact) -> Sections:
    """All that is known about an artifact as plain JSON values: what it is, its contents, and its run card's facts.

    Raises UserError when its entries are not what its kind has.
    """
    header = {"file": str(artifact.path), "bytes": artifact.path.stat().st_size, "kind": artifact.kind.name}
    try:
        named = (artifact.named,) if artifact.kind.is_model else ()
        sections = plain(artifact.kind.describe(artifact.content, *named))
        if artifact.input:
            sections["input"] = artifact.input
        if card := artifact.card:
            facts = {key: card[key] for key in CARD_FACTS if card.get(key) is not None}
            sections |= plain({"run card": facts, "arguments": sections.get("arguments") or card.get("config")})
    except UserError as error:
        raise UserError(f"{artifact.path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{artifact.path} looks like a {artifact.kind.name} but is damaged: {reason}") from error
    kept = {key: value for key, value in sections.items() if key == "model" or value not in (None, [], {})}
    return {**header, **kept}


def plain(value: Any, levels: int = LEVELS) -> Any:
    """The value as JSON can hold it: tensors and long lists in words, numbers that are not finite as None.

    RecursionError for what has more levels than that.
    """
    if not levels:
        raise RecursionError("something is nested too deeply, or holds itself")
    if isinstance(value, Mapping):
        return {str(key): plain(item, levels - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        rows = value and isinstance(value[0], Mapping)
        return [plain(item, levels - 1) for item in value] if rows or len(value) <= LISTED else _in_words(value)
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        single = math.prod(value.shape) == 1 and not getattr(value, "is_meta", False)
        return plain(value.item()) if single else _in_words(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def _in_words(value: Any) -> str:
    """A tensor, array or long list in a few words."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if all(isinstance(item, (int, float)) for item in value):
        return f"{len(value)} numbers, least {min(value):.6g}, largest {max(value):.6g}, last {value[-1]:.6g}"
    return f"{len(value)} entries"


def entry_rows(content: Mapping[str, Any], skip: Iterable[str] = (), depth: int = 2) -> list[dict[str, Any]]:
    """One row (key, type, shape or size, value) for each entry; mappings are opened `depth` levels deep."""
    rows = []
    for key, value in content.items():
        if key in skip:
            continue
        if isinstance(value, Mapping) and value and depth > 1:
            rows += [{**row, "key": f"{key}.{row['key']}"} for row in entry_rows(value, depth=depth - 1)]
            continue
        shaped = isinstance(value, (Tensor, np.ndarray))
        size = f"{len(value)}" if isinstance(value, (Mapping, list, tuple)) else ""
        simple = plain(value) if not isinstance(value, Mapping) else ""
        rows.append({"key": str(key), "type": str(value.dtype) if shaped else type(value).__name__,
                     "shape": str(tuple(value.shape)) if shaped else size,
                     "value": "" if shaped and value.ndim else simple})
    return rows


def render(description: Mapping[str, Any]) -> str:
    """A description as text: a line for each plain value, then a block for each mapping and a table for rows."""
    lines, blocks = [], []
    for name, value in description.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            blocks += ["", name, *_table(value)]
        elif isinstance(value, Mapping):
            blocks += ["", name, *(f"  {key:<24} {_text(item)}" for key, item in flattened(value, ".").items())]
        elif name == "warnings":
            lines += [f"warning: {item}" for item in value]
        else:
            lines.append(f"{name:<18} {_text(value)}")
    return "\n".join(lines + blocks)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(rows[0])
    cells = [names, *([_text(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    right = [all(isinstance(row.get(name), (int, float)) for row in rows) for name in names]
    return ["  " + "  ".join(cell.rjust(width) if number else cell.ljust(width)
                             for cell, width, number in zip(line, widths, right, strict=True)).rstrip()
            for line in cells]


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.4g}"
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)
