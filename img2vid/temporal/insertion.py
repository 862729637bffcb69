"""Insert attention along time into an image block, in place."""

from __future__ import annotations

import copy

from torch import nn

from img2vid.temporal.attention import SpatialAttention, TemporalAttention, fresh_copy
from img2vid.temporal.block import SpaceTimeBlock
from img2vid.temporal.clip import ClipContext
from img2vid.temporal.dropping import ClipDropPath
from img2vid.temporal.folding import FoldedInTraining
from img2vid.temporal.gates import make_gate
from img2vid.temporal.infront import put_in_front
from img2vid.temporal.unchanged import ShutGate, SkippedWhenShut


def insert_temporal_attention(
    block: nn.Module,
    spatial: SpatialAttention,
    clip: ClipContext,
    *,
    init: str = "copy",
    gate: str = "temporal_fc",
    num_shared_tokens: int = 0,
    drop_path: float = 0.0,
) -> None:
    """Turn an image block into a ``SpaceTimeBlock``: three new children, one new base class, no renamed key.

    Args:
        block: an image transformer block, called with tokens (B, P + N, D) first.
        spatial: its attention, as read by ``img2vid.backbones``.
        init: where the temporal attention's weights come from: ``copy`` | ``random`` | ``zeros``.
        gate: ``temporal_fc`` | ``tanh`` | ``none``.
        num_shared_tokens: leading tokens that get no attention along time.
        drop_path: stochastic depth rate of the new branch.
    """
    device, dtype = spatial.qkv_weight.device, spatial.qkv_weight.dtype
    put_in_front(block, SpaceTimeBlock)
    block.clip = clip
    block.temporal_norm1 = copy.deepcopy(spatial.norm) if init == "copy" else fresh_copy(spatial.norm)
    block.temporal_attn = TemporalAttention.from_spatial(spatial, init)
    block.temporal_fc = make_gate(gate, spatial.dim, device, dtype)
    for module in (block.temporal_norm1, block.temporal_attn):
        module.requires_grad_(True)  # copies of frozen norms would come frozen
    block.temporal_drop_path = ClipDropPath(drop_path, clip) if drop_path > 0.0 else nn.Identity()
    block.num_shared_tokens, block.post_norm = num_shared_tokens, spatial.post_norm
    put_in_front(block, FoldedInTraining)
    put_in_front(block, SkippedWhenShut)
    block.shut = ShutGate()
