"""The two stage-2 scripts as a user runs them: artifacts, exact sparsity, search and resume, wrong input."""
from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main as main_script
import rl_regrowth_nas
import rl_saliency_regrowth
from tests.conftest import REPOSITORY, assert_user_error, heed_sigint, run_here
from utils import checkpoint, stage2
from utils.allocation import ALLOCATORS
from utils.analysis_utils import get_masks, set_masks
from utils.common import UserError, generator
from utils.methods import regrowth_arguments
from utils.model_loader import model_loader
from utils.regrowth import SELECTORS, RegrowthRecord
from utils.run import open_run, prerequisite

N = 270_896  # prunable weights of resnet20
KEPT, BACK = 2_709, 5_418  # at 0.99; 2 % of N
SCRIPTS = {"rl_regrowth_nas.py": ("rl_regrow_savedir", "best_allocation_resnet20.pth", "rl_training_checkpoint"),
           "rl_saliency_regrowth.py": ("rl_saliency_regrow_savedir", "best_saliency_allocation.pth",
                                       "saliency_rl_checkpoint")}
FEW = ["--ssim_batches", "1", "--finetune_epochs", "1"]


def make_start(root: Path, schedule: str = "one-shot") -> None:
    """A dense and a 0.99 magnitude-pruned resnet20 with run cards, as stage 1 leaves them, but untrained."""
    model = model_loader("resnet20", seed=0)
    checkpoint.save_checkpoint({"net": model.state_dict(), "acc": 10.0, "epoch": 1},
                               checkpoint.dense_path(root, "resnet20"))
    scores = {name: torch.rand(mask.shape, generator=generator(0, name)) for name, mask in get_masks(model).items()}
    threshold = torch.cat([score.flatten() for score in scores.values()]).topk(KEPT).values[-1]
    set_masks(model, {name: score >= threshold for name, score in scores.items()})
    pruned = checkpoint.pruned_path(root, "resnet20", 0.99)
    checkpoint.save_checkpoint(model.state_dict(), pruned)
    card = {"sha256": checkpoint.file_digest(pruned), "test_acc": 11.0, "val_acc": 12.0, "sparsity": 0.99,
            "surviving": KEPT, "total": N, "best_epoch": 1, "epochs": 1, "seconds": 1.0,
            "config": {"pruner": "magnitude", "schedule": schedule, "seed": 0, "dataset": "tiny", "precision": "fp32"}}
    checkpoint.save_json(card, checkpoint.card_path(pruned))


def options_in(root: Path, images: Path) -> list[str]:
    """Options of a run from a start in `root`."""
    make_start(root)
    return ["--m_name", "resnet20", "--data_dir", str(images), "--root", str(root), "--device", "cpu",
            "--precision", "fp32", *FEW]


@pytest.fixture
def options(image_folder, tmp_path) -> list[str]:
    return options_in(tmp_path, image_folder)


@pytest.mark.parametrize("script_name", SCRIPTS)
def test_a_search_leaves_every_artifact_at_exactly_the_target(script_name, options, tmp_path, run_script):
    folder, best_name, stem = SCRIPTS[script_name]
    process = run_script(script_name, *options, "--search_budget", "6", "--mini_finetune_epochs", "1", "2",
                         "--num_epochs", "2", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "after regrowth" in process.stdout and "before           sparsity 0.99 " in process.stdout
    folder = tmp_path / folder / "resnet20"
    best = checkpoint.load_checkpoint(folder / best_name)
    assert {"epoch", "reward", "accuracy", "allocation", "regrow_indices", "timestamp"} <= set(best["entries"])
    assert set(best["entries"]) <= set(best) and best["accuracy"] * 100 == best["val_acc_after_regrowth"]
    assert sum(best["allocation"].values()) == BACK == sum(len(found) for found in best["regrow_indices"].values())
    state = checkpoint.load_checkpoint(folder / "regrown_resnet20_0.97.pth")
    assert sum(int(value.sum()) for name, value in state.items() if name.endswith("weight_mask")) == KEPT + BACK
    start = checkpoint.load_checkpoint(checkpoint.pruned_path(tmp_path, "resnet20", 0.99))
    for name, mask in start.items():
        if name.endswith("weight_mask"):  # nothing that survived pruning was lost, nothing else returned
            layer = name.removesuffix(".weight_mask")
            new = torch.nonzero((state[name] - mask).flatten()).flatten()
            assert torch.equal(new, best["regrow_indices"].get(layer, torch.empty(0, dtype=torch.int64)))
    with open(folder / "search.csv") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["epochs_spent"]) <= 6 and {row["fidelity"] for row in rows} == {"1", "2"}
    assert all(sum(map(int, row["allocation"].split())) == BACK for row in rows)
    for name in ("search.png", "regrowth_results.png", "regrowth_results.csv"):
        assert (folder / name).stat().st_size > 100
    assert list(folder.glob(f"{stem}_epoch_*.pth"))
    card = json.loads((folder / "regrown_resnet20_0.97.json").read_text())
    with open(folder / "regrowth_results.csv") as file:
        (row,) = csv.DictReader(file)
    for name in ("val_acc_after_regrowth", "val_acc_after_regrowth_bn"):
        assert card[name] == best[name] and float(row[name]) == pytest.approx(card[name], abs=1e-3)
    assert process.stdout.count(f"{card['val_acc_after_regrowth_bn']:.2f} % with batch-norm statistics") == 2
    assert card["start_test_acc"] == 11.0 and 0 <= card["test_acc"] <= 100 and card["regrown"] == BACK
    assert 0 < card["regrown_live"] <= BACK and card["sparsity"] <= card["effective_sparsity"] < 1


@pytest.mark.parametrize("allocation", ALLOCATORS)
def test_every_allocation_rule_spends_the_same(allocation, options, tmp_path, capsys):
    rl_regrowth_nas.main([*options, "--allocation", allocation, "--target_sparsity", "0.98", "--finetune_epochs", "0"])
    card = json.loads((tmp_path / "rl_regrow_savedir/resnet20/regrown_resnet20_0.98.json").read_text())
    assert card["surviving"] == round(0.02 * N) and card["search_epochs"] == 0
    rl_regrowth_nas.main([*options, "--allocation", allocation, "--target_sparsity", "0.98", "--finetune_epochs", "0"])
    assert "reusing" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"allocation .*asked.*--overwrite"):
        other = "erk" if allocation == "greedy" else "greedy"
        rl_regrowth_nas.main([*options, "--allocation", other, "--target_sparsity", "0.98", "--finetune_epochs", "0"])


@pytest.mark.parametrize("module, words", [(rl_regrowth_nas, []), (rl_saliency_regrowth, ["--selection", "random"])])
def test_only_live_weights_return_if_that_is_asked_for(module, words, options, tmp_path):
    words = [*options, *words, "--allocation", "proportional", "--target_sparsity", "0.98", "--finetune_epochs", "0"]
    cards = []
    for folder, more in (("any", []), ("live", ["--only_live"])):
        module.main([*words, *more, "--save_dir", str(tmp_path / folder)])
        cards.append(json.loads((tmp_path / folder / "regrown_resnet20_0.98.json").read_text()))
    anywhere, live = cards
    assert anywhere["regrown_live"] < anywhere["regrown"] == live["regrown"] == live["regrown_live"]
    assert live["config"]["only_live"] and "only_live" not in anywhere["config"]
    assert live["effective_sparsity"] < anywhere["effective_sparsity"]


def test_the_schedule_of_the_final_finetuning_is_chosen(options, tmp_path):
    rl_regrowth_nas.main([*options, "--allocation", "uniform", "--finetune_epochs", "2", "--finetune_lr", "0.002",
                          "--finetune_schedule", "constant"])
    log = checkpoint.training_log_path(tmp_path / "rl_regrow_savedir/resnet20/regrown_resnet20_0.97.pth")
    with open(log, newline="") as file:
        assert [float(row["lr"]) for row in csv.DictReader(file)] == [0.002, 0.002]


@pytest.mark.parametrize("selection", list(SELECTORS))
def test_every_selection_rule_is_one_option_away(selection, options, tmp_path):
    rl_saliency_regrowth.main([*options, "--allocation", "uniform", "--selection", selection, "--target_sparsity",
                               "0.98", "--finetune_epochs", "0"])
    folder = tmp_path / "rl_saliency_regrow_savedir/resnet20"
    with open(folder / "regrowth_results.csv", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == [selection]
    record = RegrowthRecord.from_state_dict(checkpoint.load_checkpoint(folder / "best_saliency_allocation.pth"))
    codes = torch.cat([layer.sources for layer in record.layers.values()])
    assert {record.source_names[code] for code in codes.tolist()} == {selection}


def test_several_steps_each_start_from_the_model_before(options, tmp_path):
    rl_saliency_regrowth.main([*options, "--allocation", "proportional", "--regrow_iterations", "2", "--regrow_step",
                               "0.01", "--init_strategy", "magnitude", "--finetune_epochs", "0"])
    folder = tmp_path / "rl_saliency_regrow_savedir/resnet20"
    masks = [get_masks_of(path) for path in (checkpoint.pruned_path(tmp_path, "resnet20", 0.99),
                                             folder / "step_1/regrown_resnet20_0.98.pth",
                                             folder / "step_2/regrown_resnet20_0.97.pth")]
    assert [int(mask.sum()) for mask in masks] == [KEPT, KEPT + 2_709, KEPT + 2 * 2_709]
    assert all((before <= after).all() for before, after in zip(masks, masks[1:]))
    record = RegrowthRecord.from_state_dict(checkpoint.load_checkpoint(folder / "step_2/best_saliency_allocation.pth"))
    assert record.count == 2_709 and all((layer.steps == 2).all() for layer in record.layers.values())
    first, second = (checkpoint.read_card(folder / f"step_{number}/regrown_resnet20_{sparsity}.pth")
                     for number, sparsity in ((1, 0.98), (2, 0.97)))
    assert second["start_test_acc"] == first["test_acc"]  # so that figures need not show validation for all


def test_steps_that_find_no_room_are_left_out_and_those_before_reported(options, tmp_path, capsys):
    rl_saliency_regrowth.main([*options, "--allocation", "uniform", "--regrow_iterations", "3", "--regrow_step", "0.01",
                               "--target_layers", "linear", "--finetune_epochs", "0"])
    folder, said = tmp_path / "rl_saliency_regrow_savedir/resnet20", capsys.readouterr()
    with open(folder / "regrowth_results.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    masks = get_masks_of(folder / "step_1" / row["checkpoint"])
    assert int(masks.sum()) == KEPT + int(row["regrown"]) and row["test_acc"] and masks[-640:].all()
    assert "steps from 2 of 3 on are left out: no weight can return" in said.err and not (folder / "step_2").exists()


def get_masks_of(path: Path) -> torch.Tensor:
    state = checkpoint.load_checkpoint(path)
    return torch.cat([value.flatten() for name, value in state.items() if name.endswith("weight_mask")])


def test_target_layers_and_max_ratio_limit_where_weights_return(options, tmp_path, capsys):
    rl_regrowth_nas.main([*options, "--allocation", "greedy", "--target_layers", "layer3.*", "--max_ratio", "0.02",
                          "--finetune_epochs", "0"])
    folder = tmp_path / "rl_regrow_savedir/resnet20"
    best = checkpoint.load_checkpoint(folder / "best_allocation_resnet20.pth")
    assert all(name.startswith("layer3.") for name in best["allocation"])
    state = checkpoint.load_checkpoint(checkpoint.pruned_path(tmp_path, "resnet20", 0.99))
    for name, number in best["allocation"].items():
        assert number <= 0.02 * int((state[f"{name}.weight_mask"] == 0).sum())
    assert f"are to return, and only {sum(best['allocation'].values()):,} can" in "".join(capsys.readouterr())


SEARCH = ["--search_budget", "24", "--mini_finetune_epochs", "1", "--num_epochs", "5", "--finetune_epochs", "2"]


@pytest.fixture(scope="module")
def whole_search(image_folder, tmp_path_factory) -> Path:
    """The root of a search by `SEARCH` that nothing has interrupted."""
    root = tmp_path_factory.mktemp("whole")
    process = run_here("rl_regrowth_nas.py", *options_in(root, image_folder), *SEARCH)
    assert process.returncode == 0, process.stderr
    return root


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_search_resumes_to_the_same_result(number, options, tmp_path, whole_search):
    folder = tmp_path / "rl_regrow_savedir/resnet20"
    process = subprocess.Popen([sys.executable, str(REPOSITORY / "rl_regrowth_nas.py"), *options, *SEARCH,
                                "--overwrite"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=heed_sigint)
    deadline = time.monotonic() + 120
    while not list(folder.glob("*_epoch_2.pth")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else -9), errors
    goes_on = "--resume"
    if number == signal.SIGINT:
        goes_on = errors.split()[-1]
        assert goes_on.startswith("--overwrite=")
    resumed = run_here("rl_regrowth_nas.py", *options, *SEARCH, goes_on)
    assert resumed.returncode == 0 and "continuing the search" in resumed.stdout, resumed.stderr
    other = whole_search / "rl_regrow_savedir/resnet20"
    assert (folder / "regrown_resnet20_0.97.pth").read_bytes() == (other / "regrown_resnet20_0.97.pth").read_bytes()
    best, expected = (checkpoint.load_checkpoint(place / "best_allocation_resnet20.pth") for place in (folder, other))
    assert best["allocation"] == expected["allocation"] and best["reward"] == expected["reward"]


def test_missing_prerequisites_name_the_command_that_makes_them(options, tmp_path, image_folder):
    empty = tmp_path / "empty"
    words = [str(empty) if word == str(tmp_path) else word for word in options]
    with pytest.raises(UserError, match=r"make it with: python main.py --m_name resnet20 .*--root .*empty"):
        rl_regrowth_nas.main(words)
    with pytest.raises(UserError, match=r"--sparsity 0.98"):
        rl_saliency_regrowth.main([*options, "--start_sparsity", "0.98"])


@pytest.mark.parametrize("words, said", [
    (["--starting_checkpoint", "iterative"], "one-shot|oneshot, pruned by magnitude, not iterative"),
    (["--starting_checkpoint", "none.pth"], "no pruned checkpoint at none.pth"),
    (["--target_sparsity", "0.995"], "not below --start_sparsity"),
    (["--target_layers", "layer9.*"], "layer9.*layer3.2.conv2"),
    (["--max_ratio", "0"], "--max_ratio"),
    (["--mini_finetune_epochs", "3", "1"], "increasing"),
    (["--search_budget", "2", "--mini_finetune_epochs", "9"], "budget"),
    (["--allocation", "erk", "--search_budget", "9"], "--search_budget is for the search, .*--allocation erk"),
    (["--allocation", "erk", "--no_warm_start"], "--no_warm_start is for the search"),
    (["--reference_model", "0.95"], "no checkpoint at .*0.95"),
])
def test_wrong_input_is_one_clear_line(words, said, options, tmp_path):
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(UserError, match=said) as error:
        rl_regrowth_nas.main([*options, *words])
    assert "\n" not in str(error.value)
    there = (path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock")  # `error` keeps it
    assert sorted(there) == before


def test_another_split_or_data_set_than_that_of_stage_1_is_refused(options, tmp_path, capsys):
    path = checkpoint.card_path(checkpoint.pruned_path(tmp_path, "resnet20", 0.99))
    card = json.loads(path.read_text())
    run = open_run(rl_regrowth_nas.parse_args(options))
    card["config"] |= {"val_split": 0.5, "data_fingerprint": run.data.fingerprint, "dataset": run.data_label}
    checkpoint.save_json(card, path)
    with pytest.raises(UserError, match=r"trained with --val_split 0.5; with 0.2 images .* Use --val_split 0.5"):
        rl_regrowth_nas.main(options)
    card["config"]["data_fingerprint"] = "other images"
    checkpoint.save_json(card, path)
    rl_regrowth_nas.main([*options, "--allocation", "uniform", "--finetune_epochs", "0"])
    assert "trained on other images" in capsys.readouterr().out
    card["config"]["dataset"] = "photos, embedded"
    checkpoint.save_json(card, path)
    with pytest.raises(UserError, match=r"data set: photos, embedded, and this run reads cifar10.*--dataset photos"):
        rl_regrowth_nas.main([*options, "--allocation", "uniform", "--finetune_epochs", "0"])


def test_a_search_is_only_continued_with_what_its_rewards_came_from(options, tmp_path, monkeypatch, capsys):
    words = [*options, "--search_budget", "4", "--mini_finetune_epochs", "1", "--num_epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(stage2.Step, "apply", interrupt_at(3))
        with pytest.raises(KeyboardInterrupt):
            rl_regrowth_nas.main(words)
    for other, said in ((["--finetune_lr", "0.02"], r"recipe lr 0.0003 \(asked: 0.02\)"),
                        (["--ssim_batches", "2"], r"ssim_batches 1 \(asked: 2\)")):
        with pytest.raises(UserError, match=f"made with other arguments: {said}"):
            rl_regrowth_nas.main([*words, *other, "--resume"])
    rl_regrowth_nas.main([*words, "--num_epochs", "2", "--finetune_epochs", "0", "--finetune_schedule", "constant",
                          "--resume"])
    assert "continuing the search" in capsys.readouterr().out


def interrupt_at(number: int):
    """`Step.apply` until it is called for the `number`-th time."""
    calls, real = [], stage2.Step.apply

    def apply(*args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*args)
    return apply


def test_an_overwritten_search_leaves_nothing_of_the_old_one(options, tmp_path, monkeypatch, capsys):
    words = [*options, "--search_budget", "0", "--no_warm_start", "--mini_finetune_epochs", "1",
             "--finetune_epochs", "0"]
    rl_regrowth_nas.main([*words, "--num_epochs", "2"])
    folder = tmp_path / "rl_regrow_savedir/resnet20"
    again = [*words, "--num_epochs", "1", "--finetune_lr", "0.01"]
    with monkeypatch.context() as patch:
        patch.setattr(stage2.Step, "apply", interrupt_at(2))
        with pytest.raises(KeyboardInterrupt):
            rl_regrowth_nas.main([*again, "--overwrite"])
    found = {path.stem[-1] for path in folder.glob("rl_training_checkpoint_epoch_*.pth")}
    assert found == {"0", "1", "2"}
    (folder / "regrown_resnet20_0.97.json").unlink()
    (folder / "regrown_resnet20_0.97.pth").unlink()
    rl_regrowth_nas.main([*again, "--resume"])
    assert "after 0 updates" in capsys.readouterr().out  # of the new search, not the old one's second
    rl_regrowth_nas.main([*again, "--overwrite"])
    found = {path.stem[-1] for path in folder.glob("rl_training_checkpoint_epoch_*.pth")}
    assert found == {"1"} or found == {"0", "1"}


def test_what_another_regrowth_left_is_not_replaced_unasked(options, tmp_path, monkeypatch):
    plain = [*options, "--allocation", "uniform", "--finetune_epochs", "0"]
    rl_regrowth_nas.main(plain)
    best = tmp_path / "rl_regrow_savedir/resnet20/best_allocation_resnet20.pth"
    before = best.read_bytes()
    with pytest.raises(UserError, match="best_allocation_resnet20.pth is there.*--save_dir"):
        rl_regrowth_nas.main([*plain, "--target_sparsity", "0.98"])
    assert best.read_bytes() == before
    rl_regrowth_nas.main([*plain, "--target_sparsity", "0.98", "--overwrite"])
    assert best.read_bytes() != before
    search = [*options, "--save_dir", str(tmp_path / "search"), "--search_budget", "8", "--mini_finetune_epochs", "1"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage2.Step, "apply", interrupt_at(2))
        rl_regrowth_nas.main(search)
    with pytest.raises(UserError, match="interrupted search.*--resume"):
        rl_regrowth_nas.main(search)


def test_episodes_of_the_short_recipe_end_at_a_low_rate(options, tmp_path, monkeypatch):
    """The published ones keep their rate; 'short' has one a hundred times as high, after which accuracy is noise."""
    recipes = []
    real = stage2.Trainer

    def noted(*args, **kwargs):
        recipes.append(args[3])
        return real(*args, **kwargs)
    for recipe, schedule in (("published", "constant"), ("short", "warmup_cosine")):
        args = regrowth_arguments("reference", m_name="resnet20", recipe=recipe, root=tmp_path, ssim_batches=1)
        assert ("episode_schedule" in args.decisive) == (recipe == "short")
        run = open_run(argparse.Namespace(**{**vars(rl_regrowth_nas.parse_args(options)), "save_dir": tmp_path}))
        step = stage2.first_step(run, args)
        with monkeypatch.context() as patch:
            patch.setattr(stage2, "Trainer", noted)
            step.reward(ALLOCATORS["uniform"](step.problem, generator(0)), 0, 0.5)
        assert recipes[-1].schedule == schedule and recipes[-1].epochs == 0.5


def test_a_dense_model_is_no_start(options, tmp_path):
    with pytest.raises(UserError, match="is a dense model"):
        rl_regrowth_nas.main([*options, "--starting_checkpoint", str(checkpoint.dense_path(tmp_path, "resnet20"))])


def test_the_scripts_differ_in_method_only(monkeypatch, tmp_path):
    words = ["--m_name", "vgg16", "--seed", "3", "--data_dir", "x"]
    args = rl_saliency_regrowth.parse_args(words)
    assert args.method.name == "saliency" and rl_regrowth_nas.parse_args(words).method.name == "reference"
    monkeypatch.chdir(REPOSITORY)
    assert prerequisite(args, tmp_path, "--pruner", "none").startswith(
        "make it with: python main.py --m_name vgg16 --pruner none --data_dir x --seed 3 (up to 200 epochs; ")
    monkeypatch.chdir(tmp_path)
    assert prerequisite(args, tmp_path, "--iter_end", "10").startswith(
        f"make it with: python {REPOSITORY / 'main.py'} --m_name vgg16 --iter_end 10 --data_dir x --seed 3 (up to 600 ")


def test_what_makes_a_missing_start_works_as_printed(tmp_path, image_folder):
    """Also where the dense model was made with other arguments than the defaults."""
    small = ["--m_name", "resnet20", "--data_dir", image_folder, "--val_split", "0.5", "--root", tmp_path]
    assert run_here("main.py", *small, "--max_epochs", "1", "--lr", "0.03", "--pruner", "none").returncode == 0
    refused = run_here("rl_regrowth_nas.py", *small)
    assert_user_error(refused, "no pruned checkpoint", "--resume", "up to 400 epochs", "at the pace of the dense model")
    command = shlex.split(re.search(r"make it with: python (.*?) \(up to", refused.stderr)[1])
    made = run_here(*command, "--finetune_epochs", "0")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "resnet20" / "ckpt_after_prune" / "pruned_finetuned_mask_0.99.pth").is_file()


def test_a_missing_dense_model_beside_a_pruned_one_is_made_alone(options, tmp_path):
    """A whole stage 1 would refuse the pruned model, which came from another dense one."""
    dense = checkpoint.dense_path(tmp_path, "resnet20")
    dense.unlink()
    with pytest.raises(UserError, match=r"no dense .* --pruner none --data_dir .* \(up to 200 epochs;") as refused:
        rl_regrowth_nas.main(options)
    words = shlex.split(re.search(r"make it with: python \S+ (.*?) \(up to", str(refused.value))[1])
    main_script.main([*words, "--max_epochs", "1"])
    rl_regrowth_nas.main([*options, "--allocation", "uniform", "--finetune_epochs", "0"])

    checkpoint.pruned_path(tmp_path, "resnet20", 0.99).unlink()
    dense.rename(checkpoint.progress_path(dense))
    with pytest.raises(UserError, match=r"interrupted \(.*ckpt.progress.pth\): repeat the command .* --resume"):
        rl_regrowth_nas.main(options)


@pytest.mark.parametrize("words", [("--start_beta", "nan"), ("--end_beta", "-5")])
def test_an_entropy_bonus_is_a_number_from_0_on(words, capsys):
    with pytest.raises(SystemExit):
        rl_regrowth_nas.parse_args(["--m_name", "resnet20", *words])
    assert f"{words[0]}: '{words[1]}' is not a number, 0 or more" in capsys.readouterr().err


def test_max_ratio_is_exact(monkeypatch):
    """0.29 of 100 is 29, though 0.29 * 100 is just below it in floating point; 0.29 of 99 is 28.71: at most 28."""
    monkeypatch.setattr(stage2, "target_layers", lambda model, patterns: ["a", "b"])
    monkeypatch.setattr(stage2, "layer_capacities", lambda *_: {"a": 100, "b": 99})
    args = rl_regrowth_nas.parse_args(["--m_name", "resnet20", "--max_ratio", "0.29"])
    assert stage2.capacities(None, args) == {"a": 29, "b": 28}


# --- a mask that moves in the final finetuning -----------------------------------------------------------------------


@pytest.mark.parametrize("words, said", [
    (["--exchange", "0.2"], "--exchange needs a --mask_schedule: "),
    (["--mask_schedule", "rigl", "--finetune_epochs", "0"], "--finetune_epochs 0 leaves none"),
    (["--mask_schedule", "gradual"], "--mask_schedule gradual only changes the sparsity, and a regrown model already "
     "has the target's; schedules that work at constant sparsity are rigl, granet, bidirectional"),
    (["--mask_schedule", "acdc"], "--mask_schedule acdc only changes the sparsity, and a regrown model"),
    (["--mask_schedule", "granet", "--ramp_until", "0.2"], "--ramp_until is about the way to a sparsity"),
    (["--mask_schedule", "granet", "--only_live"], "--only_live says where weights may return, and --mask_schedule"),
    (["--mask_schedule", "rigl", "--target_layers", "linear"], "--target_layers says where weights may return"),
])
def test_mask_schedules_that_contradict_other_options_are_refused_by_name(words, said, options, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for module in (rl_regrowth_nas, rl_saliency_regrowth):
        with pytest.raises(UserError, match=re.escape(said)):
            module.main([*options, *words])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_moving_mask_in_the_final_finetuning_survives_a_kill(options, tmp_path):
    words = [*options, "--allocation", "proportional", "--saliency_max_batches", "1", "--finetune_epochs", "3",
             "--finetune_batch_size", "8", "--mask_schedule", "bidirectional", "--update_every", "4"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run_here("rl_saliency_regrowth.py", *words, "--save_dir", straight).returncode == 0
    command = [sys.executable, REPOSITORY / "rl_saliency_regrowth.py", *words, "--save_dir", killed]
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stderr:  # a line per epoch
        if "epoch 2/3" in line:
            process.kill()
            break
    process.wait()
    assert (killed / "regrown_resnet20_0.97.progress.pth").is_file()
    resumed = run_here("rl_saliency_regrowth.py", *words, "--save_dir", killed, "--resume")
    assert resumed.returncode == 0 and "continuing after epoch" in resumed.stdout, resumed.stderr
    for name in ("regrown_resnet20_0.97.pth", "regrown_resnet20_0.97_mask_updates.csv"):
        assert (straight / name).read_bytes() == (killed / name).read_bytes()
    assert (straight / "regrown_resnet20_0.97_mask_updates.png").stat().st_size > 1000
    with open(straight / "regrown_resnet20_0.97_mask_updates.csv", newline="") as file:
        updates = list(csv.DictReader(file))
    assert {row["survivors"] for row in updates} == {str(KEPT + BACK)}  # it starts and ends at the regrown sparsity
    exchanged = [int(row["regrown"]) for row in updates]
    assert exchanged == [int(row["pruned"]) for row in updates] and exchanged[0] == 0 < exchanged[1]
    assert int(get_masks_of(straight / "regrown_resnet20_0.97.pth").sum()) == KEPT + BACK
    card = json.loads((straight / "regrown_resnet20_0.97.json").read_text())
    assert card["mask_updates"] == "regrown_resnet20_0.97_mask_updates.csv" and card["regrown"] == BACK
    assert card["config"]["mask"]["schedule"] == "bidirectional" and card["config"]["mask"]["update_every"] == 4
    with open(straight / "regrowth_results.csv", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["saliency, bidirectional"]
    refused = run_here("rl_saliency_regrowth.py", *words[:-4], "--save_dir", straight)
    assert_user_error(refused, "was made with other arguments")


@pytest.mark.parametrize("rule, values", [("reference", "reference"), ("gradient", "reference"), ("random", "kaiming")])
def test_rules_of_a_moving_mask_look_at_the_dense_model(rule, values, options, tmp_path):
    """What the regrown model has pruned at first comes back with the dense model's value, where it is asked for."""
    pruned = checkpoint.pruned_path(tmp_path, "resnet20", 0.99)
    start = checkpoint.load_checkpoint(pruned)
    for name in [name for name in start if name.endswith("weight_orig")]:
        start[name] *= start[name.replace("_orig", "_mask")]  # so that only the dense model has these values
    checkpoint.save_checkpoint(start, pruned)
    rl_regrowth_nas.main([*options, "--allocation", "uniform", "--finetune_batch_size", "8", "--mask_schedule", "rigl",
                          "--update_every", "2", "--regrow_rule", rule, "--regrow_values", values, "--finetune_lr",
                          "1e-30", "--finetune_weight_decay", "0"])
    folder = tmp_path / "rl_regrow_savedir/resnet20"
    before = RegrowthRecord.from_state_dict(checkpoint.load_checkpoint(folder / "best_allocation_resnet20.pth"))
    state = checkpoint.load_checkpoint(folder / "regrown_resnet20_0.97.pth")
    dense = checkpoint.load_checkpoint(checkpoint.dense_path(tmp_path, "resnet20"))["net"]
    assert int(get_masks_of(folder / "regrown_resnet20_0.97.pth").sum()) == KEPT + BACK == KEPT + before.count
    same = moved = 0
    for name, mask in start.items():
        if name.endswith("weight_mask"):
            new = (state[name] == 1) & (mask == 0)
            weights = state[name.replace("_mask", "_orig")][new]
            moved += len(weights)
            same += int((weights == dense[name.removesuffix("_mask")][new]).sum())
    assert (same == moved) == (values == "reference") and moved >= BACK
    with open(folder / "regrown_resnet20_0.97_mask_updates.csv", newline="") as file:
        assert sum(int(row["regrown"]) for row in csv.DictReader(file)) > 0


# --- what is refused before anything is trained ---------------------------------------------------------------------


@pytest.mark.parametrize("words, said", [
    (["--allocation", "uniform", "--resume", "some.pth"], "--resume FILE is for the search"),
    (["--allocation", "uniform", "--save_freq", "5"], "--save_freq is for the search"),
    (["--regrow_iterations", "2", "--resume", "elsewhere/some.pth"], "lies in no folder of a step, such as .*step_1"),
    (["--starting_checkpoint", "some.pth", "--start_sparsity", "0.9"], "leave one of them out"),
    (["--max_ratio", "0.000001"], "no weight can return: --target_layers or --max_ratio leave no room"),
])
def test_options_without_effect_are_refused(words, said, options, tmp_path):
    before = sorted(tmp_path.rglob("*.pth"))
    with pytest.raises(UserError, match=said):
        rl_regrowth_nas.main([*options, *words])
    assert sorted(tmp_path.rglob("*.pth")) == before


def test_a_dense_model_that_is_pruned_is_refused(options, tmp_path):
    dense, pruned = checkpoint.dense_path(tmp_path, "resnet20"), checkpoint.pruned_path(tmp_path, "resnet20", 0.99)
    dense.write_bytes(pruned.read_bytes())
    with pytest.raises(UserError, match="ckpt.pth is pruned; regrowth needs the dense model there"):
        rl_saliency_regrowth.main(options)


def test_a_target_that_is_sparser_than_the_start_is_named_as_it_was_asked_for(options, tmp_path):
    pruned = checkpoint.pruned_path(tmp_path, "resnet20", 0.99)
    with pytest.raises(UserError, match=r"target sparsity 0\.995 is not below"):
        rl_regrowth_nas.main([*options, "--starting_checkpoint", str(pruned), "--target_sparsity", "0.995",
                              "--regrow_iterations", "2"])
