"""What a person looks at while a run goes on and after it: pictures in TensorBoard, and the report.

This module must not decide on anything that is trained.
"""

from __future__ import annotations

import logging
import time

import torch
from PIL.Image import Image

from utils import datasets, dist_util, figures, files, hardware
from utils import report as page
from utils.args import make_parser
from utils.evaluation import EvalResult
from utils.log_files import read_lines

logger = logging.getLogger("train")

#: So many of the first update's pictures and of the worst mistakes are shown, with so long sides.
SHOWN_IMAGES, SHOWN_MISTAKES, IMAGE_PX, MISTAKE_PX = 64, 24, 96, 128


def training_batch(images, labels, classes):
    """TEMPORARY"""
    pictures = figures.from_tensor(images[:SHOWN_IMAGES])
    panels = [(classes[label], figures.scaled(x, IMAGE_PX)) for label, x in zip(labels.tolist(), pictures)]
    return figures.arrange(panels, columns=8)


def mistakes(found, data):
    """TEMPORARY"""
    panels = [(f"{m.predicted}, is {m.truth}", picture) for m, picture in worst_mistakes(found, data)]
    return figures.arrange(panels, columns=4) if panels else None


def worst_mistakes(found: EvalResult, data: datasets.DataSets) -> list[tuple[page.Mistake, Image]]:
    """The mistakes that were made with the most confidence, with their pictures."""
    mistakes = []
    for i in found.worst_mistakes(SHOWN_MISTAKES):
        name, picture = datasets.image_at(data.test, i)
        picture = figures.scaled(picture, MISTAKE_PX)
        truth, predicted = (data.classes[int(labels[i])] for labels in (found.truth, found.predicted))
        mistakes.append(
            (page.Mistake(figures.png(picture), name, truth, predicted, float(found.confidence[i])), picture)
        )
    return mistakes


def write_report(path, contents):
    """TEMPORARY"""
    files.write_text(path, page.render(contents))


def report_contents(args, run, data, precision, log):
    """TEMPORARY"""
    state, speed, start = run.state, log.speed(), time.perf_counter()
    best, parser = EvalResult(**state.best_result), make_parser()
    return page.Contents(
        name=args.name,
        subject=f"{args.model_type} on {args.dataset}",
        num_steps=args.num_steps,
        step=state.step,
        lines=read_lines(run.paths.log_dir),
        classes=data.classes,
        best_step=state.best_step,
        confusion=best.confusion(len(data.classes)),
        mistakes=[mistake for mistake, _ in worst_mistakes(best, data)],
        settings={f"--{name}": (value, parser.get_default(name)) for name, value in vars(args).items()},
        facts={
            **page.versions(),
            "device": f"{precision.device}, {hardware.device_name(precision.device)}",
            "numbers": str(precision),
            "processes": str(dist_util.world_size()),
            "threads of each": str(torch.get_num_threads()),
        },
        timing={
            "wall time since the last start": f"{time.perf_counter() - start:.1f} s, with evaluations",
            "images per second while training": f"{speed:.1f}",
            "pictures": f"{len(data.train):,} to train on, {len(data.test):,} to test on",
            "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        },
    )
