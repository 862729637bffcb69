"""What published video models do differently along time (``img2vid.config.QUIRKS``).

Only imported checkpoints ask for any of this. Each is a class in front of what a converted model has, so block.py and
attention.py stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from img2vid.temporal.block import SpaceTimeBlock
from img2vid.temporal.infront import InFront, put_in_front
from img2vid.temporal.kernels import attend


class PrefixInTime(InFront):
    """In front of TemporalAttention: a clip's prefix tokens, kept as T equal copies, take part along time (quirk
    prefix_in_time; Frozen in Time, arXiv:2104.00650).

    Tokens (B*T, P + N, D): patch n attends to the P prefix tokens and to patch n of all frames; a prefix token attends
    to the prefix tokens and to all patches of all frames.
    """

    title = "PrefixInTime"
    num_clip_keys: int  # P

    def before_proj(self, x: Tensor, num_frames: int) -> Tensor:  # (B*T, P + N, D) -> (B*T, P + N, H * head_dim)
        num_prefix = self.num_clip_keys
        heads = {"t": num_frames, "qkv": 3, "h": self.num_heads}
        q, k, v = rearrange(self.qkv(x), "(b t) s (qkv h d) -> qkv b s h t d", **heads)  # s: prefix, then patches
        q, k = self.q_norm(q), self.k_norm(k)
        num_patches = x.shape[1] - num_prefix

        def with_clip_keys(kv: Tensor) -> Tensor:  # (B, N, H, P + T, head_dim)
            clip = repeat(kv[:, :num_prefix, :, 0], "b p h d -> b n h p d", n=num_patches)
            return torch.cat([clip, kv[:, num_prefix:]], dim=3)

        def all_of_clip(kv: Tensor) -> Tensor:  # (B, H, P + N*T, head_dim)
            patches = rearrange(kv[:, num_prefix:], "b n h t d -> b h (n t) d")
            return torch.cat([kv[:, :num_prefix, :, 0].transpose(1, 2), patches], dim=2)

        patches = attend(q[:, num_prefix:], with_clip_keys(k), with_clip_keys(v), self.scale)  # (B, N, H, T, head_dim)
        prefix = q[:, :num_prefix, :, 0].transpose(1, 2)  # (B, H, P, head_dim)
        prefix = attend(prefix, all_of_clip(k), all_of_clip(v), self.scale)
        prefix = repeat(prefix, "b h p d -> b p h t d", t=num_frames)
        return self.inner_norm(rearrange(torch.cat([prefix, patches], dim=1), "b s h t d -> (b t) s (h d)"))


class DropBeforeGate(InFront):
    """In front of a SpaceTimeBlock: a dropped branch still adds the gate's bias (quirk drop_path_before_gate)."""

    title = "DropBeforeGate"

    def branch(self, y: Tensor) -> Tensor:
        if self.post_norm:
            y = self.temporal_norm1(self.temporal_attn(y, self.clip.num_frames))
        else:
            y = self.temporal_attn(self.temporal_norm1(y), self.clip.num_frames)
        return self.temporal_fc(self.temporal_drop_path(y))


class BlockInputResidual(InFront):
    """In front of a SpaceTimeBlock: attention over space sees what attention along time adds, the stream does not keep
    it (quirk block_input_residual; Frozen in Time): ``x + attn(norm1(x + temporal_residual))``."""

    title = "BlockInputResidual"
    seen_by_space: SeenBySpaceOnly

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self.seen_by_space.adding(self.temporal_residual(x)):
            return super(SpaceTimeBlock, self).forward(x, *args, **kwargs)  # the image block at once


class SeenBySpaceOnly:
    """Forward pre-hook on the norm in front of attention over space: there, and only there, time has been added."""

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
        if self.residual is None:  # called for another purpose than attention over space (a graft's)
            return args
        return (args[0] + self.residual, *args[1:])


def add_quirks(
    block: nn.Module, *, num_clip_keys: int = 0, drop_before_gate: bool = False, seen_by: nn.Module | None = None
) -> None:
    """Give a SpaceTimeBlock what a published model does differently.

    Args:
        num_clip_keys: leading tokens, equal in all frames of a clip, that take part along time; 0 for none.
        drop_before_gate: whether stochastic depth comes before the gate.
        seen_by: the one module of the block that is to see what the branch adds; None for the residual stream.
    """
    if num_clip_keys:
        put_in_front(block.temporal_attn, PrefixInTime)
        block.temporal_attn.num_clip_keys = num_clip_keys
    if drop_before_gate:
        put_in_front(block, DropBeforeGate)
    if seen_by is not None:
        put_in_front(block, BlockInputResidual)
        block.seen_by_space = SeenBySpaceOnly()
        seen_by.register_forward_pre_hook(block.seen_by_space)
