"""From the features of views to one score for each class, and the three ways of making one answer of many views.

feature       normalise each view's feature, mean over views, normalise, then compare with the texts
logit         compare each view, mean over views
probability   compare each view, softmax, mean over views
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from img2vid.choices import FUSIONS
from img2vid.evaluation.errors import EvaluationError


@dataclass
class TextHead:
    """Classes as text embeddings (C, D), normalised, with the learned temperature (and SigLIP's bias)."""

    weight: Tensor
    scale: float
    bias: float = 0.0

    @classmethod
    def of(cls, model, weight: Tensor) -> TextHead:
        bias = getattr(model, "logit_bias", None)
        return cls(weight, float(model.logit_scale.detach().exp()), 0.0 if bias is None else float(bias.detach()))

    def logits(self, features: Tensor) -> Tensor:
        return self.scale * (features @ self.weight.to(features.dtype).T) + self.bias


@dataclass
class OwnHead:
    """A classifier of the model's own: its output already is one logit for each class."""

    num_classes: int

    def logits(self, features: Tensor) -> Tensor:
        return features


def score(head: TextHead | OwnHead, features: Tensor, fusion: str, classes: Sequence[int] | None = None):
    """Features of all views (n, V, D) -> what to rank by (n, C), and probabilities (n, C); float64.

    Args:
        classes: only these compete.

    Raises:
        EvaluationError: an unknown fusion, or one that needs features where there are logits.
    """
    if fusion not in FUSIONS:
        raise EvaluationError(f"fusion={fusion!r}: expected one of {', '.join(FUSIONS)}.")
    if isinstance(head, OwnHead) and fusion == "feature":
        raise EvaluationError("A classifier's views are fused as logit or probability, not as feature.")
    features = features.double()
    if isinstance(head, TextHead):
        features = F.normalize(features, dim=-1)
    if fusion == "feature":
        features = F.normalize(features.mean(dim=1, keepdim=True), dim=-1)  # (n, 1, D): one view left
    logits = head.logits(features)  # (n, V, C)
    if classes is not None:
        logits = logits[..., torch.as_tensor(classes)]
    if fusion == "probability":
        probabilities = logits.softmax(dim=-1).mean(dim=1)
        return probabilities, probabilities
    logits = logits.mean(dim=1)
    return logits, logits.softmax(dim=-1)
