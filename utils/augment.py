"""Random crops, resizing and normalisation, a whole batch at once on the device that trains.

The crops follow torchvision's ``RandomResizedCrop`` and the resize follows Pillow's bilinear filter
(a triangle as wide as the reduction, so that it does not alias), as the reference's transforms do.
Every random number comes in as an argument: this module draws none and reads no files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SCALE = (0.05, 1.0)  # share of the picture's area
RATIO = (3 / 4, 4 / 3)  # width / height
NUM_TRIES = 10
CHUNK = 16  # pictures that a CPU resizes at once: what stays in its cache
PILLOW_ONE = 2**22  # Pillow's weights are whole multiples of 1 / PILLOW_ONE
#: Uniform numbers that one training picture takes: four a try, and one that decides on the flip.
NUM_DRAWS = 4 * NUM_TRIES + 1


def crop_boxes(draws: Tensor, height: Tensor | int, width: Tensor | int) -> Tensor:
    """RandomResizedCrop's boxes: ten tries, then the largest centre crop of an allowed ratio.

    Args:
        draws: (B, NUM_DRAWS) uniform in [0, 1), float64.
        height, width: of the pictures in pixels, (B,) or one for all.

    Returns:
        (B, 4) whole pixels: top, left, height, width.
    """
    size = len(draws)
    height = torch.as_tensor(height, device=draws.device).expand(size)
    width = torch.as_tensor(width, device=draws.device).expand(size)
    u = draws[:, : 4 * NUM_TRIES].view(size, NUM_TRIES, 4)
    area = (height * width)[:, None] * (SCALE[0] + u[..., 0] * (SCALE[1] - SCALE[0]))
    ratio = torch.exp(math.log(RATIO[0]) + u[..., 1] * (math.log(RATIO[1]) - math.log(RATIO[0])))
    w = torch.round(torch.sqrt(area * ratio)).long()
    h = torch.round(torch.sqrt(area / ratio)).long()
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    top = (u[..., 2] * (height[:, None] - h + 1)).long()
    left = (u[..., 3] * (width[:, None] - w + 1)).long()
    boxes = torch.stack((top, left, h, w), dim=-1)  # (B, NUM_TRIES, 4)
    first = fits.int().argmax(dim=1)
    chosen = boxes[torch.arange(size, device=draws.device), first]
    return torch.where(fits.any(dim=1)[:, None], chosen, _centre_boxes(height, width))


def _centre_boxes(height: Tensor, width: Tensor) -> Tensor:
    ratio = width / height
    h = torch.where(ratio < RATIO[0], torch.round(width / RATIO[0]).long(), height)
    w = torch.where(ratio > RATIO[1], torch.round(height * RATIO[1]).long(), width)
    return torch.stack(((height - h) // 2, (width - w) // 2, h, w), dim=-1)


def flips(draws: Tensor) -> Tensor:
    """Which pictures to mirror: (B, NUM_DRAWS) -> (B,) bool, each with probability 1/2."""
    return draws[:, -1] < 0.5


def resize_weights(start: Tensor, length: Tensor, size: int, out_size: int, dtype: torch.dtype) -> Tensor:
    """The bilinear filter along one axis, as a matrix.

    Args:
        start, length: (B,) the part of the axis that is kept, in pixels.
        size: length of the whole axis in pixels.
        out_size: pixels to make of the part.
        dtype: of the result; float32 has all digits of Pillow's weights.

    Returns:
        (B, out_size, size); each row sums to 1, but for Pillow's rounding, and is zero outside the part.
    """
    start, length = start[:, None, None].to(dtype), length[:, None, None].to(dtype)
    scale = length / out_size
    centre = (torch.arange(out_size, dtype=dtype, device=start.device)[:, None] + 0.5) * scale  # (B, out_size, 1)
    pixel = torch.arange(size, dtype=dtype, device=start.device) + (0.5 - start)  # (B, 1, size)
    weights = (pixel - centre).abs_().mul_(-1 / scale.clamp(min=1)).add_(1).clamp_(min=0)
    weights.mul_((pixel > 0) & (pixel < length))
    weights.div_(weights.sum(dim=-1, keepdim=True))
    return weights.mul_(PILLOW_ONE).add_(0.5).floor_().mul_(1 / PILLOW_ONE)


def exact_dtype(device: torch.device) -> torch.dtype:
    """The type in which a picture's products with Pillow's weights have no rounding error: 8 + 22 bits."""
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def whole_levels(x: Tensor) -> Tensor:
    """Rounds grey levels in place, halves up, as Pillow does after each of its two passes.

    The horizontal pass comes first; Pillow 13 turns that round for some pictures that lose height.
    """
    return x.add_(0.5).floor_()


def resized_crop(pictures: Tensor, boxes: Tensor, out_size: int, mirrored: Tensor | None = None) -> Tensor:
    """Cuts a box out of each picture and resizes it to a square, in float32.

    Two small matrix products a picture, one an axis.  Their last digits now and then (a few pixels in a
    thousand) round a value that lies between two grey levels to the other one than Pillow; after both
    passes that is two levels at most.

    Args:
        pictures: (B, 3, H, W) uint8.
        boxes: (B, 4) top, left, height, width in pixels.
        out_size: side of the result in pixels.
        mirrored: (B,) bool, pictures to flip left to right.

    Returns:
        (B, 3, out_size, out_size) float32 in [-1, 1].
    """
    top, left, height, width = boxes.unbind(dim=1)
    rows = resize_weights(top, height, pictures.shape[2], out_size, torch.float32)  # (B, out, H)
    cols = resize_weights(left, width, pictures.shape[3], out_size, torch.float32)  # (B, out, W)
    if mirrored is not None:
        cols = torch.where(mirrored[:, None, None], cols.flip(1), cols)
    out = torch.empty(len(pictures), 3, out_size, out_size, device=pictures.device)
    size = CHUNK if pictures.device.type == "cpu" else len(pictures)
    for part in zip(*(x.split(size) for x in (out, pictures, rows, cols))):
        _crop_into(*part)
    return out


def _crop_into(out: Tensor, pictures: Tensor, rows: Tensor, cols: Tensor) -> None:
    half = torch.full((), 0.5, device=out.device)  # rounds, together with floor_
    x = torch.baddbmm(half, pictures.float().flatten(1, 2), cols.transpose(1, 2)).floor_()  # (B, 3 * H, out)
    x = x.unflatten(1, (3, -1)).flatten(0, 1)  # (B * 3, H, out)
    x = torch.baddbmm(half, rows.repeat_interleave(3, dim=0), x).floor_()  # (B * 3, out, out)
    torch.sub(x.view(out.shape).mul_(1 / 127.5), 1, out=out)


def resize(pictures: Tensor, out_size: int) -> Tensor:
    """Resizes whole pictures: (B, 3, H, W) uint8 -> (B, 3, out_size, out_size) float32 in [-1, 1].

    Unlike crops, which training draws anew each time, these are Pillow's to the bit.
    """
    if pictures.shape[2:] == (out_size, out_size):
        return normalize(pictures.float())
    dtype, zero = exact_dtype(pictures.device), torch.zeros(1, dtype=torch.long, device=pictures.device)
    rows = resize_weights(zero, zero + pictures.shape[2], pictures.shape[2], out_size, dtype)[0]  # (out, H)
    cols = resize_weights(zero, zero + pictures.shape[3], pictures.shape[3], out_size, dtype)[0]  # (out, W)
    return normalize(whole_levels(rows @ whole_levels(pictures.to(dtype) @ cols.T)).float())


def normalize(pictures: Tensor) -> Tensor:
    """Grey levels 0..255 to [-1, 1], in place for floats: mean and deviation 0.5 of ToTensor's [0, 1]."""
    return pictures.mul_(1 / 127.5).sub_(1)


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
        """As ``EvalTransform.batch``, of a crop of each picture; ``draws`` may stay on the CPU."""
        boxes = crop_boxes(draws, *pictures.shape[2:]).to(pictures.device, non_blocking=True)
        mirrored = flips(draws).to(pictures.device, non_blocking=True) if self.hflip else None
        return resized_crop(pictures, boxes, self.img_size, mirrored)

    def picture(self, picture: Image.Image, draws: Tensor) -> Tensor:
        """As ``EvalTransform.picture``, of a crop of the picture."""
        top, left, height, width = crop_boxes(draws[None], picture.height, picture.width)[0].tolist()
        x = super().picture(picture.crop((left, top, left + width, top + height)), draws)
        return x.flip(2) if self.hflip and flips(draws[None])[0] else x
