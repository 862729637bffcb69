"""A temporal transformer on top of frame features: ViViT's model 2, "factorised encoder" (arXiv:2103.15691)."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.temporal.attention import TemporalAttention
from img2vid.temporal.gates import zero_linear


class TemporalEncoderBlock(nn.Module):
    """A pre-norm transformer block along time whose two residual branches each end in one zero."""

    fused: Any  # attn_fc after attn's projection, as one product, or None (img2vid.temporal.fusing)

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TemporalAttention(dim, num_heads, dim // num_heads)
        self.attn_fc = zero_linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = zero_linear(int(dim * mlp_ratio), dim)
        self.register_module("fused", None)
        for linear in (self.attn.qkv, self.attn.proj, self.fc1):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:  # (B*T, 1, D)
        if self.fused is not None and self.fused.stands_in(self.attn, self.attn_fc):
            x = x + self.fused(self.attn.before_proj(self.norm1(x), num_frames))
        else:
            x = x + self.attn_fc(self.attn(self.norm1(x), num_frames))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TemporalEncoder(nn.Module):
    """Frame features (B, T, D) -> (B, T, D), the identity until its gates move."""

    def __init__(self, dim: int, depth: int = 4) -> None:
        super().__init__()
        num_heads = max(heads for heads in range(1, max(1, dim // 64) + 1) if dim % heads == 0)
        self.blocks = nn.ModuleList(TemporalEncoderBlock(dim, num_heads) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        num_frames = x.shape[1]
        x = rearrange(x, "b t d -> (b t) 1 d")
        for block in self.blocks:
            x = block(x, num_frames)
        return rearrange(x, "(b t) 1 d -> b t d", t=num_frames)
