"""Prefix tokens (class, distillation, register) that belong to a whole clip instead of to each frame.

Frames stay folded in the batch, so a token "of the clip" is kept as T equal copies, one in each frame, and a rule makes
the copies equal again after each spatial attention, before the MLP:

``shared``  TimeSformer (arXiv:2102.05095): each frame updates the token by itself and the T updates are averaged.
``global``  Frozen in Time (arXiv:2104.00650): the token attends to the patches of all frames at once.

What is random in training is drawn once for the token, not once for each copy: whatever dropout does to the copies
after that rule, all of them take the first one's value. All are hooks on the image block's own modules; the block's
code and keys are not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.temporal.clip import ClipContext

Output = Tensor | tuple[Any, ...]  # of an attention: some return more than the tokens


def with_first(output: Output, tokens: Tensor) -> Output:
    """``output`` of a module with its token tensor replaced (nn.MultiheadAttention returns a tuple)."""
    return (tokens, *output[1:]) if isinstance(output, tuple) else tokens


class AveragePrefix:
    """Forward hook on whatever computes a block's attention residual: prefix rows are averaged over the clip's frames.

    LayerScale and stochastic depth that follow are the same for all frames of a clip, so averaging here equals
    averaging the residual itself.
    """

    def __init__(self, clip: ClipContext, num_prefix_tokens: int) -> None:
        self.clip, self.num_prefix_tokens = clip, num_prefix_tokens

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Any, ...]
    ) -> Tensor | tuple[Any, ...]:
        tokens = output[0] if isinstance(output, tuple) else output  # (B*T, P + N, D)
        prefix = tokens[:, : self.num_prefix_tokens]
        prefix = rearrange(prefix, "(b t) p d -> b t p d", t=self.clip.num_frames)
        first = prefix[:, :1]
        # around the first frame, so that T equal rows average to themselves exactly, whatever T is
        prefix = (first + (prefix - first).mean(dim=1, keepdim=True)).expand_as(prefix)
        prefix = rearrange(prefix, "b t p d -> (b t) p d")
        return with_first(output, torch.cat([prefix, tokens[:, self.num_prefix_tokens :]], dim=1))


class DrawPrefixOnce:
    """Makes the copies of a clip's prefix tokens equal where dropout has just drawn for each of them, in training.

    Before dropout they are equal, so the first frame's copy is one draw for the one token they all are.
    """

    def __init__(self, clip: ClipContext, num_prefix_tokens: int) -> None:
        self.clip, self.num_prefix_tokens = clip, num_prefix_tokens

    def after_block(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.drawn_once(output) if block.training else output

    def before_block(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.drawn_once(args[0]), *args[1:]) if block.training else args

    def drawn_once(self, tokens: Tensor) -> Tensor:
        num_frames, num_prefix = self.clip.num_frames, self.num_prefix_tokens
        first = rearrange(tokens[:, :num_prefix], "(b t) p d -> b t p d", t=num_frames)[:, 0]
        prefix = repeat(first, "b p d -> (b t) p d", t=num_frames)
        return torch.cat([prefix, tokens[:, num_prefix:]], dim=1)


@dataclass
class AttentionSteps:
    """A spatial attention taken apart into the calls it makes itself, so that what is wrapped around its projections
    (LoRA, quantisation) takes part, and its dropout too."""

    num_heads: int
    scale: float
    qkv: Callable[[Tensor], Tensor]  # (..., D) -> (..., 3 * H * head_dim), ordered q | k | v
    q_norm: Callable[[Tensor], Tensor]  # over head_dim
    k_norm: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]  # (..., H * head_dim) -> (..., D), with its norm and dropout
    drop: float  # rate at which attention weights are dropped now: 0 outside training


class AttendToAllFrames:
    """Forward hook on a spatial attention: prefix queries see the prefix and the patches of all T frames.

    The rows are computed a second time by the attention's own steps (``read(attention)``), as the image attention
    cannot be asked for keys of other frames.
    """

    def __init__(self, clip: ClipContext, num_prefix_tokens: int, read: Callable[[nn.Module], AttentionSteps]) -> None:
        self.clip, self.num_prefix_tokens, self.read = clip, num_prefix_tokens, read

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor | tuple[Any, ...]
    ) -> Tensor | tuple[Any, ...]:
        steps, num_prefix, num_frames = self.read(module), self.num_prefix_tokens, self.clip.num_frames
        tokens = args[0] if args else kwargs["hidden_states"]  # as transformers calls it
        x = rearrange(tokens, "(b t) n d -> b t n d", t=num_frames)  # n: prefix and patches, already normalised
        patches = rearrange(x[:, :, num_prefix:], "b t n d -> b (t n) d")
        x = torch.cat([x[:, 0, :num_prefix], patches], dim=1)  # (B, P + T*N, D)
        q, k, v = rearrange(steps.qkv(x), "b s (qkv h d) -> qkv b h s d", qkv=3, h=steps.num_heads)
        q, k = steps.q_norm(q[:, :, :num_prefix]), steps.k_norm(k)  # (B, H, P, head_dim), (B, H, P + T*N, head_dim)
        prefix = F.scaled_dot_product_attention(q, k, v, scale=steps.scale, dropout_p=steps.drop)
        prefix = steps.out(rearrange(prefix, "b h p d -> b p (h d)"))
        followed: Callable[[Tensor, Tensor], Tensor] | None = getattr(module, "followed", None)
        if followed is not None:  # what grafts add behind an attention
            prefix = followed(prefix, x[:, :num_prefix])
        prefix = repeat(prefix, "b p d -> (b t) p d", t=num_frames)
        tokens = output[0] if isinstance(output, tuple) else output  # (B*T, P + N, D)
        return with_first(output, torch.cat([prefix, tokens[:, num_prefix:]], dim=1))
