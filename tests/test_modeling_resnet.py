"""models/modeling_resnet.py against a recomputation in numpy, window by window and in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from models.modeling_resnet import ResidualUnit, ResNetV2, Root, StdConv2d, group_norm, pad_same, same_padding
from tests.helpers import fake_npz

SIZES = [(8, 8), (9, 9), (8, 11), (7, 10), (5, 1)]


def windows(x: np.ndarray, kernel: int, stride: int, outside: float):
    """Yields (row, column, window (B, C, kernel, kernel)) as TensorFlow's 'SAME' places windows.

    The outputs' windows are spread so that what falls outside the picture is split evenly, the odd row
    and column going below and right.
    """
    b, c, *sides = x.shape
    counts = [-(-side // stride) for side in sides]
    firsts = [-(max((n - 1) * stride + kernel - side, 0) // 2) for n, side in zip(counts, sides)]
    for row, col in itertools.product(*map(range, counts)):
        window = np.full((b, c, kernel, kernel), outside)
        for i, j in itertools.product(range(kernel), repeat=2):
            y, z = firsts[0] + row * stride + i, firsts[1] + col * stride + j
            if 0 <= y < sides[0] and 0 <= z < sides[1]:
                window[:, :, i, j] = x[:, :, y, z]
        yield row, col, window


def conv(x: np.ndarray, weight: torch.Tensor, stride: int = 1) -> np.ndarray:
    """Google's StdConv: every output channel's kernel less its mean, over its deviation plus 1e-5."""
    w = weight.detach().double().numpy()
    w = np.stack([(kernel - kernel.mean()) / (np.sqrt(((kernel - kernel.mean()) ** 2).mean()) + 1e-5) for kernel in w])
    out = np.zeros((len(x), len(w), *(-(-side // stride) for side in x.shape[2:])))
    for row, col, window in windows(x, w.shape[-1], stride, outside=0.0):
        out[:, :, row, col] = np.einsum("bcij,ocij->bo", window, w)
    return out


def norm(x: np.ndarray, module: torch.nn.GroupNorm) -> np.ndarray:
    """Flax's GroupNorm: 32 groups of neighbouring channels, epsilon 1e-6."""
    groups = np.split(x, 32, axis=1)
    axes = (1, 2, 3)
    groups = [(g - g.mean(axes, keepdims=True)) / np.sqrt(g.var(axes, keepdims=True) + 1e-6) for g in groups]
    weight, bias = (p.detach().double().numpy()[:, None, None] for p in (module.weight, module.bias))
    return np.concatenate(groups, axis=1) * weight + bias


def unit(x: np.ndarray, module: ResidualUnit, stride: int) -> np.ndarray:
    shortcut = x
    if module.has_projection:
        shortcut = norm(conv(x, module.downsample.weight, stride), module.gn_proj)
    y = np.maximum(norm(conv(x, module.conv1.weight), module.gn1), 0)
    y = np.maximum(norm(conv(y, module.conv2.weight, stride), module.gn2), 0)
    y = norm(conv(y, module.conv3.weight), module.gn3)
    return np.maximum(shortcut + y, 0)


def root(x: np.ndarray, module: Root) -> np.ndarray:
    x = np.maximum(norm(conv(x, module.conv.weight, stride=2), module.gn), 0)
    out = np.zeros((*x.shape[:2], *(-(-side // 2) for side in x.shape[2:])))
    for row, col, window in windows(x, 3, 2, outside=-np.inf):
        out[:, :, row, col] = window.max(axis=(2, 3))
    return out


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Fills a module with numbers that hide no mistake: channels differ in mean and spread."""
    for name, p in module.named_parameters():
        leaf = "scale" if p.ndim == 1 and name.endswith("weight") else name.split(".")[-1]
        if p.ndim == 4:
            kernel = fake_npz.values(f"{name}/conv/kernel", tuple(p.shape[i] for i in (2, 3, 1, 0)))
            p.data = torch.from_numpy(kernel).permute(3, 2, 0, 1).contiguous()
        else:
            p.data = torch.from_numpy(fake_npz.values(f"{name}/{leaf}", tuple(p.shape)))
    return module


def random_map(channels: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, channels, *size)) + 0.5


def apply(module: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(x).float()).numpy()


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 2, 5, 8, 9, 224])
def test_same_padding_shrinks_to_the_ceiling_and_puts_the_odd_zero_last(size, kernel, stride):
    before, after = same_padding(size, kernel, stride)
    assert 0 <= before <= after <= before + 1
    count = (size + before + after - kernel) // stride + 1
    assert count == -(-size // stride)
    if before + after:  # and with one zero less it would be one output less
        assert (size + before + after - 1 - kernel) // stride + 1 < count


def test_same_padding_of_the_root_is_asymmetric():
    assert same_padding(224, 7, 2) == (2, 3)
    assert same_padding(112, 3, 2) == (0, 1)
    assert same_padding(113, 3, 2) == (1, 1)


def test_padding_has_the_value_asked_for():
    x = pad_same(torch.ones(1, 1, 4, 3), kernel=3, stride=2, value=-7.0)
    assert x.tolist() == [[[[-7, 1, 1, 1, -7]] * 4 + [[-7] * 5]]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_convolutions_are_standardized_and_same(size, kernel, stride):
    module = randomize(StdConv2d(5, 6, kernel, stride))
    x = random_map(5, size)
    np.testing.assert_allclose(apply(module, x), conv(x, module.weight, stride), rtol=1e-5, atol=2e-5)


def test_tiny_kernels_are_divided_by_their_deviation_plus_epsilon():
    module = randomize(StdConv2d(4, 4, 1))
    module.weight.data *= 1e-5  # now epsilon is as large as the deviation, and where it stands shows
    x = random_map(4, (3, 3))
    np.testing.assert_allclose(apply(module, x), conv(x, module.weight), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("channels", [32, 64, 256])
def test_group_norm_is_googles(channels):
    module = randomize(group_norm(channels))
    x = random_map(channels, (5, 4))
    np.testing.assert_allclose(apply(module, x), norm(x, module), rtol=1e-5, atol=1e-5)


def test_group_norm_keeps_nearly_constant_maps_as_epsilon_says():
    module = randomize(group_norm(64))
    x = 1e-3 * random_map(64, (5, 4))
    np.testing.assert_allclose(apply(module, x), norm(x, module), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (17, 15), (18, 9), (1, 2)])
def test_root_is_googles(size):
    module = randomize(Root())
    x = random_map(3, size)
    np.testing.assert_allclose(apply(module, x), root(x, module), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(6, 6), (7, 5)])
@pytest.mark.parametrize(
    ("in_channels", "stride", "has_projection"), [(64, 1, True), (128, 1, False), (128, 2, True), (64, 2, True)]
)
def test_residual_units_are_googles(in_channels, stride, has_projection, size):
    module = randomize(ResidualUnit(in_channels, width=32, stride=stride))
    assert module.has_projection == has_projection
    x = random_map(in_channels, size)
    np.testing.assert_allclose(apply(module, x), unit(x, module, stride), rtol=1e-4, atol=1e-4)


def test_the_stem_halves_the_map_in_every_stage_but_the_first():
    module = randomize(ResNetV2((1, 2)))
    assert module.out_channels == 512
    x = random_map(3, (22, 19))  # 11 x 10, 6 x 5, 6 x 5, 3 x 3
    stages = module.body
    y = unit(root(x, module.root), stages.block1.unit1, stride=1)
    y = unit(unit(y, stages.block2.unit1, stride=2), stages.block2.unit2, stride=1)
    assert y.shape == (2, 512, 3, 3)
    np.testing.assert_allclose(apply(module, x), y, rtol=1e-4, atol=2e-4)


def test_a_stem_without_stages_is_its_root():
    module = randomize(ResNetV2(()))
    assert module.out_channels == 64
    x = random_map(3, (9, 9))
    np.testing.assert_array_equal(apply(module, x), apply(module.root, x))


def test_convolutions_start_with_the_deviation_of_lecun_normal():
    torch.manual_seed(0)
    weight = StdConv2d(64, 128, 3).weight.detach()
    assert weight.std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.02)
