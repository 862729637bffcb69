"""open_clip (https://github.com/mlfoundations/open_clip): image towers that come with a text tower."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import get_model_config
from open_clip.model import _build_vision_tower
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from img2vid.backbones.from_timm import check_divisible, describe_timm
from img2vid.backbones.hub import fetching
from img2vid.backbones.names import BackboneName
from img2vid.backbones.open_clip_weights import load_file
from img2vid.backbones.tower import Backbone, ImageTower, Preprocess
from img2vid.errors import BackboneError, nearest
from img2vid.temporal.embeddings import resample_pos_embed
from img2vid.weights import LoadReport


class AnySizeVisionTransformer(VisionTransformer):
    """open_clip's own tower, taking images of any size: its position embedding is resampled on the fly."""

    def _embeds(self, x: Tensor) -> Tensor:
        grid = (x.shape[-2] // self.patch_size[0], x.shape[-1] // self.patch_size[1])
        if grid == tuple(self.grid_size):
            return super()._embeds(x)
        patches = self.conv1(x).flatten(2).transpose(1, 2)  # (B, N, D)
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        pos_embed = resample_pos_embed(self.positional_embedding.unsqueeze(0), grid, tuple(self.grid_size), 1)
        x = torch.cat([class_token, patches], dim=1) + pos_embed.to(x.dtype)
        return self.ln_pre(self.patch_dropout(x))


def load_open_clip(
    name: BackboneName,
    *,
    weights: str | Path | None = None,
    random_weights: bool = False,
    image_size: tuple[int, int] | None = None,
    arguments: dict[str, Any] | None = None,
    device: str = "cpu",
) -> Backbone:
    """Build an open_clip model, both towers, and load its weights.

    A tag also says how its weights were trained: QuickGELU and the pixel statistics are taken from it, whether the
    weights come from the tag or from a local file, so that ``ViT-B-32/openai`` is never run with the wrong activation.

    Args:
        name: architecture and tag.
        weights: local file instead of the tag's weights; every key is accounted for.
        random_weights: no weights at all.
        image_size: pixels (height, width); position embeddings are resampled.
        arguments: further keyword arguments of ``open_clip.create_model``.
    """
    check_known(name)
    if weights is None and not random_weights and name.tag is None:
        tags = ", ".join(list_pretrained_tags_by_model(name.architecture)) or "none"
        raise BackboneError(
            f"open_clip:{name.architecture} names no weights. Add a tag (open_clip:{name.architecture}/TAG; there are: "
            f"{tags}), or give --weights FILE or --random-weights."
        )
    described = dict(arguments or {})
    arguments = {**tag_arguments(name), **described}
    describe_open_clip(vision_skeleton(name, arguments))  # refuse before downloading anything
    with quiet_open_clip(), fetching(str(name)), torch.device(device):
        model = open_clip.create_model(
            name.architecture,
            pretrained=None if random_weights or weights is not None else name.tag,
            pretrained_text=False,
            device=device,
            **arguments,
        )
    source = None if random_weights else f"open_clip {name.architecture}/{name.tag}"
    tower, report = describe_open_clip(model.visual), LoadReport()
    set_image_size(model.visual, tower, image_size)  # first, so that a file of that size goes in as it is
    if weights is not None:
        report = load_file(model, describe_open_clip(model.visual), weights)
        source = f"the file {Path(weights).name}"
    return Backbone(model.eval(), describe_open_clip(model.visual), str(name), described, source, report)


def check_known(name: BackboneName) -> None:
    if get_model_config(name.architecture) is None:
        hint = nearest(name.architecture, open_clip.list_models())
        raise BackboneError(f"open_clip {open_clip.__version__} has no model {name.architecture!r}.{hint}")
    tags = list_pretrained_tags_by_model(name.architecture)
    if name.tag and not get_pretrained_cfg(name.architecture, name.tag):
        have = ", ".join(tags) or "none"
        raise BackboneError(f"open_clip has no weights {name.tag!r} for {name.architecture}. It has: {have}.")


def tag_arguments(name: BackboneName) -> dict[str, Any]:
    """What a tag says about its weights beyond the architecture."""
    config = get_pretrained_cfg(name.architecture, name.tag) if name.tag else {}
    keys = ("mean", "std", "interpolation", "resize_mode")
    preprocess = {key: config[key] for key in keys if config.get(key) is not None}
    arguments: dict[str, Any] = {"force_preprocess_cfg": preprocess} if preprocess else {}
    if config.get("quick_gelu"):
        arguments["force_quick_gelu"] = True
    return arguments


def vision_skeleton(name: BackboneName, arguments: dict[str, Any]) -> nn.Module:
    """The image tower alone, without numbers: quick, and free of text towers that need a download to be built."""
    config = copy.deepcopy(get_model_config(name.architecture))
    with torch.device("meta"), quiet_open_clip():
        return _build_vision_tower(
            config["embed_dim"],
            config["vision_cfg"],
            config.get("quick_gelu", False) or "force_quick_gelu" in arguments,
        )


@contextmanager
def quiet_open_clip() -> Iterator[None]:
    """open_clip logs through the root logger, among others that random weights were asked for."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def set_image_size(module: nn.Module, tower: ImageTower, image_size: tuple[int, int] | None) -> None:
    """Another native image size, in place, with both patch grids explicit."""
    if image_size is None or image_size == tower.image_size:
        return
    check_divisible(image_size, tower.patch_size)
    if isinstance(module, TimmModel):
        module.set_input_size(image_size)
        return
    grid = tuple(pixels // patch for pixels, patch in zip(image_size, tower.patch_size, strict=True))
    old = module.positional_embedding
    resampled = resample_pos_embed(old.detach().unsqueeze(0), grid, tuple(module.grid_size), 1).squeeze(0)
    module.positional_embedding = nn.Parameter(resampled, requires_grad=old.requires_grad)
    module.image_size, module.grid_size = image_size, grid


def describe_open_clip(visual: nn.Module) -> ImageTower:
    """Find the parts of an open_clip image tower, and let it take images of any size.

    Raises:
        BackboneError: a tower that has no transformer blocks over tokens, with the reason.
    """
    if isinstance(visual, TimmModel):
        trunk = describe_timm(visual.trunk)
        trunk.module, trunk.blocks = visual, [(f"trunk.{path}", block) for path, block in trunk.blocks]
        trunk.preprocess = read_preprocess(visual)
        return trunk
    if not isinstance(visual, VisionTransformer):
        raise BackboneError(
            f"The image tower {type(visual).__name__} cannot become a video tower: it is not a transformer over tokens."
        )
    if type(visual) is VisionTransformer:
        visual.__class__ = AnySizeVisionTransformer
    return ImageTower(
        module=visual,
        blocks=[(f"transformer.resblocks.{i}", block) for i, block in enumerate(visual.transformer.resblocks)],
        num_prefix_tokens=1,
        image_size=tuple(visual.image_size),
        patch_size=tuple(visual.patch_size),
        any_size=isinstance(visual, AnySizeVisionTransformer),
        position="learned 2-D" if visual.positional_embedding.requires_grad else "sin-cos 2-D",
        patch_conv=visual.conv1,
        in_channels=visual.conv1.in_channels,
        preprocess=read_preprocess(visual),
    )


def read_preprocess(visual: nn.Module) -> Preprocess:
    config = getattr(visual, "preprocess_cfg", None) or {}
    mean = tuple(config.get("mean") or open_clip.OPENAI_DATASET_MEAN)
    std = tuple(config.get("std") or open_clip.OPENAI_DATASET_STD)
    return Preprocess(mean, std, config.get("interpolation") or "bicubic")
