"""``img2vid inspect``: what is inside a backbone or a saved video model, without loading weights."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from img2vid.backbones import load_backbone
from img2vid.backbones.reading import block_kind, child, read_block
from img2vid.backbones.tower import ImageTower
from img2vid.beside import examples_beside
from img2vid.checkpoints.native import read_description
from img2vid.config import DIVIDED_ONLY, ConfigError, VideoConfig, shown
from img2vid.errors import WeightsError
from img2vid.model import VideoModel
from img2vid.proof.guarantees import Guarantee
from img2vid.surgery import refuse_impossible
from img2vid.temporal.infront import own_class
from img2vid.temporal.pooling import first
from img2vid.two_towers import VideoTextModel, build_model


@dataclass
class Inspection:
    """Facts about a video model; ``parameters`` by origin, FLOPs of one clip at batch 1 (a multiply-add counts two)."""

    name: str
    model_class: str
    tower_class: str
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    any_size: bool
    position: str
    num_prefix_tokens: int
    depth: int
    block_class: str
    attention_class: str
    num_heads: int
    width: int
    feature_dim: int
    left_behind: tuple[str, ...]
    parameters: dict[str, int]
    mode: str  # the one of ``guarantees`` that is in force
    num_frames: int
    flops_per_clip: int
    flops_image_model: int
    guarantees: dict[str, str]
    quirks: tuple[str, ...] = ()
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None  # of the classifier, where the folder says

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        from img2vid.reporting import render_inspection

        return render_inspection(self)


def inspect(source: str | Path, **settings: Any) -> Inspection:
    """Look inside a backbone (by name) or a saved model (by folder). Nothing is downloaded and no weights are read.

    Args:
        settings: fields of ``VideoConfig`` to inspect a backbone with, such as ``num_frames=16``; for a folder, what
            would be with these settings instead of its own.

    Raises:
        Img2VidError: neither a folder of ours nor a supported backbone.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise WeightsError(f"{shown(source)} is of type {type(source).__name__}; expected a folder or a name.")
    if "/" in str(source) and ":" not in str(source) and not os.path.exists(source):
        raise WeightsError(f"There is no folder {source}. Give a model folder, or a backbone's name without slashes.")
    names = None
    if os.path.isdir(source):
        described = read_description(Path(source))
        config = VideoConfig.from_dict({**described["video"], **settings})
        names = described.get("class_names") if "num_classes" not in settings else None
        if config.backbone is None:
            raise WeightsError(f"{source} was made from a module passed in by hand; there is no name to look up.")
    else:
        config = VideoConfig.from_dict({**settings, "backbone": str(source)})
    backbone = load_backbone(
        config.backbone, image_size=config.image_size, arguments=config.backbone_args, on_meta=True
    )
    image_flops = count_flops(backbone.tower, config.num_steps)
    facts = examine(build_model(backbone, config), str(source), image_flops)
    return facts if names is None else replace(facts, class_names=tuple(names))


def examine(model: VideoModel | VideoTextModel, name: str, image_flops: int) -> Inspection:
    """The facts of a video model on the meta device."""
    video = model.visual if isinstance(model, VideoTextModel) else model
    tower, config = video.tower, video.config
    block = tower.blocks[0][1]
    spatial, attention = read_block(block), child(block, block_kind(block).attn)
    flops, feature_dim = count_clip_flops(video)
    parameters: dict[str, int] = {}
    for parameter_name, parameter in model.named_parameters():
        origin = model.origin(parameter_name)
        parameters[origin] = parameters.get(origin, 0) + parameter.numel()
    return Inspection(
        name=name,
        model_class=type(model).__name__,
        tower_class=own_class(video.base).__name__,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        any_size=tower.any_size,
        position=tower.position,
        num_prefix_tokens=tower.num_prefix_tokens,
        depth=len(tower.blocks),
        block_class=own_class(block).__name__,
        attention_class="inside the block" if attention is block else own_class(attention).__name__,
        num_heads=spatial.num_heads,
        width=spatial.dim,
        feature_dim=feature_dim,
        left_behind=spatial.left_behind + (("rotary position code",) if "rotary" in tower.position else ()),
        parameters=parameters,
        mode=f"{config.attention} / {config.prefix_mode}{' / causal' if config.causal else ''}",
        num_frames=config.num_frames,
        flops_per_clip=flops,
        flops_image_model=image_flops,
        quirks=config.quirks,
        num_classes=video.num_logits,
        guarantees={f"{mode} / {prefix}": promise(tower, config, mode, prefix) for mode, prefix in GUARANTEED},
    )


GUARANTEED = (
    ("divided_space_time", "per_frame"),
    ("divided_space_time", "shared"),
    ("divided_space_time", "global"),
    ("joint_space_time", "per_frame"),
    ("joint_space_time", "shared"),
    ("factorised_encoder", "per_frame"),
    ("space_only", "per_frame"),
)


def promise(tower: ImageTower, config: VideoConfig, attention: str, prefix_mode: str) -> str:
    """What a way of inserting time would guarantee here beside the other settings, or that it is refused."""
    if (attention, prefix_mode) != (
        config.attention,
        config.prefix_mode,
    ):  # peculiarities are of one mode
        own_time = "zeros" if config.time_embed == "per_patch" else config.time_embed
        config = replace(config, quirks=(), time_embed=own_time, causal=False, time_embed_resample=None)
    if attention != "divided_space_time":  # what belongs to divided attention alone is left out elsewhere
        config = replace(config, **{name: getattr(VideoConfig, name) for name in DIVIDED_ONLY}, prefix_mode="per_frame")
    elif config.attention != attention:
        config = replace(config, prefix_mode="per_frame")
    config = replace(config, attention=attention, prefix_mode=prefix_mode)
    try:
        refuse_impossible(tower, config)
    except ConfigError as error:
        return f"refused: {error}"
    return Guarantee.of(config, tower.num_prefix_tokens).summary


def count_flops(tower: ImageTower, num_images: int) -> int:
    """FLOPs of an image model on so many images, by torch's counter (matrix products and convolutions)."""
    with FlopCounterMode(display=False) as counter:
        tower.call(tower.module.eval(), torch.zeros(num_images, tower.in_channels, *tower.image_size, device="meta"))
    return counter.get_total_flops()


def count_clip_flops(video: VideoModel) -> tuple[int, int]:
    """FLOPs of one clip, and the length of its feature."""
    clip = torch.zeros(1, video.config.num_frames, video.tower.in_channels, *video.tower.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, examples_beside(video, 1):
        feature = first(video.eval().clip_features(clip))
    return counter.get_total_flops(), feature.shape[-1]
