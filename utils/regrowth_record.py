"""What a regrowth did, weight by weight: enough to undo it, to repeat it elsewhere, and to tell who is new."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.analysis_utils import prunable_layers
from utils.positions import Positions

# What a best allocation's entries beside the record are; the first six are the published ones. Kept in the file.
BEST_ENTRIES = {
    "epoch": "controller updates when the search ended, 0 without a search",
    "reward": "best validation accuracy (fraction) in the mini-finetuning of the best episode, None without a search",
    "accuracy": "val_acc_after_regrowth as a fraction: right after regrowth, before any finetuning",
    "allocation": "layer -> number of weights that returned",
    "regrow_indices": "layer -> flat (row-major) positions in the weight of those that returned, ascending",
    "timestamp": "local time of saving",
    "val_acc_after_regrowth": "validation accuracy (%) before finetuning, batch-norm statistics of the pruned model",
    "val_acc_after_regrowth_bn": "the same with batch-norm statistics re-estimated on augmented training batches",
}


class LayerRecord(NamedTuple):
    """The regrown weights of one layer, (n,) each, by ascending index."""

    indices: Tensor  # int64, flat (row-major) in the weight
    sources: Tensor  # uint8, which of `RegrowthRecord.source_names` chose it
    steps: Tensor  # int16, in which step it returned
    values: Tensor  # written to `weight_orig`
    previous: Tensor  # stood there before


def masked_layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Layers by name. Raises ValueError for one that the model does not have or that has no mask."""
    known = {name: layer for name, layer in prunable_layers(model).items() if hasattr(layer, "weight_mask")}
    names = list(names)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"the model has no masked layer {unknown[0]!r}; it has: {', '.join(known) or 'none'}")
    return {name: known[name] for name in names}


def write_weights(layer: nn.Module, positions: Positions, values: Tensor, active: bool) -> None:
    """Put values and mask of a masked layer at the positions; `weight` follows there, without being made anew."""
    positions.write(layer.weight_orig, values)
    positions.write(layer.weight_mask, float(active))
    positions.write(layer.weight, values * active)


@dataclass(frozen=True)
class RegrowthRecord:
    """What one or several regrowth steps did to a model."""

    layers: dict[str, LayerRecord]
    source_names: tuple[str, ...]  # what the codes in `LayerRecord.sources` stand for

    @property
    def allocation(self) -> dict[str, int]:
        """Layer name -> number of regrown weights."""
        return {name: len(layer.indices) for name, layer in self.layers.items()}

    @property
    def count(self) -> int:
        """Number of regrown weights."""
        return sum(self.allocation.values())

    def replay(self, model: nn.Module) -> None:
        """Regrow the same weights, with the same values, in another copy of the pruned model.

        Raises ValueError, with the model unchanged, if a layer is missing or a position is active already.
        """
        self._write(model, active=True)

    def undo(self, model: nn.Module) -> None:
        """Prune the regrown weights again and give `weight_orig` the values from before, bit for bit.

        Raises ValueError, with the model unchanged, if a layer is missing or a position is pruned already.
        """
        self._write(model, active=False)

    def _write(self, model: nn.Module, active: bool) -> None:
        layers = masked_layers(model, self.layers)
        positions = {name: self._positions(name, layer) for name, layer in layers.items()}
        for name, layer in layers.items():
            if (positions[name].read(layer.weight_mask) == active).any():
                raise ValueError(f"{name}: some recorded positions are {'active' if active else 'pruned'} already")
        for name, layer in layers.items():
            values = self.layers[name].values if active else self.layers[name].previous
            write_weights(layer, positions[name], values.to(layer.weight_orig), active)

    def _positions(self, name: str, layer: nn.Module) -> Positions:
        return Positions(self.layers[name].indices.to(layer.weight.device))

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """Every prunable layer's regrown positions: bool of the weight's shape, True where a weight returned."""
        layers = prunable_layers(model)
        masks = {name: torch.zeros_like(layer.weight, dtype=torch.bool) for name, layer in layers.items()}
        for name in self.layers:
            self._positions(name, layers[name]).write(masks[name], True)
        return masks

    def state_dict(self) -> dict[str, Any]:
        """Plain dicts, tensors and strings: `regrow_<column>`, layer name -> tensor, for each of `LayerRecord`."""
        columns = {f"regrow_{column}": {name: getattr(layer, column) for name, layer in self.layers.items()}
                   for column in LayerRecord._fields}
        return {**columns, "regrow_source_names": list(self.source_names)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RegrowthRecord:
        """The record back from `state_dict`; other entries are ignored. Raises ValueError if one is missing."""
        try:
            columns = [state[f"regrow_{column}"] for column in LayerRecord._fields]
            layers = {name: LayerRecord(*(column[name] for column in columns)) for name in columns[0]}
            return cls(layers, tuple(state["regrow_source_names"]))
        except KeyError as error:
            raise ValueError(f"not a regrowth record: {error} is missing") from error

    @classmethod
    def merge(cls, records: Sequence[RegrowthRecord]) -> RegrowthRecord:
        """One record, on the CPU, of one or several steps.

        Raises ValueError if there is none, two of them regrew the same weight or they name their sources differently.
        """
        if len({record.source_names for record in records}) != 1:
            raise ValueError("merge needs at least one record, and the same source names in all")
        names = dict.fromkeys(name for record in records for name in record.layers)
        parts = {name: [record.layers[name] for record in records if name in record.layers] for name in names}
        return cls({name: _joined(name, parts[name]) for name in names}, records[0].source_names)


def _joined(name: str, parts: list[LayerRecord]) -> LayerRecord:
    columns = [torch.cat([values.cpu() for values in column]) for column in zip(*parts, strict=True)]
    indices, order = columns[0].sort()
    if (indices[1:] == indices[:-1]).any():
        raise ValueError(f"{name}: two records regrew the same weight")
    return LayerRecord(*(column[order] for column in columns))
