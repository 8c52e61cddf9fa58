"""The attention rollout, against a computation of its own from the model's weights, and the PNG."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.helpers import odd_images
from tools import attention_map
from utils import checkpoint, figures, fonts


def run(capsys, *args):
    """Status, standard output and standard error's lines."""
    try:
        status = attention_map.main([*map(str, args), "--device", "cpu"])
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, out, err.splitlines()


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def probabilities_by_hand(model, x):
    """Every block's attention (A, T, T), from its normed input and the weights of queries and keys."""
    inputs = []
    hooks = [block.attention_norm.register_forward_hook(lambda m, i, out: inputs.append(out[0].double().numpy()))
             for block in model.transformer.encoder.layer]  # fmt: skip
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    attention = []
    for block, h in zip(model.transformer.encoder.layer, inputs):
        q, k = (
            h @ w.weight.detach().double().numpy().T + w.bias.detach().double().numpy()
            for w in (block.attn.query, block.attn.key)
        )  # (T, D)
        size = q.shape[1] // model.config.num_heads
        heads = [softmax(q[:, s : s + size] @ k[:, s : s + size].T / size**0.5) for s in range(0, q.shape[1], size)]
        attention.append(np.stack(heads))
    return attention


def rollout_by_hand(attention):
    """The class token's row of the product of all (A + I) / row sums, entry by entry."""
    row = np.zeros(attention[0].shape[-1])
    row[0] = 1
    for heads in reversed(attention):  # from the output back to the image
        tokens = len(row)
        mean = sum(heads) / len(heads)
        nxt = np.zeros(tokens)
        for i in range(tokens):
            total = mean[i].sum() + 1
            for j in range(tokens):
                nxt[j] += row[i] * (mean[i, j] + (i == j)) / total
        row = nxt
    return row


def load(path):
    metadata = json.loads(Path(path).with_suffix(".json").read_text())
    config = replace(CONFIGS[metadata["model_type"]], gelu=metadata["gelu"])
    model = VisionTransformer(config, metadata["img_size"], len(metadata["classes"]), vis=True).eval()
    model.load_state_dict(torch.load(path))
    return model


def test_the_rollout_is_that_of_a_direct_computation(finetuned_any, draw):
    model = load(finetuned_any)
    image = Image.open(draw(size=(50, 34)))
    maps, probabilities = attention_map.attend(model, image, torch.device("cpu"))
    size = model.img_size
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) / 127.5 - 1
    x = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
    attention = probabilities_by_hand(model, x)
    grid = model.config.grid_size(size)
    assert maps.shape == (len(attention), grid, grid)
    for i in range(len(attention)):
        row = rollout_by_hand(attention[: i + 1])
        assert row.sum() == pytest.approx(1)
        np.testing.assert_allclose(maps[i].ravel(), row[1:], atol=1e-6)
    assert maps[-1].max() - maps[-1].min() > 1e-3  # it does tell patches apart
    with torch.no_grad():
        np.testing.assert_allclose(probabilities, model(x)[0][0].softmax(0).numpy(), atol=1e-5)


def test_a_rollout_that_is_known_without_computing():
    # The class token looks at patch 2 in both heads; every other token at itself.
    attention = np.stack([np.eye(5)] * 2)
    attention[:, 0] = [0, 0, 1, 0, 0]
    maps = attention_map.rollout([attention, attention])
    assert maps.tolist() == [[[0, 0.5], [0, 0]], [[0, 0.75], [0, 0]]]  # half of it stays, twice


def sheet(path):
    return sheet_of(Image.open(path))


def sheet_of(image):
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("size", "panel"), [((300, 240), (300, 240)), ((8, 4), (224, 112)), ((2048, 512), (1024, 256))]
)
def test_the_png_shows_the_image_beside_its_overlay(finetuned_any, draw, tmp_path, capsys, size, panel):
    path, output = draw(size=size), tmp_path / "new" / "map.png"
    status, out, err = run(capsys, "--load_model_dir", finetuned_any, path, "--output", output)
    assert (status, err) == (0, [])
    assert str(output) in out
    width, height = panel
    pixels = sheet(output)
    top = figures.TITLE_PX
    assert Image.open(output).format == "PNG"
    assert pixels.shape == (top + height, 2 * width + figures.GAP_PX, 3)
    left, right = pixels[top:, :width], pixels[top:, width + figures.GAP_PX :]
    shown = Image.open(path).resize(panel, Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(left, np.asarray(shown))
    maps, _ = attention_map.attend(load(finetuned_any), Image.open(path), torch.device("cpu"))
    np.testing.assert_array_equal(right, np.asarray(attention_map.overlay(shown, maps[-1])))


def test_the_image_stands_upright_and_on_white(finetuned_any, tmp_path, capsys):
    path, output = tmp_path / "turned.png", tmp_path / "map.png"
    image = Image.new("RGBA", (300, 240), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (0, 0, 100, 100))
    image.save(path, exif=odd_images.exif(6))
    assert run(capsys, "--load_model_dir", finetuned_any, path, "--output", output)[0] == 0
    left = sheet(output)[figures.TITLE_PX :, :240]
    assert sheet(output).shape == (figures.TITLE_PX + 300, 2 * 240 + figures.GAP_PX, 3)
    assert left[50, 190].tolist() == [200, 0, 0]
    assert left[250, 50].tolist() == [255, 255, 255]


@pytest.mark.parametrize("grey", [0, 90, 255])
def test_the_overlay_is_colourful_from_the_palest_patch_to_the_brightest(grey):
    image = Image.new("RGB", (100, 100), (grey,) * 3)
    attention = np.arange(100.0).reshape(10, 10) / 5000
    attention[5, 5] = 1  # one hot patch must not leave the others dark
    pixels = np.asarray(attention_map.overlay(image, attention)).astype(int)
    coldest, middle, hottest = (pixels[y, x] for y, x in ((5, 5), (45, 5), (55, 55)))
    assert coldest[2] > coldest[0] + 50  # blue
    assert middle[0] > middle[1] + 50  # magenta
    assert hottest[0] > hottest[2] + 50  # yellow
    assert hottest[1] > hottest[2] + 50
    assert (np.ptp(pixels, axis=-1) > 50).all()  # no patch is black or grey
    assert np.abs(pixels[95, 85] - hottest).max() < 20  # the next brightest is no darker


def test_the_overlay_lets_the_image_be_seen(draw):
    image = Image.open(draw(size=(64, 64)))
    grey = np.asarray(image.convert("L"), dtype=float)
    light = np.asarray(attention_map.overlay(image, np.ones((4, 4)))).mean(axis=-1)
    assert np.corrcoef(grey.ravel(), light.ravel())[0, 1] > 0.99


def test_layers_adds_a_panel_for_each_block(finetuned_any, draw, tmp_path, capsys):
    path, output = draw(size=(240, 224)), tmp_path / "map.png"
    status, _, _ = run(capsys, "--load_model_dir", finetuned_any, path, "--output", output, "--layers")
    assert status == 0
    pixels, gap, top = sheet(output), figures.GAP_PX, figures.TITLE_PX
    assert pixels.shape == (top + 224, 4 * 240 + 3 * gap, 3)  # the testing models have two blocks
    panels = [pixels[top:, i * (240 + gap) :][:, :240] for i in range(4)]
    np.testing.assert_array_equal(panels[1], panels[3])  # up to the last block is the whole
    assert (panels[1] != panels[2]).any()


@pytest.mark.parametrize("installed", [fonts.FONTS, ()], ids=["fonts of this machine", "Pillow's font only"])
def test_a_name_in_any_script_is_printed_and_never_drawn_as_boxes(
    finetuned_any, draw, tmp_path, capsys, monkeypatch, installed
):
    monkeypatch.setattr(fonts, "FONTS", installed)
    names = ["猫", "собака", "猫 cat"]
    output = tmp_path / "map.png"
    flags = ["--load_model_dir", finetuned_any, draw(size=(240, 224)), "--output", output]
    status, out, _ = run(capsys, *flags, "--classes", ",".join(names))
    assert status == 0
    name, percent = re.fullmatch(r".*map.png: (.*), (.*) %\n", out).groups()
    title = f"{fonts.drawable(name, f'class {names.index(name)}')}, {float(percent):.1f} %"
    assert installed or title.startswith("class ")
    expected = figures.arrange([(title, Image.new("RGB", (240, 224)))], columns=1)
    np.testing.assert_array_equal(sheet(output)[: figures.TITLE_PX, :240], sheet_of(expected)[: figures.TITLE_PX])


def test_a_checkpoint_without_names_of_classes_will_do(finetuned_any, draw, tmp_path, capsys):
    metadata = json.loads(Path(finetuned_any).with_suffix(".json").read_text())
    os.remove(checkpoint.metadata_path(finetuned_any))
    flags = ["--model_type", metadata["model_type"], "--img_size", metadata["img_size"]]
    args = ["--load_model_dir", finetuned_any, draw(), "--output", tmp_path / "map.png", *flags]
    status, out, _ = run(capsys, *args)
    assert status == 0
    assert "map.png: class " in out
