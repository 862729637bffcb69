"""Attention along time, at every token position, with weights that may be copied from attention over space.

Divided attention, and the copy of spatial into temporal weights: Bertasius et al. 2021, "Is Space-Time Attention All
You Need for Video Understanding?" (TimeSformer, arXiv:2102.05095).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from img2vid.temporal.kernels import attend


@dataclass
class SpatialAttention:
    """What one image block's attention is made of, whatever its library calls the pieces.

    The readers in ``img2vid.backbones`` fill it in; tensors are the live weights, not copies. Written as equations, the
    block adds ``layer_scale * (proj(inner_norm(softmax(scale * q_norm(q) k_norm(k)^T) v)))`` with
    ``q, k, v = qkv(norm(x))`` to its input (``norm`` comes last instead where ``post_norm``).
    """

    num_heads: int
    qkv_weight: Tensor  # (3 * H * head_dim, D), rows q | k | v
    qkv_bias: Tensor | None
    proj_weight: Tensor  # (D, H * head_dim)
    proj_bias: Tensor | None
    norm: nn.Module
    scale: float
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    inner_norm: nn.Module | None = None
    layer_scale: Tensor | None = None
    post_norm: bool = False
    left_behind: tuple[str, ...] = ()  # parts of the image attention that have no counterpart along time

    @property
    def dim(self) -> int:
        return self.proj_weight.shape[0]

    @property
    def head_dim(self) -> int:
        return self.proj_weight.shape[1] // self.num_heads


class TemporalAttention(nn.Module):
    """Multi-head self-attention over the T frames of a clip, separately at each token position.

    One canonical module for every backbone, so that it is read, tested and made fast once.

    Args:
        dim: token width D.
        num_heads: H.
        head_dim: width of one head; H * head_dim need not equal D.
        scale: factor on the dot products.
        qkv_bias, proj_bias: whether the projections have biases.
        q_norm, k_norm: optional norms over head_dim, applied to queries and keys.
        inner_norm: optional norm over H * head_dim, applied before the output projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        *,
        scale: float | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        inner_norm: nn.Module | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        # skip_init: the weights are filled by init_ or from_spatial, once
        make = {"device": torch.get_default_device() if device is None else device, "dtype": dtype}
        self.qkv = nn.utils.skip_init(nn.Linear, dim, 3 * num_heads * head_dim, bias=qkv_bias, **make)
        self.q_norm = q_norm or nn.Identity()
        self.k_norm = k_norm or nn.Identity()
        self.inner_norm = inner_norm or nn.Identity()
        self.proj = nn.utils.skip_init(nn.Linear, num_heads * head_dim, dim, bias=proj_bias, **make)

    @classmethod
    def from_spatial(cls, spatial: SpatialAttention, init: str = "copy") -> TemporalAttention:
        """A temporal attention of the same shape as ``spatial``.

        Args:
            init: ``copy`` takes its weights (the image block's LayerScale is folded into ``proj``, so the copy along
                time is what the block itself would add along space); ``random`` draws truncated normals (std 0.02);
                ``zeros`` sets both projections to zero, as in one ViViT ablation: it never learns behind a gate.
        """
        # keep the trained norms only where the trained projections are kept
        norm = copy.deepcopy if init == "copy" else fresh_copy
        attention = cls(
            spatial.dim,
            spatial.num_heads,
            spatial.head_dim,
            scale=spatial.scale,
            qkv_bias=spatial.qkv_bias is not None,
            proj_bias=spatial.proj_bias is not None or init != "copy",
            q_norm=norm(spatial.q_norm),
            k_norm=norm(spatial.k_norm),
            inner_norm=norm(spatial.inner_norm),
            device=spatial.qkv_weight.device,
            dtype=spatial.qkv_weight.dtype,
        )
        attention.init_(spatial, init)
        return attention

    @torch.no_grad()
    def init_(self, spatial: SpatialAttention, init: str) -> None:
        if init == "copy":
            gamma = 1.0 if spatial.layer_scale is None else spatial.layer_scale
            self.qkv.weight.copy_(spatial.qkv_weight)
            self.proj.weight.copy_((spatial.proj_weight.T * gamma).T)
            if spatial.qkv_bias is not None:
                self.qkv.bias.copy_(spatial.qkv_bias)
            if spatial.proj_bias is not None:
                self.proj.bias.copy_(spatial.proj_bias * gamma)
            return
        for linear in (self.qkv, self.proj):
            if init == "random":
                nn.init.trunc_normal_(linear.weight, std=0.02)
            else:
                nn.init.zeros_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """Tokens (B*T, S, D) -> (B*T, S, D); position s of frame t attends to position s of all T frames."""
        return self.proj(self.before_proj(x, num_frames))

    def before_proj(self, x: Tensor, num_frames: int) -> Tensor:
        """All of ``forward`` but its last product: (B*T, S, D) -> (B*T, S, H * head_dim)."""
        # norms and projections act on each token alone, so x itself never moves; only q, k, v are seen along T
        heads = {"t": num_frames, "qkv": 3, "h": self.num_heads}
        q, k, v = rearrange(self.qkv(x), "(b t) s (qkv h d) -> qkv b s h t d", **heads)
        y = self.mix(self.q_norm(q), self.k_norm(k), v)
        return self.inner_norm(rearrange(y, "b s h t d -> (b t) s (h d)"))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What of the frames' values each frame gets, (B, S, H, T, head_dim)."""
        return attend(q, k, v, self.scale, training=self.training)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, scale={self.scale:.4g}"


def fresh_copy(norm: nn.Module | None) -> nn.Module | None:
    """The same norm with its weights at their defaults (scale 1, shift 0)."""
    norm = copy.deepcopy(norm)
    if norm is not None:
        for name, parameter in norm.named_parameters():
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    return norm
