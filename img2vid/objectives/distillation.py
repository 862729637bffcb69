"""Staying near the frozen image model: cosine distance of clip features and of tokens, optionally on masked clips.

Features: FROSTER (arXiv:2402.03241). Tokens of masked clips: Unmasked Teacher (UMT, arXiv:2303.16058).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from img2vid.objectives.base import Objective, ObjectiveError, Step, Surroundings, encode_clips, share


class Distillation(Objective):
    """How far the video model is from the image model.

    Args:
        features: weight of ``feature_distillation_loss``, on the clip feature and the image model's mean over frames.
        tokens: weight of ``token_distillation_loss``, on the last block's patch tokens of every frame.
        mask_ratio: share of the patches hidden from the video model, the same in all frames; only visible ones count.
            differs from UMT: hidden patches are painted with the mean colour rather than left out, which saves no
            compute, and are drawn at random rather than by the teacher's attention.
    """

    def __init__(self, features: float = 1.0, tokens: float = 0.0, mask_ratio: float = 0.0) -> None:
        super().__init__()
        share("mask_ratio", mask_ratio)
        if not (features or tokens):
            raise ObjectiveError("Distillation with features=0 and tokens=0 does nothing: leave it out.")
        self.features, self.tokens, self.mask_ratio = features, tokens, mask_ratio

    def setup(self, around: Surroundings) -> None:
        self.teacher = around.teacher("Distillation")

    def forward(self, step: Step) -> dict[str, Tensor]:
        clips = step.batch["clip"]  # (B, T, C, H, W)
        teacher = self.teacher.on(clips)
        tower = getattr(teacher, "visual", teacher).tower
        with torch.no_grad():
            target, target_tokens = encode_clips(teacher, clips)  # (B, D), (B*T, P + N, D)
        visible = None
        features, tokens = step.encoded if not self.mask_ratio else (None, None)
        if self.mask_ratio:
            visible = self.draw_visible(clips, tower.patch_size)
            features, tokens = step.encode(paint(clips, visible))
        losses = {}
        if self.features:
            losses["feature_distillation_loss"] = self.features * distance(features, target).mean()
        if self.tokens:
            if tokens.shape != target_tokens.shape:
                raise ObjectiveError(
                    f"The video model's last tokens {tuple(tokens.shape)} and the image model's "
                    f"{tuple(target_tokens.shape)} do not match (tubelets, patch dropout?). Use tokens=0."
                )
            away = distance(tokens, target_tokens)[:, tower.num_prefix_tokens :]  # (B*T, N)
            if visible is not None:
                away = away[visible.flatten(1).repeat_interleave(clips.shape[1], dim=0)]
            losses["token_distillation_loss"] = self.tokens * away.mean()
        return losses

    def draw_visible(self, clips: Tensor, patch_size: tuple[int, int]) -> Tensor:
        """Which patches of each clip the video model sees, (B, rows, columns)."""
        rows, columns = (size // patch for size, patch in zip(clips.shape[-2:], patch_size, strict=True))
        count = max(1, round(rows * columns * (1 - self.mask_ratio)))
        rank = torch.rand(len(clips), rows * columns, device=clips.device).argsort(dim=1).argsort(dim=1)
        return (rank < count).unflatten(1, (rows, columns))


def paint(clips: Tensor, visible: Tensor) -> Tensor:
    """Clips (B, T, C, H, W) with the mean colour, 0 once normalised, where ``visible`` (B, rows, columns) says no."""
    mask = F.interpolate(visible[:, None].to(clips.dtype), clips.shape[-2:], mode="nearest")  # (B, 1, H, W)
    return clips * mask[:, None]


def distance(x: Tensor, y: Tensor) -> Tensor:
    """One minus the cosine along the last dimension."""
    return 1 - F.cosine_similarity(x.float(), y.float(), dim=-1)
