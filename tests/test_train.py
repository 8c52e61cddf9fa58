"""train.py as its users type it: what it writes and prints, and that its flags do what they say."""

import json
import logging
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import train
from models import npz, published
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.conftest import REPOSITORY
from tests.helpers import runs
from tests.helpers.runs import TINY
from tests.helpers.steps import make_model, make_optimizer, take_step
from utils import args as flags
from utils import datasets
from utils.checkpoint import CheckpointMetadata, save_weights
from utils.precision import Precision

SHORT = ["--train_batch_size", "32", "--num_steps", "6", "--warmup_steps", "2", "--eval_every", "4", "--log_every", "2"]
SCRATCH = ["--pretrained_dir", ""]
RUN = ["--name", "a", *TINY, *SHORT, *SCRATCH]


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    """Runs write output/ and logs/ below the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def losses_of(name):
    return [line["train/loss"] for line in runs.lines(name) if "train/loss" in line]


def accuracies_of(log):
    return [message for message in log.messages if "Valid Accuracy" in message]


# ---- training ----


def test_training_then_evaluating_its_checkpoint_gives_the_same_accuracy(logged):
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *RUN], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # of PyTorch, for one
    lines = [json.loads(line) for line in Path("logs/a/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "train/loss" in line) for line in lines] == [
        (2, True), (4, True), (4, False), (6, True), (6, False),
    ]  # fmt: skip
    assert set(lines[0]) == {"step", "train/loss", "train/lr", "images_per_sec", "secs"}
    assert set(lines[2]) == {"step", "test/accuracy", "test/balanced_accuracy", "test/loss", "secs", "eval_secs"}
    assert lines[0]["train/lr"] == pytest.approx(0.03)
    assert lines[3]["train/lr"] == pytest.approx(0)
    best = max(line["test/accuracy"] for line in lines if "test/accuracy" in line)
    assert f"Best Accuracy: \t{best:.5f}" in done.stderr

    state = torch.load("output/a_checkpoint.bin", weights_only=True)
    assert list(state) == list(VisionTransformer(CONFIGS["testing"], 32, 10).state_dict())
    metadata = json.loads(Path("output/a_checkpoint.json").read_text())
    assert metadata.pop("crc32")
    assert metadata == {
        "model_type": "testing", "img_size": 32, "classes": [str(i) for i in range(10)], "gelu": "erf",
        "dataset": "digits", "step": next(line["step"] for line in lines if line.get("test/accuracy") == best),
        "accuracy": best,
    }  # fmt: skip
    assert train.main(["--name", "a", *TINY, "-v", "true"]) == 0
    assert not [r for r in logged.records if r.levelname == "WARNING"]
    assert accuracies_of(logged) == [f"Valid Accuracy: {best:.5f}"]
    balanced = next(line["test/balanced_accuracy"] for line in lines if line.get("test/accuracy") == best)
    assert f"Valid Balanced Accuracy: {balanced:.5f}" in logged.messages


def test_first_loss_from_a_zero_head_is_log_of_the_classes():
    model = VisionTransformer(CONFIGS["testing"], 48, 10)
    with open("testing.npz", "wb") as f:
        npz.write(f, npz.from_state_dict(model.state_dict(), model.config, 48))
    assert train.main([*RUN, "--log_every", "1", "--pretrained_dir", "."]) == 0  # found in the folder
    assert losses_of("a")[0] == pytest.approx(math.log(10), rel=1e-5)


def test_accumulation_gives_the_loss_curve_of_the_whole_batch():
    for num_micro_batches in ("1", "2", "8"):
        more = ["--dropout", "0", "--gradient_accumulation_steps", num_micro_batches]
        assert train.main([*RUN, "--name", num_micro_batches, *more]) == 0
        assert losses_of(num_micro_batches) == pytest.approx(losses_of("1"), abs=1e-5)


def test_same_seed_same_run_and_another_seed_another():
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train.main([*RUN, "--name", name, "--seed", seed]) == 0
    assert losses_of("a") == losses_of("b")
    assert losses_of("a") != losses_of("c")


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_fp16_trains_and_writes_float32_weights(level):
    assert train.main([*RUN, "--fp16", "--fp16_opt_level", level, "--amp_dtype", "bfloat16"]) == 0
    state = torch.load("output/a_checkpoint.bin", weights_only=True)
    assert {x.dtype for x in state.values()} == {torch.float32}
    assert train.main(["--name", "a", *TINY, "-v"]) == 0


@pytest.mark.parametrize("model_type", ["testing", "testing-hybrid"])
def test_fine_tuned_weights_go_back_to_googles_layout(model_type):
    tiny = [*TINY, "--model_type", model_type]
    assert train.main([*RUN, *tiny]) == 0
    state = torch.load("output/a_checkpoint.bin", weights_only=True)
    config = CONFIGS[model_type]
    with open("a.npz", "wb") as f:
        npz.write(f, npz.from_state_dict(state, config, 32))
    model = VisionTransformer(config, 32, 10, zero_head=False)
    model.load_from(np.load("a.npz"))
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert train.main(["--name", "a", *tiny, "-v"]) == 0


def test_the_run_works_on_the_images_that_were_moved_once(monkeypatch):
    moved, seen = [], []
    to, evaluate = datasets.DataSets.to, train.evaluate
    monkeypatch.setattr(datasets.DataSets, "to", lambda self, device: moved.append(to(self, device)) or moved[-1])
    monkeypatch.setattr(train, "evaluate", lambda *args: seen.append(args[1]) or evaluate(*args))
    assert train.main(RUN) == 0
    assert len(moved) == 1
    assert len(seen) == 2
    assert all(images is moved[0].test for images in seen)


def test_a_folder_of_images_trains_with_its_own_classes():
    runs.write_images("pets")
    for split in ("train", "test"):
        os.rename(f"pets/{split}/bee", f"pets/{split}/wasp")
        os.makedirs(f"pets/{split}/cat")
        Image.new("L", (50, 20)).save(f"pets/{split}/cat/grey.jpg")  # sizes that differ go through the loader
        Image.new("RGBA", (9, 40)).save(f"pets/{split}/cat/clear.png")
    assert train.main([*RUN, "--dataset", "pets", "--train_batch_size", "8", "--hflip"]) == 0
    assert torch.load("output/a_checkpoint.bin", weights_only=True)["head.weight"].shape == (3, 32)
    assert json.loads(Path("output/a_checkpoint.json").read_text())["classes"] == ["ant", "cat", "wasp"]


def test_the_reference_scripts_names_are_still_taken():
    args = flags.make_parser().parse_args(["--name", "x", "--model_type", "R50+ViT-B_16"])
    assert CONFIGS[args.model_type] == CONFIGS["R50-ViT-B_16"]
    os.mkdir("checkpoint")
    Path("checkpoint/ViT-B_16.npz").touch()
    args = flags.make_parser().parse_args(["--name", "x"])
    assert published.find(args.pretrained_dir, args.model_type) == "checkpoint/ViT-B_16.npz"


# ---- evaluating ----


@pytest.fixture
def checkpoint():
    """A checkpoint of the testing model at 32 px with ten classes, where -v looks for it."""
    os.makedirs("output")
    torch.manual_seed(0)
    model = VisionTransformer(CONFIGS["testing"], 32, 10)
    torch.nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), "output/a_checkpoint.bin")
    return model.state_dict()


@pytest.mark.parametrize("flag", [["-v"], ["-v", "true"], ["--eval_only"]])
def test_evaluation_only_needs_no_npz_and_writes_nothing(flag, checkpoint, logged):
    assert train.main(["--name", "a", *TINY, *flag]) == 0
    assert accuracies_of(logged)
    assert sorted(os.listdir()) == ["output"]


def test_v_false_trains():
    assert train.main([*RUN, "-v", "false"]) == 0
    assert losses_of("a")


def test_weights_of_a_wrapped_model_evaluate_alike(checkpoint, logged):
    torch.save({f"module.{name}": x for name, x in checkpoint.items()}, "wrapped.bin")
    for path in ("output/a_checkpoint.bin", "wrapped.bin"):
        assert train.main(["--name", "b", *TINY, "-v", "--load_model_dir", path]) == 0
    one, other = accuracies_of(logged)
    assert one == other


def test_an_evaluation_unlike_the_training_is_a_warning_and_one_like_it_is_none(checkpoint, caplog):
    metadata = CheckpointMetadata("testing", 32, [str(i) for i in range(10)], "erf", "digits", 4, 0.5)
    save_weights("output/a_checkpoint.bin", checkpoint, metadata)
    for more, warnings in (([], 0), (["--gelu", "tanh"], 1)):
        caplog.clear()
        assert train.main(["--name", "a", *TINY, "-v", *more]) == 0
        assert len([r for r in caplog.records if r.levelname == "WARNING"]) == warnings


class _Casts(TorchDispatchMode):
    """Counts how often each tensor is cast."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.counts[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


def test_an_evaluation_casts_each_weight_once_however_many_batches_it_has():
    model, precision = make_model(), Precision(torch.device("cpu"), "O1")
    optimizer = make_optimizer(model, precision)
    images = datasets.MemoryImages(torch.zeros(6, 3, 32, 32, dtype=torch.uint8), torch.arange(6))
    with _Casts() as casts:
        loss = train.evaluate(model, images, precision, 32, 2).loss
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert [casts.counts[p.data_ptr()] for p in weights] == [1] * len(weights)
    optimizer.param_groups[0]["lr"] = 1.0
    take_step(model, precision, optimizer)
    assert train.evaluate(model, images, precision, 32, 2).loss != loss  # the next casts the new weights
