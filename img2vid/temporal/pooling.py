"""What image towers return, alone or several together, and its mean over the frames of a clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def first(features: Any) -> Tensor:
    """The feature itself: most towers return it alone, some in front of others (CoCa: pooled, tokens)."""
    return features[0] if isinstance(features, tuple) else features


def over(fn: Callable[[Tensor], Tensor], features: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """``fn`` of every tensor a tower returns, so that a tuple stays a tuple."""
    return tuple(map(fn, features)) if isinstance(features, tuple) else fn(features)


def mean_over_frames(features: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """One feature per frame (B, T, D) -> one per clip (B, D).

    Further tensors are tokens for a text decoder (B, T, N, D) -> (B, N, D). They are averaged around the first frame:
    T equal rows average to themselves exactly, whatever T is, so a static clip has its image's caption.
    """
    if not isinstance(features, tuple):
        return features.mean(dim=1)
    feature, *tokens = features
    return (feature.mean(dim=1), *(x[:, 0] + (x - x[:, :1]).mean(dim=1) for x in tokens))
