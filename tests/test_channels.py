"""Channels followed through networks, and effective sparsity."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils.analysis_utils import count_pruned_params, prunable_layers, set_masks
from utils.channels import effective_sparsity, live_positions, positions, trace
from utils.common import UserError
from utils.model_loader import model_loader
from utils.models import MODELS


class Function(nn.Module):
    """A model of one function of the image."""

    def __init__(self, function, **children: nn.Module):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)


def reads_of(function, **children: nn.Module) -> list[list[int]]:
    """What the model's output reads; the image's channels are 0, 1 and 2."""
    return [operand.tolist() for operand in trace(Function(function, **children))[-1].reads]


def test_channels_are_followed_through_what_moves_them():
    assert reads_of(lambda m, x: torch.cat([x[:, 1:], x], 1)) == [[1, 2, 0, 1, 2]]
    assert reads_of(lambda m, x: torch.stack([x, x], 2).flatten(1, 2)) == [[0, 0, 1, 1, 2, 2]]
    assert reads_of(lambda m, x: F.channel_shuffle(torch.cat([x, x], 1), 2)) == [[0, 0, 1, 1, 2, 2]]
    assert reads_of(lambda m, x: x.chunk(3, 1)[2]) == [[2]]
    assert reads_of(lambda m, x: x.view(x.size(0), 3, 1, 32, 32).transpose(1, 2).reshape(x.size(0), 3, 32, 32)) == [
        [0, 1, 2]]


def test_computing_starts_new_channels():
    layers = trace(Function(lambda m, x: F.relu(m.conv(x)),
                            conv=nn.Conv2d(3, 2, 1)))
    assert [(layer.kind, layer.first, layer.channels) for layer in layers] == [
        ("input", 0, 3), ("conv", 3, 2), ("relu", 5, 2), ("output", 7, 2)]
    assert layers[2].reads[0].tolist() == [3, 4]


def test_features_of_maps_are_grouped_by_channel():
    layers = trace(Function(lambda m, x: m.pool(x).flatten(1), pool=nn.AdaptiveAvgPool2d(2)))
    assert [(layer.kind, layer.channels) for layer in layers] == [
        ("input", 3), ("adaptive_avg_pool", 3), ("flatten", 12), ("output", 12)]


def test_positions_of_grouped_weights():
    conv = nn.Conv2d(4, 4, 1, groups=2)
    layers = trace(Function(lambda m, x: m.conv(torch.cat([x, x[:, :1]], 1)), conv=conv))
    assert positions(layers[1]).tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize("function, word", [
    (lambda m, x: x.softmax(1), "softmax"),
    (lambda m, x: x * 0.5, "mul"),
    (lambda m, x: x.transpose(2, 3) + x, "whole channels"),
    (lambda m, x: F.relu(x[:, :, 2:]), "whole channels"),
    (lambda m, x: x.permute(0, 2, 3, 1).flatten(1), "whole channels"),
    (lambda m, x: x[:, :, 0, 0], "order"),
    (lambda m, x: x.mean(1), "mean"),
    (lambda m, x: x if x.sum() > 0 else -x, "traced"),
])
def test_what_cannot_be_followed_is_named(function, word):
    with pytest.raises(UserError, match=word):
        trace(Function(function))


def linear_net(first: list[list[int]], second: list[list[int]]) -> nn.Module:
    """3 means -> hidden -> outputs, with these masks."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, len(first)), nn.ReLU(),
                          nn.Linear(len(first), len(second)))
    set_masks(model, {"2": torch.tensor(first), "4": torch.tensor(second)})
    return model


def test_effective_sparsity_by_hand():
    # hidden 0 reads nothing but is read; hidden 1 reads but nobody reads it; hidden 2 is on a path
    model = linear_net([[0, 0, 0], [1, 1, 0], [0, 1, 0]], [[1, 0, 0], [0, 0, 1]])
    assert count_pruned_params(model).sparsity == pytest.approx(1 - 5 / 15)
    assert effective_sparsity(model) == pytest.approx(1 - 2 / 15)
    live = live_positions(model)
    assert live["2"].tolist() == [[True] * 3, [False] * 3, [True] * 3]
    assert live["4"].tolist() == [[False, True, True]] * 2


def test_a_weight_at_zero_that_is_active_is_effective():
    model = linear_net([[1, 0, 0]], [[1]])
    nn.init.zeros_(model[2].weight_orig)
    assert effective_sparsity(model) == pytest.approx(1 - 2 / 4)


@pytest.mark.parametrize("name", MODELS)
def test_a_dense_model_has_no_dead_weight_but_what_never_runs(name):
    unused = 32 * 32 if name == "effnet" else 0  # layers.0.conv1
    model = model_loader(name, seed=0)
    total = sum(layer.weight.numel() for layer in prunable_layers(model).values())
    assert effective_sparsity(model) == pytest.approx(unused / total, abs=1e-12)


@pytest.mark.parametrize("name, density", [("resnet20", 0.02), ("shufflenetv2", 0.1)])
def test_live_weights_are_those_with_a_gradient_where_everything_is_positive(name, density):
    """With positive weights and images nothing cancels: a weight has a gradient if and only if a path runs through."""
    generator = torch.Generator().manual_seed(3)
    model = model_loader(name, seed=0).double().eval()
    masks = {key: torch.rand(layer.weight.shape, generator=generator) < density
             for key, layer in prunable_layers(model).items()}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(1 - module.eps)
    for layer in prunable_layers(model).values():
        nn.init.constant_(layer.weight, 1.0)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    set_masks(model, masks)
    model(torch.ones(1, 3, 32, 32, dtype=torch.float64)).sum().backward()
    live = live_positions(model)
    found = {key: live[key] & masks[key] for key in masks}
    assert 0 < sum(int(value.sum()) for value in found.values()) < sum(int(mask.sum()) for mask in masks.values())
    for key, layer in prunable_layers(model).items():
        assert torch.equal(found[key], layer.weight_orig.grad > 0), key


def test_the_model_is_left_as_it_is():
    model = linear_net([[1, 0, 0]], [[1]]).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    effective_sparsity(model)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
