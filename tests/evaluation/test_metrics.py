"""Every metric against a loop that says the same in another way, and against torchmetrics where it has it."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

from img2vid.evaluation import metrics
from img2vid.evaluation.errors import EvaluationError

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3, 5])  # uneven, and class 4 and 6 do not occur


@pytest.fixture
def scores():
    return torch.randn(10, 7, generator=torch.Generator().manual_seed(0)).double()


def naive_place(row, label):
    order = sorted(range(len(row)), key=lambda c: (-row[c], c))
    return order.index(label)


def test_places_and_predictions_with_ties(scores):
    scores = scores.round()  # many ties
    expected = [naive_place(row.tolist(), label) for row, label in zip(scores, LABELS.tolist(), strict=True)]
    assert metrics.places(scores, LABELS).tolist() == expected
    assert metrics.predictions(scores).tolist() == [
        min(range(7), key=lambda c, r=r: (-r[c], c)) for r in scores.tolist()
    ]
    flat = torch.zeros(3, 4)
    assert metrics.predictions(flat).tolist() == [0, 0, 0]
    assert metrics.places(flat, torch.tensor([0, 1, 3])).tolist() == [0, 1, 3]


def test_accuracies_and_calibration(scores):
    probabilities = scores.softmax(-1)
    found = metrics.classification(scores, probabilities, LABELS)
    micro = MulticlassAccuracy(7, average="micro")
    top5 = MulticlassAccuracy(7, average="micro", top_k=5)
    ece = MulticlassCalibrationError(7, n_bins=15)
    assert found["top1"]["value"] == pytest.approx(float(micro(probabilities, LABELS)))
    assert found["top5"]["value"] == pytest.approx(float(top5(probabilities, LABELS)))
    assert found["calibration_error"]["value"] == pytest.approx(float(ece(probabilities, LABELS)), abs=1e-6)
    right = scores.argmax(-1) == LABELS
    per_class = [float(right[c == LABELS].float().mean()) for c in (0, 1, 2, 3, 5)]
    assert found["mean_class"]["value"] == pytest.approx(sum(per_class) / 5)
    assert found["mean_class"]["value"] != pytest.approx(found["top1"]["value"])  # the mistake this guards against
    assert found["top1"]["interval"][0] <= found["top1"]["value"] <= found["top1"]["interval"][1]
    assert metrics.classification(scores[:, :4], scores[:, :4].softmax(-1), LABELS.clamp(max=3))["top5"] is None


def test_mean_class_is_torchmetrics_macro_where_all_classes_occur(scores):
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 0])
    expected = MulticlassAccuracy(7, average="macro")(scores, labels)
    right = metrics.predictions(scores) == labels
    assert metrics.mean_per_class(right, labels) == pytest.approx(float(expected))


def test_calibration_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.95, 0.05], [0.4, 0.6], [1.0, 0.0]]).double()
    labels = torch.tensor([0, 1, 1, 0])
    # ten bins: (.8, .9]: right, 0.9; (.9, 1]: wrong at 0.95 and right at 1.0; (.5, .6]: right at 0.6
    expected = (abs(1 - 0.9) + abs(1 - 1.95) + abs(1 - 0.6)) / 4
    assert metrics.calibration_error(probabilities, labels, bins=10) == pytest.approx(expected)


def test_confusion(scores):
    predicted = metrics.predictions(scores)
    expected = MulticlassConfusionMatrix(7)(predicted, LABELS)
    assert metrics.confusion(predicted, LABELS, 7) == expected.tolist()


@pytest.mark.parametrize("per_class", [False, True])
def test_bootstrap_is_the_metric_on_repeated_videos(scores, per_class):
    right = metrics.predictions(scores) == LABELS
    right[::3] = True
    got = metrics.resampled(right, LABELS, per_class, seed=5, resamples=60)
    counts = np.concatenate(list(metrics.draws(10, 60, 5))).astype(int)
    assert (counts.sum(1) == 10).all() and len({tuple(c) for c in counts}) > 50
    for value, count in zip(got, counts, strict=True):
        index = torch.tensor(np.repeat(np.arange(10), count))
        again = metrics.mean_per_class(right[index], LABELS[index]) if per_class else right[index].double().mean()
        assert value == pytest.approx(float(again))


def test_paired_difference():
    right, other = torch.tensor([1, 1, 0, 1]).bool(), torch.tensor([1, 0, 0, 0]).bool()
    found = metrics.difference(right, other, torch.zeros(4, dtype=torch.long))
    assert found["value"] == 0.5
    assert metrics.difference(right, right, torch.zeros(4, dtype=torch.long)) == {"value": 0.0, "interval": [0.0, 0.0]}


def test_means():
    assert metrics.mean_and_std([1.0, 2.0, 6.0]) == {"mean": 3.0, "std": pytest.approx(7**0.5)}
    assert metrics.mean_and_std([1.0]) == {"mean": 1.0, "std": None}
    assert metrics.harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)
    assert metrics.harmonic_mean(0.0, 0.0) == 0.0


def test_nan_is_no_score(scores):
    scores[3, 2] = float("nan")
    with pytest.raises(EvaluationError, match="diverged"):
        metrics.places(scores, LABELS)
