"""What one update does at every precision, computed on the CPU for real and a second time by hand."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.configs import CONFIGS
from models.modeling import VisionTransformer
from utils.precision import OPT_LEVELS, Precision

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
    optimizer = precision.make_optimizer(model, weight_decay=0.0)
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
    return loss, flat(precision.state_dict(model)) - flat(make_model().state_dict())


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
    precision.prepare(model)
    stem = dict(model.transformer.embeddings.hybrid_model.named_parameters())
    assert {p.dtype for p in stem.values()} == {torch.float32}
    assert model.head.weight.dtype == torch.bfloat16
    done, _ = update(model, precision, torch.optim.SGD(precision.parameters(), lr=1.0))
    assert done
    assert all(torch.isfinite(x).all() for x in precision.state_dict(model).values())


@pytest.mark.parametrize("opt_level", OPT_LEVELS)
def test_the_optimizer_gets_every_parameter_once_in_the_models_order(opt_level):
    model, precision, _ = start(opt_level)
    parameters = precision.parameters()
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
    state = precision.state_dict(model)
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
    state = precision.state_dict(model)
    name = "transformer.encoder.layer.0.ffn.fc1.weight"
    own = dict(model.named_parameters())[name]
    master = precision.parameters()[[n for n, _ in model.named_parameters()].index(name)]
    assert torch.equal(state[name], master)
    assert not torch.equal(state[name], own.float())
    assert torch.equal(master.to(torch.bfloat16), own)


def test_small_updates_add_up_in_the_masters():
    # Each is less than half of bfloat16's last digit: weights that were only bfloat16 would never move.
    model, precision, optimizer = start("O2", learning_rate=1e-4, momentum=0.0)
    before = flat(precision.state_dict(model))
    for _ in range(3):
        update(model, precision, optimizer)
    moved = flat(precision.state_dict(model)) - before
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
        state = precision.state_dict(model)
        for name, p in by_hand.named_parameters():
            torch.testing.assert_close(state[name], p.detach(), rtol=0, atol=1e-5)


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
    assert all(p.grad is None for p in [*model.parameters(), *precision.parameters()])


@pytest.mark.parametrize("opt_level", OPT_LEVELS)
def test_the_gradients_of_an_updates_parts_add_up(opt_level):
    model, precision, optimizer = start(opt_level, learning_rate=10.0)
    images, labels = make_batch()
    for part in range(2):
        with precision.autocast():
            loss = model(images[part::2], labels[part::2]) / 2
        precision.backward(loss)
    precision.step(optimizer, 1.0)
    got = flat(precision.state_dict(model)) - flat(make_model().state_dict())
    _, expected = change(opt_level)
    assert (got - expected).norm() < (1e-4 if opt_level == "O0" else 0.03) * expected.norm()


def test_frozen_weights_stay():
    model = make_model()
    model.transformer.requires_grad_(False)
    precision = Precision(CPU, "O0", loss_scale=8.0)
    precision.prepare(model)
    before = {name: x.clone() for name, x in precision.state_dict(model).items()}
    update(model, precision, torch.optim.SGD(precision.parameters(), lr=1.0))
    changed = {name for name, x in precision.state_dict(model).items() if not torch.equal(x, before[name])}
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
    got = flat(precision.state_dict(model)) - flat(make_model().state_dict())
    _, expected = change("O0")
    assert (got - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_an_update_whose_gradients_overflow_is_skipped_whole(opt_level):
    model, precision, optimizer = start(opt_level, learning_rate=0.1, amp_dtype="float16")
    while not update(model, precision, optimizer)[0]:
        pass
    weights = [p.detach().clone() for p in [*model.parameters(), *precision.parameters()]]
    momenta = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    scale = precision.scaler.get_scale()

    done, _ = update(model, precision, optimizer, factor=1e30)
    assert done is False
    for p, before in zip([*model.parameters(), *precision.parameters()], weights):
        assert torch.equal(p, before)
    for state, before in zip(optimizer.state.values(), momenta):
        assert torch.equal(state["momentum_buffer"], before)
    assert precision.scaler.get_scale() == scale / 2
    assert all(p.grad is None for p in [*model.parameters(), *precision.parameters()])

    done, _ = update(model, precision, optimizer)
    assert done is True
    assert not torch.equal(precision.parameters()[0], weights[len(weights) // 2])


@pytest.mark.parametrize(
    ("opt_level", "options"),
    [("O0", {}), ("O0", {"amp_dtype": "float16"}), ("O1", {}), ("O2", {"amp_dtype": "float16", "loss_scale": 8.0})],
)
def test_only_float16_without_a_fixed_scale_is_scaled_dynamically(opt_level, options):
    model, precision, optimizer = start(opt_level, **options)
    assert not precision.scaler.is_enabled()
    assert update(model, precision, optimizer)[0] is True
