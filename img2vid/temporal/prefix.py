"""Prefix tokens (class, distillation, register) that belong to a whole clip instead of to each frame.

Frames stay folded in the batch, so a token "of the clip" is kept as T equal copies, one in each frame, and a rule makes
the copies equal again after each spatial attention, before the MLP:

``shared``  TimeSformer (arXiv:2102.05095): each frame updates the token by itself and the T updates are averaged.
``global``  Frozen in Time (arXiv:2104.00650): the token attends to the patches of all frames at once.

Both are forward hooks on the image block's own modules; the block's code and keys are not touched.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.temporal.attention import SpatialAttention
from img2vid.temporal.clip import ClipContext


def with_first(output: Tensor | tuple, tokens: Tensor) -> Tensor | tuple:
    """``output`` of a module with its token tensor replaced (nn.MultiheadAttention returns a tuple)."""
    return (tokens, *output[1:]) if isinstance(output, tuple) else tokens


class AveragePrefix:
    """Forward hook on whatever computes a block's attention residual: prefix rows are averaged over the clip's frames.

    LayerScale and stochastic depth that follow are the same for all frames of a clip, so averaging here equals
    averaging the residual itself.
    """

    def __init__(self, clip: ClipContext, num_prefix_tokens: int) -> None:
        self.clip, self.num_prefix_tokens = clip, num_prefix_tokens

    def __call__(self, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        tokens = output[0] if isinstance(output, tuple) else output  # (B*T, P + N, D)
        prefix = tokens[:, : self.num_prefix_tokens].unflatten(0, (-1, self.clip.num_frames))  # (B, T, P, D)
        first = prefix[:, :1]
        # around the first frame, so that T equal rows average to themselves exactly, whatever T is
        prefix = (first + (prefix - first).mean(dim=1, keepdim=True)).expand_as(prefix)
        return with_first(output, torch.cat([prefix.flatten(0, 1), tokens[:, self.num_prefix_tokens :]], dim=1))


class AttendToAllFrames:
    """Forward hook on a spatial attention: prefix queries see the prefix and the patches of all T frames.

    The rows are computed a second time with the attention's own live weights (``read(block)``), as the image attention
    cannot be asked for keys of other frames.
    """

    def __init__(
        self, clip: ClipContext, num_prefix_tokens: int, block: nn.Module, read: Callable[[nn.Module], SpatialAttention]
    ) -> None:
        self.clip, self.num_prefix_tokens, self.block, self.read = clip, num_prefix_tokens, block, read

    def __call__(self, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        spatial, num_prefix, num_frames = self.read(self.block), self.num_prefix_tokens, self.clip.num_frames
        x = args[0].unflatten(0, (-1, num_frames))  # (B, T, P + N, D), already normalised
        x = torch.cat([x[:, 0, :num_prefix], x[:, :, num_prefix:].flatten(1, 2)], dim=1)  # (B, P + T*N, D)
        qkv = F.linear(x, spatial.qkv_weight, spatial.qkv_bias)
        q, k, v = qkv.unflatten(-1, (3, spatial.num_heads, spatial.head_dim)).permute(2, 0, 3, 1, 4)
        q = q[:, :, :num_prefix]  # (B, H, P, head_dim)
        if spatial.q_norm is not None:
            q, k = spatial.q_norm(q), spatial.k_norm(k)
        prefix = F.scaled_dot_product_attention(q, k, v, scale=spatial.scale).transpose(1, 2).flatten(2)  # (B, P, -1)
        if spatial.inner_norm is not None:
            prefix = spatial.inner_norm(prefix)
        prefix = F.linear(prefix, spatial.proj_weight, spatial.proj_bias).repeat_interleave(num_frames, dim=0)
        tokens = output[0] if isinstance(output, tuple) else output  # (B*T, P + N, D)
        return with_first(output, torch.cat([prefix, tokens[:, num_prefix:]], dim=1))
