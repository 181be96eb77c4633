"""`main.py` and `iterate.py` as a user runs them: artifacts, schedules, reuse, interruption, wrong input."""
from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main as main_script
from iclr2021_solution import iterate
from iclr2021_solution.tools.modelloaders import DEFAULT, SETTINGS, model_and_opt_loader, recipes_of
from tests.conftest import REPOSITORY, assert_user_error, heed_sigint, run_here
from utils import checkpoint, stage1
from utils.common import UserError
from utils.datasets import load_dataset
from utils.model_loader import model_loader
from utils.models import MODELS
from utils.pruning import weights_left
from utils.run import script as as_script
from utils.training import FINETUNE_ONE_SHOT, PRETRAIN

N = 270_896  # prunable weights of resnet20


@pytest.fixture
def tiny_options(image_folder, tmp_path) -> list[object]:
    """Options that make a run of a script take seconds."""
    return ["--data_dir", image_folder, "--root", tmp_path / "run", "--device", "cpu", "--precision", "fp32"]


TINY = ["--m_name", "resnet20", "--max_epochs", "2", "--finetune_epochs", "1", "--batch_size", "32"]


def rows_of(root: Path) -> list[dict[str, str]]:
    with open(root / "resnet20" / "pruning_results.csv") as file:
        return list(csv.DictReader(file))


def test_one_shot_sweep_leaves_checkpoints_cards_table_and_figure(run_script, tiny_options, tmp_path):
    words = ["main.py", *TINY, "--sparsity", "0.9", "0.99", *tiny_options]
    process = run_script(*words, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "run" / "resnet20"
    dense = checkpoint.load_checkpoint(folder / "checkpoint" / "ckpt.pth")
    assert {"net", "acc", "epoch", "optimizer", "scheduler"} <= set(dense)
    for sparsity, kept in ((0.9, 27_090), (0.99, 2_709)):
        state = checkpoint.load_checkpoint(folder / "ckpt_after_prune" / f"pruned_finetuned_mask_{sparsity}.pth")
        masks = [value for name, value in state.items() if name.endswith("weight_mask")]
        assert sum(int(mask.sum()) for mask in masks) == kept and sum(mask.numel() for mask in masks) == N
        card = json.loads((folder / "ckpt_after_prune" / f"pruned_finetuned_mask_{sparsity}.json").read_text())
        assert card["config"]["pruner"] == "magnitude" and card["config"]["schedule"] == "one-shot"
        assert 0 <= card["test_acc"] <= 100 and card["surviving"] == kept and "torch" in card["environment"]
        assert card["sparsity"] <= card["effective_sparsity"] <= 1
    assert rows_of(tmp_path / "run")[2]["effective_sparsity"] == f"{card['effective_sparsity']:.6g}"
    assert [row["pruner"] for row in rows_of(tmp_path / "run")] == ["none", "magnitude", "magnitude"]
    assert (folder / "pruning_results.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "checkpoint" / "ckpt_training.csv").read_text().count("\n") == 3

    again = run_here(*words, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("reusing") == 3
    other = run_here(*words, "--seed", "7", cwd=tmp_path)
    assert_user_error(other, "seed 0 (asked: 7)", "--resume", "--overwrite")


def test_iterate_ends_at_the_target_and_continues_from_an_iteration(run_script, tiny_options, tmp_path):
    words = ["iclr2021_solution/iterate.py", "--model", "resnet20", "--pruner", "lamp", "--max_epochs", "1",
             "--finetune_epochs", "0", *tiny_options]
    assert_user_error(run_here(*words, "--iter_start", "2", "--iter_end", "3"), "does not exist", "--iter_start 1")
    assert run_here(*words, "--iter_end", "2").returncode == 0
    process = run_script(*words, "--iter_start", "3", "--iter_end", "10", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    state = checkpoint.load_checkpoint(tmp_path / "run/resnet20/ckpt_after_prune/pruned_finetuned_mask_0.99.pth")
    assert sum(int(v.sum()) for k, v in state.items() if k.endswith("weight_mask")) == round(0.01 * N)
    rows = rows_of(tmp_path / "run")
    assert [int(row["iteration"]) for row in rows] == [0, *range(1, 11)]


def kill_when(process: subprocess.Popen, condition, number: int) -> None:
    """Sends the signal as soon as the condition holds."""
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)


LONGER = ["main.py", *TINY[:2], "--max_epochs", "4", "--finetune_epochs", "4", "--batch_size", "32",
          "--sparsity", "0.9", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def whole_run(image_folder, tmp_path_factory) -> Path:
    """The root of a run of `LONGER` that nothing has interrupted."""
    root = tmp_path_factory.mktemp("whole")
    process = run_here(*LONGER, "--data_dir", image_folder, "--root", root)
    assert process.returncode == 0, process.stderr
    return root


@pytest.mark.parametrize("signal_number, stage, epochs", [
    (signal.SIGKILL, "checkpoint/ckpt", 1), (signal.SIGKILL, "ckpt_after_prune/pruned_finetuned_mask_0.9", 2),
    (signal.SIGINT, "checkpoint/ckpt", 2), (signal.SIGTERM, "checkpoint/ckpt", 1)])
def test_a_killed_run_resumes_to_the_same_bytes(signal_number, stage, epochs, whole_run, image_folder, tmp_path):
    words = [*LONGER, "--data_dir", image_folder, "--root", tmp_path]
    log = tmp_path / "resnet20" / f"{stage}_training.csv"
    process = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=heed_sigint,
                               cwd=REPOSITORY)
    kill_when(process, lambda: log.exists() and log.read_text().count("\n") > epochs, signal_number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (-9 if signal_number == signal.SIGKILL else 130)
    if signal_number != signal.SIGKILL:
        assert "--resume" in errors.splitlines()[-1] and "Traceback" not in errors
    resumed = run_here(*words, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("checkpoint/ckpt.pth", "ckpt_after_prune/pruned_finetuned_mask_0.9.pth"):
        assert (tmp_path / "resnet20" / name).read_bytes() == (whole_run / "resnet20" / name).read_bytes()


@pytest.mark.parametrize("words, said", [
    (["--m_name", "lenet"], ["lenet", "resnet20"]),
    (["--pruner", "best"], ["best", "magnitude"]),
    (["--dataset", "mnist"], ["mnist", "photos"]),
    (["--sparsity", "1.0"], ["--sparsity", "between 0 and 1"]),
    (["--sparsity", "ninety"], ["--sparsity", "between 0 and 1"]),
    (["--sparsity", "0.9999999"], ["--sparsity 0.9999999", "0 of 270,896 weights", "; 0.9999963 leaves one"]),
    (["--sparsity", "0.0000001"], ["--sparsity 1e-07", "none of the 270,896 weights", "by 3.7e-06"]),
    (["--amount", "0.999", "--iter_end", "2"], ["--amount: iteration 2", "0 of 270,896", "0.9999963"]),
    (["--sparsity", "0.95", "0.99", "0.99001"], ["0.99 and 0.99001", "mask_0.99.pth", "--sparsity"]),
    (["--amount", "0.9", "--iter_end", "6"], ["iteration 6 would leave 0", "; 0.9999963 leaves one"]),
    (["--amount", "0.00002", "--iter_end", "2"], ["would share the file", "mask_0.pth", "fewer iterations"]),
    (["--amount", "0", "--iter_end", "3"], ["--amount", "between 0 and 1"]),
    (["--amount", "0.4", "--sparsity", "0.9"], ["--sparsity and --amount"]),
    (["--iter_start", "4", "--iter_end", "2"], ["--iter_end 2", "--iter_start 4"]),
    (["--sparsity", "0.9", "0.95", "--iter_end", "2"], ["one-shot sweep"]),
    (["--iter_start", "3", "--iter_end", "4"], ["does not exist", "--iter_start 1"]),
    (["--pruner", "unifplus", "--sparsity", "0.9999"], ["unifplus"]),
    (["--val_split", "1"], ["--val_split"]),
    (["--device", "quantum"], ["quantum", "cpu"]),
    (["--epochs", "3"], ["--epochs"]),
    (["--resume", "--overwrite"], ["not allowed with"]),
    (["--overwrite=yesterday"], ["--overwrite=yesterday", "--overwrite=2026-01-31T12:00:00"]),
])
def test_wrong_input_is_one_line_and_writes_nothing(words, said, tiny_options, tmp_path, capsys):
    root = tmp_path / "run"
    with pytest.raises((SystemExit, UserError)) as caught:
        main_script.main([str(word) for word in [*TINY, *tiny_options, *words]])
    message = capsys.readouterr().err if isinstance(caught.value, SystemExit) else str(caught.value)
    assert getattr(caught.value, "code", 2) == 2
    assert len(message.strip().splitlines()) == 1
    for word in said:
        assert word in message
    assert not [path for path in root.rglob("*") if path.is_file()]


@pytest.fixture
def untrained_options(tiny_options) -> list[str]:
    """Options with which a run of a script takes a second."""
    return [*map(str, tiny_options), "--max_epochs", "1", "--batch_size", "64", "--patience", "9"]


@pytest.fixture
def no_training(monkeypatch):
    """Whatever is refused must be refused before this."""
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something was trained")
    monkeypatch.setattr(stage1.Trainer, "run", fail)


def refused(script, words: list[str], *said: str) -> None:
    """The script's main ends in one line that holds all of `said`."""
    with pytest.raises(UserError) as caught:
        script.main(words)
    assert len(str(caught.value).splitlines()) == 1
    for word in said:
        assert word in str(caught.value)


def test_a_conflict_anywhere_in_the_command_is_found_before_training(untrained_options, tmp_path, request):
    words = ["--m_name", "resnet20", *untrained_options]
    folder = tmp_path / "run" / "resnet20" / "ckpt_after_prune"
    main_script.main([*words, "--sparsity", "0.99", "--finetune_epochs", "0"])
    request.getfixturevalue("no_training")
    sweep = [*words, "--sparsity", "0.9", "0.99", "--finetune_epochs", "1"]
    refused(main_script, sweep, "mask_0.99.pth exists", "epochs 0 (asked: 1)", "--resume", "--overwrite")
    refused(main_script, [*words, "--sparsity", "0.9", "0.99", "--finetune_epochs", "0", "--pruner", "lamp"],
            "pruner magnitude (asked: lamp)")
    for script, more in ((main_script, ["--sparsity", "0.99", "--iter_end", "10"]), (iterate, [])):  # tenth: 0.99
        for resume in ([], ["--resume"]):  # it could not be taken: nine iterations come before it
            refused(script, [*words, "--pruner", "lamp", "--finetune_epochs", "0", *more, *resume], "schedule one-shot",
                    "0.9842.pth is trained first", "--root", "--overwrite")
    for more in (["--resume"], ["--overwrite"]):  # neither refuses
        with pytest.raises(AssertionError, match="trained"):
            main_script.main([*sweep, *more])

    dense = checkpoint.dense_path(tmp_path / "run", "resnet20")
    for path in dense.parent.iterdir():
        path.unlink()
    for resume in ([], ["--resume"]):  # also without the parent
        refused(main_script, [*sweep, *resume], "mask_0.99.pth exists", ": recipe epochs 0 (asked: 1). It", "--root")
    assert not dense.exists() and not list(folder.glob("*0.9.*"))


def test_an_unfinished_parent_is_no_conflict(untrained_options, tmp_path, capsys):
    words = ["--m_name", "resnet20", *untrained_options, "--sparsity", "0.99", "--finetune_epochs", "0"]
    main_script.main(words)
    checkpoint.dense_path(tmp_path / "run", "resnet20").unlink()
    capsys.readouterr()
    main_script.main(words)  # the same dense model is trained again, and what was made from it fits
    assert capsys.readouterr().out.count("reusing") == 1


def test_what_came_from_a_model_that_is_being_replaced_is_named_before_training(untrained_options, tmp_path, request):
    words = ["--m_name", "resnet20", *untrained_options, "--sparsity", "0.99", "--finetune_epochs", "0"]
    main_script.main(words)
    dense = checkpoint.dense_path(tmp_path / "run", "resnet20")
    anew = checkpoint.read_card(dense)["config"]
    anew["recipe"]["epochs"] = 2  # an --overwrite with more epochs of pretraining, interrupted
    checkpoint.save_checkpoint({"config": anew, "trainer": {}}, checkpoint.progress_path(dense))
    request.getfixturevalue("no_training")
    refused(main_script, [*words, "--max_epochs", "2", "--resume"], "mask_0.99.pth exists", "epochs 1 (asked: 2)",
            "ckpt.pth is trained first")


def test_an_interrupted_overwrite_goes_on_as_one(untrained_options, tmp_path, monkeypatch, capsys):
    """By the command that it prints: what it has made since is taken, and nothing that was there before."""
    words = ["--m_name", "resnet20", *untrained_options, "--sparsity", "0.9"]
    main_script.main([*words, "--finetune_epochs", "0"])
    pruned = checkpoint.pruned_path(tmp_path / "run", "resnet20", 0.9)
    for artifact in (checkpoint.dense_path(tmp_path / "run", "resnet20"), pruned):
        os.utime(artifact, (1000, 1000))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt
    command = ["main", *words, "--finetune_epochs", "1", "--overwrite"]
    for _ in range(2):  # the second time in the command that the first has printed
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(stage1, "prune_to", stop)  # the dense model is done
            patch.setattr(sys, "argv", command)
            as_script(main_script.main)
        command = shlex.split(capsys.readouterr().err.split("Continue with: python ")[1])
    assert pruned.stat().st_mtime == 1000
    main_script.main(command[1:])
    output = capsys.readouterr().out
    assert output.count("reusing") == 1 and "ckpt.pth" in output and "other arguments" not in output
    assert checkpoint.read_card(pruned)["config"]["recipe"]["epochs"] == 1 and "--resume" not in command


@pytest.mark.parametrize("script, sparsity, words", [
    (main_script, 0.99, ["--sparsity", "0.9", "0.99"]), (iterate, 0.75, ["--amount", "0.5", "--iter_end", "3"])])
def test_an_interrupted_stage_anywhere_is_found_before_training(script, sparsity, words, untrained_options, tmp_path,
                                                                no_training):
    progress = checkpoint.progress_path(checkpoint.pruned_path(tmp_path / "run", "resnet20", sparsity))
    checkpoint.save_checkpoint({"config": {"stage": "prune", "seed": 5}, "trainer": {}}, progress)
    words = ["--m_name", "resnet20", *untrained_options, *words]
    refused(script, words, "interrupted stage lies at", progress.name, "--resume")
    refused(script, [*words, "--resume"], progress.name, "other arguments", "seed 5 (asked: 0)")


def test_iterate_takes_any_dense_model_unless_an_option_contradicts_it(tiny_options, tmp_path, capsys):
    run = ["--m_name", "resnet20", *map(str, tiny_options)]
    dense = checkpoint.dense_path(tmp_path / "run", "resnet20")
    main_script.main([*run, "--pruner", "none", "--max_epochs", "2", "--batch_size", "32"])
    made = dense.read_bytes()
    words = [*run, "--iter_end", "1", "--finetune_epochs", "0"]
    for option, value, said in (("--max_epochs", "7", "epochs 2 (asked: 7)"), ("--lr", "0.3", "lr 0.1 (asked: 0.3)"),
                                ("--batch_size", "50", "batch_size 32 (asked: 50)"), ("--seed", "4", "seed 0 (asked"),
                                ("--patience", "3", "patience 30 (asked: 3)")):
        refused(iterate, [*words, option, value], f"{dense} exists", said, "--resume")
    capsys.readouterr()
    iterate.main([*words, "--max_epochs", "2"])
    assert f"reusing {dense} (validation" in capsys.readouterr().out
    iterate.main([*words, "--max_epochs", "7", "--resume"])
    assert "made with other arguments: recipe epochs 2 (asked: 7)" in capsys.readouterr().out

    checkpoint.card_path(dense).unlink()  # as a checkpoint of another project
    refused(iterate, [*words, "--max_epochs", "2"], "without a run card")
    iterate.main(words)
    assert f"reusing {dense}\n" in capsys.readouterr().out and dense.read_bytes() == made


def test_the_summary_has_a_row_for_a_model_without_a_run_card(untrained_options, tmp_path, capsys):
    dense = checkpoint.dense_path(tmp_path / "run", "resnet20")
    checkpoint.save_checkpoint({"net": model_loader("resnet20", seed=0).state_dict(), "acc": 1.0, "epoch": 1}, dense)
    words = ["--m_name", "resnet20", *untrained_options, "--sparsity", "0.9", "--finetune_epochs", "0", "--resume"]
    for _ in range(2):
        main_script.main(words)
        shown = capsys.readouterr().out
        rows = rows_of(tmp_path / "run")
        assert [(row["pruner"], row["surviving"]) for row in rows] == [("none", str(N)), ("magnitude", "27090")]
        printed = next(line for line in shown.splitlines() if line.split()[:1] == ["none"]).split()
        accuracies = [f"{float(rows[0][key]):.2f}" for key in ("val_acc", "test_acc")]
        assert printed == ["none", "0", "0", "270,896", *accuracies]
    assert not checkpoint.card_path(dense).exists()  # nothing is known of how it was made


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(image_folder, tmp_path):
    options = ["--m_name", "resnet20", "--data_dir", image_folder, "--root", tmp_path]
    assert_user_error(run_here("main.py", "--device", "cuda", *options), "no CUDA GPU")
    assert_user_error(run_here("iclr2021_solution/iterate.py", "--cuda", "1", *options), "cuda:1")


def test_damaged_and_foreign_checkpoints_are_refused_and_kept(tiny_options, tmp_path):
    dense = checkpoint.dense_path(tmp_path / "run", "resnet20")
    words = [str(word) for word in [*TINY, "--resume", *tiny_options]]
    checkpoint.save_checkpoint({"net": {"features.0.weight": torch.ones(64, 3, 3, 3)}, "acc": 1.0}, dense)
    whole = dense.read_bytes()
    for content, said in ((whole, "another model"), (whole[:len(whole) // 2], "not a readable"), (b"x", "not a read")):
        dense.write_bytes(content)
        with pytest.raises(UserError, match=said):
            main_script.main(words)
        assert dense.read_bytes() == content


def test_iterative_schedules_by_hand():
    steps = stage1.iterative_steps("magnitude", 0.4, 1, 4)
    assert [round(step.sparsity, 6) for step in steps] == [0.4, 0.64, 0.784, 0.8704]
    assert [round(step.previous, 6) for step in steps] == [0.0, 0.4, 0.64, 0.784]
    args = main_script.parse_args(["--m_name", "resnet20", "--sparsity", "0.99", "--iter_end", "10"])
    steps = main_script.plan(args, main_script.recipes(args)[1])
    assert steps[0].sparsity == pytest.approx(0.369043, abs=1e-6) and round(steps[-1].sparsity, 12) == 0.99


def test_ten_iterations_of_resnet20_end_at_99_percent():
    _, amount, batch_size, opt_pre, opt_post = model_and_opt_loader("resnet20")
    assert round((1 - amount) ** 10 * N) == round(0.01 * N)
    assert checkpoint.format_sparsity(1 - (1 - amount) ** 10) == "0.99"
    assert (opt_pre.optimizer, opt_post.optimizer, opt_post.epochs, batch_size) == ("sgd", "adamw", 40, 100)


def test_a_model_without_a_row_of_settings_gets_the_default_recipe(monkeypatch):
    assert set(SETTINGS) <= set(MODELS)
    assert model_and_opt_loader("vgg16")[1] == 0.4 and model_and_opt_loader("alexnet")[3].lr == 0.01
    monkeypatch.setitem(MODELS, "mine", MODELS["resnet20"])
    args = iterate.parse_args(["--model", "mine"])
    assert iterate.settings(args) == (DEFAULT.amount, *recipes_of(DEFAULT))
    with pytest.raises(UserError, match="lenet.*resnet20"):
        model_and_opt_loader("lenet")


def test_options_reach_the_recipes():
    args = main_script.parse_args(["--m_name", "vgg16", "--lr", "0.05", "--max_epochs", "7", "--patience", "3",
                                   "--finetune_epochs", "0", "--finetune_lr", "0.002", "--batch_size", "64",
                                   "--finetune_schedule", "cosine"])
    pre, post = main_script.recipes(args)
    assert (pre.lr, pre.epochs, pre.patience, pre.batch_size) == (0.05, 7, 3, 64)
    assert (post.lr, post.epochs, post.schedule, post.batch_size, post.patience) == (0.002, 0, "cosine", 64, 3)
    assert main_script.recipes(main_script.parse_args(["--m_name", "vgg16"])) == (PRETRAIN, FINETUNE_ONE_SHOT)
    iterate_args = iterate.parse_args(["--model", "vgg16", "--amount", "0.2", "--max_epochs", "3", "--cuda", "1",
                                       "--lr", "0.05", "--patience", "4", "--batch_size", "64",
                                       "--finetune_lr", "0.002", "--finetune_schedule", "cosine"])
    amount, pre, post = iterate.settings(iterate_args)
    assert (amount, pre.epochs, post.epochs, iterate_args.device) == (0.2, 3, 40, "cuda:1")
    assert (pre.lr, pre.patience, pre.batch_size) == (0.05, 4, 64)
    assert (post.lr, post.patience, post.batch_size, post.schedule) == (0.002, 4, 64, "cosine")


@pytest.fixture(scope="module")
def flowers(image_folder, tmp_path_factory) -> Path:
    """Two classes of `image_folder` under names of their own."""
    root = tmp_path_factory.mktemp("own") / "flowers"
    for split in ("train", "test"):
        for name, own in (("class_0", "rose"), ("class_1", "tulip")):
            shutil.copytree(image_folder / split / name, root / split / own)
    (root / "train" / "rose" / "more.webp").write_bytes(b"x")
    return root


def test_images_of_ones_own(flowers, image_folder, tmp_path, capsys):
    own = ["--m_name", "resnet20", "--pruner", "none", "--max_epochs", "1", "--root", str(tmp_path), "--device", "cpu",
           "--dataset", "folder", "--data_dir", str(flowers), "--image_size", "16"]
    main_script.main(own)
    dense = checkpoint.dense_path(tmp_path, "resnet20")
    content, card = checkpoint.load_checkpoint(dense), checkpoint.read_card(dense)
    assert content["net"]["linear.weight"].shape == (2, 64)
    assert rows_of(tmp_path)[0]["dataset"] == card["config"]["dataset"] == "flowers, image folder (PNG) at 16x16"
    pixels = load_dataset("folder", flowers, 16).train_images / 255.0
    known = content["input"]
    assert known["mean"] == pytest.approx(pixels.mean(axis=(0, 1, 2))) and len(known["mean"]) == 3
    assert known["std"] == pytest.approx(pixels.std(axis=(0, 1, 2)))
    assert (known["image_size"], known["classes"]) == (16, ["rose", "tulip"])
    assert card["input"] == {**known, "dataset": "folder", "data_dir": str(flowers)}

    main_script.main(own)  # reads the data once more
    output = capsys.readouterr()
    assert "resnet20 on flowers, image folder (PNG) at 16x16" in output.out and "cifar10" not in output.out
    assert output.err.count("note: ") == 1 and "1 files in" in output.err
    moved = flowers.with_name("plants")
    shutil.copytree(flowers, moved)
    main_script.main([*own, "--data_dir", str(moved), "--resume"])  # the same images under another name
    at_32 = ["--image_size", "32"]
    for words in (at_32, [*at_32, "--dataset", "cifar10", "--data_dir", str(image_folder)]):
        with pytest.raises(UserError, match=r"trained on another data set: flowers, .*\(2 classes, 16 pixels\), .* use "
                           f"--dataset folder --data_dir {flowers} --image_size 16"):
            main_script.main([*own, *words, "--resume"])


def test_the_sparsity_of_the_message_leaves_a_weight():
    """1 - 1/30 is 0.96667, cut to one digit more than the number of weights has."""
    with pytest.raises(UserError, match=r"would leave 0 of 30 weights; 0\.966 leaves one$"):
        weights_left(30, 30, 0.99, "--sparsity 0.99")
    assert weights_left(30, 30, 0.966, "") == 1


@pytest.mark.parametrize("words, said", [
    (["--finetune_padding", "32"], "a padding of 32 pixels is too much"),
    (["--pruner", "unifplus", "--sparsity", "0.9975", "--mask_schedule", "rigl", "--regrow_allocation", "proportional"],
     "reaches a sparsity of at most 0.9979"),  # 0.9975 it reaches, but not the margin past it
    (["--mask_schedule", "rigl", "--regrow_rule", "random", "--evidence_steps", "8"],
     "--evidence_steps is for rules that look at gradients"),
])
def test_what_the_finetuning_would_refuse_is_refused_before_anything_is_trained(words, said, image_folder, tmp_path):
    with pytest.raises(UserError, match=said):
        main_script.main(["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), *words])
    assert not list(tmp_path.rglob("*.pth"))


def test_models_without_run_cards_are_taken_and_reported(image_folder, tmp_path):
    words = ["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--max_epochs", "1",
             "--finetune_epochs", "0", "--finetune_schedule", "cosine"]
    main_script.main(words)
    for card in tmp_path.rglob("*.json"):
        card.unlink()
    main_script.main([*words, "--resume"])
    table = (tmp_path / "resnet20/pruning_results.csv").read_text()
    assert "unknown" in table and "pruned_finetuned_mask_0.99.pth" in table
