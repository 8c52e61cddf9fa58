"""tools/convert.py: weights of any layout as Google's .npz, and what starts from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from models import layouts, npz
from models.configs import CONFIGS
from tests.helpers import fake_npz
from tests.helpers.tools import run_tool
from tools import convert
from utils import checkpoint, weights

LAYOUTS = {"ours": layouts.OURS, "timm": layouts.TIMM, "hf": layouts.HF, "hf5": layouts.HF5}
MODEL = "testing"
METADATA = checkpoint.CheckpointMetadata(MODEL, 32, [f"c{i}" for i in range(10)], "tanh", "pets", 8, 0.5)
LABELS = {"id2label": {str(i): f"c{i}" for i in range(10)}, "image_size": 32, "hidden_act": "gelu_pytorch_tanh"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*args):
    return run_tool(convert, *args)


def names():
    return sorted(p.name for p in Path().iterdir())


def state(seed=0):
    return npz.to_state_dict(fake_npz.arrays(CONFIGS[MODEL], seed=seed), CONFIGS[MODEL], 32, num_classes=10)


@pytest.mark.parametrize("given", [[], ["--model_type", MODEL]])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_what_is_written_is_the_file_that_the_weights_came_from(layout, given):
    arrays = fake_npz.arrays(CONFIGS[MODEL])
    save_file(layouts.from_ours(state(), LAYOUTS[layout]), "a")
    status, out, err = run("a", *given, "--output", "new/b.npz")
    assert (status, err) == (0, [])
    assert f"{MODEL}, a head of 10 classes" in out
    assert [p.name for p in Path("new").iterdir()] == ["b.npz"]  # nothing names the classes
    written = weights.read_npz("new/b.npz")
    assert list(written) == list(weights.read_npz(fake_npz.save("expected.npz", arrays)))
    assert all(np.array_equal(written[name], x) and written[name].dtype == x.dtype for name, x in arrays.items())


def test_pre_logits_and_the_lack_of_a_head_stay_as_they_are():
    arrays = fake_npz.arrays(CONFIGS[MODEL], pre_logits=True)
    arrays = {name: x for name, x in arrays.items() if not name.startswith("head/")}
    status, out, _ = run(fake_npz.save("a.npz", arrays), "--output", "b.npz")
    assert status == 0
    assert "no head" in out
    assert list(weights.read_npz("b.npz")) == list(arrays)


def test_metadata_goes_along():
    checkpoint.save_weights("a.bin", state(), METADATA)
    assert run("a.bin", "--output", "b.npz")[0] == 0
    assert checkpoint.read_metadata("b.npz", weights.read("b.npz").tensors()) == METADATA
    Path("hf").mkdir()
    save_file(layouts.from_ours(state(), layouts.HF), "hf/model.safetensors")
    Path("hf/config.json").write_text(json.dumps(LABELS))
    assert run("hf", "--output", "c.npz")[0] == 0
    of_labels = checkpoint.read_metadata("c.npz", weights.read("c.npz").tensors())
    assert (of_labels.model_type, of_labels.img_size, of_labels.gelu) == (MODEL, 32, "tanh")
    assert of_labels.classes == METADATA.classes


def test_an_npz_may_have_its_sources_name_where_no_metadata_is_taken_for_the_others():
    save_file(layouts.from_ours(state(), layouts.TIMM), "a.safetensors")
    assert run("a.safetensors", "--output", "a.npz")[0] == 0
    checkpoint.save_weights("b.bin", state(), METADATA)
    Path("hf").mkdir()
    save_file(layouts.from_ours(state(), layouts.HF), "hf/model.safetensors")
    Path("hf/config.json").write_text(json.dumps(LABELS))
    for source, output in (("b.bin", "b.npz"), ("hf/model.safetensors", "hf/model.npz")):
        status, _, err = run(source, "--output", output)
        assert (status, len(err)) == (2, 1)
        assert "give another name" in err[0]
    assert checkpoint.read_metadata("b.bin", checkpoint.load_weights("b.bin")) == METADATA
    assert sorted(p.name for p in Path("hf").iterdir()) == ["config.json", "model.safetensors"]
    assert run("hf", "--output", "hf/other.npz")[0] == 0
    assert run("hf", "--output", "hf/again.npz")[0] == 0  # and the source still loads


def test_metadata_of_what_is_replaced_goes_with_it_and_other_files_stay():
    path = fake_npz.save("a.npz", fake_npz.arrays(CONFIGS[MODEL]))
    checkpoint.save_weights("b.bin", state(seed=1), METADATA)
    assert run("b.bin", "--output", "c.npz")[0] == 0
    assert run(path, "--output", "c.npz")[0] == 0
    assert not Path("c.json").exists()
    Path("d.json").write_text('{"mine": 1}')
    status, _, err = run(path, "--output", "d.npz")
    assert (status, len(err)) == (2, 1)
    assert "would replace d.json" in err[0]
    assert Path("d.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("none.bin --output b.npz", "there is no file none.bin"),
        ("a.npz --output b.bin", "does not end in .npz"),
        ("a.npz --output a.npz", "would replace a file that is read"),
        ("a.npz --output taken/b.npz", "the folder taken cannot be written"),
        ("a.npz --model_type ViT-B_16 --output b.npz", "it fits --model_type testing"),
        ("page --output b.npz", "page cannot be loaded: it is an HTML page"),
        ("a.npz", "--output"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(args, words):
    Path("taken").touch()
    Path("page").write_text("<html></html>")
    fake_npz.save("a.npz", fake_npz.arrays(CONFIGS[MODEL]))
    before = names()
    status, out, err = run(*args.split())
    assert (status, out, len(err)) == (2, "", 1)
    assert words in err[0]
    assert names() == before
