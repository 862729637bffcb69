"""Image backbones: the only place that knows the insides of timm, open_clip and transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from img2vid.backbones.names import ALIASES, EXPECTED, parse_name
from img2vid.backbones.tower import Backbone, ImageTower, structural_copy
from img2vid.config import shown
from img2vid.errors import BackboneError, WeightsError

__all__ = ["ALIASES", "Backbone", "BackboneError", "ImageTower", "describe", "load_backbone", "wrap_module"]


def load_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    random_weights: bool = False,
    image_size: tuple[int, int] | None = None,
    arguments: dict[str, Any] | None = None,
    on_meta: bool = False,
) -> Backbone:
    """Load an image model by name.

    Args:
        name: an alias (``vit_base``, ``clip_b16``, ...), ``timm:NAME[.TAG]``, ``open_clip:ARCH[/TAG]``, ``hf:NAME`` or
            ``hf:FOLDER``, ``nano_clip``.
        weights: local ``.safetensors`` or ``.pth`` file instead of the library's pretrained weights.
        random_weights: build the architecture without loading any weights.
        image_size: pixels (height, width); None keeps the architecture's own.
        arguments: further keyword arguments of the library's factory, such as ``{"drop_path_rate": 0.1}``.
        on_meta: build it without numbers, on torch's meta device, to count and to look; implies ``random_weights``.

    Raises:
        BackboneError: unknown or unsupported, or ``WeightsUnavailable`` where its weights cannot be had.
        WeightsError: a local file that cannot be read or does not fit.
    """
    if not isinstance(name, str):
        raise BackboneError(f"{shown(name)} is of type {type(name).__name__}, not a backbone's name. {EXPECTED}")
    check_weights(weights)
    if weights is not None and random_weights:
        raise BackboneError(f"Both weights={str(weights)!r} and random_weights were given; choose one.")
    parsed = parse_name(name)
    options: dict[str, Any] = {
        "weights": weights,
        "random_weights": random_weights or on_meta,
        "image_size": image_size,
        "arguments": arguments,
        "device": "meta" if on_meta else "cpu",
    }
    if parsed.library == "timm":
        from img2vid.backbones.from_timm import load_timm

        return load_timm(parsed, **options)
    if parsed.library == "stitched":
        from img2vid.backbones.stitched import load_stitched

        return load_stitched(parsed, **options)
    if parsed.library == "hf":
        from img2vid.backbones.from_transformers import load_transformers

        return load_transformers(parsed, **options)
    from img2vid.backbones.from_open_clip import load_open_clip

    if parsed.library == "nano_clip":
        from img2vid.backbones.nano_clip import WEIGHTS_PATH, register_nano_clip

        register_nano_clip()
        if weights is None and not options["random_weights"]:
            options["weights"] = WEIGHTS_PATH
    return load_open_clip(parsed, **options)


def check_weights(weights: object) -> None:
    """Refuse what cannot be a file's path, before anything is built for it."""
    if isinstance(weights, Mapping):
        raise WeightsError(
            "weights is a state dict, but a file is expected. Build the module with its library, load them there, and "
            "give the module: img2vid.convert(module)."
        )
    if weights is not None and not isinstance(weights, (str, os.PathLike)):
        raise WeightsError(f"weights={shown(weights)} is of type {type(weights).__name__}; expected a file's path.")
    if weights is not None and (not str(weights).strip() or "\0" in str(weights)):
        raise WeightsError(
            f"weights={str(weights)!r} is no path. Give a .safetensors or .pth file, or leave it out. Was it an unset "
            "shell variable?"
        )


def describe(tower: nn.Module) -> ImageTower:
    """Find the parts of an image tower: a timm model, the ``visual`` of an open_clip model, one of transformers."""
    if comes_from(tower, "timm."):
        from img2vid.backbones.from_timm import describe_timm

        return describe_timm(tower)
    if comes_from(tower, "transformers."):
        from img2vid.backbones.hf_towers import describe_transformers

        return describe_transformers(tower)
    from img2vid.backbones.from_open_clip import describe_open_clip

    return describe_open_clip(tower)


def wrap_module(model: nn.Module, image_size: tuple[int, int] | None = None) -> Backbone:
    """A backbone from an already built model of timm, open_clip or transformers, with the weights and head it has.

    Args:
        image_size: pixels (height, width) to resize it to, in place.

    Raises:
        BackboneError: neither, or an architecture that is not supported.
    """
    if isinstance(model, type):
        raise BackboneError(
            f"The class {model.__name__} was given. Build it first, and give the model: {model.__name__}(...)."
        )
    if not isinstance(model, nn.Module):
        hint = " Give a folder's or file's path as text, with its library." if isinstance(model, os.PathLike) else ""
        raise BackboneError(f"{shown(model)} is of type {type(model).__name__}, not a model.{hint} {EXPECTED}")
    towers = (model, getattr(model, "visual", None), getattr(model, "vision_model", None))
    if any(hasattr(tower, "gates_closed") for tower in towers):
        raise BackboneError(f"This {type(model).__name__} already is a video model; convert a fresh image model.")
    if comes_from(model, "transformers."):
        from img2vid.backbones.from_transformers import wrap_transformers

        return wrap_transformers(model, image_size)
    tower = getattr(model, "visual", model)
    if not comes_from(tower, "timm.", "open_clip."):
        raise BackboneError(
            f"A {type(model).__module__}.{type(model).__name__} was given. Expected a model of timm, open_clip or "
            "transformers, or a backbone's name (python -m img2vid.convert --list)."
            + (" Give what it wraps: model.module." if isinstance(getattr(model, "module", None), nn.Module) else "")
        )
    if image_size is not None:
        from img2vid.backbones import from_open_clip, from_timm

        if comes_from(tower, "timm."):
            from_timm.set_image_size(tower, image_size)
        else:
            from_open_clip.set_image_size(tower, describe(tower), image_size)
    return Backbone(model, describe(tower), pretrained="the given module")


def as_reference(model: nn.Module) -> nn.Module:
    """An image model as certificates ask it: one of transformers with text as a copy that shares its weights."""
    if not comes_from(model, "transformers."):
        return model
    from img2vid.backbones.hf_two_towers import front_of, speak_openly

    return model if front_of(model) is None else speak_openly(structural_copy(model))


def comes_from(module: nn.Module, *libraries: str) -> bool:
    """Whether the module's class, or a class it inherits from, is defined in one of the libraries."""
    return any(cls.__module__.startswith(libraries) for cls in type(module).__mro__)
