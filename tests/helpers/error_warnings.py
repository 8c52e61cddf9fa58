"""Warnings of train.py: the run continues, and its exit code is 0."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.helpers.error_faults import FLOAT16, after_step, befallen, in_forward, whole
from tests.helpers.error_inputs import finetuned, shapes, trained, weights
from tests.helpers.errors import Case, Group, Launch
from tests.helpers.folders import tree
from tests.helpers.runs import RUN, several_sizes, write_images
from utils import checkpoint, data_utils, input_wait


def few_images() -> list[str]:
    write_images("pets")
    return ["--dataset", "pets", "--train_batch_size", "8", "--gradient_accumulation_steps", "1", "--num_steps", "301",
            "--eval_every", "301"]  # fmt: skip


def slow_images() -> Launch:
    """A training on files in which every batch takes longer than all else, warned of at once."""
    batches = data_utils.train_batches

    def slow(*args: Any) -> Iterator[Any]:
        for batch in batches(*args):
            time.sleep(0.05)
            yield batch

    def prepare() -> None:
        data_utils.train_batches, input_wait.ENOUGH_SECS = slow, 0

    write_images("pets", several_sizes())
    return Launch(["--dataset", "pets", "--train_batch_size", "8", "--num_steps", "5"], prepare=prepare)


def described(**changes: Any) -> Callable[[], list[str]]:
    """A checkpoint with metadata beside it, changed."""

    def make() -> list[str]:
        os.makedirs("output")
        state = {name: torch.zeros(shape) for name, shape in shapes().items()}
        digits = [str(i) for i in range(10)]
        metadata = dict(model_type="testing", img_size=32, classes=digits, gelu="erf", dataset="digits", step=4,
                        accuracy=0.5)  # fmt: skip
        checkpoint.save_weights("output/a_checkpoint.bin", state, checkpoint.CheckpointMetadata(**metadata | changes))
        return ["-v"]

    return make


def split_folder(*flags: str) -> Callable[[], list[str]]:
    """A folder of images without parts, with some that are not read."""

    def make() -> list[str]:
        tree("pets", "{ant,bee}/1.png", "ant/{2..5}.png", "bee/{2..5}.png", "bee/{1..36}.cr2", "loose.png")
        return ["--dataset", "pets", *flags]

    return make


def of_other_weights() -> list[str]:
    flags, path = described()(), Path("output/a_checkpoint.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"crc32": 1}))
    return flags


def damaged_metadata() -> list[str]:
    flags = described()()
    Path("output/a_checkpoint.json").write_text('{"model_type": ')
    return flags


def again(*flags: str, change: Callable[[], object] = lambda: None) -> Callable[[], list[str]]:
    """A run of five steps, then the same command with other flags, or after something was changed."""

    def make() -> list[str]:
        trained()
        change()
        return ["--num_steps", "5", *flags]

    return make


def on_two_ranks() -> Launch:
    trained()
    return Launch(["--num_steps", "6"], ranks=[[], []])


def without_checkpoint() -> None:
    os.remove("output/a_checkpoint.bin")


WARNINGS = [
    Group("Warnings: the run continues", flags=RUN, cases=[
        Case("gelu-differs", "`-v` with another activation than the training's",
             described(gelu="tanh"), "--gelu tanh", 0, "Give `-v` the flag of the training."),
        Case("model-differs", "`-v` with another model's metadata",
             described(model_type="ViT-demo"), "--model_type ViT-demo", 0, "Give `-v` the flag of the training."),
        Case("classes-differ", "`-v` with as many classes, but others, or in another order",
             described(classes=[*"01234567", "nine", "8"]), "nine", 0, "The accuracy means nothing."),
        Case("images-left-out", "images of a format that is not read, and some that are in no class folder",
             split_folder("--num_steps", "5"), "36 .cr2 were not read", 0),
        Case("test-fraction-seen", "`-v` on more images than the training left out",
             lambda: [*described(classes=["ant", "bee", *"01234567"], test_fraction=0.2)(),
                      *split_folder("--test_fraction", "1")()], "--test_fraction 0.2", 0,
             "Give `-v` no `--test_fraction`, or other images."),
        Case("metadata-of-other-weights", "metadata beside other weights, which are not used", of_other_weights,
             "output/a_checkpoint.json", 0, "The tools stop here, with exit code 2."),
        Case("metadata-damaged", "metadata that cannot be read", damaged_metadata, "output/a_checkpoint.json", 0,
             "The tools stop here, with exit code 2."),
        Case("pretrained-none", "random weights", "--num_steps 5", "--pretrained_dir", 0),
        Case("pretrained-extra", "arrays that the model has no place for, the rest is loaded",
             lambda: [*weights(spare=torch.zeros(2).numpy()), "--num_steps", "5"], "spare", 0),
        Case("batch-larger-than-set", "a batch larger than the training set",
             "--num_steps 5 --train_batch_size 1438", "larger than the training set", 0),
        Case("epochs-many", "a training of more than 300 epochs", few_images, "epochs of the 8 images", 0),
        Case("images-slow", "a training on files that waits for its images more than a fifth of the time", slow_images,
             "--num_workers", 0, "[Slow images](data.md#slow-images) has more."),
        Case("warm-up-too-long", "a warm-up as long as the training", "--num_steps 2", "--warmup_steps", 0,
             "Give a smaller `--warmup_steps`, a tenth of the steps, say."),
        Case("precision-no-effect", "a flag of `--fp16` without it", "--num_steps 5 --fp16_opt_level O1",
             "--fp16_opt_level", 0),
        Case("zero-head-no-effect", "`--zero_head` without weights", "--num_steps 5 --zero_head", "--zero_head", 0),
        Case("jpeg-decoding-no-effect", "`--jpeg_decoding` where no JPEG in a file is trained on",
             "--num_steps 5 --jpeg_decoding full", "--jpeg_decoding", 0),
        Case("deterministic-no-effect", "`--deterministic` on a CPU", "--num_steps 5 --deterministic",
             "--deterministic", 0, "CPUs give the same bits anyway, with the same number of threads."),
        Case("step-skipped", "float16 gradients that overflow", befallen(
             in_forward(5, lambda loss: loss * 1e30), *FLOAT16, "--num_steps", "6", "--save_every", "3",
             after=lambda: whole(6)), "6", 0, "Ordinary while the loss scale is being found: the weights stay."),
        Case("report-not-written", "the report cannot be written; here, the logs have vanished",
             befallen(after_step(7, lambda: shutil.rmtree("logs")), after=lambda: whole(13)),
             "output/a_report.html", 0),
        Case("steps-extended", "a run that resumes for more steps", again("--num_steps", "7"), "--num_steps", 0),
        Case("last-digits", "a run that resumes with other flags that only round differently",
             again("--num_steps", "6", "--gradient_accumulation_steps", "4"), "--gradient_accumulation_steps", 0),
        Case("ranks-share-batch", "a run that resumes with another number of ranks", on_two_ranks,
             "--train_batch_size 8", 0),
        Case("run-replaced", "`--resume none` where a run was saved", again("--resume", "none"), "--resume none", 0),
        Case("logs-moved", "logs of an earlier run of this name", again("--resume", "none"), "logs/a/earlier-1", 0),
        Case("logs-missing", "a run that resumes without its logs",
             again("--num_steps", "6", change=lambda: shutil.rmtree("logs")), "logs/a", 0),
        Case("best-missing", "a run that resumes without its best weights",
             again("--num_steps", "6", change=without_checkpoint), "best weights", 0),
        Case("checkpoint-kept", "a checkpoint under the run's name that this run did not write",
             lambda: [*finetuned()()[1:], "--num_steps", "5"], "output/a_checkpoint.bin", 0),
    ]),
]  # fmt: skip
