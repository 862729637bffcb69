"""torchvision's colour operations where they look at a picture as a whole, looking at a whole clip instead.

Contrast is stretched around a picture's mean, AutoContrast between its extremes, Equalize by its histogram. Taken frame
by frame, each frame would get a mapping of its own: clips flicker, and a slow fade to black becomes a still. With the
frames laid below each other as one picture, one mapping serves them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

WHOLE_PICTURE = ("Contrast", "AutoContrast", "Equalize")


def as_one_picture(clip: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``change`` of the frames (T, C, H, W) laid below each other, (C, T*H, W)."""
    frames, channels, height, width = clip.shape
    tall = clip.transpose(0, 1).reshape(channels, frames * height, width)
    return change(tall).view(channels, frames, height, width).transpose(0, 1)


class ClipRandAugment(v2.RandAugment):
    """RandAugment (arXiv:1909.13719) on clips (T, C, H, W): the same operations, equally strong, in all frames."""

    def _apply_image_or_video_transform(self, image: torch.Tensor, transform_id: str, *args: Any, **kwargs: Any):
        def change(x: torch.Tensor) -> torch.Tensor:
            return super(ClipRandAugment, self)._apply_image_or_video_transform(x, transform_id, *args, **kwargs)

        return as_one_picture(image, change) if transform_id in WHOLE_PICTURE else change(image)


class ClipColorJitter(v2.ColorJitter):
    """ColorJitter on clips (T, C, H, W)."""

    def _call_kernel(self, functional: Callable, inpt: torch.Tensor, *args: Any, **kwargs: Any):
        def change(x: torch.Tensor) -> torch.Tensor:
            return super(ClipColorJitter, self)._call_kernel(functional, x, *args, **kwargs)

        return as_one_picture(inpt, change) if functional is F.adjust_contrast else change(inpt)
