"""The environment of a run: the command line, its help, where output goes, and what the system refuses."""
from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from utils import checkpoint
from utils.common import UserError, fraction, positive_int, steps_or_share, unit_interval
from utils.run import ArgumentParser, script

SCRIPTS = ["main", "iclr2021_solution.iterate", "rl_regrowth_nas", "rl_saliency_regrowth", "inspect_checkpoint",
           "single_layer_regrowth_analysis", "benchmark_regrowth_methods", "quick_benchmark", "utils.saliency_analysis",
           "experiments.matched_compute", "experiments.collect_results", "experiments.vgg16_tables"]

# --- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_fits_the_terminal_and_names_the_model_in_both_ways(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(name).parse_args(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    usage, _, rest = text.partition("\n\n")  # argparse never breaks a group of options that exclude each other
    assert [line for line in rest.splitlines() + usage.splitlines() if len(line) > 80 and " | " not in line] == []
    text = " ".join(text.split())
    assert "--m_name" in text and "--model" in text and "resnet20, resnet32" in text
    assert "default: True" not in text and "default: False" not in text
    assert "--seed N seed of" not in text or "search (default: 0)" in text


@pytest.mark.parametrize("kind, text, said", [
    (fraction, "99", "; did you mean 0.99?"), (fraction, "99.996", "did you mean 0.99996?"),
    (fraction, "1", "between 0 and 1 (both excluded) (see"), (unit_interval, "50", "; did you mean 0.5?"),
    (fraction, "-3", "(both excluded) (see"), (fraction, "100", "(both excluded) (see"),
    (positive_int, "0", "above 0 (see"), (steps_or_share, "2.5", "or a fraction below 1"),
    (steps_or_share, "1.0", "or a fraction below 1"), (steps_or_share, "0", "or a fraction below 1")])
def test_a_percentage_is_recognised(kind, text, said, capsys):
    parser = ArgumentParser()
    parser.add_argument("--n", type=kind)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--n={text}"])
    assert f"'{text}' is not a" in (line := capsys.readouterr().err) and said in line


@pytest.mark.parametrize("name, words", [
    ("main", ["--root", "~/a", "--data_dir=~/b"]),
    ("inspect_checkpoint", ["--file", "~/a", "--finetune", "--save_dir=~/b"]),
    ("rl_regrowth_nas", ["--reference_model=~/a", "--starting_checkpoint=~/b", "--resume=~/c"]),
    ("experiments.collect_results", ["--roots", "~/a", "~/b"])])
def test_the_home_folder_in_every_path(name, words, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = importlib.import_module(name).parse_args(["--m_name", "resnet20", *words])
    found = str(vars(args))
    assert "~" not in found and "/home/me/a" in found and "/home/me/b" in found


# --- output --------------------------------------------------------------------------------------------------------

TALKATIVE = """
import sys
from pathlib import Path
from utils.run import script
def main(argv):
    print("first")
    sys.stdin.readline()  # until the reader has left
    for number in range(5000):
        print("more 猫 \\udcff", number)
        print("note 猫", file=sys.stderr)
    Path(sys.argv[1]).write_text("trained")
script(main)
"""


def test_a_reader_that_leaves_and_an_encoding_without_letters_stop_nothing(tmp_path):
    done, notes = tmp_path / "done", tmp_path / "notes"
    with open(notes, "wb") as errors:
        process = subprocess.Popen([sys.executable, "-c", TALKATIVE, done], cwd=REPOSITORY, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=errors,
                                   env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"})
        assert process.stdout.readline() == b"first\n"
        process.stdout.close()
        process.communicate(b"\n", timeout=240)
    assert process.returncode == 0 and done.read_text() == "trained"
    assert set(notes.read_text().splitlines()) == {"note \\u732b"}


UNTIDY = """
import signal, sys
from utils.run import script
def main(argv):
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        if sys.argv[1:]:
            raise RuntimeError("DataLoader worker is killed by signal: Terminated")
script(main, resumable=False)
"""


@pytest.mark.parametrize("words", [[], ["fails"]])
def test_stopped_while_a_clean_up_fails_it_is_stopped_all_the_same(words):
    """As where a time limit's signal reaches the workers of a DataLoader, too."""
    process = subprocess.run([sys.executable, "-c", UNTIDY, *words], cwd=REPOSITORY, capture_output=True, text=True,
                             timeout=240)
    assert (process.returncode, process.stderr) == (130, "\ninterrupted; run the same command again\n")


class Plain:
    """An output with nothing but `write`."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


@pytest.mark.parametrize("stderr", [Plain(), None])
def test_training_needs_no_terminal(stderr, monkeypatch, tmp_path, image_folder):
    main = importlib.import_module("main")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        main.main(["--m_name", "resnet20", "--root", str(tmp_path), "--data_dir", str(image_folder),
                   "--max_epochs", "1", "--device", "cpu", "--pruner", "none", "--val_split", "0.25"])
    assert checkpoint.dense_path(tmp_path, "resnet20").is_file()
    assert stderr is None or "pretrain resnet20" in stderr.text


# --- what the system refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error, said", [
    (PermissionError(13, "Permission denied", "/data/ckpt.pth"), "error: /data/ckpt.pth: permission denied\n"),
    (OSError(28, "No space left on device"), "error: no space left on device\n")])
def test_whatever_the_system_refuses_is_one_line(error, said, capsys):
    def main(argv: object) -> None:
        raise error
    with pytest.raises(SystemExit) as caught:
        script(main)
    assert caught.value.code == 2 and capsys.readouterr().err == said


def test_a_folder_that_cannot_be_looked_into_is_named_with_its_option(monkeypatch, tmp_path):
    real = Path.exists

    def exists(path: Path, **options: object) -> bool:
        if "closed" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)
    monkeypatch.setattr(Path, "exists", exists)
    with pytest.raises(UserError, match="cannot write to .*closed/run .Permission denied.*--save_dir"):
        checkpoint.ensure_writable(tmp_path / "closed" / "run", "--save_dir")


def test_a_card_that_may_not_be_read_is_not_taken_for_none(monkeypatch, tmp_path):
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError):
        checkpoint.read_card(tmp_path / "ckpt.pth")


def test_a_csv_holds_any_name(tmp_path):
    checkpoint.save_csv([{"class": "caf\udce9"}], tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text(encoding="utf-8") == "class\ncaf\\udce9\n"


@pytest.mark.parametrize("name", [*SCRIPTS, "experiments.recipe_sweep", "experiments.search_scaling",
                                  "experiments.search_toys"])
def test_without_the_packages_a_script_says_so_in_one_line(name):
    words = ["-m", name] if name.startswith("utils.") else [f"{name.replace('.', '/')}.py"]
    process = subprocess.run([sys.executable, "-S", *words, "--help"], cwd=REPOSITORY, capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": ""})
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1, process.stderr
    assert process.stderr.startswith("error: torch, torchvision, numpy") and "requirements.txt" in process.stderr


def test_the_help_imports_nothing_but_what_options_come_from():
    code = "import sys, main, single_layer_regrowth_analysis, utils.saliency_analysis, experiments.matched_compute; " \
           "print([name for name in ('matplotlib', 'scipy', 'skimage', 'torchvision') if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert process.stdout == "[]\n", process.stdout + process.stderr
