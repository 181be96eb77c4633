"""`inspect_checkpoint.py --export`: every model in every form and back, what is refused, and what survives a kill."""
from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import inspect_checkpoint
import main as main_script
from tests.conftest import assert_user_error, run_here
from utils import checkpoint, export, finetuning, sparse_file, stage1
from utils.analysis_utils import clone_model, count_pruned_params, get_masks, prunable_layers, set_masks
from utils.common import RunFailed, UserError
from utils.compact import largest_difference, load_network
from utils.inspection import describe, load_artifact
from utils.model_loader import load_model_state, model_loader
from utils.models import MODELS

ONNX_MISSING = [name for name in export.ONNX_PACKAGES if export.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(ONNX_MISSING), reason=f"not installed (requirements-export.txt): {ONNX_MISSING}")


def pruned(name: str, sparsity: float = 0.9) -> nn.Module:
    """A model with a random mask on every layer."""
    model = model_loader(name, seed=0)
    dice = torch.Generator().manual_seed(0)
    set_masks(model, {layer: torch.rand(module.weight.shape, generator=dice) >= sparsity
                      for layer, module in prunable_layers(model).items()})
    return model


def effective(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state without the values that pruned weights had."""
    return {key: value * state[key[:-4] + "mask"] if key.endswith("weight_orig") else value
            for key, value in state.items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def export_file(path: Path, form: str, out: Path, *words: str) -> Path:
    inspect_checkpoint.main(["--file", str(path), "--export", form, "--out", str(out), *words])
    return out


def with_card(name: str, path: Path) -> Path:
    """A pruned model and its run card."""
    checkpoint.save_checkpoint(pruned(name).state_dict(), path)
    known = {"image_size": 32, "classes": list("abcdefghij"), "mean": [0.5] * 3, "std": [0.2] * 3}
    card = {"sha256": checkpoint.file_digest(path), "config": {"stage": "prune"}, "input": known, "val_acc": 50.0}
    checkpoint.save_json(card, checkpoint.card_path(path))
    return path


@pytest.fixture
def start(tmp_path) -> Path:
    """A pruned resnet20 with a run card."""
    return with_card("resnet20", tmp_path / "start" / "pruned.pth")


# --- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_model_goes_out_dense_and_compact_and_comes_back(name, tmp_path):
    model = pruned(name)
    expected = effective(model.state_dict())
    torch.save(model.state_dict(), tmp_path / "pruned.pth")
    compact = export_file(tmp_path / "pruned.pth", "sparse", tmp_path / "a.sparse")
    assert_equal(checkpoint.load_checkpoint(compact), expected)
    assert describe(load_artifact(compact))["model"] == name
    dense = torch.load(export_file(compact, "dense", tmp_path / "dense.pth"), weights_only=True)
    assert all(value.is_contiguous() for value in dense.values())
    bare = MODELS[name](10)
    bare.load_state_dict(dense)
    back = model_loader(name, seed=1)
    load_model_state(back, dense)
    assert_equal(effective(back.state_dict()), expected)
    weights = {layer: module.weight for layer, module in prunable_layers(bare).items()}
    assert all(torch.equal(weights[layer] != 0, mask) for layer, mask in get_masks(model).items())


def with_lively_statistics(model: nn.Module) -> nn.Module:
    """Batch norm as after a training, so that logits depend on the image."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    return model.eval()


SHALLOW = [name for name in MODELS if name not in ("resnet32", "resnet44", "resnet56")]  # resnet20 is of their kind
AGREE = "onnxruntime's logits are PyTorch's within"


@pytest.fixture(scope="module")
def whole_onnx(tmp_path_factory) -> Callable[[str], tuple[nn.Module, Path]]:
    """A half pruned model by name, and the ONNX file that it went out as; both made once."""
    @cache
    def make(name: str) -> tuple[nn.Module, Path]:
        model, folder = with_lively_statistics(pruned(name, 0.5)), tmp_path_factory.mktemp(name)
        torch.save(model.state_dict(), folder / "pruned.pth")
        with redirect_stdout(io.StringIO()) as said:
            out = export_file(folder / "pruned.pth", "onnx", folder / "a.onnx")
        assert AGREE in said.getvalue()
        return model, out
    return make


@needs_onnx
@pytest.mark.parametrize("name", SHALLOW)
def test_every_architecture_goes_out_as_onnx(name, whole_onnx):
    import onnxruntime

    model, out = whole_onnx(name)
    assert str(Path.cwd()).encode() not in out.read_bytes()
    session = onnxruntime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            logits = model(images).numpy()
        assert np.ptp(logits) > 1e-3
        scale = max(1.0, np.abs(logits).max())
        np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], logits, atol=1e-4 * scale, rtol=0)


@needs_onnx
@pytest.mark.parametrize("name", ["resnet20", "alexnet", "shufflenetv2"])
def test_compact_networks_go_out_as_onnx(name, whole_onnx, tmp_path, capsys):
    torch.save(with_lively_statistics(pruned(name, 0.98)).state_dict(), tmp_path / "pruned.pth")
    out = export_file(tmp_path / "pruned.pth", "onnx", tmp_path / "a.onnx", "--compact")
    assert AGREE in capsys.readouterr().out
    assert out.stat().st_size < whole_onnx(name)[1].stat().st_size


def test_a_compact_network_goes_out_and_is_built_and_described(tmp_path, capsys):
    start = with_card("resnet20", tmp_path / "pruned.pth")
    out = export_file(start, "dense", tmp_path / "compact.pth", "--compact")
    assert "now a dense network of" in capsys.readouterr().out
    model, images = model_loader("resnet20"), torch.randn(2, 3, 32, 32)
    load_model_state(model, checkpoint.load_checkpoint(start))
    assert largest_difference(model, load_network(out), images) < 1e-5
    described = describe(load_artifact(out))
    assert described["kind"].startswith("compact network") and described["weights"] < 270_896
    assert checkpoint.read_card(out)["exported"]["format"] == "compact dense"
    assert described["input"]["mean"] == [0.5] * 3
    for words in (["--export", "dense", "--out", "b.pth"], ["--finetune"]):
        with pytest.raises(UserError, match="is a compact network"):
            inspect_checkpoint.main(["--file", str(out), *words])
    with pytest.raises(UserError, match="is no compact network"):
        load_network(start)


def test_where_nothing_is_dead_that_is_said(tmp_path, capsys):
    torch.save(model_loader("resnet20", seed=0).state_dict(), tmp_path / "dense.pth")
    export_file(tmp_path / "dense.pth", "dense", tmp_path / "compact.pth", "--compact")
    assert "270,896: no filter is dead, nothing was removed" in capsys.readouterr().out


@needs_onnx
def test_an_onnx_file_says_what_its_input_is_and_a_wrong_one_is_not_written(tmp_path, monkeypatch):
    import onnx

    start = with_card("alexnet", tmp_path / "start.pth")
    out = export_file(start, "onnx", tmp_path / "a.onnx")
    (known,) = [entry.value for entry in onnx.load(out).metadata_props if entry.key == "input"]
    assert json.loads(known) == checkpoint.read_card(start)["input"] == checkpoint.read_card(out)["input"]
    monkeypatch.setattr(export, "_onnx_difference", lambda *_: 2e-4)
    with pytest.raises(RunFailed, match="differ from PyTorch's by 0.0002"):
        export_file(start, "onnx", tmp_path / "b.onnx")
    monkeypatch.setattr(export.torch.onnx, "export", lambda *_, **__: 1 / 0)
    with pytest.raises(RunFailed, match="exporter failed: ZeroDivisionError"):
        export_file(start, "onnx", tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists() and not checkpoint.card_path(tmp_path / "b.onnx").exists()


def test_without_the_extra_one_line_says_what_to_install(start, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match=r"^ONNX needs onnxscript: pip install -r requirements-export.txt$"):
        export_file(start, "onnx", tmp_path / "a.onnx")


def test_a_model_that_is_none_of_ours_goes_out_without_its_network(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    set_masks(model, {"0": torch.eye(4)[:, :3]})
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}},
               tmp_path / "foreign.pth")
    out = export_file(tmp_path / "foreign.pth", "sparse", tmp_path / "a.sparse")
    assert_equal(checkpoint.load_checkpoint(out), effective(model.state_dict()))
    monkeypatch.setattr(export, "check_onnx_packages", lambda: None)
    with pytest.raises(UserError, match="fits none of this project's models"):
        export_file(out, "onnx", tmp_path / "a.onnx")


@pytest.mark.parametrize("side", ["32", 0, -1, 10**9, 31.5, True, None, [32]])
def test_a_checkpoint_that_lies_about_its_images_is_refused(side, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "check_onnx_packages", lambda: None)
    torch.save({"net": model_loader("alexnet", seed=0).state_dict(), "input": {"image_size": side}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="by its own account"):
        export_file(tmp_path / "a.pth", "onnx", tmp_path / "a.onnx")


# --- who reads a sparse file --------------------------------------------------------------------------------------


def test_every_reader_takes_a_compact_file(start, tmp_path, monkeypatch):
    monkeypatch.setattr(stage1, "check_data", lambda *_: None)
    run = SimpleNamespace(root=tmp_path, m_name="resnet20", device=torch.device("cpu"),
                          new_model=lambda: model_loader("resnet20", seed=0))
    path = export_file(start, "sparse", tmp_path / "a.sparse")
    expected = effective(checkpoint.load_checkpoint(start))
    args = inspect_checkpoint.parse_args(["--file", "x", "--finetune"])
    begin = SimpleNamespace(starting_checkpoint=str(path), start_sparsity=0.9)
    checkpoint.save_checkpoint(run.new_model().state_dict(), checkpoint.dense_path(tmp_path, "resnet20"))
    for model in (stage1.load_outcome(run, path).model, stage1.load_models(run, begin)[1].model,
                  finetuning.load_source(run, load_artifact(path), finetuning.phases(args), args).model):
        assert_equal(dict(model.state_dict()), expected)
    card = checkpoint.read_card(path)
    assert card["config"] == {"stage": "prune"} and card["exported"] == {
        "format": "sparse", "dtype": "float32", "from": checkpoint.file_digest(start)}


def take_the_place_of(file: Path, folder: Path) -> None:
    """Puts a sparse file, with its card, where the checkpoint was that it was made from."""
    compact = export_file(file, "sparse", folder / f"{file.stem}.sparse")
    checkpoint.card_path(compact).replace(checkpoint.card_path(file))
    compact.replace(file)
    assert file.read_bytes().startswith(sparse_file.MAGIC)


def test_main_resumes_from_compact_files(image_folder, tmp_path, capsys):
    words = ["--m_name", "resnet20", "--max_epochs", "1", "--finetune_epochs", "0", "--batch_size", "32", "--device",
             "cpu", "--precision", "fp32", "--data_dir", str(image_folder), "--root", str(tmp_path)]
    main_script.main([*words, "--sparsity", "0.9"])
    dense, sparse = checkpoint.dense_path(tmp_path, "resnet20"), checkpoint.pruned_path(tmp_path, "resnet20", 0.9)
    expected = checkpoint.load_checkpoint(sparse)
    take_the_place_of(sparse, tmp_path)
    capsys.readouterr()
    main_script.main([*words, "--resume", "--sparsity", "0.9", "0.95"])
    assert capsys.readouterr().out.count("reusing ") == 2
    for path in sparse.parent.iterdir():
        path.unlink()
    take_the_place_of(dense, tmp_path)
    main_script.main([*words, "--resume", "--sparsity", "0.9"])
    assert_equal(checkpoint.load_checkpoint(sparse), expected)


def test_float16_halves_the_weights_and_says_so_in_the_card(start, tmp_path):
    whole, half = (export_file(start, "sparse", tmp_path / f"{kind}.sparse", "--dtype", kind)
                   for kind in sparse_file.FLOATS)
    survivors = count_pruned_params(pruned("resnet20")).surviving
    assert whole.stat().st_size - half.stat().st_size == pytest.approx(2 * survivors, abs=30)
    assert checkpoint.read_card(half)["exported"]["dtype"] == "float16"
    for (key, one), other in zip(checkpoint.load_checkpoint(whole).items(), checkpoint.load_checkpoint(half).values()):
        assert torch.equal(one.half().float() if key.endswith("_orig") else one, other), key


def test_a_rounded_model_has_no_accuracy_of_the_other_until_it_is_measured(start, tmp_path, monkeypatch):
    card = json.loads(checkpoint.card_path(start).read_text())
    checkpoint.save_json({**card, "test_acc": 51.0, "best_epoch": 3}, checkpoint.card_path(start))
    whole, half = (export_file(start, "sparse", tmp_path / f"{kind}.sparse", "--dtype", kind)
                   for kind in sparse_file.FLOATS)
    assert {"val_acc": 50.0, "test_acc": 51.0}.items() <= checkpoint.read_card(whole).items()
    assert not {"val_acc", "test_acc"} & set(checkpoint.read_card(half)) and checkpoint.read_card(half)["best_epoch"]
    assert describe(load_artifact(half))["input"]["image_size"] == 32
    monkeypatch.setattr(stage1, "check_data", lambda *_: None)
    monkeypatch.setattr(stage1, "evaluate", lambda *_: SimpleNamespace(accuracy=49.0))
    run = SimpleNamespace(device="cpu", new_model=lambda: model_loader("resnet20", seed=0), precision="fp32", val=None,
                          test=SimpleNamespace(read_as=lambda _: None))
    stage1.read_test(run, [stage1.load_outcome(run, path) for path in (whole, half)])
    assert [checkpoint.read_card(path)["test_acc"] for path in (whole, half)] == [51.0, 49.0]


def test_float64_is_rounded_in_a_line_and_never_to_infinity(tmp_path, capsys):
    state = {key: value.double() if value.is_floating_point() else value
             for key, value in pruned("resnet20").state_dict().items()}
    state["conv1.weight_orig"] += 1e-12 * (1 - state["conv1.weight_mask"])  # under the mask, which is not written
    for number, (change, said) in enumerate([(0.0, ""), (1e-12, "its float64 values are rounded to float32")]):
        state["linear.bias"] += change
        torch.save(state, tmp_path / f"{number}.pth")
        out = export_file(tmp_path / f"{number}.pth", "sparse", tmp_path / f"{number}.sparse")
        assert capsys.readouterr().err == (f"note: {tmp_path / f'{number}.pth'}: {said}\n" if said else "")
        assert torch.equal(checkpoint.load_checkpoint(out)["linear.bias"], state["linear.bias"].float())
    state["linear.bias"][0] = 1e300
    torch.save(state, tmp_path / "large.pth")
    with pytest.raises(UserError, match=r"large.pth: linear.bias has values up to 1e\+300, and float32 ends at \S+$"):
        export_file(tmp_path / "large.pth", "sparse", tmp_path / "large.sparse")
    assert not (tmp_path / "large.sparse").exists()


def test_a_model_too_large_for_a_compact_file_is_refused_in_a_line(start, tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_file, "LARGEST_MODEL", 270_000)
    with pytest.raises(UserError, match="pruned.pth: a sparse file cannot hold it: .*more than 270,000 elements$"):
        export_file(start, "sparse", tmp_path / "a.sparse")
    assert not (tmp_path / "a.sparse").exists()


@pytest.mark.parametrize("words", [(), ("--compact",)])
def test_an_input_that_holds_itself_is_ignored(words, tmp_path):
    known = {}
    known["mean"] = known
    torch.save({"net": model_loader("resnet20", seed=0).state_dict(), "input": known}, tmp_path / "a.pth")
    assert load_artifact(tmp_path / "a.pth").input == {}
    assert export_file(tmp_path / "a.pth", "dense", tmp_path / "b.pth", *words).is_file()


# --- what is refused, and what is kept -----------------------------------------------------------------------------


@pytest.mark.parametrize("words, said", [
    (["--out", "a"], "--out has no effect without --export"),
    (["--dtype", "float16"], "--dtype has no effect without --export"),
    (["--compact"], "--compact has no effect without --export"),
    (["--export", "sparse", "--out", "a", "--compact"], "--compact is for --export dense and onnx"),
    (["--export", "dense"], "--out FILE"),
    (["--export", "dense", "--out", "a", "--dtype", "float16"], "--dtype is for --export sparse"),
    (["--export", "dense", "--out", "a", "--finetune"], "leave out --finetune"),
    (["--export", "dense", "--out", "a", "--json"], "leave out --json"),
    (["--export", "dense", "--out", "a", "--resume"], "--resume has no effect without --finetune"),
    (["--export", "tflite", "--out", "a"], "--export"),
])
def test_options_in_conflict_are_errors(words, said, capsys):
    with pytest.raises((SystemExit, UserError)) as caught:
        inspect_checkpoint.main(["--file", "missing.pth", *words])
    message = capsys.readouterr().err if isinstance(caught.value, SystemExit) else str(caught.value)
    assert said in message and len(message.strip().splitlines()) == 1


def test_nothing_is_replaced_unless_asked_and_the_source_never(start, tmp_path):
    before = start.read_bytes(), checkpoint.card_path(start).read_bytes()
    for words in ([], ["--overwrite"]):
        with pytest.raises(UserError, match="is the file that is exported"):
            export_file(start, "sparse", start, *words)
    with pytest.raises(UserError, match=r"pruned.json exists"):
        (start.parent / "other.pth").write_bytes(start.read_bytes())
        export_file(start.parent / "other.pth", "dense", start.parent / "pruned")
    assert (start.read_bytes(), checkpoint.card_path(start).read_bytes()) == before
    out = export_file(start, "sparse", tmp_path / "a.sparse")
    first = out.read_bytes()
    with pytest.raises(UserError, match="exists; give --out another name, or --overwrite"):
        export_file(start, "dense", out)
    assert out.read_bytes() == first
    export_file(start, "sparse", out, "--overwrite")
    assert out.read_bytes() == first, "equal content, equal bytes"
    export_file(start.parent / "other.pth", "sparse", out, "--overwrite")  # a source without a card
    assert not checkpoint.card_path(out).exists(), "a card of the file that was there before"


def test_a_full_disk_leaves_what_was_there(start, tmp_path, monkeypatch):
    out = export_file(start, "sparse", tmp_path / "a.sparse")
    kept = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", full)
    for form in ("sparse", "dense"):
        with pytest.raises(UserError, match="no space left"):
            export_file(start, form, out, "--overwrite")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == kept


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_kill_leaves_whole_files_and_no_card_of_other_bytes(killed_at, start, tmp_path, monkeypatch):
    out = export_file(start, "sparse", tmp_path / "a.sparse")
    first, calls, replace = out.read_bytes(), [], os.replace

    def killed(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) == killed_at:  # before the model, and between it and its card
            raise KeyboardInterrupt
        replace(*paths)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export_file(start, "sparse", out, "--overwrite", "--dtype", "float16")
    assert (out.read_bytes() == first) == (killed_at == 1)
    card = checkpoint.read_card(out)
    assert card is None if killed_at == 2 else card["exported"]["dtype"] == "float32"
    checkpoint.load_checkpoint(out)
    monkeypatch.setattr(os, "replace", replace)
    export_file(start, "sparse", out, "--overwrite", "--dtype", "float16")
    assert checkpoint.read_card(out)["exported"]["dtype"] == "float16"


def test_a_model_of_no_use_is_not_exported(tmp_path):
    model = pruned("resnet20")
    for number, (key, value, said) in enumerate([("linear.bias", float("nan"), "not finite"),
                                                 ("conv1.weight_mask", 0.5, "other than 0 and 1"),
                                                 ("conv1.weight_orig", 1e6, "leave out --dtype float16")]):
        state = clone_model(model).state_dict()
        state[key][(0,) * state[key].dim()] = value
        torch.save(state, tmp_path / f"{number}.pth")
        words = ["--dtype", "float16"] if value == 1e6 else []
        with pytest.raises(UserError, match=said):
            export_file(tmp_path / f"{number}.pth", "sparse", tmp_path / "a.sparse", *words)
    torch.save({"agent": {"lstm": torch.zeros(2)}, "epoch": 7}, tmp_path / "agent.pth")
    with pytest.raises(UserError, match="holds no finished model"):
        export_file(tmp_path / "agent.pth", "sparse", tmp_path / "a.sparse")
    assert not (tmp_path / "a.sparse").exists()


def test_from_the_command_line(start, run_script, tmp_path):
    words = ["inspect_checkpoint.py", "--file", start, "--export", "sparse", "--out", tmp_path / "new" / "a.sparse"]
    process = run_script(*words)
    assert process.returncode == 0 and not process.stderr, process.stderr
    size = (tmp_path / "new" / "a.sparse").stat().st_size
    assert f"a.sparse: {size:,} bytes; " in process.stdout and "of 270,896 weights" in process.stdout
    assert_user_error(run_here(*words), "exists", "--overwrite")
