"""`--size_budget`: the size of the sparse file decides how many weights survive."""
from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from torch import nn

import main as main_script
from utils import checkpoint, export, stage1
from utils.analysis_utils import clone_model, count_pruned_params, prunable_layers, set_masks
from utils.common import RunFailed, UserError
from utils.model_loader import model_loader
from utils.pruning import PRUNERS, prune_to
from utils.sparse_file import encode

N = 270_896  # prunable weights of resnet20


@pytest.mark.parametrize("text, expected", [
    ("64KB", 64_000), ("64KiB", 65_536), ("1.2MB", 1_200_000), ("1 MiB", 1_048_576), ("0.5KiB", 512)])
def test_sizes_and_their_units(text, expected):
    assert export.byte_size(text) == expected


@pytest.mark.parametrize("text", ["64", "64kb", "64 GB", "0KB", "-3KB", "KB", "nanKB", "1e3KB", "6,4KB", "0.0001KB"])
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="KB, KiB, MB, MiB"):
        export.byte_size(text)


def masked(model: nn.Module, keep: int, spread: str, seed: int) -> nn.Module:
    """`keep` weights survive: anywhere, in the first layers, the last of each layer, or as far apart as they can be."""
    model, dice = clone_model(model), torch.Generator().manual_seed(seed)
    sizes = {name: layer.weight.numel() for name, layer in prunable_layers(model).items()}
    total = sum(sizes.values())
    chosen = {"random": torch.randperm(total, generator=dice)[:keep], "first": torch.arange(keep),
              "last": torch.arange(total - keep, total), "apart": torch.arange(keep) * total // keep}[spread]
    flat = torch.zeros(total)
    flat[chosen] = 1
    parts = flat.split(list(sizes.values()))
    set_masks(model, {name: part.view(layer.weight.shape)
                      for part, (name, layer) in zip(parts, prunable_layers(model).items())})
    return model


@pytest.mark.parametrize("spread", ["random", "first", "last", "apart"])
@pytest.mark.parametrize("name", ["resnet20", "alexnet"])
def test_no_mask_takes_more_than_the_worst(name, spread):
    model = model_loader(name, seed=0)
    total, size_of = count_pruned_params(model).total, export.worst_sizes(model)
    for seed, share in enumerate((1 / total, 0.0007, 0.01, 0.05, 0.3)):
        keep = round(share * total)
        size = len(encode(masked(model, keep, spread, seed).state_dict()))
        assert size <= size_of(keep)
        assert spread != "random" or share < 0.01 or size_of(keep) <= 1.04 * size


@pytest.mark.parametrize("pruner", ["magnitude", "unifplus", "lamp"])
def test_impossible_budgets_are_refused_with_the_smallest_that_works(pruner):
    model = model_loader("resnet20", seed=0)
    with pytest.raises(UserError, match="smallest budget that works is") as caught:
        export.safe_sparsity(model, pruner, 5_000)
    smallest = export.byte_size(str(caught.value).split("works is ")[1].split(",")[0])
    keep = round((1 - export.safe_sparsity(model, pruner, smallest)) * N)
    least = 432 + 128 if pruner == "unifplus" else 1  # all of the first layer, a fifth of the last
    assert least <= keep <= least + 25
    with pytest.raises(UserError, match="smallest budget"):
        export.safe_sparsity(model, pruner, smallest - 101)


def test_a_budget_that_holds_everything_is_refused():
    with pytest.raises(UserError, match="hold all 270,896 weights; there is nothing to prune"):
        export.safe_sparsity(model_loader("resnet20", seed=0), "magnitude", 2_000_000)


# --- from the command line -----------------------------------------------------------------------------------------


@pytest.fixture
def words(image_folder, tmp_path) -> list[str]:
    """Options that make a run of main.py take a second."""
    return ["--m_name", "resnet20", "--max_epochs", "1", "--finetune_epochs", "0", "--batch_size", "32", "--device",
            "cpu", "--precision", "fp32", "--data_dir", str(image_folder), "--root", str(tmp_path)]


def compact_file(root: Path) -> Path:
    (path,) = (root / "resnet20" / "ckpt_after_prune").glob("*.sparse")
    return path


@pytest.mark.parametrize("pruner", ["magnitude", "random", "snip"])
def test_one_weight_more_would_not_fit(pruner, words, tmp_path, capsys):
    main_script.main([*words, "--size_budget", "64KB", "--pruner", pruner])
    path = compact_file(tmp_path)
    size = path.stat().st_size
    assert 63_980 <= size <= 64_000 and f"{path}: {size:,} bytes of 64,000" in capsys.readouterr().out
    pruned = checkpoint.load_checkpoint(path.with_suffix(".pth"))
    assert len(encode(pruned)) == size
    survivors = sum(int(value.sum()) for key, value in pruned.items() if key.endswith("_mask"))
    card = checkpoint.read_card(path)
    assert card["surviving"] == survivors and "test_acc" in card
    assert round((1 - card["config"]["sparsity"]) * N) == survivors
    if pruner == "magnitude":  # what else decides is made by the run
        model = model_loader("resnet20", seed=0)
        model.load_state_dict(checkpoint.load_checkpoint(checkpoint.dense_path(tmp_path, "resnet20"))["net"])
        prune_to(model, survivors + 1, pruner)
        assert len(encode(model.state_dict())) > 64_000
    before = path.read_bytes()
    main_script.main([*words, "--size_budget", "64KB", "--pruner", pruner, "--resume"])
    assert capsys.readouterr().out.count("reusing") == 2 and path.read_bytes() == before


@pytest.mark.parametrize("more", [["--mask_schedule", "granet", "--finetune_epochs", "1"], ["--iter_end", "3"]])
def test_where_positions_are_unknown_beforehand_the_budget_holds_too(more, words, tmp_path):
    main_script.main([*words, "--size_budget", "40KiB", *more])
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.sparse")]
    assert len(sizes) == 1 and 0.94 * 40_960 <= sizes[0] <= 40_960


@pytest.mark.parametrize("more, said", [
    (["--sparsity", "0.9"], "leave out --sparsity"),
    (["--amount", "0.4"], "leave out --amount"),
    (["--pruner", "none"], "leave out --pruner none"),
    (["--pruner", "magnitude"], "the smallest budget that works is"),
])
def test_what_cannot_be_is_refused_before_anything_is_trained(more, said, words, tmp_path):
    with pytest.raises(UserError, match=said):
        main_script.main([*words, "--size_budget", "3KB", *more])
    assert not list(tmp_path.rglob("*.pth"))


def test_a_model_that_was_there_already_and_is_too_large_fails_by_name(words, tmp_path):
    main_script.main([*words, "--sparsity", "0.9"])
    artifact = checkpoint.pruned_path(tmp_path, "resnet20", 0.9)
    outcome = stage1.Outcome(model_loader("resnet20", seed=0), artifact, {})
    with pytest.raises(RunFailed, match="more than the budget of 64,000"):
        export.write_within(outcome, 64_000)


def test_every_pruner_has_its_fewest_weights():
    model = model_loader("resnet20", seed=0)
    fewest = {name: export._fewest(model, name) for name in PRUNERS}
    assert fewest.pop("unifplus") == 560 and set(fewest.values()) == {1}
