"""Short fine-tunings of the demo model, each with one thing as Google or the reference script does it.

Sources: github.com/google-research/vision_transformer (``vit_jax/train.py``, ``input_pipeline.py``), optax's
``trace``, TensorFlow's ``sample_distorted_bounding_box_op.cc``, github.com/jeonsworld/ViT-pytorch.  These are
experiments for benchmarks/once/deviations.py, not options of a training: nothing else may use them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import CONFIGS, DEMO, ViTConfig
from models.modeling import Attention, VisionTransformer
from utils import augment, data_utils, datasets
from utils.precision import Precision
from utils.scheduler import Schedule, make_schedule
from utils.weights import read_npz

IMG_SIZE, NUM_CLASSES, BATCH_SIZE, NUM_STEPS, WARMUP_STEPS, LEARNING_RATE = 32, 10, 32, 200, 20, 0.05
PRETRAINED = Path(__file__).resolve().parent.parent.parent / "checkpoint" / f"{DEMO}.npz"
COSINE = make_schedule("cosine", WARMUP_STEPS, NUM_STEPS)


# ---- what others do ----


class HalfMomentumSGD(torch.optim.SGD):
    """Keeps the momentum in bfloat16, as Google; a step uses it before it is rounded."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                trace = self.state[p].get("trace", torch.zeros_like(p, dtype=torch.bfloat16))
                momentum = p.grad + group["momentum"] * trace
                self.state[p]["trace"] = momentum.bfloat16()
                p.sub_(group["lr"] * momentum)


@contextlib.contextmanager
def dropout_after_attention(rate: float) -> Iterator[None]:
    """Lets the MLPs' dropout act on the attention's output projection, too, as Google."""
    compute = Attention.forward

    def forward(self: Attention, x: Tensor, num_queries: int | None = None) -> tuple[Tensor, Tensor | None]:
        x, probs = compute(self, x, num_queries)
        return F.dropout(x, rate, self.training), probs

    with mock.patch.object(Attention, "forward", forward):
        yield


def tensorflow_boxes(draws: Tensor, height: int, width: int) -> Tensor:
    """Draws TensorFlow's crops: the ratio is uniform, then the height among those that keep the area's limits.

    Arguments and result as ``augment.crop_boxes``.
    """
    boxes = []
    for u in draws[:, :4].tolist():
        ratio = 0.75 + u[0] * (1.33 - 0.75)
        low, high = (round(math.sqrt(share * height * width / ratio)) for share in augment.SCALE)
        high = min(high, height, int((width + 0.5 - 1e-7) / ratio))
        h = min(low, high) + int(u[1] * (high - min(low, high) + 1))
        if h * round(h * ratio) < augment.SCALE[0] * height * width:
            h += 1
        w = min(round(h * ratio), width)
        boxes.append([int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w])
    return torch.tensor(boxes)


def tensorflow_crop(images: Tensor, boxes: Tensor, out_size: int, mirrored: Tensor | None = None) -> Tensor:
    """Resizes as TensorFlow: bilinear, without a filter when an image shrinks, without rounding to grey levels."""
    assert mirrored is None
    crops = (x[:, t : t + h, left : left + w].float() for x, (t, left, h, w) in zip(images, boxes.tolist()))
    resized = [F.interpolate(x[None], (out_size, out_size), mode="bilinear") for x in crops]
    return augment.normalize(torch.cat(resized))


def reference_order(num_images: int, seed: int) -> Iterator[Tensor]:
    """Yields the reference's batches: a new order each epoch, whose last batch has what is left over."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(num_images, generator=generator).split(BATCH_SIZE)


def google_order(num_images: int, seed: int) -> Iterator[Tensor]:
    """Yields Google's batches, of a buffer as large as the data set, refilled from repeated epochs of one order."""
    rng = np.random.default_rng(seed)
    buffer = np.arange(num_images)
    upcoming = itertools.cycle(range(num_images))
    while True:
        batch = []
        for at in rng.integers(num_images, size=BATCH_SIZE):
            batch.append(int(buffer[at]))
            buffer[at] = next(upcoming)
        yield torch.tensor(batch)


def reference_values(model: VisionTransformer) -> None:
    """Sets the reference's initial values: PyTorch's but for the MLPs, position embeddings of zero, a random head."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and ".ffn." not in name:
            module.reset_parameters()
    nn.init.zeros_(model.transformer.embeddings.position_embeddings)


def google_schedule(decay_type: str, linear_end: float = 1e-5, first: int = 0) -> Schedule:
    """Returns Google's schedule: counts steps from ``first`` = 0; a linear decay ends at a rate of ``linear_end``."""
    ours, end = make_schedule(decay_type, WARMUP_STEPS, NUM_STEPS), linear_end / LEARNING_RATE

    def factor(k: int) -> float:
        f = ours(k - 1 + first)
        if decay_type != "linear":
            return f
        warm = min(1.0, (k - 1 + first) / WARMUP_STEPS)
        return f + end * (warm - f)

    return factor


# ---- trainings ----


def pretrained_values(model: VisionTransformer) -> None:
    """Loads the demo checkpoint, from which fine-tuning starts."""
    model.load_from(read_npz(str(PRETRAINED)))


def own_values(model: VisionTransformer) -> None:
    """Leaves this project's initial values."""


def no_patch() -> contextlib.AbstractContextManager:
    """Replaces nothing."""
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Recipe:
    """One way to train; the defaults are what ``train.py`` does.

    Attributes:
        config: the architecture with its dropout.
        start: gives the model its initial values.
        schedule: the rate of the k-th step, as a factor.
        optimizer: its class.
        order: the images of each step, or None for this project's.
        share: of the training images that is used, the first ones.
        hflip: mirror half of them.
        opt_level: of ``Precision``.
        patch: a context in which the training runs.
    """

    config: ViTConfig = CONFIGS[DEMO]
    start: Callable[[VisionTransformer], None] = pretrained_values
    schedule: Schedule = COSINE
    optimizer: type[torch.optim.SGD] = torch.optim.SGD
    order: Callable[[int, int], Iterator[Tensor]] | None = None
    share: float = 1.0
    hflip: bool = False
    opt_level: str = "O0"
    patch: Callable[[], contextlib.AbstractContextManager] = no_patch


@functools.cache
def train(recipe: Recipe, seed: int, num_steps: int = NUM_STEPS) -> tuple[Tensor, Tensor]:
    """Trains on the digits; returns, of each of the 360 test images, a 1 if it is right and the loss, in float64."""
    data = datasets.load_datasets("digits", "", 0)
    assert isinstance(data.train, datasets.MemoryImages)
    assert isinstance(data.test, datasets.MemoryImages)
    num_images = int(recipe.share * len(data.train))
    torch.manual_seed(seed)
    model = VisionTransformer(recipe.config, IMG_SIZE, NUM_CLASSES, zero_head=True)
    recipe.start(model)
    transform = augment.TrainTransform(IMG_SIZE, recipe.hflip)
    sampler = data_utils.StepSampler(num_images, BATCH_SIZE, transform.num_draws, seed)
    order = None if recipe.order is None else recipe.order(num_images, seed)
    precision = Precision(torch.device("cpu"), recipe.opt_level)
    optimizer = recipe.optimizer(precision.prepare(model), lr=0.0, momentum=0.9)
    with recipe.patch():
        for step in range(1, num_steps + 1):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * recipe.schedule(step)
            indices, draws = sampler(step)
            if order is not None:
                indices = next(order)
            torch.manual_seed(data_utils.derive_seed(seed, data_utils.DROPOUT, step))
            x = transform.batch(data.train.images[indices], draws[: len(indices)])
            with precision.autocast():
                loss = model(x, data.train.labels[indices])
            precision.backward(loss)
            precision.step(optimizer, max_grad_norm=1.0)
        model.eval()
        with torch.no_grad(), precision.autocast():
            logits = model(augment.resize(data.test.images, IMG_SIZE))[0].double()
    return (logits.argmax(dim=1) == data.test.labels).double(), F.cross_entropy(
        logits, data.test.labels, reduction="none"
    )


OURS = Recipe()
DROPOUT = replace(OURS, config=replace(OURS.config, dropout_rate=0.1))
LINEAR = replace(OURS, schedule=make_schedule("linear", WARMUP_STEPS, NUM_STEPS))
SCRATCH = replace(OURS, start=own_values)

#: Others' way -> (this project's way, the same but for that).
EXPERIMENTS: dict[str, tuple[Recipe, Recipe]] = {
    "tanh GELU": (OURS, replace(OURS, config=replace(OURS.config, gelu="tanh"))),
    "dropout 0.1": (OURS, DROPOUT),
    "dropout 0.1 after the attention's output, too": (
        DROPOUT,
        replace(DROPOUT, patch=functools.partial(dropout_after_attention, 0.1)),
    ),
    "the reference's random weights": (SCRATCH, replace(SCRATCH, start=reference_values)),
    "98 % of the training images": (OURS, replace(OURS, share=0.98)),
    "mirroring": (OURS, replace(OURS, hflip=True)),
    "TensorFlow's resize": (
        OURS,
        replace(OURS, patch=functools.partial(mock.patch.object, augment, "resized_crop", tensorflow_crop)),
    ),
    "TensorFlow's crops": (
        OURS,
        replace(OURS, patch=functools.partial(mock.patch.object, augment, "crop_boxes", tensorflow_boxes)),
    ),
    "the reference's order": (OURS, replace(OURS, order=reference_order)),
    "Google's order": (OURS, replace(OURS, order=google_order)),
    "schedule from 0": (OURS, replace(OURS, schedule=google_schedule("cosine"))),
    "linear decay to 1e-5": (LINEAR, replace(LINEAR, schedule=google_schedule("linear", first=1))),
    "momentum in bfloat16": (OURS, replace(OURS, optimizer=HalfMomentumSGD)),
    "mixed precision (O2, bfloat16)": (OURS, replace(OURS, opt_level="O2")),
}
