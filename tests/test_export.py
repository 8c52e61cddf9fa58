"""Every format, loaded by the library it is for with the lines that the tool prints, gives the same logits."""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models import npz
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests import fake_npz
from tools import export
from utils import checkpoint


def run(capsys, *args):
    """Status, standard output and standard error's lines."""
    try:
        status = export.main([*map(str, args)])
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, out, err.splitlines()


def original(path):
    """The fine-tuned model, pictures for it and its logits."""
    told = json.loads(Path(path).with_suffix(".json").read_text())
    config = replace(CONFIGS[told["model_type"]], gelu=told["gelu"])
    model = VisionTransformer(config, told["img_size"], len(told["classes"])).eval()
    model.load_state_dict(torch.load(path))
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(5, 3, model.img_size, model.img_size, generator=generator) * 2 - 1
    with torch.no_grad():
        return model, pictures, model(pictures)[0]


def exported(capsys, path, kind, output):
    """What the printed lines make of the exported file: a variable ``model``."""
    status, out, err = run(capsys, "--load_model_dir", path, "--format", kind, "--output", output)
    assert (status, err) == (0, [])
    assert f"{output}: {os.path.getsize(output):,} bytes" in out
    variables = {}
    exec(out, variables)
    return variables["model"]


def assert_same_logits(path, compute, sizes=(5, 1, 2)):
    """``compute`` gives the original's logits, for any number of pictures."""
    _, pictures, expected = original(path)
    assert expected.std() > 0.05  # logits that say something
    for size in sizes:
        with torch.no_grad():
            logits = compute(pictures[:size])
        assert (torch.as_tensor(logits) - expected[:size]).abs().max() < 1e-4


def make_checkpoint(folder, model_type, img_size, gelu="erf"):
    """Random weights of any model with a description, without a training."""
    config = CONFIGS[model_type]
    weights = fake_npz.arrays(config, img_size, num_classes=10)
    names = [f"class {i}" for i in range(10)]
    path = str(folder / f"{model_type}_checkpoint.bin")
    checkpoint.save_weights(
        path,
        npz.to_state_dict(weights, config, img_size, num_classes=10),
        checkpoint.Description(model_type, img_size, names, gelu, "pets", 8, 0.5),
    )
    return path


def test_npz_goes_back_bit_for_bit(finetuned_any, tmp_path, capsys):
    model = exported(capsys, finetuned_any, "npz", tmp_path / "new" / "m.npz")
    ours = original(finetuned_any)[0].state_dict()
    assert all(torch.equal(x, ours[name]) for name, x in model.state_dict().items())
    assert_same_logits(finetuned_any, lambda x: model(x)[0])


def test_a_trained_checkpoint_exports(finetuned_digits, tmp_path, capsys):
    model = exported(capsys, finetuned_digits, "pt2", tmp_path / "m.pt2")
    assert_same_logits(finetuned_digits, model)


def test_pt2_takes_any_number_of_pictures(finetuned_any, tmp_path, capsys):
    model = exported(capsys, finetuned_any, "pt2", tmp_path / "m.pt2")
    assert_same_logits(finetuned_any, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["any_checkpoint.bin", "any_checkpoint.json", "m.pt2"]


@pytest.fixture
def onnx_packages():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package} (requirements-dev.txt)")


@pytest.mark.usefixtures("onnx_packages")
def test_onnx_takes_any_number_of_pictures(finetuned_any, tmp_path, capsys):
    import onnx

    output = tmp_path / "new" / "m.onnx"
    model = exported(capsys, finetuned_any, "onnx", output)
    assert [p.name for p in output.parent.iterdir()] == ["m.onnx"]
    onnx.checker.check_model(str(output), full_check=True)
    assert_same_logits(finetuned_any, lambda x: model.run(None, {"pictures": x.numpy()})[0])


@pytest.mark.usefixtures("onnx_packages")
def test_weights_too_large_for_onnx_go_into_a_file_beside_it(finetuned_digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "ONNX_LIMIT_BYTES", 0)
    model = exported(capsys, finetuned_digits, "onnx", tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert_same_logits(finetuned_digits, lambda x: model.run(None, {"pictures": x.numpy()})[0])


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_its_installation(finetuned_digits, tmp_path, monkeypatch, capsys, missing):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    output = tmp_path / "m.onnx"
    args = ["--load_model_dir", finetuned_digits, "--format", "onnx", "--output", output]
    status, _, err = run(capsys, *args)
    assert status == 2
    assert f"pip install {missing}" in err[0]
    assert not output.exists()


@pytest.mark.parametrize("kind", ["timm", "hf"])
@pytest.mark.parametrize(
    ("model_type", "img_size", "gelu"), [("testing", 48, "erf"), ("testing", 32, "tanh"), ("ViT-Ti_16", 64, "erf")]
)
def test_plain_models_load_strictly_in_other_libraries(tmp_path, capsys, kind, model_type, img_size, gelu):
    library = "transformers" if kind == "hf" else "timm"
    pytest.importorskip(library, reason=f"needs {library} (requirements-dev.txt)")
    path = make_checkpoint(tmp_path, model_type, img_size, gelu)
    model = exported(capsys, path, kind, tmp_path / "m.bin")
    assert not model.training
    assert_same_logits(path, lambda x: model(x).logits if kind == "hf" else model(x))


@pytest.mark.parametrize(("model_type", "img_size"), [("R-ViT-Ti_16", 64), ("R26-ViT-S_32", 72)])
def test_hybrids_load_strictly_in_timm(tmp_path, capsys, model_type, img_size):
    pytest.importorskip("timm", reason="needs timm (requirements-dev.txt)")
    path = make_checkpoint(tmp_path, model_type, img_size)
    model = exported(capsys, path, "timm", tmp_path / "m.bin")
    assert_same_logits(path, model)


@pytest.mark.parametrize("model_type", [name for name, config in CONFIGS.items() if not name.startswith("testing")])
def test_every_model_has_timms_names_and_shapes(model_type):
    pytest.importorskip("timm", reason="needs timm (requirements-dev.txt)")
    config = CONFIGS[model_type]
    size = 7 * config.stride
    with torch.device("meta"):
        ours = export.to_timm(VisionTransformer(config, size, 10).state_dict())
        variables = {}
        exec(export.timm_lines(model_type, config, size, 10), variables)
    theirs = variables["model"].state_dict()
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}


@pytest.mark.parametrize("deviation", [1e-7, 1e-5, 1e-3, 1.0])
def test_kernels_come_out_of_timms_standardisation_as_out_of_googles(deviation):
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(8, 4, 3, 3, generator=generator, dtype=torch.float64) * deviation + 0.3
    std, mean = torch.std_mean(kernel, dim=(1, 2, 3), keepdim=True, correction=0)
    google = (kernel - mean) / (std + 1e-5)
    var, mean = torch.var_mean(given := export.for_timms_standardisation(kernel), dim=(1, 2, 3), keepdim=True,
                               correction=0)  # fmt: skip
    np.testing.assert_allclose((given - mean) / (var + 1e-8).sqrt(), google, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "words"), [("hf", ["no hybrids", "timm"]), ("timm", ["no hybrid of the shape of testing-hybrid"])]
)
def test_hybrids_that_a_library_lacks_are_one_line(tmp_path, capsys, kind, words):
    path = make_checkpoint(tmp_path, "testing-hybrid", 72)
    output = tmp_path / "m.bin"
    status, out, err = run(capsys, "--load_model_dir", path, "--format", kind, "--output", output)
    assert (status, out) == (2, "")
    assert len(err) == 1
    assert err[0].startswith("tools.export: error: ")
    for word in words:
        assert word in err[0]
    assert not output.exists()


def test_the_checkpoint_itself_is_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = make_checkpoint(tmp_path, "testing", 32)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for output in (path, "./" + os.path.basename(path), path.replace(".bin", ".json")):
        status, _, err = run(capsys, "--load_model_dir", path, "--format", "npz", "--output", output)
        assert status == 2
        assert "would replace a file that is read" in err[0]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--format", "tflite", "--output", "m"], ["tflite", "onnx"]),
        (["--format", "npz"], ["--output"]),
        (["--format", "npz", "--output", "."], ["--output . is a folder"]),
        (["--format", "npz", "--output", "taken/m.npz"], ["the folder taken cannot be written"]),
        (["--format", "npz", "--output", "m.npz", "--img_size", "64"], ["trained at --img_size 32, not 64"]),
    ],
)
def test_wrong_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    path = make_checkpoint(tmp_path, "testing", 32)
    status, out, err = run(capsys, "--load_model_dir", path, *args)
    assert (status, out) == (2, "")
    assert len(err) <= 2, err  # a flag that contradicts the description is told before
    for word in words:
        assert word in err[-1]
