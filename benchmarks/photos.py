"""Speed of loaders of photographs in files, ours and others, beside a model that costs the same everywhere.

    python -m benchmarks.data --photos [small] [large]

The photographs are made for the purpose, in a temporary folder: 500 x 374 pixels as in data sets of research, and 12
megapixels as phones take them.  Their spectrum is that of natural images, with the noise of a sensor, and their files
are as large as those of real ones.  All loaders have the same number of worker processes, and random crops of the same
distribution; whatever they leave to be done with a batch, such as to normalise it, belongs to their time.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks import common
from utils import augment, data_utils, datasets, dist_util, photos

SEED = 42
NUM_CLASSES = 2


@dataclass(frozen=True)
class Kind:
    """Photographs of one size: how many files there are, and how a turn of them is divided."""

    width: int
    height: int
    files: int
    batch_size: int
    batches: int


KINDS = {"small": Kind(500, 374, 256, 32, 64), "large": Kind(4000, 3000, 8, 8, 16)}


@dataclass(frozen=True)
class Setting:
    """The same for all contenders.

    Attributes:
        root: folder of classes.
        kind: of its images.
        img_size: side of the finished images in pixels.
        workers: processes that decode.
    """

    root: str
    kind: Kind
    img_size: int
    workers: int


# ---- the photographs ----


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Makes an image whose amplitudes fall with the frequency to the power of 1.2, with a sensor's noise."""
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    frequency[0, 0] = torch.inf
    bands = []
    for deviation in (45, 12, 12):  # of the luminance and of both colours
        noise = torch.fft.rfft2(torch.randn(height, width, generator=generator)) / frequency**1.2
        band = torch.fft.irfft2(noise, s=(height, width))
        bands.append(128 + band * (deviation / band.std()))
    bands[0] += 3 * torch.randn(height, width, generator=generator)
    levels = torch.stack(bands, dim=-1).clamp(0, 255).round().byte()  # (H, W, 3)
    return Image.fromarray(levels.numpy(), "YCbCr")


def write_photos(root: str, kind: Kind) -> int:
    """Writes photographs of two classes; returns the bytes of one, in the mean."""
    sizes = []
    for i in range(kind.files):
        path = os.path.join(root, str(i % NUM_CLASSES), f"{i}.jpg")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        photo(kind.width, kind.height, SEED + i).save(path, quality=85, subsampling="4:2:0")
        sizes.append(os.path.getsize(path))
    return sum(sizes) // len(sizes)


def files_of(root: str) -> tuple[list[str], list[int]]:
    """Returns the images of a folder of classes, and their labels."""
    found = [(os.path.join(root, name, file), int(name)) for name in os.listdir(root)
             for file in os.listdir(os.path.join(root, name))]  # fmt: skip
    paths, labels = zip(*sorted(found))
    return list(paths), list(labels)


# ---- loaders ----


class Toy:
    """A model that no loader has to wait for long, and its training."""

    def __init__(self) -> None:
        self._weight = torch.zeros(3 * 14 * 14, NUM_CLASSES, requires_grad=True)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Trains on a batch, (B, 3, S, S) float32."""
        x = F.adaptive_avg_pool2d(images, 14).flatten(1)
        F.cross_entropy(x @ self._weight, labels).backward()
        with torch.no_grad():
            assert self._weight.grad is not None
            self._weight -= 0.01 * self._weight.grad
            self._weight.grad = None


def seconds_of(batches: Iterable[tuple[Tensor, Tensor]], toy: Toy, ready: int = 1) -> float:
    """Returns the time to train on batches, but for the first ones, which are ready; nor does it count their start."""
    done = []
    for images, labels in batches:
        toy.step(images, labels)
        done.append(time.perf_counter())
    return done[-1] - done[ready - 1]


class Ours:
    """train.py's batches."""

    def __init__(self, setting: Setting, decoding: str) -> None:
        dist_util.setup("cpu", -1)  # as train.py: what it sets for the whole process counts
        self.note = (f"--jpeg_decoding {decoding}",)
        self._toy, self._num_batches = Toy(), setting.kind.batches
        self._ready = 1 + 2 * setting.workers  # while others have their turns, each worker makes two
        paths, labels = files_of(setting.root)
        images = datasets.FileImages(paths, torch.tensor(labels), setting.root)
        transform = augment.TrainTransform(setting.img_size, in_parts=decoding == photos.SCALED)
        size = setting.kind.batch_size
        sampler = data_utils.StepSampler(len(paths), size, transform.num_draws, SEED)
        self._batches = data_utils.train_batches(
            images, sampler, itertools.count(1), size, transform, torch.device("cpu"), setting.workers
        )

    def run(self) -> float:
        batches = itertools.islice(self._batches, self._ready + self._num_batches)
        return seconds_of(batches, self._toy, self._ready)


class Stock(Dataset):
    """Images one by one, read and transformed by functions."""

    def __init__(self, root: str, read: Callable[[str], Any], transform: Callable[[Any], Tensor]) -> None:
        self._paths, self._labels = files_of(root)
        self._read, self._transform = read, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._read(self._paths[index])), self._labels[index]


def by_torchvision(path: str) -> Tensor:
    """Decodes a JPEG by torchvision."""
    from torchvision import io

    return io.decode_jpeg(io.read_file(path), io.ImageReadMode.RGB)


def drafted(path: str, img_size: int) -> Image.Image:
    """Decodes a JPEG at the scale that leaves the whole image twice as large as the crops' result."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * img_size, 2 * img_size))
        return image.convert("RGB")


def normalised(images: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 -> float32 in [-1, 1]."""
    return images.float().sub_(127.5).div_(127.5)


class Others:
    """A loader that others have, or could write: torchvision's transforms in a DataLoader.

    Args:
        way: "pil" (ImageFolder), "draft", or "tensor" and "uint8", which leaves the normalisation to the main process.
    """

    def __init__(self, setting: Setting, way: str) -> None:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2

        self.note, self._toy, half = ("",), Toy(), [0.5] * 3
        self._finish: Callable[[Tensor], Tensor] = normalised if way in ("draft", "uint8") else lambda x: x
        crop = v2.RandomResizedCrop(setting.img_size, augment.SCALE, antialias=True)
        dataset: Dataset
        if way == "pil":
            old_crop = transforms.RandomResizedCrop(setting.img_size, augment.SCALE)
            steps = [old_crop, transforms.ToTensor(), transforms.Normalize(half, half)]
            dataset = ImageFolder(setting.root, transforms.Compose(steps))
        elif way == "draft":
            read = functools.partial(drafted, img_size=setting.img_size)
            dataset = Stock(setting.root, read, v2.Compose([crop, v2.PILToTensor()]))
        else:
            rest = [] if way == "uint8" else [v2.ToDtype(torch.float32, scale=True), v2.Normalize(half, half)]
            dataset = Stock(setting.root, by_torchvision, v2.Compose([crop, *rest]))
        kind = setting.kind
        count = (1 + kind.batches) * kind.batch_size
        self._loader = DataLoader(
            dataset, kind.batch_size, num_workers=setting.workers, persistent_workers=setting.workers > 0,
            sampler=RandomSampler(dataset, replacement=True, num_samples=count),  # type: ignore[arg-type]
        )  # fmt: skip

    def run(self) -> float:
        return seconds_of(((self._finish(images), labels) for images, labels in self._loader), self._toy)


#: Loaders by what the table calls them.
LOADERS: dict[str, tuple[Callable[..., Any], str]] = {
    "ours": (Ours, photos.SCALED),
    "ours, full": (Ours, photos.FULL),
    "torchvision's ImageFolder": (Others, "pil"),
    "decode_jpeg, transforms.v2": (Others, "tensor"),
    "decode_jpeg, transforms.v2, normalised in the main process": (Others, "uint8"),
    "Pillow's draft of the whole image, transforms.v2": (Others, "draft"),
}


def run(args: argparse.Namespace) -> None:
    """Makes the photographs, and prints a table of each size of ``args.photos``."""
    for name in args.photos or KINDS:
        kind = KINDS[name]
        if args.quick:
            kind = Kind(kind.width // 4, kind.height // 4, 8, 4, 2)
        with tempfile.TemporaryDirectory() as root:
            num_bytes = write_photos(root, kind)
            setting = Setting(root, kind, args.img_size, args.num_workers)
            title = f"Photographs of {kind.width} x {kind.height} px, {num_bytes / 1000:,.0f} kB"
            _measure(title, setting, args)


def _measure(title: str, setting: Setting, args: argparse.Namespace) -> None:
    jobs = {
        name: common.Job(functools.partial(build, setting, way), ("torchvision",), "cpu", args.threads)
        for name, (build, way) in LOADERS.items()
    }
    with common.crew(jobs, args.one_process) as ready:
        runs = {name: contender.run for name, contender in ready.items()}
        common.take_turns(runs, 1)  # starts the workers, and reads the files into memory
        secs = common.take_turns(runs, args.rounds)
    kind = setting.kind
    speeds = {name: common.Speed(taken, kind.batches * kind.batch_size) for name, taken in secs.items()}
    ours = next(iter(speeds.values()))
    print(f"\n{title}; {args.img_size} px, batch {kind.batch_size}, {setting.workers} workers, {args.rounds} rounds")
    common.print_table(
        ["", "images/s", "slowest - fastest", "ours / it"],
        [[name, common.number(x.median), x.spread, f"{ours.times(x):.2f}"] for name, x in speeds.items()],
    )
