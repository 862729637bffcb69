"""TimeSformer as MMAction2 keeps it (github.com/open-mmlab/mmaction2, mmaction/models/backbones/timesformer.py).

The same model under other names: each attention with its norm is one of a block's ``attentions``, and inside is
PyTorch's ``nn.MultiheadAttention``. Blocks without attention along time are of another class there, whose norms have
other names: ``OTHER_BLOCKS``. Files hold ``backbone.`` and ``cls_head.``.
"""

from __future__ import annotations

import re

from img2vid.backbones.tower import Preprocess
from img2vid.checkpoints.dialect import Dialect, Foreign
from img2vid.checkpoints.plain_vit import plain_vit, sizes_of, square
from img2vid.checkpoints.timesformer import DROP_PATH, time_settings
from img2vid.config import VideoConfig
from img2vid.weights.keytable import State

LAYER = "backbone.transformer_layers.layers.{i}"
TABLE = (
    # MMAction2                                     img2vid
    ("backbone.cls_token", "cls_token"),
    ("backbone.pos_embed", "pos_embed"),
    ("backbone.time_embed", "time_embed"),
    ("backbone.patch_embed.projection", "patch_embed.proj"),
    (f"{LAYER}.attentions.0.norm", "blocks.{i}.temporal_norm1"),
    (f"{LAYER}.attentions.0.attn.in_proj_weight", "blocks.{i}.temporal_attn.qkv.weight"),
    (f"{LAYER}.attentions.0.attn.in_proj_bias", "blocks.{i}.temporal_attn.qkv.bias"),
    (f"{LAYER}.attentions.0.attn.out_proj", "blocks.{i}.temporal_attn.proj"),
    (f"{LAYER}.attentions.0.temporal_fc", "blocks.{i}.temporal_fc"),
    (f"{LAYER}.attentions.1.norm", "blocks.{i}.norm1"),
    (f"{LAYER}.attentions.1.attn.in_proj_weight", "blocks.{i}.attn.qkv.weight"),
    (f"{LAYER}.attentions.1.attn.in_proj_bias", "blocks.{i}.attn.qkv.bias"),
    (f"{LAYER}.attentions.1.attn.out_proj", "blocks.{i}.attn.proj"),
    (f"{LAYER}.ffns.0.norm", "blocks.{i}.norm2"),
    (f"{LAYER}.ffns.0.layers.0.0", "blocks.{i}.mlp.fc1"),
    (f"{LAYER}.ffns.0.layers.1", "blocks.{i}.mlp.fc2"),
    ("backbone.norm", "norm"),
    ("cls_head.fc_cls", "classifier"),
)
OTHER_BLOCKS = (  # joint and space-only: their names, and those they have in divided blocks
    ("attentions.0.attn.", "attentions.1.attn."),
    ("norms.0.", "attentions.1.norm."),
    ("norms.1.", "ffns.0.norm."),
)
INSIDE = r"(backbone\.transformer_layers\.layers\.\d+\.)"


def unpack(state: State, config: VideoConfig | None = None) -> State:
    return state if is_divided(state) else renamed_blocks(state, OTHER_BLOCKS)


def pack(state: State, config: VideoConfig) -> State:
    return state if is_divided(state) else renamed_blocks(state, [(to, start) for start, to in OTHER_BLOCKS])


def is_divided(state: State) -> bool:
    return any(".temporal_fc." in key for key in state)


def renamed_blocks(state: State, rules: list | tuple) -> State:
    renamed = {}
    for key, tensor in state.items():
        for start, to in rules:
            key, found = re.subn(INSIDE + re.escape(start), rf"\g<1>{to}", key)
            if found:
                break
        renamed[key] = tensor
    return renamed


def describe(file: Foreign) -> VideoConfig:
    state = unpack(MMACTION2.with_prefix(file.state))
    named = Foreign(file.path, state, notes=file.notes, num_heads=file.num_heads)
    conv = "backbone.patch_embed.projection"
    sizes = sizes_of(named, block=f"{LAYER}.", conv=conv, fc1="ffns.0.layers.0.0", qkv="attentions.1.attn.in_proj_bias")
    image_size = square(named, "backbone.pos_embed", sizes["patch_size"])
    return VideoConfig(
        **plain_vit(**sizes, image_size=image_size, drop_path_rate=DROP_PATH),
        **time_settings(named, "backbone.time_embed", f"{LAYER}.attentions.0.temporal_fc", "cls_head.fc_cls"),
    )


def recognise(file: Foreign) -> bool:
    return any(re.match(r"(backbone\.)?transformer_layers\.layers\.0\.attentions\.0\.", key) for key in file.state)


MMACTION2 = Dialect(
    name="mmaction2-timesformer",
    title="MMAction2's TimeSformer",
    table=TABLE,
    describe=describe,
    recognise=recognise,
    prefix="backbone.",
    unpack=unpack,
    pack=pack,
    pixels=Preprocess((0.5,) * 3, (0.5,) * 3, "bilinear"),
)
