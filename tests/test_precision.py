"""What one update does at every precision, computed on the CPU for real and a second time by hand."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn

from benchmarks.plain import PlainViT
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.helpers.fake_apex import FakeAmp
from tests.helpers.steps import make_optimizer, params_of
from utils.apex import ApexPrecision, import_apex_amp
from utils.precision import MAX_SKIPPED_IN_A_ROW, OPT_LEVELS, Precision, SkippedSteps

CPU = torch.device("cpu")
CONFIG = replace(CONFIGS["testing"], dropout_rate=0.0)
HALF_LEVELS = ("O1", "O2", "O3")


def make_model(config=CONFIG):
    torch.manual_seed(0)
    model = VisionTransformer(config, img_size=32, num_classes=10)
    nn.init.normal_(model.head.weight, std=0.5)  # as it is, zero, nothing below it would learn
    return model


def make_batch(size=8):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, 3, 32, 32, generator=generator) * 2 - 1, torch.arange(size) % 10


def start(opt_level="O0", learning_rate=1.0, momentum=0.9, **options):
    model = make_model()
    precision = Precision(CPU, opt_level, **options)
    optimizer = make_optimizer(model, precision)
    optimizer.param_groups[0].update(lr=learning_rate, momentum=momentum)
    return model, precision, optimizer


def update(model, precision, optimizer, max_grad_norm=1.0, factor=1.0):
    images, labels = make_batch()
    with precision.autocast():
        loss = model(images, labels)
    precision.backward(loss * factor)
    return bool(precision.step(optimizer, max_grad_norm)), loss.item()


def flat(state):
    return torch.cat([x.float().flatten() for x in state.values()])


def change(opt_level="O0", max_grad_norm=1.0, learning_rate=10.0, **options):
    """The loss before one update, and by how much the update changes each weight."""
    model, precision, optimizer = start(opt_level, learning_rate, **options)
    done, loss = update(model, precision, optimizer, max_grad_norm)
    assert done
    return loss, flat(precision.float32_weights(model)) - flat(make_model().state_dict())


# ---- formats ----


@pytest.mark.parametrize("opt_level", HALF_LEVELS)
def test_an_update_in_half_precision_is_that_of_float32_to_bfloat16s_digits(opt_level):
    (loss, expected), (half_loss, got) = change("O0"), change(opt_level)
    assert half_loss == pytest.approx(loss, rel=0.02)
    assert half_loss != loss  # it did compute with fewer digits
    assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("opt_level", HALF_LEVELS)
def test_many_updates_in_half_precision_lower_the_loss_as_float32_does(opt_level):
    losses = {}
    for level in ("O0", opt_level):
        model, precision, optimizer = start(level, learning_rate=0.03)
        losses[level] = [update(model, precision, optimizer)[1] for _ in range(15)]
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
    update(model, precision, optimizer)
    assert {name: p.dtype for name, p in model.named_parameters()} == expected


def test_o2_keeps_norms_and_embeddings_in_float32_and_halves_the_rest():
    dtypes = dict(dtypes_by_level("O2"))
    assert dtypes["transformer.embeddings.cls_token"] == torch.float32
    assert dtypes["transformer.embeddings.position_embeddings"] == torch.float32
    assert dtypes["transformer.encoder.layer.1.ffn_norm.bias"] == torch.float32
    assert dtypes["transformer.encoder.encoder_norm.weight"] == torch.float32
    assert dtypes["transformer.encoder.layer.0.attn.query.weight"] == torch.bfloat16
    assert dtypes["transformer.embeddings.patch_embeddings.weight"] == torch.bfloat16
    assert dtypes["head.bias"] == torch.bfloat16


def test_the_standardised_kernels_of_a_hybrid_stay_float32_at_o2():
    config = replace(CONFIGS["testing-hybrid"], dropout_rate=0.0)
    model = make_model(config)
    precision = Precision(CPU, "O2")
    params = precision.prepare(model)
    stem = dict(model.transformer.embeddings.hybrid_model.named_parameters())
    assert {p.dtype for p in stem.values()} == {torch.float32}
    assert model.head.weight.dtype == torch.bfloat16
    done, _ = update(model, precision, torch.optim.SGD(params, lr=1.0))
    assert done
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
    update(model, precision, optimizer)
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
    update(model, precision, optimizer)
    state = precision.float32_weights(model)
    name = "transformer.encoder.layer.0.ffn.fc1.weight"
    own = dict(model.named_parameters())[name]
    master = params_of(optimizer)[[n for n, _ in model.named_parameters()].index(name)]
    assert torch.equal(state[name], master)
    assert not torch.equal(state[name], own.float())
    assert torch.equal(master.to(torch.bfloat16), own)


def test_small_updates_add_up_in_the_masters():
    # Each is less than half of bfloat16's last digit: weights that were only bfloat16 would never move.
    model, precision, optimizer = start("O2", learning_rate=1e-4, momentum=0.0)
    before = flat(precision.float32_weights(model))
    for _ in range(3):
        update(model, precision, optimizer)
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


# ---- the update ----


def test_two_updates_are_clipped_sgd_with_momentum_computed_by_hand():
    learning_rate, momentum, max_grad_norm = 0.5, 0.9, 1.0
    model, precision, optimizer = start("O0", learning_rate, momentum)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    by_hand = make_model()
    weights = list(by_hand.parameters())
    velocity = [torch.zeros_like(p) for p in weights]
    for number in (1, 2):
        done, _ = update(model, precision, optimizer, max_grad_norm)
        assert done
        assert len(steps) == number
        grads = torch.autograd.grad(by_hand(*make_batch()), weights)
        norm = sum(g.double().square().sum() for g in grads).sqrt().item()
        assert norm > 1.5 * max_grad_norm  # else clipping would not be seen
        with torch.no_grad():
            for p, v, g in zip(weights, velocity, grads):
                v.mul_(momentum).add_(g * (max_grad_norm / norm))
                p.sub_(learning_rate * v)
        state = precision.float32_weights(model)
        for name, p in by_hand.named_parameters():
            torch.testing.assert_close(state[name], p.detach(), rtol=0, atol=1e-5)


def test_several_float32_updates_are_those_of_a_plain_formulation_and_torchs_own_optimizer():
    # Strided convolution, every token through every block, SGD that is not fused; compared at each update.
    weight_decay, max_grad_norm = 0.01, 1.0
    model = make_model()
    precision = Precision(CPU)
    optimizer = make_optimizer(model, precision, weight_decay)
    c = CONFIG
    plain = PlainViT(32, c.patch_size, c.hidden_size, c.mlp_dim, c.num_heads, c.num_layers, 10, dropout=0.0)
    plain.load_state_dict(model.state_dict())
    sgd = torch.optim.SGD(plain.parameters(), lr=0.0, momentum=0.9, weight_decay=weight_decay, foreach=True)
    first = flat(precision.float32_weights(model)).clone()
    for step in range(1, 7):
        generator = torch.Generator().manual_seed(step)
        images, labels = torch.rand(8, 3, 32, 32, generator=generator) * 2 - 1, torch.arange(8) % 10
        # Logits are of size 3: processors without AVX-512, whose sums are ordered otherwise, reach 1.1e-5.
        torch.testing.assert_close(model(images)[0], plain(images), rtol=1e-5, atol=1e-5)
        loss, plain_loss = model(images, labels), plain(images, labels)
        assert loss.item() == pytest.approx(plain_loss.item(), abs=1e-5)
        precision.backward(loss)
        sgd.zero_grad()
        plain_loss.backward()
        gradients = {name: p.grad.clone() for name, p in plain.named_parameters()}
        length = flat(gradients).norm()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad / length, gradients[name] / length, rtol=0, atol=1e-5)
        for group in (*optimizer.param_groups, *sgd.param_groups):
            group["lr"] = 0.05 * step
        assert precision.step(optimizer, max_grad_norm)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm)
        assert norm > max_grad_norm or step > 1  # at first at least, clipping does something
        sgd.step()
        torch.testing.assert_close(precision.float32_weights(model), dict(plain.state_dict()), rtol=0, atol=1e-5)
    assert (flat(precision.float32_weights(model)) - first).norm() > 0.5


@pytest.mark.parametrize("opt_level", OPT_LEVELS)
def test_gradients_longer_than_the_norm_are_cut_to_it_and_shorter_ones_are_left(opt_level):
    lengths = {norm: change(opt_level, norm, momentum=0.0)[1].norm().item() / 10 for norm in (0.1, 1.0, 1e3, 1e6)}
    tolerance = 0.02 if opt_level == "O3" else 1e-3
    assert lengths[0.1] == pytest.approx(0.1, rel=0.2 if opt_level == "O3" else tolerance)
    assert lengths[1.0] == pytest.approx(1.0, rel=tolerance)
    assert lengths[1e3] == pytest.approx(lengths[1e6], rel=1e-6)
    assert 1.5 < lengths[1e6] < 1e3


def test_an_infinite_norm_never_clips():
    assert torch.equal(change("O0", float("inf"))[1], change("O0", 1e9)[1])


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
def test_gradients_are_gone_after_an_update(opt_level):
    model, precision, optimizer = start(opt_level)
    update(model, precision, optimizer)
    assert all(p.grad is None for p in [*model.parameters(), *params_of(optimizer)])


@pytest.mark.parametrize("opt_level", OPT_LEVELS)
def test_the_gradients_of_an_updates_parts_add_up(opt_level):
    model, precision, optimizer = start(opt_level, learning_rate=10.0)
    images, labels = make_batch()
    for part in range(2):
        with precision.autocast():
            loss = model(images[part::2], labels[part::2]) / 2
        precision.backward(loss)
    precision.step(optimizer, 1.0)
    got = flat(precision.float32_weights(model)) - flat(make_model().state_dict())
    _, expected = change(opt_level)
    assert (got - expected).norm() < (1e-4 if opt_level == "O0" else 0.03) * expected.norm()


def test_frozen_weights_stay():
    model = make_model()
    model.transformer.requires_grad_(False)
    precision = Precision(CPU, "O0", loss_scale=8.0)
    params = precision.prepare(model)
    before = {name: x.clone() for name, x in precision.float32_weights(model).items()}
    update(model, precision, torch.optim.SGD(params, lr=1.0))
    changed = {name for name, x in precision.float32_weights(model).items() if not torch.equal(x, before[name])}
    assert changed == {"head.weight", "head.bias"}


# ---- dynamic scaling of float16 ----


@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_float16_finds_a_scale_and_gives_the_update_of_float32(opt_level):
    model, precision, optimizer = start(opt_level, learning_rate=10.0, amp_dtype="float16")
    assert precision.scaler.is_enabled()
    for _ in range(20):
        done, _ = update(model, precision, optimizer)
        if done:
            break
    assert done
    got = flat(precision.float32_weights(model)) - flat(make_model().state_dict())
    _, expected = change("O0")
    assert (got - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_an_update_whose_gradients_overflow_is_skipped_whole(opt_level):
    model, precision, optimizer = start(opt_level, learning_rate=0.1, amp_dtype="float16")
    while not update(model, precision, optimizer)[0]:
        pass
    weights = [p.detach().clone() for p in [*model.parameters(), *params_of(optimizer)]]
    momenta = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    scale = precision.scaler.get_scale()

    done, _ = update(model, precision, optimizer, factor=1e30)
    assert done is False
    for p, before in zip([*model.parameters(), *params_of(optimizer)], weights):
        assert torch.equal(p, before)
    for state, before in zip(optimizer.state.values(), momenta):
        assert torch.equal(state["momentum_buffer"], before)
    assert precision.scaler.get_scale() == scale / 2
    assert all(p.grad is None for p in [*model.parameters(), *params_of(optimizer)])

    done, _ = update(model, precision, optimizer)
    assert done is True
    assert not torch.equal(params_of(optimizer)[0], weights[len(weights) // 2])


@pytest.mark.parametrize(
    ("opt_level", "options"),
    [("O0", {}), ("O0", {"amp_dtype": "float16"}), ("O1", {}), ("O2", {"amp_dtype": "float16", "loss_scale": 8.0})],
)
def test_only_float16_without_a_fixed_scale_is_scaled_dynamically(opt_level, options):
    model, precision, optimizer = start(opt_level, **options)
    assert not precision.scaler.is_enabled()
    assert update(model, precision, optimizer)[0] is True


@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_an_optimizer_whose_first_update_is_skipped_starts_with_no_momentum(opt_level):
    model, precision, optimizer = start(opt_level, learning_rate=10.0, amp_dtype="float16")
    assert update(model, precision, optimizer, factor=1e30)[0] is False
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())
    assert torch.equal(flat(precision.float32_weights(model)), flat(make_model().state_dict()))
    while not update(model, precision, optimizer)[0]:
        pass
    got = flat(precision.float32_weights(model)) - flat(make_model().state_dict())
    _, expected = change("O0")
    assert (got - expected).norm() < 0.02 * expected.norm()


def test_float16_counts_what_it_skipped_until_the_update_before():
    model, precision, optimizer = start("O1", learning_rate=0.01, amp_dtype="float16")
    while not update(model, precision, optimizer)[0]:
        precision.collect_skipped()
    before, counts = precision.collect_skipped(), []
    for factor in (1e30, 1.0, 1e30, 1e30, 1.0):
        assert update(model, precision, optimizer, factor=factor)[0] is (factor == 1)
        counts.append(precision.collect_skipped() - before)
    assert counts == [1, 1, 2, 3, 3]


@pytest.mark.parametrize("options", [{}, {"amp_dtype": "float16", "loss_scale": 8.0}])
def test_without_dynamic_scaling_nothing_is_ever_skipped(options):
    model, precision, optimizer = start("O1", **options)
    for _ in range(2):
        assert update(model, precision, optimizer, factor=float("nan"))[0] is True
    assert precision.collect_skipped() == 0


def test_skipped_updates_are_counted_once_each():
    skipped = SkippedSteps()
    assert skipped.collect() == 0
    counts = []
    for applied in (False, True, False, False, True):
        skipped.add(torch.tensor(applied))
        assert skipped.collect() == skipped.collect()
        counts.append(skipped.collect())
    assert counts == [1, 1, 2, 3, 3]


def test_a_streak_of_skipped_updates_ends_the_run_and_an_applied_one_ends_the_streak():
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


def test_the_parts_of_an_update_sum_up_in_float32():
    model = torch.nn.Linear(1, 1)
    precision = Precision(CPU, "O2")
    optimizer = make_optimizer(model, precision)
    for _ in range(1000):  # in bfloat16 the sum would not get beyond 256
        precision.backward(model(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
    assert [p.grad.item() for p in params_of(optimizer)] == [1000, 1000]


# ---- apex ----


def start_apex(opt_level, learning_rate=10.0, loss_scale=0.0, momentum=0.9):
    amp, model = FakeAmp(), make_model()
    precision = ApexPrecision(amp, CPU, opt_level, loss_scale)
    optimizer = make_optimizer(model, precision)
    optimizer.param_groups[0].update(lr=learning_rate, momentum=momentum)
    return amp, model, precision, optimizer


def until_applied(model, precision, optimizer, **options):
    while not update(model, precision, optimizer, **options)[0]:
        precision.collect_skipped()


@pytest.mark.parametrize("loss_scale", [0.0, 128.0])
@pytest.mark.parametrize("opt_level", OPT_LEVELS)
def test_apex_is_initialized_once_with_the_level_and_the_scale(opt_level, loss_scale):
    amp, model, precision, optimizer = start_apex(opt_level, loss_scale=loss_scale)
    assert amp.initialized == [(model, optimizer, opt_level, loss_scale or None)]
    dynamic = opt_level in ("O1", "O2")
    expected = loss_scale or (2.0**20 if dynamic else 1.0)
    assert amp._amp_state.loss_scalers[0].loss_scale() == expected
    assert optimizer.defaults["momentum"] == 0.9
    assert not precision.scaler.is_enabled()
    assert str(precision) == ("float32 by apex" if opt_level == "O0" else f"float16 {opt_level} by apex")


@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_a_resumed_run_goes_on_with_apexs_scale_and_count(opt_level):
    _, model, precision, optimizer = start_apex(opt_level)
    until_applied(model, precision, optimizer)
    precision.collect_skipped()
    amp, _, resumed, _ = start_apex(opt_level)
    resumed.load_state_dict(precision.state_dict(), step=3)
    assert amp._amp_state.loss_scalers[0].loss_scale() == precision._scaler().loss_scale() < 2.0**20
    assert resumed.collect_skipped() == precision.collect_skipped() > 0


@pytest.mark.parametrize("opt_level", OPT_LEVELS)
def test_an_update_by_apex_is_that_of_float32_to_float16s_digits(opt_level):
    amp, model, precision, optimizer = start_apex(opt_level)
    until_applied(model, precision, optimizer)
    got = flat(precision.float32_weights(model)) - flat(make_model().state_dict())
    _, expected = change("O0")
    assert (got - expected).norm() < (1e-5 if opt_level == "O0" else 0.02) * expected.norm()
    assert amp.norms == [pytest.approx(1.0, rel=2e-3)]  # what the optimizer saw had been unscaled, then clipped
    assert all(p.grad is None for p in [*model.parameters(), *amp.masters])


def test_apex_scales_the_loss_of_every_part_of_an_update():
    amp, model, precision, optimizer = start_apex("O2", loss_scale=64.0)
    images, labels = make_batch()
    for part in range(2):
        with precision.autocast():
            loss = model(images[part::2], labels[part::2]) / 2
        precision.backward(loss)
    assert amp.asked_for_masters == 0
    assert bool(precision.step(optimizer, 1.0))
    assert amp.scaled == [(optimizer, 64.0)] * 2
    assert amp.asked_for_masters == 1
    assert len(amp.norms) == 1
    got = flat(precision.float32_weights(model)) - flat(make_model().state_dict())
    _, expected = change("O0")
    assert (got - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("overflow_in", [0, 1])
@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_an_overflow_under_apex_skips_the_whole_update_and_is_counted(opt_level, overflow_in):
    amp, model, precision, optimizer = start_apex(opt_level, learning_rate=0.1)
    until_applied(model, precision, optimizer)
    skipped, scale = precision.collect_skipped(), amp._amp_state.loss_scalers[0].loss_scale()
    before = flat(precision.float32_weights(model))
    images, labels = make_batch()
    for part in range(2):
        loss = model(images[part::2], labels[part::2]) / 2
        precision.backward(loss * 1e30 if part == overflow_in else loss)
    assert bool(precision.step(optimizer, 1.0)) is False
    assert precision.collect_skipped() == skipped + 1
    assert torch.equal(flat(precision.float32_weights(model)), before)
    assert amp._amp_state.loss_scalers[0].loss_scale() == scale / 2
    assert update(model, precision, optimizer)[0] is True
    assert precision.collect_skipped() == skipped + 1
    assert not torch.equal(flat(precision.float32_weights(model)), before)


def test_state_dict_under_apex_has_the_masters_digits_in_float32():
    amp, model, precision, optimizer = start_apex("O2", learning_rate=1e-4)
    until_applied(model, precision, optimizer)
    state = precision.float32_weights(model)
    assert list(state) == list(make_model().state_dict())
    for (name, p), master in zip(model.named_parameters(), amp.masters):
        assert p.dtype == torch.float16
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], master)
        assert not state[name].requires_grad
    assert any(not torch.equal(state[name], p.float()) for name, p in model.named_parameters())


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


CUDA = torch.device("cuda")


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_apex_needs_a_cuda_gpu(kind, monkeypatch):
    apex = ModuleType("apex")
    apex.amp = ModuleType("apex.amp")
    monkeypatch.setitem(sys.modules, "apex", apex)
    assert import_apex_amp(CUDA) is apex.amp
    with pytest.raises(ValueError, match=f"needs a CUDA GPU, not {kind}; use --amp_backend native"):
        import_apex_amp(torch.device(kind))


@pytest.mark.parametrize("apex", [None, ModuleType("apex")], ids=["no apex", "one without amp"])
def test_an_apex_without_amp_is_refused_with_the_remedy(apex, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.delitem(sys.modules, "apex.amp", raising=False)
    with pytest.raises(ValueError, match=r"no NVIDIA apex with amp .*removed amp in 25\.07.*--amp_backend native"):
        import_apex_amp(CUDA)
