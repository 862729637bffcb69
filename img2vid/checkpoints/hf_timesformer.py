"""TimeSformer as transformers keeps it: ``TimesformerForVideoClassification`` and ``TimesformerModel``.

The same model as the original under other names, but for ``space_only``, where transformers returns logits of every
frame; ours are their mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from img2vid.backbones.tower import Preprocess
from img2vid.checkpoints.dialect import Dialect, Foreign
from img2vid.checkpoints.plain_vit import from_hf, plain_vit, sizes_of, square, to_hf
from img2vid.checkpoints.timesformer import DROP_PATH, NEAREST, time_settings
from img2vid.config import VideoConfig, real_number, whole_number
from img2vid.errors import WeightsError

if TYPE_CHECKING:
    from img2vid.model import VideoModel

TABLE = (
    # transformers                                                       img2vid
    ("timesformer.embeddings.cls_token", "cls_token"),
    ("timesformer.embeddings.position_embeddings", "pos_embed"),
    ("timesformer.embeddings.time_embeddings", "time_embed"),
    ("timesformer.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("timesformer.encoder.layer.{i}.temporal_layernorm", "blocks.{i}.temporal_norm1"),
    ("timesformer.encoder.layer.{i}.temporal_attention.attention.qkv", "blocks.{i}.temporal_attn.qkv"),
    ("timesformer.encoder.layer.{i}.temporal_attention.output.dense", "blocks.{i}.temporal_attn.proj"),
    ("timesformer.encoder.layer.{i}.temporal_dense", "blocks.{i}.temporal_fc"),
    ("timesformer.encoder.layer.{i}.layernorm_before", "blocks.{i}.norm1"),
    ("timesformer.encoder.layer.{i}.attention.attention.qkv", "blocks.{i}.attn.qkv"),
    ("timesformer.encoder.layer.{i}.attention.output.dense", "blocks.{i}.attn.proj"),
    ("timesformer.encoder.layer.{i}.layernorm_after", "blocks.{i}.norm2"),
    ("timesformer.encoder.layer.{i}.intermediate.dense", "blocks.{i}.mlp.fc1"),
    ("timesformer.encoder.layer.{i}.output.dense", "blocks.{i}.mlp.fc2"),
    ("timesformer.layernorm", "norm"),
    ("classifier", "classifier"),
)
PREFIX = "timesformer."


def describe(file: Foreign) -> VideoConfig:
    state = HF_TIMESFORMER.with_prefix(file.state)
    named = Foreign(file.path, state, file.config, notes=file.notes, num_heads=file.num_heads)
    layer = f"{PREFIX}encoder.layer.{{i}}."
    if file.config is not None:
        config = file.config
        patch = whole_number("patch_size", config["patch_size"])
        sizes = {**from_hf(file, config), "patch_size": (patch, patch)}
        drop_path = real_number("drop_path_rate", config.get("drop_path_rate", 0.0), least=0.0, below=1.0)
    else:  # a bare state dict of that name: everything but the heads can be seen
        conv = f"{PREFIX}embeddings.patch_embeddings.projection"
        sizes = sizes_of(named, block=layer, conv=conv, fc1="intermediate.dense", qkv="attention.attention.qkv.bias")
        sizes["image_size"] = square(named, f"{PREFIX}embeddings.position_embeddings", sizes["patch_size"])
        drop_path = DROP_PATH
    settings = time_settings(named, f"{PREFIX}embeddings.time_embeddings", f"{layer}temporal_dense", "classifier")
    if file.config is not None and file.config.get("attention_type", "divided_space_time") != settings["attention"]:
        raise WeightsError(
            f"{file.path}: config.json says attention_type {file.config.get('attention_type')!r}, but the weights are "
            f"those of {settings['attention']!r}. One of them belongs to another model."
        )
    frames = (file.config or {}).get("num_frames", settings["num_frames"])
    if settings["attention"] != "space_only" and frames != settings["num_frames"]:
        raise WeightsError(
            f"{file.path}: config.json says num_frames {frames}, but the weights have time embeddings "
            f"for {settings['num_frames']}. One of them belongs to another model. (--num-frames changes T at import.)"
        )
    if settings["attention"] == "space_only":
        settings["num_frames"] = (file.config or {}).get("num_frames", settings["num_frames"])
        settings["quirks"] = ()  # its logits are of frames, so the mean comes last, as it does here
    settings["quirks"] += NEAREST
    return VideoConfig(**plain_vit(**sizes, drop_path_rate=drop_path), **settings)


def recognise(file: Foreign) -> bool:
    if file.config is not None and "model_type" in file.config:
        return file.config["model_type"] == "timesformer"
    return any(key.startswith(PREFIX) for key in file.state)


def configuration(model: VideoModel) -> dict[str, Any]:
    """``config.json`` of a model, as transformers' ``TimesformerConfig`` reads it."""
    return {
        **to_hf(model, "TimesformerModel", "TimesformerForVideoClassification"),
        "model_type": "timesformer",
        "patch_size": model.tower.patch_size[0],
        "num_frames": model.config.num_frames,
        "attention_type": model.config.attention,
        "drop_path_rate": 0,  # transformers 5 takes whole numbers only
    }


HF_TIMESFORMER = Dialect(
    name="hf-timesformer",
    title="transformers' TimeSformer",
    table=TABLE,
    describe=describe,
    recognise=recognise,
    prefix=PREFIX,
    configuration=configuration,
    pixels=Preprocess((0.45,) * 3, (0.225,) * 3, "bilinear"),
)
