"""The CUDA paths, all by one command: make test-gpu."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from utils import augment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
RUN = [
    "--dataset", "digits", "--model_type", "testing", "--img_size", "32", "--pretrained_dir", "", "--dropout", "0",
    "--train_batch_size", "32", "--num_steps", "8", "--warmup_steps", "2", "--eval_every", "4", "--log_every", "1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def losses_of(name):
    lines = [json.loads(line) for line in Path("logs", name, "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_float32_trains_as_on_the_cpu():
    for device in ("cpu", "cuda"):
        assert train.main(["--name", device, *RUN, "--device", device]) == 0
    assert losses_of("cuda") == pytest.approx(losses_of("cpu"), abs=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_half_precision_trains_near_float32_and_evaluates(level, dtype):
    assert train.main(["--name", "full", *RUN, "--device", "cuda"]) == 0
    half = ["--device", "cuda", "--fp16", "--fp16_opt_level", level, "--amp_dtype", dtype]
    assert train.main(["--name", "half", *RUN, *half]) == 0
    assert losses_of("half") == pytest.approx(losses_of("full"), abs=0.05)
    state = torch.load("output/half_checkpoint.bin", weights_only=True)
    assert {x.dtype for x in state.values()} == {torch.float32}
    assert train.main(["--name", "half", *RUN[:6], *half, "-v"]) == 0


@pytest.mark.parametrize("model_type", ["testing", "testing-hybrid"])
def test_logits_are_the_cpus(model_type):
    torch.manual_seed(0)
    model = VisionTransformer(CONFIGS[model_type], 64, 10).eval()
    torch.nn.init.normal_(model.head.weight)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(model.cuda()(x.cuda())[0].cpu(), model.cpu()(x)[0], atol=1e-3, rtol=1e-3)


def test_crops_are_the_cpus():
    pictures = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    boxes = augment.crop_boxes(torch.rand(8, augment.NUM_DRAWS, dtype=torch.float64), 32, 32)
    there = augment.resized_crop(pictures.cuda(), boxes.cuda(), 48).cpu()
    torch.testing.assert_close(there, augment.resized_crop(pictures, boxes, 48), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "precision", [[], *(["--fp16", "--fp16_opt_level", level] for level in ("O1", "O2"))], ids=["float32", "O1", "O2"]
)
def test_a_deterministic_run_that_was_stopped_ends_with_the_same_bits(precision):
    """In processes of their own: the setting holds for all that a process computes."""
    script = Path(__file__).resolve().parent.parent / "train.py"
    flags = [*RUN, "--device", "cuda", "--deterministic", "--dropout", "0.1", "--save_every", "3", *precision]
    stop = "import os, signal, sys; sys.path.insert(0, sys.argv.pop(1)); import train; from utils.metrics import *\n"
    stop += "real = TrainingLog.update\n"
    stop += "def update(self, step, *args):\n    real(self, step, *args)\n    step == 5 and os.kill(os.getpid(), 9)\n"
    stop += "TrainingLog.update = update; train.main(sys.argv[1:])"
    whole = [sys.executable, str(script), "--name", "whole", *flags]
    killed = [sys.executable, "-c", stop, str(script.parent), "--name", "stopped", *flags]
    again = [sys.executable, str(script), "--name", "stopped", *flags]
    assert [subprocess.run(c, timeout=300).returncode for c in (whole, killed, again)] == [0, -9, 0]
    states = [torch.load(f"output/{name}_last.pt", weights_only=True) for name in ("whole", "stopped")]
    assert all(torch.equal(x, states[1]["model"][name]) for name, x in states[0]["model"].items())
    assert losses_of("stopped") == losses_of("whole")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one():
    assert train.main(["--name", "one", *RUN, "--device", "cuda"]) == 0
    script = Path(__file__).resolve().parent.parent / "train.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run([*launcher, "--name", "two", *RUN, "--train_batch_size", "16"], env=os.environ, timeout=300)
    assert done.returncode == 0
    assert losses_of("two") == pytest.approx(losses_of("one"), abs=1e-4)
