"""The dropout masks of a step: the same on CPUs however a rank's batch is divided into micro-batches."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import train
from models.configs import CONFIGS
from models.cpu_ops import StepMasks, dropout
from models.modeling import VisionTransformer
from tests.conftest import REPOSITORY
from tests.helpers import runs
from tests.helpers.boundaries import killed_at
from tests.helpers.launching import TINY, ranks, train_main, values_of
from utils.batch import Batch
from utils.precision import Precision
from utils.run import Run, RunPaths

SIZES = [[12], [6, 6], [4, 4, 4], [5, 5, 2], [1, 10, 1], [1] * 12]
#: Of attention, too, in one head: no image's probabilities fill whole words of random bits.
PLAIN = replace(CONFIGS["testing"], attention_dropout_rate=0.2, num_heads=1)
HYBRID = replace(CONFIGS["testing-hybrid"], attention_dropout_rate=0.2)


# ---- the masks ----


def masks_of(sizes: list[int], passes: int = 1) -> list[Tensor]:
    """The masks that each of three calls draws for a step's images, from ``passes`` forward passes."""
    torch.manual_seed(0)
    step, found = StepMasks(), []
    for size in sizes:
        with step.next_micro_batch():
            start = torch.get_rng_state()
            for _ in range(passes):
                torch.set_rng_state(start)
                shapes = [(size, 5, 5), (size, 8), (size, 3, 7, 1)]
                masks = [dropout(torch.ones(shape), 0.5, training=True) for shape in shapes]
            found.append(masks)
    return [torch.cat(parts) for parts in zip(*found)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_division_of_a_step_draws_the_same_masks(sizes):
    whole = masks_of([12])
    for one, other in itertools.pairwise(whole):
        assert not torch.equal(one.flatten()[:60], other.flatten()[:60])
    for mask in whole:  # no image has another's
        assert len({tuple(image.flatten().tolist()) for image in mask}) == 12
    for mask, expected in zip(masks_of(sizes), whole):
        assert torch.equal(mask, expected)


def test_the_masks_of_a_whole_batch_are_those_without_a_division():
    whole = masks_of([12])
    torch.manual_seed(0)
    for mask in whole:
        assert torch.equal(mask, dropout(torch.ones(mask.shape), 0.5, training=True))


@pytest.mark.parametrize("sizes", [[12], [5, 5, 2]], ids=str)
def test_a_forward_pass_that_is_repeated_draws_its_masks_again(sizes):
    for mask, expected in zip(masks_of(sizes, passes=2), masks_of(sizes)):
        assert torch.equal(mask, expected)


def test_after_a_step_masks_are_drawn_as_before_it():
    torch.manual_seed(0)
    with StepMasks().next_micro_batch():
        first = dropout(torch.ones(100), 0.5, training=True)
    with pytest.raises(ZeroDivisionError), StepMasks().next_micro_batch():
        raise ZeroDivisionError
    torch.manual_seed(0)
    assert torch.equal(dropout(torch.ones(100), 0.5, training=True), first)


# ---- the steps ----


def losses(config, sizes: list[int], level: str = "O0") -> list[float]:
    """The losses of steps on the same twelve images."""
    torch.manual_seed(0)
    model = VisionTransformer(config, 40, 10)
    torch.nn.init.normal_(model.head.weight)
    precision = Precision(torch.device("cpu"), level)
    optimizer = torch.optim.SGD(precision.prepare(model), lr=0.03, momentum=0.9)
    precision.attach(model, optimizer)
    generator, found = torch.Generator().manual_seed(1), []
    images = torch.rand(12, 3, 40, 40, generator=generator)
    labels = torch.randint(10, (12,), generator=generator)
    for step in range(4):
        torch.manual_seed(step)
        micro_batches = zip(images.split(sizes), labels.split(sizes))
        found.append(train.forward_backward(model, micro_batches, precision, sizes).item())
        precision.step(optimizer, 1.0)
    return found


@pytest.mark.parametrize("config", [PLAIN, HYBRID], ids=["plain", "hybrid"])
@pytest.mark.parametrize(("level", "tolerance"), [("O0", 1e-4), ("O1", 0.05), ("O2", 0.05)])
def test_micro_batches_of_any_sizes_take_the_steps_of_the_whole_batch(config, level, tolerance):
    whole = losses(config, [12], level)
    without = losses(replace(config, dropout_rate=0.0, attention_dropout_rate=0.0), [12], level)
    assert max(abs(a - b) for a, b in zip(whole, without)) > 0.3  # which other masks would change
    for sizes in SIZES[1:]:
        assert losses(config, sizes, level) == pytest.approx(whole, rel=tolerance)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


DEMO = [*runs.RUN, "--model_type", "ViT-demo", "--pretrained_dir", str(REPOSITORY / "checkpoint/ViT-demo.npz"),
        "--dropout", "0.1", "--train_batch_size", "24", "--log_every", "1", "--num_steps", "6"]  # fmt: skip


def losses_of(name: str, *flags: str) -> list[float]:
    assert train.main([*DEMO, "--name", name, *flags]) == 0
    return [line["train/loss"] for line in runs.lines(name) if "train/loss" in line]


def test_a_training_with_dropout_has_the_losses_of_the_whole_batch(folder):
    whole = losses_of("1", "--gradient_accumulation_steps", "1")
    assert abs(whole[-1] - losses_of("other", "--gradient_accumulation_steps", "1", "--seed", "1")[-1]) > 1e-3
    for parts in ("2", "3", "4"):
        assert losses_of(parts, "--gradient_accumulation_steps", parts) == pytest.approx(whole, abs=1e-5)


@pytest.mark.usefixtures("pets")
def test_a_training_with_dropout_may_resume_with_other_micro_batches():
    killed_at("after step 3: step ends")  # the state is of step 2; two micro-batches a step
    assert runs.run("--gradient_accumulation_steps", "8") == 0
    found, expected = runs.lines(), runs.undisturbed()["lines"]
    assert len(found) == len(expected) > 2
    for line, other in zip(found, expected):
        assert line == pytest.approx(other, abs=1e-5)


def test_ranks_with_dropout_have_the_losses_of_their_whole_batches(tmp_path):
    found = []
    for parts in ("1", "4"):
        flags = [*TINY, "--name", parts, "--dropout", "0.3", "--num_steps", "4", "--warmup_steps", "1"]
        flags += ["--eval_every", "4", "--learning_rate", "0.3", "--train_batch_size", "8"]
        flags += ["--gradient_accumulation_steps", parts]
        with ranks(tmp_path, [flags] * 2, train_main) as run:
            assert run.results() == [0, 0], run.output()
        found.append(values_of(tmp_path, parts, "train/loss"))
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], abs=1e-5)


# ---- where masks differ all the same ----


@pytest.mark.usefixtures("pets")
@pytest.mark.parametrize("parts", [1, 2])
def test_a_run_that_began_before_goes_on_with_the_masks_it_had(parts):
    """Its state, which does not tell how masks are drawn, is saved and resumed twice."""
    assert runs.run("--num_steps", "1", "--gradient_accumulation_steps", str(parts)) == 0
    for num_steps in ("2", "3"):
        state = torch.load("output/a_last.pt", weights_only=True)
        assert state["batch"].pop("masks_of_step") is (num_steps == "2" or parts == 1)
        torch.save(state, "output/a_last.pt")
        assert runs.run("--num_steps", num_steps, "--gradient_accumulation_steps", str(parts)) == 0


CPU = {"--device": "cpu", "processes": 1, "--gradient_accumulation_steps": 2, "--compile": False, "threads": 1}
CUDA = {**CPU, "--device": "cuda"}


@pytest.mark.parametrize(
    ("was", "now", "differ"),
    [
        (CPU, {**CPU, "--gradient_accumulation_steps": 4, "--compile": True}, False),
        (CPU, {**CPU, "processes": 2}, True),
        (CPU, CUDA, True),
        (CUDA, {**CUDA, "--gradient_accumulation_steps": 4}, True),
        (CUDA, {**CUDA, "--compile": True}, True),
        (CUDA, {**CUDA, "threads": 2}, False),
    ],
)
@pytest.mark.parametrize("rate", [0.1, 0.0])
def test_a_resumed_run_that_draws_other_masks_says_so(was, now, differ, rate, tmp_path, caplog):
    settings = {"--dropout": rate, "--num_steps": 4}
    run = Run(RunPaths(str(tmp_path), "a"), "none", Batch.from_flags(8, 2, 1))
    run._saved = {"settings": settings, "environment": was, "data": None}  # of a state that was read
    run.set_settings(settings, now, {})
    run.close()
    (message,) = caplog.messages
    assert ("dropout masks" in message) == (differ and rate > 0)
    assert message.endswith("last digits may differ from those of a run that was never stopped")
