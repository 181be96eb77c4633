"""The example of a dynamic method: what it swaps, and that the README shows the code that runs."""
from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments import dynamic_method
from tests.conftest import REPOSITORY
from utils.analysis_utils import clone_model, get_masks, set_masks
from utils.common import UserError
from utils.model_loader import model_loader
from utils.pruning import prune_to
from utils.training import Recipe, Trainer

RECIPE = Recipe("nesterov", lr=0.05, epochs=4, batch_size=32, weight_decay=5e-4)


def options(image_folder, tmp_path) -> list[str]:
    return ["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--device", "cpu",
            "--precision", "fp32", "--epochs", "1", "--update_every", "1"]


def test_the_smallest_go_and_as_many_others_come_at_zero():
    model = nn.Sequential(nn.Linear(6, 2, bias=False))
    set_masks(model, {"0": torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]])})
    with torch.no_grad():
        model[0].weight_orig.copy_(torch.tensor([[0.1, 5, 6, 7, 7, 7], [4, -0.2, 3, 7, 7, 7]]))
    held, before = [], get_masks(model)["0"]
    trainer = SimpleNamespace(step=2, total_steps=10, model=model, hold_pruned=held.append)
    hook = dynamic_method.Swap(every=2, share=1 / 3, seed=0)
    hook.on_step(trainer)
    mask = get_masks(model)["0"]
    assert mask[:, :3].tolist() == [[False, True, True], [True, False, True]] and int(mask.sum()) == 6
    assert torch.equal(held[0]["0"], mask & ~before)
    assert model[0].weight_orig[:, 3:][mask[:, 3:]].tolist() == [0.0, 0.0]
    set_masks(model, {"0": torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])})
    hook.on_step(trainer)  # a third of 11 would move, and one place is free
    mask = get_masks(model)["0"]
    assert int(mask.sum()) == 11 and bool(mask[0, 5])
    for step in (3, 8):  # not due; the last quarter
        trainer.step = step
        hook.on_step(trainer)
        assert torch.equal(get_masks(model)["0"], mask)


def test_a_resumed_training_ends_in_the_same_weights(small_cnn, tiny_loaders):
    """Also in the last quarter, where no swap comes to hold what is pruned by then."""
    prune_to(small_cnn, 200, "magnitude")
    start, ends = clone_model(small_cnn), []
    for interrupted in (False, True):
        model, hook = clone_model(start), dynamic_method.Swap(every=2, share=0.3, seed=0)
        trainer = Trainer(model, *tiny_loaders[:2], RECIPE, seed=0, hook=hook)
        if interrupted:
            states = []
            trainer.run(show=False, on_epoch=lambda one: states.append(copy.deepcopy(one.state_dict())))
            model = clone_model(start)
            trainer = Trainer(model, *tiny_loaders[:2], RECIPE, seed=0, hook=hook)
            trainer.load_state_dict(states[2])
        trainer.run(show=False)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_it_trains_to_the_sparsity_and_overwrites_nothing(image_folder, tmp_path, capsys):
    dynamic_method.main(options(image_folder, tmp_path))
    state = torch.load(tmp_path / "dynamic_method/resnet20.pth", weights_only=True)
    assert sum(int(value.sum()) for name, value in state.items() if name.endswith("_mask")) == 27090
    assert set(model_loader("resnet20").state_dict()) <= {name.removesuffix("_orig") for name in state}
    assert "at sparsity 0.9000" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists"):
        dynamic_method.main(options(image_folder, tmp_path))
    with pytest.raises(UserError, match="--sparsity 0.9999999 would leave 0"):
        dynamic_method.main([*options(image_folder, tmp_path / "other"), "--sparsity", "0.9999999"])


def test_the_readme_shows_this_code():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert inspect.getsource(dynamic_method.Swap.on_step).strip() in readme
