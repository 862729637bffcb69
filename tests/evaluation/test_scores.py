"""Fusion of views, said again in loops."""

import math

import pytest
import torch

from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.scores import OwnHead, TextHead, score


def unit(vector):
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def softmax(values):
    exp = [math.exp(v - max(values)) for v in values]
    return [e / sum(exp) for e in exp]


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(2)
    weight = torch.nn.functional.normalize(torch.randn(5, 6, generator=generator), dim=-1)
    return TextHead(weight, scale=10.0, bias=-1.5), torch.randn(3, 4, 6, generator=generator)


@pytest.mark.parametrize("classes", [None, [4, 0, 2]])
@pytest.mark.parametrize("fusion", ["feature", "logit", "probability"])
def test_fusion(case, fusion, classes):
    head, features = case
    got_scores, got_probabilities = score(head, features, fusion, classes)
    weight = [head.weight[c].tolist() for c in (classes or range(5))]
    for video, scores, probabilities in zip(features.tolist(), got_scores, got_probabilities, strict=True):
        views = [unit(view) for view in video]
        if fusion == "feature":
            views = [unit(mean(views))]
        logits = [[10.0 * sum(a * b for a, b in zip(view, w, strict=True)) - 1.5 for w in weight] for view in views]
        expected = mean([softmax(row) for row in logits]) if fusion == "probability" else softmax(mean(logits))
        assert probabilities.tolist() == pytest.approx(expected, rel=1e-5)
        assert scores.argsort().tolist() == torch.tensor(expected).argsort().tolist()


def test_fusions_differ_and_agree_on_one_view(case):
    head, features = case
    together = [score(head, features, fusion)[1] for fusion in ("feature", "logit", "probability")]
    assert not any(torch.allclose(a, b) for a, b in [together[:2], together[1:], together[::2]])
    single = [score(head, features[:, :1], fusion)[1] for fusion in ("feature", "logit", "probability")]
    assert all(torch.allclose(single[0], other) for other in single)


def test_a_classifiers_logits_stay_logits():
    logits = torch.randn(2, 3, 4)
    assert torch.allclose(score(OwnHead(4), logits, "logit")[0], logits.double().mean(1))
    with pytest.raises(EvaluationError, match="not as feature"):
        score(OwnHead(4), logits, "feature")
    with pytest.raises(EvaluationError, match="expected one of feature, logit, probability"):
        score(OwnHead(4), logits, "max")
