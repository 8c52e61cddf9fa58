"""Accuracy, confusion matrix and worst mistakes of predictions; of one rank and of several."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("absent", [[], [3], [0, 4], [1, 2, 3, 4]])
def test_balanced_accuracy_is_scikit_learns(seed, absent):
    generator = torch.Generator().manual_seed(seed)
    truth, predicted = torch.randint(0, 5, (2, 200), generator=generator)
    kept = torch.rand(200, generator=generator) > 0.15 * truth  # the later, the fewer
    kept &= ~torch.isin(truth, torch.tensor(absent, dtype=torch.long))
    truth, predicted = truth[kept], predicted[kept]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no word for predictions of a class that is absent
        expected = balanced_accuracy_score(truth.numpy(), predicted.numpy())
    result = EvalResult(0.5, truth, predicted, torch.ones(len(truth)))
    assert result.balanced_accuracy == pytest.approx(expected, rel=1e-12)


def test_a_class_of_one_image_counts_as_much_as_one_of_many():
    truth = torch.tensor([0] * 99 + [1])
    always_the_first = EvalResult(0.5, truth, torch.zeros(100, dtype=torch.long), torch.ones(100))
    assert (always_the_first.accuracy, always_the_first.balanced_accuracy) == (0.99, 0.5)


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
