"""A folder as transformers saves it: weights in one file or several, ``config.json``, and how pixels are prepared."""

from __future__ import annotations

import json
from math import inf, isfinite
from pathlib import Path
from typing import Any

from torch import Tensor

from img2vid.backbones.tower import Preprocess
from img2vid.config import shown
from img2vid.errors import WeightsError
from img2vid.weights.accounting import read_state_dict
from img2vid.weights.index import SUFFIX

CONFIG, PIXELS = "config.json", "preprocessor_config.json"
FILES = ("model.safetensors", "pytorch_model.bin")  # transformers' own names, the better one first
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def read_config(folder: Path) -> dict[str, Any]:
    """
    Raises:
        WeightsError: there is none, or it is of a model of ours.
    """
    config = read_json(folder / CONFIG)
    if config is None:
        raise WeightsError(f"{folder} is a folder without {CONFIG}, which transformers writes. Give the weights file.")
    if "kind" in config and "video" in config:
        raise WeightsError(f"{folder} already is a model of img2vid: img2vid.load({str(folder)!r}).")
    return config


def read_pixels(folder: Path) -> Preprocess | None:
    """How pixels were prepared, None where nothing says."""
    described = read_json(folder / PIXELS)
    return None if described is None else pixel_statistics(described, folder / PIXELS)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder, in one file or several that an index names."""
    for name in FILES:
        if (folder / name).is_file():
            return read_state_dict(folder / name)
        if (folder / f"{name}{SUFFIX}").is_file():
            return read_state_dict(folder / f"{name}{SUFFIX}")
    raise WeightsError(f"{folder} holds no weights: expected {' or '.join(FILES)}, or the index of several files.")


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, expected fields by name.")
    return content


def pixel_statistics(described: dict[str, Any], path: Path) -> Preprocess | None:
    """What an image processor of transformers does to bytes, as mean and deviation of pixels in 0..1.

    It computes ``((byte * rescale_factor - offset) - mean) / std``, each step if it is asked for.

    Raises:
        WeightsError: no numbers of pixels come of it.
    """
    try:
        factor = described.get("rescale_factor", 1 / 255) if described.get("do_rescale", True) else 1.0
        offset = 1.0 if described.get("offset") else 0.0
        normalises = described.get("do_normalize", True)
        mean, std = ([0.5] * 3 if described.get(key) is None else described[key] for key in ("image_mean", "image_std"))
        mean, std = (mean, std) if normalises else ([0.0] * 3, [1.0] * 3)
        scale = 255.0 * factor
        pixels = Preprocess(
            tuple((offset + m) / scale for m in mean),
            tuple(s / scale for s in std),
            RESAMPLING.get(described.get("resample"), "bilinear"),
        )
    except (TypeError, ZeroDivisionError, OverflowError) as error:
        raise WeightsError(f"{path} describes no normalisation of pixels: {error}") from error
    channels = zip(pixels.mean, pixels.std, strict=False)
    if (
        not pixels.mean
        or len(pixels.mean) != len(pixels.std)
        or not all(isfinite(m) and 0 < s < inf for m, s in channels)
    ):
        raise WeightsError(
            f"{path} describes no normalisation of pixels: it comes to a mean of {shown(pixels.mean)} and a deviation "
            f"of {shown(pixels.std)}, expected one number a channel, no deviation of 0."
        )
    return pixels
