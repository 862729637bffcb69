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

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.temporal.attention import TemporalAttention
from img2vid.temporal.clip import ClipContext
from img2vid.temporal.infront import InFront


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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # x: (B*T, P + N, D)
        x = x + self.temporal_residual(x)
        return super().forward(x, *args, **kwargs)  # the image block, untouched: its class comes next (see InFront)

    def temporal_residual(self, x: Tensor) -> Tensor:
        y = self.branch(x[:, self.num_shared_tokens :])
        return F.pad(y, (0, 0, self.num_shared_tokens, 0)).to(x.dtype)  # back to (B*T, P + N, D)

    def branch(self, y: Tensor) -> Tensor:
        if self.post_norm:
            y = self.temporal_norm1(self.temporal_attn(y, self.clip.num_frames))
        else:
            y = self.temporal_attn(self.temporal_norm1(y), self.clip.num_frames)
        # differs from TimeSformer: stochastic depth comes after the gate, so a dropped branch adds nothing at all
        return self.temporal_drop_path(self.temporal_fc(y))
