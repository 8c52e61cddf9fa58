"""Remarks on a training set: classes of unequal sizes, flags that fit a small one, and what helps where it is slow.

Source of the learning rate: the published recipe's 0.03 for batches of 512, in proportion for others.
This module must not change what is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from utils.batch import Batch

#: More epochs than these are said to be many, and so many are advised.
MANY_EPOCHS, EPOCHS = 300, 100
WARMUP_SHARE = 0.05
PUBLISHED_BATCH, PUBLISHED_RATE = 512, 0.03


def class_sizes(labels: np.ndarray, classes: Sequence[str]) -> str | None:
    """Returns the smallest and the largest class of a training set in words; None if all are equal.

    Args:
        labels: (N,) integers, the numbers of the images' classes.
        classes: their names.
    """
    counts = np.bincount(labels, minlength=len(classes))
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[least] == counts[most]:
        return None
    return f"{counts[least]} ({classes[least]}) to {counts[most]} ({classes[most]})"


def for_small_set(batch: Batch, num_steps: int, num_images: int) -> str | None:
    """Returns what is unusual about so many steps on so few images, with flags that fit; None if nothing is.

    Args:
        batch: the division of a step's images.
        num_steps, num_images: steps of the training, and images that it has to train on.
    """
    num_epochs = num_steps * batch.total / num_images
    if batch.total > num_images:
        remark = f"a batch of {batch.total} is larger than the training set of {num_images} images"
    elif num_epochs > MANY_EPOCHS:
        remark = f"{num_steps} steps are {num_epochs:.0f} epochs of the {num_images} images to train on"
    else:
        return None
    flags = []
    if batch.total > num_images:
        smaller = batch.smaller(min(PUBLISHED_BATCH, num_images // 4))  # a few steps an epoch
        flags.append(f"--train_batch_size {smaller.per_rank}")
        if smaller.num_micro_batches != batch.num_micro_batches and not batch.is_auto:
            flags.append(f"--gradient_accumulation_steps {smaller.num_micro_batches}")
        batch = smaller
    num_steps = math.ceil(EPOCHS * num_images / batch.total)
    rate = PUBLISHED_RATE * batch.total / PUBLISHED_BATCH
    flags += [f"--num_steps {num_steps}", f"--warmup_steps {round(WARMUP_SHARE * num_steps)}"]
    return f"{remark}; {EPOCHS} epochs that fit it: {' '.join(flags)} --learning_rate {rate:.4g}"


def for_slow_images(share: float, num_workers: int, num_cpus: int, num_ranks: int) -> str:
    """Returns what makes a training wait less for its images.

    Args:
        share: of the time that went into waiting.
        num_workers: processes of this rank that decode; 0: it decodes itself.
        num_cpus: processors that this rank may use.
        num_ranks: ranks of this machine.
    """
    cores = f"{num_cpus} core{'s' * (num_cpus > 1)}" + f" for each of {num_ranks} ranks" * (num_ranks > 1)
    itself = ", which it decodes itself" * (num_workers == 0)
    more = "more would hardly help; " if num_workers >= num_cpus else f"raise it, up to {num_cpus}, or "
    return (
        f"The training waits {100 * share:.0f} % of the time for images{itself}; --num_workers is {num_workers}, and "
        f'there {"is" if num_cpus == 1 else "are"} {cores}: {more}resize the folder once, see "Slow images" in '
        "docs/data.md"
    )
