"""Mixed precision by an apex that has amp, of which a stand-in is driven as the real one would be."""

import logging
import sys
from types import ModuleType

import pytest
import torch

import train
from tests.helpers import runs
from tests.helpers.fake_apex import FakeAmp
from tests.helpers.steps import flat, make_batch, make_model, make_optimizer, moved, params_of, take_step, until_applied
from utils import apex
from utils.apex import ApexPrecision, import_apex_amp, make_precision
from utils.errors import UserError
from utils.precision import Precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LEVELS = ("O1", "O2", "O3")


def start(opt_level, learning_rate=10.0, loss_scale=0.0):
    amp, model = FakeAmp(), make_model()
    precision = ApexPrecision(amp, CPU, opt_level, loss_scale)
    optimizer = make_optimizer(model, precision)
    optimizer.param_groups[0]["lr"] = learning_rate
    return amp, model, precision, optimizer


def scale_of(amp):
    return next(iter(amp.state_dict().values()))["loss_scale"]


def float32_change():
    """By how much a float32 step at a rate of 10 changes each weight."""
    model, precision = make_model(), Precision(CPU)
    optimizer = make_optimizer(model, precision)
    optimizer.param_groups[0]["lr"] = 10.0
    take_step(model, precision, optimizer)
    return moved(model, precision)


@pytest.mark.parametrize("loss_scale", [0.0, 128.0])
@pytest.mark.parametrize("opt_level", LEVELS)
def test_apex_is_initialized_once_with_the_level_and_the_scale(opt_level, loss_scale):
    amp, model, precision, optimizer = start(opt_level, loss_scale=loss_scale)
    assert amp.initialized == [(model, optimizer, opt_level, loss_scale or None)]
    assert scale_of(amp) == (loss_scale or (1.0 if opt_level == "O3" else 2.0**20))
    assert not precision.scaler.is_enabled()
    assert str(precision) == f"float16 {opt_level} by apex"


@pytest.mark.parametrize("opt_level", LEVELS)
def test_a_step_by_apex_is_that_of_float32_to_float16s_digits(opt_level):
    amp, model, precision, optimizer = start(opt_level)
    until_applied(model, precision, optimizer)
    expected = float32_change()
    assert (moved(model, precision) - expected).norm() < 0.02 * expected.norm()
    assert amp.norms == [pytest.approx(1.0, rel=2e-3)]  # the optimizer saw unscaled, then clipped gradients


def test_apex_scales_the_loss_of_every_micro_batch_and_clips_their_sum():
    amp, model, precision, optimizer = start("O2", loss_scale=64.0)
    images, labels = make_batch()
    for i in range(2):
        precision.backward(model(images[i::2], labels[i::2]) / 2)
    assert bool(precision.step(optimizer, 1.0))
    assert amp.scaled == [(optimizer, 64.0)] * 2
    assert len(amp.norms) == 1
    expected = float32_change()
    assert (moved(model, precision) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("overflow_in", [0, 1])
@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_an_overflow_under_apex_skips_the_whole_step_and_a_resumed_run_knows_it(opt_level, overflow_in):
    amp, model, precision, optimizer = start(opt_level, learning_rate=0.1)
    until_applied(model, precision, optimizer)
    skipped, scale = precision.collect_skipped(), scale_of(amp)
    before = moved(model, precision)
    images, labels = make_batch()
    for i in range(2):
        loss = model(images[i::2], labels[i::2]) / 2
        precision.backward(loss * 1e30 if i == overflow_in else loss)
    assert bool(precision.step(optimizer, 1.0)) is False
    assert precision.collect_skipped() == skipped + 1
    assert torch.equal(moved(model, precision), before)
    assert scale_of(amp) == scale / 2
    resumed_amp, _, resumed, _ = start(opt_level)
    resumed.load_state_dict(precision.state_dict(), step=3)
    assert scale_of(resumed_amp) == scale / 2
    assert resumed.collect_skipped() == skipped + 1
    assert take_step(model, precision, optimizer)[0] is True
    assert precision.collect_skipped() == skipped + 1
    assert not torch.equal(moved(model, precision), before)


def test_float32_weights_under_apex_have_the_masters_digits():
    _, model, precision, optimizer = start("O2", learning_rate=1e-4)
    until_applied(model, precision, optimizer)
    state = precision.float32_weights(model)
    assert list(state) == list(make_model().state_dict())
    for (name, p), master in zip(model.named_parameters(), params_of(optimizer)):
        assert p.dtype == torch.float16
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], master)
        assert not state[name].requires_grad
    assert not torch.equal(flat(state), flat(dict(model.named_parameters())))


@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_an_evaluation_under_apex_needs_no_optimizer(opt_level):
    amp, model = FakeAmp(), make_model().eval()
    images, _ = make_batch()
    with torch.no_grad():
        expected = model(images)[0]
    precision = ApexPrecision(amp, CPU, opt_level)
    precision.prepare(model)
    precision.attach(model, None)
    assert amp.initialized == [(model, None, opt_level, None)]
    with torch.no_grad(), precision.autocast():
        got = model(images)[0]
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.02 * expected.abs().max().item())
    assert not torch.equal(got, expected)
    assert {x.dtype for x in precision.float32_weights(model).values()} == {torch.float32}


def test_the_loop_trains_and_evaluates_by_apex(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    amps = []
    monkeypatch.setattr(apex, "import_apex_amp", lambda device: amps.append(FakeAmp()) or amps[-1])
    flags = ["--fp16", "--amp_backend", "apex"]
    args = [*runs.RUN, "--dropout", "0", "--log_every", "1", "--max_grad_norm", "0.5"]
    assert train.main([*args, *flags]) == 0
    assert len(amps[0].scaled) == 26  # 13 steps of two micro-batches
    skipped = sum("was skipped" in m for m in caplog.messages)
    assert 0 < skipped == 13 - len(amps[0].norms)
    assert max(amps[0].norms) < 0.51
    state = torch.load("output/a_checkpoint.bin", weights_only=True)
    assert {x.dtype for x in state.values()} == {torch.float32}
    accuracies = [m for m in caplog.messages if "Valid Accuracy" in m]
    caplog.clear()
    assert train.main(["--name", "a", *runs.TINY, *flags, "-v"]) == 0
    assert amps[1].initialized[0][1] is None
    assert next(m for m in caplog.messages if "Valid Accuracy" in m) in accuracies


def test_float32_needs_no_apex():
    assert type(make_precision(CPU, "O0", "auto", 0, "apex")) is Precision


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_apex_needs_a_cuda_gpu(kind, monkeypatch):
    package = ModuleType("apex")
    package.amp = ModuleType("apex.amp")
    monkeypatch.setitem(sys.modules, "apex", package)
    assert import_apex_amp(CUDA) is package.amp
    with pytest.raises(UserError, match=f"needs a CUDA GPU, not {kind}; use --amp_backend native"):
        import_apex_amp(torch.device(kind))


@pytest.mark.parametrize("package", [None, ModuleType("apex")], ids=["no apex", "one without amp"])
def test_an_apex_without_amp_is_refused_with_the_remedy(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.delitem(sys.modules, "apex.amp", raising=False)
    with pytest.raises(UserError, match=r"no NVIDIA apex with amp .*removed amp in 25\.07.*--amp_backend native"):
        import_apex_amp(CUDA)
