"""open_clip (https://github.com/mlfoundations/open_clip): image towers that come with a text tower."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import _find_checkpoint_in_dir, get_model_config
from open_clip.model import _build_vision_tower
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from img2vid.backbones.activations import set_activation
from img2vid.backbones.building import building, say_loading, set_norm_eps
from img2vid.backbones.from_timm import check_divisible, describe_timm
from img2vid.backbones.hub import ONLINE, fetching
from img2vid.backbones.names import EXPECTED, BackboneName
from img2vid.backbones.open_clip_weights import load_file
from img2vid.backbones.tower import Backbone, ImageTower, Preprocess
from img2vid.backbones.widening import set_heads
from img2vid.config import shown
from img2vid.errors import BackboneError, WeightsError, nearest
from img2vid.temporal.embeddings import resample_pos_embed
from img2vid.weights.accounting import LoadReport

LOCAL_WAY = "download it elsewhere, and give the folder: --backbone open_clip:local-dir:FOLDER"


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
        arguments: further keyword arguments of ``open_clip.create_model``; and ``norm_eps``, ``activation`` and
            ``heads`` as ``load_timm`` takes them, the last for the image tower.
    """
    check_known(name)
    if weights is None and not random_weights and name.scheme == "local-dir:":
        weights = folder_weights(name.place)
    if weights is None and not random_weights and name.tag is None and name.scheme is None:
        tags = ", ".join(list_pretrained_tags_by_model(name.architecture)) or "none"
        raise BackboneError(
            f"open_clip:{name.architecture} names no weights. Add a tag (open_clip:{name.architecture}/TAG; there are: "
            f"{tags}), or give --weights FILE or --random-weights."
        )
    described = dict(arguments or {})
    arguments = {**tag_arguments(name), **described}
    norm_eps, activation, heads = (arguments.pop(name, None) for name in ("norm_eps", "activation", "heads"))
    fetch_text_config(name)
    with building(str(name), described):
        skeleton = vision_skeleton(name, arguments)
        describe_open_clip(skeleton)  # refuse before downloading anything
        say_loading(str(name), skeleton, weights, random_weights, "image tower: ")
        with quiet_open_clip(), fetching(f"the pretrained weights of {name}"), torch.device(device):
            model = open_clip.create_model(
                name.architecture,
                pretrained=None if random_weights or weights is not None else name.tag,
                load_weights=not random_weights and weights is None,
                require_pretrained=not random_weights and weights is None,  # a warning is not enough
                pretrained_text=False,
                device=device,
                **arguments,
            )
        if random_weights:
            draw_projection(model)
    set_norm_eps(model, norm_eps)
    set_activation(model, activation)
    source = None if random_weights else f"open_clip {name.architecture}/{name.tag}".removesuffix("/None")
    tower, report = describe_open_clip(model.visual), LoadReport()
    set_image_size(model.visual, tower, image_size)  # first, so that a file of that size goes in as it is
    if weights is not None:
        report, learned = load_file(model, describe_open_clip(model.visual), weights)
        described.update(learned)
        source = f"the file {Path(weights).name}"
    set_heads(describe_open_clip(model.visual), heads)
    return Backbone(model.eval(), describe_open_clip(model.visual), str(name), described, source, report)


def draw_projection(model: nn.Module) -> None:
    """open_clip leaves the projection of CoCa's caption decoder as the memory it was given, at times nan."""
    projection = getattr(getattr(model, "text_decoder", None), "text_projection", None)
    if isinstance(projection, nn.Parameter):
        nn.init.normal_(projection, std=projection.shape[0] ** -0.5)


def check_known(name: BackboneName) -> None:
    if name.scheme:
        check_described(name)
        return
    if get_model_config(name.architecture) is None:
        hint = nearest(name.architecture, open_clip.list_models())
        raise BackboneError(
            f"open_clip {open_clip.__version__} has no model {shown(name.architecture)}.{hint} {EXPECTED}"
        )
    tags = list_pretrained_tags_by_model(name.architecture)
    if name.tag and not get_pretrained_cfg(name.architecture, name.tag):
        have = ", ".join(tags) or "none"
        raise BackboneError(f"open_clip has no weights {shown(name.tag)} for {name.architecture}. It has: {have}.")


def check_described(name: BackboneName) -> None:
    """Whether a folder or repository says, in open_clip's format, what its model is."""
    file = "open_clip_config.json"
    if name.scheme == "local-dir:" and not os.path.isfile(os.path.join(name.place, file)):
        there = "holds no" if os.path.isdir(name.place) else "is no folder with an"
        raise BackboneError(f"{name.place} {there} {file}, which open_clip's push_to_hf_hub and hub folders have.")
    try:
        with fetching(f"{file} of {name}, which says what model it is", (LOCAL_WAY, ONLINE)):
            config = get_model_config(name.architecture)
    except (ValueError, AttributeError) as error:
        if isinstance(error, BackboneError):
            raise
        raise BackboneError(f"{file} of {name} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or not all(key in config for key in ("embed_dim", "vision_cfg", "text_cfg")):
        raise BackboneError(
            f"{file} of {name} describes no model: expected model_cfg with embed_dim, vision_cfg and text_cfg."
        )


def folder_weights(folder: str) -> str:
    """The weights file that open_clip takes from a ``local-dir:`` folder."""
    path = _find_checkpoint_in_dir(Path(folder))
    if path is None:
        raise WeightsError(
            f"{folder} holds no weights (.safetensors, .bin or .pth). Give --weights FILE or --random-weights."
        )
    return path


def fetch_text_config(name: BackboneName) -> None:
    """Some text towers are built from a config on the hub, whatever weights they are to have: fetch it first.

    Raises:
        WeightsUnavailable: it could not be had, and no weights file is a way out.
    """
    hub_name = get_model_config(name.architecture)["text_cfg"].get("hf_model_name")
    if not hub_name:
        return
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise BackboneError(f"The text tower of {name} needs transformers: pip install 'img2vid[hf]'.") from error
    what = f"the Hugging Face config {hub_name}, from which the text tower of {name} is built, with any weights"
    ways_out = (ONLINE, "choose a model with open_clip's own text tower, such as clip_b32 or nano_clip")
    with building(str(name), {}), fetching(what, ways_out):
        AutoConfig.from_pretrained(hub_name, trust_remote_code=False)  # and it will not ask either


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
    config["vision_cfg"] = arguments.get("vision_cfg", config["vision_cfg"])
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
