"""A spatial attention taken apart into its calls: one small function per attention class (``temporal.prefix``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip.transformer as open_clip_transformer
import timm.layers
import torch
from timm.models import eva
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.backbones.reading import row, separate_bias, separate_linears
from img2vid.temporal.prefix import AttentionSteps


def fused_steps(attn: nn.Module) -> AttentionSteps:
    """timm's Attention, and EvaAttention where its projections are fused."""

    def qkv(x: Tensor) -> Tensor:
        if getattr(attn, "q_bias", None) is None:
            return attn.qkv(x)
        # as the class itself does it: with one bias for all, it never calls its projection as a module
        bias = separate_bias(attn)
        return attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)

    return AttentionSteps(
        num_heads=attn.num_heads,
        scale=attn.scale,
        qkv=qkv,
        q_norm=attn.q_norm,
        k_norm=attn.k_norm,
        out=lambda y: attn.proj_drop(attn.proj(attn.norm(y))),
        drop=attn.attn_drop.p if attn.training else 0.0,
    )


def eva_steps(attn: nn.Module) -> AttentionSteps:
    steps = fused_steps(attn)
    if attn.qkv is None:
        steps.qkv = lambda x: torch.cat([attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)], dim=-1)
    return steps


def multihead_steps(attn: nn.MultiheadAttention) -> AttentionSteps:
    """PyTorch's and open_clip's own, whose input projection is a bare parameter."""
    is_pytorchs = isinstance(attn, nn.MultiheadAttention)

    def out(y: Tensor) -> Tensor:
        if is_pytorchs:  # which never calls its output projection as a module
            return F.linear(y, attn.out_proj.weight, attn.out_proj.bias)
        return attn.out_drop(attn.out_proj(attn.ln_inner(y)))

    drop = attn.dropout if is_pytorchs else attn.attn_drop.p
    return AttentionSteps(
        num_heads=attn.num_heads,
        scale=attn.head_dim**-0.5,
        qkv=lambda x: F.linear(x, attn.in_proj_weight, attn.in_proj_bias),
        q_norm=nn.Identity() if is_pytorchs else attn.ln_q,
        k_norm=nn.Identity() if is_pytorchs else attn.ln_k,
        out=out,
        drop=drop if attn.training else 0.0,
    )


def separate_steps(attn: nn.Module) -> AttentionSteps:
    """transformers, with a projection each for queries, keys and values."""
    read = separate_linears(attn)
    drop = attn.dropout if hasattr(attn, "dropout") else attn.attention_dropout
    return AttentionSteps(
        num_heads=read["num_heads"],
        scale=read["scale"],
        qkv=lambda x: torch.cat([attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)], dim=-1),
        q_norm=nn.Identity(),
        k_norm=nn.Identity(),
        out=attn.out_proj if hasattr(attn, "out_proj") else attn.o_proj,
        drop=drop if attn.training else 0.0,
    )


def blip_steps(attn: nn.Module) -> AttentionSteps:
    return AttentionSteps(
        num_heads=attn.num_heads,
        scale=attn.scale,
        qkv=attn.qkv,
        q_norm=nn.Identity(),
        k_norm=nn.Identity(),
        out=attn.projection,
        drop=attn.dropout.p if attn.training else 0.0,
    )


# plain attentions that prefix_mode="global" can compute a second time over the patches of all frames
STEPS: dict[type[nn.Module] | str, Callable[[Any], AttentionSteps]] = {
    timm.layers.Attention: fused_steps,
    eva.EvaAttention: eva_steps,
    nn.MultiheadAttention: multihead_steps,
    open_clip_transformer.Attention: multihead_steps,
    "transformers.CLIPAttention": separate_steps,
    "transformers.SiglipAttention": separate_steps,
    "transformers.ViTAttention": separate_steps,
    "transformers.Dinov2Attention": separate_steps,
    "transformers.Dinov2WithRegistersAttention": separate_steps,
    "transformers.BlipAttention": blip_steps,
}


def attention_steps(attn: nn.Module) -> AttentionSteps:
    """What a spatial attention does, call by call."""
    return row(STEPS, attn)(attn)


def has_steps(attn: nn.Module) -> bool:
    return row(STEPS, attn) is not None
