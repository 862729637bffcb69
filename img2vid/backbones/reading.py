"""Read the spatial attention of an image block: one small function per attention class, one row per block class.

Everything that names a library's attribute inside a block is in this file. To support another block, add a row to
``BLOCKS`` (and a function to ``ATTENTIONS`` where its attention is new). Classes of transformers, which need not be
installed, go by their library and name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import open_clip.transformer as open_clip_transformer
import timm.layers
import torch
from timm.models import beit, cait, eva, vision_transformer, vision_transformer_relpos
from torch import Tensor, nn

from img2vid.errors import BackboneError
from img2vid.temporal.attention import SpatialAttention


def identity_as_none(module: nn.Module | None) -> nn.Module | None:
    return None if module is None or isinstance(module, nn.Identity) else module


def separate_bias(attn: nn.Module) -> Tensor | None:
    """EVA and BEiT keep biases for queries and values only; the one for keys is a buffer of zeros."""
    if attn.q_bias is None:
        return None
    # a buffer is no parameter, so it can have numbers where those are still to be loaded
    return torch.cat([attn.q_bias, attn.k_bias.to(attn.q_bias.device), attn.v_bias])


def fused(attn: nn.Module) -> dict[str, Any]:
    """``qkv`` and ``proj`` Linears: timm's Attention and its relatives."""
    return {
        "num_heads": attn.num_heads,
        "scale": attn.scale,
        "qkv_weight": attn.qkv.weight,
        "qkv_bias": separate_bias(attn) if hasattr(attn, "q_bias") else attn.qkv.bias,
        "proj_weight": attn.proj.weight,
        "proj_bias": attn.proj.bias,
        "q_norm": identity_as_none(getattr(attn, "q_norm", None)),
        "k_norm": identity_as_none(getattr(attn, "k_norm", None)),
        "inner_norm": identity_as_none(getattr(attn, "norm", None)),
        "left_behind": ("sigmoid output gate",) if getattr(attn, "gate", None) is not None else (),
    }


def rotary(attn: nn.Module) -> dict[str, Any]:
    """EvaAttention and AttentionRope: fused or split projections, and possibly fewer key/value heads than heads."""
    if attn.qkv is not None:
        return fused(attn)

    def all_heads(tensor: Tensor) -> Tensor:
        """Grouped-query attention as plain attention: each key/value head repeated for the heads that share it."""
        repeats = attn.num_heads // getattr(attn, "num_kv_heads", attn.num_heads)
        return tensor.unflatten(0, (-1, attn.head_dim)).repeat_interleave(repeats, dim=0).flatten(0, 1)

    q, k, v = attn.q_proj, attn.k_proj, attn.v_proj
    bias = None
    if q.bias is not None:
        # EVA has no key bias in split form either
        k_bias = torch.zeros_like(k.weight[:, 0]) if k.bias is None else k.bias
        bias = torch.cat([q.bias, all_heads(k_bias), all_heads(v.bias)])
    return {
        "num_heads": attn.num_heads,
        "scale": attn.scale,
        "qkv_weight": torch.cat([q.weight, all_heads(k.weight), all_heads(v.weight)]),
        "qkv_bias": bias,
        "proj_weight": attn.proj.weight,
        "proj_bias": attn.proj.bias,
        "q_norm": identity_as_none(attn.q_norm),
        "k_norm": identity_as_none(attn.k_norm),
        "inner_norm": identity_as_none(attn.norm),
        "left_behind": ("sigmoid output gate",) if attn.gate is not None else (),
    }


def relative(attn: nn.Module) -> dict[str, Any]:
    """BEiT and relative-position ViTs: the bias, in the block or shared by all of them, belongs to a spatial window."""
    return {**fused(attn), "left_behind": ("relative position bias (it is spatial)",)}


def talking_heads(attn: nn.Module) -> dict[str, Any]:
    return {**fused(attn), "left_behind": ("talking-heads mixing",)}


def differential(attn: nn.Module) -> dict[str, Any]:
    """Two half-width softmax maps per head become one full-width map: same projections, no subtraction."""
    return {
        **fused(attn),
        "scale": (2 * attn.head_dim) ** -0.5,
        "q_norm": None,
        "k_norm": None,
        "left_behind": ("differential softmax",),
    }


def multihead(attn: nn.MultiheadAttention) -> dict[str, Any]:
    return {
        "num_heads": attn.num_heads,
        "scale": attn.head_dim**-0.5,
        "qkv_weight": attn.in_proj_weight,
        "qkv_bias": attn.in_proj_bias,
        "proj_weight": attn.out_proj.weight,
        "proj_bias": attn.out_proj.bias,
    }


def open_clip_custom(attn: nn.Module) -> dict[str, Any]:
    lost = {"logit_scale": "cosine attention", "head_scale": "per-head output scale"}
    return {
        **multihead(attn),
        "q_norm": identity_as_none(attn.ln_q),
        "k_norm": identity_as_none(attn.ln_k),
        "inner_norm": identity_as_none(attn.ln_inner),
        "left_behind": tuple(what for name, what in lost.items() if getattr(attn, name) is not None),
    }


def inside_parallel_block(block: nn.Module) -> dict[str, Any]:
    """Attention fused with the MLP: ``in_proj`` rows are [mlp | q | k | v], the output rows may be fused too."""
    hidden, dim = block.in_split[0], block.in_split[1]
    is_split = block.out_proj is None if hasattr(block, "attn_out_proj") else False
    out = block.attn_out_proj if is_split else block.out_proj
    is_differential = hasattr(block, "sub_norm")
    return {
        "num_heads": block.num_heads,
        "scale": (dim // block.num_heads) ** -0.5,
        "qkv_weight": block.in_proj.weight[hidden:],
        "qkv_bias": None if block.in_proj.bias is None else block.in_proj.bias[hidden:],
        "proj_weight": out.weight[:, :dim],
        # a fused output bias serves attention and MLP together and is added by the image block itself
        "proj_bias": out.bias if is_split else None,
        "q_norm": None if is_differential else identity_as_none(block.q_norm),
        "k_norm": None if is_differential else identity_as_none(block.k_norm),
        "left_behind": ("differential softmax",) if is_differential else (),
    }


def separate_linears(attn: nn.Module) -> dict[str, Any]:
    """transformers: ``q_proj``, ``k_proj`` and ``v_proj``, and an output projection of either name."""
    q, k, v = attn.q_proj, attn.k_proj, attn.v_proj
    out = attn.out_proj if hasattr(attn, "out_proj") else attn.o_proj
    return {
        "num_heads": attn.num_heads if hasattr(attn, "num_heads") else attn.num_attention_heads,
        "scale": attn.scale if hasattr(attn, "scale") else attn.scaling,
        "qkv_weight": torch.cat([q.weight, k.weight, v.weight]),
        "qkv_bias": None if q.bias is None else torch.cat([q.bias, k.bias, v.bias]),
        "proj_weight": out.weight,
        "proj_bias": out.bias,
    }


def blip(attn: nn.Module) -> dict[str, Any]:
    return {
        "num_heads": attn.num_heads,
        "scale": attn.scale,
        "qkv_weight": attn.qkv.weight,
        "qkv_bias": attn.qkv.bias,
        "proj_weight": attn.projection.weight,
        "proj_bias": attn.projection.bias,
    }


ATTENTIONS: dict[type[nn.Module] | str, Callable[[Any], dict[str, Any]]] = {
    timm.layers.Attention: fused,
    timm.layers.DiffAttention: differential,
    timm.layers.AttentionRope: rotary,
    eva.EvaAttention: rotary,
    beit.Attention: relative,
    vision_transformer_relpos.RelPosAttention: relative,
    cait.TalkingHeadAttn: talking_heads,
    nn.MultiheadAttention: multihead,
    open_clip_transformer.Attention: open_clip_custom,
    vision_transformer.ParallelScalingBlock: inside_parallel_block,
    vision_transformer.DiffParallelScalingBlock: inside_parallel_block,
    "transformers.CLIPAttention": separate_linears,
    "transformers.SiglipAttention": separate_linears,
    "transformers.ViTAttention": separate_linears,
    "transformers.Dinov2Attention": separate_linears,
    "transformers.Dinov2WithRegistersAttention": separate_linears,
    "transformers.BlipAttention": blip,
}


@dataclass(frozen=True)
class BlockKind:
    """Where a block class keeps what a temporal branch needs; attribute paths, '' for the block itself."""

    attn: str = "attn"
    norm: str = "norm1"
    layer_scale: str | None = None  # a path to the vector itself
    post_norm: bool = False
    # modules (or a list of them) whose output is the attention residual up to per-channel scaling; '' where the MLP
    # runs in parallel, so that only the block's own output will do
    residuals: tuple[str, ...] = ("attn",)
    left_behind: tuple[str, ...] = ()
    rotary: bool = False  # called with rope=...
    relative: bool = False  # attention has a bias of fixed window size


def timm_block(name: str) -> type[nn.Module] | None:
    """A block class of a timm module that older supported versions lack."""
    module, cls = name.split(".")
    return getattr(getattr(timm.models, module, None), cls, None)


HF_CLIP = BlockKind("self_attn", "layer_norm1", residuals=("self_attn",))
HF_VIT = BlockKind("attention", "layernorm_before", residuals=("attention",))
HF_DINOV2 = BlockKind("attention", "norm1", "layer_scale1.lambda1", residuals=("attention",))

BLOCKS: dict[type[nn.Module] | str | None, BlockKind] = {
    vision_transformer.Block: BlockKind(layer_scale="ls1.gamma"),
    vision_transformer.ResPostBlock: BlockKind(post_norm=True, residuals=("norm1",)),
    vision_transformer.ParallelScalingBlock: BlockKind("", "in_norm", "ls.gamma", residuals=("",)),
    vision_transformer.DiffParallelScalingBlock: BlockKind("", "in_norm", "ls.gamma", residuals=("",)),
    vision_transformer.ParallelThingsBlock: BlockKind(
        "attns.0.attn",
        "attns.0.norm",
        "attns.0.ls.gamma",
        residuals=("attns",),
        left_behind=("other parallel attentions",),
    ),
    eva.EvaBlock: BlockKind(layer_scale="gamma_1", rotary=True),
    eva.EvaBlockPostNorm: BlockKind(post_norm=True, residuals=("norm1",), rotary=True),
    beit.Block: BlockKind(layer_scale="gamma_1", relative=True),
    vision_transformer_relpos.RelPosBlock: BlockKind(layer_scale="ls1.gamma", relative=True),
    vision_transformer_relpos.ResPostRelPosBlock: BlockKind(post_norm=True, residuals=("norm1",), relative=True),
    cait.LayerScaleBlock: BlockKind(layer_scale="gamma_1"),
    timm_block("deepseek_vit.DeepseekVitBlock"): BlockKind(rotary=True),
    open_clip_transformer.ResidualAttentionBlock: BlockKind(norm="ln_1", layer_scale="ls_1.gamma"),
    open_clip_transformer.CustomResidualAttentionBlock: BlockKind(
        norm="ln_1", layer_scale="ls_1.gamma", residuals=("ln_attn",)
    ),
    "transformers.CLIPEncoderLayer": HF_CLIP,
    "transformers.SiglipEncoderLayer": HF_CLIP,
    "transformers.BlipEncoderLayer": HF_CLIP,
    "transformers.ViTLayer": HF_VIT,
    "transformers.Dinov2Layer": HF_DINOV2,
    "transformers.Dinov2WithRegistersLayer": HF_DINOV2,
}


def row(table: Mapping[Any, Any], module: nn.Module) -> Any:
    """The row of a module's class, or of a class it inherits from; None where there is none."""
    for cls in type(module).__mro__:
        for key in (cls, f"{cls.__module__.partition('.')[0]}.{cls.__name__}"):
            if key in table:
                return table[key]
    return None


def known(table: Mapping[Any, Any]) -> str:
    return ", ".join(sorted(key if isinstance(key, str) else key.__name__ for key in table if key is not None))


def child(module: nn.Module, path: str) -> Any:
    """``child(block, "attns.0.ls.gamma")``; None where the path ends nowhere."""
    try:
        return attrgetter(path)(module) if path else module
    except AttributeError:
        return None


def block_kind(block: nn.Module) -> BlockKind:
    """How to read a block, also after it became a space-time block.

    Raises:
        BackboneError: a class that is not in the table.
    """
    kind = row(BLOCKS, block)
    if kind is None:
        raise BackboneError(
            f"Blocks of class {type(block).__module__}.{type(block).__name__} are not supported: img2vid does not know "
            f"where their attention is. Known: {known(BLOCKS)}. To add one, add a row to img2vid/backbones/reading.py."
        )
    return kind


def read_block(block: nn.Module) -> SpatialAttention:
    """The spatial attention of an image block, with its live weights."""
    kind = block_kind(block)
    attn = child(block, kind.attn)
    reader = row(ATTENTIONS, attn)
    if reader is None:
        raise BackboneError(f"Attention of class {type(attn).__name__} is not supported. Known: {known(ATTENTIONS)}.")
    read = reader(attn)
    layer_scale = child(block, kind.layer_scale) if kind.layer_scale else None
    read["left_behind"] = (*read.get("left_behind", ()), *kind.left_behind)
    return SpatialAttention(**read, norm=child(block, kind.norm), layer_scale=layer_scale, post_norm=kind.post_norm)


def residual_modules(block: nn.Module) -> list[nn.Module]:
    """Modules whose output is what the block's attention adds to the residual stream."""
    found = [child(block, path) for path in block_kind(block).residuals]
    return [m for module in found for m in (module if isinstance(module, nn.ModuleList) else [module])]
