"""What ``train.py`` does in one update and in one evaluation, without its flags, logs and files.

Nothing may import ``train``; these two mirror ``train.train`` and ``train.evaluate`` line by line, and
tests/test_benchmarks.py holds that their losses are those of a run of ``train.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import CONFIGS
from models.modeling import VisionTransformer
from utils import augment, data_utils, datasets, dist_util
from utils.evaluation import Predictions
from utils.precision import Precision

NUM_CLASSES = 10
SEED = 42


def build(
    model_type: str, img_size: int, dropout: float | None, device: str, level: str
) -> tuple[VisionTransformer, Precision]:
    """The model with random weights, and its number formats; it is not prepared yet."""
    place = dist_util.setup(device, -1)
    config = CONFIGS[model_type]
    if dropout is not None:
        config = replace(config, dropout_rate=dropout)
    torch.manual_seed(SEED)
    model = VisionTransformer(config, img_size, NUM_CLASSES, zero_head=True)
    return model.to(place), Precision(place, level)


class Updates:
    """The training loop's updates."""

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        self.precision = precision
        self.optimizer = torch.optim.SGD(precision.prepare(model), lr=0.0, momentum=0.9, fused=True)
        precision.attach(model, self.optimizer)
        self.model = dist_util.wrap(model)

    def update(self, step: int, learning_rate: float, parts: Iterable[data_utils.Batch], accumulation: int) -> Tensor:
        """Update number ``step`` on ``accumulation`` batches of ``parts``; returns its mean loss."""
        batches = iter(parts)
        torch.manual_seed(data_utils.derive_seed(SEED, data_utils.DROPOUT, step, dist_util.rank()))
        self.model.train()
        step_loss = torch.zeros((), device=self.precision.device)
        for part in range(accumulation):
            images, labels = next(batches)
            with dist_util.sync_gradients(self.model, now=part == accumulation - 1):
                with self.precision.autocast():
                    loss = self.model(images, labels) / accumulation
                self.precision.backward(loss)
            step_loss += loss.detach()
        self.precision.collect_skipped()  # where the loop finds the learning rate
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.precision.step(self.optimizer, 1.0)
        return step_loss


@torch.inference_mode()
def evaluate(
    model: nn.Module, pictures: datasets.Images, precision: Precision, img_size: int, batch_size: int, workers: int
) -> tuple[float, float]:
    """Accuracy and mean loss over all pictures."""
    model.eval()
    transform = augment.EvalTransform(img_size)
    loss_sum, predictions = torch.zeros((), dtype=torch.float64, device=precision.device), Predictions()
    for images, labels in data_utils.eval_batches(pictures, batch_size, transform, precision.device, workers):
        with precision.autocast():
            logits = model(images)[0].float()
        loss_sum += F.cross_entropy(logits, labels, reduction="sum").to(torch.float64)
        predictions.add(logits)
    found = predictions.result(pictures.labels, loss_sum)
    return found.accuracy, found.loss
