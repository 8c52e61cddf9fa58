"""What a person looks at while a run goes on and after it: pictures in TensorBoard, and the report.

This module must not decide on anything that is trained.
"""

from __future__ import annotations

import argparse
import logging
import time

import torch
from PIL.Image import Image
from torch import Tensor

from utils import checkpoint, datasets, dist_util, figures, files, hardware
from utils import report as page
from utils.args import log_dir, make_parser, report_path
from utils.evaluation import EvalResult
from utils.metrics import MetricsWriter, read_lines
from utils.precision import Precision

logger = logging.getLogger("train")

#: So many of the first update's pictures and of the worst mistakes are shown, with so long sides.
SHOWN_IMAGES, SHOWN_MISTAKES, IMAGE_PX, MISTAKE_PX = 64, 24, 96, 128


def show_batch(writer: MetricsWriter, images: Tensor, labels: Tensor, classes: list[str]) -> None:
    """Shows the first update's pictures in TensorBoard as the model sees them: cropped, resized, mirrored."""
    if writer.enabled:
        pictures = figures.from_tensor(images[:SHOWN_IMAGES])
        panels = [(classes[label], figures.scaled(x, IMAGE_PX)) for label, x in zip(labels.tolist(), pictures)]
        writer.picture(1, "train/pictures", figures.arrange(panels, columns=8))


def show_best(writer: MetricsWriter, found: EvalResult, data: datasets.DataSets, step: int) -> None:
    """Shows in TensorBoard which classes and which pictures an evaluation took for others."""
    if writer.enabled:
        writer.picture(step, "test/confusion", figures.confusion(found.confusion(len(data.classes)), data.classes))
        panels = [(f"{m.predicted}, is {m.truth}", picture) for m, picture in worst_mistakes(found, data)]
        if panels:
            writer.picture(step, "test/worst_mistakes", figures.arrange(panels, columns=4))


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


def write_report(
    args: argparse.Namespace,
    state: checkpoint.TrainingState,
    data: datasets.DataSets,
    precision: Precision,
    speed: float,
    start: float,
) -> None:
    """Writes the run's report as far as it has come; a training does not end for the lack of one."""
    if not dist_util.is_main():
        return
    try:
        contents = report_contents(args, state, data, precision, speed, start)
        files.write_text(report_path(args), page.render(contents))
    except (OSError, ValueError) as e:  # no room, or somebody removed or edited the logs
        logger.warning("The report %s could not be written (%s)", report_path(args), e)


def report_contents(
    args: argparse.Namespace,
    state: checkpoint.TrainingState,
    data: datasets.DataSets,
    precision: Precision,
    speed: float,
    start: float,
) -> page.Contents:
    """What the report tells of a run.

    Raises:
        OSError, ValueError: the logs or the pictures cannot be read.
    """
    best, parser = EvalResult(**state.best), make_parser()
    return page.Contents(
        name=args.name,
        subject=f"{args.model_type} on {args.dataset}",
        num_steps=args.num_steps,
        step=state.step,
        lines=read_lines(log_dir(args)),
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
