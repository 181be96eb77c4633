"""The two benchmarks: they time what the scripts do, ratios and bars follow the figures, files can be compared."""
from __future__ import annotations

import csv
import json
import time
from types import SimpleNamespace

import pytest
import torch

import benchmark_regrowth_methods as script
from tests.conftest import assert_user_error, run_here
from tests.test_regrowth_scripts import make_start
from utils import benchmark, checkpoint
from utils.analysis_utils import clone_model, get_masks
from utils.benchmark import spread
from utils.mask_schedule import MASK_SCHEDULES
from utils.methods import METHODS

SMALL = ["--m_name", "resnet20", "--num_images", "200", "--num_runs", "2", "--device", "cpu", "--precision", "fp32"]


def arguments(tmp_path, *words):
    return script.parse_args([*SMALL, "--root", str(tmp_path), *map(str, words)])


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    """One episode of each method over synthetic weights and data; seconds of this process, whatever else runs."""
    root = tmp_path_factory.mktemp("benchmark")
    args = arguments(root, "--synthetic")
    run = benchmark.open_benchmark(args, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "now", lambda device: time.process_time())
        return run, {name: benchmark.run_episode(run, benchmark.stage2_arguments(args, name)) for name in METHODS}


def test_an_episode_times_every_stage_and_moves_the_whole_budget(episodes):
    run, by_method = episodes
    for episode in by_method.values():
        assert list(episode.seconds) == ["loading", "drift (SSIM)", "evidence", "selection", "mask and values",
                                         "mini-finetuning"]
        assert sum(episode.allocation.values()) == round(0.02 * 270_896) - round(0.01 * 270_896)
        assert all(seconds >= 0 for seconds in episode.seconds.values()) and episode.seconds["mini-finetuning"] > 0.05
        assert sum(int(mask.sum()) for mask in get_masks(episode.start).values()) == 2_709
    assert by_method["reference"].allocation == by_method["saliency"].allocation
    assert by_method["saliency"].seconds["evidence"] > by_method["reference"].seconds["evidence"]


def test_the_loop_that_ours_is_measured_against_regrows_the_same_weights(episodes):
    for episode, rule in [*((episode, None) for episode in episodes[1].values()),
                          (episodes[1]["reference"], "magnitude")]:  # a rule without evidence
        regrowth = episode.regrower(clone_model(episode.start))
        regrowth.rule = rule or regrowth.rule
        parts = benchmark.plain_tensors(regrowth, episode.allocation)
        benchmark.elementwise_regrowth(episode.allocation, parts)
        regrowth.apply_regrowth(episode.allocation)
        masks = get_masks(regrowth.model)
        for name, (_, mask, _, _) in zip(episode.allocation, parts, strict=True):
            assert torch.equal(mask.bool(), masks[name]), name


def test_any_seed_makes_images_and_a_rule_that_draws_has_a_loop_to_be_measured_against(episodes):
    images = [benchmark.synthetic_dataset(2, seed).train_images for seed in (5, 2**33 + 5, 6)]
    assert (images[0] == images[1]).all() and (images[0] != images[2]).any()
    episode = episodes[1]["reference"]
    regrowth = episode.regrower(clone_model(episode.start))
    regrowth.rule = "random"
    parts = benchmark.plain_tensors(regrowth, episode.allocation)
    before = sum(int(mask.sum()) for _, mask, _, _ in parts)
    benchmark.elementwise_regrowth(episode.allocation, parts)
    assert sum(int(mask.sum()) for _, mask, _, _ in parts) == before + sum(episode.allocation.values())


def test_update_row_leaves_the_start_as_it_was(episodes):
    run, by_method = episodes
    episode = by_method["reference"]
    before = {name: value.clone() for name, value in episode.start.state_dict().items()}
    row = benchmark.update_row("reference", episode, run.device, repeats=2)
    assert row["ratio"] == pytest.approx(row["plain_median_s"] / row["ours_median_s"]) and row["ours_repeats"] == 10
    assert row["ours"] == pytest.approx(2_709 / row["ours_median_s"])
    assert all(torch.equal(value, before[name]) for name, value in episode.start.state_dict().items())


def row(name, ours, plain, work=1.0):
    return benchmark.compared(name, spread([ours] * 3), spread([plain] * 3), work, "u")


def fake_run(m_name, device, precision, images=2_000):
    return SimpleNamespace(m_name=m_name, device=torch.device(device), precision=precision,
                           data=SimpleNamespace(train_images=range(images)))


@pytest.mark.parametrize("m_name, device, precision, expected", [
    ("vgg16", "cpu", "bf16", [("regrowth, a", "ms", 29.0, True), ("regrowth, a", "x the loop", 110.0, True),
                              ("loader", "images/s", 50_000.0, True), ("loader", "x the DataLoader", 7.0, False),
                              ("LAMP 0.99, vgg16", "s", 0.6, False),
                              ("LAMP 0.99, vgg16", "x the argsort", 10.0, True)]),
    ("vgg16", "cuda", "bf16", [("regrowth, a", "ms", 29.0, False), ("regrowth, a", "x the loop", 110.0, True),
                               ("training vgg16", "s for 40,000 images", 40.0, False)]),
    ("resnet20", "cpu", "fp32", [("loader", "images/s", 50_000.0, True), ("loader", "x the DataLoader", 7.0, False),
                                 ("LAMP 0.99, vgg16", "s", 0.6, False),
                                 ("LAMP 0.99, vgg16", "x the argsort", 10.0, True)])])
def test_bars_by_hand(m_name, device, precision, expected):
    run = fake_run(m_name, device, precision)
    rows = [row("regrowth, a", 0.029, 3.19), row("loader", 0.1, 0.7, 5_000), row(f"training {m_name}", 1, 2, 1_000),
            row("LAMP 0.99, vgg16", 0.6, 6.0)]
    found = [(bar["bar"], bar["unit"], pytest.approx(bar["value"]), bar["met"]) for bar in benchmark.bars(run, rows)]
    assert found == expected


def test_the_training_bars_are_for_resnet20_with_bf16_on_a_cpu():
    run = fake_run("resnet20", "cpu", "bf16")
    found = [benchmark.bars(run, [row("training resnet20", 1, ratio)]) for ratio in (2.2, 2.1)]
    assert [[bar["met"] for bar in own] for own in found] == [[True], [False]]
    assert benchmark.bars(fake_run("resnet20", "cpu", "bf16", images=1_999), [row("training resnet20", 1, 3)]) == []


def test_a_mover_is_timed_step_by_step(episodes):
    run = episodes[0]
    found = benchmark.schedule_row(run, "granet", 0.9)
    every, plain, watched = found["update_every"], found["step_s"], found["watched_step_s"]
    assert (every, found["repeats"]) == (40, 2)  # eight steps, two of them before an update
    assert found["median_s"] > 0 and plain > 0
    assert found["share_percent"] == pytest.approx(
        100 * (found["median_s"] + max(0, watched - plain)) / (every * plain))


def test_a_mask_update_may_take_three_per_cent_of_the_training():
    rows = [{"measurement": "mask updates, rigl", "share_percent": share} for share in (2.9, 3.1)]
    assert [bar["met"] for bar in benchmark.bars(fake_run("vgg16", "cpu", "bf16"), rows)] == [True, False]
    assert benchmark.bars(fake_run("vgg16", "cpu", "bf16", images=100), rows) == []


def test_bars_are_said_in_words(capsys):
    benchmark.print_bars(benchmark.bars(fake_run("resnet20", "cpu", "bf16"), [
        row("training resnet20", 1, ratio) for ratio in (2.3, 2.1)]))
    shown = capsys.readouterr().out.splitlines()
    assert "aims at" in shown[1] and shown[2].endswith(" reached") and shown[3].endswith("not reached here")


def test_checkpoints_of_other_images_are_timed_without_a_warning(image_folder, tmp_path, capsys):
    make_start(tmp_path)
    path = checkpoint.card_path(checkpoint.pruned_path(tmp_path, "resnet20", 0.99))
    card = json.loads(path.read_text())
    card["config"] |= {"data_fingerprint": "all images", "dataset": "cifar10, image folder (PNG)", "val_split": 0.5}
    checkpoint.save_json(card, path)
    args = arguments(tmp_path, "--data_dir", image_folder)
    run = benchmark.open_benchmark(args, tmp_path / "unused")
    benchmark.run_episode(run, benchmark.stage2_arguments(args))
    assert run.root == tmp_path and "other images" not in capsys.readouterr().out


def test_stage_rows_by_hand():
    rows = benchmark.stage_rows({"a": [{"x": 1.0, "y": 2.0}, {"x": 3.0, "y": 4.0}, {"x": 2.0, "y": 9.0}]})
    assert [(row["stage"], row["median_s"], row["fastest_s"], row["slowest_s"], row["repeats"]) for row in rows] == \
        [("x", 2.0, 1.0, 3.0, 3), ("y", 4.0, 2.0, 9.0, 3), (benchmark.TOTAL, 7.0, 3.0, 11.0, 3)]


def test_blocks_of_one_stage_add_up():
    seconds, once = {}, {}
    for times in (once, seconds, seconds):
        with benchmark.timed(times, "a", torch.device("cpu")):
            time.sleep(0.01)
    assert once["a"] >= 0.01 and seconds["a"] >= 0.02 and list(seconds) == ["a"]
    assert spread([3.0, 1.0, 2.0]) == {"median_s": 2.0, "fastest_s": 1.0, "slowest_s": 3.0, "repeats": 3}


def test_the_benchmark_writes_everything_and_compares(tmp_path, image_folder, run_script, monkeypatch):
    make_start(tmp_path)
    words = [*SMALL[:2], *SMALL[4:], "--num_images", "80", "--data_dir", image_folder, "--root", tmp_path]
    refused = run_here("benchmark_regrowth_methods.py", *words)
    assert_user_error(refused, "--num_images 80", "200")
    words[words.index("80")] = "200"
    process = run_script("benchmark_regrowth_methods.py", *words)
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "benchmark/resnet20"
    made = json.loads((folder / "benchmark.json").read_text())
    assert made["setting"]["data"] == "cifar10, image folder (PNG)" and made["setting"]["regrown"] == 2_709
    assert {row["measurement"] for row in made["comparisons"]} == \
        {"regrowth, reference", "regrowth, saliency", "loader", "training resnet20", "LAMP 0.99, vgg16"}
    assert [row["measurement"] for row in made["mask_updates"]] == [f"mask updates, {name}" for name in MASK_SCHEDULES]
    assert (folder / "mask_updates.csv").is_file()
    assert made["peak_memory_mb"] > 100 and (folder / "benchmark.png").stat().st_size > 1000
    with open(folder / "episodes.csv") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["1", "1", "2", "2"]
    assert not (folder / "episodes.partial.csv").exists()
    *_, lamp = made["comparisons"]
    monkeypatch.setattr(benchmark, "lamp_row", lambda device, repeats: lamp)  # what does not depend on the data
    monkeypatch.setattr(benchmark, "loader_rows", lambda run, repeats: [])
    monkeypatch.setattr(benchmark, "MASK_SCHEDULES", {"rigl": MASK_SCHEDULES["rigl"]})
    again = run_here("benchmark_regrowth_methods.py", *words, "--synthetic", "--num_runs", "1", "--compare",
                     folder / "benchmark.json", "--save_dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert "the runs differ: data was" in again.stdout and "reference / selection" in again.stdout
    wrong = run_here("benchmark_regrowth_methods.py", *words, "--compare", folder / "stages.csv")
    assert_user_error(wrong, "stages.csv", "benchmark.json")


def test_the_folder_is_held_while_episodes_are_timed(tmp_path, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        assert (tmp_path / "benchmark/resnet20/.lock").is_file()
        raise KeyboardInterrupt
    monkeypatch.setattr(benchmark, "time_episodes", stop)
    with pytest.raises(KeyboardInterrupt):
        script.main([*SMALL, "--root", str(tmp_path), "--synthetic"])


def test_quick_benchmark_runs_without_any_checkpoint(tmp_path, run_script):
    process = run_script("quick_benchmark.py", *SMALL, "--num_runs", "1", "--root", tmp_path)
    assert process.returncode == 0, process.stderr
    assert all(words in process.stdout for words in ("no checkpoint at", "end to end", "regrowth, saliency"))
    refused = run_here("quick_benchmark.py", "--m_name", "resnet20", "--target_sparsity", "0.995")
    assert_user_error(refused, "not below")


def test_vgg16_at_the_published_setting_returns_the_published_number():
    args = benchmark.stage2_arguments(script.parse_args(["--m_name", "vgg16"]))
    total = 14_715_584
    assert abs(round((1 - args.target_sparsity) * total) - round((1 - args.start_sparsity) * total) - 147_155) <= 1
