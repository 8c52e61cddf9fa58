"""Remarks on a training set before a training on it: classes of unequal sizes, and flags that fit a small one.

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
