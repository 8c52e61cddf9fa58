"""--gradient_checkpointing: less is kept for the backward pass, and every bit is the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import train
from models.configs import CONFIGS
from models.modeling import Block, VisionTransformer
from models.modeling_resnet import ResidualUnit, Root
from models.recompute import Recomputed
from tests.helpers import runs
from tests.helpers.launching import TINY, ranks, train_main, values_of
from utils.precision import Precision

PLAIN = replace(CONFIGS["testing"], attention_dropout_rate=0.2)
HYBRID = replace(CONFIGS["testing-hybrid"], attention_dropout_rate=0.2)
BOTH = pytest.mark.parametrize("config", [PLAIN, HYBRID], ids=["plain", "hybrid"])
RUN = [*runs.RUN, "--num_steps", "4", "--warmup_steps", "1", "--log_every", "1", "--eval_every", "2"]


def build(config, recomputed: bool) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(config, 40, 10)
    torch.nn.init.normal_(model.head.weight)
    if recomputed:
        model.gradient_checkpointing_enable()
    return model


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(12, 3, 40, 40, generator=generator), torch.randint(10, (12,), generator=generator)


def trained(model: VisionTransformer, level: str, sizes: list[int]) -> list[Tensor]:
    """The losses of four steps, and all weights after them."""
    precision, (x, labels) = Precision(torch.device("cpu"), level), images()
    optimizer = torch.optim.SGD(precision.prepare(model), lr=0.03, momentum=0.9, fused=True)
    precision.attach(model, optimizer)
    losses = []
    for step in range(4):
        torch.manual_seed(step)
        micro_batches = zip(x.split(sizes), labels.split(sizes))
        losses.append(train.forward_backward(model, micro_batches, precision, sizes))
        precision.step(optimizer, 1.0)
    return [*losses, *precision.float32_weights(model).values()]


@BOTH
@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
@pytest.mark.parametrize("sizes", [[12], [5, 7]], ids=["one part", "two parts"])
def test_losses_and_weights_have_the_same_bits(config, level, sizes):
    one, other = (trained(build(config, recomputed), level, sizes) for recomputed in (False, True))
    assert len(one) == len(other) > 4
    assert all(torch.equal(a, b) for a, b in zip(one, other))


@BOTH
def test_blocks_and_units_are_computed_twice_in_training_and_once_elsewhere(config):
    model, (x, labels) = build(config, True), images()
    parts = [module for module in model.modules() if isinstance(module, Block | ResidualUnit | Root)]
    counts = dict.fromkeys(parts, 0)

    def count(module, _):
        counts[module] += 1

    for part in parts:
        part.register_forward_pre_hook(count)
    model.train()(x, labels).backward()
    assert set(counts.values()) == {2}
    model.eval()(x, labels).backward()
    with torch.no_grad():
        model.train()(x, labels)
    assert set(counts.values()) == {4}


@BOTH
def test_little_is_kept_for_the_backward_pass(config):
    """Counted is what lies outside of the recomputed parts, which keep their input alone."""
    kept = []
    for recomputed in (False, True):
        model, found = build(config, recomputed).train(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, found=found: found.append(x) or x, lambda x: x):
            model(*images())
        kept.append(len(found))
    assert kept[1] < kept[0] / 3


def test_a_model_recomputes_nothing_unless_it_is_told_to():
    for recomputed in (False, True):
        found = [m.gradient_checkpointing for m in build(HYBRID, recomputed).modules() if isinstance(m, Recomputed)]
        assert found == [recomputed] * 2


# ---- the command ----


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def outcome_of(name: str, *flags: str) -> dict:
    assert train.main([*RUN, "--name", name, "--dropout", "0.3", *flags]) == 0
    return {key: x for key, x in runs.outcome(name).items() if key in ("lines", "best", "model", "optimizer")}


@pytest.mark.parametrize("model_type", ["testing", "testing-hybrid"])
def test_a_training_has_the_same_bits(model_type, folder, monkeypatch):
    plain, calls, compute = outcome_of("plain", "--model_type", model_type), [], Recomputed.compute
    monkeypatch.setattr(
        Recomputed, "compute", lambda self, *args: calls.append(self.gradient_checkpointing) or compute(self, *args)
    )
    assert outcome_of("less", "--model_type", model_type, "--gradient_checkpointing") == plain
    assert set(calls) == {True}


def test_a_run_may_resume_with_it_and_without(folder, caplog):
    whole = outcome_of("whole")
    for first, then in (([], ["--gradient_checkpointing"]), (["--gradient_checkpointing"], [])):
        assert outcome_of("parts", "--resume", "none", *first) == whole
        caplog.clear()
        assert train.main([*RUN, "--name", "parts", "--dropout", "0.3", *then]) == 0
        assert "gradient_checkpointing" not in caplog.text


def test_ranks_have_the_same_losses(tmp_path):
    found = []
    for name, more in (("plain", []), ("less", ["--gradient_checkpointing"])):
        flags = [*TINY, "--name", name, "--dropout", "0.3", "--num_steps", "4", "--warmup_steps", "1", "--eval_every",
                 "4", "--train_batch_size", "8", "--gradient_accumulation_steps", "2", *more]  # fmt: skip
        with ranks(tmp_path, [flags] * 2, train_main) as run:
            assert run.results() == [0, 0], run.output()
        found.append(values_of(tmp_path, name, "train/loss"))
    assert len(found[0]) == 4
    assert found[0] == found[1]


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_a_compiled_model_takes_the_same_steps(rate):
    """As torch.compile traces it, run without generating code."""
    config = replace(PLAIN, dropout_rate=rate, attention_dropout_rate=0.0)
    expected = trained(build(config, False), "O0", [6, 6])
    torch._dynamo.reset()
    model = build(config, True)
    model.compile(backend="aot_eager")
    found = trained(model, "O0", [6, 6])
    torch._dynamo.reset()
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
