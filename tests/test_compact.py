"""Compact networks: what is folded, what stays, and that the logits do not change."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils.analysis_utils import count_pruned_params, prunable_layers, set_masks
from utils.channels import edge_taps
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.common import RunFailed, UserError
from utils.compact import build, compact, content, largest_difference, network_of
from utils.datasets import load_dataset
from utils.model_loader import load_model_state, model_loader
from utils.models import MODELS
from utils.models.shufflenetv2 import DownUnit, Unit
from utils.pruning import weight_pruner_loader

BAR = 1e-5  # of the largest logit
SHIPPED = Path(__file__).resolve().parents[1] / "results/checkpoints/resnet20/ckpt_after_prune"


def images(count: int = 4, side: int = 32, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=dtype)


def unsettle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms that make constants nonzero, with statistics of images that have passed; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
            norm.bias.copy_(torch.randn(norm.num_features, generator=generator) * 0.3)
            norm.momentum = 1.0  # statistics of these images alone: with others the image would be lost on the way
        for layer in prunable_layers(model).values() if not norms else ():
            layer.weight_orig *= 6  # likewise: biases would outweigh it
        model.train()(images(8).to(next(model.parameters()).dtype))
    return model.eval()


def dependence(model: nn.Module, inputs: torch.Tensor) -> float:
    """How far the logits of the images lie apart, in units of the largest: what cannot be seen where it is small."""
    with torch.no_grad():
        logits = model(inputs)
    return float((logits - logits.mean(dim=0)).abs().max() / logits.abs().max())


def pruned(name: str, sparsity: float, pruner: str = "lamp", seed: int = 0) -> nn.Module:
    model = model_loader(name, seed=seed)
    weight_pruner_loader(pruner)(model, sparsity)
    return unsettle(model, seed)


def shapes(network: nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in network.state_dict().items()}


def weights_of(network: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in prunable_layers(network).values())


def dead_filters(padding: int, kernel: int = 3) -> nn.Module:
    """conv - relu - conv on 3 channels; filters 1 and 2 of the first read nothing and give relu(bias) = 2 and 4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, kernel, padding=padding),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].weight[1:3] = 0
        model[0].bias.copy_(torch.tensor([0.5, 2.0, 4.0, -0.5]))
    return model.double().eval()


def test_constants_go_into_the_bias_where_nothing_is_padded():
    model = dead_filters(padding=0)
    result = compact(model)
    assert shapes(result.network) == {"0.weight": [2, 3, 1, 1], "0.bias": [2], "2.weight": [2, 2, 3, 3], "2.bias": [2]}
    kernels = model[2].weight[:, 1:3].sum((2, 3))
    expected = model[2].bias + 2 * kernels[:, 0] + 4 * kernels[:, 1]
    torch.testing.assert_close(result.network.get_submodule("2").bias, expected.detach())


def test_constants_over_padding_become_one_channel():
    model = dead_filters(padding=1)
    result = compact(model)
    assert shapes(result.network)["2.weight"] == [2, 3, 3, 3]
    merged = (2 * model[2].weight[:, 1] + 4 * model[2].weight[:, 2]) / 4  # the one of 4 stays
    weight = result.network.get_submodule("2").weight
    assert any(torch.allclose(weight[:, column], merged.detach()) for column in range(3))
    assert torch.equal(result.network.get_submodule("2").bias, model[2].bias)
    assert largest_difference(model, result.network, images(dtype=torch.float64)) < 1e-14


def test_constants_over_padding_that_no_weight_sees_go_into_the_bias():
    model = dead_filters(padding=1)
    with torch.no_grad():
        centre = torch.zeros(3, 3)
        centre[1, 1] = 1  # it never reads the padding
        model[2].weight[:, 1:3] *= centre
    result = compact(model)
    assert shapes(result.network)["2.weight"] == [2, 2, 3, 3]
    assert largest_difference(model, result.network, images(dtype=torch.float64)) < 1e-14


def test_taps_that_read_padding_by_hand():
    assert edge_taps(nn.Conv2d(1, 1, 3, padding=1)).tolist() == [[True] * 3, [True, False, True], [True] * 3]
    assert edge_taps(nn.Conv2d(1, 1, 3, padding=(0, 1))).tolist() == [[True, False, True]] * 3
    assert not edge_taps(nn.Conv2d(1, 1, 3)).any()
    assert not edge_taps(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")).any()
    assert edge_taps(nn.Conv2d(1, 1, 5, padding=2, dilation=2))[2:3].tolist() == [[True, False, False, False, True]]
    assert edge_taps(nn.Conv2d(1, 1, 3, padding="same")).all()
    assert not edge_taps(nn.Conv2d(1, 1, 3, padding="valid")).any()


def test_what_no_later_layer_reads_goes():
    model = dead_filters(padding=0)
    with torch.no_grad():
        model[2].weight[:, 3] = 0
    result = compact(model)
    assert shapes(result.network)["0.weight"] == [1, 3, 1, 1]
    assert shapes(result.network)["2.weight"] == [2, 1, 3, 3] and weights_of(result.network) == 3 + 18


def test_a_dead_branch_becomes_a_vector():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.stem(x)
            return F.relu(self.norm(self.branch(x)) + x).mean((2, 3))

    model = Residual()
    set_masks(model, {"branch": torch.zeros(4, 4, 3, 3)})
    unsettle(model)
    result = compact(model)
    assert [step["kind"] for step in result.steps] == ["input", "conv", "constant", "add", "relu", "mean", "output"]
    assert largest_difference(model, result.network, images()) < BAR


class Gated(nn.Module):
    """Maps that no weight joins to the image, times a gate of one pixel that depends on it, under a padded filter."""

    def __init__(self, groups: int, gate_first: bool):
        super().__init__()
        self.stem, self.branch, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.gate, self.after = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.gate_first = gate_first

    def forward(self, x):
        x = self.stem(x)
        x, gate = F.silu(self.norm(self.branch(x))), self.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid()
        return self.after(gate * x if self.gate_first else x * gate).mean((2, 3))


@pytest.mark.parametrize("traced", [32, 1])  # in an image of one pixel, maps look like gates
@pytest.mark.parametrize("gate", ["varies", "constant"])
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("groups", [8, 4, 1])
def test_a_constant_under_a_gate_keeps_the_size_of_its_map(groups, gate_first, gate, traced):
    torch.manual_seed(0)
    model = Gated(groups, gate_first)
    with torch.no_grad():
        model.stem.weight *= 9
    set_masks(model, {name: torch.zeros(8, 8, 3, 3) if name == "branch" else
                      torch.full_like(layer.weight, name != "gate" or gate == "varies")
                      for name, layer in prunable_layers(model).items()})
    unsettle(model.double())
    result = compact(model, traced)
    for side in (1, 8, 32):
        assert largest_difference(model, result.network, images(4, side, torch.float64)) < 1e-12
    assert (dependence(model, images(4, 8, torch.float64)) > 1e-3) == (gate == "varies")


def test_a_constant_beside_a_map_is_still_a_vector():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.gate = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.stem(x)
            return (self.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid() * x).mean((2, 3))

    model = Scaled()
    set_masks(model, {"stem": torch.ones(4, 3, 1, 1), "gate": torch.zeros(4, 4, 1, 1)})
    result = compact(model)
    assert [step["kind"] for step in result.steps] == ["input", "conv", "constant", "mul", "mean", "output"]
    assert largest_difference(model, result.network, images()) < BAR


def random_blocks(seed: int) -> nn.Module:
    """A network with everything in it: residual, concatenation, slices, shuffle, depthwise, gates, grouped, pools."""
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.same, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.down, self.unit = DownUnit(16, 24), Unit(24)
            self.gate, self.grouped = nn.Conv2d(24, 24, 1), nn.Conv2d(24, 12, 3, groups=3)
            self.valid, self.pool = nn.Conv2d(12, 8, 3, stride=2), nn.MaxPool2d(2, padding=1)
            self.average, self.linear = nn.AvgPool2d(2, padding=1), nn.Linear(8 * 4, 5)

        def forward(self, x):
            x = self.pool(F.silu(self.bn(self.stem(x))))
            x = torch.cat([F.relu(self.bn1(self.same(x)) + x), x], 1)
            x = self.unit(self.down(x))
            x = self.grouped(x * self.gate(F.adaptive_avg_pool2d(x, 1)).sigmoid())
            x = self.average(torch.tanh(self.valid(x)))[:, :8]
            return self.linear(F.adaptive_avg_pool2d(x, (2, 2)).flatten(1))

    torch.manual_seed(seed)
    model = Blocks()
    density = (0.02, 0.05, 0.1, 0.3)[seed % 4]
    set_masks(model, {key: torch.rand(layer.weight.shape) < density for key, layer in prunable_layers(model).items()})
    return unsettle(model, seed)


@pytest.mark.parametrize("seed", range(24))
def test_random_masks_on_blocks_of_every_kind(seed):
    model = random_blocks(seed).double()
    result = compact(model)
    left = weights_of(result.network)
    assert left < count_pruned_params(model).total
    for side in (32, 37):  # of both parities, so that a stride ends at the border or before it
        inputs = images(2, side, torch.float64)
        assert largest_difference(model, result.network, inputs) < 1e-9
        assert seed % 4 < 2 or dependence(model, inputs) > 1e-4  # so few weights may leave no path for the image


@pytest.mark.parametrize("name, sparsity", [*((name, 0.99) for name in MODELS), ("resnet20", 0.9), ("alexnet", 0.999),
                                            ("shufflenetv2", 0.9)])
def test_logits_of_every_model(name, sparsity):
    model = pruned(name, sparsity)
    result = compact(model)
    assert largest_difference(model, result.network, images()) < BAR < dependence(model, images()) / 1000
    assert weights_of(result.network) <= count_pruned_params(model).total


@pytest.mark.parametrize("pruner", ["random", "lamp"])
def test_a_network_that_ignores_its_image_still_gives_its_logits(pruner):
    model = pruned("resnet20", 0.999, pruner)
    result = compact(model)
    assert dependence(model, images()) == 0
    assert largest_difference(model, result.network, images()) < BAR
    assert weights_of(result.network) < 1000


def test_the_shipped_model_on_real_images():
    model = model_loader("resnet20")
    load_model_state(model, load_checkpoint(SHIPPED / "pruned_finetuned_mask_0.99.pth"))
    result = compact(model)
    known = json.loads((SHIPPED / "pruned_finetuned_mask_0.99.json").read_text())["input"]
    pixels = torch.from_numpy(load_dataset("photos", Path()).test_images[:64]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(known[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    assert largest_difference(model, result.network, (pixels - mean) / std) < BAR
    assert weights_of(result.network) == 95_709


def test_a_file_gives_the_same_network(tmp_path):
    result = compact(random_blocks(2))
    save_checkpoint(content(result.steps, result.network.state_dict(), model="blocks"), tmp_path / "compact.pth")
    again = network_of(torch.load(tmp_path / "compact.pth", weights_only=True))
    assert torch.equal(again(images()), result.network(images()))


def test_the_model_is_left_as_it_is():
    model = random_blocks(0).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    compact(model)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_its_operations_do_not_show_is_noticed():
    class Aliasing(nn.Module):
        def forward(self, x):
            out = x + x
            F.relu(out, inplace=True)  # changes what is returned
            return out

    with pytest.raises(RunFailed, match="differ"):
        compact(nn.Sequential(nn.Conv2d(3, 2, 1), Aliasing(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def damaged(steps, change):
    steps = [{**step, "options": dict(step["options"])} for step in steps]
    change(steps)
    return steps


@pytest.mark.parametrize("change", [
    lambda steps: steps[1].update(kind="system"),
    lambda steps: steps[1]["options"].update(out_channels=10**12),
    lambda steps: steps[1]["options"].update(device="cpu"),
    lambda steps: steps[2].update(inputs=["nothing"]),
    lambda steps: steps.pop(1),
    lambda steps: steps[1].pop("options"),
    lambda steps: steps[1].update(name=None),
    lambda steps: steps[1].update(name="x): raise SystemExit #"),
    lambda steps: steps[2]["options"].update({"inplace=exit(), b": 1}),
    lambda steps: steps[2]["options"].update(inplace="exit()"),
])
def test_a_damaged_description_is_refused(change):
    result = compact(dead_filters(padding=0))
    with pytest.raises(UserError, match="damaged"):
        build(damaged(result.steps, change), dict(result.network.state_dict()))


def test_another_version_is_refused():
    with pytest.raises(UserError, match="compact network 2"):
        network_of({"format": "compact network 2"})
