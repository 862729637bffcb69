"""img2vid: pretrained image transformers become video transformers, the same function at step 0, and then learn time.

Importing this package is cheap: torch, timm and everything else is imported when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from img2vid._version import __version__

if TYPE_CHECKING:
    from img2vid.backbones import load_backbone
    from img2vid.certificate import Certificate, certify
    from img2vid.checkpoints.exporting import export_checkpoint
    from img2vid.checkpoints.importing import import_checkpoint
    from img2vid.checkpoints.native import load
    from img2vid.config import VideoConfig
    from img2vid.convert import convert
    from img2vid.data import probe, read_clip
    from img2vid.errors import Img2VidError
    from img2vid.grafts import graft
    from img2vid.inspection import inspect
    from img2vid.model import VideoModel
    from img2vid.two_towers import VideoTextModel

PUBLIC = {
    "Certificate": "img2vid.certificate",
    "Img2VidError": "img2vid.errors",
    "VideoConfig": "img2vid.config",
    "VideoModel": "img2vid.model",
    "VideoTextModel": "img2vid.two_towers",
    "certify": "img2vid.certificate",
    "convert": "img2vid.convert",
    "export_checkpoint": "img2vid.checkpoints.exporting",
    "graft": "img2vid.grafts",
    "import_checkpoint": "img2vid.checkpoints.importing",
    "inspect": "img2vid.inspection",
    "load": "img2vid.checkpoints.native",
    "load_backbone": "img2vid.backbones",
    "probe": "img2vid.data",
    "read_clip": "img2vid.data",
}

__all__ = [
    "Certificate",
    "Img2VidError",
    "VideoConfig",
    "VideoModel",
    "VideoTextModel",
    "__version__",
    "certify",
    "convert",
    "export_checkpoint",
    "graft",
    "import_checkpoint",
    "inspect",
    "load",
    "load_backbone",
    "probe",
    "read_clip",
]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'img2vid' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(PUBLIC[name]), name)
    globals()[name] = value  # after the import, which binds the submodule `convert` to the same name
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
