"""Speed of the training's images and of evaluations, against torchvision's transforms and a plain loop.

    python -m benchmarks.data [--dataset DATASET] [--img_size 224]

First the training's images: random crops, resized and normalised, as float32 on the device.  Ours are
what ``train.py`` feeds itself; the others are torchvision's RandomResizedCrop, ToTensor and Normalize in
a DataLoader, on PIL images and (v2) on tensors, with and without worker processes.  The clock starts
at the first batch, so that nobody pays for starting workers.  Then the evaluation, resize to accuracy:
ours, and the plain formulation in float32 with PIL and workers.  Unless --dataset names one, the
images are 10,000 random ones of 32 x 32 pixels in memory, as CIFAR's are.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks import common, peers, photos
from benchmarks.peak import matmul_peaks
from benchmarks.step import flops_of_step
from models.configs import CONFIGS
from models.shapes import layer_shapes
from train import evaluate
from utils import augment, data_utils, datasets, dist_util
from utils.number_format import choose
from utils.precision import OPT_LEVELS, Precision

NUM_SYNTHETIC = 10_000
SYNTHETIC = "synthetic"
SEED = 42


@dataclass(frozen=True)
class Setting:
    """The same for all contenders.

    Attributes:
        dataset, data_dir: as for train.py, or SYNTHETIC.
        img_size: side of the finished images in pixels.
        batch_size: images of a batch.
        batches: of one turn of the training's images.
        eval_images: of one turn of the evaluation.
        workers: processes that decode large images.
    """

    dataset: str
    data_dir: str
    img_size: int
    batch_size: int
    batches: int
    eval_batch_size: int
    eval_images: int
    model_type: str
    device: str
    workers: int

    def load(self) -> tuple[datasets.Images, datasets.Images]:
        """Returns the images to train on, and the first of those to evaluate."""
        if self.dataset == SYNTHETIC:
            generator = torch.Generator().manual_seed(SEED)
            images = torch.randint(256, (NUM_SYNTHETIC, 3, 32, 32), generator=generator, dtype=torch.uint8)
            labels = torch.randint(peers.NUM_CLASSES, (NUM_SYNTHETIC,), generator=generator)
            train = test = datasets.MemoryImages(images, labels)  # type: datasets.Images
        else:
            sets = datasets.load_datasets(self.dataset, self.data_dir, self.workers)
            train, test = sets.train, sets.test
        first = slice(self.eval_images)
        if isinstance(test, datasets.MemoryImages):
            return train, datasets.MemoryImages(test.images[first], test.labels[first])
        return train, datasets.FileImages(test.paths[first], test.labels[first])


def seconds_of(batches: Iterable[Any], device: str) -> float:
    """Returns the time from the first batch to the last, all on the device."""
    start = 0.0
    for i, (images, labels) in enumerate(batches):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if i == 0:
            common.synchronize(device)
            start = time.perf_counter()
    common.synchronize(device)
    return time.perf_counter() - start


# ---- the training's images ----


class OurImages:
    """train.py's batches."""

    note = ("as train.py",)

    def __init__(self, setting: Setting) -> None:
        dist_util.setup(setting.device, -1)  # as train.py: what it sets for the whole process counts
        self._setting = setting
        self._images, _ = setting.load()
        self._transform = augment.TrainTransform(setting.img_size)
        size = setting.batch_size
        self._sampler = data_utils.StepSampler(len(self._images), size, self._transform.num_draws, SEED)
        self._steps = itertools.count(1)
        self.run()

    def run(self) -> float:
        s, steps = self._setting, itertools.islice(self._steps, 1 + self._setting.batches)
        batches = data_utils.train_batches(
            self._images, self._sampler, steps, s.batch_size, self._transform, torch.device(s.device), s.workers
        )
        return seconds_of(batches, s.device)


class StockDataset(Dataset):
    """Images one by one, through torchvision's transforms; in memory they lie as CIFAR's do there."""

    def __init__(self, images: datasets.Images, transform: Callable[[Any], Tensor], tensors: bool) -> None:
        self.labels = images.labels.tolist()
        self.transform = transform
        self.items: Any
        if isinstance(images, datasets.FileImages):
            self.items = images.paths
        else:
            self.items = images.images if tensors else images.images.permute(0, 2, 3, 1).contiguous().numpy()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.items[index]
        if isinstance(item, str):
            with Image.open(item) as image:
                item = image.convert("RGB")
        elif not isinstance(item, Tensor):
            item = Image.fromarray(item)
        return self.transform(item), self.labels[index]


def stock_transform(img_size: int, tensors: bool, crop: bool) -> Callable[[Any], Tensor]:
    """Builds RandomResizedCrop, ToTensor, Normalize, or the same with Resize."""
    if tensors:
        from torchvision.transforms import v2

        first = v2.RandomResizedCrop(img_size, scale=augment.SCALE, antialias=True)
        half = [0.5] * 3
        return v2.Compose([v2.ToImage(), first, v2.ToDtype(torch.float32, scale=True), v2.Normalize(half, half)])
    from torchvision import transforms

    resize = transforms.RandomResizedCrop(img_size, augment.SCALE) if crop else transforms.Resize((img_size, img_size))
    return transforms.Compose([resize, transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])


class StockImages:
    """torchvision's transforms in a DataLoader."""

    def __init__(self, setting: Setting, tensors: bool, workers: int) -> None:
        self.note = ("on tensors",) if tensors else ("on PIL images",)
        self._device = setting.device
        dataset = StockDataset(setting.load()[0], stock_transform(setting.img_size, tensors, True), tensors)
        count = (1 + setting.batches) * setting.batch_size
        self._loader = DataLoader(
            dataset,
            setting.batch_size,
            sampler=RandomSampler(dataset, replacement=True, num_samples=count),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=setting.device == "cuda",
        )
        self.run()

    def run(self) -> float:
        return seconds_of(self._loader, self._device)


# ---- the evaluation ----


class OurEvaluation:
    """train.py's."""

    def __init__(self, setting: Setting, *precision: str) -> None:
        self._setting = setting
        self._images = setting.load()[1]
        s = setting
        self._model, self._precision = peers.build(s.model_type, s.img_size, None, s.device, *precision)
        self._precision.prepare(self._model)
        self.note = (f"batch {s.eval_batch_size}",)
        self.run()

    def run(self) -> float:
        s = self._setting
        start = time.perf_counter()
        evaluate(self._model, self._images, self._precision, s.img_size, s.eval_batch_size, s.workers)
        return time.perf_counter() - start  # the accuracy is a number on the host: nothing is left to wait for


class StockEvaluation:
    """The plain formulation in float32, PIL and a DataLoader."""

    def __init__(self, setting: Setting, workers: int) -> None:
        self.note = (f"batch {setting.eval_batch_size}, {workers} workers",)
        self._device = setting.device
        dataset = StockDataset(setting.load()[1], stock_transform(setting.img_size, False, False), False)
        self._loader = DataLoader(
            dataset,
            setting.eval_batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=setting.device == "cuda",
        )
        config = peers.CONFIGS[setting.model_type]
        self._model = peers.plain_model(config, setting.img_size, peers.NUM_CLASSES, 0.0).to(setting.device).eval()
        self.run()

    @torch.no_grad()
    def run(self) -> float:
        start = time.perf_counter()
        losses, correct = [], []
        for images, labels in self._loader:
            images, labels = images.to(self._device), labels.to(self._device)
            logits = self._model(images)
            losses.append(F.cross_entropy(logits, labels).item())
            correct.append((logits.argmax(dim=-1) == labels).cpu())
        torch.cat(correct).float().mean().item()
        return time.perf_counter() - start


# ---- the measurement ----


def measure(
    title: str, jobs: dict[str, common.Job], num_images: int, args: argparse.Namespace,
    peaks: Callable[[], dict[str, float]] = dict,
) -> None:  # fmt: skip
    """Prints the table of one kind of work; ``peaks()`` are images/s if all were matrix products at their best."""
    best = peaks()
    with common.crew(jobs, args.one_process) as ready:
        secs = common.take_turns({name: contender.run for name, contender in ready.items()}, args.rounds)
        notes = {name: ", ".join(contender.note) for name, contender in ready.items()}
    best = {name: max(rate, best[name]) for name, rate in peaks().items()}
    speeds = {name: common.Speed(taken, num_images) for name, taken in secs.items()}
    first = next(iter(speeds.values()))
    print(f"\n{title}, {num_images} images a turn, {args.rounds} rounds")
    common.print_table(
        ["", "setting", "images/s", "slowest - fastest", "ours / it", *["share of peak"] * bool(best)],
        [
            [name, notes[name], common.number(speed.median), speed.spread, f"{first.times(speed):.2f}",
             *([f"{speed.median / best[name]:.0%}"] if best else [])]
            for name, speed in speeds.items()
        ],
    )  # fmt: skip


def evaluation_peaks(setting: Setting, dtypes: Mapping[str, torch.dtype], quick: bool) -> dict[str, float]:
    """Returns images per second if matrix products, in these number formats, took all of an evaluation."""
    config, size = CONFIGS[setting.model_type], setting.img_size
    flops = flops_of_step(config, size, peers.NUM_CLASSES, 1) / 3  # a third of a step's is the forward pass
    rows = (1 + config.grid_size(size) ** 2) * setting.eval_batch_size
    rates = matmul_peaks(setting.device, dtypes.values(), rows, config.hidden_size, config.mlp_dim, quick)
    return {name: rates[dtype] / flops for name, dtype in dtypes.items()}


def make_parser() -> argparse.ArgumentParser:
    """Describes the command line."""
    p = argparse.ArgumentParser(description="Speed of the training's images and of evaluations.")
    p.add_argument("--dataset", default=SYNTHETIC, help=f"{SYNTHETIC} (random, 32 px), or what train.py takes")
    p.add_argument("--data_dir", default="./data", help="where cifar10 and cifar100 are")
    p.add_argument("--model_type", choices=peers.MODELS, default="ViT-B_32", metavar="MODEL", help="what is evaluated")
    p.add_argument("--img_size", type=int, default=224, help="side of the finished images in pixels")
    p.add_argument("--batch_size", type=int, default=32, help="images of a training batch")
    p.add_argument("--eval_batch_size", type=int, default=64, help="images evaluated at once")
    p.add_argument("--batches", type=int, default=64, help="training batches of one turn")
    p.add_argument("--eval_images", type=int, default=256, help="images of one evaluation")
    p.add_argument("--num_workers", type=int, default=2, help="worker processes, where a contender has them")
    p.add_argument("--fp16_opt_level", choices=OPT_LEVELS, default="O2", help="ours, in the evaluation")
    p.add_argument("--photos", nargs="*", choices=(*photos.KINDS, []), metavar="|".join(photos.KINDS),
                   help="only loaders of photographs in files (benchmarks/photos.py)")  # fmt: skip
    p.add_argument("--one_process", action="store_true", help="all in this process, process-wide settings included")
    common.add_flags(p, rounds=7)
    return p


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    p = make_parser()
    args = p.parse_args(argv)
    common.check_flags(p, args, "img_size", "batch_size", "eval_batch_size", "batches", "eval_images", "num_workers")
    if args.quick:
        args.batches, args.eval_images = min(args.batches, 2), min(args.eval_images, 16)
    if args.photos is not None:
        print(common.hardware(args.threads, "cpu"), flush=True)
        return photos.run(args)
    setting = Setting(
        args.dataset, args.data_dir, args.img_size, args.batch_size, args.batches, args.eval_batch_size,
        args.eval_images, args.model_type, args.device, args.num_workers,
    )  # fmt: skip
    try:
        peers.CONFIGS[args.model_type].check_img_size(args.img_size)
        train, test = setting.load()  # downloads and mistakes come before the processes
    except ValueError as e:
        p.error(str(e))
    torch.set_num_threads(args.threads)
    print(common.hardware(args.threads, args.device))
    kind = f"{NUM_SYNTHETIC:,} random images of 32 px" if args.dataset == SYNTHETIC else args.dataset
    where = "in memory" if isinstance(train, datasets.MemoryImages) else "in files"
    print(f"{kind}, {where}; {args.img_size} px", flush=True)

    def job(build: Callable, *values: Any) -> common.Job:
        return common.Job(functools.partial(build, setting, *values), ("torchvision",), args.device, args.threads)

    workers = (args.num_workers, 0)
    jobs = {"ours": job(OurImages)}
    for name, tensors in (("torchvision", False), ("torchvision v2", True)):
        jobs |= {f"{name}, {n} workers": job(StockImages, tensors, n) for n in workers}
    measure(f"Training images, batch {args.batch_size}", jobs, args.batches * args.batch_size, args)
    levels = dict.fromkeys((args.fp16_opt_level, "O0"))
    jobs, dtypes = {}, {}
    for level in levels:
        precision = Precision(torch.device(args.device), level)
        choose(precision, layer_shapes(CONFIGS[args.model_type], args.img_size), training=False)
        name, number_format = f"ours, {precision}", precision.number_format
        forced = () if number_format == "float32" else (number_format,)
        jobs[name] = job(OurEvaluation, precision.opt_level, *forced)
        dtypes[name] = getattr(torch, number_format)
    plain = "plain reference, float32"
    jobs[plain], dtypes[plain] = job(StockEvaluation, args.num_workers), torch.float32
    peaks = functools.partial(evaluation_peaks, setting, dtypes, args.quick)
    measure(f"Evaluation of {args.model_type}", jobs, len(test), args, peaks)


if __name__ == "__main__":
    main()
