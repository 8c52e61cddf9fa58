"""Crops and resizing against torchvision and Pillow, whose pictures the reference trained on."""

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as TF

from utils import augment

GREY_LEVEL = 1 / 127.5
#: Whether the installed Pillow takes the vertical pass first where much height is lost (Pillow #9549).
CHOOSES_ORDER = int(PIL.__version__.split(".")[0]) >= 13


def draw(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, augment.NUM_DRAWS, generator=generator, dtype=torch.float64)


def make_pictures(kind, height, width, count=6):
    generator = torch.Generator().manual_seed(0)
    if kind == "random":
        return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return smooth.clamp(0, 255).round().byte()


def pillow_pipeline(picture, box, out_size):
    """The reference's transforms, given the box that it drew."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    image = TF.resized_crop(image, *box, [out_size, out_size], TF.InterpolationMode.BILINEAR)
    return TF.normalize(TF.to_tensor(image), [0.5] * 3, [0.5] * 3)


def grey_levels_off(got, expected):
    """How far two lots of pictures are apart on average; no value may be off by more than one level.

    Pillow rounds to whole levels after each of its two passes, half a level at most each time: nothing that
    computes the same filter is further away than that.
    """
    assert got.shape == expected.shape
    assert got.dtype == torch.float32
    off = (got - expected).abs() / GREY_LEVEL
    assert off.max() <= 1.001
    return off.mean().item()


# ---- boxes ----


def torchvision_boxes(height, width, count):
    torch.manual_seed(1)
    picture = torch.empty(3, height, width)
    params = transforms.RandomResizedCrop.get_params
    return torch.tensor([params(picture, scale=(0.05, 1.0), ratio=(3 / 4, 4 / 3)) for _ in range(count)])


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


@pytest.mark.parametrize(("height", "width"), [(32, 32), (7, 5), (30, 90), (300, 200)])
def test_boxes_lie_inside_the_picture_and_reach_its_edges(height, width):
    top, left, h, w = augment.crop_boxes(draw(5_000), height, width).unbind(1)
    assert min(top.min(), left.min()) == 0
    assert min(h.min(), w.min()) >= 1
    assert (top + h).max() == height
    assert (left + w).max() == width


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(4, 200, (0, 97, 4, 5)), (200, 4, (97, 0, 5, 4)), (1, 300, (0, 149, 1, 1)), (300, 1, (149, 0, 1, 1))],
)
def test_extreme_pictures_fall_back_to_torchvisions_centre_crop(height, width, box):
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


def test_each_picture_of_a_batch_gets_the_box_of_its_own_size():
    draws = draw(4)
    heights, widths = torch.tensor([32, 40, 4, 500]), torch.tensor([32, 64, 200, 333])
    boxes = augment.crop_boxes(draws, heights, widths)
    alone = [augment.crop_boxes(draws[i : i + 1], int(heights[i]), int(widths[i]))[0] for i in range(4)]
    assert torch.equal(boxes, torch.stack(alone))


def test_half_of_the_pictures_are_mirrored_whatever_their_boxes():
    draws = draw(20_000)
    mirrored = augment.flips(draws)
    assert mirrored.dtype == torch.bool
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.015)
    areas = augment.crop_boxes(draws, 32, 32)[:, 2:].prod(dim=1).float()
    assert areas[mirrored].mean().item() == pytest.approx(areas[~mirrored].mean().item(), rel=0.03)


# ---- pixels ----


SHAPES = [(32, 32), (48, 37), (37, 48), (90, 120)]
OUT_SIZES = [8, 32, 112, 224]


@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_resized_crop_gives_pillows_pixels(kind):
    off = []
    for height, width in SHAPES:
        pictures = make_pictures(kind, height, width)
        boxes = augment.crop_boxes(draw(len(pictures)), height, width)
        for out_size in OUT_SIZES:
            expected = [pillow_pipeline(x, box, out_size) for x, box in zip(pictures, boxes.tolist())]
            off.append(grey_levels_off(augment.resized_crop(pictures, boxes, out_size), torch.stack(expected)))
    assert max(off) <= (0.03 if CHOOSES_ORDER else 0.3)


#: Heights, widths and sides about each edge of the rule, and what it says.
ORDERS = [
    ((120, 60), 112, True),
    ((48, 37), 32, True),
    ((96, 64), 48, True),
    ((96, 72), 48, False),  # 48 rows are lost, and twice 24 columns
    ((97, 72), 48, True),
    ((33, 32), 32, True),
    ((33, 20), 32, True),
    ((32, 20), 32, False),
    ((31, 10), 32, False),
    ((64, 64), 32, False),
    ((64, 300), 32, False),
    ((90, 120), 32, False),
]


@pytest.mark.parametrize(("sizes", "out_size", "expected"), ORDERS)
def test_the_vertical_pass_comes_first_where_more_than_twice_as_many_rows_as_columns_are_lost(
    sizes, out_size, expected
):
    assert augment.vertical_first(torch.tensor(sizes), out_size).item() is expected
    if not CHOOSES_ORDER:
        pytest.skip("this Pillow takes the horizontal pass first always")
    pictures = make_pictures("random", *sizes)
    pillows = torch.stack([pillow_pipeline(x, (0, 0, *sizes), out_size) for x in pictures])
    torch.testing.assert_close(augment.resize(pictures, out_size), pillows, rtol=0, atol=1e-6)


def test_the_order_of_the_passes_shows(monkeypatch):
    pictures = make_pictures("random", 120, 60)
    box = torch.tensor([[0, 0, 120, 60]] * len(pictures))
    got = augment.resize(pictures, 112), augment.resized_crop(pictures, box, 112)
    assert grey_levels_off(*got) < 0.03
    monkeypatch.setattr(augment, "vertical_first", lambda sizes, out_size: torch.zeros(sizes.shape[:-1]).bool())
    otherwise = augment.resize(pictures, 112), augment.resized_crop(pictures, box, 112)
    assert grey_levels_off(*otherwise) < 0.03
    assert 0.1 < grey_levels_off(got[0], otherwise[0]) < 0.3


@pytest.mark.parametrize("mirror", [False, True])
def test_each_picture_of_a_batch_takes_its_own_order(mirror):
    height, width, out_size = 90, 70, 48
    pictures = make_pictures("random", height, width, count=40)
    boxes = augment.crop_boxes(draw(len(pictures)), height, width)
    upright = augment.vertical_first(boxes[:, 2:], out_size)
    assert 5 < upright.sum() < 35
    mirrored = torch.arange(len(pictures)) % 3 == 0 if mirror else None
    got = augment.resized_crop(pictures, boxes, out_size, mirrored)
    alone = [
        augment.resized_crop(pictures[i : i + 1], boxes[i : i + 1], out_size, mirrored[i : i + 1] if mirror else None)
        for i in range(len(pictures))
    ]
    assert torch.equal(got, torch.cat(alone))
    if mirror:
        got = torch.where(mirrored[:, None, None, None], got.flip(3), got)
    expected = torch.stack([pillow_pipeline(x, box, out_size) for x, box in zip(pictures, boxes.tolist())])
    assert grey_levels_off(got, expected) < (0.03 if CHOOSES_ORDER else 0.3)


@pytest.mark.parametrize("out_size", [32, 56, 64, 224, 384])
@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_enlarged_crops_of_cifar_sized_pictures_are_pillows_but_for_roundings_of_ties(kind, out_size):
    pictures = make_pictures(kind, 32, 32)
    boxes = augment.crop_boxes(draw(len(pictures)), 32, 32)
    expected = torch.stack([pillow_pipeline(x, box, out_size) for x, box in zip(pictures, boxes.tolist())])
    assert grey_levels_off(augment.resized_crop(pictures, boxes, out_size), expected) < 0.03


@pytest.mark.parametrize("out_size", [32, 56, 64, 224, 384])
@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_whole_pictures_of_cifars_size_are_pillows_to_the_bit(kind, out_size):
    pictures = make_pictures(kind, 32, 32)
    expected = torch.stack([pillow_pipeline(x, (0, 0, 32, 32), out_size) for x in pictures])
    assert grey_levels_off(augment.resize(pictures, out_size), expected) < 1e-3


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (5, 7, 1, 20), (2, 0, 30, 2), (31, 31, 1, 1), (0, 0, 32, 32)])
def test_resized_crop_gives_pillows_pixels_of_thin_boxes(box):
    pictures = make_pictures("random", 32, 32, count=1)
    got = augment.resized_crop(pictures, torch.tensor([box]), 24)
    grey_levels_off(got[0], pillow_pipeline(pictures[0], box, 24))


def test_only_the_chosen_pictures_are_mirrored():
    pictures = make_pictures("random", 32, 32)
    boxes = augment.crop_boxes(draw(len(pictures)), 32, 32)
    mirrored = torch.tensor([True, False, True, True, False, False])
    got, plain = augment.resized_crop(pictures, boxes, 20, mirrored), augment.resized_crop(pictures, boxes, 20)
    expected = torch.where(mirrored[:, None, None, None], plain.flip(3), plain)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert (got - plain).abs().max() > 0.1
    image = Image.fromarray(pictures[0].permute(1, 2, 0).numpy())
    image = TF.hflip(TF.resized_crop(image, *boxes[0].tolist(), [20, 20], TF.InterpolationMode.BILINEAR))
    grey_levels_off(got[0], TF.normalize(TF.to_tensor(image), [0.5] * 3, [0.5] * 3))


@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_resize_gives_pillows_pixels_of_the_whole_picture(kind):
    off = []
    for height, width in [*SHAPES, (4, 60)]:
        pictures = make_pictures(kind, height, width)
        for out_size in OUT_SIZES:
            expected = [pillow_pipeline(x, (0, 0, height, width), out_size) for x in pictures]
            off.append(grey_levels_off(augment.resize(pictures, out_size), torch.stack(expected)))
    assert max(off) < (1e-3 if CHOOSES_ORDER else 0.3)


@pytest.mark.parametrize("whole", ["resize", "resized_crop"])
def test_pictures_of_the_right_size_keep_every_grey_level(whole):
    pictures = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    before = pictures.clone()
    if whole == "resize":
        got = augment.resize(pictures, 16)
    else:
        got = augment.resized_crop(pictures, torch.tensor([[0, 0, 16, 16]] * 2), 16)
    exact = (pictures.double() / 255 - 0.5) / 0.5  # ToTensor and Normalize
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-7)
    assert got.min() == -1
    assert got.max() == 1
    assert torch.equal(pictures, before)


@pytest.mark.parametrize(("start", "length", "out_size"), [(0, 20, 7), (3, 10, 33), (19, 1, 4), (0, 20, 20)])
def test_filter_rows_sum_to_one_inside_the_part_and_are_zero_outside(start, length, out_size):
    weights = augment.as_matrix(*augment.filter_taps(torch.tensor([start]), torch.tensor([length]), 20, out_size), 20)
    assert weights.shape == (1, 20, out_size)
    torch.testing.assert_close(weights.sum(1), torch.ones(1, out_size, dtype=weights.dtype), atol=1e-5, rtol=0)
    outside = torch.ones(20, dtype=torch.bool)
    outside[start : start + length] = False
    assert weights[:, outside].count_nonzero() == 0
    assert weights.min() >= 0


def test_the_sums_of_rows_without_embedding_bag_are_its_own():
    generator = torch.Generator().manual_seed(0)
    rows, x = torch.randint(0, 9, (20, 3), generator=generator), torch.rand(9, 7, generator=generator)
    weights = torch.rand(20, 3, generator=generator)
    theirs = torch.nn.functional.embedding_bag(rows, x, mode="sum", per_sample_weights=weights)
    torch.testing.assert_close(augment._bag(rows, x, weights), theirs)


@pytest.mark.parametrize("out_size", [7, 20, 33])
def test_long_axes_whose_filters_are_not_kept_have_the_same_ones(out_size, monkeypatch):
    start, length = torch.tensor([0, 3, 19, 5]), torch.tensor([20, 10, 1, 9])
    kept = augment.filter_taps(start, length, 20, out_size)
    monkeypatch.setattr(augment, "TABLE_PX", 19)
    for ours, theirs in zip(augment.filter_taps(start, length, 20, out_size), kept):
        assert torch.equal(ours, theirs)


# ---- transforms ----


@pytest.mark.parametrize(
    "transform", [augment.EvalTransform(20), *(augment.TrainTransform(20, x) for x in (False, True))]
)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24)])
def test_a_transform_gives_the_same_for_a_batch_and_for_one_decoded_picture_at_a_time(transform, height, width):
    pictures = make_pictures("random", height, width)
    draws = draw(len(pictures))[:, : transform.num_draws]
    batch = transform.batch(pictures, draws)
    images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pictures]
    single = transform.complete(torch.stack([transform.picture(x, d) for x, d in zip(images, draws)]))
    assert batch.shape == (6, 3, 20, 20)
    grey_levels_off(batch, single)


def test_a_training_picture_is_cropped_mirrored_if_asked_and_an_evaluations_is_whole():
    pictures, draws = make_pictures("random", 32, 32), draw(6)
    mirrored, boxes = augment.flips(draws), augment.crop_boxes(draws, 32, 32)
    assert 0 < mirrored.sum() < 6
    for hflip, flipped in ((True, mirrored), (False, None)):
        expected = augment.resized_crop(pictures, boxes, 20, flipped)
        assert torch.equal(augment.TrainTransform(20, hflip).batch(pictures, draws), expected)
    assert torch.equal(augment.EvalTransform(20).batch(pictures, draws[:, :0]), augment.resize(pictures, 20))
