"""tools/convert.py: weights of any layout as Google's .npz, and what goes on from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models import layouts, npz
from models.configs import CONFIGS
from tests.helpers import fake_npz
from tools import convert
from utils import checkpoint
from utils.weights import read_npz

LAYOUTS = {"ours": layouts.OURS, "timm": layouts.TIMM, "hf": layouts.HF, "hf5": layouts.HF5}
MODEL = "testing"


def run(capsys, *args):
    """Status, standard output and standard error's lines."""
    try:
        status = convert.main([*map(str, args)])
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, out, err.splitlines()


def state_of(arrays, model_type=MODEL):
    return npz.to_state_dict(arrays, CONFIGS[model_type], 32, num_classes=10)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_what_is_written_is_the_file_that_the_weights_came_from(tmp_path, capsys, layout, given):
    arrays = fake_npz.arrays(CONFIGS[MODEL])
    save_file(layouts.from_ours(state_of(arrays), LAYOUTS[layout]), tmp_path / "a")
    model = ["--model_type", MODEL] if given else []
    status, out, err = run(capsys, tmp_path / "a", *model, "--output", tmp_path / "new" / "b.npz")
    assert (status, err) == (0, [])
    assert f"{MODEL}, a head of 10 classes" in out
    expected = fake_npz.save(tmp_path / "expected.npz", arrays)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["b.npz"]  # nothing tells the names of the classes
    found = read_npz(str(tmp_path / "new" / "b.npz"))
    assert list(found) == list(read_npz(expected))
    assert all(np.array_equal(found[name], x) and found[name].dtype == x.dtype for name, x in arrays.items())


def test_pre_logits_and_the_lack_of_a_head_stay_as_they_are(tmp_path, capsys):
    arrays = fake_npz.arrays(CONFIGS[MODEL], pre_logits=True)
    path = fake_npz.save(tmp_path / "a.npz", {name: x for name, x in arrays.items() if not name.startswith("head/")})
    status, out, _ = run(capsys, path, "--output", tmp_path / "b.npz")
    assert status == 0
    assert "no head" in out
    assert list(read_npz(str(tmp_path / "b.npz"))) == [name for name in arrays if not name.startswith("head/")]


def test_a_checkpoints_description_goes_along(tmp_path, capsys):
    description = checkpoint.CheckpointMetadata(MODEL, 32, [f"c{i}" for i in range(10)], "tanh", "pets", 8, 0.5)
    checkpoint.save_weights(str(tmp_path / "a.bin"), state_of(fake_npz.arrays(CONFIGS[MODEL])), description)
    assert run(capsys, tmp_path / "a.bin", "--output", tmp_path / "b.npz")[0] == 0
    told = checkpoint.read_metadata(
        str(tmp_path / "b.npz"), {k: torch.from_numpy(x) for k, x in read_npz(str(tmp_path / "b.npz")).items()}
    )
    assert told == description


def test_the_names_in_a_config_go_along(tmp_path, capsys):
    arrays = fake_npz.arrays(CONFIGS[MODEL])
    save_file(layouts.from_ours(state_of(arrays), layouts.HF), tmp_path / "model.safetensors")
    config = {"id2label": {str(i): f"c{i}" for i in range(10)}, "image_size": 32, "hidden_act": "gelu_pytorch_tanh"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(capsys, tmp_path, "--output", tmp_path / "b.npz")[0] == 0
    told = json.loads((tmp_path / "b.json").read_text())
    assert (told["model_type"], told["img_size"], told["gelu"]) == (MODEL, 32, "tanh")
    assert told["classes"] == [f"c{i}" for i in range(10)]


def test_an_npz_may_have_its_sources_name_but_for_the_ending(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(layouts.from_ours(state_of(fake_npz.arrays(CONFIGS[MODEL])), layouts.TIMM), "a.safetensors")
    assert run(capsys, "a.safetensors", "--output", "a.npz")[0] == 0
    description = checkpoint.CheckpointMetadata(MODEL, 32, [f"c{i}" for i in range(10)], "tanh", "pets", 8, 0.5)
    checkpoint.save_weights("b.bin", state_of(fake_npz.arrays(CONFIGS[MODEL])), description)
    status, _, err = run(capsys, "b.bin", "--output", "b.npz")  # whose .json would replace the one that is read
    assert (status, len(err)) == (2, 1)
    assert checkpoint.read_metadata("b.bin", checkpoint.load_weights("b.bin")) == description


def test_a_description_never_stands_where_it_would_be_taken_for_the_sources(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(layouts.from_ours(state_of(fake_npz.arrays(CONFIGS[MODEL])), layouts.HF), "model.safetensors")
    Path("config.json").write_text(json.dumps({"id2label": {str(i): f"c{i}" for i in range(10)}, "image_size": 32}))
    status, _, err = run(capsys, "model.safetensors", "--output", "model.npz")
    assert (status, len(err)) == (2, 1)
    assert "give another name" in err[0]
    assert sorted(p.name for p in Path().iterdir()) == ["config.json", "model.safetensors"]
    assert run(capsys, ".", "--output", "other.npz")[0] == 0  # and the source still loads
    assert run(capsys, ".", "--output", "again.npz")[0] == 0


def test_a_description_of_what_is_replaced_goes_with_it_and_other_files_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = fake_npz.save("a.npz", fake_npz.arrays(CONFIGS[MODEL]))
    description = checkpoint.CheckpointMetadata(MODEL, 32, [f"c{i}" for i in range(10)], "tanh", "pets", 8, 0.5)
    checkpoint.save_weights("b.bin", state_of(fake_npz.arrays(CONFIGS[MODEL], seed=1)), description)
    assert run(capsys, "b.bin", "--output", "c.npz")[0] == 0
    assert run(capsys, path, "--output", "c.npz")[0] == 0
    assert not Path("c.json").exists()
    Path("d.json").write_text('{"mine": 1}')
    status, _, err = run(capsys, path, "--output", "d.npz")
    assert (status, len(err)) == (2, 1)
    assert "would replace d.json" in err[0]
    assert Path("d.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["none.bin", "--output", "b.npz"], "there is no file none.bin"),
        (["a.npz", "--output", "b.bin"], "does not end in .npz"),
        (["a.npz", "--output", "a.npz"], "would replace a file that is read"),
        (["a.npz", "--output", "taken/b.npz"], "the folder taken cannot be written"),
        (["a.npz", "--model_type", "ViT-B_16", "--output", "b.npz"], "it fits --model_type testing"),
        (["page", "--output", "b.npz"], "page cannot be loaded: it is an HTML page"),
        (["a.npz"], "--output"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    Path("page").write_text("<html></html>")
    fake_npz.save("a.npz", fake_npz.arrays(CONFIGS[MODEL]))
    before = sorted(p.name for p in Path().iterdir())
    status, out, err = run(capsys, *args)
    assert (status, out, len(err)) == (2, "", 1)
    assert words in err[0]
    assert sorted(p.name for p in Path().iterdir()) == before
