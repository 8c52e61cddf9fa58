"""A GPU's numbers, by make test-gpu; test_gpu_paths.py and test_gpu_memory.py have what needs none."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import train
from models.configs import CONFIGS
from models.cpu_ops import dropout
from models.modeling import Attention, VisionTransformer
from tests.helpers.gpu_runs import RUN
from tests.helpers.steps import make_optimizer
from utils import augment, data_utils, datasets, hardware
from utils.input_wait import InputWait
from utils.precision import Precision
from utils.process import process_restored
from utils.scheduler import make_schedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _float32_products_in_float32():
    """Some tests compare with the CPU, and convolutions have TF32 on by default."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def lines_of(name):
    lines = [json.loads(line) for line in Path("logs", name, "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "train/lr" in line}


def losses_of(name):
    return [line["train/loss"] for line in lines_of(name).values() if "train/loss" in line]


def test_float32_trains_as_on_the_cpu():
    for device in ("cpu", "cuda"):
        assert train.main(["--name", device, *RUN, "--device", device]) == 0
    assert losses_of("cuda") == pytest.approx(losses_of("cpu"), abs=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_half_precision_trains_near_float32(level, dtype):
    assert train.main(["--name", "full", *RUN]) == 0
    half = ["--fp16", "--fp16_opt_level", level, "--amp_dtype", dtype]
    assert train.main(["--name", "half", *RUN, *half]) == 0
    full, half_lines = lines_of("full"), lines_of("half")
    applied = [step for step, line in half_lines.items() if "train/loss" in line]
    assert len(applied) >= 6  # float16 may skip steps while it looks for a scale
    for step in applied:
        assert half_lines[step]["train/loss"] == pytest.approx(full[step]["train/loss"], abs=0.05)


@pytest.mark.parametrize("model_type", ["testing", "testing-hybrid"])
def test_logits_are_the_cpus(model_type):
    torch.manual_seed(0)
    model = VisionTransformer(CONFIGS[model_type], 64, 10).eval()
    torch.nn.init.normal_(model.head.weight)
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(model.cuda()(x.cuda())[0].cpu(), model.cpu()(x)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_steps_that_overflow_are_skipped_logged_and_do_not_advance_the_schedule(level, monkeypatch, caplog):
    passes, backward = iter(range(1, 100)), Precision.backward
    monkeypatch.setattr(
        Precision, "backward", lambda self, x: backward(self, x * 1e30 if next(passes) in (3, 4) else x)
    )
    half = ["--fp16", "--fp16_opt_level", level, "--amp_dtype", "float16"]
    assert train.main(["--name", "a", *RUN, *half]) == 0
    skipped = [int(m.split()[1]) for m in caplog.messages if "was skipped" in m]
    assert {3, 4} <= set(skipped)
    schedule = make_schedule("cosine", 2, 8)
    for step, line in lines_of("a").items():
        before = sum(s < step for s in skipped)
        assert line["train/lr"] == pytest.approx(0.03 * schedule(step - before), rel=1e-6, abs=1e-12)
        assert ("train/loss" in line) == (step not in skipped)


def test_an_optimizer_whose_first_step_is_skipped_starts_with_no_momentum():
    torch.manual_seed(0)
    model = VisionTransformer(CONFIGS["testing"], 32, 10).cuda()
    precision = Precision(torch.device("cuda"), "O1", "float16")
    optimizer = make_optimizer(model, precision)
    before = [p.detach().clone() for p in model.parameters()]
    with precision.autocast():
        loss = model(torch.rand(4, 3, 32, 32, device="cuda"), torch.arange(4, device="cuda"))
    precision.backward(loss * 1e30)
    assert not precision.step(optimizer, 1.0)
    assert precision.collect_skipped() == 1
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())


def test_the_host_may_wait_for_a_batch_beside_a_gpu_that_computes():
    """The share of waiting is the GPU's."""
    device = torch.device("cuda", torch.cuda.current_device())

    def waited(cycles: int) -> float:
        batches = InputWait(iter(lambda: time.sleep(0.1), 0), device, 1)
        next(batches)
        torch.cuda.synchronize()
        first = batches.secs()
        torch.cuda._sleep(cycles)
        next(batches)
        torch.cuda.synchronize()
        return batches.secs() - first

    assert waited(cycles=10**9) < 0.05  # about half a second
    assert 0.09 < waited(cycles=1) < 0.5


@pytest.mark.parametrize("scale", ["128", "0.5"])
def test_a_fixed_loss_scale_trains_alike(scale):
    for name, flags in (("plain", []), ("scaled", ["--loss_scale", scale])):
        half = ["--fp16", "--fp16_opt_level", "O2", "--amp_dtype", "bfloat16"]
        assert train.main(["--name", name, *RUN, *half, *flags]) == 0
    assert losses_of("scaled") == pytest.approx(losses_of("plain"), abs=0.02)


@pytest.mark.parametrize("flags", [[], ["--fp16", "--amp_dtype", "bfloat16"]], ids=["float32", "bfloat16"])
def test_a_compiled_model_trains_alike_and_keeps_its_weights_names(flags):
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        assert train.main(["--name", name, *RUN, *flags, *more]) == 0
    assert losses_of("compiled") == pytest.approx(losses_of("plain"), abs=0.05 if flags else 1e-4)
    state = torch.load("output/compiled_checkpoint.bin", weights_only=True)
    assert list(state) == list(VisionTransformer(CONFIGS["testing"], 32, 10).state_dict())


def test_dropout_keeps_its_rate_and_its_scale():
    x = torch.ones(2**22, device="cuda")
    torch.manual_seed(0)
    y = dropout(x, 0.1, training=True)
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.1, training=True), y)
    assert (y != 0).double().mean().item() == pytest.approx(0.9, abs=1e-3)
    torch.testing.assert_close(y[y != 0].unique().cpu(), torch.tensor([1 / 0.9]))


@pytest.mark.parametrize(("height", "width", "img_size"), [(32, 32, 48), (64, 30, 16), (300, 200, 48)])
def test_crops_are_the_cpus_but_for_roundings_of_ties(height, width, img_size):
    """Enlarged; along the height first, some of them; of sizes whose filters are not kept."""
    images = torch.randint(0, 256, (8, 3, height, width), dtype=torch.uint8)
    draws, transform = torch.rand(8, augment.NUM_DRAWS, dtype=torch.float64), augment.TrainTransform(img_size, True)
    there, here = transform.batch(images.cuda(), draws).cpu(), transform.batch(images, draws)
    levels = (there - here).abs() * 127.5
    assert levels.max() < 2.01
    assert levels.mean() < 0.03


@pytest.mark.usefixtures("decode_late")
def test_images_come_from_workers_as_they_do_on_the_cpu(folder):
    data, transform = datasets.load_datasets(str(folder), "", 1), augment.EvalTransform(32)
    here, there = (
        [x for x, _ in data_utils.eval_batches(data.test, 2, transform, torch.device(kind), 2)]
        for kind in ("cpu", "cuda")
    )
    for x, y in zip(here, there, strict=True):
        assert y.is_cuda
        torch.testing.assert_close(y.cpu(), x, atol=1e-6, rtol=0)


def test_whole_images_are_the_cpus():
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(augment.resize(images.cuda(), 48).cpu(), augment.resize(images, 48), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "precision", [[], *(["--fp16", "--fp16_opt_level", level] for level in ("O1", "O2"))], ids=["float32", "O1", "O2"]
)
def test_a_deterministic_run_that_was_stopped_ends_with_the_same_bits(precision):
    """In processes of their own: the setting holds for all that a process computes."""
    script = Path(__file__).resolve().parent.parent / "train.py"
    flags = [*RUN, "--deterministic", "--dropout", "0.1", "--save_every", "3", *precision]
    stop = "import os, sys; sys.path.insert(0, sys.argv.pop(1)); import train; from utils.metrics import TrainLog\n"
    stop += "log_step = TrainLog.step\n"
    stop += "def stop(self, step, *args):\n    log_step(self, step, *args)\n    step == 5 and os.kill(os.getpid(), 9)\n"
    stop += "TrainLog.step = stop; train.main(sys.argv[1:])"
    whole = [sys.executable, str(script), "--name", "whole", *flags]
    killed = [sys.executable, "-c", stop, str(script.parent), "--name", "stopped", *flags]
    again = [sys.executable, str(script), "--name", "stopped", *flags]
    assert [subprocess.run(c, timeout=300).returncode for c in (whole, killed, again)] == [0, -9, 0]
    states = [torch.load(f"output/{name}_last.pt", weights_only=True) for name in ("whole", "stopped")]
    assert all(torch.equal(x, states[1]["model"][name]) for name, x in states[0]["model"].items())
    assert losses_of("stopped") == losses_of("whole")


@pytest.mark.timeout(660)
@pytest.mark.parametrize("name", ["step", "data", "start"])
def test_the_benchmarks_run(name, repository):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--device", "cuda", "--quick", "--model_type", "testing"]
    done = subprocess.run([*command, "--img_size", "32"], cwd=repository, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| ours" in done.stdout


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one():
    assert train.main(["--name", "one", *RUN]) == 0
    script = Path(__file__).resolve().parent.parent / "train.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run([*launcher, "--name", "two", *RUN, "--train_batch_size", "16"], env=os.environ, timeout=300)
    assert done.returncode == 0
    assert losses_of("two") == pytest.approx(losses_of("one"), abs=1e-4)


def attend(device, dtype, num_tokens, num_queries):
    """Returns attention's output and gradients, float32 on the CPU, where all scores are near -120; its scores, too."""
    torch.manual_seed(0)
    attention = Attention(replace(CONFIGS["ViT-B_32"], num_layers=1), vis=False)
    heads = [layer.weight.detach().view(12, 64, 768) for layer in (attention.query, attention.key)]
    with torch.no_grad():
        for layer in (attention.query, attention.key, attention.value):
            torch.nn.init.normal_(layer.weight, std=768**-0.5)
        for layer, head, first in ((attention.query, heads[0], 1), (attention.key, heads[1], -120 * 64**0.5)):
            head[:, 0] = 0  # of each query and key the first number is the bias, exact in all types
            layer.bias.view(12, 64)[:, 0] = first
    x = torch.randn(4, num_tokens, 768)
    q, k = (layer(x).detach().unflatten(-1, (12, 64)).transpose(1, 2) for layer in (attention.query, attention.key))
    scores = q @ k.transpose(-2, -1) * 64**-0.5
    attention, x = attention.to(device).train(), x.to(device).requires_grad_()
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        y = attention(x, num_queries)[0]
    y.backward(torch.randn(y.shape).to(y))
    of_queries = attention.query.weight.grad.view(12, 64, 768)
    assert of_queries.isfinite().all()
    of_queries[:, 0] = 0  # sums to zero, all roundings 120 times
    grads = [x.grad, *(layer.weight.grad for layer in (attention.query, attention.key, attention.value, attention.out))]
    return [t.detach().float().cpu() for t in (y, *grads)], scores


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_queries", [None, 1])
@pytest.mark.parametrize("num_tokens", [50, 97, 128, 197])
def test_half_precision_attention_on_large_scores_is_that_of_float32(num_tokens, num_queries, dtype):
    """And computed by the flash kernel; cuDNN's was reported to return NaN for such scores."""
    expected, scores = attend("cpu", torch.float32, num_tokens, num_queries)
    assert scores.mean().item() == pytest.approx(-120, abs=1)
    assert scores.std() > 0.5
    with process_restored(), profile(activities=[ProfilerActivity.CUDA]) as profiled:
        hardware.pick_device("cuda", -1)
        got, _ = attend("cuda", dtype, num_tokens, num_queries)
        torch.cuda.synchronize()
    for there, here in zip(got, expected, strict=True):
        assert (there - here).norm() < (0.004 if dtype == torch.float16 else 0.03) * here.norm()  # False for NaN
    kernels = " ".join(event.key for event in profiled.key_averages())
    if torch.cuda.get_device_capability() >= (8, 0):  # others have no flash kernel
        assert "flash_fwd" in kernels
        assert "flash_bwd" in kernels
    assert "cudnn" not in kernels
