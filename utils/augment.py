"""Random crops, resizing and normalisation, a whole batch at once on the device that trains.

The crops follow torchvision's ``RandomResizedCrop`` and the resize follows Pillow's bilinear filter
(a triangle as wide as the reduction, so that it does not alias), as the reference's transforms do.
Every random number comes in as an argument: this module draws none and reads no files.  An augmentation goes into
``TrainTransform``, which seeds the one it is given.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.hardware import to_device

SCALE = (0.05, 1.0)  # share of the image's area
RATIO = (3 / 4, 4 / 3)  # width / height
NUM_TRIES = 10
#: Values that are finished at once: on a CPU as many as stay in its cache, elsewhere many, for few launches.
CHUNK_VALUES, CHUNK_VALUES_ELSEWHERE = 8 * 3 * 224**2, 512 * 3 * 224**2
TABLE_PX = 256  # filter weights of axes up to this length are computed once
MIDDLE = 128  # of the grey levels
HALF_LEVEL = (MIDDLE - 127.5) / 127.5  # what MIDDLE itself is normalised to
#: Pillow's weights are whole multiples of UNIT**2: ``hi + UNIT * lo``, both whole multiples of UNIT (``_resample``).
UNIT = 2.0**-11
#: Uniform numbers of one training image: four a try, and one that decides on the flip and seeds the augmentation.
NUM_DRAWS = 4 * NUM_TRIES + 1


def crop_boxes(draws: Tensor, height: int, width: int) -> Tensor:
    """Returns RandomResizedCrop's boxes: ten tries, then the largest centre crop of an allowed ratio.

    In NumPy, on the CPU: so few numbers take as long as it takes to call each function.

    Args:
        draws: (B, NUM_DRAWS) uniform in [0, 1), float64, on the CPU.
        height, width: of the images, in pixels.

    Returns:
        (B, 4) whole pixels: top, left, height, width.
    """
    size = len(draws)
    u = draws[:, : 4 * NUM_TRIES].numpy().reshape(size, NUM_TRIES, 4)
    area = height * width * (SCALE[0] + u[..., 0] * (SCALE[1] - SCALE[0]))
    ratio = _ratios(u[..., 1])
    w, h = (np.round(np.sqrt(x)).astype(np.int64) for x in (area * ratio, area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top = (u[..., 2] * (height - h + 1)).astype(np.int64)
    left = (u[..., 3] * (width - w + 1)).astype(np.int64)
    boxes = np.stack((top, left, h, w), axis=-1)  # (B, NUM_TRIES, 4)
    chosen = boxes[np.arange(size), fits.argmax(axis=1)]
    chosen[~fits.any(axis=1)] = _centre_box(height, width)
    return torch.from_numpy(chosen)


def crop_box(draws: Tensor, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns ``crop_boxes`` of one image, whose draws are (NUM_DRAWS,): six times as fast, for most need one try."""
    u = draws[: 4 * NUM_TRIES].numpy().reshape(NUM_TRIES, 4)
    ratios = _ratios(u[:, 1]).tolist()  # by NumPy's exp, which may not be the math module's
    for (share, _, down, right), ratio in zip(u.tolist(), ratios):
        area = height * width * (SCALE[0] + share * (SCALE[1] - SCALE[0]))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    return _centre_box(height, width)


def _ratios(u: np.ndarray) -> np.ndarray:
    """Turns uniform numbers into width / height."""
    return np.exp(math.log(RATIO[0]) + u * (math.log(RATIO[1]) - math.log(RATIO[0])))


def _centre_box(height: int, width: int) -> tuple[int, int, int, int]:
    h = round(width / RATIO[0]) if width / height < RATIO[0] else height
    w = round(height * RATIO[1]) if width / height > RATIO[1] else width
    return (height - h) // 2, (width - w) // 2, h, w


def flips(draws: Tensor) -> Tensor:
    """Chooses the images to mirror: (B, NUM_DRAWS) -> (B,) bool, each with probability 1/2."""
    return draws[:, -1] < 0.5


def filter_taps(start: Tensor, length: Tensor, size: int, out_size: int) -> tuple[Tensor, Tensor]:
    """Returns the bilinear filter along one axis: the pixels that make each new pixel, and their weights.

    Args:
        start, length: (B,) the extent of the crops along the axis, in pixels.
        size: length of the whole axis in pixels.
        out_size: pixels to make of each.

    Returns:
        Indices (B, taps, out_size) and Pillow's weights in halves (B, taps, 2, out_size), float32; 2 taps if nothing
        can be reduced.
    """
    if size > TABLE_PX:
        pixel, halves = _taps_of(length, size, out_size)
    else:
        at = length - 1
        pixel, halves = (table[at] for table in _tap_table(size, out_size, length.device))
    return pixel + start[:, None, None], halves


@functools.lru_cache(maxsize=8)
def _tap_table(size: int, out_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the taps of every length from 1 to ``size``: the crops of small images share them."""
    return _taps_of(torch.arange(1, size + 1, device=device), size, out_size)


def _taps_of(length: Tensor, size: int, out_size: int) -> tuple[Tensor, Tensor]:
    """As ``filter_taps``, of crops that start at 0."""
    device, dtype = length.device, torch.float64
    length = length[:, None].to("cpu" if device.type == "mps" else device, dtype)  # MPS has no float64
    scale = length / out_size
    support = scale.clamp(min=1)
    # The middle of each new pixel, in pixels right of the middle of the crop's first: (B, out_size)
    centre = (torch.arange(out_size, dtype=dtype, device=length.device) + 0.5) * scale - 0.5
    num_taps = 2 if size <= out_size else 2 * math.ceil(size / out_size) + 1  # no more lie within the support
    first = (centre - support).floor() + 1
    # Taps lie before pixels in memory: long rows are what vector instructions are for.
    tap = first[:, None] + torch.arange(num_taps, dtype=dtype, device=length.device)[:, None]  # (B, taps, out_size)
    weights = (1 - (tap - centre[:, None]).abs_().div_(support[:, None])).clamp_(min=0)
    weights.mul_((tap >= 0) & (tap < length[:, None]))
    whole = weights.div_(weights.sum(dim=1, keepdim=True)).div_(UNIT**2).add_(0.5).floor_().float()
    hi = whole.mul(UNIT).round_()
    halves = torch.stack((hi, torch.sub(whole, hi, alpha=1 / UNIT)), dim=2).mul_(UNIT)
    return torch.minimum(tap.clamp_(min=0), length[:, None] - 1).long().to(device), halves.to(device)


def as_matrix(pixel: Tensor, halves: Tensor, size: int) -> Tensor:
    """Turns the taps of an axis of ``size`` pixels into matrices (B, size, 2, out_size)."""
    zeros = halves.new_zeros(len(pixel), size, *halves.shape[2:])
    return zeros.scatter_add_(1, pixel[:, :, None].expand_as(halves), halves)


@functools.lru_cache(maxsize=8)
def _matrix_of_all(size: int, out_size: int, device: torch.device) -> Tensor:
    """Returns the matrix (size, 2, out_size) that resizes a whole axis."""
    return as_matrix(*_taps_of(torch.full((1,), size, device=device), size, out_size), size)[0]


def _resample(x: Tensor, matrix: Tensor, along: int = -1) -> Tensor:
    """Resizes one axis of grey levels and rounds them, halves up, as Pillow does after each of its two passes.

    Exact, but in float32, for some devices have little or no float64.  A level has 8 bits and a weight 22; half a
    weight has 11, or is 1, so a product of the two is exact, in TF32 as well.  All sums are whole multiples of UNIT,
    and less than 2**24 of them (of ``lo``, as long as no axis shrinks more than 31 times), so their order does not
    matter.  ``hi + UNIT * lo`` would need 30 bits and is rounded in two steps: ``hi + 0.5`` is a whole multiple of
    UNIT, so the whole number below the sum stays the same if ``UNIT * lo`` is first rounded down to such a multiple.

    Args:
        x: (..., H, W), whole numbers from 0 to 255.
        matrix: of the axis, as ``as_matrix`` returns it: (n, 2, out), or (B, n, 2, out) if x is (B, H, W).
        along: the axis, -2 or -1.
    """
    with torch.autocast(x.device.type, enabled=False):  # half precision has too few bits, wherever the caller is
        sums = x @ matrix.flatten(-2) if along == -1 else matrix.flatten(-2).mT @ x
    hi, lo = sums.chunk(2, along)
    return torch.add(hi, lo.floor_(), alpha=UNIT).add_(0.5).floor_()


def resized_crop(images: Tensor, boxes: Tensor, out_size: int, mirrored: Tensor | None = None) -> Tensor:
    """Cuts a box out of each image and resizes it to a square, in float32.

    Every value is within one grey level of Pillow's.  The width comes first: a small matrix product, as exact as
    Pillow's integers.  The height, where most of the work is, follows in plain float32, which may round a value
    between two grey levels to the other one.  Pillow 13 takes the height first where ``resize`` does, which moves
    some values of such crops by a level.

    Args:
        images: (B, 3, H, W) uint8.
        boxes: (B, 4) top, left, height, width in pixels; best on the CPU, where nobody has to wait for them.
        out_size: side of the result in pixels.
        mirrored: (B,) bool, images to flip left to right.

    Returns:
        (B, 3, out_size, out_size) float32 in [-1, 1].
    """
    top, left, height, width = to_device(boxes, images.device).unbind(dim=1)
    in_height, in_width = images.shape[2:]
    pixel, halves = filter_taps(top, height, in_height, out_size)
    weights = torch.add(halves[:, :, 0], halves[:, :, 1], alpha=UNIT)  # (B, taps, out)
    cols = as_matrix(*filter_taps(left, width, in_width, out_size), in_width)  # (B, W, 2, out)
    if mirrored is not None:
        cols = torch.where(mirrored[:, None, None, None], cols.flip(3), cols)
    out = torch.empty(len(images), 3, out_size, out_size, device=images.device)
    values = CHUNK_VALUES if out.device.type == "cpu" else CHUNK_VALUES_ELSEWHERE
    size = max(1, values // (3 * max(out_size**2, in_height * in_width)))
    for chunk in zip(*(x.split(size) for x in (out, images, cols, pixel, weights))):
        _crop_into(*chunk)
    return out


def _crop_into(out: Tensor, images: Tensor, cols: Tensor, pixel: Tensor, weights: Tensor) -> None:
    x = _resample(images.float().flatten(1, 2), cols)  # (B, 3 * H, out)
    # The second rounding's 0.5 and normalize's -MIDDLE are added here, where there are fewer values: the weights sum
    # to 1, but for Pillow's rounding of each.
    x = x.add_(0.5 - MIDDLE).unflatten(1, (3, -1))  # (B, 3, H, out)
    x = _weigh_rows(x, pixel, weights)  # (B, 3, out, out)
    _from_middle(x.floor_(), out)


def _weigh_rows(x: Tensor, pixel: Tensor, weights: Tensor) -> Tensor:
    """Sums rows of (B, C, H, W), chosen and weighted by (B, taps, out), into new ones: (B, C, out, W)."""
    size, channels, height, width = x.shape
    first = torch.arange(0, size * channels * height, height, device=x.device).view(size, channels, 1, 1)
    rows = (first + pixel.mT[:, None]).flatten(0, 2)  # (B * C * out, taps)
    weights = weights.mT[:, None].expand(-1, channels, -1, -1).flatten(0, 2)
    x = x.reshape(-1, width)
    if x.device.type == "mps":  # it has no embedding_bag up to torch 2.9
        x = sum_rows(rows, x, weights)
    else:
        x = F.embedding_bag(rows, x, mode="sum", per_sample_weights=weights)
    return x.view(size, channels, -1, width)


def sum_rows(rows: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """Does what ``F.embedding_bag`` does for sums: (N, taps) rows of ``x`` (M, W), weighted, give (N, W)."""
    return (x[rows] * weights[:, :, None]).sum(dim=1)


def resize(images: Tensor, out_size: int) -> Tensor:
    """Resizes whole images: (B, 3, H, W) uint8 -> (B, 3, out_size, out_size) float32 in [-1, 1].

    They are Pillow 13's to the bit.  It takes the width first, but the height of images that lose more than twice as
    many rows as columns (Pillow #9549, ``ImagingResampleInner``).
    """
    height, width = images.shape[2:]
    if height == width == out_size:
        return normalize(images.float())
    x = images.float()
    rows, cols = (_matrix_of_all(side, out_size, x.device) for side in (height, width))
    if height - out_size > 2 * max(width - out_size, 0):
        return normalize(_resample(_resample(x, rows, -2), cols))
    return normalize(_resample(_resample(x, cols), rows, -2))


def normalize(images: Tensor) -> Tensor:
    """Scales grey levels 0..255 to [-1, 1], in place for floats: mean and deviation 0.5 of ToTensor's [0, 1]."""
    return _from_middle(images.sub_(MIDDLE), images)


def _from_middle(levels: Tensor, out: Tensor) -> Tensor:
    """Normalises grey levels of which MIDDLE was taken off, in one pass: (level - 127.5) / 127.5 to within 1e-7."""
    return torch.add(torch.tensor(HALF_LEVEL), levels, alpha=1 / 127.5, out=out)


@dataclass(frozen=True)
class EvalTransform:
    """Makes the model's input for evaluations: the whole image, resized to a square.

    Attributes:
        img_size: side of the square, in pixels.
    """

    img_size: int

    #: Uniform numbers that one image takes.
    num_draws = 0

    def batch(self, images: Tensor, draws: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 and (B, num_draws) -> (B, 3, img_size, img_size) float32 in [-1, 1]."""
        return resize(images, self.img_size)

    def image(self, image: Image.Image, draws: Tensor) -> Tensor:
        """One decoded image and (num_draws,) -> (3, img_size, img_size) uint8."""
        image = image.resize((self.img_size, self.img_size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def part(self, draws: Tensor) -> Callable[[int, int], tuple[int, int, int, int]] | None:
        """Returns what chooses a part of an image in a file, by its height and width; None where all is read."""
        return None

    def finish(self, part: Tensor, draws: Tensor) -> Tensor:
        """Makes what ``image`` returns of such a part, resized to (3, img_size, img_size) uint8."""
        return part

    def complete(self, images: Tensor) -> Tensor:
        """Turns a batch of what ``image`` returns into what ``batch`` returns."""
        return normalize(images.float())


@dataclass(frozen=True)
class TrainTransform(EvalTransform):
    """Makes the model's input for training: a random crop, resized to a square, mirrored and augmented if asked for.

    Attributes:
        hflip: mirror half of the images.
        augmentation: a transform of torchvision.transforms.v2, or any function, that takes and returns one image
            (3, img_size, img_size) uint8 and takes its random numbers from torch: it sees each image after crop and
            flip, with a generator seeded by that image's draws.
        in_parts: of images in files no more need be read than ``part`` chooses.
    """

    hflip: bool = False
    augmentation: Callable[[Tensor], Tensor] | None = None
    in_parts: bool = False

    num_draws = NUM_DRAWS

    def batch(self, images: Tensor, draws: Tensor) -> Tensor:
        """As ``EvalTransform.batch``, of a crop of each image; ``draws`` are on the CPU."""
        boxes = crop_boxes(draws, *images.shape[2:])
        mirrored = to_device(flips(draws), images.device) if self.hflip else None
        x = resized_crop(images, boxes, self.img_size, mirrored)
        if self.augmentation is None:
            return x
        levels = x.add_(1).mul_(127.5).round_().byte()
        return self.complete(torch.stack([self._augment(*pair) for pair in zip(levels, draws)]))

    def image(self, image: Image.Image, draws: Tensor) -> Tensor:
        """As ``EvalTransform.image``, of a crop of the image."""
        top, left, height, width = crop_box(draws, image.height, image.width)
        return self.finish(super().image(image.crop((left, top, left + width, top + height)), draws), draws)

    def part(self, draws: Tensor) -> Callable[[int, int], tuple[int, int, int, int]] | None:
        """As ``EvalTransform.part``: the crop's top, left, height and width in pixels."""
        return functools.partial(crop_box, draws) if self.in_parts else None

    def finish(self, part: Tensor, draws: Tensor) -> Tensor:
        """As ``EvalTransform.finish``: mirrors and augments a crop."""
        return self._augment(part.flip(2) if self.hflip and flips(draws[None])[0] else part, draws)

    def _augment(self, image: Tensor, draws: Tensor) -> Tensor:
        """Applies ``augmentation`` to (3, S, S) uint8, with random numbers that depend on ``draws`` alone."""
        if self.augmentation is None:
            return image
        with torch.random.fork_rng([image.device] if image.is_cuda else []):
            torch.manual_seed(int(draws[-1] * 2**53))  # torch takes the low bits; the flip took the highest
            augmented = self.augmentation(image)
        if augmented.shape != image.shape or augmented.dtype != image.dtype:
            raise TypeError(f"an augmentation made {augmented.dtype} {tuple(augmented.shape)} of a uint8 image")
        return augmented
