"""The steps of a training: recomputed in float64 by another formulation, and skipped where float16 overflows."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import train
from models import npz
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.helpers import fake_npz, oracle, runs
from tests.helpers.steps import make_optimizer
from utils import augment, data_utils, datasets
from utils.precision import Precision
from utils.scheduler import make_schedule
from utils.weights import read_npz

BOTH = pytest.mark.parametrize("model_type", ["testing", "testing-hybrid"])
Batches = list[tuple[Tensor, Tensor]]


def recomputed(
    state: dict[str, Tensor],
    batches: Batches,
    rates: list[float],
    max_grad_norm: float = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> tuple[dict[str, Tensor], list[float]]:
    """Returns float32 weights after steps of clipped SGD, computed in float64; and the gradients' norms."""
    weights = {name: x.double() for name, x in state.items()}
    velocity = {name: torch.zeros_like(x) for name, x in weights.items()}
    norms = []
    for (x, labels), rate in zip(batches, rates, strict=True):
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        oracle.loss(leaves, x.double(), labels).backward()
        grads = {name: w.grad for name, w in leaves.items()}
        norms.append(sum((g**2).sum().item() for g in grads.values()) ** 0.5)
        for name, g in grads.items():
            g = g * min(1.0, max_grad_norm / norms[-1]) + weight_decay * weights[name]
            velocity[name] = momentum * velocity[name] + g
            weights[name] = weights[name] - rate * velocity[name]
    return weights, norms


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Every parameter within 2e-5, and within a hundredth of how far it moved or a few roundings of float32.

    Of the first bound, processors with AVX-512 use a half, those with AVX2 only 1.7e-5.
    """
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        error, moved = (got[name] - x).abs().max(), (x - before[name]).abs().max()
        assert error <= 2e-5, name
        if not name.endswith("key.bias"):  # whose gradient is zero but for rounding
            assert error <= max(1e-2 * moved, 5e-7 * x.abs().max()), name


@BOTH
@pytest.mark.parametrize(("max_grad_norm", "weight_decay"), [(1.0, 0.1), (1e3, 0.0)], ids=["clipped", "not clipped"])
def test_steps_are_those_of_an_independent_recomputation(model_type, max_grad_norm, weight_decay):
    config = replace(CONFIGS[model_type], dropout_rate=0.0)
    model = VisionTransformer(config, 32, 10)
    model.load_from(fake_npz.arrays(config, 32, 10))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.rand(6, 3, 32, 32, generator=generator) * 2 - 1, torch.randint(0, 10, (6,), generator=generator))
        for _ in range(3)
    ]
    rates = [0.03, 0.02, 0.03]

    precision = Precision(torch.device("cpu"))
    optimizer = make_optimizer(model, precision, weight_decay)
    for (x, labels), optimizer.param_groups[0]["lr"] in zip(batches, rates):
        precision.backward(model(x, labels))
        assert precision.step(optimizer, max_grad_norm)
    expected, norms = recomputed(before, batches, rates, max_grad_norm, weight_decay=weight_decay)
    assert (min(norms) > 1.5) if max_grad_norm == 1 else (max(norms) < max_grad_norm)
    assert_close(model.state_dict(), expected, before)
    for other in ({"momentum": 0.0}, {"weight_decay": 0.2}):  # would be seen
        different, _ = recomputed(before, batches, rates, max_grad_norm, **{"weight_decay": weight_decay, **other})
        assert max((expected[name] - x).abs().max() for name, x in different.items()) > 1e-3


@BOTH
def test_the_command_lines_steps_are_those_of_an_independent_recomputation(model_type, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, batch_size, seed = CONFIGS[model_type], 8, 5
    start = fake_npz.save("start.npz", fake_npz.arrays(config, img_size=32))
    args = ["--name", "a", "--dataset", "digits", "--model_type", model_type, "--img_size", "32", "--device", "cpu"]
    args += ["--pretrained_dir", start, "--seed", str(seed), "--train_batch_size", str(batch_size), "--dropout", "0"]
    args += ["--num_steps", "5", "--warmup_steps", "2", "--decay_type", "linear", "--learning_rate", "0.3"]
    assert train.main([*args, "--gradient_accumulation_steps", "2"]) == 0
    got = torch.load("output/a_checkpoint.bin", weights_only=True)  # the only evaluation was after the last step

    before = npz.to_state_dict(read_npz(start), config, img_size=32)
    before |= {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}
    images, transform = datasets.load_datasets("digits", "", 0).train, augment.TrainTransform(32)
    sampler = data_utils.StepSampler(len(images), batch_size, transform.num_draws, seed)
    batches = []
    for step in range(1, 6):
        indices, draws = sampler(step)
        batches.append((transform.batch(images.images[indices], draws), images.labels[indices]))
    expected, norms = recomputed(before, batches, rates=[0.15, 0.3, 0.2, 0.1, 0.0])
    assert max(norms) > 1.5
    assert_close(got, expected, before)


@pytest.mark.parametrize(("level", "num_micro_batches", "spoil"), [("O1", 1, "loss"), ("O2", 2, "gradients")])
def test_skipped_steps_do_not_advance_the_schedule_and_are_logged(
    level, num_micro_batches, spoil, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    skipped, passes = (3, 4, 8), itertools.count(1)
    forward, backward = VisionTransformer.forward, Precision.backward

    def overflowing():
        return next(passes) / num_micro_batches in skipped

    def new_forward(self, x, labels=None):
        out = forward(self, x, labels)
        return out * float("inf") if labels is not None and overflowing() else out

    if spoil == "loss":  # which is logged, too
        monkeypatch.setattr(VisionTransformer, "forward", new_forward)
    else:
        monkeypatch.setattr(Precision, "backward", lambda self, x: backward(self, x * 1e30 if overflowing() else x))
    flags = ["--fp16", "--fp16_opt_level", level, "--amp_dtype", "float16", "--num_steps", "10", "--warmup_steps", "4",
             "--log_every", "2", "--eval_every", "100",
             "--gradient_accumulation_steps", str(num_micro_batches)]  # fmt: skip
    assert train.main([*runs.RUN, *flags]) == 0
    words = [m.split() for m in caplog.messages if "was skipped: its scaled gradients overflowed" in m]
    assert tuple(int(w[1]) for w in words) == skipped
    lines = {line["step"]: line for line in runs.lines() if "train/lr" in line}
    lr_factor = make_schedule("cosine", 4, 10)
    for step, line in lines.items():
        num_before = sum(s < step for s in skipped)
        assert line["train/lr"] == pytest.approx(0.1 * lr_factor(step - num_before), rel=1e-6, abs=1e-12)
        assert ("train/loss" in line) == (step != 4)  # of steps 3 and 4
    assert list(lines) == [2, 4, 6, 8, 10]
    assert lines[10]["train/lr"] > 0  # three steps are still missing from the schedule
