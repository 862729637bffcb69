"""Weights out of a TorchScript archive, such as OpenAI published CLIP in, without running or compiling its code.

``torch.jit.load`` would compile what is in the archive. Its weights, however, are stored as ``torch.save`` stores them:
a pickle of nested modules, and the bytes of tensors beside it. Both are copied without the code and read with
``weights_only=True``; modules, whatever their classes, become bags of what was in them.
"""

from __future__ import annotations

import io
import pickletools
import shutil
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# what names of classes that TorchScript has compiled begin with, and of functions that give lists and dicts their types
CODE = ("__torch__.", "torch.jit._pickle.")
# what zipfile and pickletools raise where bytes of an archive are not what they should be
DAMAGED = (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, OverflowError, struct.error, zlib.error)


class Bag:
    """Stands in for a compiled module, and holds the attributes that were stored."""

    def __init__(self, *args: object) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def is_torchscript(path: Path) -> bool:
    """Whether it is an archive of TorchScript, weights included."""
    return {"constants.pkl", "data.pkl"} <= {name.partition("/")[2] for name in names_in_zip(path) or ()}


def names_in_zip(path: Path) -> list[str] | None:
    """What is in a zip archive; None where it is none, or so damaged that it does not say."""
    try:
        if not path.is_file() or not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except DAMAGED:
        return None


def read_torchscript(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Tensors by name, on the CPU; and the activation that its code computes, where it is one of CLIP's.

    Raises:
        pickle.UnpicklingError: it holds more than modules and tensors.
    """
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryFile() as copy:
        top = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as plain:
            for name in archive.namelist():
                if name.startswith((f"{top}data.pkl", f"{top}data/", f"{top}byteorder")):
                    with archive.open(name) as source, plain.open(name, "w", force_zip64=True) as target:
                        shutil.copyfileobj(source, target)
            plain.writestr(f"{top}version", "3\n")  # of the format, which TorchScript keeps elsewhere
        bags = [(Bag, name) for name in compiled_classes(archive.read(f"{top}data.pkl"))]
        code = [archive.read(name) for name in archive.namelist() if name.endswith(".py")]
        copy.seek(0)
        with torch.serialization.safe_globals(bags):
            root = torch.load(copy, map_location="cpu", weights_only=True)
    return dict(tensors(root)), activation(code)


def compiled_classes(pickled: bytes) -> list[str]:
    """Names of the compiled classes that a pickle mentions, read without executing it."""
    found = {arg.replace(" ", ".") for op, arg, _ in pickletools.genops(io.BytesIO(pickled)) if op.name == "GLOBAL"}
    return sorted(name for name in found if name.startswith(CODE))


def tensors(bag: object, prefix: str = "") -> list[tuple[str, Tensor]]:
    if not isinstance(bag, Bag):
        return []
    found = []
    for name, value in bag.attributes.items():
        if isinstance(value, Tensor):
            found.append((prefix + name, value))
        found += tensors(value, f"{prefix}{name}.")
    return found


def activation(code: list[bytes]) -> str | None:
    """quick-GELU is ``x * sigmoid(1.702 * x)``, and nothing else in a CLIP is a sigmoid; GELU is called by its name."""
    called = {name for name in (b"gelu", b"sigmoid") if any(b"torch." + name + b"(" in text for text in code)}
    return {frozenset([b"gelu"]): "gelu", frozenset([b"sigmoid"]): "quick_gelu"}.get(frozenset(called))
