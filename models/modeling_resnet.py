"""The convolutional stem of hybrid models: a ResNet with weight standardisation and group norm.

Source: github.com/google-research/vision_transformer, ``vit_jax/models_resnet.py``; the state_dict
keys are the reference PyTorch script's.  Two things differ from that script, because Google's code
does: padding is 'SAME' (asymmetric for stride 2), and ``gn_proj`` has 32 groups like every other norm.

This module knows nothing of transformers, files or training.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.recompute import Recomputed

ROOT_WIDTH = 64


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Returns the zeros before and after an axis with which it shrinks to ceil(size / stride) ('SAME')."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Pads (B, C, H, W) for a square window as 'SAME' does; the odd pixel goes below and right."""
    top, bottom = same_padding(x.shape[2], kernel, stride)
    left, right = same_padding(x.shape[3], kernel, stride)
    return F.pad(x, (left, right, top, bottom), value=value) if top + bottom + left + right else x


class StdConv2d(nn.Conv2d):
    """Convolution without bias whose kernel is standardised per output channel."""

    standardized = True  # tells mixed precision to keep the kernel in float32

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, bias=False)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # for which torch would import its compiler: a second
            nn.init.normal_(self.weight, std=(self.weight[0].numel()) ** -0.5)  # lecun_normal, Flax's default

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        std, mean = torch.std_mean(w, dim=(1, 2, 3), keepdim=True, correction=0)
        # std + eps, not sqrt(var + eps): with eps 1e-5 the two differ by percents for small kernels.
        w = (w - mean) / (std + 1e-5)
        return F.conv2d(pad_same(x, self.kernel_size[0], self.stride[0]), w, stride=self.stride)


def group_norm(channels: int) -> nn.GroupNorm:
    """Flax's default GroupNorm: 32 groups, epsilon 1e-6."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualUnit(nn.Module):
    """Bottleneck unit: 1x1, 3x3 (strided), 1x1 with four times the width, around a shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.conv1 = StdConv2d(in_channels, width, 1)
        self.gn1 = group_norm(width)
        self.conv2 = StdConv2d(width, width, 3, stride)
        self.gn2 = group_norm(width)
        self.conv3 = StdConv2d(width, out_channels, 1)
        self.gn3 = group_norm(out_channels)
        self.has_projection = stride != 1 or in_channels != out_channels
        if self.has_projection:
            self.downsample = StdConv2d(in_channels, out_channels, 1, stride)
            self.gn_proj = group_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.gn_proj(self.downsample(x)) if self.has_projection else x
        x = F.relu(self.gn1(self.conv1(x)))
        x = F.relu(self.gn2(self.conv2(x)))
        x = self.gn3(self.conv3(x))
        return F.relu(shortcut + x)


class Root(nn.Module):
    """7x7 convolution and 3x3 max pooling, each of stride 2: (B, 3, H, W) -> (B, 64, H/4, W/4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = StdConv2d(3, ROOT_WIDTH, 7, stride=2)
        self.gn = group_norm(ROOT_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.gn(self.conv(x)))
        return F.max_pool2d(pad_same(x, 3, 2, value=float("-inf")), kernel_size=3, stride=2)


class ResNetV2(Recomputed):
    """The stem: a root, then one stage of residual units per entry of ``units``.

    Args:
        units: residual units of each stage; empty for the root alone.  Every stage after the first
            halves the map and doubles the width.

    Attributes:
        out_channels: channels of the feature map it returns.
    """

    def __init__(self, units: tuple[int, ...]) -> None:
        super().__init__()
        self.root = Root()
        self.body = nn.Sequential()
        channels = ROOT_WIDTH
        for stage, num_units in enumerate(units):
            width = ROOT_WIDTH * 2**stage
            block: OrderedDict[str, nn.Module] = OrderedDict()
            for unit in range(num_units):
                stride = 2 if stage > 0 and unit == 0 else 1
                block[f"unit{unit + 1}"] = ResidualUnit(channels, width, stride)
                channels = 4 * width
            self.body.add_module(f"block{stage + 1}", nn.Sequential(block))
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.compute(self.root, x)
        for stage in self.body.children():
            for unit in stage.children():
                x = self.compute(unit, x)
        return x
