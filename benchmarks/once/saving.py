"""The cost of saving in a training: seconds and megabytes of a state and of the best weights, and their share.

    python -m benchmarks.once.saving [--model_type ViT-B_32] [--folder output]

``<name>_last.pt`` and ``<name>_checkpoint.bin`` are written as ``train.py`` writes them: to a temporary
file, flushed to the disk, renamed.  One step of ``--batch_size`` images is timed for comparison and
scaled to the default 512; the share is that of a run that saves both files at every evaluation, every
100 steps, and takes no time for the evaluations themselves.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import sys
import tempfile

import torch

from benchmarks import common, peers
from models.configs import CONFIGS
from utils import checkpoint

DEFAULT_BATCH, DEFAULT_EVERY = 512, 100


def measure(
    model_type: str, folder: str, device: str, level: str, batch_size: int, rounds: int
) -> tuple[dict[str, tuple[list[float], int]], float]:
    """Returns the seconds of each save and the bytes of each file; the seconds of the fastest step."""
    img_size = 224 if CONFIGS[model_type].hidden_size > 32 else 32
    model, precision = peers.build(model_type, img_size, None, device, level)
    training = peers.OurTraining(model, precision)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch_size, 3, img_size, img_size, generator=generator).to(device) * 2 - 1
    labels = torch.randint(0, peers.NUM_CLASSES, (batch_size,), generator=generator).to(device)
    step = functools.partial(training.step, 1, 0.01, itertools.repeat((images, labels)), 1)
    secs = [common.timed(step, 1, device) for _ in range(max(rounds, 2))]

    metadata = checkpoint.CheckpointMetadata(
        model_type, img_size, [str(i) for i in range(peers.NUM_CLASSES)], "erf", "digits", 1, 0.5
    )
    files = {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        last, best = os.path.join(scratch, "a_last.pt"), os.path.join(scratch, "a_checkpoint.bin")

        def save_last() -> None:
            state = {name: kind() for name, kind in checkpoint.STATE_KINDS.items()}
            state |= {"model": precision.float32_weights(model), "optimizer": training.optimizer.state_dict()}
            checkpoint.save_state(last, state)

        def save_best() -> None:
            checkpoint.save_weights(best, precision.float32_weights(model), metadata)

        for path, save in ((last, save_last), (best, save_best)):
            times = [common.timed(save, 1, device) for _ in range(rounds)]
            files[os.path.basename(path)] = (times, os.path.getsize(path))
    return files, min(secs)


def share(save_secs: float, step_secs: float) -> float:
    """Returns the share of a training that saves for so long every ``DEFAULT_EVERY`` steps."""
    return save_secs / (save_secs + DEFAULT_EVERY * step_secs)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="benchmarks.once.saving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model_type", choices=CONFIGS, default="ViT-B_32", metavar="MODEL")
    p.add_argument("--folder", default=".", help="on the disk to be measured")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--fp16_opt_level", choices=("O0", "O1", "O2", "O3"), default="O0")
    p.add_argument("--batch_size", type=int, default=16, help="of the step that is timed")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--rounds", type=int, default=3)
    return p


def main(argv: list[str] | None = None) -> int:
    """Prints a table; returns the exit code."""
    p = make_parser()
    args = p.parse_args(argv)
    if min(args.batch_size, args.threads, args.rounds) < 1:
        p.error("--batch_size, --threads and --rounds are at least 1")
    if not os.path.isdir(args.folder):
        p.error(f"there is no folder {args.folder}")
    torch.set_num_threads(args.threads)
    files, step_secs = measure(
        args.model_type, args.folder, args.device, args.fp16_opt_level, args.batch_size, args.rounds
    )
    print(common.hardware(args.threads, args.device))
    rows = [
        [name, f"{size / 1e6:.0f}", f"{statistics.median(secs):.2f}", f"{min(secs):.2f} - {max(secs):.2f}"]
        for name, (secs, size) in files.items()
    ]
    common.print_table(["file", "MB", "seconds to save (median)", "range"], rows)
    total = sum(statistics.median(secs) for secs, _ in files.values())
    whole = step_secs * DEFAULT_BATCH / args.batch_size
    print(
        f"a step of {args.batch_size} images: {step_secs:.2f} s; of {DEFAULT_BATCH}, scaled: {whole:.1f} s\n"
        f"share of saving both every {DEFAULT_EVERY} steps of {DEFAULT_BATCH}: {share(total, whole):.3%}; "
        f"it reaches 2 % where a step takes {total * 49 / DEFAULT_EVERY:.2f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
