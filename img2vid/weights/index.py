"""Checkpoints in several files: an index says which tensor is in which of them; they are read as one.

    model.safetensors.index.json    {"metadata": ..., "weight_map": {"norm.weight": "model-00002-of-00002.safetensors"}}
    pytorch_model.bin.index.json    the same over pickled files

The layout is Hugging Face's (huggingface_hub, transformers). Every tensor the index names must be where it says, and
nothing else may be there: a file of another save beside the right ones would fit by its name alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from img2vid.errors import WeightsError
from img2vid.weights.bytecount import counting

SUFFIX = ".index.json"


def files_of_index(path: Path) -> dict[str, list[str]] | None:
    """File name: the tensors in it, for an index; None for any other file.

    Raises:
        WeightsError: an index that names no files, or files outside its own folder.
    """
    if not path.name.endswith(".json") and b'"weight_map"' not in head_of(path):
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):  # no JSON: whatever it is will be told by its content
        return None
    if not isinstance(index, dict) or "weight_map" not in index:
        return None
    weight_map = index["weight_map"]
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightsError(f"{path} is an index whose weight_map does not give a file name for each tensor.")
    if not weight_map:
        raise WeightsError(f"{path} is the index of a checkpoint in several files, but its weight_map is empty.")
    files: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise WeightsError(f"{path}: {tensor} is said to be in {name!r}; expected a file beside the index.")
        files.setdefault(name, []).append(tensor)
    return files


def head_of(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(1024)
    return head if head.lstrip()[:1] == b"{" else b""


def bytes_of(path: Path) -> int:
    """Size of a weights file; of an index, that of all files it names which are there."""
    files = files_of_index(path)
    parts = [path] if files is None else [path.with_name(name) for name in files]
    return sum(part.stat().st_size for part in parts if part.is_file())


def read_index(path: Path, files: dict[str, list[str]], read: Callable[[Path], object]) -> dict[str, Tensor]:
    """The tensors of all files of an index, by ``read`` of each.

    Raises:
        WeightsError: files that are missing, and tensors that are not where the index says.
    """
    missing = [name for name in files if not path.with_name(name).is_file()]
    if missing:
        raise WeightsError(
            f"{path} names {len(files)} files, of which {len(missing)} are not beside it: {', '.join(missing[:8])}"
            f"{' ...' if len(missing) > 8 else ''}. Download or copy them to {path.parent}."
        )
    state: dict[str, Tensor] = {}
    with counting(bytes_of(path)):
        for name, tensors in files.items():
            if files_of_index(path.with_name(name)) is not None:  # at worst this one, and so on for ever
                raise WeightsError(f"{path} names {name}, which is no weights file but an index itself.")
            content = read(path.with_name(name))
            found = content.keys() if isinstance(content, dict) else set()
            problems = {"lacks": sorted(set(tensors) - found), "also holds": sorted(map(str, found - set(tensors)))}
            for what, keys in problems.items():
                if keys:
                    listed = ", ".join(keys[:8]) + (" ..." if len(keys) > 8 else "")
                    raise WeightsError(
                        f"{path.with_name(name)} {what} {len(keys)} tensors by the word of {path.name}: {listed}. Is "
                        "it a file of another save? Nothing was loaded."
                    )
            state.update(content)
    return state
