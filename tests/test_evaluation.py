"""Accuracy, confusion matrix and worst mistakes of predictions; of one rank and of several."""

import numpy as np
import pytest
import torch

from utils import dist_util
from utils.evaluation import EvalResult, Predictions

TRUTH = torch.tensor([0, 0, 1, 1, 2, 2, 2])
PREDICTED = torch.tensor([0, 1, 1, 0, 2, 0, 1])
CONFIDENCE = torch.tensor([0.9, 0.6, 0.99, 0.8, 0.7, 0.95, 0.6])


def test_accuracy_confusion_and_worst_mistakes():
    result = EvalResult(0.5, TRUTH, PREDICTED, CONFIDENCE)
    assert result.accuracy == 3 / 7
    matrix = result.confusion(4)
    assert matrix.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert result.worst_mistakes(10) == [5, 3, 1, 6]  # of equals the first
    assert result.worst_mistakes(2) == [5, 3]


def test_without_mistakes_there_is_no_worst():
    assert EvalResult(0.0, TRUTH, TRUTH, CONFIDENCE).worst_mistakes(5) == []


def collect(logits, batch_size, rank=0, world_size=1):
    predictions = Predictions()
    for batch in logits[rank::world_size].split(batch_size):
        predictions.add(batch)
    return predictions


def test_predictions_are_the_largest_logits_and_their_probabilities():
    logits = torch.randn(11, 5, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.arange(11) % 5
    result = collect(logits, 4).result(labels, torch.tensor(22.0, dtype=torch.float64))
    x = logits.double().numpy()
    expected = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    assert result.loss == 2
    assert result.truth.tolist() == labels.tolist()
    assert result.predicted.tolist() == x.argmax(axis=1).tolist()
    assert result.confidence.tolist() == pytest.approx(expected.max(axis=1).tolist(), rel=1e-5)


@pytest.mark.parametrize(("num_images", "world_size"), [(11, 3), (2, 3)])
def test_several_ranks_have_together_the_result_of_one(num_images, world_size, monkeypatch):
    logits = torch.randn(num_images, 5, generator=torch.Generator().manual_seed(1))
    labels, loss = torch.arange(num_images) % 5, torch.tensor(1.0)
    alone = collect(logits, 4).result(labels, loss)
    shares = []  # what each would add to the sum

    def record(x):
        shares.append(x.clone())
        return x

    monkeypatch.setattr(dist_util, "sum_over_ranks", record)
    for rank in range(world_size):
        collect(logits, 4, rank, world_size).result(labels, loss, rank, world_size)
    monkeypatch.setattr(dist_util, "sum_over_ranks", lambda x: sum(shares))
    together = collect(logits, 4, 0, world_size).result(labels, loss, 0, world_size)
    assert together.predicted.equal(alone.predicted)
    assert together.confidence.equal(alone.confidence)
