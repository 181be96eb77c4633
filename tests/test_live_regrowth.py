"""Regrowth where weights are on a live path only."""
from __future__ import annotations

import pytest
import torch
from torch import nn

from utils.analysis_utils import set_masks
from utils.channels import count_live
from utils.regrowth import Evidence, WeightRegrowth, free_positions, layer_capacities


def net() -> nn.Module:
    """3 means -> 3 hidden -> 2 outputs: hidden 0 reads nothing, nobody reads hidden 1, hidden 2 is on a path."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    set_masks(model, {"2": torch.tensor([[0, 0, 0], [1, 1, 0], [0, 1, 0]]), "4": torch.tensor([[1, 0, 0], [0, 0, 1]])})
    return model


def test_capacities_by_hand():
    model = net()
    assert layer_capacities(model, ["2", "4"]) == {"2": 6, "4": 4}
    # into hidden 0 (3) and 2 (2), which are read; from hidden 1 (2) and 2 (1), which depend on the image
    assert layer_capacities(model, ["2", "4"], only_live=True) == {"2": 5, "4": 3}
    assert free_positions(model, ["4"], only_live=True)["4"].tolist() == [[False, True, True], [False, True, False]]


@pytest.mark.parametrize("rule", ["saliency", "random", "magnitude"])
def test_every_weight_that_returns_is_on_a_live_path(rule):
    for seed in range(5):
        model = net()
        # the dead weight of hidden 1 from input 2 ranks first
        saliency = {"2": torch.tensor([[1.0, 2, 3], [4, 5, 99], [6, 7, 8]]), "4": torch.rand(2, 3)}
        regrower = WeightRegrowth(model, rule, Evidence(saliency=saliency), seed=seed, only_live=True)
        record = regrower.apply_regrowth({"2": 4, "4": 2})
        assert record.count == 6 == count_live(model, record.masks(model))
        assert rule != "saliency" or record.layers["2"].indices.tolist() == [1, 2, 6, 8]


def test_a_rule_that_looks_at_masks_sees_the_true_ones():
    """A filter without weights has norm 0, whatever is stored at its pruned positions, dead ones included."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.1, 0, 0], [0, 0, 10.0]]).view(2, 3, 1, 1))
    set_masks(model, {"0": torch.tensor([[1, 0, 0], [0, 0, 0]]).view(2, 3, 1, 1), "3": torch.ones(2, 2)})
    ones = {"0": torch.ones(2, 3, 1, 1)}
    for only_live in (False, True):
        regrower = WeightRegrowth(model, "relative_gradient", Evidence(gradient=ones), only_live=only_live)
        chosen = regrower.select({"0": 1})
        assert chosen["0"][0].tolist() == [1]


def test_more_than_can_live_is_refused():
    model = net()
    with pytest.raises(ValueError, match="4 weights cannot return, its capacity is 3"):
        WeightRegrowth(model, "random", Evidence(), only_live=True).apply_regrowth({"4": 4})
    assert layer_capacities(model, ["4"]) == {"4": 4}
