"""Results of an evaluation: the predicted class of every test image, and what follows from it.

Every rank predicts its share of the images; afterwards all know all predictions, so that the confusion
matrix and the worst mistakes do not depend on the number of ranks.  This module must not know models or
image files: it sees logits and labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils import dist_util


@dataclass(frozen=True)
class EvalResult:
    """All predictions of one evaluation, on the CPU.

    Attributes:
        loss: the mean over the images.
        truth, predicted: (N,) int64 numbers of classes.
        confidence: (N,) float32, the probability that the predicted class was given.
    """

    loss: float
    truth: Tensor
    predicted: Tensor
    confidence: Tensor

    @property
    def accuracy(self) -> float:
        """Share of the images whose class was predicted, 0 to 1."""
        return int((self.predicted == self.truth).sum()) / len(self.truth)

    @property
    def balanced_accuracy(self) -> float:
        """Mean over the classes that have images of the share recognised, 0 to 1; scikit-learn's has the same name."""
        totals = torch.bincount(self.truth)
        right = torch.bincount(self.truth[self.predicted == self.truth], minlength=len(totals))
        present = totals > 0
        return (right[present].double() / totals[present]).mean().item()

    def confusion(self, num_classes: int) -> np.ndarray:
        """Counts how often each class (row) was taken for each (column): (num_classes, num_classes) int64."""
        pairs = self.truth * num_classes + self.predicted
        counts = torch.bincount(pairs, minlength=num_classes**2)
        return counts.view(num_classes, num_classes).numpy()

    def worst_mistakes(self, count: int) -> list[int]:
        """Returns the images whose wrong class was given the highest probability, the worst first."""
        score = torch.where(self.predicted == self.truth, -1.0, self.confidence)
        best, order = score.sort(descending=True, stable=True)
        return order[:count][best[:count] >= 0].tolist()


class Predictions:
    """Collects this rank's predictions, batch after batch; nothing leaves the device before the end."""

    def __init__(self) -> None:
        self._predicted: list[Tensor] = []
        self._confidence: list[Tensor] = []

    def add(self, logits: Tensor) -> None:
        """Adds one batch's logits (B, num_classes), float32."""
        predicted = logits.argmax(dim=1)
        self._predicted.append(predicted)
        self._confidence.append(logits.softmax(dim=1).gather(1, predicted[:, None])[:, 0])

    def result(self, labels: Tensor, loss_sum: Tensor, rank: int = 0, world_size: int = 1) -> EvalResult:
        """Gathers the predictions of all ranks; each must take part.

        Args:
            labels: (N,) of all images, of which this rank saw every ``world_size``-th from ``rank`` on.
            loss_sum: over all images.
            rank, world_size: this rank among all.
        """
        both = torch.zeros(2, len(labels), device=loss_sum.device)  # float32 holds classes up to 2**24
        if self._predicted:
            both[0, rank::world_size] = torch.cat(self._predicted).float()
            both[1, rank::world_size] = torch.cat(self._confidence)
        predicted, confidence = dist_util.sum_over_ranks(both).cpu()
        return EvalResult(loss_sum.item() / len(labels), labels.cpu(), predicted.long(), confidence)
