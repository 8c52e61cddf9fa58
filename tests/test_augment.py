"""Crops and resizing against torchvision and Pillow, whose images the reference trained on."""

import itertools

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as TF
from torchvision.transforms import v2

from utils import augment

GREY_LEVEL = 1 / 127.5
#: The installed Pillow takes the vertical pass first where much height is lost (Pillow #9549).
CHOOSES_ORDER = int(PIL.__version__.split(".")[0]) >= 13


def draw(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, augment.NUM_DRAWS, generator=generator, dtype=torch.float64)


def make_images(kind, height, width, count=6):
    generator = torch.Generator().manual_seed(0)
    if kind == "random":
        return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return smooth.clamp(0, 255).round().byte()


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def by_pillow(images, boxes, out_size):
    """The reference's transforms, given the boxes that it drew."""
    square, bilinear = [out_size, out_size], TF.InterpolationMode.BILINEAR
    crops = (TF.resized_crop(to_pil(x), *box, square, bilinear) for x, box in zip(images, boxes.tolist()))
    return torch.stack([TF.normalize(TF.to_tensor(x), [0.5] * 3, [0.5] * 3) for x in crops])


def grey_levels_off(got, expected):
    """Returns how far two batches are apart on average; no value may be off by more than one level.

    Pillow rounds to whole levels after each of its two passes, half a level at most each time, and so do we: in
    whichever order, both are less than one level away from the exact value, so less than two, which is at most
    one, from each other.
    """
    assert got.shape == expected.shape
    assert got.dtype == torch.float32
    off = (got - expected).abs() / GREY_LEVEL
    assert off.max() <= 1.001
    return off.mean().item()


# ---- boxes ----


def torchvision_boxes(height, width, count):
    torch.manual_seed(1)
    image = torch.empty(3, height, width)
    params = transforms.RandomResizedCrop.get_params
    return torch.tensor([params(image, scale=(0.05, 1.0), ratio=(3 / 4, 4 / 3)) for _ in range(count)])


def largest_gap(a, b):
    """The Kolmogorov-Smirnov statistic: how far apart two samples' distribution functions get."""
    values = np.union1d(a, b)
    below_a, below_b = (np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (a, b))
    return np.abs(below_a - below_b).max()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 64), (90, 30)])
def test_boxes_are_distributed_as_torchvisions(height, width):
    ours, theirs = augment.crop_boxes(draw(20_000), height, width), torchvision_boxes(height, width, 4_000)
    # A greater gap between samples of one distribution has a probability of 1e-4.
    limit = 2.23 * (1 / len(ours) + 1 / len(theirs)) ** 0.5
    for measure in (
        lambda top, left, h, w: h * w,
        lambda top, left, h, w: w / h,
        lambda top, left, h, w: h,
        lambda top, left, h, w: w,
        lambda top, left, h, w: top,
        lambda top, left, h, w: left,
        lambda top, left, h, w: (top + 0.5) / (height - h + 1),
        lambda top, left, h, w: (left + 0.5) / (width - w + 1),
    ):
        a, b = (measure(*boxes.numpy().T.astype(float)) for boxes in (ours, theirs))
        assert largest_gap(a, b) < limit
        assert a.mean() == pytest.approx(b.mean(), abs=4 * b.std() / len(b) ** 0.5)


def test_boxes_lie_inside_the_image_and_reach_its_edges():
    for height, width in ((32, 32), (7, 5), (30, 90), (300, 200)):
        top, left, h, w = augment.crop_boxes(draw(5_000), height, width).unbind(1)
        assert min(top.min(), left.min()) == 0
        assert min(h.min(), w.min()) >= 1
        assert ((top + h).max(), (left + w).max()) == (height, width)


def test_extreme_images_fall_back_to_torchvisions_centre_crop():
    for height, width, box in (
        (5, 200, (0, 96, 5, 7)),
        (200, 5, (96, 0, 7, 5)),
        (1, 300, (0, 149, 1, 1)),
        (300, 1, (149, 0, 1, 1)),
    ):
        assert set(map(tuple, torchvision_boxes(height, width, 3).tolist())) == {box}
        assert set(map(tuple, augment.crop_boxes(draw(50), height, width).tolist())) == {box}


def test_the_tenth_try_counts_and_an_eleventh_does_not_exist():
    draws = torch.zeros(2, augment.NUM_DRAWS, dtype=torch.float64)
    too_tall = torch.tensor([1.0, 0.0, 0.0, 0.0])  # all of the area, at a ratio of 3/4
    draws[:, :40] = too_tall.repeat(10)
    draws[0, 36:40] = torch.tensor([0.2, 0.5, 0.0, 0.0])
    boxes = augment.crop_boxes(draws, 32, 32)
    side = round((0.24 * 32 * 32) ** 0.5)
    assert boxes.tolist() == [[0, 0, side, side], [0, 0, 32, 32]]


def test_half_of_the_images_are_mirrored_whatever_their_boxes():
    draws = draw(20_000)
    mirrored = augment.flips(draws)
    assert mirrored.dtype == torch.bool
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.015)
    areas = augment.crop_boxes(draws, 32, 32)[:, 2:].prod(dim=1).float()
    assert areas[mirrored].mean().item() == pytest.approx(areas[~mirrored].mean().item(), rel=0.03)


# ---- pixels ----

SHAPES = [(32, 32), (48, 37), (37, 48), (90, 120)]
OUT_SIZES = [8, 32, 112, 224]
#: (height, width, side) about the edges of Pillow 13's rule, by which of its passes comes first.
VERTICAL_FIRST = [(120, 60, 112), (48, 37, 32), (96, 64, 48), (97, 72, 48), (33, 32, 32), (33, 20, 32)]
HORIZONTAL_FIRST = [(96, 72, 48), (32, 20, 32), (31, 10, 32), (64, 64, 32), (64, 300, 32), (90, 120, 32), (4, 60, 32)]
CIFAR = [(32, 32, out_size) for out_size in (32, 56, 64, 224, 384)]


@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_whole_images_are_pillows_to_the_bit(kind):
    cases = [(*shape, out_size) for shape, out_size in itertools.product(SHAPES, OUT_SIZES)]
    for height, width, out_size in cases + HORIZONTAL_FIRST + VERTICAL_FIRST + CIFAR:
        images = make_images(kind, height, width)
        expected = by_pillow(images, torch.tensor([[0, 0, height, width]] * len(images)), out_size)
        off = grey_levels_off(augment.resize(images, out_size), expected)
        assert off < (1e-3 if CHOOSES_ORDER else 0.3), (height, width, out_size)


@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_crops_are_within_one_grey_level_of_pillows(kind):
    """Enlarged ones but for ties; of reduced ones those differ more of which Pillow takes the height first."""
    for height, width in [*SHAPES, (120, 60), (64, 300)]:
        images = make_images(kind, height, width)
        boxes = augment.crop_boxes(draw(len(images)), height, width)
        for out_size in [*OUT_SIZES, 56, 64, 384] if (height, width) == (32, 32) else [*OUT_SIZES, 48]:
            off = grey_levels_off(augment.resized_crop(images, boxes, out_size), by_pillow(images, boxes, out_size))
            assert off < (0.03 if height <= out_size else 0.3), (height, width, out_size)
    tall, image = torch.tensor([[0, 0, 120, 60]] * 6), make_images("random", 32, 32, count=1)
    images = make_images(kind, 120, 60)
    grey_levels_off(augment.resized_crop(images, tall, 112), augment.resize(images, 112))  # the other order
    for thin in ([0, 0, 1, 1], [5, 7, 1, 20], [2, 0, 30, 2], [31, 31, 1, 1]):
        boxes = torch.tensor([thin])
        grey_levels_off(augment.resized_crop(image, boxes, 24), by_pillow(image, boxes, 24))


def test_only_the_chosen_images_are_mirrored():
    mirrored = torch.tensor([True, False, True, True, False, False])
    for height, width in ((32, 32), (90, 60)):
        images = make_images("random", height, width)
        boxes = augment.crop_boxes(draw(len(images)), height, width)
        got, plain = augment.resized_crop(images, boxes, 20, mirrored), augment.resized_crop(images, boxes, 20)
        expected = torch.where(mirrored[:, None, None, None], plain.flip(3), plain)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        assert (got - plain).abs().max() > 0.1


def test_images_of_the_right_size_keep_every_grey_level():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    before = images.clone()
    whole = torch.tensor([[0, 0, 16, 16]] * 2)
    exact = (images.double() / 255 - 0.5) / 0.5  # ToTensor and Normalize
    for got in (augment.resize(images, 16), augment.resized_crop(images, whole, 16)):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-7)
        assert (got.min(), got.max()) == (-1, 1)
    assert torch.equal(images, before)


def whole_weights(size, out_size):
    """Pillow's weights (size, out_size) as whole numbers, from its source (``precompute_coeffs``), in NumPy."""
    scale = size / out_size
    support = max(scale, 1.0)
    centre = (np.arange(out_size) + 0.5) * scale
    weights = np.maximum(1 - np.abs((np.arange(size)[:, None] + 0.5 - centre) / support), 0)
    return np.floor(weights / weights.sum(axis=0) * 2**22 + 0.5).astype(np.int64)


def hardest_images(weights, count, seed):
    """Levels (count, size), among them 0 and 255 alone, and those that add up what of weights is beyond 11 bits."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 256, (count, len(weights)))
    levels[::4] = levels[::4] // 128 * 255
    low = (weights + 1024) % 2048 - 1024
    levels[1::4] = 255 * (low[:, rng.integers(0, weights.shape[1], len(levels[1::4]))].T > 0)
    return levels


SIZES = [*itertools.product((1, 2, 3, 7, 16, 31, 32, 33, 50, 64, 97), (14, 20, 32, 56, 224)), (256, 224), (433, 14)]


@pytest.mark.parametrize("autocast", [False, True])
def test_levels_are_those_of_whole_numbers_wherever_they_are_computed(autocast):
    """As Pillow has them: (sum + half) >> 22, of widths in crops, of widths and heights in evaluations."""
    for seed, (size, out_size) in enumerate(SIZES):
        weights = whole_weights(size, out_size)
        rows = hardest_images(weights, 3 * out_size, seed)
        expected = torch.from_numpy((rows @ weights + 2**21) >> 22).view(1, 3, out_size, out_size)
        wide = torch.from_numpy(rows).byte().view(1, 3, out_size, size)  # its height stays as it is
        whole = torch.tensor([[0, 0, out_size, size]])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            made = [augment.resized_crop(wide, whole, out_size), augment.resize(wide, out_size)]
            made.append(augment.resize(wide.mT, out_size).mT)
        for got in made:
            assert torch.equal(got.add(1).mul(127.5).round().long(), expected), (size, out_size)


def test_halves_of_weights_fit_what_tf32_keeps_of_a_number():
    for size, out_size in SIZES:
        _, halves = augment.filter_taps(torch.zeros(1, dtype=torch.long), torch.tensor([size]), size, out_size)
        assert not (halves.view(torch.int32) & (2**13 - 1)).any(), (size, out_size)


def test_what_an_evaluation_keeps_serves_a_training():
    images = make_images("random", 23, 29)
    boxes = augment.crop_boxes(draw(len(images)), 23, 29)
    with torch.inference_mode():
        kept = augment.resize(images, 19), augment.resized_crop(images, boxes, 19)
    for x, expected in zip((augment.resize(images, 19), augment.resized_crop(images, boxes, 19)), kept):
        assert torch.equal(x, expected)
        weight = torch.ones((), requires_grad=True)
        (x * weight).sum().backward()
        assert weight.grad == pytest.approx(expected.sum().item(), rel=1e-4)


def test_the_sums_of_rows_without_embedding_bag_are_its_own():
    generator = torch.Generator().manual_seed(0)
    rows, x = torch.randint(0, 9, (20, 3), generator=generator), torch.rand(9, 7, generator=generator)
    weights = torch.rand(20, 3, generator=generator)
    theirs = torch.nn.functional.embedding_bag(rows, x, mode="sum", per_sample_weights=weights)
    torch.testing.assert_close(augment.sum_rows(rows, x, weights), theirs)


def test_long_axes_whose_filters_are_not_kept_have_the_same_ones(monkeypatch):
    start, length = torch.tensor([0, 3, 19, 5]), torch.tensor([20, 10, 1, 9])
    kept = [augment.filter_taps(start, length, 20, out_size) for out_size in (7, 20, 33)]
    monkeypatch.setattr(augment, "TABLE_PX", 19)
    for out_size, expected in zip((7, 20, 33), kept):
        assert all(map(torch.equal, augment.filter_taps(start, length, 20, out_size), expected))


# ---- transforms ----

JITTER = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4), v2.RandomErasing(0.5)])


@pytest.mark.parametrize(
    "transform",
    [augment.EvalTransform(20), *(augment.TrainTransform(20, x) for x in (False, True)),
     augment.TrainTransform(20, True, v2.RandomHorizontalFlip())],
)  # fmt: skip
def test_a_transform_gives_the_same_for_a_batch_and_for_one_decoded_image_at_a_time(transform):
    for height, width in ((32, 32), (40, 24)):
        images = make_images("random", height, width)
        draws = draw(len(images))[:, : transform.num_draws]
        batch = transform.batch(images, draws)
        assert batch.shape == (6, 3, 20, 20)
        single = torch.stack([transform.image(to_pil(x), d) for x, d in zip(images, draws)])
        grey_levels_off(batch, transform.complete(single))


def test_a_training_image_is_cropped_mirrored_if_asked_and_an_evaluations_is_whole():
    images, draws = make_images("random", 32, 32), draw(6)
    mirrored, boxes = augment.flips(draws), augment.crop_boxes(draws, 32, 32)
    assert 0 < mirrored.sum() < 6
    for hflip, flipped in ((True, mirrored), (False, None)):
        expected = augment.resized_crop(images, boxes, 20, flipped)
        assert torch.equal(augment.TrainTransform(20, hflip).batch(images, draws), expected)
    assert torch.equal(augment.EvalTransform(20).batch(images, draws[:, :0]), augment.resize(images, 20))


def test_an_augmentation_depends_on_each_images_draws_alone():
    images, draws = make_images("smooth", 32, 32, count=1).repeat(6, 1, 1, 1), draw(6)
    draws[:, :-1] = draws[0, :-1]  # six times the same crop
    plain, transform = augment.TrainTransform(20), augment.TrainTransform(20, augmentation=JITTER)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    batch = transform.batch(images, draws)
    assert torch.equal(torch.rand(3), expected)  # dropout's generator is left alone
    assert len(batch.unique(dim=0)) == 6
    assert -1 <= batch.min() < batch.max() <= 1
    assert torch.equal(transform.batch(images[2:4], draws[2:4]), batch[2:4])
    nothing = augment.TrainTransform(20, augmentation=lambda x: x)
    torch.testing.assert_close(nothing.batch(images, draws), plain.batch(images, draws), rtol=0, atol=1e-6)
    with pytest.raises(TypeError, match="float32"):
        augment.TrainTransform(20, augmentation=lambda x: x / 255).batch(images, draws)
