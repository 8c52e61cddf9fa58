"""One step at every precision, computed on the CPU for real; tests/test_steps.py recomputes float32's."""

import math
from dataclasses import replace

import pytest
import torch

from models.configs import CONFIGS
from tests.helpers.steps import flat, make_batch, make_model, make_optimizer, moved, params_of, take_step, until_applied
from utils.precision import MAX_SKIPPED_IN_A_ROW, OPT_LEVELS, Precision, SkippedSteps

CPU = torch.device("cpu")
HALF_LEVELS = ("O1", "O2", "O3")


def start(opt_level="O0", learning_rate=1.0, momentum=0.9, **options):
    model = make_model()
    precision = Precision(CPU, opt_level, **options)
    optimizer = make_optimizer(model, precision)
    optimizer.param_groups[0].update(lr=learning_rate, momentum=momentum)
    return model, precision, optimizer


def change(opt_level="O0", max_grad_norm=1.0, learning_rate=10.0, **options):
    """The loss before one step, and by how much the step changes each weight."""
    model, precision, optimizer = start(opt_level, learning_rate, **options)
    applied, loss = take_step(model, precision, optimizer, max_grad_norm)
    assert applied
    return loss, moved(model, precision)


# ---- formats ----


@pytest.mark.parametrize("opt_level", HALF_LEVELS)
def test_a_step_in_half_precision_is_that_of_float32_to_bfloat16s_digits(opt_level):
    (loss, expected), (half_loss, got) = change("O0"), change(opt_level)
    assert half_loss == pytest.approx(loss, rel=0.02)
    assert half_loss != loss  # it did compute with fewer digits
    assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("opt_level", HALF_LEVELS)
def test_many_steps_in_half_precision_lower_the_loss_as_float32_does(opt_level):
    losses = {}
    for level in ("O0", opt_level):
        model, precision, optimizer = start(level, learning_rate=0.03)
        losses[level] = [take_step(model, precision, optimizer)[1] for _ in range(15)]
    assert losses["O0"][-1] < 0.5 * losses["O0"][0]
    assert losses[opt_level][-1] == pytest.approx(losses["O0"][-1], abs=0.1 * losses["O0"][0])


def dtypes_by_level(opt_level):
    """The type that each weight of the model should have."""
    for name, p in make_model().named_parameters():
        small = "norm" in name or name.endswith(("cls_token", "position_embeddings"))
        yield name, torch.bfloat16 if opt_level == "O3" or (opt_level == "O2" and not small) else p.dtype


@pytest.mark.parametrize("opt_level", OPT_LEVELS)
def test_weights_have_the_type_of_the_level_and_keep_it(opt_level):
    model, precision, optimizer = start(opt_level)
    expected = dict(dtypes_by_level(opt_level))
    assert {name: p.dtype for name, p in model.named_parameters()} == expected
    take_step(model, precision, optimizer)
    assert {name: p.dtype for name, p in model.named_parameters()} == expected


def test_the_standardised_kernels_of_a_hybrid_stay_float32_at_o2():
    config = replace(CONFIGS["testing-hybrid"], dropout_rate=0.0)
    model = make_model(config)
    precision = Precision(CPU, "O2")
    params = precision.prepare(model)
    stem = dict(model.transformer.embeddings.hybrid_model.named_parameters())
    assert {p.dtype for p in stem.values()} == {torch.float32}
    assert model.head.weight.dtype == torch.bfloat16
    applied, _ = take_step(model, precision, torch.optim.SGD(params, lr=1.0))
    assert applied
    assert all(torch.isfinite(x).all() for x in precision.float32_weights(model).values())


@pytest.mark.parametrize("opt_level", OPT_LEVELS)
def test_the_optimizer_gets_every_parameter_once_in_the_models_order(opt_level):
    model, _, optimizer = start(opt_level)
    parameters = params_of(optimizer)
    assert [p.shape for p in parameters] == [p.shape for p in model.parameters()]
    assert len({id(p) for p in parameters}) == len(parameters)
    if opt_level != "O3":
        assert {p.dtype for p in parameters} == {torch.float32}
        for p, own in zip(parameters, model.parameters()):
            assert (p is own) == (own.dtype == torch.float32)
            torch.testing.assert_close(p.detach(), own.detach().float(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("opt_level", OPT_LEVELS)
def test_state_dict_is_float32_under_the_models_keys_and_loads_into_a_new_model(opt_level):
    model, precision, optimizer = start(opt_level)
    take_step(model, precision, optimizer)
    state = precision.float32_weights(model)
    fresh = make_model()
    assert list(state) == list(fresh.state_dict())
    assert {x.dtype for x in state.values()} == {torch.float32}
    assert not any(x.requires_grad for x in state.values())
    fresh.load_state_dict(state)
    for p, x in zip(model.parameters(), fresh.parameters()):
        assert torch.equal(p, x.to(p.dtype))


def test_state_dict_at_o2_has_the_masters_digits():
    model, precision, optimizer = start("O2", learning_rate=1e-4)
    take_step(model, precision, optimizer)
    state = precision.float32_weights(model)
    name = "transformer.encoder.layer.0.ffn.fc1.weight"
    own = dict(model.named_parameters())[name]
    master = params_of(optimizer)[[n for n, _ in model.named_parameters()].index(name)]
    assert torch.equal(state[name], master)
    assert not torch.equal(state[name], own.float())
    assert torch.equal(master.to(torch.bfloat16), own)


def test_small_steps_add_up_in_the_masters():
    # Each is less than half of bfloat16's last digit: weights that were only bfloat16 would never move.
    model, precision, optimizer = start("O2", learning_rate=1e-4, momentum=0.0)
    before = flat(precision.float32_weights(model))
    for _ in range(3):
        take_step(model, precision, optimizer)
    moved = flat(precision.float32_weights(model)) - before
    assert moved.norm() == pytest.approx(3e-4, rel=0.1)


@pytest.mark.parametrize(
    ("opt_level", "amp_dtype", "text"),
    [
        ("O0", "auto", "float32"),
        ("O1", "auto", "bfloat16 O1"),
        ("O2", "bfloat16", "bfloat16 O2"),
        ("O3", "float16", "float16 O3"),
    ],
)
def test_it_says_what_it_is(opt_level, amp_dtype, text):
    assert str(Precision(CPU, opt_level, amp_dtype)) == text


# ---- the step ----


@pytest.mark.parametrize("opt_level", OPT_LEVELS)
def test_gradients_longer_than_the_norm_are_cut_to_it_and_shorter_ones_are_left(opt_level):
    lengths = {norm: change(opt_level, norm, momentum=0.0)[1].norm().item() / 10 for norm in (0.1, 1.0, 1e3, math.inf)}
    tolerance = 0.02 if opt_level == "O3" else 1e-3
    assert lengths[0.1] == pytest.approx(0.1, rel=0.2 if opt_level == "O3" else tolerance)
    assert lengths[1.0] == pytest.approx(1.0, rel=tolerance)
    assert lengths[1e3] == pytest.approx(lengths[math.inf], rel=1e-6)
    assert 1.5 < lengths[math.inf] < 1e3


@pytest.mark.parametrize("max_grad_norm", [0.1, 1e6])
@pytest.mark.parametrize("loss_scale", [1024.0, 1e-3])
@pytest.mark.parametrize("opt_level", ["O0", "O1", "O2"])
def test_a_fixed_loss_scale_changes_nothing_as_clipping_sees_unscaled_gradients(opt_level, loss_scale, max_grad_norm):
    _, expected = change(opt_level, max_grad_norm)
    _, got = change(opt_level, max_grad_norm, loss_scale=loss_scale)
    # A scale that is no power of two rounds bfloat16 gradients otherwise.
    exact = opt_level == "O0" or loss_scale == 1024
    assert (got - expected).norm() < (1e-5 if exact else 0.02) * expected.norm()


@pytest.mark.parametrize("opt_level", OPT_LEVELS)
def test_the_gradients_of_a_steps_micro_batches_add_up(opt_level):
    model, precision, optimizer = start(opt_level, learning_rate=10.0)
    images, labels = make_batch()
    for i in range(2):
        with precision.autocast():
            loss = model(images[i::2], labels[i::2]) / 2
        precision.backward(loss)
    precision.step(optimizer, 1.0)
    got = moved(model, precision)
    _, expected = change(opt_level)
    assert (got - expected).norm() < (1e-4 if opt_level == "O0" else 0.03) * expected.norm()


def test_frozen_weights_stay():
    model = make_model()
    model.transformer.requires_grad_(False)
    precision = Precision(CPU, "O0", loss_scale=8.0)
    params = precision.prepare(model)
    before = {name: x.clone() for name, x in precision.float32_weights(model).items()}
    take_step(model, precision, torch.optim.SGD(params, lr=1.0))
    changed = {name for name, x in precision.float32_weights(model).items() if not torch.equal(x, before[name])}
    assert changed == {"head.weight", "head.bias"}


# ---- dynamic scaling of float16 ----


@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_a_step_whose_gradients_overflow_is_skipped_whole(opt_level):
    model, precision, optimizer = start(opt_level, learning_rate=0.1, amp_dtype="float16")
    until_applied(model, precision, optimizer)
    weights = [p.detach().clone() for p in [*model.parameters(), *params_of(optimizer)]]
    momenta = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    scale = precision.scaler.get_scale()

    applied, _ = take_step(model, precision, optimizer, factor=1e30)
    assert applied is False
    for p, before in zip([*model.parameters(), *params_of(optimizer)], weights):
        assert torch.equal(p, before)
    for state, before in zip(optimizer.state.values(), momenta):
        assert torch.equal(state["momentum_buffer"], before)
    assert precision.scaler.get_scale() == scale / 2

    applied, _ = take_step(model, precision, optimizer)
    assert applied is True
    assert not torch.equal(params_of(optimizer)[0], weights[len(weights) // 2])


@pytest.fixture
def _memory_is_not_zero():
    """Memory that nothing was written to yet reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_memory_is_not_zero")
@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_a_first_step_that_is_skipped_leaves_no_momentum_and_the_next_is_that_of_float32(opt_level):
    model, precision, optimizer = start(opt_level, learning_rate=10.0, amp_dtype="float16")
    assert take_step(model, precision, optimizer, factor=1e30)[0] is False
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())
    assert not moved(model, precision).any()
    until_applied(model, precision, optimizer)
    _, expected = change("O0")
    assert (moved(model, precision) - expected).norm() < 0.02 * expected.norm()


def test_float16_counts_the_steps_that_were_skipped_until_the_one_before():
    model, precision, optimizer = start("O1", learning_rate=0.01, amp_dtype="float16")
    until_applied(model, precision, optimizer)
    before, counts = precision.collect_skipped(), []
    for factor in (1e30, 1.0, 1e30, 1e30, 1.0):
        assert take_step(model, precision, optimizer, factor=factor)[0] is (factor == 1)
        counts.append(precision.collect_skipped() - before)
        assert precision.collect_skipped() == before + counts[-1]
    assert counts == [1, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("opt_level", "options"),
    [("O0", {}), ("O0", {"amp_dtype": "float16"}), ("O1", {}), ("O2", {"amp_dtype": "float16", "loss_scale": 8.0})],
)
def test_only_float16_without_a_fixed_scale_is_scaled_dynamically_and_skips(opt_level, options):
    model, precision, optimizer = start(opt_level, **options)
    assert not precision.scaler.is_enabled()
    for factor in (1.0, float("nan")):
        assert take_step(model, precision, optimizer, factor=factor)[0] is True
    assert precision.collect_skipped() == 0


def test_a_streak_of_skipped_steps_ends_the_run_and_an_applied_one_ends_the_streak():
    skipped = SkippedSteps()
    for _ in range(2):
        for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
            skipped.add(torch.tensor(False))
            skipped.collect()
        skipped.add(torch.tensor(True))
        assert skipped.collect() % (MAX_SKIPPED_IN_A_ROW - 1) == 0
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        skipped.add(torch.tensor(False))
        skipped.collect()
    skipped.add(torch.tensor(False))
    words = f"overflowed in {MAX_SKIPPED_IN_A_ROW} steps in a row, up to step {3 * MAX_SKIPPED_IN_A_ROW},"
    with pytest.raises(FloatingPointError, match=words):
        skipped.collect()


# ---- TF32 ----


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_tf32_is_for_mixed_precision_on_cuda_and_a_float32_run_after_it_has_none():
    before, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        seen = []
        for level in ("O1", "O0", "O2", "O3"):
            Precision(torch.device("cuda"), level).prepare(make_model())
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        assert seen == [("high", True), ("highest", False)] * 2
        torch.set_float32_matmul_precision("medium")
        Precision(CPU, "O1").prepare(make_model())
        assert torch.get_float32_matmul_precision() == "medium"  # CPUs have no TF32: nothing to decide
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


def test_the_micro_batches_of_a_step_sum_up_in_float32():
    model = torch.nn.Linear(1, 1)
    precision = Precision(CPU, "O2")
    optimizer = make_optimizer(model, precision)
    for _ in range(1000):  # in bfloat16 the sum would not get beyond 256
        precision.backward(model(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
    assert [p.grad.item() for p in params_of(optimizer)] == [1000, 1000]


@pytest.mark.parametrize("opt_level", ["O0", "O2"])
def test_another_optimizer_takes_the_place_of_sgd(opt_level):
    model, precision = make_model(), Precision(torch.device("cpu"), opt_level)
    before = flat(precision.float32_weights(model))
    optimizer = torch.optim.AdamW(precision.prepare(model), lr=1e-3, fused=True)
    precision.attach(model, optimizer)
    take_step(model, precision, optimizer)
    change = (flat(precision.float32_weights(model)) - before).abs()
    assert change.max() == pytest.approx(
        1e-3, rel=0.05
    )  # Adam's first step is the learning rate, whatever the gradient


def test_each_master_gets_the_gradient_of_its_weight_however_many_there_are():
    model = torch.nn.ModuleList(torch.nn.Linear(1, 1, bias=False) for _ in range(100))
    precision = Precision(CPU, "O2")
    optimizer = make_optimizer(model, precision)
    for _ in range(2):
        x = torch.ones(1, 1, dtype=torch.bfloat16)
        precision.backward(sum(i * layer(x).sum() for i, layer in enumerate(model)))
    assert [p.grad.item() for p in params_of(optimizer)] == [2 * i for i in range(100)]
