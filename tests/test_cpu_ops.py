"""models/cpu_ops.py: dropout, which the seed alone decides on, and attention scores in float32."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from models import cpu_ops
from models.cpu_ops import LANE_BITS, attention_scores, dropout, keep_mask

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
RATES = [0.1, 0.25, 0.5, 1e-6, 0.999]
LANES = 2**LANE_BITS


def draw(*shape, dtype=torch.float32, seed=0):
    """Numbers from 1 to 2, none of which is zero."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1).to(dtype)


def dropped(x, rate, seed=0):
    torch.manual_seed(seed)
    return dropout(x, rate, training=True)


def kept(count, rate, seed=0):
    """One float64 for each of ``count`` elements: 1 where it is kept, 0 where it is dropped."""
    return (dropped(torch.ones(count), rate, seed) != 0).double()


def correlation(a, b):
    return torch.corrcoef(torch.stack((a, b)))[0, 1].item()


# ---- how many ----


def test_the_share_of_kept_elements_is_one_minus_the_rate_in_every_lane_of_a_word():
    count = 2**22
    for rate in RATES:
        x = kept(count, rate)
        share, deviation = x.mean().item(), (rate * (1 - rate) / count) ** 0.5
        assert share == pytest.approx(1 - rate, abs=0.5 / LANES + 5 * deviation)
        assert share > 0
        lanes = x.view(-1, 4).mean(dim=0)
        assert (lanes - (1 - rate)).abs().max() < 0.5 / LANES + 10 * deviation  # twice that of the whole


@pytest.mark.parametrize("rate", RATES)
def test_of_all_the_numbers_a_lane_can_hold_as_many_keep_as_the_rate_asks(rate, monkeypatch):
    class EveryNumberOnce:
        def __init__(self, seed):
            pass

        def random_raw(self, count):
            return np.random.default_rng(0).permutation(LANES).astype(np.uint16).view(np.uint64)[:count]

    monkeypatch.setattr(np.random, "SFC64", EveryNumberOnce)
    mask = keep_mask(torch.Size([LANES]), rate)
    assert mask.dtype == torch.int16
    assert set(mask.unique().tolist()) <= {0, -1}
    assert -mask.sum().item() == round((1 - rate) * LANES)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_elements_are_dropped_independently_of_those_near_them(rate):
    x = kept(2**20, rate)
    for lag in (1, 2, 3, 4, 8, 768):  # neighbours, lanes of a word, words, rows
        assert abs(correlation(x[:-lag], x[lag:])) < 5 / len(x) ** 0.5


def test_masks_of_successive_calls_and_of_close_seeds_are_unrelated():
    torch.manual_seed(0)
    masks = [(dropout(torch.ones(2**20), 0.5, training=True) != 0).double() for _ in range(2)]
    masks += [kept(2**20, 0.5, seed) for seed in (1, 2)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs(correlation(a, b)) < 5 / len(a) ** 0.5


# ---- what becomes of them ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_elements_are_divided_by_one_minus_the_rate_with_one_rounding(dtype):
    x = draw(300, 101, dtype=dtype)
    for rate in (0.1, 0.3, 0.5, 0.999):
        y = dropped(x, rate)
        assert y.dtype == dtype
        keep = y != 0
        assert 0 < keep.sum() < x.numel()
        expected = (x.double() / (1 - rate)).to(dtype)
        if dtype in (torch.bfloat16, torch.float16):
            # The factor has float32's digits; where that moves a product across a tie there is one digit's difference.
            assert (y[keep] == expected[keep]).double().mean() > 0.999
        torch.testing.assert_close(y[keep], expected[keep], rtol=torch.finfo(dtype).eps, atol=0)


def test_the_mean_is_that_of_the_input_in_bfloat16_too():
    # A factor rounded to bfloat16 would be off by 0.0016 at this rate.
    x = draw(2**20, dtype=torch.bfloat16)
    y = dropped(x, 0.1)
    keep = y != 0
    ratio = y[keep].double().sum() / x[keep].double().sum()
    assert ratio.item() * 0.9 == pytest.approx(1, abs=3e-4)
    assert y.double().mean().item() == pytest.approx(x.double().mean().item(), rel=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_pass_where_elements_were_kept_with_the_same_factor(dtype):
    x = draw(40, 57, dtype=dtype).requires_grad_()
    y = dropped(x, 0.3)
    grad = draw(40, 57, dtype=dtype, seed=1)
    y.backward(grad)
    assert torch.equal(x.grad != 0, y != 0)
    assert torch.equal(x.grad, dropped(grad, 0.3))


def test_gradients_are_those_of_finite_differences():
    x = draw(5, 7, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda x: dropped(x, 0.4), (x,))


def test_there_is_no_second_derivative_rather_than_a_wrong_one():
    x = draw(8).requires_grad_()
    (grad,) = torch.autograd.grad(dropped(x, 0.5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_where_it_is_kept_and_is_gone_where_it_is_dropped(dtype):
    keep = dropped(torch.ones(64), 0.5) != 0
    assert 0 < keep.sum() < 64
    for bad in (float("nan"), float("inf"), float("-inf")):
        y = dropped(torch.full((64,), bad, dtype=dtype), 0.5)
        torch.testing.assert_close(y[keep], torch.full_like(y[keep], bad), equal_nan=True)
        assert torch.equal(y[~keep], torch.zeros_like(y[~keep]))


def test_any_shape():
    for shape in [(), (0,), (3, 0), (1,), (2,), (3,), (5,), (2, 3, 4, 5)]:
        x = draw(*shape).requires_grad_()
        y = dropped(x, 0.5)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[:, :1].expand(-1, 64), lambda x: x.unfold(0, 8, 4)],
    ids=["transposed", "strided", "expanded", "overlapping"],
)
def test_the_layout_in_memory_makes_no_difference(view, dtype):
    base = draw(48, 64, dtype=dtype)
    x = view(base)
    assert not x.is_contiguous()
    expected = dropped(x.contiguous(), 0.3)
    before = base.clone()
    assert torch.equal(dropped(x, 0.3), expected)
    assert torch.equal(base, before)

    leaf = x.contiguous().requires_grad_()
    dropped(leaf, 0.3).backward(x)  # a gradient that is a view itself
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_pieces_that_are_masked_at_once_make_no_difference(dtype, monkeypatch):
    x = draw(37, 101, dtype=dtype)
    whole = dropped(x, 0.3)
    monkeypatch.setattr(cpu_ops, "CHUNK", 1000)
    assert torch.equal(dropped(x, 0.3), whole)


# ---- when ----


def test_the_seed_decides():
    x = draw(100)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5, training=True), dropout(x, 0.5, training=True)
    assert not torch.equal(first, second)
    assert torch.equal(dropped(x, 0.5, seed=3), first)
    assert not torch.equal(dropped(x, 0.5, seed=4), first)


def test_it_takes_nothing_from_numpys_global_generator():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    dropped(draw(100), 0.5)
    assert np.array_equal(np.random.get_state()[1], before)


def test_in_evaluation_and_at_rate_zero_nothing_happens():
    x, state = draw(10), torch.get_rng_state()
    for rate, training in [(0.5, False), (0.0, True), (0, True), (0.0, False)]:
        assert dropout(x, rate, training) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_a_compiled_graph_holds_dropout_without_a_break_and_drops_the_same():
    compiled = torch.compile(lambda x: dropout(x, 0.25, True), backend="eager", fullgraph=True)
    x = draw(300, 101).requires_grad_()
    torch.manual_seed(0)
    y = compiled(x)
    assert torch.equal(y, dropped(x, 0.25))
    y.backward(torch.full_like(y, float("inf")))
    assert torch.equal(x.grad, dropped(torch.full_like(y, float("inf")), 0.25))


# ---- attention scores ----


@pytest.mark.parametrize("autocast", [True, False])
def test_attention_scores_are_float32_in_half_precision(autocast):
    q, k = (torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = attention_scores(q, k)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, q.float() @ k.float().mT / 8**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_scores_keep_no_copies_for_the_backward_pass(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 5, 8, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        scores = attention_scores(q, k)
    assert [x.data_ptr() for x in kept] == [q.data_ptr(), k.data_ptr()]
    grad = torch.randn(scores.shape, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):  # must not reach the products
        ours = torch.autograd.grad(scores, (q, k), grad)
    a, b = (x.detach().float().requires_grad_() for x in (q, k))
    exact = torch.autograd.grad(a * 8**-0.5 @ b.mT, (a, b), grad)
    for x, y in zip(ours, exact):
        torch.testing.assert_close(x, y.to(dtype))
