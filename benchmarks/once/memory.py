"""The memory that utils/reckoning.py reckons for a training, against the memory that its steps take.

    python -m benchmarks.once.memory [--device cpu|cuda] [--rows ViT-B_32:224:O0:32:1 ...]
    python -m benchmarks.once.memory --plan [--device cuda]

The first prints a table of models, each at its batch and micro-batches.  On CPUs each trains two steps in a process
of its own: what the C library has given out is looked at every few milliseconds, and the system knows the peak of the
process; what it held before there was a model is left out.  On GPUs PyTorch's allocator tells.  --plan trains nothing:
it prints the micro-batches that ``--gradient_accumulation_steps auto`` takes on GPUs of several sizes.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import threading
from dataclasses import replace
from typing import Any, cast

import torch

from benchmarks import common, peers
from models.configs import CONFIGS, ViTConfig
from models.modeling import VisionTransformer
from tools import _published_results as published
from utils import args as flags
from utils import dist_util, memory, reckoning
from utils.precision import Precision

#: Model, pixels, level, images of a step, micro-batches.
Row = tuple[str, int, str, int, int]
MODELS = ("ViT-B_32", "ViT-B_16", "ViT-L_32", "R50-ViT-B_16")
LEVELS = ("O0", "O2")
#: Images that 24 GiB of main memory have room for, in a few minutes.
ON_CPU = dict(zip(MODELS, (32, 8, 8, 4)))
CARDS_GIB, CONTEXT_GIB = (8, 16, 24, 40, 80), 0.6
BATCH = 512


def rows_of(device: str) -> list[Row]:
    """Returns what is measured on a kind of device."""
    rows = [(m, 224, level, BATCH if device == "cuda" else ON_CPU[m], 1) for m in MODELS for level in LEVELS]
    if device == "cuda":
        return [*rows, ("ViT-L_32", 384, "O2", BATCH, 2)]
    return [*rows, ("ViT-B_32", 224, "O0", 64, 1), ("ViT-B_32", 224, "O0", 64, 4)]


def parse_row(text: str) -> Row:
    """Returns the row that is written as MODEL:PIXELS:LEVEL:BATCH:MICRO_BATCHES."""
    model, px, level, batch, parts = text.split(":")
    return model, int(px), level, int(batch), int(parts)


def on_meta(config: ViTConfig, img_size: int, num_blocks: int) -> VisionTransformer:
    """Returns a model of so many blocks without memory."""
    with torch.device("meta"):
        return VisionTransformer(replace(config, num_layers=num_blocks), img_size, peers.NUM_CLASSES)


def need_of(model_type: str, img_size: int, level: str, device: str) -> reckoning.Need:
    """Returns what training is reckoned to need."""
    config = CONFIGS[model_type]
    precision = Precision(dist_util.setup(device, -1), level)
    return reckoning.reckon(functools.partial(on_meta, config, img_size), config.num_layers, precision, img_size, 1)


class HeapInUse(ctypes.Structure):
    """The result of glibc's ``mallinfo2`` (malloc.h)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                     "keepcost")
    ]  # fmt: skip


class Peak:
    """Looks at the bytes that the C library has given out, every few milliseconds; a context manager."""

    def __init__(self) -> None:
        self._look = ctypes.CDLL("libc.so.6").mallinfo2
        self._look.restype = HeapInUse
        self._over, self._thread = threading.Event(), threading.Thread(target=self._watch)
        self._before = self.bytes = self._now()

    def _now(self) -> int:
        found = self._look()
        return found.uordblks + found.hblkhd

    def _watch(self) -> None:
        while not self._over.wait(0.003):
            self.bytes = max(self.bytes, self._now())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.bytes -= self._before


class Training:
    """Trains two steps, and returns the bytes reckoned and measured."""

    note: peers.Choice = ()

    def __init__(self, row: Row, device: str) -> None:
        self._row, self._device = row, device

    def run(self) -> tuple[int, ...]:
        """Returns the bytes reckoned and measured of tensors, then those of the process."""
        model_type, img_size, level, batch, parts = self._row
        before = common.status_bytes("VmRSS")
        need = need_of(model_type, img_size, level, self._device)
        reckoned = [f(-(-batch // parts), parts) for f in (need.live_bytes, need.bytes)]
        setting = peers.Setting(model_type, img_size, batch, parts, 0.1, self._device)
        if self._device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            others = self._steps(setting, level)
            live, process = torch.cuda.max_memory_allocated() - others, torch.cuda.max_memory_reserved() - others
        else:
            with Peak() as peak:
                others = self._steps(setting, level)
            live, process = peak.bytes - others, common.status_bytes("VmHWM") - before - others
        return reckoned[0], live, reckoned[1], process

    def _steps(self, setting: peers.Setting, level: str) -> int:
        """Takes two steps; returns the bytes of the images that a training would not have made yet."""
        training = peers.OurTraining(*peers.build(setting.model_type, setting.img_size, None, self._device, level))
        batches = setting.micro_batches()
        for step in (1, 2):
            training.step(step, peers.LEARNING_RATE, iter(batches), len(batches))
        return sum(images.nbytes for images, _ in batches[1:])


def measure(rows: list[Row], device: str, threads: int) -> None:
    """Prints the table of what is reckoned and measured."""
    whole = ("reserved", 2**30, "GiB") if device == "cuda" else ("process", 2**20, "MiB")
    kinds = ("tensors", whole[0])
    header = ["", "px", "", "batch", "micro-batches"]
    for kind in kinds:
        header += [f"{kind}, reckoned, {whole[2]}", "measured", "reckoned / measured"]
    cells = []
    for row in rows:
        if device == "cuda":
            found = Training(row, device).run()
        else:
            build: Any = functools.partial(Training, row, device)
            remote = common.Remote(common.Job(build, ("torch._dynamo",), device, threads))
            found = cast(tuple[int, ...], remote.run())
            remote.close()
        line = [row[0], str(row[1]), *(str(x) for x in row[2:])]
        for reckoned, measured in (found[:2], found[2:]):
            numbers = [f"{x / whole[1]:,.{1 if device == 'cuda' else 0}f}" for x in (reckoned, measured)]
            line += [*numbers, f"{reckoned / measured:.2f}"]
        cells.append(line)
        print(" ".join(line), flush=True)
    common.print_table(header, cells)


def plan(device: str) -> None:
    """Prints the micro-batches on GPUs of several sizes, at each level."""
    predecessor = [row for name, row in published.ROWS.items() if name.startswith("predecessor")]
    done = sorted({(row.model_type, row.img_size, row.batch_size) for row in predecessor})
    for model in flags.MODELS:
        done += [(model, px, BATCH) for px in (224, 378 if CONFIGS[model].patch_size == 14 else 384)]
    cells = []
    for model_type, img_size, batch in dict.fromkeys(done):
        needs = [need_of(model_type, img_size, level, device) for level in LEVELS]
        line = [model_type, str(img_size), str(batch)]
        line.append(" / ".join(f"{need.bytes(batch, 1) / 2**30:.1f}" for need in needs))
        for card in CARDS_GIB:
            free = int(memory.GPU_SHARE * (card - CONTEXT_GIB) * 2**30)
            parts = [need.fewest_micro_batches(batch, free) for need in needs]
            fits = [need.bytes(-(-batch // n), n) <= free for need, n in zip(needs, parts)]
            line.append(" / ".join(str(n) if fit else "-" for n, fit in zip(parts, fits)))
        cells.append(line)
        print(" ".join(line), flush=True)
    levels = " / ".join(LEVELS)
    header = ["", "px", "batch", f"at once, GiB, {levels}", *(f"{card} GB" for card in CARDS_GIB)]
    common.print_table(header, cells)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    p = argparse.ArgumentParser(description="Memory that is reckoned for a training, against what it takes.")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what computes")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads that compute")
    p.add_argument("--rows", nargs="+", type=parse_row, metavar="MODEL:PIXELS:LEVEL:BATCH:MICRO_BATCHES")
    p.add_argument("--plan", action="store_true", help="print micro-batches on GPUs of several sizes")
    args = p.parse_args(argv)
    if args.plan:
        plan(args.device)
    else:
        measure(args.rows or rows_of(args.device), args.device, args.threads)


if __name__ == "__main__":
    main()
