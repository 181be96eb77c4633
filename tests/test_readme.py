"""The README's commands, block by block from top to bottom, in one folder as a reader would run them.

Made small by options added at the end of each line: 80 images, one epoch, few episodes. Parsed only, because they take
hours to days or need a GPU: lines with VGG16, and the Python lines of results/README.md. So is the export to ONNX where
its packages are missing.
"""
from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPOSITORY
from utils import benchmark, regrowth
from utils.export import ONNX_PACKAGES
from utils.model_loader import model_loader

README, RESULTS = ((REPOSITORY / name).read_text() for name in ("README.md", "results/README.md"))
STAGE_1 = "--max_epochs 1 --finetune_epochs 0 --batch_size 64 --dataset cifar10"
STAGE_2 = "--finetune_epochs 0 --ssim_batches 1"
SEARCH = "--search_budget 2 --mini_finetune_epochs 1 --num_epochs 1"
SMALL = {  # script -> what makes a line of it small
    "main": STAGE_1, "iclr2021_solution.iterate": STAGE_1, "rl_regrowth_nas": STAGE_2,
    "rl_saliency_regrowth": STAGE_2,
    "experiments.matched_compute": "--num_seeds 1 --max_epochs 1 --finetune_epochs 2 --search_budget 2 "
                                   "--mini_finetune_epochs 1",
    "experiments.vgg16_tables": "--max_epochs 1 --finetune_epochs 0 --allocation uniform",
    "experiments.dynamic_method": "--epochs 1 --update_every 1",
    "experiments.deploy": "--batch_sizes 1 --threads 1 --num_runs 1",
    "inspect_checkpoint": "", "quick_benchmark": "--num_images 200 --num_runs 1",
    "benchmark_regrowth_methods": "--num_images 200 --num_runs 1",
    "single_layer_regrowth_analysis": "--finetune_epochs 0 --ssim_batches 1 --layers layer3.*",
    "utils.saliency_analysis": "--samples_per_class 1",
}
ONE = {"experiments.matched_compute": ("--arms", "proportional+reference"),  # one of several, unless a line chooses
       "utils.saliency_analysis": ("--measure", "gradient")}


def blocks(text: str) -> list[str]:
    """The blocks of shell commands of a text, but for set-up and citation."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [block for kind, block in found if not kind and not block.startswith(("git clone", "@"))]


def lines(text: str) -> list[str]:
    """Commands of a block, continued lines joined, without comments and the set-up by pip."""
    joined = (re.sub(r"\s+#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in joined if line and not line.startswith(("#", "python -m venv", "pip "))]


def script_of(line: str) -> tuple[str, list[str]]:
    """Module and arguments of a Python line."""
    words = shlex.split(line)[1:]
    name = words.pop(1) if words[0] == "-m" else words[0].removesuffix(".py").replace("/", ".")
    return name, words[1:]


def added(name: str, words: list[str], images: Path) -> list[str]:
    """The options that make a line small."""
    if name == "inspect_checkpoint":
        return ["--epochs", "1", "--device", "cpu"] if "--finetune" in words else []
    few = SMALL[name].split()
    if name == "experiments.deploy":  # looks at no data
        return few
    if name.startswith("rl_") and "--allocation" not in words:
        few += SEARCH.split()
    if "--mask_schedule" in words:  # moves the mask while it finetunes
        few[few.index("--finetune_epochs") + 1] = "1"
    if name in ONE and ONE[name][0] not in words:
        few += ONE[name]
    return [*few, "--data_dir", str(images), "--device", "cpu", "--precision", "fp32"]


@pytest.fixture
def with_the_example_rule(monkeypatch) -> ModuleType:
    """The README's own rule, registered as it says; the study reads its arms anew."""
    code = next(text for text in re.findall(r"```python\n(.*?)```", README, re.S) if "def _by_regret" in text)
    function, registry = code.split("SELECTORS = ")
    scope = vars(regrowth) | {}
    exec(function, scope)
    monkeypatch.setitem(regrowth.SELECTORS, "regret", eval(registry.replace("...", "**{}"), scope)["regret"])
    study = importlib.reload(importlib.import_module("experiments.matched_compute"))
    yield study
    monkeypatch.undo()
    importlib.reload(study)


def test_the_commands_run_from_top_to_bottom(image_folder, tmp_path, monkeypatch, with_the_example_rule, capsys):
    monkeypatch.chdir(tmp_path)
    rigl = {"rigl": benchmark.MASK_SCHEDULES["rigl"]}
    monkeypatch.setattr(benchmark, "MASK_SCHEDULES", rigl)  # the others are tested elsewhere
    monkeypatch.setattr(benchmark, "model_loader", lambda _, *words, **more: model_loader("resnet20", *words, **more))
    ran, has_onnx = [], all(map(find_spec, ONNX_PACKAGES))
    for line in (line for block in blocks(README) for line in lines(block)):
        if not line.startswith("python "):
            subprocess.run(["bash", "-ec", line], check=True)
            continue
        name, words = script_of(line)
        module = importlib.import_module(name)
        if name == "experiments.read_sparse_file":
            assert "linear.weight" in module.read(*words)
            continue
        if "vgg16" in line.split(".py")[-1] or ("--export onnx" in line and not has_onnx):
            module.parse_args(words)
            continue
        words += added(name, words, image_folder)
        monkeypatch.setattr(sys, "argv", [name, *words])
        try:
            module.main(words)
        except BaseException as error:
            pytest.fail(f"{line}\n(as {shlex.join(words)}): {type(error).__name__}: {error}")
        ran.append(name)
    assert set(ran) == set(SMALL) and len(ran) >= 18


def test_commands_of_results_and_within_the_text_are_read_by_their_scripts():
    found = [" ".join(code.split()) for code in re.findall(r"`(python [^`]+)`", README + RESULTS)]
    found += [line for block in blocks(RESULTS) for line in lines(block) if line.startswith("python ")]
    commands = [line for line in found if " --m_name" in line]
    assert len(commands) >= 12
    for line in commands:
        name, words = script_of(line)
        importlib.import_module(name).parse_args(words)


def test_the_example_in_python_does_what_it_says(tmp_path, monkeypatch, capsys):
    code = next(text for text in re.findall(r"```python\n(.*?)```", README, re.S) if "record.undo" in text)
    shutil.copytree(REPOSITORY / "results/checkpoints/resnet20", tmp_path / "results/checkpoints/resnet20")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(code, scope)
    printed = re.search(r"# (PruneCounts.*)", code)[1]
    assert capsys.readouterr().out.strip() == printed
    assert scope["count_pruned_params"](scope["model"]).surviving == 2709 and (tmp_path / "regrown.pth").is_file()


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_links_lead_to_files_and_headings_that_are_there(name):
    page = REPOSITORY / name
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    headings = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
                for heading in re.findall(r"^#+ (.*)$", text, re.M)}  # as GitHub makes anchors of them
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) >= 3
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (page.parent / target).is_file(), target
