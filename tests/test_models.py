"""The eleven networks: layouts, sizes, gradients, memory format, initial weights."""
from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils.common import UserError
from utils.model_loader import check_image_size, model_loader
from utils.models import MODELS
from utils.models.densenet import DenseLayer
from utils.models.effnet import MBConv, mbconv_blocks
from utils.models.googlenet import INCEPTIONS, Inception
from utils.models.resnet import BasicBlock, cifar_resnet
from utils.models.shufflenetv2 import interleave

LAYOUTS = Path(__file__).resolve().parents[2] / "shared" / "compat" / "state_dict_layouts.json"

# Name: (trainable parameters, prunable weights, entries of the state dict), all for ten classes.
SIZES = {
    "resnet20": (272_474, 270_896, 128),
    "resnet32": (466_906, 464_432, 200),
    "resnet44": (661_338, 657_968, 272),
    "resnet56": (855_770, 851_504, 344),
    "resnet18": (11_173_962, 11_164_352, 122),
    "vgg16": (14_728_266, 14_715_584, 93),
    "alexnet": (2_261_834, 2_260_672, 12),
    "densenet": (6_956_298, 6_872_768, 722),
    "googlenet": (6_166_250, 6_142_528, 450),
    "effnet": (3_599_686, 3_550_816, 360),
    "shufflenetv2": (5_338_026, 5_304_600, 338),
}
# MBConv1 has no expansion (Tan and Le 2019, table 1), yet published checkpoints carry its weights.
UNUSED = {"effnet": {"layers.0.conv1.weight", "layers.0.bn1.weight", "layers.0.bn1.bias"}}

every_model = pytest.mark.parametrize("name", list(MODELS))


@cache
def built(name: str) -> nn.Module:
    """One network per name in evaluation mode, shared by the tests that do not change it."""
    return model_loader(name, seed=0).eval()


def images(count: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)


def watch(model: nn.Module, kinds: type | tuple, hook) -> None:
    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(hook)


def test_registry_names_in_order():
    assert list(MODELS) == list(SIZES)


@every_model
def test_published_layout(name):
    if not LAYOUTS.exists():
        pytest.skip(f"{LAYOUTS} is not here")
    layout = json.loads(LAYOUTS.read_text()).get(name)
    if layout is None:
        pytest.skip(f"{name} has no published layout")
    model = model_loader(name)
    assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == list(layout.items())
    state = {key: torch.full(shape, 2.0) for key, shape in layout.items()}
    model.load_state_dict(state, strict=True)
    assert all((value == 2).all() for value in model.state_dict().values())


@every_model
def test_sizes(name):
    model = built(name)
    parameters = sum(p.numel() for p in model.parameters())
    prunable = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    assert (parameters, prunable, len(model.state_dict())) == SIZES[name]


@every_model
def test_seven_classes(name):
    model = model_loader(name, num_classes=7).eval()
    with torch.no_grad():
        assert model(images()).shape == (2, 7)


@every_model
def test_larger_images(name):
    model = copy.deepcopy(built(name)).to("meta")
    assert all(model(torch.empty(1, 3, side, side, device="meta")).shape == (1, 10) for side in (33, 48, 64, 224))


def test_images_too_small_for_a_model_are_refused_by_name():
    for name, size, least in (("vgg16", 20, 32), ("densenet", 4, 8), ("alexnet", 14, 15)):
        with pytest.raises(UserError, match=f"--image_size {size}: {name} .* smallest it takes are {least}x{least}"):
            check_image_size(name, size)
        check_image_size(name, least)


@every_model
def test_channels_last_is_kept_and_changes_nothing(name):
    model = copy.deepcopy(built(name))
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    kept = []

    def hook(module, inputs, output):
        kept.append(inputs[0].stride(1) == 1)  # also true of half of the channels of a channels_last tensor

    watch(model, nn.Conv2d, hook)
    x = images()
    with torch.no_grad():
        logits = model(x)
        expected = plain(x.contiguous())
    assert logits.shape == (2, 10)
    assert len(kept) > 4
    assert all(kept)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


@every_model
def test_one_backward_pass_reaches_every_parameter(name):
    model = model_loader(name, seed=1)
    F.cross_entropy(model(images(4)), torch.tensor([0, 1, 2, 3])).backward()
    without = {key for key, p in model.named_parameters() if p.grad is None}
    assert without == UNUSED.get(name, set())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every_model
def test_hooks_see_a_layer_output_that_no_later_layer_overwrites(name):
    model = copy.deepcopy(built(name))
    seen = []
    watch(model, (nn.Conv2d, nn.Linear), lambda module, inputs, output: seen.append((output, output._version)))
    with torch.no_grad():
        model(images(1))
    assert seen
    assert all(output._version == version for output, version in seen)


@every_model
def test_bf16_autocast_stays_close(name):
    model = built(name)
    with torch.no_grad():
        expected = model(images())
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images())
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", ["resnet20", "alexnet", "shufflenetv2"])
def test_functional_call_and_deepcopy_agree_with_the_model(name):
    model, other = built(name), model_loader(name, seed=5).eval()
    with torch.no_grad():
        expected = model(images())
        assert torch.equal(copy.deepcopy(model)(images()), expected)
        assert not torch.allclose(other(images()), expected)
        assert torch.equal(torch.func.functional_call(other, model.state_dict(), images()), expected)


@pytest.mark.parametrize("name", ["resnet20", "alexnet"])
def test_vmapped_gradients_per_sample_agree_with_a_loop(name):
    model, x, y = built(name), images(3), torch.tensor([1, 5, 9])
    parameters = {key: p.detach() for key, p in model.named_parameters()}

    def loss(weights, image, label):
        return F.cross_entropy(torch.func.functional_call(model, weights, image[None]), label[None])

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    for i in range(len(x)):
        single = torch.func.grad(loss)(parameters, x[i], y[i])
        for key, value in single.items():
            torch.testing.assert_close(gradients[key][i], value, rtol=1e-3, atol=1e-4)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError) as error:
        model_loader("resnet21")
    assert "'resnet21'" in str(error.value)
    assert all(name in str(error.value) for name in MODELS)


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@every_model
def test_seed_fixes_the_weights_and_leaves_the_global_generator_alone(name):
    before = torch.get_rng_state()
    model = model_loader(name, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(model, built(name))
    assert model.training


def test_another_seed_gives_other_weights():
    assert not same_weights(built("resnet20"), model_loader("resnet20", seed=1))


def test_without_a_seed_the_global_generator_decides():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        first, second = model_loader("resnet20"), model_loader("resnet20")
        torch.default_generator.manual_seed(3)
        again = model_loader("resnet20")
    assert same_weights(first, again)
    assert not same_weights(first, second)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "vgg16"])
def test_kaiming_start(name):
    for module in built(name).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("depth", [0, 2, 18, 21])
def test_depth_that_is_no_cifar_resnet(depth):
    with pytest.raises(ValueError, match="6n"):
        cifar_resnet(depth, 10)


def test_basic_block_with_a_silent_branch_is_its_shortcut():
    block = BasicBlock(4, 4, 1).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.tensor([1.0, -2.0, 3.0, -4.0]).reshape(1, 4, 1, 1)
    assert block(x).flatten().tolist() == [1.0, 0.0, 3.0, 0.0]
    assert BasicBlock(4, 8, 2).eval()(torch.ones(1, 4, 6, 6)).shape == (1, 8, 3, 3)


def test_interleave_by_hand_and_as_a_channel_shuffle():
    left, right = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1), torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)
    assert interleave(left, right).flatten().tolist() == [1.0, 3.0, 2.0, 4.0]
    for seed in range(5):
        x = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(interleave(*x.chunk(2, dim=1)), F.channel_shuffle(x, 2))


def test_dense_layer_puts_new_maps_first():
    x = images()[:, :, :4, :4]
    out = DenseLayer(3).eval()(x)
    assert out.shape == (2, 35, 4, 4)
    assert torch.equal(out[:, 32:], x)


def test_inception_widths():
    assert Inception(3, *INCEPTIONS["a3"]).eval()(images()).shape == (2, 64 + 128 + 32 + 32, 32, 32)


def test_drop_connect_drops_whole_samples_and_keeps_the_expectation():
    block = MBConv(8, 8, 6, 3, 1, drop=0.5).eval()
    x = torch.randn(64, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        branch = block(x) - x
        block.training = True  # the normalisations stay in evaluation mode
        block.drop.train()
        added = block(x) - x
    kept = added.flatten(1).any(dim=1)
    assert 16 < kept.sum() < 48
    torch.testing.assert_close(added[kept], 2 * branch[kept])


def test_drop_connect_rises_linearly_from_zero():
    rates = [block.drop.p for block in mbconv_blocks()]
    assert rates == pytest.approx([0.2 * i / 16 for i in range(16)])
