"""Programs of torch.export, and of ONNX in every opset through ONNX Runtime, give the logits of the model."""

import importlib.util
import json
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from models.configs import CONFIGS
from tests.helpers.exporting import (
    NUM_CLASSES,
    assert_same_logits,
    export_as,
    make_checkpoint,
    predicted,
    run,
    variables_of,
)
from tools import _export_programs

#: What makes tracing quick: one block, and one residual unit.
MODELS = {
    "plain": replace(CONFIGS["testing"], num_layers=1),
    "hybrid": replace(CONFIGS["testing-hybrid"], num_layers=1, resnet_units=(1,)),
}
IMG_SIZES = {"plain": 48, "hybrid": 28}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Paths of a plain and of a hybrid model with random weights."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, config in MODELS.items():
            patch.setitem(CONFIGS, kind, config)
        folder = tmp_path_factory.mktemp("checkpoints")
        return {kind: make_checkpoint(folder, kind, IMG_SIZES[kind], "tanh") for kind in MODELS}


@pytest.fixture(scope="module")
def traced():
    """What was traced before, by the size of the images, which tells the models apart."""
    return {}


@pytest.fixture
def path(request, checkpoints, traced, tmp_path, monkeypatch, draw):
    """The checkpoint of the parameter ``kind``, traced only once, and a current folder with an image."""
    kind = request.node.callspec.params.get("kind", "plain") if hasattr(request.node, "callspec") else "plain"
    trace = torch.export.export

    def trace_once(module, args, **options):
        size = args[0].shape[-1]
        if size not in traced:
            traced[size] = trace(module, args, **options)
        return traced[size]

    monkeypatch.setattr(torch.export, "export", trace_once)
    for name, config in MODELS.items():
        monkeypatch.setitem(CONFIGS, name, config)
    monkeypatch.chdir(tmp_path)
    draw("image.jpg", size=(90, 50))
    return checkpoints[kind]


@pytest.mark.parametrize("kind", MODELS)
def test_pt2_takes_any_number_of_images(path, tmp_path, kind):
    model = variables_of(export_as("pt2", path, tmp_path / "new" / "m.pt2"))["model"]
    assert_same_logits(path, model)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["m.pt2"]


@pytest.fixture
def onnx_packages():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package} (requirements-dev.txt)")


@pytest.mark.usefixtures("onnx_packages")
@pytest.mark.parametrize(
    ("kind", "opset"),  # the next test has the plain model in 20
    [("plain", 17), ("plain", 18), ("hybrid", 17), ("hybrid", 18), ("hybrid", 20)],
)
def test_a_program_gives_the_logits_of_the_model_in_every_opset(path, tmp_path, capfd, kind, opset):
    import onnx

    output = tmp_path / "new" / "m.onnx"
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
    assert (metadata["img_size"], json.loads(metadata["input_range"])) == (str(IMG_SIZES[kind]), [-1, 1])
    assert variables["printed"] == next(iter(predicted(path, "image.jpg")[0]))
    assert_same_logits(path, lambda x: variables["model"].run(None, {"pictures": x.numpy()})[0])


@pytest.mark.usefixtures("onnx_packages")
def test_weights_too_large_for_onnx_go_into_a_file_beside_it(path, tmp_path, monkeypatch):
    import onnx

    monkeypatch.setattr(_export_programs, "ONNX_LIMIT_BYTES", 0)
    output, unnamed = tmp_path / "new" / "m.onnx", tmp_path / "reference.bin"  # nothing names this one's classes
    output.parent.mkdir()
    output.write_text("an earlier one")
    shutil.copy(path, unnamed)
    flags = ["--model_type", "plain", "--img_size", "48", "--gelu", "tanh", "--opset", "20"]
    lines = export_as("onnx", unnamed, output, *flags)
    assert [x.version for x in onnx.load(output, load_external_data=False).opset_import] == [20]
    assert sorted(p.name for p in output.parent.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert f"{output}.data" in lines
    variables = variables_of(lines)
    assert "classes" not in variables["model"].get_modelmeta().custom_metadata_map
    assert f"class {variables['printed']}" == next(iter(predicted(path, "image.jpg")[0]))
    assert_same_logits(path, lambda x: variables["model"].run(None, {"pictures": x.numpy()})[0])


@pytest.mark.usefixtures("onnx_packages")
def test_an_opset_that_pytorch_does_not_write_is_one_line(path, tmp_path, monkeypatch):
    lower = SimpleNamespace(model=SimpleNamespace(graph=[], opset_imports={"": 18}))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: lower)  # so it does after a conversion that failed
    status, out, err = run("--load_model_dir", path, "--format", "onnx", "--output", "m.onnx", "--opset", 20)
    assert (status, out, len(err)) == (2, "", 1)
    assert "--opset 20" in err[0]
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_its_installation(path, tmp_path, monkeypatch, missing):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    output = tmp_path / "m.onnx"
    status, _, err = run("--load_model_dir", path, "--format", "onnx", "--output", output)
    assert status == 2
    assert f"pip install {missing}" in err[0]
    assert not output.exists()
