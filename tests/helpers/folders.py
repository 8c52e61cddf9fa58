"""Small images, in memory and in files, and damage to one."""

import io
import os

import numpy as np
import torch
from PIL import Image

from utils.datasets import FileImages, MemoryImages

#: The images of two classes, as ``tree`` and ``below`` take them.
BOTH = ("ant/{0..2}.png", "bee/{0..2}.png")
#: The same word in two Unicode forms.
NFC, NFD = "caf\u00e9", "cafe\u0301"


def noise(rng, height=6, width=6):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(image, *path):
    path = os.path.join(*map(str, path))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    image.save(path)
    return path


def damage(path, how):
    if how == "removed":
        return path.unlink()
    content = path.read_bytes()
    path.write_bytes({"noise": b"no image", "empty": b"", "cut_off": content[: len(content) // 2]}[how])


def numbered_images(count, size=4):
    """Images whose labels are their numbers."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return MemoryImages(images, torch.arange(count))


def as_files(images, root):
    """The same images as PNGs."""
    arrays = images.images.permute(0, 2, 3, 1).numpy()
    paths = [save(Image.fromarray(array), root, f"{i}.png") for i, array in enumerate(arrays)]
    return FileImages(paths, images.labels)


def tree(root, *paths):
    """Writes a small PNG under every path below a folder, with braces as bash has them; returns the folder."""
    file = io.BytesIO()
    Image.new("RGB", (6, 6)).save(file, "png")
    os.makedirs(root, exist_ok=True)
    for path in paths:
        before, brace, rest = path.partition("{")
        inside, _, after = rest.partition("}")
        first, dots, last = inside.partition("..")
        several = map(str, range(int(first), int(last) + 1)) if dots else inside.split(",")
        for name in [before + x + after for x in several] if brace else [path]:
            os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
            with open(os.path.join(root, name), "wb") as f:
                f.write(file.getvalue())
    return str(root)


def below(part, *paths):
    return [f"{part}/{path}" for path in paths]


def names(part):
    """The images of a part, as their class folders and names."""
    return ["/".join(path.split(os.sep)[-2:]) for path in part.paths]
