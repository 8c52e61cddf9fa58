"""Folders for timm and transformers, taken by the libraries as the tool prints, give what tools.predict gives."""

import json
import shutil
import subprocess
import sysconfig
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.configs import CONFIGS, canonical_name
from models.modeling import VisionTransformer
from tests.helpers import odd_images
from tests.helpers.exporting import (
    NUM_CLASSES,
    assert_as_predicted,
    export_as,
    make_checkpoint,
    predicted,
    random_state,
    variables_of,
)
from tools import _export_folder, _export_timm
from utils import augment
from utils.images import read_image

PLAIN = [("testing", 48, "erf"), ("testing", 32, "tanh"), ("ViT-demo", 40, "erf")]


@pytest.fixture
def images(tmp_path, monkeypatch, draw):
    """Images that are not square, larger and smaller than a model's, in the current folder."""
    monkeypatch.chdir(tmp_path)
    draw("image.jpg", size=(120, 81))
    return ["image.jpg", draw("wide.png", size=(90, 50), seed=1), draw("small.png", size=(17, 30), seed=2)]


#: Images of these kinds are too odd for lines that are to be short.
TOO_ODD = ("2 bits, a level", "4 bits, a level", "16 bits, a level", "RGB of 16 bits, a colour", "La in a TIFF",
           "16 bits, turned", "floats to 1", "floats to 255")  # fmt: skip


def test_the_printed_lines_open_images_as_the_training_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make_checkpoint(tmp_path, "testing", 32)
    assert all(_export_folder.OPEN_IMAGE in export_as(kind, path, tmp_path / kind) for kind in ("hf", "timm"))
    for name, odd in odd_images.write(tmp_path, odd_images.ODD).items():
        if name not in TOO_ODD:
            shutil.copy(odd, "image.jpg")
            opened = variables_of("from PIL import Image, ImageOps\n" + _export_folder.OPEN_IMAGE)["image"]
            np.testing.assert_array_equal(np.asarray(opened), np.asarray(read_image(odd)), err_msg=name)


# ---- transformers ----


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="needs transformers (requirements-dev.txt)")


@pytest.mark.parametrize(("model_type", "img_size", "gelu"), PLAIN)
def test_transformers_classifies_as_predict_does(transformers, tmp_path, images, model_type, img_size, gelu):
    path = make_checkpoint(tmp_path, model_type, img_size, gelu)
    variables = variables_of(export_as("hf", path, tmp_path / "m"))

    def classify(image):
        return {x["label"]: x["score"] for x in variables["classify"](image, top_k=NUM_CLASSES)}

    assert_as_predicted(path, images, classify)
    assert next(iter(predicted(path, "image.jpg")[0])) in variables["printed"]


def test_transformers_own_resize_is_within_one_grey_level(transformers, tmp_path, images):
    export_as("hf", make_checkpoint(tmp_path, "testing", 32), tmp_path / "m")
    processor = transformers.AutoImageProcessor.from_pretrained(str(tmp_path / "m"))
    for path in images:
        image = Image.open(path).convert("RGB")
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        transform = augment.EvalTransform(32)
        ours = transform.complete(transform.image(image, torch.empty(0))[None])[0]
        assert (theirs - ours).abs().max() < 1 / 127.5 + 1e-5


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_transformers_4_classifies_as_predict_does(tmp_path, images):
    """In a virtual environment of its own, which sees this one's PyTorch."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    pip = subprocess.run([python, "-m", "pip", "install", "-q", "transformers==4.57.*"], capture_output=True, text=True)
    if pip.returncode:
        pytest.skip(f"needs transformers 4.57, which pip cannot install: {pip.stderr.strip().splitlines()[-1]}")
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "torch.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    for i, (model_type, img_size, gelu) in enumerate(PLAIN):
        path = make_checkpoint(tmp_path, model_type, img_size, gelu)
        lines = export_as("hf", path, tmp_path / f"m{i}") + (
            "import json, sys, transformers\n"
            "assert transformers.__version__.startswith('4.57.')\n"
            f"answers = [classify(path, top_k={NUM_CLASSES}) for path in sys.argv[1:]]\n"
            "print(json.dumps([{x['label']: x['score'] for x in answer} for answer in answers]))\n"
        )
        done = subprocess.run([python, "-c", lines, *images], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        answers = dict(zip(images, json.loads(done.stdout.splitlines()[-1])))
        assert_as_predicted(path, images, answers.__getitem__)


# ---- timm ----


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="needs timm (requirements-dev.txt)")


def assert_timm_classifies(timm, path, folder, images):
    """timm with the folder alone, its own transforms included, gives what tools.predict gives."""
    variables = variables_of(export_as("timm", path, folder))
    assert variables["printed"] == next(iter(predicted(path, "image.jpg")[0]))

    def classify_with(model):
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))

        def classify(image):
            with torch.no_grad():
                logits = model(transform(Image.open(image).convert("RGB"))[None])[0]
            return dict(zip(model.pretrained_cfg["label_names"], logits.softmax(0).tolist()))

        return classify

    alone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert_as_predicted(path, images, classify_with(alone))
    pixels = np.random.default_rng(0).integers(126, 130, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("grey.png")
    assert_as_predicted(path, ["grey.png"], classify_with(variables["model"]))  # for hybrids, a printed line does it


@pytest.mark.parametrize(("model_type", "img_size", "gelu"), [*PLAIN, ("R-ViT-Ti_16", 64, "tanh")])
def test_timm_classifies_as_predict_does(timm, tmp_path, images, model_type, img_size, gelu):
    path = make_checkpoint(tmp_path, model_type, img_size, gelu)
    assert_timm_classifies(timm, path, tmp_path / "m", images)


def test_timm_classifies_as_predict_does_where_its_epsilons_would_be_felt(timm, tmp_path, images, monkeypatch):
    shape = dict(hidden_size=32, mlp_dim=64, num_heads=4, num_layers=1)
    monkeypatch.setitem(CONFIGS, "small-r26", replace(CONFIGS["R26-ViT-S_32"], **shape))
    state, generator = random_state("small-r26", 96), torch.Generator().manual_seed(1)
    for name, x in state.items():
        if "hybrid_model" in name and x.ndim == 4:  # some groups of channels hardly differ from zero
            groups = 10 ** (-6 * torch.rand(32, generator=generator))
            x *= groups.repeat_interleave(len(x) // 32)[:, None, None, None]
        elif "hybrid_model" in name:
            x *= 0.02
    path = make_checkpoint(tmp_path, "small-r26", 96, state=state)
    assert_timm_classifies(timm, path, tmp_path / "m", images)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config[_export_timm.STEM] == _export_timm.SCALED


@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_classes_that_nothing_names_have_numbers(tmp_path, images, kind):
    pytest.importorskip({"hf": "transformers"}.get(kind, kind))
    path = make_checkpoint(tmp_path, "testing", 32)
    expected = next(iter(predicted(path, "image.jpg")[0]))
    Path(path).with_suffix(".json").unlink()
    lines = export_as(kind, path, tmp_path / "m", "--model_type", "testing", "--img_size", "32")
    variables = variables_of(lines)
    label = variables["printed"] if kind == "timm" else variables["classify"]("image.jpg")[0]["label"]
    assert f"class {label.removeprefix('LABEL_')}" == expected


@pytest.mark.parametrize(
    "model_type", [name for name in CONFIGS if name == canonical_name(name) and not name.startswith("testing")]
)
def test_every_model_has_timms_names_and_shapes(timm, model_type):
    config = CONFIGS[model_type]
    size = 7 * config.stride
    with torch.device("meta"):
        ours = _export_timm.to_timm(VisionTransformer(config, size, 10).state_dict())
        arguments = _export_timm.model_args(config, size)
        theirs = timm.create_model(_export_timm.architecture(model_type, config), num_classes=10, **arguments)
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.state_dict().items()}
