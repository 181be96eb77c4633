"""A network from its description and back: what `utils.compact` writes, as plain data that any loader can check.

A description is a list of steps, dicts of plain values, in the order in which they run:

    {"name": "layer1.0.conv1", "kind": "conv", "inputs": ["relu"], "options": {"in_channels": 9, ...}}

`name` is what later steps call the result by, and where its tensors lie in the state dict. Kinds are those of
`utils.channels.KINDS`, and `take` (some channels, in some order), `cat`, `constant`, `flatten`, `input`, `output`. It
becomes a `torch.fx.GraphModule`: an ordinary module, that prints its code and that every exporter takes.
"""
from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from utils.channels import POINTWISE, POOLS, WEIGHTED
from utils.checkpoint import load_checkpoint
from utils.common import UserError

Step = dict[str, Any]
FORMAT = "compact network 1"
MODULES = {kind: module for module, kind in WEIGHTED.items()}
FUNCTIONS = {kind: functions[0] for kind, functions in POINTWISE.items()}
FUNCTIONS |= {kind: functions[0] for kind, (functions, _) in POOLS.items()}
NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)
PADDINGS = ("same", "valid", "zeros", "reflect", "replicate", "circular")
FRESH = ("conv", "batch_norm", "add", "mul")  # kinds whose result nobody else holds, to be overwritten by an activation


def build(steps: Sequence[Step], state: Mapping[str, Tensor]) -> fx.GraphModule:
    """The network of a description, in evaluation mode, with the tensors of `state`, which it shares.

    It maps images (B, 3, S, S) to logits. Raises UserError for a description that is not one, or a state dict that does
    not fit it, before anything is allocated. PyTorch turns a graph into Python code and runs that: names and options
    are checked first.
    """
    try:
        graph, root = _graph(steps, state)
        network = fx.GraphModule(root, graph)
        network.load_state_dict(state, assign=True)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError,
            SyntaxError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"this is not the description of a compact network, or it is damaged: {reason}") from error
    return network.eval().to(memory_format=torch.channels_last)


def _graph(steps: Sequence[Step], state: Mapping[str, Tensor]) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph of all steps, and what it calls or reads by name; the modules hold no memory yet."""
    graph, root, nodes = fx.Graph(), {}, {}
    users = [name for step in steps for name in step["inputs"]]
    kinds = {step["name"]: step["kind"] for step in steps}
    for step in steps:
        _check(step)
        name, kind, options = step["name"], step["kind"], dict(step["options"])
        inputs = [nodes[source] for source in step["inputs"]]
        if kind == "input":
            nodes[name] = graph.placeholder("images")
        elif kind == "output":
            graph.output(*inputs)
        elif kind in MODULES:
            root[name] = MODULES[kind](**options, device="meta")
            nodes[name] = graph.call_module(name, tuple(inputs))
        elif kind == "constant":
            root[name] = state[name]
            nodes[name] = graph.get_attr(name)
        elif kind == "take":
            nodes[name] = _take(graph, root, name, *inputs, options, state)
        elif kind == "cat":
            nodes[name] = graph.call_function(torch.cat, (inputs,), {"dim": 1})
        elif kind == "flatten":
            nodes[name] = graph.call_function(torch.flatten, tuple(inputs), {"start_dim": 1})
        else:
            source = step["inputs"][0]
            if kind in ("relu", "relu6", "silu") and users.count(source) == 1 and kinds[source] in FRESH:
                options["inplace"] = True
            nodes[name] = graph.call_function(FUNCTIONS[kind], tuple(inputs), options)
    return graph, root


def _check(step: Step) -> None:
    """ValueError unless name and options are no more than names and plain values."""
    names = [step["name"], *step["options"]]
    if bad := [name for name in names if not isinstance(name, str) or not NAME.fullmatch(name)]:
        raise ValueError(f"{bad[0]!r} is no name")
    for value in step["options"].values():
        parts = value if isinstance(value, (tuple, list)) else [value]
        if not all(part is None or type(part) in (int, float, bool) or part in PADDINGS for part in parts):
            raise ValueError(f"step {step['name']} has an option {value!r}")


def _take(graph: fx.Graph, root: dict[str, Any], name: str, source: fx.Node, options: Mapping[str, int],
          state: Mapping[str, Tensor]) -> fx.Node:
    """Neighbouring channels in their order, as a view, or else those that the state dict lists."""
    if "start" in options:
        part = slice(options["start"], options["start"] + options["length"])
        return graph.call_function(operator.getitem, (source, (slice(None), part)))
    root[name] = state[name]
    return graph.call_function(torch.index_select, (source, 1, graph.get_attr(name)))


def content(steps: Sequence[Step], state: Mapping[str, Tensor], **facts: Any) -> dict[str, Any]:
    """What a file of a compact network holds: format, facts (plain values), description, state dict."""
    return {"format": FORMAT, **facts, "steps": list(steps), "state_dict": dict(state)}


def is_compact(loaded: Any) -> bool:
    """Whether a loaded checkpoint is a compact network, of this version or another."""
    return isinstance(loaded, Mapping) and str(loaded.get("format", "")).startswith(FORMAT.rpartition(" ")[0])


def load_network(path: Path) -> fx.GraphModule:
    """The network in a file that `inspect_checkpoint.py --compact --export dense` wrote, in evaluation mode.

    UserError for any other file; nothing in it is executed.
    """
    loaded = load_checkpoint(path)
    if not is_compact(loaded):
        raise UserError(f"{path} is no compact network; inspect_checkpoint.py --compact --export dense makes one")
    return network_of(loaded)


def network_of(loaded: Mapping[str, Any]) -> fx.GraphModule:
    """The network in a loaded file. UserError if it is of another version, or damaged."""
    if loaded["format"] != FORMAT:
        raise UserError(f"this is a {loaded['format']!r}, and this version reads {FORMAT!r}")
    return build(loaded.get("steps", ()), loaded.get("state_dict", {}))
