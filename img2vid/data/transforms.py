"""Clips made ready: torchvision v2 on uint8 (T, C, H, W), every frame of a clip treated alike.

    spec = InputSpec(size=224, mean=..., std=..., interpolation="bicubic")     # what the backbone was trained on
    augment = TrainTransform(spec, flip=True)          # clip, seed -> uint8 (T, C, size, size)
    crop = TestTransform(spec, num_crops=3)            # clip -> uint8 (3, T, C, size, size)
    normalise = Normalise(spec)                        # on the device: uint8 (..., C, H, W) -> float

Clips stay uint8 until they are on the device: a quarter of the bytes to move, and resizing uint8 channels-last memory
is several times faster than resizing floats. v2 draws one random choice per call, so a clip stays consistent; the
draw depends on `seed` alone, so any clip of any epoch can be made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from img2vid.data.clipwide import ClipColorJitter, ClipRandAugment

INTERPOLATIONS = {
    "bilinear": v2.InterpolationMode.BILINEAR,
    "bicubic": v2.InterpolationMode.BICUBIC,
    "nearest": v2.InterpolationMode.NEAREST,
}


@dataclass(frozen=True)
class InputSpec:
    """What an image model expects of its input.

    size: pixels, the side of the square it sees.
    mean, std: per channel (R, G, B), of pixel values from 0 to 1.
    interpolation: "bilinear", "bicubic" or "nearest".
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"

    def __post_init__(self):
        if not isinstance(self.size, Integral) or isinstance(self.size, bool) or self.size < 1:
            raise ValueError(f"size={self.size!r}: expected pixels, 1 or more")
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(map(repr, INTERPOLATIONS))
            raise ValueError(f"interpolation={self.interpolation!r}: expected one of {known}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):  # nan is not
            raise ValueError(f"expected 3 means and 3 positive deviations; given mean={self.mean}, std={self.std}")
        if not all(0 <= value <= 1 for value in (*self.mean, *self.std)):
            raise ValueError(
                f"mean={self.mean}, std={self.std}: expected those of pixel values from 0 to 1; divide those of pixel "
                "values from 0 to 255 by 255"
            )


class TrainTransform:
    """Random resized crop, then what is switched on; uint8 (T, C, H, W) -> uint8 (T, C, size, size).

    scale: share of the picture's area the crop covers, (lowest, highest). ratio: its width / height.
    flip: mirror half of the clips. Switch off where left and right are part of the label ("pushing something left").
    rand_augment: (number of operations, magnitude 0 to 30) of RandAugment, or None.
    color_jitter: strength for brightness, contrast and saturation, 0 for none. Costs more than all the rest together.
    erase: probability of one erased box, the same in all frames, filled with the mean colour.
    Colours change by one mapping for all frames, also where it depends on the picture (clipwide.py).
    Raises ValueError for values out of these ranges.
    """

    def __init__(
        self,
        spec: InputSpec,
        scale: tuple[float, float] = (0.25, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        rand_augment: tuple[int, int] | None = None,
        color_jitter: float = 0.0,
        erase: float = 0.0,
    ):
        interpolation = INTERPOLATIONS[spec.interpolation]
        check_range("scale", scale, 1.0)
        check_range("ratio", ratio, float("inf"))
        if rand_augment is not None and not is_rand_augment(rand_augment):
            raise ValueError(f"rand_augment={rand_augment!r}: expected (operations, 1 or more; magnitude, 0 to 30)")
        mean_colour = [round(255 * value) for value in spec.mean]
        steps = [v2.RandomResizedCrop(spec.size, scale, ratio, interpolation=interpolation, antialias=True)]
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        if rand_augment is not None:
            steps.append(ClipRandAugment(*rand_augment, interpolation=v2.InterpolationMode.BILINEAR, fill=mean_colour))
        if color_jitter:
            steps.append(ClipColorJitter(color_jitter, color_jitter, color_jitter))
        if erase:
            steps.append(v2.RandomErasing(erase, value=mean_colour))
        self.steps = v2.Compose(steps)

    def __call__(self, clip: torch.Tensor, seed: int) -> torch.Tensor:
        check_clip(clip)
        with seeded(seed):
            return self.steps(clip)


class TestTransform:
    """Resize, then cut squares: uint8 (T, C, H, W) -> uint8 (num_crops, T, C, size, size).

    num_crops: 1 cuts the centre; 3 cuts both ends and the centre of the longer side, as in multi-view testing.
    short_side: pixels the shorter side is resized to before the cut; None means `spec.size`.
    """

    __test__ = False  # the name is not meant for test collectors

    def __init__(self, spec: InputSpec, num_crops: int = 1, short_side: int | None = None):
        if num_crops not in (1, 3):
            raise ValueError(f"num_crops={num_crops}: expected 1 (centre) or 3 (along the longer side)")
        self.size, self.num_crops = spec.size, num_crops
        self.short_side = spec.size if short_side is None else short_side
        if self.short_side < spec.size:
            raise ValueError(f"short_side={short_side} is smaller than the crop of {spec.size} pixels")
        self.interpolation = INTERPOLATIONS[spec.interpolation]

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        check_clip(clip)
        if min(clip.shape[-2:]) != self.short_side:
            clip = v2.functional.resize(clip, [self.short_side], self.interpolation, antialias=True)
        height, width = clip.shape[-2:]
        middle = ((height - self.size) // 2, (width - self.size) // 2)
        corners = [middle]
        if self.num_crops == 3 and width >= height:
            corners = [(middle[0], 0), middle, (middle[0], width - self.size)]
        elif self.num_crops == 3:
            corners = [(0, middle[1]), middle, (height - self.size, middle[1])]
        return torch.stack([clip[..., y : y + self.size, x : x + self.size] for y, x in corners])


class Normalise(nn.Module):
    """uint8 (..., C, H, W) -> float, (x / 255 - mean) / std, as one multiplication and one addition in place."""

    def __init__(self, spec: InputSpec, dtype: torch.dtype = torch.float32):
        super().__init__()
        mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
        self.dtype = dtype
        # Not persistent: they are facts about the data, and checkpoints hold the model.
        self.register_buffer("factor", (1 / (255 * std)).view(3, 1, 1), persistent=False)
        self.register_buffer("offset", (-mean / std).view(3, 1, 1), persistent=False)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        if clips.dtype != torch.uint8:
            raise TypeError(f"expected uint8 clips, given {clips.dtype}: normalising twice would go unnoticed")
        return clips.float().mul_(self.factor).add_(self.offset).to(self.dtype)


class MixClips:
    """Mixup and CutMix on a batch of normalised clips: (B, T, C, H, W), labels (B,) -> clips, soft labels (B, classes).

    One draw per batch, by `seed` alone where one is given; every frame of a clip gets the same weight (mixup) or the
    same box (CutMix). With both on, each batch gets one of the two. Sources: arXiv 1710.09412, arXiv 1905.04899.
    """

    def __init__(self, num_classes: int, mixup_alpha: float = 0.8, cutmix_alpha: float = 1.0):
        if not (mixup_alpha >= 0 and cutmix_alpha >= 0 and num_classes >= 1):
            given = f"num_classes={num_classes}, mixup_alpha={mixup_alpha}, cutmix_alpha={cutmix_alpha}"
            raise ValueError(f"{given}: expected 1 class or more and strengths of 0 or more")
        self.num_classes, choices = num_classes, []
        if mixup_alpha:
            choices.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
        if cutmix_alpha:
            choices.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))
        if not choices:
            raise ValueError("MixClips with mixup_alpha=0 and cutmix_alpha=0 does nothing: leave it out")
        self.mix = v2.RandomChoice(choices)

    def __call__(
        self, clips: torch.Tensor, labels: torch.Tensor, seed: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not clips.is_floating_point() or clips.ndim != 5:
            raise TypeError(f"expected normalised clips (B, T, C, H, W), given {clips.dtype} {tuple(clips.shape)}")
        if labels.dtype != torch.int64 or not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(
                f"mixing needs a class number from 0 to {self.num_classes - 1} for each clip, given {labels.tolist()} "
                "(-1: no label). Complete the list's labels, or leave mixing out"
            )
        with seeded(seed):
            mixed, soft = self.mix(tv_tensors.Video(clips), labels)
        return mixed.as_subclass(torch.Tensor), soft


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Inside, draws on the CPU follow from `seed`; the caller's random numbers, and those of GPUs, are left alone."""
    if seed is None:
        yield
        return
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of all GPUs too
    try:
        yield
    finally:
        torch.set_rng_state(state)


def check_range(name: str, values: tuple[float, float], highest: float) -> None:
    if not isinstance(values, (tuple, list)) or len(values) != 2 or not 0 < values[0] <= values[1] <= highest:
        most = f"at most {highest:g}" if highest < float("inf") else "any"
        raise ValueError(f"{name}={values!r}: expected (lowest, highest), above 0, {most}")


def is_rand_augment(values: tuple[int, int]) -> bool:
    if not isinstance(values, (tuple, list)) or len(values) != 2 or not all(isinstance(v, Integral) for v in values):
        return False
    return values[0] >= 1 and 0 <= values[1] <= 30


def check_clip(clip: torch.Tensor) -> None:
    if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[1] != 3 or not clip.numel():
        raise TypeError(f"expected a uint8 clip (T, 3, H, W), given {clip.dtype} {tuple(clip.shape)}")
