"""Data sets: their images and labels.

Small images sit in memory as uint8, large ones stay in their files.  Images of any mode become RGB here.
This module must not know models or transforms (utils/data_utils.py makes the batches).
"""

from __future__ import annotations

import http.client
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils import cifar, dist_util
from utils.errors import UserError

CLASS_NAMES = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100, "digits": tuple("0123456789")}
NAMED_DATASETS = tuple(CLASS_NAMES)
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
#: A folder's split is decoded once, into memory, if its images have one size and are this small.
MEMORY_IMAGE_PX = 256 * 256
MEMORY_LIMIT_BYTES = 2**30
DIGITS_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "digits.npz")


class ImageError(UserError):
    """An image of the user's cannot be read; the message names its path."""


@dataclass(frozen=True)
class MemoryImages:
    """Images in memory: (N, 3, H, W) uint8, labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def checksum(self) -> int:
        """Returns the CRC-32 of the images and labels."""
        return zlib.crc32(self.labels.numpy().data, zlib.crc32(self.images.contiguous().numpy().data))

    def to(self, device: torch.device) -> MemoryImages:
        """Moves both to a device, once for all steps and evaluations."""
        return MemoryImages(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class FileImages:
    """Images that are decoded when they are needed; labels (N,) int64."""

    paths: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def checksum(self) -> int:
        """Returns the CRC-32 of the files' names, their folders' and the labels."""
        names = "\n".join("/".join(os.path.normpath(path).split(os.sep)[-3:]) for path in self.paths)
        return zlib.crc32(self.labels.numpy().data, zlib.crc32(names.encode("utf-8", "surrogateescape")))

    def to(self, device: torch.device) -> FileImages:
        """Returns itself: decoded images move with their batch."""
        return self


Images = MemoryImages | FileImages


@dataclass(frozen=True)
class DataSets:
    """The images to train on and to evaluate; ``classes`` are the labels' names."""

    train: Images
    test: Images
    classes: list[str]

    def checksum(self) -> str:
        """Returns a text that changes with the images, their order and their classes."""
        names = "\n".join(self.classes).encode("utf-8", "surrogateescape")
        return "-".join(f"{crc:08x}" for crc in (self.train.checksum(), self.test.checksum(), zlib.crc32(names)))

    def to(self, device: torch.device) -> DataSets:
        """Moves the images that are in memory to a device."""
        return DataSets(self.train.to(device), self.test.to(device), self.classes)


def load_datasets(name: str, data_dir: str, num_workers: int) -> DataSets:
    """Finds, downloads if need be, and where they are small decodes the images of a data set.

    Args:
        name: one of ``NAMED_DATASETS``, or a folder with train/<class>/* and test/<class>/* (or val/).
        data_dir: where downloads go.
        num_workers: threads that decode.

    Raises:
        UserError: no such data set, or a folder that is none.
        ConnectionError: a download failed.
    """
    if name in ("cifar10", "cifar100"):
        with dist_util.main_process_first():
            return _load_cifar(name, data_dir)
    if name == "digits":
        return _load_digits()
    _check_name(name)
    return _load_folder(name, num_workers)


def check_layout(name: str) -> None:
    """Raises UserError unless ``name`` is a data set's, or a folder's whose every class has images in both splits.

    Lists folders and reads no image, so that it can come before anything that takes long: 100,000 files on a
    local disk take 0.1 s.
    """
    _check_name(name)
    if name in NAMED_DATASETS:
        return
    train_dir, test_dir, classes = _layout(name)
    for folder in (os.path.join(split_dir, name) for split_dir in (train_dir, test_dir) for name in classes):
        if next(_each_image(folder), None) is None:
            raise _empty_class(folder)


def _check_name(name: str) -> None:
    if name not in NAMED_DATASETS and not os.path.isdir(name):
        raise UserError(
            f"--dataset {name} is neither a folder nor a known data set ({', '.join(NAMED_DATASETS)}); "
            "a folder needs train/<class>/ and test/<class>/"
        )


def _load_cifar(name: str, data_dir: str) -> DataSets:
    import torchvision.datasets  # a second, not spent where no CIFAR is asked for

    cls = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    splits, classes = [], []
    for train in (True, False):
        try:
            data = cls(root=data_dir, train=train, download=dist_util.is_first_of_machine())
        except (OSError, RuntimeError, http.client.HTTPException) as e:
            raise ConnectionError(
                f"{name} could not be downloaded into {data_dir} ({e}); put {cls.url} there yourself "
                f"(md5 {cls.tgz_md5}), or name another folder with --data_dir"
            ) from e
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        splits.append(MemoryImages(images, torch.tensor(data.targets)))
        classes = list(data.classes)
    return DataSets(splits[0], splits[1], classes)


def _load_digits() -> DataSets:
    """1,797 handwritten digits (``digits.md`` has their source), 8x8 grey made 32x32 RGB."""
    with np.load(DIGITS_FILE, allow_pickle=False) as f:
        arrays = {name: torch.from_numpy(f[name]) for name in f.files}
    splits = []
    for split in ("train", "test"):
        grey = arrays[f"{split}_images"][:, None].float() * (255 / 16)  # (N, 1, 8, 8), 0..16 in the file
        images = F.interpolate(grey, (32, 32), mode="bilinear").round().byte()  # (N, 1, 32, 32)
        splits.append(MemoryImages(images.repeat(1, 3, 1, 1), arrays[f"{split}_labels"].long()))
    return DataSets(splits[0], splits[1], class_names("digits"))


def _layout(root: str) -> tuple[str, str, list[str]]:
    """Returns a folder's two splits and the names of its classes; raises UserError if it lacks them."""
    train_dir = os.path.join(root, "train")
    test_dir = next((d for d in (os.path.join(root, s) for s in ("test", "val")) if os.path.isdir(d)), None)
    if not os.path.isdir(train_dir) or test_dir is None:
        raise UserError(f"--dataset {root} needs the folders train/<class>/ and test/<class>/ (or val/<class>/)")
    classes = _subfolders(train_dir)
    if not classes:
        raise UserError(f"{train_dir} has no class folders; expected {train_dir}/<class>/<image>")
    if unknown := sorted(set(_subfolders(test_dir)) - set(classes)):
        raise UserError(f"{test_dir} has classes that {train_dir} has not: {', '.join(unknown[:10])}")
    return train_dir, test_dir, classes


def _load_folder(root: str, num_workers: int) -> DataSets:
    train_dir, test_dir, classes = _layout(root)
    splits: list[Images] = []
    for folder in (train_dir, test_dir):
        paths, numbers = _list_images(folder, classes)
        labels = torch.tensor(numbers)
        images = _decode_all(paths, num_workers)
        splits.append(FileImages(paths, labels) if images is None else MemoryImages(images, labels))
    return DataSets(splits[0], splits[1], classes)


def _subfolders(folder: str) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _list_images(folder: str, classes: list[str]) -> tuple[list[str], list[int]]:
    """Returns paths and labels, in the order of the classes and of the names in them."""
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = images_below(os.path.join(folder, name))
        if not images:
            raise _empty_class(os.path.join(folder, name))
        paths += images
        labels += [label] * len(images)
    return paths, labels


def _empty_class(folder: str) -> UserError:
    kinds = ", ".join(ending[1:] for ending in EXTENSIONS)
    return UserError(f"{folder} holds no image ({kinds}); fill the folder or remove the class")


def images_below(folder: str) -> list[str]:
    """Returns the images of a folder and of those in it, sorted; hidden ones are left out."""
    return sorted(_each_image(folder))


def _each_image(folder: str) -> Iterator[str]:
    """Yields the images of a folder, then those of the folders in it, which are not listed before."""
    seen: set[str] = set()  # a link may lead back up
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(parent))
        subfolders[:] = [f for f in subfolders if f[0] != "." and os.path.realpath(os.path.join(parent, f)) not in seen]
        for file in files:
            if file.lower().endswith(EXTENSIONS) and not file.startswith("."):
                yield os.path.join(parent, file)


def class_names(name: str) -> list[str]:
    """Returns the names of a data set's classes, as ``load_datasets`` has them; reads and downloads no image.

    Raises:
        UserError: no such data set, or a folder without class folders.
    """
    if name in CLASS_NAMES:
        return list(CLASS_NAMES[name])
    _check_name(name)
    train_dir = os.path.join(name, "train")
    if not os.path.isdir(train_dir) or not (classes := _subfolders(train_dir)):
        raise UserError(f"--dataset {name} has no class folders; expected {train_dir}/<class>/<image>")
    return classes


def read_image(path: str) -> Image.Image:
    """Decodes an image of any mode as RGB.

    Raises:
        ImageError: it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] > 255):
                grey = np.asarray(image).clip(0, 65535) >> 8  # Pillow would cut 16 bits off at 255
                return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as e:
        raise ImageError(f"{path} cannot be read as an image ({e}); repair or remove it") from e


def image_at(images: Images, index: int) -> tuple[str, Image.Image]:
    """Returns a name for an image, its path or its number, and the image as the data set has it.

    Raises:
        ImageError: it cannot be decoded.
    """
    if isinstance(images, FileImages):
        return images.paths[index], read_image(images.paths[index])
    return f"image {index}", Image.fromarray(images.images[index].permute(1, 2, 0).cpu().numpy())


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W) uint8


def _decode_all(paths: list[str], num_workers: int) -> Tensor | None:
    """Decodes all images to (N, 3, H, W) uint8, or returns None if they differ in size or take too much memory."""
    first = _to_tensor(read_image(paths[0]))
    if first[0].numel() > MEMORY_IMAGE_PX or first.numel() * len(paths) > MEMORY_LIMIT_BYTES:
        return None
    images = torch.empty(len(paths), *first.shape, dtype=torch.uint8)

    def decode(i: int) -> bool:
        image = _to_tensor(read_image(paths[i]))
        if image.shape != first.shape:
            return False
        images[i] = image
        return True

    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        done = pool.map(decode, range(len(paths)))
        for same_size in tqdm(done, "Decoding", len(paths), unit="image", leave=False, **dist_util.bar_options()):
            if not same_size:
                pool.shutdown(cancel_futures=True)
                return None
    return images
