"""Trainings on a GPU, the kernels they ask for, and when the host waits: tests that need no numbers.

make test-gpu runs them on a GPU, tests/test_null_gpu.py on the null one.
"""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.helpers import gpu_runs, runs
from tests.helpers.gpu_runs import LEVELS, needs_counts, precision_flags
from tests.helpers.steps import make_optimizer
from tests.helpers.tools import run_tool
from tools import attention_map, predict
from utils import augment, data_utils, datasets
from utils.evaluation import Predictions
from utils.metrics import TrainLog
from utils.precision import Precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
#: Bytes that CUDA copies from pageable memory without a wait; source: CUDA programming guide, asynchronous execution.
SMALL_COPY = 2**16


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- to their end ----


@pytest.mark.parametrize(("level", "dtype"), LEVELS)
def test_a_training_ends_and_its_checkpoint_is_evaluated(level, dtype):
    flags = precision_flags(level, dtype)
    gpu_runs.run(*flags)
    state = torch.load("output/a_checkpoint.bin", weights_only=True)
    assert {(x.dtype, x.device.type) for x in state.values()} == {(torch.float32, "cpu")}
    assert train.main(["--name", "a", *gpu_runs.RUN[:6], "--device", "cuda", *flags, "-v"]) == 0


def test_a_hybrid_trains_with_gradient_checkpointing():
    with torch.backends.cudnn.flags(enabled=False):  # the null GPU has no cuDNN
        gpu_runs.run("--model_type", "testing-hybrid", *precision_flags("O2"), "--gradient_checkpointing")


@pytest.mark.usefixtures("decode_late")
def test_images_that_processes_decode_are_trained_on(folder):
    gpu_runs.run("--dataset", str(folder), "--num_workers", "1", "--train_batch_size", "4")


def test_a_float32_run_after_one_of_mixed_precision_has_no_tf32(monkeypatch):
    forward, seen = VisionTransformer.forward, []

    def look(self, *args):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return forward(self, *args)

    monkeypatch.setattr(VisionTransformer, "forward", look)
    for level, expected in (("O1", ("high", True)), ("O0", ("highest", False))):
        seen.clear()
        gpu_runs.run("--name", level, *precision_flags(level))
        assert seen[-1] == expected


class Killed(BaseException):
    """Ends a training as SIGKILL does: nothing is saved."""


@pytest.mark.parametrize(("level", "dtype"), [("O0", ""), ("O2", "float16")])
def test_a_killed_training_resumes_on_the_gpu(level, dtype, monkeypatch):
    flags, log_step = [*precision_flags(level, dtype), "--save_every", "3", "--eval_every", "8"], TrainLog.step

    def step(self, number, *args):
        log_step(self, number, *args)
        if number == 5:
            raise Killed

    monkeypatch.setattr(TrainLog, "step", step)
    with pytest.raises(Killed):
        gpu_runs.run(*flags)
    monkeypatch.setattr(TrainLog, "step", log_step)
    assert runs.last_state().step == 3
    gpu_runs.run(*flags)
    assert runs.last_state().step == 8
    assert [line["step"] for line in runs.lines() if "train/lr" in line] == list(range(1, 9))


def test_the_tools_compute_on_the_gpu(draw):
    gpu_runs.run()
    image, checkpoint = draw(), "output/a_checkpoint.bin"
    code, out, err = run_tool(predict, "--load_model_dir", checkpoint, image, "--device", "cuda")
    assert code == 0, err
    assert image in out
    code, _, err = run_tool(
        attention_map, "--load_model_dir", checkpoint, image, "--device", "cuda", "--output", "map.png"
    )
    assert code == 0, err
    assert Path("map.png").exists()


# ---- waits and copies ----


@pytest.mark.parametrize(
    ("level", "dtype"), [("O0", "float16"), *((x, y) for x in ("O1", "O2") for y in ("float16", "bfloat16"))]
)
def test_steps_and_evaluations_do_not_wait_for_the_gpu(level, dtype):
    """But for float16's flag of the step before, whose event ``collect_skipped`` waits for."""
    device = torch.device("cuda", torch.cuda.current_device())
    data = datasets.load_datasets("digits", "", 1).to(device)
    model = VisionTransformer(CONFIGS["testing"], 32, 10).to(device)
    precision = Precision(device, level, dtype)
    optimizer, transform = make_optimizer(model, precision), augment.TrainTransform(32, hflip=True)
    sampler = data_utils.StepSampler(len(data.train), 8, transform.num_draws, 0)
    batches = data_utils.train_batches(data.train, sampler, range(1, 9), 4, transform, device, 0)

    def take_step() -> None:
        train.forward_backward(model, batches, precision, [1, 1])
        precision.collect_skipped()
        optimizer.param_groups[0]["lr"] = 0.01
        precision.step(optimizer, 1.0)

    take_step()  # what is set up once may wait
    larger = VisionTransformer(CONFIGS["testing"], 48, 10).to(device).eval()  # the digits, of 32 px, are resized
    evaluated = data_utils.eval_batches(data.test, 8, augment.EvalTransform(48), device, 0)
    with torch.no_grad():
        larger(next(evaluated)[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            take_step()
        loss_sum, predictions = torch.zeros((), dtype=torch.float64, device=device), Predictions()
        with torch.no_grad(), precision.reusing_casts():  # as train.evaluate, which waits at its end
            for images, labels in itertools.islice(evaluated, 3):
                with precision.autocast():
                    logits = larger(images)[0].float()
                loss_sum += F.cross_entropy(logits, labels, reduction="sum").to(torch.float64)
                predictions.add(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_waits(*flags: str) -> None:
    """Fails if a step without a line in the log waits; one waits with a line, else nothing would be seen here."""
    steps = gpu_runs.steps(*flags, "--log_every", "5")
    assert "SYNC stream" in steps[4]
    for step in (steps[2], steps[5], steps[6]):  # the third, the sixth and the seventh
        waits = [line for line in step if line.startswith("SYNC")]
        assert waits in ([], ["SYNC event"])  # for the outcome of the step before, which has arrived
        copies = [line.split()[1:] for line in step if line.startswith("COPY")]
        assert all(kind == "async" for kind, *_ in copies)
        assert all(not way.endswith("->PAGEABLE") for _, way, _ in copies)
        assert all(int(size) <= SMALL_COPY for _, way, size in copies if way.startswith("PAGEABLE->"))


@needs_counts
@pytest.mark.parametrize(("level", "dtype"), [("O0", ""), ("O1", "float16"), ("O2", "float16"), ("O2", "bfloat16")])
def test_a_training_waits_for_the_gpu_only_at_lines_of_its_log(level, dtype):
    check_waits(*precision_flags(level, dtype))


@needs_counts
@pytest.mark.usefixtures("decode_late")
def test_a_training_on_files_waits_for_the_gpu_only_at_lines_of_its_log(folder):
    check_waits("--dataset", str(folder), "--train_batch_size", "4", "--num_workers", "1", *precision_flags("O2"))


# ---- kernels ----


@pytest.mark.parametrize(("level", "dtype"), [("O0", ""), ("O1", "float16"), ("O2", "")])
def test_attention_has_the_kernel_that_is_right_for_the_card(level, dtype):
    """The flash kernel for half precision, where the card has it, and never cuDNN's."""
    names = gpu_runs.kernels(*precision_flags(level, dtype))
    flash, efficient = (
        {name for name in names if of in name and "cudnn" not in name} for of in ("pytorch_flash", "fmha_cutlass")
    )
    assert not any("cudnn" in name and "sdpa" in name for name in names)
    has_flash = torch.cuda.get_device_capability() >= (8, 0)
    assert bool(flash) == (level != "O0" and has_flash)
    assert bool(efficient) == (level == "O0" or not has_flash)


# ---- compiled ----


def test_a_compiled_model_is_one_graph(monkeypatch):
    """``fullgraph`` makes a break of the graph an error; the graph is run without generating code for it."""

    def compile_model(self):
        torch.nn.Module.compile(self, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(VisionTransformer, "compile", compile_model)
    torch._dynamo.reset()
    gpu_runs.run("--compile", *precision_flags("O2"))
