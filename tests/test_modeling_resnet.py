"""models/modeling_resnet.py against the second formulation of tests/helpers/oracle.py, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.modeling_resnet import ResidualUnit, ResNetV2, StdConv2d, group_norm, pad_same, same_padding
from tests.helpers import fake_npz, oracle


def randomize(module: nn.Module) -> nn.Module:
    """Fills a module with numbers that hide no mistake: channels differ in mean and spread."""
    for name, p in module.named_parameters():
        leaf = "kernel" if p.ndim == 4 else "scale" if name.endswith("weight") else "bias"
        values = fake_npz.values(f"{name}/conv/{leaf}", p.shape[::-1])  # a kernel's last axis is its outputs, as there
        p.data = torch.from_numpy(values.T.astype(np.float64))
    return module


def random_map(channels: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5


def named(module: nn.Module, prefix: str = "m") -> dict[str, Tensor]:
    return {f"{prefix}.{name}": x for name, x in module.state_dict().items()}


def assert_same(module: nn.Module, x: Tensor, expected: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)


def test_same_padding_shrinks_to_the_ceiling_and_puts_the_odd_zero_last():
    for size in (1, 2, 5, 8, 9, 224):
        for kernel in (1, 2, 3, 7):
            for stride in (1, 2, 3):
                before, after = same_padding(size, kernel, stride)
                assert 0 <= before <= after <= before + 1
                assert (size + before + after - kernel) // stride + 1 == -(-size // stride)
                if before + after:  # and with one zero less it would be one output less
                    assert (size + before + after - 1 - kernel) // stride + 1 < -(-size // stride)


def test_same_padding_of_the_root_is_asymmetric():
    assert same_padding(224, 7, 2) == (2, 3)
    assert same_padding(112, 3, 2) == (0, 1)
    assert same_padding(113, 3, 2) == (1, 1)


def test_padding_has_the_value_asked_for():
    x = pad_same(torch.ones(1, 1, 4, 3), kernel=3, stride=2, value=-7.0)
    assert x.tolist() == [[[[-7, 1, 1, 1, -7]] * 4 + [[-7] * 5]]]


@pytest.mark.parametrize("scale", [1, 1e-5], ids=["usual", "tiny"])  # as small as epsilon, where its place shows
def test_convolutions_are_standardized_and_same(scale):
    for kernel, stride in [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)]:
        module = randomize(StdConv2d(5, 6, kernel, stride))
        module.weight.data *= scale
        for size in [(8, 8), (9, 9), (8, 11), (7, 10), (5, 1)]:
            x = random_map(5, size)
            assert_same(module, x, oracle.conv(named(module), "m", x, stride))


@pytest.mark.parametrize("scale", [1, 1e-3], ids=["usual", "nearly constant"])
def test_group_norm_is_googles(scale):
    for channels in (32, 64, 256):
        module = randomize(group_norm(channels))
        x = scale * random_map(channels, (5, 4))
        assert_same(module, x, oracle.group_norm(named(module), "m", x))


@pytest.mark.parametrize(
    ("in_channels", "stride", "has_projection"), [(64, 1, True), (128, 1, False), (128, 2, True), (64, 2, True)]
)
def test_residual_units_are_googles(in_channels, stride, has_projection):
    module = randomize(ResidualUnit(in_channels, width=32, stride=stride))
    assert module.has_projection == has_projection
    for size in [(6, 6), (7, 5)]:
        x = random_map(in_channels, size)
        assert_same(module, x, oracle.residual_unit(named(module), "m.", x, stride))


@pytest.mark.parametrize("units", [(), (1, 2), (1, 1, 2)], ids=str)
def test_stems_are_googles(units):
    module = randomize(ResNetV2(units))
    state = named(module, oracle.STEM.removesuffix("."))
    for size in [(22, 19), (33, 33), (18, 9), (1, 2)]:
        x = random_map(3, size)
        expected = oracle.stem(state, x)
        assert expected.shape[1] == module.out_channels == (128 * 2 ** len(units) if units else 64)
        assert_same(module, x, expected)


def test_convolutions_start_with_the_deviation_of_lecun_normal():
    torch.manual_seed(0)
    weight = StdConv2d(64, 128, 3).weight.detach()
    assert weight.std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.02)
