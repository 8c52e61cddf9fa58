"""utils/metadata.py: weights with the metadata of the files beside them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from utils import checkpoint, metadata
from utils.errors import UserError

TIMM = {"architecture": "vit"}


@pytest.fixture
def read(tmp_path):
    """``read(config, images)`` gives the metadata of a folder with these files; None for no file."""

    def read_folder(config=None, images=None, strict=True):
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
        for name, content in (("config.json", config), ("preprocessor_config.json", images)):
            if content is not None:
                (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return metadata.open_weights(str(tmp_path), strict).metadata

    return read_folder


def test_without_files_there_is_no_metadata(read, tmp_path):
    assert read() is None
    assert metadata.open_weights(str(tmp_path), strict=True).path == str(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "images"),
    [
        ("{", "{}"),
        ("[1]", "{}"),
        ("{}", "{"),
        ({"image_size": [32, 48]}, "{}"),
        ({"id2label": {"a": "b"}}, "{}"),
        ({"image_size": "big"}, "{}"),
        ({"image_size": True}, "{}"),
        ({"image_size": -32}, "{}"),
        ({"num_attention_heads": 4.5}, "{}"),
        ("{}", {"image_mean": [0.5, 0.5]}),
        (TIMM | {"pretrained_cfg": {"mean": "abc"}}, "{}"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_or_a_warning_that_names_it(read, tmp_path, caplog, config, images):
    error = rf"^{re.escape(str(tmp_path))}/(preprocessor_)?config\.json .*remove it$"
    with pytest.raises(UserError, match=error):
        read(config, images)
    assert caplog.text == ""
    assert read(config, images, strict=False) is None
    (warning,) = caplog.messages
    assert re.match(error, warning)


@pytest.fixture
def own(tmp_path):
    """``own(**changes)`` gives the metadata that stand beside weights of this project; "none" takes a key away."""

    def read(**changes):
        path, state = str(tmp_path / "a_checkpoint.bin"), {"a": torch.zeros(1)}
        whole = checkpoint.CheckpointMetadata("testing", 32, ["ant", "bee"], "erf", "pets", 4, 0.5, 0.2)
        checkpoint.save_weights(path, state, whole)
        beside = tmp_path / "a_checkpoint.json"
        content = {**json.loads(beside.read_text()), **changes}
        beside.write_text(json.dumps({key: x for key, x in content.items() if key not in changes or x != "none"}))
        return metadata.open_weights(path, strict=True).metadata.own

    return read


def test_the_share_of_a_split_is_in_the_metadata_and_may_be_missing(own):
    assert own().test_fraction == 0.2
    assert own(test_fraction=None).test_fraction is None
    assert own(test_fraction="none").test_fraction is None  # of a version that knew no such split


@pytest.mark.parametrize("value", [0, 1, -0.2, 2, True, "0.2", [0.2], float("nan")])
def test_an_impossible_share_is_an_error_that_names_it(own, value):
    with pytest.raises(UserError, match=r"json does not describe a checkpoint \(test_fraction: .*remove it"):
        own(test_fraction=value)


def test_weights_that_cannot_be_read_are_an_error_that_begins_with_their_path(tmp_path):
    (tmp_path / "page").write_text("<html>")
    for name, words in (("none", "it cannot be read"), ("page", "it is an HTML page"), ("", "it is a folder that has")):
        path = str(tmp_path / name) if name else str(tmp_path)
        with pytest.raises(UserError, match=f"^{re.escape(path)} cannot be loaded: {words}"):
            metadata.open_weights(path, strict=False)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_attention_heads": 8, "hidden_act": "gelu"}, "has 8 attention heads, expected 4"),
        ({"num_attention_heads": 4, "hidden_act": "quick_gelu"}, "activation quick_gelu"),
        (TIMM | {"global_pool": "avg"}, "pools its tokens by avg, expected token"),
        (TIMM | {"model_args": {"global_pool": "map"}}, "pools its tokens by map"),
        (TIMM | {"model_args": {"act_layer": "gelu_tanh", "num_heads": 4}}, None),
    ],
)
def test_what_the_weights_do_not_show_is_compared(read, config, words):
    if words is None:
        return read(config).check(num_heads=4)
    with pytest.raises(UserError, match=words):
        read(config).check(num_heads=4)


@pytest.mark.parametrize(
    ("config", "images", "words"),
    [
        (None, {"image_mean": 0.48}, "mean [0.48, 0.48, 0.48] and std [0.5, 0.5, 0.5]"),
        (None, {"image_mean": [0.5], "image_std": [0.5, 0.5, 0.5]}, None),
        (None, {"do_normalize": False}, "mean [0.0, 0.0, 0.0] and std [1.0, 1.0, 1.0]"),
        (TIMM | {"pretrained_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2] * 3}}, None, "mean [0.4, 0.5, 0.6]"),
        (TIMM | {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}, None, None),
    ],
)
def test_images_of_another_mean_are_a_warning_that_names_the_file(read, tmp_path, caplog, config, images, words):
    read(config, images).check(num_heads=4)
    assert len(caplog.messages) == (words is not None)
    if words:
        file = "preprocessor_config.json" if images else "config.json"
        assert caplog.messages[0].startswith(f"{tmp_path / file}: ")
        assert words in caplog.messages[0]


def test_transformers_labels_are_classes_only_where_somebody_named_them(read):
    for labels in ({"0": "a", "2": "b"}, {str(i): f"LABEL_{i}" for i in range(10)}, None, {}):
        assert read({"id2label": labels, "image_size": None}).classes is None
    named = read({"id2label": {"1": "bee", "0": "ant"}, "image_size": [32, 32], "hidden_act": "gelu_new"})
    assert (named.classes, named.img_size, named.gelu) == (["ant", "bee"], 32, "tanh")
