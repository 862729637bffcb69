"""Every architecture there is, at full size without numbers, and small with random weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from open_clip.factory import get_model_config
from open_clip.model import _build_vision_tower
from timm.models import eva
from torch import nn

from img2vid.backbones import load_backbone, wrap_module
from img2vid.backbones.from_open_clip import vision_skeleton
from img2vid.backbones.names import parse_name
from img2vid.backbones.nano_clip import NANO_CLIP
from img2vid.backbones.reading import block_kind, child
from img2vid.backbones.tower import Backbone, ImageTower

# timm modules whose models call themselves, or are called, vision transformers
VIT_MODULES = """
    vision_transformer vision_transformer_hybrid vision_transformer_relpos vision_transformer_sam deit eva beit cait
    naflexvit qwen3_vit deepseek_vit vitamin gemma4_vit xcit hiera hieradet_sam2 crossvit volo pit convit tnt
"""
# and a few that do not, to see them refused
NOT_VITS = """
    resnet50 convnext_tiny swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 maxvit_tiny_tf_224 levit_128s
    mobilevit_s mvitv2_tiny mixer_s32_224
"""
DEPTH = 2
GRID = (2, 2)  # patches of the small image
WIDE_GRID = (2, 4)  # where any size will do: no row can be taken for a column


def all_names() -> list[str]:
    """Every entrypoint and config the census looks at. Names that timm has deprecated are other names of these."""
    in_timm = [name for module in VIT_MODULES.split() for name in timm.list_models(module=module)]
    in_timm += [name for name in NOT_VITS.split() if timm.is_model(name)]
    in_open_clip = [name for name in open_clip.list_models() if name != NANO_CLIP]  # ours, where it was registered
    return [f"timm:{name}" for name in in_timm] + [f"open_clip:{name}" for name in in_open_clip]


def load_full_size(name: str) -> Backbone:
    """The architecture as it is, on the meta device. Of open_clip only the image tower: some texts need a download."""
    parsed = parse_name(name)
    if parsed.library == "timm":
        return load_backbone(name, on_meta=True)
    return wrap_module(vision_skeleton(parsed, {}))


def load_small(name: str, full: ImageTower, depth: int = DEPTH) -> nn.Module:
    """The same architecture with few blocks and a few patches, on the CPU, every weight random."""
    parsed = parse_name(name)
    if parsed.library == "timm":
        return randomise(load_backbone(name, random_weights=True, arguments=shrunk(full, depth)).model).eval()
    config = copy.deepcopy(get_model_config(parsed.architecture))
    with small_vision(config, full, depth):
        tower = _build_vision_tower(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False))
    return randomise(tower).eval()


def load_small_with_text(name: str) -> nn.Module:
    """An open_clip model with both its towers, of the class open_clip would choose, each one or two blocks deep."""
    config = copy.deepcopy(get_model_config(parse_name(name).architecture))
    is_custom = config.pop("custom_text", False)
    for part in ("text_cfg", "multimodal_cfg"):
        if part in config:
            config[part]["layers"] = 1
    if "multimodal_cfg" in config:
        cls = open_clip.CoCa
    else:
        cls = open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
    with small_vision(config, load_full_size(name).tower, DEPTH):
        model = cls(**config)
    return randomise(model).eval()


def shrunk(full: ImageTower, depth: int) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` for the small version."""
    height, width = (n * patch for n, patch in zip(GRID, full.patch_size, strict=True))
    smaller: dict[str, Any] = {"depth": depth, "img_size": height if height == width else (height, width)}
    if isinstance(getattr(full.module, "trunk", full.module), eva.Eva):  # takes one number of key/value heads per block
        attentions = [child(block, block_kind(block).attn) for _, block in full.blocks]
        kv_heads = sorted({attn.num_kv_heads for attn in attentions if hasattr(attn, "num_kv_heads")})
        if kv_heads:
            smaller["num_kv_heads"] = (kv_heads * depth)[:depth]
    return smaller


@contextmanager
def small_vision(config: dict[str, Any], full: ImageTower, depth: int) -> Iterator[None]:
    """Make an open_clip config's image tower small, in place and, as ``TimmModel`` takes no depth, in timm."""
    if not config["vision_cfg"].get("timm_model_name"):
        config["vision_cfg"] |= {"layers": depth, "image_size": GRID[0] * full.patch_size[0]}
    with mock.patch.object(timm, "create_model", partial(timm.create_model, **shrunk(full, depth))):
        yield


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move every weight away from the value libraries start at: where LayerScale is 1e-5 or a position table is zero,
    equality means little. Scales from U(0.5, 1.5), projections that keep variance, and the rest (biases, class tokens,
    position tables, rotary frequencies, running means) from N(0, 0.2)."""
    generator = torch.Generator().manual_seed(seed)
    running = [(name, buffer) for name, buffer in module.named_buffers() if "running_" in name]
    for name, tensor in [*module.named_parameters(), *running]:
        leaf = name.rpartition(".")[2]
        if leaf.startswith("gamma") or leaf == "running_var" or (leaf == "weight" and tensor.ndim < 2):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif leaf.endswith("weight"):
            tensor.normal_(0.0, tensor[0].numel() ** -0.5, generator=generator)
        else:
            tensor.normal_(0.0, 0.2, generator=generator)
    return module
