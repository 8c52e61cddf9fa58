"""Small pictures, in memory and in files, and what may befall one."""

import os

import numpy as np
import torch
from PIL import Image

from utils.datasets import FileImages, MemoryImages


def noise(rng, height=6, width=6):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(picture, *path):
    path = os.path.join(*map(str, path))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    picture.save(path)
    return path


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes({"noise": b"no picture", "empty": b"", "cut_off": content[: len(content) // 2]}[how])


def numbered_images(count, size=4):
    """Pictures whose labels are their numbers."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return MemoryImages(images, torch.arange(count))


def as_files(pictures, root):
    """The same pictures as PNGs."""
    paths = [
        save(Image.fromarray(image.permute(1, 2, 0).numpy()), root, f"{i}.png")
        for i, image in enumerate(pictures.images)
    ]
    return FileImages(paths, pictures.labels)
