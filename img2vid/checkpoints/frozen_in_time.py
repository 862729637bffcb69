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
from img2vid.weights.keytable import State

TOWER = (
    # Frozen in Time, LaViLa         img2vid
    ("cls_token", "cls_token"),
    ("pos_embed", "pos_embed"),
    ("temporal_embed", "time_embed"),
    ("patch_embed.proj", "patch_embed.proj"),
    ("blocks.{i}.norm3", "blocks.{i}.temporal_norm1"),
    ("blocks.{i}.timeattn.qkv", "blocks.{i}.temporal_attn.qkv"),
    ("blocks.{i}.timeattn.proj", "blocks.{i}.temporal_attn.proj"),
    ("blocks.{i}.norm1", "blocks.{i}.norm1"),
    ("blocks.{i}.attn.qkv", "blocks.{i}.attn.qkv"),
    ("blocks.{i}.attn.proj", "blocks.{i}.attn.proj"),
    ("blocks.{i}.norm2", "blocks.{i}.norm2"),
    ("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
    ("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
    ("norm", "norm"),
)
PREFIX = "video_model."
TABLE = (*((PREFIX + theirs, ours) for theirs, ours in TOWER), ("vid_proj.0", "head"))
SETTINGS: dict[str, Any] = {
    "prefix_mode": "global",
    "time_embed_resample": "crop_or_pad",
    "quirks": ("block_input_residual", "prefix_in_time", "no_temporal_drop_path"),
}


def describe(file: Foreign) -> VideoConfig:
    state = FROZEN_IN_TIME.with_prefix(file.state)
    return described_tower(file, state, PREFIX, head="vid_proj.0", gate="none", **SETTINGS)


def described_tower(
    file: Foreign, state: State, prefix: str, head: str, arguments: dict[str, Any] | None = None, **settings: Any
) -> VideoConfig:
    """The model that a tower of these blocks is, whatever its names begin with.

    Args:
        state: what ``file`` holds, as the table names it.
        head: the projection into the space of texts, for files that have one.
        arguments: of the ViT, beyond its sizes.
    """
    named = Foreign(file.path, state, notes=file.notes, num_heads=file.num_heads)
    conv = f"{prefix}patch_embed.proj"
    sizes = sizes_of(named, block=f"{prefix}blocks.{{i}}.", conv=conv, fc1="mlp.fc1", qkv="attn.qkv.bias")
    image_size = square(named, f"{prefix}pos_embed", sizes["patch_size"])
    projection = named.num_outputs(head)
    projected = {} if projection is None else {"num_classes": projection}
    return VideoConfig(
        **plain_vit(**sizes, image_size=image_size, **projected, **(arguments or {})),
        num_frames=named.require(f"{prefix}temporal_embed", "1 T D").shape[1],
        **settings,
    )


def recognise(file: Foreign) -> bool:
    return any(key.startswith(f"{PREFIX}blocks.0.timeattn.") for key in file.state)


FROZEN_IN_TIME = Dialect(
    name="frozen-in-time",
    title="Frozen in Time's video tower",
    table=TABLE,
    describe=describe,
    recognise=recognise,
    prefix=PREFIX,
    dropped=(r"text_model\..*", r"txt_proj\..*"),
    pixels=Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic"),
)
