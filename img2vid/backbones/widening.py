"""Attention of more heads, and MLPs of more units, that compute what the narrower ones do: Net2WiderNet.

What is there is repeated, and what leaves it is shared among the copies (Chen et al. 2016, arXiv:1511.05641). The
copies of a head attend alike and give the same values, so

    proj y = sum over copies j of head i of share_ij proj[:, i] y_i        sum over j of share_ij = 1

and rotary positions, norms of queries and keys, and the softmax's scale mean what they meant: a copy is as wide as its
original. Libraries' factories divide the width of tokens among heads, and more of them would be narrower, another
function; so heads are added to what a factory has built, and together they are wider than tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import open_clip.transformer as open_clip_transformer
import timm.layers
import torch
from einops import rearrange
from timm.models import beit, cait, eva, vision_transformer, vision_transformer_relpos
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.backbones.reading import block_kind, child
from img2vid.backbones.steps import attention_steps
from img2vid.backbones.tower import ImageTower
from img2vid.config import whole_number
from img2vid.errors import BackboneError
from img2vid.temporal.infront import InFront, own_class, put_in_front

# of an attention: what makes heads (rows for each), and what takes them in (columns for each)
ENTER = ("qkv", "q_proj", "k_proj", "v_proj", "gate", "in_proj_weight", "in_proj_bias", "q_bias", "k_bias", "v_bias")
LEAVE = ("proj", "out_proj")
ACROSS = ("norm", "inner_norm")  # norms over all heads together

HAS_BIAS = "its relative position bias is a table of a column for each head"
REFUSED: dict[type[nn.Module], str] = {
    beit.Attention: HAS_BIAS,
    vision_transformer_relpos.RelPosAttention: HAS_BIAS,
    cait.TalkingHeadAttn: "its heads are mixed with each other",
    timm.layers.DiffAttention: "its heads are differences of two",
    vision_transformer.ParallelScalingBlock: "its attention shares matrices with the MLP",
    vision_transformer.DiffParallelScalingBlock: "its attention shares matrices with the MLP",
    open_clip_transformer.Attention: "its heads can have scales of their own",
}
TAKEN = (timm.layers.Attention, timm.layers.AttentionRope, eva.EvaAttention, nn.MultiheadAttention)


@dataclass
class Widening:
    """Which old unit (or head) each new one is, (H',), and its share of what leaves that unit, (H',)."""

    units: Tensor
    shares: Tensor

    @classmethod
    def draw(cls, before: int, after: int, generator: torch.Generator) -> Widening:
        """Copies of all alike where ``after`` is a multiple, else of some at random; shares are unequal at random, or
        copies would get equal gradients and stay copies forever."""
        repeats = after // before if after % before == 0 else 1
        more = torch.randint(before, (after - repeats * before,), generator=generator)
        units = torch.cat([torch.arange(before).repeat(repeats), more])
        weights = torch.empty(after, dtype=torch.float64).uniform_(0.5, 1.5, generator=generator)
        totals = torch.zeros(before, dtype=torch.float64).index_add_(0, units, weights)
        return cls(units, weights / totals[units])

    @property
    def before(self) -> int:
        return int(self.units.max()) + 1

    @property
    def is_even(self) -> bool:
        """Whether each is there as often as any other, which a mean or a variance over all of them does not notice."""
        return len(self.units.bincount().unique()) == 1

    def enter(self, tensor: Tensor, width: int = 1) -> Tensor:
        """Rows that make units, or their biases; of several matrices in one (gate and value, q, k and v) each.

        Args:
            width: rows of a unit: 1, or of a head its width.
        """
        parts = tensor.unflatten(0, (-1, self.before, width))
        return parts[:, self.units.to(tensor.device)].flatten(0, 2)

    def leave(self, tensor: Tensor, width: int = 1) -> Tensor:
        """Columns that take units in."""
        columns = tensor.unflatten(1, (self.before, width))[:, self.units.to(tensor.device)].double()
        return (columns * self.shares.to(tensor.device)[:, None]).flatten(1).to(tensor.dtype)


class WiderThanTokens(InFront):
    """In front of an attention whose own forward takes its heads to be as wide together as tokens: EVA's, PyTorch's."""

    title = "Wider"

    def forward(
        self,
        x: Tensor,  # (B, N, D)
        key: Tensor | None = None,
        value: Tensor | None = None,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        need_weights: bool = False,
    ) -> Any:
        steps = attention_steps(self)
        q, k, v = rearrange(steps.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=steps.num_heads)
        q, k = steps.q_norm(q), steps.k_norm(k)
        if rope is not None:
            q, k = (self.turned(heads, rope).type_as(v) for heads in (q, k))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=steps.drop, is_causal=is_causal, scale=steps.scale
        )
        y = steps.out(rearrange(y, "b h n d -> b n (h d)"))
        return (y, None) if isinstance(self, nn.MultiheadAttention) else y

    def turned(self, heads: Tensor, rope: Tensor) -> Tensor:
        """Queries or keys (B, H, P + N, d) of patches turned by where they are."""
        prefix, patches = heads.split([self.num_prefix_tokens, heads.shape[2] - self.num_prefix_tokens], dim=2)
        half = getattr(self, "rotate_half", False)
        return torch.cat([prefix, timm.layers.apply_rot_embed_cat(patches, rope, half=half)], dim=2)


def set_heads(tower: ImageTower, heads: int | None, seed: int = 0) -> None:
    """Give each block of a tower so many heads, of the width its own have, in place; it stays the same function.

    Args:
        heads: at least as many as there are; None leaves them.
        seed: of which heads are repeated, and how unequal their shares are.

    Raises:
        BackboneError: an attention whose heads cannot be more, with the reason.
    """
    if heads is None:
        return
    heads = whole_number("heads", heads, most=4096)
    attentions = [child(block, block_kind(block).attn) for _, block in tower.blocks]
    for attn in attentions:
        check_widening(attn, tower, heads)
    generator = torch.Generator().manual_seed(seed)
    for attn in attentions:
        widen(attn, Widening.draw(attn.num_heads, heads, generator))
        if not hasattr(attn, "attn_dim") and heads * attn.head_dim != read_dim(attn):
            put_in_front(attn, WiderThanTokens)


def check_widening(attn: nn.Module, tower: ImageTower, heads: int) -> None:
    name, cls = own_class(attn).__name__, own_class(attn)
    reason = REFUSED.get(cls)
    if reason is None and cls not in TAKEN:
        reason = "it is not known how its heads could be more (img2vid/backbones/widening.py)"
    elif reason is None and "per block" in tower.position:
        reason = "each of its heads has rotations of its own"
    elif reason is None and getattr(attn, "num_kv_groups", 1) > 1:
        reason = "several of its heads share keys and values"
    elif reason is None and cls is eva.EvaAttention and attn.gate is not None:
        reason = "its heads have an output gate"
    elif reason is None and cls is nn.MultiheadAttention and not attn.batch_first:
        reason = "it takes tokens first and clips second"
    if reason is not None:
        raise BackboneError(
            f"heads={heads}: attention of class {name} has the heads it has, as {reason}. "
            "Depth and mlp_ratio do not touch it."
        )
    if heads < attn.num_heads:
        raise BackboneError(f"heads={heads}: there are {attn.num_heads} already; they only ever become more.")
    over_all = [part for part in ACROSS if list(getattr(attn, part, nn.Identity()).parameters())]
    if over_all and heads % attn.num_heads:
        raise BackboneError(
            f"heads={heads}: with a norm over all heads together ({over_all[0]}), repeating some of the "
            f"{attn.num_heads} is another function. Give a multiple, which repeats all of them."
        )


@torch.no_grad()
def widen(attn: nn.Module, pick: Widening) -> None:
    """Repeat heads of an attention, over space or along time, in place."""
    width = attn.head_dim
    for name in (*ENTER, *ACROSS, *LEAVE):
        part = getattr(attn, name, None)
        holder, names = (attn, [name]) if isinstance(part, Tensor) else (part, ["weight", "bias"])
        for own in names if holder is not None else []:
            tensor = getattr(holder, own, None)
            if not isinstance(tensor, Tensor) or (name in LEAVE and own == "bias"):
                continue
            wide = pick.leave(tensor, width) if name in LEAVE else pick.enter(tensor, width)
            if isinstance(tensor, nn.Parameter):
                setattr(holder, own, nn.Parameter(wide, requires_grad=tensor.requires_grad))
            else:
                holder.register_buffer(own, wide, persistent=own not in holder._non_persistent_buffers_set)
        if isinstance(part, nn.Linear):
            part.out_features, part.in_features = part.weight.shape
        elif hasattr(part, "normalized_shape"):
            part.normalized_shape = tuple(part.weight.shape)
    attn.num_heads = len(pick.units)
    for name in ("attn_dim", "kv_dim"):
        if hasattr(attn, name):
            setattr(attn, name, attn.num_heads * width)
    if hasattr(attn, "num_kv_heads"):
        attn.num_kv_heads = attn.num_heads


def read_dim(attn: nn.Module) -> int:
    """Width of tokens."""
    out: Any = attn.out_proj if hasattr(attn, "out_proj") else attn.proj
    return out.weight.shape[0]
