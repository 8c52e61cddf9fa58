"""The memory that a training is reckoned to need, and the micro-batches that follow from it."""

from __future__ import annotations

import logging
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity

import train
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.helpers import runs
from tests.helpers.forked import run_forked
from tests.helpers.launching import ranks
from utils import checkpoint, memory, reckoning
from utils.batch import Batch
from utils.precision import Precision

CPU = torch.device("cpu")
#: 12 steps of 13 images, which no number of micro-batches divides.
RUN = [
    "--name", "a", *runs.TINY, "--pretrained_dir", "", "--train_batch_size", "13", "--num_steps", "12",
    "--warmup_steps", "3", "--log_every", "1", "--eval_every", "6", "--learning_rate", "0.1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def need_of(model_type: str, img_size: int, level: str, num_ranks: int = 1, **changes: int) -> reckoning.Need:
    config = replace(CONFIGS[model_type], **changes)

    def build(num_blocks: int) -> VisionTransformer:
        with torch.device("meta"):
            return VisionTransformer(replace(config, num_layers=num_blocks), img_size, 10)

    return reckoning.reckon(build, config.num_layers, Precision(CPU, level), img_size, num_ranks)


def bytes_of_passes(
    model_type: str, img_size: int, level: str, training: bool = True, **changes: int
) -> tuple[float, float]:
    """Returns what each image adds to the peak that torch's profiler sees in the whole model's passes; the rest."""
    model = VisionTransformer(replace(CONFIGS[model_type], **changes), img_size, 10).train(training)
    precision = Precision(CPU, level)
    precision.prepare(model)
    peaks = []
    for num_images in (32, 64):
        images, labels = torch.zeros(num_images, 3, img_size, img_size), torch.zeros(num_images, dtype=torch.long)
        with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
            with torch.inference_mode(not training), precision.autocast():
                loss = model(images, labels)
            if training:
                loss.backward()
        model.zero_grad()
        events = profile.profiler.kineto_results.events()
        now = peak = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        peaks.append(peak + images.nbytes)
    image = (peaks[1] - peaks[0]) / 32
    return image, peaks[0] - 32 * image


@pytest.mark.parametrize(
    ("model_type", "img_size", "level"),
    [("testing", 64, "O0"), ("testing", 64, "O2"), ("testing-hybrid", 32, "O0"), ("ViT-demo", 32, "O1")],
)
def test_the_reckoned_bytes_of_passes_are_those_that_the_whole_model_takes(model_type, img_size, level):
    """Also of models with more blocks than were looked at."""
    changes = {
        "num_layers": 6,
        "dropout_rate": 0,
    }  # the random numbers of dropout are numpy's, which torch does not see
    image, rest = bytes_of_passes(model_type, img_size, level, **changes)
    need = need_of(model_type, img_size, level, **changes)
    assert need.image == pytest.approx(image, rel=0.15)
    assert need.copies <= 1.15 * rest  # which has the first gradients, too: these are counted apart
    if level == "O1":
        assert need.copies > 0.8 * need.gradients / 2  # weights that autocast has cast


@pytest.mark.parametrize("model_type", ["testing", "ViT-demo"])
def test_gradients_are_not_counted_twice_however_many_blocks_there_are(model_type):
    need = need_of(model_type, 32, "O0", num_layers=24, dropout_rate=0)
    assert need.copies < 0.01 * need.gradients


@pytest.mark.parametrize(
    ("model_type", "img_size", "level"), [("ViT-demo", 32, "O0"), ("ViT-demo", 32, "O1"), ("testing-hybrid", 32, "O2")]
)
def test_an_evaluation_takes_as_many_images_as_fit(model_type, img_size, level):
    with torch.device("meta"):
        few_blocks = VisionTransformer(replace(CONFIGS[model_type], num_layers=2), img_size, 10)

    def taken(free: float) -> int:
        image = reckoning.evaluated_image(few_blocks, Precision(CPU, level), img_size, img_size**2)
        return reckoning.evaluated_at_once(image, int(free))

    image, _ = bytes_of_passes(model_type, img_size, level, training=False)
    copies = 3 * 4 * 3 * img_size**2  # the images before the pass
    for number in (1, 2, 64, 256):
        assert taken(0.85 * number * (image + copies)) < max(number, 2)
        assert taken(1.15 * number * (image + copies)) == number
        assert taken(1.6 * number * (image + copies)) == number  # powers of two
    assert taken(1e12) == 512
    assert taken(-1) == 1  # what does not fit at all is tried


def test_images_that_are_larger_than_the_model_sees_are_counted():
    with torch.device("meta"):
        few_blocks = VisionTransformer(CONFIGS["testing"], 32, 10)
    small, large = (reckoning.evaluated_image(few_blocks, Precision(CPU), 32, n) for n in (32**2, 500**2))
    assert small < 3 * 12 * 500**2 <= large


def test_a_resumed_run_evaluates_no_more_images_at_once_than_before_and_too_little_memory_is_a_warning():
    assert reckoning.evaluated_at_once(10, 1000, most=48) == 48
    assert reckoning.evaluated_at_once(10, 470, most=48) == 32
    level, text = reckoning.explain_evaluation(10, 1000, 48)
    assert (level, text[-20:]) == (logging.INFO, "--eval_batch_size 48")
    assert reckoning.explain_evaluation(10, -1, 1)[0] == logging.WARNING


def test_masters_momentum_gradients_and_the_buckets_of_several_ranks_are_counted():
    model = VisionTransformer(CONFIGS["testing"], 32, 10)
    weights = 4 * sum(p.numel() for p in model.parameters())
    alone = need_of("testing", 32, "O0")
    assert (alone.held, alone.gradients, alone.buckets) == (2 * weights, weights, 0)
    assert need_of("testing", 32, "O0", num_ranks=2).buckets == weights
    half = need_of("testing", 32, "O2")
    assert 2.3 * weights < half.held < 2.5 * weights  # half a copy of most, a master and momentum
    assert half.gradients == weights


def test_the_fewest_micro_batches_that_fit_are_taken():
    need = reckoning.Need(held=100, gradients=50, buckets=0, image=10)
    assert need.fewest_micro_batches(13, 230) == 1
    assert need.fewest_micro_batches(13, 229) == 2  # with the gradients of the one before
    assert need.fewest_micro_batches(13, 219) == 3
    assert need.fewest_micro_batches(13, 160) == 13
    assert need.fewest_micro_batches(13, 0) == 13  # what does not fit at all is tried image by image
    assert replace(need, copies=1).fewest_micro_batches(13, 230) == 2


def losses(name: str) -> list[float]:
    return [line["train/loss"] for line in runs.lines(name) if "train/loss" in line]


def room_for(num_images: int, monkeypatch: pytest.MonkeyPatch, resumes: bool = False, **changes: int) -> None:
    """Leaves memory for so many images of ``RUN`` at a time; a state to resume from is in memory already."""
    need, held = need_of("testing", 32, "O0", **changes), 0
    if resumes:
        state = runs.last_state("a")
        held = sum(x.nbytes for x in checkpoint.tensors_in([state.model, state.optimizer]))
    monkeypatch.setattr(memory, "free_bytes", lambda device: need.bytes(num_images, 2) - held)


def test_unequal_micro_batches_train_as_the_whole_batch_does(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    flags = [*RUN, "--dropout", "0"]
    assert train.main(flags) == 0
    assert "--gradient_accumulation_steps 1" in caplog.text
    room_for(5, monkeypatch, dropout_rate=0)
    assert train.main([*flags, "--name", "b"]) == 0
    assert "5 at a time need" in caplog.text
    assert "--gradient_accumulation_steps 3" in caplog.text
    assert losses("b") == pytest.approx(losses("a"), abs=1e-5)
    assert runs.last_state("b").environment["--gradient_accumulation_steps"] == 3


def test_reckoning_changes_no_bit_of_a_training():
    flags = [*RUN, "--num_steps", "2", "--dropout", "0.3"]
    assert train.main(flags) == train.main([*flags, "--name", "b", "--gradient_accumulation_steps", "1"]) == 0
    assert losses("a") == losses("b")
    other = runs.last_state("b").model
    assert all(torch.equal(x, other[name]) for name, x in runs.last_state("a").model.items())


def test_a_number_that_is_given_stays(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    room_for(1, monkeypatch)
    assert train.main([*RUN, "--gradient_accumulation_steps", "1", "--num_steps", "2"]) == 0
    assert runs.last_state("a").environment["--gradient_accumulation_steps"] == 1
    assert "at once needs" not in caplog.text


def test_a_resumed_run_keeps_its_own_or_takes_more_with_a_warning(monkeypatch, caplog):
    room_for(5, monkeypatch)
    assert train.main([*RUN, "--num_steps", "2"]) == 0
    room_for(5, monkeypatch, resumes=True)
    caplog.clear()
    assert train.main([*RUN, "--num_steps", "3"]) == 0
    assert runs.last_state("a").environment["--gradient_accumulation_steps"] == 3
    assert "gradient_accumulation_steps" not in "".join(x.message for x in caplog.records if x.levelno > logging.INFO)
    room_for(2, monkeypatch, resumes=True)
    assert train.main([*RUN, "--num_steps", "4"]) == 0
    assert runs.last_state("a").environment["--gradient_accumulation_steps"] == 7
    warnings = "".join(x.message for x in caplog.records if x.levelno == logging.WARNING)
    assert "it was 3 when the run was saved" in warnings
    assert "--gradient_accumulation_steps was 3, is 7" in warnings


def train_with(given: tuple[list[str], int]) -> int:
    """Trains with these flags and so many bytes of free memory."""
    flags, free = given
    memory.free_bytes = lambda device: free  # type: ignore[assignment]
    return train.main(flags)


def test_the_rank_with_the_least_memory_decides_for_all(tmp_path):
    need = need_of("testing", 32, "O0", num_ranks=2, dropout_rate=0)
    flags = [*RUN, "--num_steps", "2", "--dropout", "0"]
    assert train.main([*RUN, "--name", "b", "--train_batch_size", "26", "--num_steps", "2", "--dropout", "0"]) == 0
    with ranks(tmp_path, [(flags, 2**40), (flags, need.bytes(5, 3))], train_with) as run:
        assert run.results() == [0, 0], run.output()
        assert "--gradient_accumulation_steps 3" in run.output()
    assert runs.last_state("a").environment["--gradient_accumulation_steps"] == 3
    assert losses("a") == pytest.approx(losses("b"), abs=1e-5)


@pytest.mark.parametrize(("flags", "expected"), [([], 64), (["--eval_batch_size", "90"], 90)])
def test_evaluations_on_a_cpu_take_64_images_unless_a_number_is_given(flags, expected):
    assert train.main([*RUN, "--num_steps", "1", *flags]) == 0
    assert runs.last_state("a").environment["--eval_batch_size"] == expected


def test_a_device_that_does_not_tell_takes_the_whole_batch(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert train.main([*RUN, "--num_steps", "1"]) == 0
    assert "does not tell how much memory is free: --gradient_accumulation_steps 1" in caplog.text


def test_a_batch_that_a_limit_of_addresses_does_not_let_through_is_divided():
    """For real: half a GiB more is enough for this model, and not for its batch at once."""

    def little_memory() -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**29
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    large = ["train.py", *RUN, "--train_batch_size", "509", "--img_size", "192", "--num_steps", "1", "--eval_every"]
    code, _, err = run_forked([*large, "1"], prepare=little_memory, timeout=120)
    assert code == 0, err
    assert int(err.split("--gradient_accumulation_steps ")[1].split()[0]) > 1, err
    code, _, err = run_forked([*large, "1", "--name", "b", "--gradient_accumulation_steps", "1"], prepare=little_memory)
    assert code == 1, err
    assert "out of memory" in err


# ---- divisions ----


@pytest.mark.parametrize(
    ("per_rank", "parts", "sizes"), [(512, 2, [256] * 2), (509, 3, [170, 170, 169]), (3, 3, [1] * 3)]
)
def test_micro_batches_differ_by_one_image_at_most(per_rank, parts, sizes):
    batch = Batch.from_flags(per_rank, "auto", 1).at_least(parts)
    assert (batch.sizes, batch.micro_batch) == (sizes, sizes[0])


@pytest.mark.parametrize(
    ("ranks", "was_ranks", "was_parts", "expected"),
    [(1, 1, 3, 3), (1, 2, 3, 6), (2, 1, 3, 2), (4, 1, 3, 1), (1, 2, 1, 2)],
)
def test_micro_batches_do_not_grow_with_other_ranks(ranks, was_ranks, was_parts, expected):
    given = 24
    batch = Batch.from_flags(given, "auto", ranks)
    resumed = batch.resumed({"total": given * was_ranks, "given": given}, was_ranks, was_parts)
    assert (resumed.total, resumed.num_micro_batches) == (given * was_ranks, expected)
    assert resumed.micro_batch <= -(-given // was_parts)


def test_a_state_without_its_batch_leaves_no_micro_batch_empty():
    batch = Batch.from_flags(2, "auto", 1).resumed({"total": 0, "given": 0}, 2, 4)
    assert all(batch.sizes)
    assert sum(batch.sizes) == 2
