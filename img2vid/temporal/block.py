"""The whole idea on one page: an image block becomes a space-time block, and nothing changes.

In front of the untouched image block stands one new residual branch, attention along time, behind a gate that starts
at exactly zero:

    x = x + temporal_fc(temporal_attn(temporal_norm1(x)))       temporal_fc = 0:  x = x + 0
    x = image_block(x)                                          the pretrained function, bit for bit

Zero is not dead. With a = temporal_attn(...) copied from trained weights, dL/dW = (dL/dy) a^T for the gate's weight W
is nonzero at once: the gate moves at the first step, and from the second on W^T (dL/dy) reaches the attention behind
it. One zero per branch keeps the function for a moment; two in a row would keep it forever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.temporal.attention import TemporalAttention
from img2vid.temporal.clip import ClipContext
from img2vid.temporal.infront import InFront
from img2vid.temporal.unchanged import ShutGate


class SpaceTimeBlock(InFront):
    """Stands in front of an image block's own class, so the block keeps its parameters, their names, and its type."""

    title = "SpaceTime"
    clip: ClipContext  # knows T
    temporal_norm1: nn.Module
    temporal_attn: TemporalAttention
    temporal_fc: nn.Module  # the gate: a zero Linear, a tanh(0) scalar, or (as an ablation) nothing
    temporal_drop_path: nn.Module
    num_shared_tokens: int  # prefix tokens that belong to the whole clip and so have no time to attend along
    post_norm: bool  # where the image block puts its norm after its attention, so does this
    num_clip_keys: int  # prefix tokens that attention along time sees nevertheless (quirk prefix_in_time)
    drop_before_gate: bool
    seen_by_space: SeenBySpaceOnly | None  # None: what attention along time adds stays in the stream
    fused: nn.Module | None  # temporal_fc and the attention's projection as one product (img2vid.temporal.fusing)
    shut: ShutGate

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # x: (B*T, P + N, D)
        if self.adds_nothing():
            return super().forward(x, *args, **kwargs)
        residual = self.temporal_residual(x)
        if self.seen_by_space is None:
            # the image block, untouched: its class comes next (see InFront)
            return super().forward(x + residual, *args, **kwargs)
        with self.seen_by_space.adding(residual):
            return super().forward(x, *args, **kwargs)

    def adds_nothing(self) -> bool:
        """Frozen at zero the branch adds +0.0 and is left out: all numbers compare equal (a -0.0 stays one)."""
        if self.training and not isinstance(self.temporal_drop_path, nn.Identity):
            return False  # it draws random numbers, and others come after it
        return self.shut.shuts(self.temporal_fc, self.temporal_norm1, self.temporal_attn)

    def temporal_residual(self, x: Tensor) -> Tensor:
        y = x[:, self.num_shared_tokens :]
        frames = (self.clip.num_frames, self.num_clip_keys) if self.num_clip_keys else (self.clip.num_frames,)
        if self.fused is not None and self.fused.stands_in():
            y = self.fused(self.temporal_attn.before_proj(self.temporal_norm1(y), *frames))
        else:
            y = self.through_gate(self.attend_along_time(y, frames))
        return F.pad(y, (0, 0, self.num_shared_tokens, 0)).to(x.dtype)  # back to (B*T, P + N, D)

    def attend_along_time(self, y: Tensor, frames: tuple[int, ...]) -> Tensor:
        if self.post_norm:
            return self.temporal_norm1(self.temporal_attn(y, *frames))
        return self.temporal_attn(self.temporal_norm1(y), *frames)

    def through_gate(self, y: Tensor) -> Tensor:
        if self.drop_before_gate:
            return self.temporal_fc(self.temporal_drop_path(y))
        # differs from TimeSformer: a dropped branch adds nothing at all, not the gate's bias
        return self.temporal_drop_path(self.temporal_fc(y))


class SeenBySpaceOnly:
    """Forward pre-hook on the norm in front of attention over space: there, and only there, time has been added.

    Frozen in Time's residual: ``x + attn(norm1(x + temporal_residual))``, in which the stream itself does not keep
    what attention along time added (quirk block_input_residual).
    """

    def __init__(self) -> None:
        self.residual: Tensor | None = None

    @contextmanager
    def adding(self, residual: Tensor) -> Iterator[None]:
        self.residual = residual
        try:
            yield
        finally:
            self.residual = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] + self.residual, *args[1:])
