"""Programs of torch.export, and of ONNX in every opset through ONNX Runtime, give the logits of the model."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest

from models.configs import CONFIGS
from tests.helpers import exporting
from tests.helpers.exporting import NUM_CLASSES, assert_same_logits, export_as, predicted, variables_of
from tools import _export_programs

#: Models that are traced quickly, with one block and one residual unit, and the size of their images.  The hybrid has
#: every operator of the plain one.
MODELS = {
    "plain": (replace(CONFIGS["testing"], num_layers=1), 48),
    "hybrid": (replace(CONFIGS["testing-hybrid"], num_layers=1, resnet_units=(1,)), 28),
}


@pytest.fixture
def make_checkpoint(tmp_path, monkeypatch, draw):
    """``make_checkpoint("plain")`` writes one with random weights; the current folder has an image."""
    for name, (config, _) in MODELS.items():
        monkeypatch.setitem(CONFIGS, name, config)
    monkeypatch.chdir(tmp_path)
    draw("image.jpg", size=(90, 50))
    return lambda kind: exporting.make_checkpoint(tmp_path, kind, MODELS[kind][1], "tanh")


@pytest.fixture
def onnx():
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package} (requirements-dev.txt)")
    return pytest.importorskip("onnx", reason="needs onnx (requirements-dev.txt)")


def test_pt2_takes_any_number_of_images(make_checkpoint, tmp_path):
    path = make_checkpoint("hybrid")
    model = variables_of(export_as("pt2", path, tmp_path / "new" / "m.pt2"))["model"]
    assert_same_logits(path, model)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["m.pt2"]


@pytest.mark.parametrize("opset", [17, 18, 20])
def test_a_program_gives_the_logits_of_the_model_in_every_opset(make_checkpoint, onnx, tmp_path, capfd, opset):
    path, output = make_checkpoint("hybrid"), tmp_path / "new" / "m.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines = export_as("onnx", path, output, "--opset", opset)
    assert capfd.readouterr() == ("", "")  # nothing of PyTorch's around what the tool prints
    assert [p.name for p in output.parent.iterdir()] == ["m.onnx"]
    program = onnx.load(output)
    onnx.checker.check_model(program, full_check=True)
    assert [(x.domain, x.version) for x in program.opset_import] == [("", opset)]
    assert str(tmp_path.parent).encode() not in output.read_bytes()
    variables = variables_of(lines)
    metadata = variables["model"].get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == [f"class {i}" for i in range(NUM_CLASSES)]
    assert (metadata["img_size"], json.loads(metadata["input_range"])) == ("28", [-1, 1])
    assert variables["printed"] == next(iter(predicted(path, "image.jpg")[0]))
    assert_same_logits(path, lambda x: variables["model"].run(None, {"pictures": x.numpy()})[0])


def test_weights_too_large_for_onnx_go_into_a_file_beside_it(make_checkpoint, onnx, tmp_path, monkeypatch):
    monkeypatch.setattr(_export_programs, "ONNX_LIMIT_BYTES", 0)
    path, output = make_checkpoint("plain"), tmp_path / "new" / "m.onnx"
    output.parent.mkdir()
    output.write_text("an earlier one")
    unnamed = shutil.copy(path, tmp_path / "reference.bin")  # nothing names this one's classes
    flags = ["--model_type", "plain", "--img_size", "48", "--gelu", "tanh", "--opset", "20"]
    lines = export_as("onnx", unnamed, output, *flags)
    assert [x.version for x in onnx.load(output, load_external_data=False).opset_import] == [20]
    assert sorted(p.name for p in output.parent.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert f"{output}.data" in lines
    variables = variables_of(lines)
    assert "classes" not in variables["model"].get_modelmeta().custom_metadata_map
    assert f"class {variables['printed']}" == next(iter(predicted(path, "image.jpg")[0]))
    assert_same_logits(path, lambda x: variables["model"].run(None, {"pictures": x.numpy()})[0])
