"""Grey levels between --jpeg_decoding scaled and full, on photographs and on text: the numbers of docs/deviations.md.

    python -m benchmarks.once.scaled_decoding

The same crops as in training, of JPEGs of 12 megapixels, 4:2:0: photographs made as in ``benchmarks.data --photos``
and black text on white.  By the scale of the decoding; 1/1 is the difference of torch's resize from Pillow's alone.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks import common
from benchmarks.photos import KINDS, SEED, photo
from utils import augment, photos
from utils.images import read_image


def text(width: int, height: int, seed: int) -> Image.Image:
    """Draws lines of letters of several sizes."""
    image, letters = Image.new("RGB", (width, height), "white"), "The quick brown fox jumps over the lazy dog. " * 20
    draw, y = ImageDraw.Draw(image), 0
    while y < height:
        px = (24, 40, 64, 100)[(y + seed) % 4]
        draw.text((20, y), letters, fill="black", font=ImageFont.load_default(px))
        y += round(1.3 * px)
    return image


def differences(path: str, img_size: int, crops: int) -> dict[int, list[torch.Tensor]]:
    """Returns the differences of so many crops (3, S, S), by the scale that each is decoded at."""
    whole, part = augment.TrainTransform(img_size), augment.TrainTransform(img_size, in_parts=True)
    image, found = read_image(path), dict[int, list[torch.Tensor]]()
    generator = torch.Generator().manual_seed(SEED)
    for draws in torch.rand(crops, whole.num_draws, generator=generator, dtype=torch.float64):
        choose = part.part(draws)
        assert choose is not None
        x = photos.read_crop(path, choose, img_size)
        assert x is not None
        height, width = choose(image.height, image.width)[2:]
        scale = photos.scale_of(height, width, img_size)
        found.setdefault(scale, []).append((x.int() - whole.image(image, draws).int()).abs())
    return found


def main(argv: list[str] | None = None) -> None:
    """Prints one line for each kind of image and scale."""
    p = argparse.ArgumentParser(description="Grey levels between --jpeg_decoding scaled and full.")
    p.add_argument("--img_size", type=int, default=224, help="side of the finished images in pixels")
    p.add_argument("--images", type=int, default=3, help="images of each kind")
    p.add_argument("--crops", type=int, default=40, help="crops of each image")
    p.add_argument("--quick", action="store_true", help="one small image and few crops: shows that it runs")
    args = p.parse_args(argv)
    width, height = KINDS["large"].width, KINDS["large"].height
    if args.quick:
        width, height, args.images, args.crops, args.img_size = width // 4, height // 4, 1, 9, 64
    print(common.hardware(torch.get_num_threads(), "cpu"))
    for name, make in (("photographs", photo), ("text", text)):
        found: dict[int, list[torch.Tensor]] = {}
        for i in range(args.images):
            with tempfile.TemporaryDirectory() as root:
                path = os.path.join(root, "a.jpg")
                make(width, height, SEED + i).save(path, quality=85, subsampling="4:2:0")
                for scale, of_crops in differences(path, args.img_size, args.crops).items():
                    found.setdefault(scale, []).extend(of_crops)
        for scale, of_crops in sorted(found.items()):
            off = torch.stack(of_crops).double()
            print(f"{name}, 1/{scale}: {len(of_crops)} crops, {off.mean():.2f} on average, {off.max():.0f} at most")


if __name__ == "__main__":
    main()
