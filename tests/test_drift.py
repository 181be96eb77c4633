"""SSIM drift: the maps by hand, parity with plain skimage, the fallback, and hooks that never stay."""
from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import nn

from utils.analysis_utils import (
    BlockwiseFeatureExtractor,
    clone_model,
    compute_block_ssim,
    map_similarity,
    normalised_maps,
    scale_to_unit,
)
from utils.data_loader import BatchLoader

LAYERS = ["0", "4", "8"]  # two convolutions (32x32 and 8x8 maps) and the Linear of `small_cnn`


def layer_drift(one: nn.Module, other: nn.Module, layers: list[str], loader: BatchLoader) -> dict[str, float]:
    return compute_block_ssim(*(BlockwiseFeatureExtractor(model, layers).extract(loader) for model in (one, other)))


def other_model(model: nn.Module, seed: int = 1) -> nn.Module:
    other, generator = clone_model(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return other


def test_normalised_maps_by_hand():
    output = torch.zeros(2, 2, 3, 3)
    output[0, 0, 0, 0], output[0, 1, 0, 1], output[0, 1, 2, 2] = 1.0, 2.0, -1.0
    maps = normalised_maps(output)
    # channel sums 1, 2, -1 with L1 norm 4; the second sample is all zeros and stays so
    assert maps.shape == (2, 3, 3)
    assert maps[0].flatten().tolist() == [0.25, 0.5, 0, 0, 0, 0, 0, 0, -0.25] and maps[1].abs().sum() == 0
    small = normalised_maps(torch.tensor([[[[1.0, 1.0]], [[2.0, 0.0]]]]))  # 1x2: channels stay apart
    assert small.tolist() == [[0.25, 0.25, 0.5, 0.0]]
    assert normalised_maps(torch.tensor([[3.0, -1.0]])).tolist() == [[0.75, -0.25]]


def test_scaling_and_constant_maps():
    assert scale_to_unit(np.array([1.0, 3.0, 2.0])).tolist() == [0.0, 1.0, 0.5]
    assert scale_to_unit(np.full((2, 2), 7.0)).tolist() == [[0, 0], [0, 0]]


def test_identical_models_score_exactly_one_on_every_layer(small_cnn, tiny_loaders):
    scores = layer_drift(small_cnn, clone_model(small_cnn), LAYERS, tiny_loaders[1])
    assert scores == dict.fromkeys(LAYERS, 1.0)


def test_parity_with_a_plain_skimage_computation(small_cnn, tiny_loaders):
    other, val = other_model(small_cnn), tiny_loaders[1]
    scores = layer_drift(small_cnn, other, LAYERS, val)
    inputs = torch.cat([batch for batch, _ in val])

    def plain_map(model: nn.Module, depth: int) -> np.ndarray:
        with torch.no_grad():
            maps = model.eval()[:depth](inputs).sum(1).double().numpy()
        mean = np.mean([m / np.abs(m).sum() for m in maps], axis=0)
        return (mean - mean.min()) / (mean.max() - mean.min())
    for name, depth in (("0", 1), ("4", 5)):
        expected = structural_similarity(plain_map(small_cnn, depth), plain_map(other, depth), data_range=1, win_size=7)
        assert scores[name] == pytest.approx(expected, abs=1e-5) and scores[name] < 1


@pytest.mark.parametrize("side, window", [(3, 3), (4, 3), (6, 5), (8, 7), (32, 7)])
def test_window_is_the_largest_odd_size_that_fits(side, window):
    random = np.random.RandomState(side)
    one, other = random.rand(side, side), random.rand(side, side)
    assert map_similarity(one, other) == structural_similarity(one, other, data_range=1, win_size=window)


def test_vector_fallback_by_hand():
    one, other = np.array([0.0, 1.0]), np.array([1.0, 0.0])
    # equal means 0.5, variances 0.25, covariance -0.25: (2*-0.25 + c2) / (0.5 + c2) with c2 = 0.0009
    assert map_similarity(one, other) == pytest.approx((-0.5 + 0.0009) / (0.5 + 0.0009))
    assert map_similarity(one, one) == 1.0


def test_more_damage_is_more_drift(small_cnn, tiny_loaders):
    mild, strong = clone_model(small_cnn), clone_model(small_cnn)
    with torch.no_grad():
        mild[0].weight.flatten()[:4] = 0
        strong[0].weight.flatten()[:150] = 0
    scores = [layer_drift(small_cnn, model, ["0"], tiny_loaders[1])["0"] for model in (mild, strong)]
    assert 1 > scores[0] > scores[1]


def test_batches_do_not_matter_only_images_do(small_cnn, tiny_loaders):
    val = tiny_loaders[1]
    maps = [BlockwiseFeatureExtractor(small_cnn, LAYERS).extract(val.with_batch_size(size)) for size in (7, 40)]
    for name in LAYERS:
        assert np.allclose(maps[0][name], maps[1][name], atol=1e-6)
    first = BlockwiseFeatureExtractor(small_cnn, LAYERS).extract(val.with_batch_size(8), max_batches=2)
    assert not np.allclose(first["0"], maps[0]["0"], atol=1e-6)


def test_hooks_are_removed_and_the_mode_restored_even_after_an_error(small_cnn):
    small_cnn.train()
    with pytest.raises(RuntimeError):
        BlockwiseFeatureExtractor(small_cnn, LAYERS).extract([(torch.zeros(1, 5, 32, 32), None)])
    assert small_cnn.training and all(not module._forward_hooks for module in small_cnn.modules())
    with pytest.raises(ValueError, match="no batch"):
        BlockwiseFeatureExtractor(small_cnn, LAYERS).extract([])


def test_a_layer_that_runs_at_several_resolutions_is_judged_by_its_first(tiny_loaders):
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, images):
            return self.head(images).mean((2, 3)) + self.head(images[:, :, ::2, ::2]).mean((2, 3))

    pyramid = Pyramid()
    plain = nn.Sequential(OrderedDict(head=pyramid.head))
    maps = [BlockwiseFeatureExtractor(model, ["head"]).extract(tiny_loaders[1])["head"] for model in (pyramid, plain)]
    assert maps[0].shape == (32, 32) and np.array_equal(*maps)


def test_unequal_layers_or_shapes_are_refused():
    with pytest.raises(ValueError, match="different layers"):
        compute_block_ssim({"a": np.zeros((3, 3))}, {"b": np.zeros((3, 3))})
    with pytest.raises(ValueError, match="cannot be compared"):
        map_similarity(np.zeros((3, 3)), np.zeros((4, 4)))
