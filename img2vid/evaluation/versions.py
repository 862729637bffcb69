"""Versions of what numbers depend on."""

from __future__ import annotations

import importlib.metadata
import platform

from img2vid._version import __version__

FEATURES = ("torch", "torchvision", "timm", "open_clip_torch", "av")


def versions() -> dict[str, str]:
    """Of everything that takes part in a result."""
    return {"python": platform.python_version(), **installed((*FEATURES, "numpy", "scikit-learn"))}


def installed(packages: tuple[str, ...] = FEATURES) -> dict[str, str]:
    """Of this package and the given ones; by default those that features depend on."""
    found = {"img2vid": __version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # not part of this run, then
            continue
    return found
