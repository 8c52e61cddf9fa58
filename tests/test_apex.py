"""Mixed precision by an apex that has amp, of which a stand-in is driven as the real one would be."""

import logging
import sys
from types import ModuleType

import pytest
import torch

import train
from tests.helpers import launching, runs
from tests.helpers.boundaries import killed_at
from tests.helpers.fake_apex import FakeAmp
from tests.helpers.steps import flat, make_batch, make_model, make_optimizer, moved, params_of, take_step, until_applied
from utils import apex, checkpoint, dist_util
from utils.apex import ApexPrecision, import_apex_amp, make_precision
from utils.errors import UserError
from utils.precision import Precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LEVELS = ("O1", "O2", "O3")
FLAGS = ("--fp16", "--amp_backend", "apex", "--dropout", "0", "--fp16_opt_level")


@pytest.fixture
def amp(monkeypatch):
    """The stand-in in place of an installed apex."""
    amp = FakeAmp()
    monkeypatch.setitem(sys.modules, "apex.amp", amp)
    monkeypatch.setattr(apex, "import_apex_amp", lambda device: amp)
    monkeypatch.setattr(torch.nn.modules.rnn, "_VF", torch.nn.modules.rnn._VF)
    yield amp
    apex.undo_patches()


def start(amp, opt_level, learning_rate=10.0, loss_scale=0.0, model=None):
    apex.undo_patches()
    model = model or make_model()
    precision = ApexPrecision(amp, CPU, opt_level, loss_scale)
    optimizer = make_optimizer(model, precision)
    optimizer.param_groups[0]["lr"] = learning_rate
    return model, precision, optimizer


def scale_of(amp):
    return next(iter(amp.state_dict().values()))["loss_scale"]


def float32_change():
    """By how much a float32 step at a rate of 10 changes each weight."""
    model, precision = make_model(), Precision(CPU)
    optimizer = make_optimizer(model, precision)
    optimizer.param_groups[0]["lr"] = 10.0
    take_step(model, precision, optimizer)
    return moved(model, precision)


def accumulate(model, precision, factors=(1.0, 1.0)):
    """Computes the gradients of a batch in two micro-batches, each loss times a factor."""
    images, labels = make_batch()
    for i, factor in enumerate(factors):
        with precision.autocast():
            loss = model(images[i::2], labels[i::2]) / 2
        precision.backward(loss * factor)


# ---- a step ----


@pytest.mark.parametrize("loss_scale", [0.0, 128.0])
@pytest.mark.parametrize("opt_level", LEVELS)
def test_apex_has_the_level_and_the_scale(amp, opt_level, loss_scale):
    model, precision, optimizer = start(amp, opt_level, loss_scale=loss_scale)
    weight, master = model.head.weight, params_of(optimizer)[-2]
    assert weight.dtype == (torch.float32 if opt_level == "O1" else torch.float16)
    assert master.dtype == (torch.float16 if opt_level == "O3" else torch.float32)
    assert master.shape == weight.shape
    assert scale_of(amp) == (loss_scale or (1.0 if opt_level == "O3" else 2.0**20))
    assert not precision.scaler.is_enabled()
    assert str(precision) == f"float16 {opt_level} by apex"


@pytest.mark.parametrize("opt_level", LEVELS)
def test_a_step_by_apex_is_that_of_float32_to_float16s_digits(amp, opt_level):
    model, precision, optimizer = start(amp, opt_level)
    until_applied(model, precision, optimizer)
    expected = float32_change()
    assert (moved(model, precision) - expected).norm() < 0.02 * expected.norm()
    # At a rate of 10, by gradients that were unscaled, then clipped to a norm of 1.
    assert moved(model, precision).norm().item() == pytest.approx(10, rel=5e-3)


@pytest.mark.parametrize("loss_scale", [1.0, 64.0])
@pytest.mark.parametrize("opt_level", LEVELS)
def test_apex_scales_the_loss_of_every_micro_batch_and_clips_their_sum(amp, opt_level, loss_scale):
    model, precision, optimizer = start(amp, opt_level, loss_scale=loss_scale)
    accumulate(model, precision)
    assert bool(precision.step(optimizer, 1.0))
    expected = float32_change()
    assert (moved(model, precision) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("overflow_in", [0, 1])
@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_an_overflow_under_apex_skips_the_whole_step_and_a_resumed_run_knows_it(amp, opt_level, overflow_in):
    model, precision, optimizer = start(amp, opt_level, learning_rate=0.1)
    until_applied(model, precision, optimizer)
    skipped, scale = precision.collect_skipped(), scale_of(amp)
    before = moved(model, precision)
    accumulate(model, precision, factors=[1e30 if i == overflow_in else 1.0 for i in range(2)])
    assert bool(precision.step(optimizer, 1.0)) is False
    assert precision.collect_skipped() == skipped + 1
    assert torch.equal(moved(model, precision), before)
    assert scale_of(amp) == scale / 2
    state = precision.state_dict()
    assert take_step(model, precision, optimizer)[0] is True
    assert precision.collect_skipped() == skipped + 1
    assert not torch.equal(moved(model, precision), before)
    _, resumed, _ = start(amp, opt_level)
    assert scale_of(amp) != scale / 2
    resumed.load_state_dict(state, step=3)
    assert scale_of(amp) == scale / 2
    assert resumed.collect_skipped() == skipped + 1


# ---- weights ----


def test_the_masters_have_the_weights_of_before_the_casts(amp):
    weights = flat(dict(make_model().named_parameters()))
    model, precision, optimizer = start(amp, "O2")
    assert torch.equal(flat(precision.float32_weights(model)), weights)
    assert torch.equal(torch.cat([p.flatten() for p in params_of(optimizer)]), weights)
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], torch.zeros_like(p)) for p in params_of(optimizer))
    assert not torch.equal(flat(dict(model.named_parameters())), weights)


def test_float32_weights_under_apex_have_the_masters_digits(amp):
    model, precision, optimizer = start(amp, "O2", learning_rate=1e-4)
    until_applied(model, precision, optimizer)
    state = precision.float32_weights(model)
    assert list(state) == list(make_model().state_dict())
    for (name, p), master in zip(model.named_parameters(), params_of(optimizer)):
        assert p.dtype == torch.float16
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], master)
        assert not state[name].requires_grad
    assert not torch.equal(flat(state), flat(dict(model.named_parameters())))


@pytest.mark.parametrize("opt_level", LEVELS)
def test_an_evaluation_under_apex_needs_no_optimizer(amp, opt_level):
    model = make_model().eval()
    images, _ = make_batch()
    with torch.no_grad():
        expected = model(images)[0]
    precision = ApexPrecision(amp, CPU, opt_level)
    precision.prepare(model)
    precision.attach(model, None)
    for _ in range(2):
        with torch.inference_mode(), precision.autocast():
            got = model(images)[0]
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.02 * expected.abs().max().item())
    assert not torch.equal(got, expected)
    assert {x.dtype for x in precision.float32_weights(model).values()} == {torch.float32}


# ---- the functions that O1 patches ----


def test_apex_casts_in_the_passes_of_the_model_and_nowhere_else(amp):
    x = torch.rand(3, 3)
    model, precision, optimizer = start(amp, "O1")
    assert (x @ x).dtype == torch.float32
    with precision.autocast():
        assert (x @ x).dtype == torch.float16
    for _ in range(2):  # one is skipped, one is not
        until_applied(model, precision, optimizer)
        assert (x @ x).dtype == torch.float32
    with pytest.raises(KeyError), precision.autocast():
        raise KeyError
    assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("opt_level", LEVELS)
def test_checkpointed_blocks_have_the_same_gradients_under_apex(amp, opt_level):
    changes = []
    for checkpointed in (False, True):
        model, precision, optimizer = start(amp, opt_level)
        if checkpointed:
            model.gradient_checkpointing_enable()
        until_applied(model.train(), precision, optimizer)
        changes.append(moved(model, precision))
    assert torch.equal(*changes)


# ---- whole trainings ----


@pytest.mark.parametrize("opt_level", LEVELS)
def test_the_loop_trains_and_evaluates_by_apex(amp, opt_level, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    crops, make_batches = {"O0": [], opt_level: []}, train.make_batches

    def watched(args, *more):
        for images, labels in make_batches(args, *more):
            crops[args.fp16_opt_level].append(images.clone())
            yield images, labels

    monkeypatch.setattr(train, "make_batches", watched)
    assert train.main([*runs.RUN, *FLAGS, "O0", "--name", "b", "--num_steps", "3"]) == 0
    before = [torch.Tensor.__matmul__, torch.matmul, torch.cat, torch.nn.functional.linear, torch.nn.modules.rnn._VF]
    assert train.main([*runs.RUN, *FLAGS, opt_level, "--log_every", "1"]) == 0
    assert all(torch.equal(x, expected) for x, expected in zip(crops[opt_level], crops["O0"]))
    state = torch.load("output/a_checkpoint.bin", weights_only=True)
    assert {x.dtype for x in state.values()} == {torch.float32}
    skipped = sum("was skipped" in m for m in caplog.messages)
    assert (skipped > 0) == (opt_level != "O3")
    assert runs.last_state().precision["skipped"] == skipped
    accuracies = [m for m in caplog.messages if "Valid Accuracy" in m]
    caplog.clear()
    assert train.main(["--name", "a", *runs.TINY, *FLAGS, opt_level, "-v"]) == 0
    assert next(m for m in caplog.messages if "Valid Accuracy" in m) in accuracies
    after = [torch.Tensor.__matmul__, torch.matmul, torch.cat, torch.nn.functional.linear, torch.nn.modules.rnn._VF]
    assert after == before


@pytest.mark.usefixtures("pets")
@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_a_training_resumes_under_apex_to_the_same_bits(amp, opt_level, monkeypatch, caplog):
    """The scale grows after five micro-batches, so that it does, and overflows, between stop and end."""
    attach = ApexPrecision.attach

    def attach_and_grow(self, *args):
        attach(self, *args)
        amp._amp_state.loss_scalers[0]._scale_seq_len = 5

    monkeypatch.setattr(ApexPrecision, "attach", attach_and_grow)
    flags = [*FLAGS, opt_level, "--num_steps", "16", "--eval_every", "16", "--save_every", "1", "--log_every", "1"]
    caplog.set_level(logging.WARNING)
    assert runs.run(*flags, "--name", "b") == 0
    skipped = [int(m.split()[1]) for m in caplog.messages if "was skipped" in m]
    assert min(skipped) < 8 < max(skipped)
    killed_at("after step 8: step ends", *flags)
    state = runs.last_state()
    assert state.step == 7
    assert state.precision["scaler"]["loss_scaler0"]["unskipped"] > 0  # on the way to the next growth
    assert runs.run(*flags) == 0
    runs.assert_same(runs.outcome("a"), runs.outcome("b"))


def train_by_apex(commands):
    """Trains by the stand-in, once with each of several flags; returns checksums of the weights at the end."""
    models, wrap = [], dist_util.wrap
    dist_util.wrap = lambda model, **more: models.append(model) or wrap(model, **more)
    apex.import_apex_amp = lambda device: FakeAmp()
    ApexPrecision.INITIAL_SCALE = 2.0**12
    assert [launching.train_main(flags) for flags in commands] == [0] * len(commands)
    return [checkpoint.checksum(model.state_dict()) for model in models]


def test_ranks_and_micro_batches_are_one_rank_under_apex(tmp_path):
    """At the levels at which apex stashes gradients, of which each is reduced before."""
    scales = {"O1": "0", "O2": "0", "O3": "128"}
    commands, short = {}, ["--num_steps", "4", "--warmup_steps", "1", "--eval_every", "4", "--learning_rate", "0.1"]
    for number, parts in ((1, 1), (2, 2)):
        batch = ["--train_batch_size", str(32 // number), "--gradient_accumulation_steps", str(parts)]
        commands[number] = [
            [*launching.TINY, *FLAGS, level, "--name", level, "--loss_scale", scale, *batch, *short]
            for level, scale in scales.items()
        ]
    checksums = {}
    for number, flags in commands.items():
        with launching.ranks(tmp_path / str(number), [flags] * number, train_by_apex) as run:
            checksums[number] = run.results()
            assert all(isinstance(result, list) for result in checksums[number]), run.output()
    assert checksums[2][0] == checksums[2][1]
    for level in scales:
        one, two = (flat(launching.weights_of(tmp_path / str(n), level)) for n in (1, 2))
        assert (one - two).abs().max() < 2e-3  # half sums; by gradients of their own they come to 0.03 and more
        losses = [launching.values_of(tmp_path / str(n), level, "train/loss") for n in (1, 2)]
        assert losses[0] == pytest.approx(losses[1], abs=5e-3)


# ---- without apex ----


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
