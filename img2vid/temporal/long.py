"""Long clips in little memory, where no gradients are asked for.

What fills memory in a block is its MLP's hidden layer and its queries, keys and values, four and three times as wide as
the tokens. Space does not mix frames and time does not mix places, so a block can do the one for some frames after the
other and the other for some places after the other. What remains is the tokens themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from img2vid.config import ConfigError, whole_number
from img2vid.temporal.block import SpaceTimeBlock
from img2vid.temporal.clip import ClipContext
from img2vid.temporal.infront import InFront, fronts_of, put_in_front, take_from_front
from img2vid.temporal.quirks import BlockInputResidual

# what may stand in front of a block and is seen to above, or has nothing to do without gradients
PASSED_BY = {"SpaceTime", "Folded", "SkippedWhenShut", "DropBeforeGate", "BlockInputResidual", "Fused", "Checkpointed"}
PASSED_BY |= {"InParts"}


class InParts(InFront):
    """In front of a block whose frames are independent in space."""

    title = "InParts"
    clip: ClipContext
    frames_at_a_time: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # (B*T, P + N, D)
        if torch.is_grad_enabled() or len(x) <= self.frames_at_a_time:
            return super().forward(x, *args, **kwargs)
        image_block = super().forward
        if isinstance(self, SpaceTimeBlock):
            image_block = super(SpaceTimeBlock, self).forward
            if not self.adds_nothing():
                places = max(1, self.frames_at_a_time * x.shape[1] // len(x))
                if self.clip.past is not None:  # a stream remembers all places together
                    places = x.shape[1]
                x = torch.cat([part + self.temporal_residual(part) for part in x.split(places, dim=1)], dim=1)
        parts = []
        with self.clip.of(None):  # whatever in the image block asks for T is not independent, and must not guess
            for start in range(0, len(x), self.frames_at_a_time):
                parts.append(image_block(*self.part(start, x, *args), **self.named(start, x, kwargs)))
        return torch.cat(parts)

    def part(self, start: int, x: Tensor, *args: Any) -> list[Any]:
        """Some frames of the tokens, and of what else there is one of for each frame (masks (B*T, H, N, N))."""

        def is_of_frames(value: Any) -> bool:
            return value is x or (isinstance(value, Tensor) and value.ndim == 4 and len(value) == len(x))

        stop = start + self.frames_at_a_time
        return [value[start:stop] if is_of_frames(value) else value for value in (x, *args)]

    def named(self, start: int, x: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(kwargs, self.part(start, x, *kwargs.values())[1:], strict=True))


class LongClips:
    """``set_frames_at_a_time()`` of a model."""

    def set_frames_at_a_time(self, number: int | None) -> None:
        """Let blocks work on so many frames at a time without gradients: the same up to rounding, for long clips.

        Args:
            number: frames, of all clips of a batch together; None for all at once.

        Raises:
            ConfigError: frames of this model are not independent in space.
        """
        video: Any = getattr(self, "visual", self)
        if number is not None:
            number = whole_number("number", number)
            check_independent(video)
        for _, block in video.tower.blocks:
            if isinstance(block, InParts):
                take_from_front(block, InParts)
            if number is not None and not isinstance(block, BlockInputResidual):
                put_in_front(block, InParts)
                block.clip, block.frames_at_a_time = video.clip, number


def check_independent(video: Any) -> None:
    config = video.config
    shares = config.prefix_mode != "per_frame" and video.tower.num_prefix_tokens
    if config.attention == "joint_space_time" or shares or "mean_before_norm" in config.quirks:
        raise ConfigError(
            f"Blocks of this model (attention={config.attention!r}, prefix_mode={config.prefix_mode!r}) see all frames "
            "of a clip at once, so they cannot work on some at a time. Give shorter clips, several of each video "
            "(--num-clips), or convert with prefix_mode='per_frame'."
        )
    between = {front.title for _, block in video.tower.blocks for front in fronts_of(block)} - PASSED_BY
    if between:
        raise ConfigError(
            f"Blocks of this model have been changed ({', '.join(sorted(between))}) in ways that may mix their "
            "frames, so they cannot work on some at a time. Take that off first, or give shorter clips (--num-clips)."
        )
