"""How attention along time is computed: many very short sequences, one for each clip, position and head.

They are what fused attention kernels are worst at: those cut sequences into blocks of 32 frames and more, and T mostly
is 8. So which way is taken has been measured (docs/performance.md), on CPUs by precision, length and training; it
depends on nothing else, so that equal calls give equal bits.

    products   two batched matrix products and a softmax between them
    fused      torch's scaled_dot_product_attention, clip by clip or of all at once, in parts no kernel finds too many
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional as F

SHORT = 32  # frames up to which the weights (T x T a head) are no burden beside queries, keys and values
MOST_SEQUENCES = 65_535  # batch times heads, which kernels for GPUs put into one dimension of their grid

_spelled_out = ContextVar("spelled_out", default=False)


@contextmanager
def spelled_out() -> Iterator[None]:
    """Inside, always as products: who watches sees the weights of all clips in one softmax, (B, S, H, T, T)."""
    token = _spelled_out.set(True)
    try:
        yield
    finally:
        _spelled_out.reset(token)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    training: bool = False,
) -> Tensor:
    """Attention of (B, S, H, T, head_dim), or of (B, H, T, head_dim).

    Args:
        mask: (T, K), True where a frame may look.
        causal: each may look at itself and at earlier ones.
        training: whether gradients will be asked for, which makes another way the fastest. Not whether they could be: a
            model in eval mode gives the same bits with and without.
    """
    if q.ndim == 4:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    # ONNX knows attention of 4 dimensions only, and a trace would count the clips one by one
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale, mask, causal).unflatten(0, q.shape[:2])
    if as_products(q, k, training):
        return products(q, k, v, scale, mask, causal)
    return fused(q, k, v, scale, mask, causal)


def as_products(q: Tensor, k: Tensor, training: bool) -> bool:
    if _spelled_out.get():
        return True
    if q.device.type != "cpu" or k.shape[-2] > SHORT:
        return False
    one_query = q.shape[-2] == 1  # of a stream
    return one_query or training or q.dtype != torch.float32


def products(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    weights = (q * scale) @ k.transpose(-2, -1)  # (B, S, H, T, K)
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf)
    return weights.softmax(dim=-1) @ v


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    """Kernels want one dimension of batch. A clip's positions are one without moving anything, those of several clips
    would have to be copied: a copy costs a GPU less than a call of the kernel, a CPU more.
    """
    if q.device.type == "cpu":
        clips = zip(q, k, v, strict=True)
        return torch.stack([attend(q, k, v, scale, mask, causal) for q, k, v in clips])
    most = max(1, MOST_SEQUENCES // q.shape[2])
    q_parts, k_parts, v_parts = (x.flatten(0, 1).split(most) for x in (q, k, v))
    parts = zip(q_parts, k_parts, v_parts, strict=True)
    return torch.cat([attend(q, k, v, scale, mask, causal) for q, k, v in parts]).unflatten(0, q.shape[:2])
