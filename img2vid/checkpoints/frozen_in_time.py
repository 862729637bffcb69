"""Frozen in Time's video tower (Bain et al. 2021, arXiv:2104.00650; github.com/m-bain/frozen-in-time).

One class token a clip that attends to all patches of all frames, over space and along time alike; along time, patches
attend to it too. Nothing gates attention along time, and the residual stream does not keep what it adds: see the
quirks. Of a whole model's file, the text tower (a DistilBERT) is dropped; ``vid_proj`` becomes the tower's head, so
features are in the space of the text's.
"""

from __future__ import annotations

from typing import Any

from img2vid.backbones.tower import Preprocess
from img2vid.checkpoints.dialect import Dialect, Foreign
from img2vid.checkpoints.plain_vit import plain_vit, sizes_of, square
from img2vid.config import VideoConfig

TABLE = (
    # Frozen in Time                                 img2vid
    ("video_model.cls_token", "cls_token"),
    ("video_model.pos_embed", "pos_embed"),
    ("video_model.temporal_embed", "time_embed"),
    ("video_model.patch_embed.proj", "patch_embed.proj"),
    ("video_model.blocks.{i}.norm3", "blocks.{i}.temporal_norm1"),
    ("video_model.blocks.{i}.timeattn.qkv", "blocks.{i}.temporal_attn.qkv"),
    ("video_model.blocks.{i}.timeattn.proj", "blocks.{i}.temporal_attn.proj"),
    ("video_model.blocks.{i}.norm1", "blocks.{i}.norm1"),
    ("video_model.blocks.{i}.attn.qkv", "blocks.{i}.attn.qkv"),
    ("video_model.blocks.{i}.attn.proj", "blocks.{i}.attn.proj"),
    ("video_model.blocks.{i}.norm2", "blocks.{i}.norm2"),
    ("video_model.blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
    ("video_model.blocks.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
    ("video_model.norm", "norm"),
    ("vid_proj.0", "head"),
)
SETTINGS: dict[str, Any] = {
    "prefix_mode": "global",
    "time_embed_resample": "crop_or_pad",
    "quirks": ("block_input_residual", "prefix_in_time", "no_temporal_drop_path"),
}


def describe(file: Foreign) -> VideoConfig:
    prefix = FROZEN_IN_TIME.prefix
    named = Foreign(file.path, FROZEN_IN_TIME.with_prefix(file.state), notes=file.notes, num_heads=file.num_heads)
    conv = f"{prefix}patch_embed.proj"
    sizes = sizes_of(named, block=f"{prefix}blocks.{{i}}.", conv=conv, fc1="mlp.fc1", qkv="attn.qkv.bias")
    num_places = named.require(f"{prefix}pos_embed").shape[1] - 1
    head = {"num_classes": named.state["vid_proj.0.bias"].shape[0]} if "vid_proj.0.bias" in named.state else {}
    return VideoConfig(
        **plain_vit(**sizes, image_size=square(file, num_places, sizes["patch_size"]), **head),
        num_frames=named.require(f"{prefix}temporal_embed").shape[1],
        gate="none",
        **SETTINGS,
    )


def recognise(file: Foreign) -> bool:
    return any(key.startswith("video_model.blocks.0.timeattn.") for key in file.state)


FROZEN_IN_TIME = Dialect(
    name="frozen-in-time",
    title="Frozen in Time's video tower",
    table=TABLE,
    describe=describe,
    recognise=recognise,
    prefix="video_model.",
    dropped=(r"text_model\..*", r"txt_proj\..*"),
    pixels=Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic"),
)
