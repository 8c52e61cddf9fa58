"""The attention rollout, against a computation of its own from the model's weights, and the PNG."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tools import attention_map
from utils import checkpoint, figures


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
    for heads in reversed(attention):  # from the output back to the pictures
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
    told = json.loads(Path(path).with_suffix(".json").read_text())
    config = replace(CONFIGS[told["model_type"]], gelu=told["gelu"])
    model = VisionTransformer(config, told["img_size"], len(told["classes"]), vis=True).eval()
    model.load_state_dict(torch.load(path))
    return model


def test_the_rollout_is_that_of_a_direct_computation(finetuned_any, draw):
    model = load(finetuned_any)
    picture = Image.open(draw(size=(50, 34)))
    maps, probabilities = attention_map.attend(model, picture, torch.device("cpu"))
    size = model.img_size
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)) / 127.5 - 1
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
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("size", "panel"), [((300, 240), (300, 240)), ((8, 4), (224, 112)), ((2048, 512), (1024, 256))]
)
def test_the_png_shows_the_picture_beside_its_shaded_self(finetuned_any, draw, tmp_path, capsys, size, panel):
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
    shown = np.asarray(Image.open(path).resize(panel, Image.Resampling.BICUBIC)).astype(int)
    np.testing.assert_array_equal(left, shown)
    model = load(finetuned_any)
    maps, _ = attention_map.attend(model, Image.open(path), torch.device("cpu"))
    mask = Image.fromarray((maps[-1] / maps[-1].max()).astype(np.float32)).resize(panel, Image.Resampling.BILINEAR)
    assert np.abs(right - shown * np.asarray(mask)[..., None]).max() <= 0.51
    assert np.asarray(mask).max() > 0.9  # the brightest patch keeps its brightness


def test_layers_adds_a_panel_for_each_block(finetuned_any, draw, tmp_path, capsys):
    path, output = draw(size=(240, 224)), tmp_path / "map.png"
    status, _, _ = run(capsys, "--load_model_dir", finetuned_any, path, "--output", output, "--layers")
    assert status == 0
    pixels, gap, top = sheet(output), figures.GAP_PX, figures.TITLE_PX
    assert pixels.shape == (top + 224, 4 * 240 + 3 * gap, 3)  # the testing models have two blocks
    panels = [pixels[top:, i * (240 + gap) :][:, :240] for i in range(4)]
    np.testing.assert_array_equal(panels[1], panels[3])  # up to the last block is the whole
    assert (panels[1] != panels[2]).any()


def test_many_panels_go_into_rows_and_any_title_is_drawn():
    panel = Image.new("RGB", (30, 20), "red")
    pixels = np.asarray(figures.arrange([("\U0001f600 猫" * 20, panel)] * 6, attention_map.COLUMNS))
    gap, top = figures.GAP_PX, figures.TITLE_PX
    assert pixels.shape == (2 * (top + 20) + gap, 4 * 30 + 3 * gap, 3)
    red = (pixels == [255, 0, 0]).all(axis=2)
    assert red.sum() == 6 * 30 * 20


def test_a_checkpoint_without_names_of_classes_will_do(finetuned_any, draw, tmp_path, capsys):
    told = json.loads(Path(finetuned_any).with_suffix(".json").read_text())
    os.remove(checkpoint.metadata_path(finetuned_any))
    flags = ["--model_type", told["model_type"], "--img_size", told["img_size"]]
    args = ["--load_model_dir", finetuned_any, draw(), "--output", tmp_path / "map.png", *flags]
    status, out, _ = run(capsys, *args)
    assert status == 0
    assert "map.png: class " in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nosuch.png"], ["there is no picture nosuch.png"]),
        (["text.png"], ["text.png cannot be read as an image"]),
        (["a.png", "--output", "map.jpg"], ["map.jpg", ".png"]),
        (["a.png", "--output", "text.png/map.png"], ["the folder text.png cannot be written"]),
        (["."], ["there is no picture ."]),
        (["a.png", "--output", "a.png"], ["--output a.png would replace a file that is read"]),
        (["a.png", "--classes", "x"], ["has 10 classes", "the flags name 1"]),
    ],
)
def test_wrong_input_is_one_line_and_status_2(finetuned_digits, draw, tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    draw("a.png")
    Path("text.png").write_text("no picture")
    status, out, err = run(capsys, "--load_model_dir", finetuned_digits, *args)
    assert (status, out) == (2, "")
    assert len(err) == 1, err
    assert err[0].startswith("tools.attention_map: error: ")
    for word in words:
        assert word in err[0]
    assert sorted(os.listdir()) == ["a.png", "text.png"]
