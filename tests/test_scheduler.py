"""Learning-rate schedules against the reference's LambdaLR functions, written out here."""

import math

import pytest

from utils.scheduler import DECAY_TYPES, make_schedule


def reference(decay_type, warmup_steps, num_steps):
    """utils/scheduler.py of github.com/jeonsworld/ViT-pytorch: WarmupCosineSchedule and WarmupLinearSchedule."""

    def cosine(step):
        if step < warmup_steps:
            return float(step) / float(max(1.0, warmup_steps))
        progress = float(step - warmup_steps) / float(max(1, num_steps - warmup_steps))
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * progress)))

    def linear(step):
        if step < warmup_steps:
            return float(step) / float(max(1, warmup_steps))
        return max(0.0, float(num_steps - step) / float(max(1.0, num_steps - warmup_steps)))

    return {"cosine": cosine, "linear": linear}[decay_type]


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
@pytest.mark.parametrize(
    ("warmup_steps", "num_steps"),
    [(0, 1), (0, 10), (1, 10), (3, 10), (9, 10), (10, 10), (11, 10), (500, 10), (500, 10_000)],
)
def test_every_update_uses_the_references_factor(decay_type, warmup_steps, num_steps):
    schedule, expected = (make(decay_type, warmup_steps, num_steps) for make in (make_schedule, reference))
    steps = range(1, num_steps + 1)
    assert [schedule(k) for k in steps] == pytest.approx([expected(k) for k in steps], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 60, 99])
def test_it_rises_to_one_and_falls_to_zero_at_the_last_update(decay_type, warmup_steps):
    factors = [make_schedule(decay_type, warmup_steps, 100)(k) for k in range(101)]
    assert factors[warmup_steps] == 1
    assert factors[-1] == pytest.approx(0, abs=1e-15)
    assert factors[: warmup_steps + 1] == sorted(factors[: warmup_steps + 1])
    assert factors[warmup_steps:] == sorted(factors[warmup_steps:], reverse=True)


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
def test_halfway_down_it_is_one_half(decay_type):
    assert make_schedule(decay_type, 10, 110)(60) == pytest.approx(0.5)


def test_the_decays_differ_at_a_quarter():
    assert make_schedule("cosine", 0, 100)(25) == pytest.approx(0.5 * (1 + 0.5**0.5))
    assert make_schedule("linear", 0, 100)(25) == pytest.approx(0.75)


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
def test_a_warmup_longer_than_the_run_only_rises(decay_type):
    schedule = make_schedule(decay_type, 40, 10)
    assert [schedule(k) for k in (1, 4, 10)] == pytest.approx([1 / 40, 4 / 40, 10 / 40])


@pytest.mark.parametrize("decay_type", DECAY_TYPES)
def test_without_a_warmup_no_update_is_wasted(decay_type):
    assert make_schedule(decay_type, 0, 1000)(1) == pytest.approx(1, abs=2e-3)


def test_an_unknown_decay_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'exponential'.*cosine, linear"):
        make_schedule("exponential", 1, 10)
