import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.once import pretrain_demo
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from utils.weights import read_npz


@pytest.fixture
def folder(tmp_path):
    """Eight training and eight test images of 32x32."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / "a" / f"{i}.png")
    return tmp_path


def test_the_written_file_loads_and_the_weights_were_trained(folder):
    file = folder / "demo.npz"
    args = ["--dataset", str(folder), "--output", str(file), "--num_steps", "4", "--batch_size", "4"]
    assert pretrain_demo.main(args) == 0
    arrays = read_npz(str(file))
    assert {x.dtype for x in arrays.values()} == {np.dtype(np.float16)}
    assert not arrays["head/kernel"].any()
    torch.manual_seed(0)
    untrained = VisionTransformer(CONFIGS["ViT-demo"], 32, 8).state_dict()
    model = VisionTransformer(CONFIGS["ViT-demo"], 32, 10, zero_head=True)
    model.load_from(arrays)
    changed = (
        model.transformer.encoder.layer[0].ffn.fc1.weight - untrained["transformer.encoder.layer.0.ffn.fc1.weight"]
    ).abs()
    assert 1e-4 < changed.max() < 1e-2  # a few steps of AdamW, at most 1e-3 each


def test_sketches_are_grey_and_nearly_black_and_white():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    x = pretrain_demo.sketches(images)
    assert x.shape == (4, 3, 32, 32)
    assert x.dtype == torch.uint8
    assert torch.equal(x[:, 0], x[:, 1])
    assert torch.equal(x[:, 0], x[:, 2])
    dark = (x < 128).float().mean(dim=(1, 2, 3))
    assert ((dark > 0.45) & (dark < 0.75)).all()


def test_images_that_differ_in_size_are_refused(folder, capsys):
    Image.new("RGB", (20, 20)).save(folder / "train" / "a" / "small.png")
    with pytest.raises(SystemExit, match="2"):
        pretrain_demo.main(["--dataset", str(folder), "--output", str(folder / "demo.npz")])
    error = capsys.readouterr().err.splitlines()[-1]  # after the bar of the decoding
    assert error.startswith("benchmarks.once.pretrain_demo: error: ")
    assert "all of one size" in error


def test_where_nothing_can_be_written_nothing_is_trained(folder, monkeypatch, capsys):
    monkeypatch.setattr(pretrain_demo, "pretrain", None)
    (folder / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        pretrain_demo.main(["--dataset", str(folder), "--output", str(folder / "file" / "demo.npz")])
    assert "cannot be written" in capsys.readouterr().err
