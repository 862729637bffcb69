"""timm (https://github.com/huggingface/pytorch-image-models): Wightman's library of image models."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import cait
from torch import nn

from img2vid.backbones.activations import set_activation
from img2vid.backbones.any_size import set_cait_size
from img2vid.backbones.building import building, say_loading, set_norm_eps, will_be_loaded, without_numbers
from img2vid.backbones.hub import fetching
from img2vid.backbones.names import EXPECTED, BackboneName
from img2vid.backbones.reading import BLOCKS, block_kind
from img2vid.backbones.timm_weights import accounted, load_file
from img2vid.backbones.tower import Backbone, ImageTower, Preprocess
from img2vid.backbones.widening import set_heads
from img2vid.config import shown
from img2vid.errors import BackboneError, nearest
from img2vid.weights.accounting import LoadReport

# Models that are called ViT-like but whose tokens do not stay in fixed columns from block to block, so that "the same
# position in the next frame" means nothing to their blocks; or whose attention is not yet read.
REFUSALS = {
    "Xcit": "its attention mixes channels instead of tokens (cross-covariance attention)",
    "Hiera": "its tokens are pooled between stages",
    "HieraDet": "its tokens are pooled between stages",
    "CrossVit": "it runs two token streams of different sizes",
    "VOLO": "its outlook attention works on a feature map, not on tokens",
    "PoolingVisionTransformer": "its tokens are pooled between stages",
    "VisionTransformerSAM": "its blocks work on windows of a feature map",
    "ConVit": "its gated positional attention adds the class token half-way",
    "TNT": "it runs an inner transformer over pixels of each patch",
    "Gemma4VitEncoder": "its blocks take masks and position tables per image that know nothing of clips",
    "Gemma4VitClassifier": "its blocks take masks and position tables per image that know nothing of clips",
}


def load_timm(
    name: BackboneName,
    *,
    weights: str | Path | None = None,
    random_weights: bool = False,
    image_size: tuple[int, int] | None = None,
    arguments: dict[str, Any] | None = None,
    device: str = "cpu",
) -> Backbone:
    """Build a timm model as a feature extractor (no classifier) and load its weights.

    Args:
        name: architecture and tag.
        weights: local file, or folder of transformers, instead of timm's pretrained weights; timm's own filter for the
            architecture reads foreign layouts (DINOv2, MAE, OpenAI CLIP, ...), then every key is accounted for. A file
            whose patch grid is not square does not say so: give the size it was trained at as
            ``arguments["img_size"]``.
        random_weights: no weights at all.
        image_size: pixels (height, width); position embeddings are resampled.
        arguments: further keyword arguments of ``timm.create_model``, such as ``drop_path_rate``; ``norm_eps`` and
            ``activation``, which weights can need and the factory does not take; and ``heads``, more attention heads
            than those (``img2vid.backbones.widening``).
    """
    check_known(name)
    arguments = dict(arguments or {})
    full_name = name.architecture + (f".{name.tag}" if name.tag else "")
    described = dict(arguments)
    norm_eps, activation, heads = (arguments.pop(name, None) for name in ("norm_eps", "activation", "heads"))
    with building(str(name), described):
        arguments, model = with_any_size(full_name, {"num_classes": 0, **arguments})
    tower = describe_timm(model)  # refuse before downloading anything
    if arguments.get("in_chans", 3) != tower.in_channels or tower.in_channels < 1:
        raise BackboneError(f"in_chans={arguments['in_chans']} is not supported for {full_name}; leave it out.")
    is_ragged = any(pixels % patch for pixels, patch in zip(tower.image_size, tower.patch_size, strict=True))
    if is_ragged and "dynamic_img_size" not in described:
        # SigLIP at 384 pixels is 27.4 patches of 14: timm takes that as a fixed size only
        arguments.pop("dynamic_img_size", None)
        with building(str(name), described):
            model = skeleton(full_name, arguments)
    report = LoadReport()
    say_loading(str(name), model, weights, random_weights)
    if weights is None and not random_weights:
        with (
            building(str(name), described),
            fetching(f"the pretrained weights of {name}"),
            accounted(full_name) as report,
        ):
            model = timm.create_model(full_name, pretrained=True, **arguments)
        source = f"timm {full_name}"
        set_norm_eps(model, norm_eps)
        set_activation(model, activation)
        set_image_size(model, image_size)
    else:
        if device != "meta":
            # some tables are resized by way of their numbers, so those are needed where sizes change
            is_empty = (weights is not None or will_be_loaded()) and image_size is None
            numbers = without_numbers() if is_empty else nullcontext()
            with building(str(name), described), torch.device(device), numbers:
                model = timm.create_model(full_name, pretrained=False, **arguments)
        source = None
        set_norm_eps(model, norm_eps)
        set_activation(model, activation)
        size_of_file = describe_timm(model).image_size if weights is not None and "img_size" in described else None
        if size_of_file is None:
            set_image_size(model, image_size)  # first, so that a file of that size goes in as it is
        if weights is not None:
            report, learned = load_file(model, weights)
            described.update(learned)
            source = f"the file {Path(weights).name}"
        if size_of_file is not None:  # the factory was told at which size the file was trained
            set_image_size(model, image_size)
            new = describe_timm(model).image_size
            if new != size_of_file:
                sizes = " to ".join(f"{height} x {width}" for height, width in (size_of_file, new))
                report.resampled.append(f"positions (images of {sizes} pixels)")
    set_heads(describe_timm(model), heads)
    return Backbone(model.eval(), describe_timm(model), str(name), described, source, report)


def check_known(name: BackboneName) -> None:
    if not timm.is_model(name.architecture):
        hint = nearest(name.architecture, timm.list_models())
        raise BackboneError(f"timm {timm.__version__} has no model {shown(name.architecture)}.{hint} {EXPECTED}")
    tags = [n.partition(".")[2] for n in timm.list_models(f"{name.architecture}.*", pretrained=True)]
    if name.tag and name.tag not in tags:
        have = ", ".join(tags) or "none"
        raise BackboneError(f"timm has no weights {shown(name.tag)} for {name.architecture}. It has: {have}.")


def with_any_size(full_name: str, arguments: dict[str, Any]) -> tuple[dict[str, Any], nn.Module]:
    """Ask for images of any size in forward where the architecture can (``dynamic_img_size``).

    Returns:
        The arguments to build it with, and the model they build, without numbers.
    """
    wanted = {"dynamic_img_size": True, **arguments}
    try:
        return wanted, skeleton(full_name, wanted)
    except TypeError as error:
        if "dynamic_img_size" in arguments or "dynamic_img_size" not in str(error):
            raise
    return arguments, skeleton(full_name, arguments)


def skeleton(full_name: str, arguments: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(full_name, pretrained=False, **arguments)


def set_image_size(model: nn.Module, image_size: tuple[int, int] | None) -> None:
    """Another native image size, in place; timm resamples the position embedding with both grids explicit."""
    if image_size is None:
        return
    tower = describe_timm(model)
    if image_size == tower.image_size:
        return
    check_divisible(image_size, tower.patch_size)
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=image_size)
    elif isinstance(model, cait.Cait):
        set_cait_size(model, image_size)
    elif tower.any_size:  # nothing is built for a size; timm keeps the usual one in the configuration
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (tower.in_channels, *image_size)}
    else:
        raise BackboneError(
            f"{type(model).__name__} is built for {tower.image_size[0]} x {tower.image_size[1]} pixels and cannot be "
            "resized after loading. Leave image_size out, or choose an architecture of the size you need."
        )


def check_divisible(image_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    if any(pixels % patch for pixels, patch in zip(image_size, patch_size, strict=True)):
        nearby = tuple(
            max(patch, round(pixels / patch) * patch) for pixels, patch in zip(image_size, patch_size, strict=True)
        )
        raise BackboneError(
            f"image_size={image_size[0]} x {image_size[1]} pixels cannot be cut into patches of "
            f"{patch_size[0]} x {patch_size[1]}. Use multiples of those, such as {nearby[0]} x {nearby[1]}."
        )


def describe_timm(model: nn.Module) -> ImageTower:
    """Find the parts of a timm model.

    Raises:
        BackboneError: a model whose blocks cannot be made space-time blocks, with the reason.
    """
    # the vision encoders of Qwen3-VL and DeepSeek keep their blocks one level down
    trunk_path = "encoder." if hasattr(getattr(model, "encoder", None), "blocks") else ""
    trunk = model.encoder if trunk_path else model
    blocks = getattr(trunk, "blocks", None)
    class_name = type(model).__name__
    reason = REFUSALS.get(class_name)
    if reason is None and (not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0):
        reason = "it has no flat list of transformer blocks"
    if reason is None and any(cls not in BLOCKS for cls in {image_class(block) for block in blocks}):
        reason = f"its blocks of class {type(blocks[0]).__name__} are not known (img2vid/backbones/reading.py)"
    if reason is not None:
        raise BackboneError(f"{class_name} cannot become a video model: {reason}.")
    embed = getattr(trunk, "patch_embed", None) or trunk.embeds
    conv = getattr(embed, "proj", None)
    is_plain = is_patch_projection(conv) and not hasattr(embed, "backbone")
    kind = block_kind(blocks[0])
    config = getattr(model, "pretrained_cfg", None) or {}
    in_channels = next((part.in_channels for part in embed.modules() if isinstance(part, nn.Conv2d)), 3)
    return ImageTower(
        module=model,
        blocks=[(f"{trunk_path}blocks.{i}", block) for i, block in enumerate(blocks)],
        # CaiT appends its class token after these blocks
        num_prefix_tokens=0 if isinstance(model, cait.Cait) else trunk.num_prefix_tokens,
        image_size=native_size(embed, config),
        patch_size=effective_patch(embed),
        any_size=bool(getattr(trunk, "dynamic_img_size", False))
        or class_name.startswith(("NaFlex", "Qwen3", "Deepseek")),
        position=position_kind(trunk, embed, kind),
        patch_conv=conv if is_plain else None,
        in_channels=in_channels,
        preprocess=Preprocess(
            pixel_statistic(config.get("mean"), in_channels),
            pixel_statistic(config.get("std"), in_channels),
            config.get("interpolation") or "bicubic",
        ),
        pads=bool(getattr(embed, "dynamic_img_pad", False)),
    )


def pixel_statistic(values: Sequence[float] | None, in_channels: int) -> tuple[float, ...]:
    """A mean or deviation per channel; of images that are not RGB, the average of the published three."""
    values = tuple(values or (0.5,) * 3)
    return values if len(values) == in_channels else (sum(values) / len(values),) * in_channels


def image_class(block: nn.Module) -> type[nn.Module]:
    """The block's own class, also after it became a space-time block."""
    return next((cls for cls in type(block).__mro__ if cls in BLOCKS), type(block))


def is_patch_projection(conv: nn.Module | None) -> bool:
    return type(conv) is nn.Conv2d and conv.stride == conv.kernel_size


def native_size(embed: nn.Module, config: dict[str, Any]) -> tuple[int, int]:
    size = getattr(embed, "img_size", None) or tuple((config.get("input_size") or (3, 224, 224))[1:])
    return (size, size) if isinstance(size, int) else tuple(size)


def effective_patch(embed: nn.Module) -> tuple[int, int]:
    """Pixels per token; hybrid stems see their patches through a convolutional network that shrinks the image first."""
    ratio = embed.feat_ratio(as_scalar=False) if hasattr(embed, "feat_ratio") else embed.patch_size
    return (ratio, ratio) if isinstance(ratio, int) else tuple(ratio)


def position_kind(trunk: nn.Module, embed: nn.Module, kind: Any) -> str:
    kinds = []
    # NaFlexVit keeps its table in ``embeds``, in one piece or factorised into rows and columns
    tables = (getattr(trunk, "pos_embed", None), getattr(embed, "pos_embed", None), getattr(embed, "pos_embed_y", None))
    if any(table is not None for table in tables):
        kinds.append("learned 2-D")
    if getattr(trunk, "rope", None) is not None:
        kinds.append("rotary, per block" if getattr(trunk, "rope_mixed", False) else "rotary")
    if kind.relative:
        kinds.append("relative bias")
    return " + ".join(kinds) or "none"
