"""Image models of transformers, and where they keep their parts: one row per class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from img2vid.backbones import hf_two_towers
from img2vid.backbones.from_timm import check_divisible
from img2vid.backbones.reading import child
from img2vid.backbones.tower import ImageTower, Preprocess
from img2vid.errors import BackboneError

OPENAI = Preprocess((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pooled(output: Any) -> Tensor:
    return output.pooler_output


def projected(output: Any) -> Tensor:
    return output.image_embeds


@dataclass(frozen=True)
class TowerKind:
    """Where an image model of transformers keeps its parts; attribute paths."""

    blocks: str
    pixels: Preprocess  # what the published weights were trained on, where no file says
    embeddings: str = "embeddings"
    conv: str = "patch_embedding"
    num_class_tokens: int = 1
    always_resamples: bool = False  # positions fit any image unasked
    feature: Callable[[Any], Tensor] = pooled


def class_token(output: Any) -> Tensor:
    return output.last_hidden_state[:, 0]


def pooled_or_class_token(output: Any) -> Tensor:
    return class_token(output) if output.pooler_output is None else output.pooler_output


def logits(output: Any) -> Tensor:
    return output.logits


CLIP = TowerKind("encoder.layers", OPENAI)
HF_CONV = "patch_embeddings.projection"
TOWERS: dict[str, TowerKind] = {
    "CLIPVisionModel": CLIP,
    "CLIPVisionModelWithProjection": TowerKind(
        "vision_model.encoder.layers", OPENAI, "vision_model.embeddings", feature=projected
    ),
    "SiglipVisionModel": TowerKind("encoder.layers", Preprocess(), num_class_tokens=0),
    # its pooler_output is normalised twice, and none of BLIP's own models use that
    "BlipVisionModel": TowerKind("encoder.layers", OPENAI, feature=class_token),
    "ViTModel": TowerKind("layers", Preprocess(), conv=HF_CONV, feature=pooled_or_class_token),
    "ViTForImageClassification": TowerKind("vit.layers", Preprocess(), "vit.embeddings", HF_CONV, feature=logits),
    "Dinov2Model": TowerKind("encoder.layer", IMAGENET, conv=HF_CONV, always_resamples=True),
    "Dinov2ForImageClassification": TowerKind(
        "dinov2.encoder.layer", IMAGENET, "dinov2.embeddings", HF_CONV, always_resamples=True, feature=logits
    ),
    "Dinov2WithRegistersModel": TowerKind("encoder.layer", IMAGENET, conv=HF_CONV, always_resamples=True),
    "Dinov2WithRegistersForImageClassification": TowerKind(
        "dinov2_with_registers.encoder.layer",
        IMAGENET,
        "dinov2_with_registers.embeddings",
        HF_CONV,
        always_resamples=True,
        feature=logits,
    ),
}


def kind_of(module: nn.Module) -> TowerKind:
    for cls in type(module).__mro__:
        if cls.__module__.startswith("transformers.") and cls.__name__ in TOWERS:
            return TOWERS[cls.__name__]
    supported = ", ".join([*TOWERS, *hf_two_towers.FRONTS])
    raise BackboneError(
        f"{type(module).__name__} of transformers cannot become a video model here. Supported are {supported}."
    )


def describe_transformers(module: nn.Module) -> ImageTower:
    """Find the parts of an image model of transformers.

    Raises:
        BackboneError: a class that is not supported, or of a version of transformers that keeps its parts elsewhere.
    """
    kind, name = kind_of(module), type(module).__name__
    blocks, embeddings = child(module, kind.blocks), child(module, kind.embeddings)
    conv = child(embeddings, kind.conv)
    if not blocks or not isinstance(conv, nn.Conv2d):
        import transformers

        version = transformers.__version__
        raise BackboneError(f"{name} of transformers {version} keeps its blocks elsewhere; 5.23 is known to work.")
    if getattr(module, "use_head", True) is False:
        raise BackboneError(f"This {name} was built without its pooling head, so an image becomes no feature.")
    config = module.config
    native, patch = pair(config.image_size), pair(config.patch_size)
    is_square = native[0] // patch[0] == native[1] // patch[1]
    num_registers = getattr(config, "num_register_tokens", 0) if "Registers" in name else 0
    return ImageTower(
        module=module,
        blocks=[(f"{kind.blocks}.{i}", block) for i, block in enumerate(blocks)],
        num_prefix_tokens=kind.num_class_tokens + num_registers,
        image_size=getattr(module, "video_image_size", native),
        patch_size=patch,
        any_size=is_square,  # transformers takes every table of positions for a square one
        position="learned 2-D",
        patch_conv=conv,
        in_channels=conv.in_channels,
        preprocess=getattr(module, "preprocess", kind.pixels),
        call=partial(call_for_feature, kind=kind, native=native),
    )


def outputs(module: nn.Module, images: Tensor, kind: TowerKind, native: tuple[int, int]) -> Any:
    """What transformers' own forward makes of images (B, C, H, W), positions resampled where their size asks for it."""
    resample = {} if kind.always_resamples or tuple(images.shape[-2:]) == native else {"interpolate_pos_encoding": True}
    return module(pixel_values=images, return_dict=True, **resample)


def call_for_feature(module: nn.Module, images: Tensor, kind: TowerKind, native: tuple[int, int]) -> Tensor:
    return kind.feature(outputs(module, images, kind, native))


def pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def set_image_size(module: nn.Module, image_size: tuple[int, int] | None) -> None:
    """What size clips have by default; positions are resampled in forward, so no weight changes."""
    if image_size is None:
        return
    tower = describe_transformers(module)
    if image_size == tower.image_size:
        return
    check_divisible(image_size, tower.patch_size)
    if not tower.any_size:
        raise BackboneError(
            f"{type(module).__name__} of {tower.image_size[0]} x {tower.image_size[1]} pixels cannot be resized: "
            "transformers resamples square tables of positions only."
        )
    module.video_image_size = image_size
