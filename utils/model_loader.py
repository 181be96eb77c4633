"""Build a model by name, and load a state dict into it, whoever wrote that."""
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.analysis_utils import add_masks, is_binary, prunable_layers, refresh_weight, remove_masks
from utils.common import UserError, note, one_line
from utils.models import MODELS


def model_loader(
    m_name: str, device: str | torch.device = "cpu", num_classes: int = 10, seed: int | None = None
) -> nn.Module:
    """Return a new network `m_name` in training mode on `device`, its weights in channels_last memory format.

    It maps normalised images (B, 3, S, S), made for S = 32, to logits (B, num_classes). With `seed`, the initial
    weights are a function of the seed alone, the same on every device, and no global random state moves; without, they
    come from the global generator. Raises UserError for an unknown name.
    """
    if m_name not in MODELS:
        raise UserError(f"unknown model {m_name!r}; known models: {', '.join(MODELS)}")
    # Weights are drawn on the CPU: fork and seed its generator alone (torch.manual_seed would move the GPUs' too).
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        model = MODELS[m_name](num_classes)
    return model.to(device=device, memory_format=torch.channels_last)


def check_image_size(m_name: str, size: int) -> None:
    """UserError when the network `m_name` cannot take images of size x size pixels, naming the least it takes."""
    model = model_loader(m_name, seed=0).to("meta").eval()

    def runs(side: int) -> bool:
        try:
            model(torch.empty(1, 3, side, side, device="meta"))
        except RuntimeError:
            return False
        return True

    if not runs(size):
        least = next((f"; the smallest it takes are {side}x{side}" for side in range(size, 257) if runs(side)), "")
        raise UserError(f"--image_size {size}: {m_name} cannot take images of {size}x{size} pixels{least}")


# --- state dicts -------------------------------------------------------------------------------------------------

STATE_KEYS = ("net", "model_state_dict", "state_dict", "model")  # under which a training checkpoint has its weights
WRAPPERS = {"module", "model", "net"}  # what data-parallel training and trainers put before every name
PLAIN_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8,
                          torch.int8, torch.int16, torch.int32, torch.int64})
LARGEST = 2**30  # elements; a tensor of more can only be a mistake, or a view that would fill the memory
SPARSE_FROM = 1e-3  # share of weights that are exactly 0; by chance it is below 1e-6


def find_state(loaded: Any) -> Mapping[str, Tensor] | None:
    """The state dict in a loaded checkpoint: the value itself, or the entry of it that `STATE_KEYS` name; else None."""
    entries = [loaded[key] for key in STATE_KEYS if key in loaded] if isinstance(loaded, Mapping) else []
    return next((value for value in (loaded, *entries) if isinstance(value, Mapping) and value and all(
        isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items())), None)


def has_mask_entries(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has a mask for any weight."""
    return any(_last(key) == "weight_mask" for key in state)


def is_maskable(key: str, value: Tensor, layers: Collection[str] | None = None) -> bool:
    """Whether an entry is the weight, masked or not, of a layer that masks are for."""
    layer, _, name = key.rpartition(".")
    return name in ("weight", "weight_orig") and (value.dim() in (2, 4) if layers is None else layer in layers)


def model_state(loaded: Any, source: str | Path, layers: Collection[str] | None = None,
                say: Callable[[str], Any] = lambda text: None) -> dict[str, Tensor]:
    """The state dict inside a loaded checkpoint in this project's own form.

    Without wrappers' prefixes; sparse tensors dense; counters of batch normalisation, which old files lack, filled in;
    masks for all of the `layers` or none. Masks that other parameters have are multiplied out. Where weights without a
    mask are exactly 0, more than by chance, masks are made from them. layers: names of the layers that masks are for
    (None: those whose `weight` has 2 or 4 dimensions); say: is told what a user should know. Raises UserError, naming
    `source`, for what is no state dict or holds tensors of a kind that no model has.
    """
    found = find_state(loaded)
    if found is None:
        raise UserError(f"{source} holds no model weights: expected a state dict (names to tensors), or a dict that "
                        f"has one as {', '.join(map(repr, STATE_KEYS))}")
    state = {key: _plain_tensor(value, key, source) for key, value in _without_prefixes(found, layers or ()).items()}
    state = _multiply_out(state, layers, say)
    for key in [key for key in state if _last(key) == "running_var"]:
        state.setdefault(key.removesuffix("running_var") + "num_batches_tracked", torch.tensor(0))
    return _complete_masks(state, layers, say)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _without_prefixes(state: Mapping[str, Tensor], layers: Collection[str]) -> dict[str, Tensor]:
    """Drops wrapper prefixes: a first name component that all keys share and the model does not have.

    Where the model's layers are unknown, only `WRAPPERS` are dropped.
    """
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}  # of torch.compile, at any depth
    own = {name.partition(".")[0] for name in layers}
    while all("." in key for key in state) and len(heads := {key.partition(".")[0] for key in state}) == 1:
        if heads <= own or not (layers or heads <= WRAPPERS):
            break
        state = {key.partition(".")[2]: value for key, value in state.items()}
    return state


def _plain_tensor(value: Tensor, key: str, source: str | Path) -> Tensor:
    problem = ("is a meta tensor, without values" if value.is_meta else
               "is a nested tensor" if value.is_nested else
               f"is of type {str(value.dtype).removeprefix('torch.')}" if value.dtype not in PLAIN_DTYPES else
               f"has {value.numel():,} elements" if value.numel() > LARGEST else None)
    if problem:
        raise UserError(f"{source}: {key} {problem}; only ordinary tensors of floats, whole numbers or bools serve")
    value = value.detach()
    return value if value.layout == torch.strided else value.to_dense()


def _multiply_out(state: dict[str, Tensor], layers: Collection[str] | None,
                  say: Callable[[str], Any]) -> dict[str, Tensor]:
    """Biases and other parameters that have masks as plain parameters."""
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removesuffix("_orig")
        mask = state.get(f"{name}_mask")
        if name != key and mask is not None and mask.shape == value.shape and not is_maskable(key, value, layers):
            plain[name] = value * mask
    if plain:
        say(one_line("only Conv2d and Linear weights keep masks; these are applied once, and their zeros are trained "
                     f"again: {', '.join(plain)}"))
    masked = {f"{name}{suffix}" for name in plain for suffix in ("_orig", "_mask")}
    return {key: value for key, value in state.items() if key not in masked} | plain


def _complete_masks(state: dict[str, Tensor], layers: Collection[str] | None,
                    say: Callable[[str], Any]) -> dict[str, Tensor]:
    """Masks for layers without one: from exact zeros where there are many, else, if others have masks, all ones."""
    bare = {key: value for key, value in state.items() if _last(key) == "weight" and is_maskable(key, value, layers)}
    total = sum(value.numel() for value in bare.values())
    zeros = total - sum(int(value.count_nonzero()) for value in bare.values())
    sparse = zeros > SPARSE_FROM * total
    if not (sparse or has_mask_entries(state)):
        return state
    if sparse:
        say(f"{zeros:,} of {total:,} weights without a mask are exactly 0; they count as pruned and stay 0")
    complete: dict[str, Tensor] = {}
    for key, value in state.items():
        mask = (value != 0).to(value.dtype) if sparse else torch.ones_like(value)
        complete |= {f"{key}_orig": value, f"{key}_mask": mask} if key in bare else {key: value}
    return complete


def load_model_state(model: nn.Module, state_dict: Mapping[str, Tensor], source: str = "checkpoint") -> None:
    """Load a masked or a dense state dict, strictly; the model's masks are put on or removed to match.

    state_dict: also a checkpoint that holds one; `model_state` brings it into this project's form, and what it changed
    is said on stderr. Raises UserError, with the model unchanged, if an entry is missing, unexpected, of another shape
    or not finite, or a mask is not 0/1: it names `source` (a file, say) and the first few entries.
    """
    layers = prunable_layers(model, remove_duplicate=False)
    state = model_state(state_dict, source, layers, lambda text: note(f"{source}: {text}"))
    masked = has_mask_entries(state)
    _check_fit(_expected_shapes(model, masked), state, next(reversed(layers), ""), source)
    if bad := [key for key, value in state.items() if key.endswith("weight_mask") and not is_binary(value)]:
        raise UserError(f"{source} holds masks with values other than 0 and 1: {_first_few(bad)}")
    kind = next(model.parameters()).dtype
    if bad := [key for key, value in state.items() if not bool(value.to(kind).isfinite().all())]:
        raise UserError(f"{source} holds values that are not finite (NaN or infinite), nothing can come of it: "
                        f"{_first_few(bad)}")
    (add_masks if masked else remove_masks)(model)
    model.load_state_dict(state)
    for layer in layers.values() if masked else ():
        refresh_weight(layer)


def _expected_shapes(model: nn.Module, masked: bool) -> dict[str, torch.Size]:
    """Names and shapes of the model's state dict if it were masked, or dense; what can be pruned comes first."""
    weights, others = {}, {key: value.shape for key, value in model.state_dict().items()}
    for name, layer in prunable_layers(model, remove_duplicate=False).items():
        weight = f"{name}.weight" if name else "weight"
        for key in (weight, f"{weight}_orig", f"{weight}_mask"):
            others.pop(key, None)
        weights |= dict.fromkeys([f"{weight}_orig", f"{weight}_mask"] if masked else [weight], layer.weight.shape)
    return weights | others


def _check_fit(expected: Mapping[str, torch.Size], state: Mapping[str, Tensor], last_layer: str, source: str) -> None:
    """UserError unless a state dict has exactly the expected names and shapes."""
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    wrong = [key for key in expected if key in state and state[key].shape != expected[key]]
    if not (missing or unexpected or wrong):
        return
    classifier = [key for key in expected if key.rpartition(".")[0] == last_layer]
    if not (missing or unexpected) and wrong == classifier and all(
            state[key].shape[1:] == expected[key][1:] for key in wrong):
        raise UserError(f"{source} was trained on another data set: it tells {len(state[wrong[0]])} classes apart, and "
                        f"this data set has {expected[wrong[0]][0]}. Name its own with --dataset and --data_dir")
    guess = ", it looks like another model's" if 5 * len(missing + unexpected) > len(expected) else ""
    shapes = [f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key])}" for key in wrong]
    problems = {"missing": missing, "unexpected": unexpected, "wrong shape": shapes}
    raise UserError(f"{source} does not fit this model{guess}: " + "; ".join(
        f"{problem} {_first_few(entries)}" for problem, entries in problems.items() if entries))


def _first_few(entries: list[str]) -> str:
    return ", ".join(entries[:3]) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")
