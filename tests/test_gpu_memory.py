"""Memory and launches of trainings on a GPU: tests that need no numbers.

make test-gpu runs them on a GPU, tests/test_null_gpu.py on the null one.
"""

import logging
from dataclasses import replace

import pytest
import torch

import train
from benchmarks.once import memory as measured
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.helpers import gpu_runs
from tests.helpers.gpu_runs import needs_counts, precision_flags
from utils import augment, data_utils, datasets, figures, memory, reckoning
from utils.precision import Precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
needs_little = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] > 2**32, reason="needs a GPU of 4 GiB or less"
)
#: Launches and products of a step of timm's ViT-B_32 in the loop that everybody writes, in float32 and with autocast in
#: float16: counted by ``python -m benchmarks.once.launches``, timm 1.0.31, torch 2.14.1; at O2 without the three
#: launches of its SGD.
TIMM = {"O0": 407 + 149, "O2": 654 + 149}
#: How many times as many ours may have: timm makes no crops.
MOST = {"O0": 1.15, "O2": 1.0}
VIT_B_32 = [
    "--model_type", "ViT-B_32", "--img_size", "224", "--dropout", "0.1", "--train_batch_size", "512",
    "--gradient_accumulation_steps", "1",
]  # fmt: skip
#: A model that takes some 20 MiB for each image: too much at once for 1.5 GiB.
DEMANDING = ["--model_type", "ViT-Ti_16", "--img_size", "224"]


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _without_labels(monkeypatch):
    """The null GPU's are no numbers of classes."""
    monkeypatch.setattr(figures, "training_batch", lambda *args: None)


def test_images_on_the_gpu_are_not_copied_for_each_evaluation():
    device = torch.device("cuda", torch.cuda.current_device())
    data = datasets.load_datasets("digits", "", 1).to(device).test
    for _ in range(2):
        held = torch.cuda.memory_allocated()
        batches = data_utils.eval_batches(data, 8, augment.EvalTransform(32), device, 0)
        next(batches)
        assert torch.cuda.memory_allocated() - held < data.images.nbytes
        del batches


@pytest.mark.parametrize(("level", "num_micro_batches"), [("O0", 1), ("O2", 2)])
def test_the_reckoned_memory_is_what_a_step_takes(level, num_micro_batches):
    """With the share that is left for others: the libraries' workspaces are not reckoned."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    training = measured.Training(("ViT-B_32", 224, level, 192, num_micro_batches), "cuda")
    reckoned, taken, *_ = training.run()
    assert memory.GPU_SHARE * taken <= reckoned <= 1.1 * taken


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_an_evaluation_takes_no_more_than_the_free_memory_and_not_much_less(level):
    device, config = torch.device("cuda", torch.cuda.current_device()), CONFIGS["ViT-Ti_16"]
    with torch.device("meta"):
        few_blocks = VisionTransformer(replace(config, num_layers=2), 224, 10)
    model, precision = VisionTransformer(config, 224, 10).to(device), Precision(device, level)
    precision.prepare(model)
    images = datasets.MemoryImages(torch.zeros(512, 3, 32, 32, dtype=torch.uint8), torch.zeros(512).long()).to(device)
    free = 2**28
    number = reckoning.evaluated_at_once(reckoning.evaluated_image(few_blocks, precision, 224, 32**2), free)
    train.evaluate(model, images, precision, 224, number)  # libraries take what they need
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    train.evaluate(model, images, precision, 224, number)
    assert 0.3 * free < torch.cuda.max_memory_allocated() - held <= free


@needs_little
@pytest.mark.parametrize(("level", "size"), [("O0", 48), ("O2", 64)])
def test_the_fewest_micro_batches_that_fit_are_taken_and_fewer_end_with_the_remedy(level, size, caplog, capfd):
    caplog.set_level(logging.INFO)
    flags = [*DEMANDING, "--train_batch_size", str(size), *precision_flags(level)]
    gpu_runs.steps(*flags, stop_after=3)
    assert "--gradient_accumulation_steps 2" in caplog.text
    capfd.readouterr()
    assert train.main(["--name", "b", *gpu_runs.RUN, *flags, "--gradient_accumulation_steps", "1"]) == 1
    [error] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py: error:")]
    assert f"--gradient_accumulation_steps 2 computes the same step {size // 2} at a time" in error


@needs_counts
@pytest.mark.parametrize("level", ["O0", "O2"])
def test_a_step_launches_no_more_than_timms(level):
    fourth = gpu_runs.steps(*VIT_B_32, *precision_flags(level, "float16"), stop_after=4)[3]
    launched = sum(line.startswith(("KERNEL", "GEMM")) for line in fourth)
    assert launched <= MOST[level] * TIMM[level]
