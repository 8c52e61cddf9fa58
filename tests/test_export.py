"""The command line of the exports, and Google's layout; test_export_*.py has the other formats."""

import os
import resource
import shlex
import signal
from pathlib import Path

import pytest
import torch

import train
from tests.helpers.exporting import assert_same_logits, export_as, make_checkpoint, original, run, variables_of
from utils import checkpoint, weights


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def metadata_of(path):
    """The metadata beside an .npz, whose checksum is compared with the file's arrays."""
    return checkpoint.read_metadata(str(path), weights.read(str(path)).tensors())


# ---- npz ----


def test_npz_goes_back_bit_for_bit_with_its_metadata(finetuned_any, tmp_path):
    output = tmp_path / "new" / "m.npz"
    lines = export_as("npz", finetuned_any, output)
    assert f"{output}: {output.stat().st_size:,} bytes" in lines
    model = variables_of(lines)["model"]
    ours = original(finetuned_any)[0].state_dict()
    assert all(torch.equal(x, ours[name]) for name, x in model.state_dict().items())
    assert_same_logits(finetuned_any, lambda x: model(x)[0])
    assert metadata_of(output) == checkpoint.read_metadata(finetuned_any, torch.load(finetuned_any, weights_only=True))
    assert metadata_of(output).classes == ["ant", "bee", "cat"]


def test_flags_name_what_no_metadata_does_and_overrule_it(tmp_path):
    path, output = make_checkpoint(tmp_path, "testing", 32), tmp_path / "m.npz"
    export_as("npz", path, output)
    export_as("npz", path, output, "--classes", "a,b,c,d,e,f,g,h,i,j")  # in place of the metadata that is there
    metadata = metadata_of(output)
    assert (metadata.classes, metadata.dataset) == ([*"abcdefghij"], "pets")
    Path(path).with_suffix(".json").unlink()
    flags = ["--model_type", "testing", "--img_size", "32", "--gelu", "tanh"]
    assert "head of zeros" in export_as("npz", path, output, *flags)
    assert not (tmp_path / "m.json").exists()
    assert "head of zeros" not in export_as("npz", path, output, *flags, "--classes", "0,1,2,3,4,5,6,7,8,9")
    metadata = metadata_of(output)
    assert (metadata.model_type, metadata.img_size, metadata.gelu) == ("testing", 32, "tanh")
    assert metadata.classes == [*"0123456789"]


def test_the_command_that_an_npz_prints_starts_a_training(finetuned_digits, tmp_path, monkeypatch):
    output = tmp_path / "it's.npz"
    lines = export_as("npz", finetuned_digits, output)
    command = next(line for line in lines.splitlines() if " train.py " in line)
    args = shlex.split(command.partition(" train.py ")[2].replace("NAME", "new").replace("DATASET", "digits"))
    monkeypatch.chdir(tmp_path)
    steps = ["--num_steps", "1", "--warmup_steps", "0", "--train_batch_size", "8", "--device", "cpu"]
    assert train.main([*args, *steps]) == 0
    assert (tmp_path / "output" / "new_checkpoint.bin").exists()


def test_a_json_of_something_else_is_not_replaced(tmp_path):
    path = make_checkpoint(tmp_path, "testing", 32)
    for beside in ("{}", "[1]", "no json"):
        (tmp_path / "m.json").write_text(beside)
        status, out, err = run("--load_model_dir", path, "--format", "npz", "--output", tmp_path / "m.npz")
        assert (status, out, len(err)) == (2, "", 1)
        assert "m.json" in err[0]
        assert (tmp_path / "m.json").read_text() == beside
        assert not (tmp_path / "m.npz").exists()


# ---- what may be written where ----


def test_a_file_that_is_read_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make_checkpoint(tmp_path, "testing", 32)
    export_as("hf", path, "hf")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    beside = path.replace(".bin", ".npz")  # whose .json would be the checkpoint's
    for output in (path, "./" + os.path.basename(path), path.replace(".bin", ".json"), beside):
        status, _, err = run("--load_model_dir", path, "--format", "npz", "--output", output)
        assert (status, len(err)) == (2, 1)
        assert "is read" in err[0]
    for kind, output in (("npz", "hf/model.safetensors"), ("onnx", "hf/model.safetensors"), ("npz", "hf/model.npz")):
        status, _, err = run("--load_model_dir", "hf", "--format", kind, "--output", output)
        assert (status, len(err)) == (2, 1)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.*")} == before


@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_a_folder_takes_the_place_of_nothing_but_an_empty_one(tmp_path, monkeypatch, kind):
    path = make_checkpoint(tmp_path, "testing", 32)
    for folder in ("full", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path / "full")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    for output in ("../full", "thesis.txt", "."):
        status, out, err = run("--load_model_dir", path, "--format", kind, "--output", output)
        assert (status, out, len(err)) == (2, "", 1)
        assert f"--output {output} is " in err[0]
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.*")} == before
    for output in (tmp_path / "empty", "../new/"):
        export_as(kind, path, output)
        assert "model.safetensors" in names_in(output)


@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_a_killed_export_leaves_nothing_under_the_name(tmp_path, monkeypatch, kind):
    path, output = make_checkpoint(tmp_path, "testing", 32), tmp_path / "out" / "m"
    child = os.fork()
    if child == 0:  # dies when all is written, before it gets its name
        monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        run("--load_model_dir", path, "--format", kind, "--output", output)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [name[:3] for name in names_in(output.parent)] == [".m."]
    export_as(kind, path, output)
    assert output.is_dir()


@pytest.mark.parametrize("kind", ["npz", "timm", "hf"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, kind):
    path, output = make_checkpoint(tmp_path, "testing", 32), tmp_path / "out" / "m.npz"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the weights take more
    try:
        status, out, err = run("--load_model_dir", path, "--format", kind, "--output", output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status, out, len(err)) == (1, "", 1)
    assert f"{output} could not be written" in err[0]
    assert names_in(output.parent) == []
