"""Data sets: their images and labels.

Small images sit in memory as uint8, large ones stay in their files.  utils/folders.py lists a folder's images,
utils/images.py decodes one, utils/cifar.py downloads CIFAR.
This module must not know models or transforms (utils/data_utils.py makes the batches).
"""

from __future__ import annotations

import logging
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils import cifar, dist_util, folders, inspection
from utils.errors import UserError
from utils.folders import Folder, Part, TestFolder
from utils.images import ImageError, read_image
from utils.manifest import Manifest

logger = logging.getLogger("train")

CLASS_NAMES = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100, "digits": tuple("0123456789")}
NAMED_DATASETS = tuple(CLASS_NAMES)
#: A folder's split is decoded once, into memory, if its images have one size and are this small.
MEMORY_IMAGE_PX = 256 * 256
MEMORY_LIMIT_BYTES = 2**30
DIGITS_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "digits.npz")


@dataclass(frozen=True)
class MemoryImages:
    """Images in memory: (N, 3, H, W) uint8, labels (N,) int64, and the files' paths where they are from files."""

    images: Tensor
    labels: Tensor
    paths: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def checksum(self) -> int:
        """Returns the CRC-32 of the images and labels."""
        return zlib.crc32(self.labels.numpy().data, zlib.crc32(self.images.contiguous().numpy().data))

    def to(self, device: torch.device) -> MemoryImages:
        """Moves both to a device, once for all steps and evaluations."""
        return MemoryImages(self.images.to(device), self.labels.to(device), self.paths)


@dataclass(frozen=True)
class FileImages:
    """Images that are decoded when they are needed; labels (N,) int64; ``root`` is the folder that they belong to."""

    paths: list[str]
    labels: Tensor
    root: str = "."

    def __len__(self) -> int:
        return len(self.labels)

    def checksum(self) -> int:
        """Returns the CRC-32 of the files' names, their folders' and the labels."""
        names = "\n".join("/".join(name.split(os.sep)[-3:]) for name in _below(self.root, self.paths))
        return zlib.crc32(self.labels.numpy().data, zlib.crc32(names.encode("utf-8", "surrogateescape")))

    def to(self, device: torch.device) -> FileImages:
        """Returns itself: decoded images move with their batch."""
        return self


Images = MemoryImages | FileImages


@dataclass(frozen=True)
class DataSets:
    """The images to train on and to evaluate.

    Attributes:
        train, test: the images.
        classes: the labels' names.
        test_fraction: share that a split by names tests on; None where the data set has a part to test on.
        notes: lines to log about what is read.
        manifest: a folder's files.
    """

    train: Images
    test: Images
    classes: list[str]
    test_fraction: float | None = None
    notes: list[str] = field(default_factory=list)
    manifest: Manifest | None = None

    def checksum(self) -> str:
        """Returns a text that changes with the images, their order and their classes."""
        names = "\n".join(self.classes).encode("utf-8", "surrogateescape")
        return "-".join(f"{crc:08x}" for crc in (self.train.checksum(), self.test.checksum(), zlib.crc32(names)))

    def to(self, device: torch.device) -> DataSets:
        """Moves the images that are in memory to a device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def find(name: str, test_fraction: float | None = None) -> Folder | str:
    """Finds a data set before anything that takes long: lists a folder's images; downloads and reads none.

    Args:
        name: one of ``NAMED_DATASETS``, or a folder of images (utils/folders.py).
        test_fraction: share of a folder's images to test on, where it has no part for that; None for the default.

    Returns:
        The folder, or the name.

    Raises:
        UserError: no such data set, or a folder that is none, or of fewer than two classes.
    """
    found = _find(name, test_fraction)
    if isinstance(found, Folder):
        if len(found.classes) < 2:
            one = f"one class, {found.classes[0]}"
            raise UserError(f"--dataset {name} has {one}; expected two or more, each in a folder of its own")
        _warn(found)
    return found


def _find(name: str, test_fraction: float | None = None) -> Folder | str:
    _check_name(name, test_fraction)
    return name if name in NAMED_DATASETS else folders.find(name, test_fraction)


def find_test(name: str, test_fraction: float | None = None) -> TestFolder | str:
    """Finds a data set as ``find`` does, of which nothing but the images to test on is needed."""
    _check_name(name, test_fraction)
    return name if name in NAMED_DATASETS else folders.find_test(name, test_fraction)


def for_head(
    found: TestFolder | str, classes: list[str] | None, trained_fraction: float | None, is_own: bool
) -> Folder | str:
    """Labels what ``find_test`` found by the outputs of a head; a data set with a name keeps its own order.

    Args:
        found: by ``find_test``.
        classes, trained_fraction, is_own: as for ``TestFolder.for_head``.

    Raises:
        UserError: a class of a folder is unknown to the head.
    """
    if not isinstance(found, TestFolder):
        return found
    labelled = found.for_head(classes, trained_fraction, is_own)
    _warn(labelled)
    return labelled


def _warn(found: Folder) -> None:
    for line in found.warnings:
        logger.warning("%s: %s", found.root, line)


def load(found: Folder | str, data_dir: str, num_workers: int, known_fingerprint: str = "") -> DataSets:
    """Downloads, if need be, what ``find`` found; decodes images where they are small, and looks at all others.

    Args:
        found: by ``find``.
        data_dir: where downloads go.
        num_workers: threads that decode.
        known_fingerprint: a folder of this one (``Manifest.fingerprint``) was looked at before.

    Raises:
        ImageError: images cannot be read; the message has all of them.
        ConnectionError: a download failed.
    """
    if isinstance(found, Folder):
        return _load_folder(found, num_workers, known_fingerprint)
    if found == "digits":
        return _load_digits()
    with dist_util.main_process_first():
        return _load_cifar(found, data_dir)


def load_datasets(name: str, data_dir: str, num_workers: int) -> DataSets:
    """Does ``find`` and ``load`` in turn, for uses of images that need no two classes."""
    return load(_find(name), data_dir, num_workers)


def _check_name(name: str, test_fraction: float | None = None) -> None:
    if name in NAMED_DATASETS:
        if test_fraction is not None:
            raise UserError(f"--test_fraction {test_fraction:g} has no effect: {name} has its own images to test on")
    elif os.path.isfile(name):
        raise UserError(f"--dataset {name} is a file; expected a folder: unpack it, or give the one that it is in")
    elif not os.path.isdir(name):
        raise UserError(
            f"--dataset {name} is neither a folder nor a known data set ({', '.join(NAMED_DATASETS)}); "
            "a folder needs train/<class>/ and test/<class>/, or <class>/"
        )


def _load_cifar(name: str, data_dir: str) -> DataSets:
    train, test = (
        MemoryImages(torch.from_numpy(images), torch.from_numpy(labels))
        for images, labels in cifar.load(name, data_dir)
    )
    return DataSets(train, test, class_names(name))


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


def _load_folder(found: Folder, num_workers: int, known_fingerprint: str) -> DataSets:
    reasons: dict[str, str] = {}  # why images cannot be read, by their paths
    train, test = (_load_part(part, found.root, num_workers, reasons) for part in (found.train, found.test))
    in_files = [path for part in (train, test) if isinstance(part, FileImages) for path in part.paths]
    fingerprint = inspection.fingerprint(in_files, found.root) if in_files else ""
    if any(dist_util.gather(fingerprint != known_fingerprint)):  # which hears of a rank that has failed meanwhile
        reasons |= inspection.inspect_images(in_files)
    if reasons:
        raise ImageError(reasons)
    train_names, test_names = (_below(found.root, part.paths) for part in (found.train, found.test))
    manifest = Manifest(found.root, train_names, test_names, not in_files, fingerprint)
    return DataSets(train, test, found.classes, found.test_fraction, found.notes, manifest)


def _below(root: str, paths: list[str]) -> list[str]:
    """Returns the names below a folder of the paths that lie in it; of others the whole paths."""
    prefix = os.path.join(root, "")
    return [os.path.normpath(path.removeprefix(prefix)) for path in paths]


def _load_part(part: Part, root: str, num_workers: int, reasons: dict[str, str]) -> Images:
    """Decodes a part's images if they fit into memory, and adds to ``reasons`` which of them cannot be read."""
    labels, bad = torch.tensor(part.labels, dtype=torch.int64), dict[str, str]()
    images = _decode_all(part.paths, num_workers, bad)
    if images is None:  # those that were tried are looked at with all others
        return FileImages(part.paths, labels, root)
    reasons |= bad
    return MemoryImages(images, labels, part.paths)


def class_names(name: str) -> list[str]:
    """Returns the names of a data set's classes, as ``load_datasets`` has them; reads and downloads no image.

    Raises:
        UserError: no such data set, or a folder without class folders.
    """
    if name in CLASS_NAMES:
        return list(CLASS_NAMES[name])
    _check_name(name)
    return folders.class_names(name)


def image_at(images: Images, index: int) -> tuple[str, Image.Image]:
    """Returns a name for an image, its path or its number, and the image as the data set has it.

    Raises:
        ImageError: it cannot be decoded.
    """
    if isinstance(images, FileImages):
        return images.paths[index], read_image(images.paths[index])
    name = f"image {index}" if images.paths is None else images.paths[index]
    return name, Image.fromarray(images.images[index].permute(1, 2, 0).cpu().numpy())


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W) uint8


def _decode_all(paths: list[str], num_workers: int, reasons: dict[str, str]) -> Tensor | None:
    """Decodes all images to (N, 3, H, W) uint8, or returns None if they differ in size or take too much memory.

    Args:
        paths: of the images.
        num_workers: threads that decode.
        reasons: takes why images cannot be read, by their paths.
    """

    def decode(path: str) -> Tensor | None:
        try:
            return _to_tensor(read_image(path))
        except ImageError as e:
            reasons.update(e.reasons)
            return None

    first = next((image for image in map(decode, paths) if image is not None), None)
    if first is None or first[0].numel() > MEMORY_IMAGE_PX or first.numel() * len(paths) > MEMORY_LIMIT_BYTES:
        return None
    images = torch.empty(len(paths), *first.shape, dtype=torch.uint8)

    def place(i: int) -> bool:
        image = decode(paths[i])
        if image is None:
            return True
        if image.shape == first.shape:
            images[i] = image
        return image.shape == first.shape

    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        done = pool.map(place, range(len(paths)))
        for same_size in tqdm(done, "Decoding", len(paths), unit="image", leave=False, **dist_util.bar_options()):
            if not same_size:
                pool.shutdown(cancel_futures=True)
                return None
    return images
