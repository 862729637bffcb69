"""What ``config.json`` must look like; a damaged one is refused field by field, not by whatever it breaks later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from img2vid._version import __version__
from img2vid.backbones.from_transformers import VIDEO_TYPES
from img2vid.config import ConfigError, VideoConfig
from img2vid.errors import WeightsError

KINDS = ("VideoModel", "VideoTextModel")


def check_description(described: Any, path: Path, newest: int) -> None:
    """Raise a ``WeightsError`` that names the file, the field, its value and what was expected.

    Args:
        newest: the highest format that can be read.
    """
    if not isinstance(described, dict):
        raise WeightsError(f"{path} holds a {type(described).__name__}, expected fields by name.")
    missing = [field for field in ("kind", "video", "dtype", "preprocess") if field not in described]
    if missing and "model_type" in described:
        kind, place = described["model_type"], path.parent
        do = f"img2vid import {place}" if kind in VIDEO_TYPES else f"img2vid convert --backbone hf:{place}"
        raise WeightsError(f"{place} is a model of transformers ({kind}), not of img2vid. To make it one: {do}")
    if missing:
        raise WeightsError(f"{path} lacks {', '.join(missing)}; it was not written by img2vid.")
    if is_whole(described.get("format", newest)) and described.get("format", newest) > newest:
        raise WeightsError(
            f"{path} is in format {described['format']}, but img2vid {__version__} reads up to {newest}. "
            "Run pip install -U img2vid."
        )
    for field, (is_right, expected) in FIELDS.items():
        value: Any = described
        for part in field.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not (is_right(value) or (value is None and field == "format")):
            raise WeightsError(f"{path}: {field} is {value!r}, expected {expected}.")
    try:
        VideoConfig.from_dict(described["video"])
    except (ConfigError, TypeError) as error:
        versions = described.get("versions")
        written_by = versions.get("img2vid") if isinstance(versions, dict) else None
        raise WeightsError(
            f"{path}: video: {error} (Written by img2vid {written_by or 'of unknown version'}, read by {__version__}.)"
        ) from error


def activation_modules(model: nn.Module) -> list[nn.Module]:
    """Activations without weights, of torch and of the libraries."""
    homes = ("torch.nn.modules.activation", "timm.layers.activations", "transformers.activations")
    return [
        m
        for m in model.modules()
        if (type(m).__module__.startswith(homes) or type(m).__name__ == "QuickGELU") and not [*m.parameters()]
    ]


def structure(model: nn.Module) -> dict[str, list]:
    """What decides a model's function and cannot be seen in the names and shapes of its weights."""
    modules = list(model.modules())
    activations = [type(m).__name__ for m in activation_modules(model)]
    return {
        "num_heads": sorted(
            {
                heads
                for m in modules
                for heads in (getattr(m, "num_heads", None), getattr(m, "num_attention_heads", None))  # the latter: hf
                if isinstance(heads, int)
            }
        ),
        "norm_eps": sorted({m.eps for m in modules if isinstance(getattr(m, "eps", None), float)}),
        "activations": sorted(set(activations)),
        # by its class alone, GELU and its approximation through tanh are one
        "approximations": sorted({m.approximate for m in modules if isinstance(m, nn.GELU)}),
        "pooling": sorted(
            {
                pool
                for m in modules
                for pool in (getattr(m, "global_pool", None), getattr(m, "pool_type", None))  # timm's, open_clip's
                if isinstance(pool, str)
            }
        ),
    }


def check_structure(described: dict[str, Any], model: nn.Module, folder: Path) -> None:
    """Refuse a freshly built model that would take the saved weights and be another function.

    Raises:
        WeightsError: it has other heads, activations or norms than the saved one.
    """
    own, saved = structure(model), described.get("structure") or {}
    for name, value in own.items():
        if saved.get(name, value) != value:
            raise WeightsError(
                f"{folder} was saved with {name} {saved[name]}, but the image model that was built for it here has "
                f"{value}: the weights would fit and compute something else. Build it with the arguments it had then, "
                f"img2vid.load({str(folder)!r}, image_model=module)."
            )


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_floating_dtype(value: Any) -> bool:
    dtype = getattr(torch, value, None) if isinstance(value, str) else None
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_rgb(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(n, (int, float)) for n in value)


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda value: is_whole(value) and value >= 1, "a whole number"),
    "kind": (lambda value: value in KINDS, f"one of {', '.join(KINDS)}"),
    "dtype": (is_floating_dtype, "a floating point type of torch, such as float32"),
    "structure": (lambda value: value is None or isinstance(value, dict), "heads, norms and activations by name"),
    "class_names": (lambda value: value is None or is_names(value), "a list of texts, or null"),
    "image_weights": (lambda value: value is None or isinstance(value, str), "a text, or null"),
    "video": (lambda value: isinstance(value, dict), "the settings of a VideoConfig by name"),
    "video.backbone": (lambda value: value is None or isinstance(value, str), "a backbone's name, or null"),
    "video.backbone_args": (lambda value: value is None or isinstance(value, dict), "arguments by name"),
    "preprocess": (lambda value: isinstance(value, dict), "mean, std and interpolation by name"),
    "preprocess.mean": (is_rgb, "a list of numbers, one a channel"),
    "preprocess.std": (is_rgb, "a list of numbers, one a channel"),
    "preprocess.interpolation": (lambda value: isinstance(value, str), "a text, such as bicubic"),
}
