"""Classification metrics, each a few lines on scores (N, C) and labels (N,), with bootstrap intervals.

Equal scores are broken by class number, the same way everywhere, so no metric depends on how a library sorts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from img2vid.evaluation.errors import EvaluationError

RESAMPLES, CONFIDENCE = 1000, 0.95


def places(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand before the true one, (N,): 0 where the prediction is right."""
    if not torch.isfinite(scores).all():
        raise EvaluationError("Scores are not finite (nan or inf): the model's weights have diverged.")
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1])[None] < labels[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(dim=1)


def predictions(scores: Tensor) -> Tensor:
    """The class with the largest score, the first of equals, (N,)."""
    best = scores.max(dim=1, keepdim=True).values
    return (scores == best).int().argmax(dim=1)


def mean_per_class(right: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur of the share of their videos that is right."""
    return float(np.mean([float(right[labels == c].double().mean()) for c in labels.unique()]))


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599): |accuracy - confidence| over equal-width bins.

    Bin k holds confidences in (k / bins, (k + 1) / bins], and counts as much as it holds videos.
    """
    confidence = probabilities.max(dim=1).values.double()
    right = (predictions(probabilities) == labels).double()
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, right - confidence)
    return float(gap.abs().sum() / len(labels))


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> list[list[int]]:
    """Counts, one row for each true class and one column for each predicted one."""
    counts = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return counts.view(num_classes, num_classes).tolist()


def classification(scores: Tensor, probabilities: Tensor, labels: Tensor, seed: int = 0) -> dict:
    """All metrics of one set of scores, as ``{"top1": {"value", "interval"}, ...}``, shares from 0 to 1.

    ``top5`` is None with five classes or fewer, where it would be 1 by construction.
    """
    place = places(scores, labels)
    top1, top5 = place < 1, place < 5 if scores.shape[1] > 5 else None
    rights = {"top1": top1, "top5": top5, "mean_class": top1}
    out: dict = {}
    for name, right in rights.items():
        if right is None:
            out[name] = None
            continue
        value = mean_per_class(right, labels) if name == "mean_class" else float(right.double().mean())
        out[name] = {"value": value, "interval": interval(resampled(right, labels, name == "mean_class", seed))}
    out["calibration_error"] = {"value": calibration_error(probabilities, labels)}
    return out


def difference(right: Tensor, other: Tensor, labels: Tensor, seed: int = 0) -> dict:
    """Top-1 of one model minus that of another on the same videos; the interval is of the paired difference."""
    both = [resampled(r, labels, False, seed) for r in (right, other)]
    value = float(right.double().mean() - other.double().mean())
    return {"value": value, "interval": interval(both[0] - both[1])}


def share(right: Tensor, seed: int = 0) -> dict:
    """How many of the videos, as a share with its interval."""
    return {"value": float(right.double().mean()), "interval": interval(resampled(right, right.long(), seed=seed))}


def resampled(right: Tensor, labels: Tensor, per_class: bool = False, seed: int = 0, resamples: int = RESAMPLES):
    """The metric on videos drawn anew with replacement, (resamples,). Equal seeds draw equal videos."""
    right, labels = right.numpy().astype(np.float64), labels.numpy()
    values = []
    classes, class_of = np.unique(labels, return_inverse=True)
    one_hot = np.eye(len(classes))[class_of] if per_class else None  # (N, C)
    for counts in draws(len(right), resamples, seed):  # (r, N)
        if not per_class:
            values.append(counts @ right / len(right))
            continue
        videos, hits = counts @ one_hot, counts @ (one_hot * right[:, None])  # (r, C)
        share = np.divide(hits, videos, out=np.zeros_like(hits), where=videos > 0)
        values.append(share.sum(1) / (videos > 0).sum(1))
    return np.concatenate(values)


def draws(videos: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each video is drawn in each resample, (r, N), a few resamples at a time to bound memory."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, 50):
        size = min(50, resamples - start)
        yield rng.multinomial(videos, np.full(videos, 1 / videos), size=size).astype(np.float64)


def interval(values: np.ndarray) -> list[float]:
    """Percentile interval at ``CONFIDENCE``."""
    tail = 100 * (1 - CONFIDENCE) / 2
    return [float(v) for v in np.percentile(values, [tail, 100 - tail])]


def mean_and_std(values: Sequence[float]) -> dict:
    """Mean, and standard deviation over rounds with divisor n - 1 (None for one round)."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b), and 0 where both are 0."""
    return 2 * a * b / (a + b) if a + b > 0 else 0.0
