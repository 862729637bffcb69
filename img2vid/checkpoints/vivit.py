"""ViViT as transformers keeps it: ``VivitForVideoClassification`` and ``VivitModel``.

Model 1 of the paper (Arnab et al. 2021, arXiv:2103.15691): tubelets, then joint attention over all of them with one
class token. Its position table has a row for each patch of each tubelet: here ``time_embed="per_patch"``, beside
an image ``pos_embed`` that is zero for patches. Its 3-D patch projection is ours frame by frame: the central frame's
weights keep the image key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from img2vid.backbones.tower import Preprocess
from img2vid.checkpoints.dialect import Dialect, Foreign
from img2vid.checkpoints.plain_vit import from_hf, plain_vit, to_hf
from img2vid.config import ConfigError, VideoConfig, shown, whole_number
from img2vid.errors import WeightsError
from img2vid.weights.keytable import State

if TYPE_CHECKING:
    from img2vid.model import VideoModel

LAYER = "vivit.encoder.layer.{i}"
TABLE = (
    # transformers                                         img2vid
    ("vivit.embeddings.cls_token", "cls_token"),
    ("vivit.embeddings.position_embeddings[image]", "pos_embed"),
    ("vivit.embeddings.position_embeddings[video]", "time_embed"),
    ("vivit.embeddings.patch_embeddings.projection.weight[central]", "patch_embed.proj.weight"),
    ("vivit.embeddings.patch_embeddings.projection.weight[around]", "patch_embed.proj.tubelet_weight"),
    ("vivit.embeddings.patch_embeddings.projection.bias", "patch_embed.proj.bias"),
    (f"{LAYER}.layernorm_before", "blocks.{i}.norm1"),
    (f"{LAYER}.attention.attention.query", "blocks.{i}.attn.qkv[q]"),
    (f"{LAYER}.attention.attention.key", "blocks.{i}.attn.qkv[k]"),
    (f"{LAYER}.attention.attention.value", "blocks.{i}.attn.qkv[v]"),
    (f"{LAYER}.attention.output.dense", "blocks.{i}.attn.proj"),
    (f"{LAYER}.layernorm_after", "blocks.{i}.norm2"),
    (f"{LAYER}.intermediate.dense", "blocks.{i}.mlp.fc1"),
    (f"{LAYER}.output.dense", "blocks.{i}.mlp.fc2"),
    ("vivit.layernorm", "norm"),
    ("classifier", "classifier"),
)
POSITIONS = "vivit.embeddings.position_embeddings"  # (1, 1 + T*N, D)
PROJECTION = "vivit.embeddings.patch_embeddings.projection.weight"  # (D, C, K, h, w)


def unpack(state: State, config: VideoConfig) -> State:
    """The table and the projection divided into what an image model has, and what is about time."""
    state = dict(state)
    table, weight = state.pop(POSITIONS), state.pop(PROJECTION)
    patches = table[:, 1:].unflatten(1, (config.num_steps, -1))  # (1, T, N, D)
    state[f"{POSITIONS}[image]"] = torch.cat([table[:, :1], torch.zeros_like(patches[:, 0])], dim=1)
    state[f"{POSITIONS}[video]"] = patches
    frames = weight.unbind(2)  # K of (D, C, h, w)
    centre = len(frames) // 2
    state[f"{PROJECTION}[central]"] = frames[centre].contiguous()
    if len(frames) > 1:
        state[f"{PROJECTION}[around]"] = torch.stack([*frames[:centre], *frames[centre + 1 :]])
    return state


def pack(state: State, config: VideoConfig) -> State:
    state = dict(state)
    image, video = state.pop(f"{POSITIONS}[image]"), state.pop(f"{POSITIONS}[video]")
    patches = (image[:, 1:].unsqueeze(1) + video).flatten(1, 2)  # (1, T*N, D)
    state[POSITIONS] = torch.cat([image[:, :1], patches], dim=1)
    frames = list(state.pop(f"{PROJECTION}[around]", ()))
    frames.insert((len(frames) + 1) // 2, state.pop(f"{PROJECTION}[central]"))
    state[PROJECTION] = torch.stack(frames, dim=2)
    return state


def describe(file: Foreign) -> VideoConfig:
    config = file.config
    if config is None:
        raise WeightsError(
            f"{file.path} comes without its config.json, and how a ViViT's positions divide into frames and patches is "
            "not in its weights. Give the folder."
        )
    state = VIVIT.with_prefix(file.state)
    if not isinstance(config["tubelet_size"], list) or len(config["tubelet_size"]) != 3:
        raise ConfigError(f"tubelet_size={shown(config['tubelet_size'])}: expected [frames, height, width].")
    tubelet_size, *patch_size = (whole_number("each of tubelet_size", number) for number in config["tubelet_size"])
    steps, named = config["num_frames"] // tubelet_size, Foreign(file.path, state)
    sizes = from_hf(file, {"hidden_act": "gelu_fast", "layer_norm_eps": 1e-6, **config})
    expected = steps * (sizes["image_size"][0] // patch_size[0]) * (sizes["image_size"][1] // patch_size[1])
    has_table = POSITIONS in state  # else accounting will say
    if has_table and (num_places := named.require(POSITIONS, "1 1+T*N D").shape[1] - 1) != expected:
        raise WeightsError(
            f"{file.path}: {POSITIONS} is for {num_places} patches, but config.json describes {expected} ({steps} "
            f"tubelets of {sizes['image_size'][0]} x {sizes['image_size'][1]} pixels)."
        )
    return VideoConfig(
        **plain_vit(**sizes, patch_size=tuple(patch_size)),
        attention="joint_space_time",
        prefix_mode="shared",
        num_frames=config["num_frames"],
        tubelet_size=tubelet_size,
        time_embed="per_patch",
        num_classes=named.num_outputs("classifier"),
    )


def recognise(file: Foreign) -> bool:
    if file.config is not None and "model_type" in file.config:
        return file.config["model_type"] == "vivit"
    return any(key.startswith("vivit.") for key in file.state)


def configuration(model: VideoModel) -> dict[str, Any]:
    """``config.json`` of a model, as transformers' ``VivitConfig`` reads it."""
    return {
        **to_hf(model, "VivitModel", "VivitForVideoClassification"),
        "model_type": "vivit",
        "tubelet_size": [model.config.tubelet_size, *model.tower.patch_size],
        "num_frames": model.config.num_frames,
    }


VIVIT = Dialect(
    name="vivit",
    title="transformers' ViViT",
    table=TABLE,
    describe=describe,
    recognise=recognise,
    prefix="vivit.",
    dropped=(r"(vivit\.)?pooler\.dense\.(weight|bias)",),
    unpack=unpack,
    pack=pack,
    configuration=configuration,
    pixels=Preprocess((0.5,) * 3, (0.5,) * 3, "bilinear"),
)
