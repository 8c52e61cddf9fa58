"""train.py with weights of every layout: evaluated, trained on from, found where no flag names them."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import train
from models import layouts, npz, published
from models.configs import CONFIGS
from tests.helpers import fake_npz
from tests.helpers.runs import TINY, last_state, write_images
from tools import export
from utils import checkpoint

CONFIG = CONFIGS["testing"]
LAYOUTS = {"timm": layouts.TIMM, "hf": layouts.HF, "hf5": layouts.HF5, "ours": layouts.OURS}
SHORT = ["--name", "b", *TINY, "--train_batch_size", "8", "--num_steps", "2", "--warmup_steps", "1"]
OWN = ["--img_size", "48"]  # of the checkpoint ``trained``
ONE = ["--num_steps", "1", "--learning_rate", "0"]  # a step that changes nothing


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained(finetuned_digits) -> str:
    """A checkpoint of digits with its metadata, in the current folder."""
    for ending in (".bin", ".json"):
        shutil.copy(finetuned_digits.removesuffix(".bin") + ending, f"digits_checkpoint{ending}")
    return "digits_checkpoint.bin"


def accuracy(caplog) -> str:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Valid Accuracy")][-1]


def evaluate(path, caplog, *flags) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert train.main(["--name", "x", *TINY, *OWN, "-v", "--load_model_dir", str(path), *flags]) == 0
    return accuracy(caplog)


def written_in(layout: str, source: str, path: str) -> str:
    """The weights of one of our checkpoints in another layout."""
    save_file(layouts.from_ours(checkpoint.load_weights(source), LAYOUTS[layout]), path)
    return path


def test_an_evaluation_gives_the_same_accuracy_from_every_layout(trained, caplog, capsys):
    assert export.main(["--load_model_dir", trained, "--format", "npz", "--output", "other.npz"]) == 0
    os.mkdir("folder")
    written_in("hf", trained, "folder/model.safetensors")
    wrapped = {f"module.{name}": x for name, x in checkpoint.load_weights(trained).items()}
    torch.save({"model": wrapped, "epoch": 1}, "wrapped")
    others = [written_in(layout, trained, layout) for layout in ("timm", "hf", "hf5")]
    expected = evaluate(trained, caplog)
    for path in ("other.npz", "folder", "wrapped", *others):
        assert evaluate(path, caplog) == expected, path


def test_pretrained_weights_cannot_be_evaluated(capsys):
    path = fake_npz.save("a.npz", {k: x for k, x in fake_npz.arrays(CONFIG).items() if not k.startswith("head")})
    assert train.main(["--name", "x", *TINY, "-v", "--load_model_dir", path]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "a.npz cannot be loaded as testing: it has no head" in error


def test_a_training_starts_from_the_same_bits_in_every_layout():
    arrays = fake_npz.arrays(CONFIG, 48)
    paths = [fake_npz.save("a.npz", arrays)]
    for layout, names in LAYOUTS.items():
        paths.append(f"{layout}.safetensors")
        save_file(layouts.from_ours(npz.to_state_dict(arrays, CONFIG, 48, 10), names), paths[-1])
    states = []
    for path in paths:
        assert train.main([*SHORT, "--pretrained_dir", path, "--resume", "none"]) == 0
        states.append(last_state("b").model)
        assert all(torch.equal(x, states[0][name]) for name, x in states[-1].items()), path


# ---- training on from a fine-tuned model ----


@pytest.mark.parametrize("layout", ["bin", "npz"])
def test_a_head_for_the_same_classes_is_kept(trained, layout, caplog, capsys):
    expected = evaluate(trained, caplog)
    if layout == "npz":
        assert export.main(["--load_model_dir", trained, "--format", "npz", "--output", "a.npz"]) == 0
        trained = "a.npz"
    with caplog.at_level(logging.INFO):
        assert train.main([*SHORT, *ONE, *OWN, "--pretrained_dir", trained]) == 0
    assert "The head is kept: it was trained for the same 10 classes" in caplog.text
    assert accuracy(caplog) == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("zero_head", "--zero_head"),
        ("unnamed", "nothing tells the names of its classes"),
        ("other order", "it was trained for other classes"),
        ("other number", "it was trained for other classes"),
    ],
)
def test_any_other_head_starts_from_zeros_and_the_log_says_why(trained, change, reason, caplog):
    flags = ["--zero_head"] if change == "zero_head" else []
    metadata = json.loads(Path("digits_checkpoint.json").read_text())
    if change == "unnamed":
        os.remove("digits_checkpoint.json")
    elif change == "other order":
        Path("digits_checkpoint.json").write_text(json.dumps({**metadata, "classes": metadata["classes"][::-1]}))
    elif change == "other number":
        write_images("images")
        flags = ["--dataset", "images"]
    with caplog.at_level(logging.INFO):
        assert train.main([*SHORT, *ONE, "--pretrained_dir", trained, *flags]) == 0
    assert f"The head starts from zeros: {reason}" in caplog.text
    assert not last_state("b").model["head.weight"].any()


def test_positions_of_a_fine_tuned_model_are_resized_to_the_new_size(trained, caplog):
    with caplog.at_level(logging.INFO):
        assert train.main([*SHORT, *ONE, "--pretrained_dir", trained, "--img_size", "64"]) == 0
    assert "from a grid of 3 x 3 to 4 x 4" in caplog.text
    assert "The head is kept" in caplog.text


def test_contradictions_with_the_metadata_are_warnings(trained, caplog):
    assert train.main([*SHORT, *ONE, "--pretrained_dir", trained, "--gelu", "tanh"]) == 0
    assert f"{trained} was trained with --gelu erf, not tanh" in caplog.text


def test_metadata_of_other_programs_is_a_warning_where_it_is_not_read_or_of_another_mean(caplog):
    os.mkdir("deit")
    state = npz.to_state_dict(fake_npz.arrays(CONFIG), CONFIG, 32, 10)
    save_file(layouts.from_ours(state, layouts.TIMM), "deit/model.safetensors")
    images = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "input_size": [3, 32, 32]}
    deit = json.dumps({"architecture": "deit", "pretrained_cfg": images})
    for config, words in ((deit, "mean [0.485, 0.456, 0.406]"), ("{", "deit/config.json cannot be read")):
        Path("deit/config.json").write_text(config)
        assert train.main([*SHORT, "--pretrained_dir", "deit", "--resume", "none"]) == 0
        assert words in caplog.text


def test_weights_of_another_number_of_heads_are_one_line(capsys):
    os.mkdir("hf")
    state = npz.to_state_dict(fake_npz.arrays(CONFIG), CONFIG, 32, 10)
    save_file(layouts.from_ours(state, layouts.HF), "hf/model.safetensors")
    Path("hf/config.json").write_text(json.dumps({"num_attention_heads": 8, "hidden_act": "gelu"}))
    assert train.main([*SHORT, "--pretrained_dir", "hf"]) == 2
    assert "has 8 attention heads, expected 4" in capsys.readouterr().err.splitlines()[-1]


# ---- the file that is found ----


def test_a_file_that_is_there_is_found_and_named(caplog):
    os.mkdir("checkpoint")
    for name in ("ViT-S_16", "augreg_ViT-Ti_16", "imagenet21k_ViT-Ti_16", "ViT-Ti_16"):  # the preferred one last
        path = fake_npz.save(f"checkpoint/{name}.npz", fake_npz.arrays(CONFIGS["ViT-Ti_16"], 32))
        assert name == "ViT-S_16" or published.find(None, "ViT-Ti_16") == path
    write_images("images")
    flags = ["--model_type", "ViT-Ti_16", "--dataset", "images", "--learning_rate", "0"]
    with caplog.at_level(logging.INFO):
        assert train.main([*SHORT, *flags, "--num_steps", "1"]) == 0
    assert f"starting from {path}" in caplog.text
    shutil.rmtree("checkpoint")  # which a run that resumes does not need
    assert train.main([*SHORT, *flags, "--num_steps", "2"]) == 0
    assert last_state("b").pretrained == path


def test_a_path_that_was_given_is_taken_or_is_an_error(capsys):
    os.mkdir("checkpoint")
    Path("checkpoint/ViT-B_16.npz").touch()
    for given in ([], ["--pretrained_dir", "mine.npz"], ["--pretrained_dir", "checkpoint"]):
        assert train.main([*SHORT, "--model_type", "ViT-B_32", *given]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert re.search(r"tools[./]download(.py)? ViT-B_32", error)
        assert ("mine.npz" in error) == ("mine.npz" in given)


def test_a_training_state_is_refused_with_the_name_of_its_checkpoint(capsys):
    assert train.main([*SHORT, "--pretrained_dir", ""]) == 0
    assert train.main([*SHORT, "--name", "c", "--pretrained_dir", "output/b_last.pt"]) == 2
    assert "give the weights: output/b_checkpoint.bin" in capsys.readouterr().err.splitlines()[-1]
    assert np.isfinite(last_state("b").best_accuracy)


def test_the_folder_of_a_run_stands_for_its_weights_and_its_state_for_none(trained, capsys):
    assert train.main([*SHORT, "--pretrained_dir", ""]) == 0
    assert train.main([*SHORT, *ONE, "--name", "c", "--pretrained_dir", "output", "--output_dir", "other"]) == 0
    assert train.main([*SHORT, "--name", "c", "--pretrained_dir", "", "--resume", "output/b_checkpoint.bin"]) == 2
    assert "output/b_checkpoint.bin holds weights" in capsys.readouterr().err.splitlines()[-1]


def test_an_npz_with_arrays_of_other_kinds_beside_the_weights_starts_a_training():
    extra = {"a": np.array("hello"), "b": np.array(["2026-01-01"], "datetime64[s]"), "c": np.zeros(2, ">f4")}
    path = fake_npz.save("a.npz", {**fake_npz.arrays(CONFIG), **extra})
    assert train.main([*SHORT, *ONE, "--pretrained_dir", path]) == 0
