"""Random crops, resizing and normalisation, a whole batch at once on the device that trains.

The crops follow torchvision's ``RandomResizedCrop`` and the resize follows Pillow's bilinear filter
(a triangle as wide as the reduction, so that it does not alias), as the reference's transforms do.
Every random number comes in as an argument: this module draws none and reads no files.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.hardware import to_device

SCALE = (0.05, 1.0)  # share of the picture's area
RATIO = (3 / 4, 4 / 3)  # width / height
NUM_TRIES = 10
#: Values of the pictures that are finished at once: on a CPU what stays in its cache, elsewhere few launches.
CHUNK_VALUES, CHUNK_VALUES_ELSEWHERE = 8 * 3 * 224**2, 128 * 3 * 224**2
TABLE_PX = 256  # filter weights of axes up to this length are computed once
MIDDLE = 128  # of the grey levels
HALF_LEVEL = (MIDDLE - 127.5) / 127.5  # what MIDDLE itself is normalised to
PILLOW_ONE = 2**22  # Pillow's weights are whole multiples of 1 / PILLOW_ONE
#: Uniform numbers that one training picture takes: four a try, and one that decides on the flip.
NUM_DRAWS = 4 * NUM_TRIES + 1


def crop_boxes(draws: Tensor, height: Tensor | int, width: Tensor | int) -> Tensor:
    """RandomResizedCrop's boxes: ten tries, then the largest centre crop of an allowed ratio.

    In NumPy, on the CPU: so few numbers take as long as it takes to call each function.

    Args:
        draws: (B, NUM_DRAWS) uniform in [0, 1), float64, on the CPU.
        height, width: of the pictures in pixels, (B,) or one for all.

    Returns:
        (B, 4) whole pixels: top, left, height, width.
    """
    size = len(draws)
    in_height, in_width = (np.broadcast_to(side, size)[:, None] for side in (height, width))
    u = draws[:, : 4 * NUM_TRIES].numpy().reshape(size, NUM_TRIES, 4)
    area = in_height * in_width * (SCALE[0] + u[..., 0] * (SCALE[1] - SCALE[0]))
    ratio = np.exp(math.log(RATIO[0]) + u[..., 1] * (math.log(RATIO[1]) - math.log(RATIO[0])))
    w, h = (np.round(np.sqrt(x)).astype(np.int64) for x in (area * ratio, area / ratio))
    fits = (w > 0) & (w <= in_width) & (h > 0) & (h <= in_height)
    top = (u[..., 2] * (in_height - h + 1)).astype(np.int64)
    left = (u[..., 3] * (in_width - w + 1)).astype(np.int64)
    boxes = np.stack((top, left, h, w), axis=-1)  # (B, NUM_TRIES, 4)
    chosen = boxes[np.arange(size), fits.argmax(axis=1)]
    missed = ~fits.any(axis=1)
    chosen[missed] = _centre_boxes(in_height[missed, 0], in_width[missed, 0])
    return torch.from_numpy(chosen)


def _centre_boxes(height: np.ndarray, width: np.ndarray) -> np.ndarray:
    ratio = width / height
    h = np.where(ratio < RATIO[0], np.round(width / RATIO[0]).astype(np.int64), height)
    w = np.where(ratio > RATIO[1], np.round(height * RATIO[1]).astype(np.int64), width)
    return np.stack(((height - h) // 2, (width - w) // 2, h, w), axis=-1)


def flips(draws: Tensor) -> Tensor:
    """Which pictures to mirror: (B, NUM_DRAWS) -> (B,) bool, each with probability 1/2."""
    return draws[:, -1] < 0.5


def filter_taps(start: Tensor, length: Tensor, size: int, out_size: int) -> tuple[Tensor, Tensor]:
    """The bilinear filter along one axis: which pixels each new pixel is made of.

    Args:
        start, length: (B,) the part of the axis that is kept, in pixels.
        size: length of the whole axis in pixels.
        out_size: pixels to make of the part.

    Returns:
        Indices (B, taps, out_size) and weights (B, taps, out_size), which are Pillow's, in float64 or what comes
        near it; 2 taps if nothing can be reduced.
    """
    if size > TABLE_PX:
        pixel, weights = _taps_of(length, size, out_size)
    else:
        pixel, weights = (table[length - 1] for table in _tap_table(size, out_size, length.device))
    return pixel + start[:, None, None], weights


@functools.lru_cache(maxsize=8)
def _tap_table(size: int, out_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The taps of every length from 1 to ``size``: the crops of small pictures share them."""
    return _taps_of(torch.arange(1, size + 1, device=device), size, out_size)


def _taps_of(length: Tensor, size: int, out_size: int) -> tuple[Tensor, Tensor]:
    """As ``filter_taps``, of parts that start at 0."""
    dtype = exact_dtype(length.device)
    length = length[:, None].to(dtype)
    scale = length / out_size
    support = scale.clamp(min=1)
    # How far right of the middle of the part's first pixel each new pixel's middle lies, in pixels: (B, out_size)
    centre = (torch.arange(out_size, dtype=dtype, device=length.device) + 0.5) * scale - 0.5
    num_taps = 2 if size <= out_size else 2 * math.ceil(size / out_size) + 1  # no more lie within the support
    first = (centre - support).floor() + 1
    # Taps lie before pixels in memory: long rows are what vector instructions are for.
    tap = first[:, None] + torch.arange(num_taps, dtype=dtype, device=length.device)[:, None]  # (B, taps, out_size)
    weights = (1 - (tap - centre[:, None]).abs_().div_(support[:, None])).clamp_(min=0)
    weights.mul_((tap >= 0) & (tap < length[:, None]))
    weights.div_(weights.sum(dim=1, keepdim=True)).mul_(PILLOW_ONE).add_(0.5).floor_().div_(PILLOW_ONE)
    return torch.minimum(tap.clamp_(min=0), length[:, None] - 1).long(), weights


def as_matrix(pixel: Tensor, weights: Tensor, size: int) -> Tensor:
    """What ``filter_taps`` gave for an axis of ``size`` pixels, as matrices (B, size, out_size)."""
    return weights.new_zeros(len(pixel), size, pixel.shape[2]).scatter_add_(1, pixel, weights)


def exact_dtype(device: torch.device) -> torch.dtype:
    """The type in which a picture's products with Pillow's weights have no rounding error: 8 + 22 bits."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def whole_levels(x: Tensor) -> Tensor:
    """Rounds grey levels in place, halves up, as Pillow does after each of its two passes."""
    return x.add_(0.5).floor_()


def vertical_first(sizes: Tensor, out_size: int) -> Tensor:
    """Which pictures Pillow 13 resizes along the height first; it takes the width first of the others.

    Those that lose more than twice as many rows as columns (Pillow #9549, ``ImagingResampleInner``).  Older
    versions take the width of every picture first; here the newer rule holds whatever is installed.

    Args:
        sizes: (..., 2) height and width in pixels, of what is resized.
        out_size: side of the result in pixels.

    Returns:
        (...) bool.
    """
    rows, cols = (sizes - out_size).unbind(dim=-1)  # how many are lost; gained ones are negative
    return (rows > 0) & (rows > 2 * cols)


def resized_crop(pictures: Tensor, boxes: Tensor, out_size: int, mirrored: Tensor | None = None) -> Tensor:
    """Cuts a box out of each picture and resizes it to a square, in float32.

    Along the axis that comes first a small matrix product in float64, as exact as Pillow's integers; along the
    other, where most of the work is, float32.  There a value that lies between two grey levels may be rounded to
    the other one than Pillow's; nothing is further off.

    Args:
        pictures: (B, 3, H, W) uint8.
        boxes: (B, 4) top, left, height, width in pixels; best on the CPU, where nobody has to wait for them.
        out_size: side of the result in pixels.
        mirrored: (B,) bool, pictures to flip left to right.

    Returns:
        (B, 3, out_size, out_size) float32 in [-1, 1].
    """
    if pictures.shape[2] <= out_size:  # no picture loses height
        return _width_first(pictures, boxes, out_size, mirrored)
    upright = vertical_first(boxes[:, 2:], out_size)
    if not upright.any():
        return _width_first(pictures, boxes, out_size, mirrored)
    out = torch.empty(len(pictures), 3, out_size, out_size, device=pictures.device)
    for some, turned in ((~upright, False), (upright, True)):
        box = boxes[some]
        if len(box) == 0:
            continue
        lot = to_device(some.nonzero()[:, 0], pictures.device)
        x, mirror = pictures[lot], None if mirrored is None else mirrored[lot]
        if not turned:
            out[lot] = _width_first(x, box, out_size, mirror)
            continue
        x = _width_first(x.mT, box[:, [1, 0, 3, 2]], out_size).mT
        out[lot] = x if mirror is None else torch.where(mirror[:, None, None, None], x.flip(3), x)
    return out


def _width_first(pictures: Tensor, boxes: Tensor, out_size: int, mirrored: Tensor | None = None) -> Tensor:
    """As ``resized_crop``, the horizontal pass first in all pictures."""
    top, left, height, width = to_device(boxes, pictures.device).unbind(dim=1)
    in_height, in_width = pictures.shape[2:]
    pixel, weights = filter_taps(top, height, in_height, out_size)
    cols = as_matrix(*filter_taps(left, width, in_width, out_size), in_width)  # (B, W, out)
    if mirrored is not None:
        cols = torch.where(mirrored[:, None, None], cols.flip(2), cols)
    out = torch.empty(len(pictures), 3, out_size, out_size, device=pictures.device)
    values = CHUNK_VALUES if out.device.type == "cpu" else CHUNK_VALUES_ELSEWHERE
    size = max(1, values // (3 * out_size**2))
    for part in zip(*(x.split(size) for x in (out, pictures, cols, pixel, weights))):
        _crop_into(*part)
    return out


def _crop_into(out: Tensor, pictures: Tensor, cols: Tensor, pixel: Tensor, weights: Tensor) -> None:
    x = pictures.to(cols.dtype).flatten(1, 2) @ cols  # (B, 3 * H, out)
    # What the second rounding and normalize add is added where there are fewer values: the weights sum to 1,
    # but for Pillow's rounding of each.
    x = whole_levels(x).add_(0.5 - MIDDLE).float().unflatten(1, (3, -1))  # (B, 3, H, out)
    x = _weigh_rows(x, pixel, weights.float())  # (B, 3, out, out)
    _from_middle(x.floor_(), out)


def _weigh_rows(x: Tensor, pixel: Tensor, weights: Tensor) -> Tensor:
    """New rows as weighted sums of the rows of (B, C, H, W), chosen by (B, taps, out): (B, C, out, W)."""
    size, channels, height, width = x.shape
    first = torch.arange(0, size * channels * height, height, device=x.device).view(size, channels, 1, 1)
    rows = (first + pixel.mT[:, None]).flatten(0, 2)  # (B * C * out, taps)
    weights = weights.mT[:, None].expand(-1, channels, -1, -1).flatten(0, 2)
    x = x.reshape(-1, width)
    if x.device.type == "mps":  # it has no embedding_bag up to torch 2.9
        x = _bag(rows, x, weights)
    else:
        x = F.embedding_bag(rows, x, mode="sum", per_sample_weights=weights)
    return x.view(size, channels, -1, width)


def _bag(rows: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """``F.embedding_bag`` for sums: (N, taps) of each, and the rows (M, W) of ``x``, give (N, W)."""
    return (x[rows] * weights[:, :, None]).sum(dim=1)


def resize(pictures: Tensor, out_size: int) -> Tensor:
    """Resizes whole pictures: (B, 3, H, W) uint8 -> (B, 3, out_size, out_size) float32 in [-1, 1].

    They are Pillow 13's to the bit, but on MPS, which has no float64.
    """
    sizes = pictures.shape[2:]
    if sizes == (out_size, out_size):
        return normalize(pictures.float())
    lengths = (torch.full((1,), n, device=pictures.device) for n in sizes)
    rows, cols = (as_matrix(*_taps_of(n, size, out_size), size)[0] for n, size in zip(lengths, sizes))  # (size, out)
    x = pictures.to(cols.dtype)
    if vertical_first(torch.tensor(sizes), out_size):
        x = whole_levels(whole_levels(rows.T @ x) @ cols)
    else:
        x = whole_levels(rows.T @ whole_levels(x @ cols))
    return normalize(x.float())


def normalize(pictures: Tensor) -> Tensor:
    """Grey levels 0..255 to [-1, 1], in place for floats: mean and deviation 0.5 of ToTensor's [0, 1]."""
    return _from_middle(pictures.sub_(MIDDLE), pictures)


def _from_middle(levels: Tensor, out: Tensor) -> Tensor:
    """Normalises grey levels of which MIDDLE was taken off, in one pass: (level - 127.5) / 127.5 to within 1e-7."""
    return torch.add(torch.tensor(HALF_LEVEL), levels, alpha=1 / 127.5, out=out)


@dataclass(frozen=True)
class EvalTransform:
    """What an evaluation sees: the whole picture, resized to a square.

    Attributes:
        img_size: side of the square, in pixels.
    """

    img_size: int

    #: Uniform numbers that one picture takes.
    num_draws = 0

    def batch(self, pictures: Tensor, draws: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 and (B, num_draws) -> (B, 3, img_size, img_size) float32 in [-1, 1]."""
        return resize(pictures, self.img_size)

    def picture(self, picture: Image.Image, draws: Tensor) -> Tensor:
        """One decoded picture and (num_draws,) -> (3, img_size, img_size) uint8."""
        picture = picture.resize((self.img_size, self.img_size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def complete(self, pictures: Tensor) -> Tensor:
        """A batch of what ``picture`` gives, made what ``batch`` gives."""
        return normalize(pictures.float())


@dataclass(frozen=True)
class TrainTransform(EvalTransform):
    """What an update sees: a random crop, resized to a square and, if ``hflip``, mirrored half of the time."""

    hflip: bool = False

    num_draws = NUM_DRAWS

    def batch(self, pictures: Tensor, draws: Tensor) -> Tensor:
        """As ``EvalTransform.batch``, of a crop of each picture; ``draws`` are on the CPU."""
        boxes = crop_boxes(draws, *pictures.shape[2:])
        mirrored = to_device(flips(draws), pictures.device) if self.hflip else None
        return resized_crop(pictures, boxes, self.img_size, mirrored)

    def picture(self, picture: Image.Image, draws: Tensor) -> Tensor:
        """As ``EvalTransform.picture``, of a crop of the picture."""
        top, left, height, width = crop_boxes(draws[None], picture.height, picture.width)[0].tolist()
        x = super().picture(picture.crop((left, top, left + width, top + height)), draws)
        return x.flip(2) if self.hflip and flips(draws[None])[0] else x
