"""State dicts out of files, whatever wraps them; a file that is something else is called by its name.

Pickles are only ever read with ``weights_only=True``: a file made to run code is refused and does not run it.
"""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from img2vid.errors import WeightsError
from img2vid.weights.bytecount import CountedFile, counting
from img2vid.weights.index import SUFFIX, files_of_index, read_index
from img2vid.weights.mistaken import refused_pickle, something_else
from img2vid.weights.torchscript import DAMAGED, is_torchscript, read_torchscript

# names that training scripts put a state dict under; of several in one file the first of these is taken, and said
WRAPPERS = (
    "state_dict",
    "model_state",
    "model_state_dict",
    "model",
    "module",
    "net",
    "model_ema",
    "state_dict_ema",
    "ema",
)
MAPPED = 2**28  # bytes of a file that are mapped into memory at a time
PAGE = 4096  # bytes
# what the unpickler runs into in a file that is no pickle, or damaged
STUMBLED = (*DAMAGED, RuntimeError, LookupError, TypeError, AttributeError, AssertionError)
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, Lightning


# what the training scripts of published checkpoints save beside weights: their settings, paths and curves
LEFT_OUT = (
    "parse_config.ConfigParser",  # Frozen in Time
    "parse_config_dist_multi.ConfigParser",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "mmengine.logging.history_buffer.HistoryBuffer",  # MMAction2
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
)


class LeftOut:
    """Stands in for one of those, whose own code is never imported or run; it takes whatever it is given, and holds
    nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> LeftOut:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


@dataclass
class WeightsFile:
    """Tensors of one file by name, and what else was in it.

    Args:
        wrapper: the key they were under, None for a bare state dict.
        others: further state dicts beside the one that was taken.
        left_out: tensors beside it, and entries in it that are no tensors.
        activation: of the model's MLPs, by timm's name, where the file says.
    """

    path: Path
    state: dict[str, Tensor]
    wrapper: str | None = None
    others: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    activation: str | None = None

    @property
    def notes(self) -> list[str]:
        """What a user should hear about the file."""
        notes = []
        if self.others:
            notes.append(
                f"{self.path} holds several state dicts: {self.wrapper!r} was taken, {', '.join(self.others)} left. "
                f"For another: save_file(img2vid.weights.files.read_state_dict(path, wrapper={self.others[0]!r}), "
                "'other.safetensors'), with safetensors.torch.save_file."
            )
        if self.left_out:
            notes.append(f"Left out of {self.path}, not being weights by name: {', '.join(self.left_out)}.")
        return notes


def read_state_dict(path: str | os.PathLike[str], wrapper: str | None = None) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` or pickled (``.pt``, ``.pth``, ``.bin``, ``.ckpt``) weights file, on the CPU.

    The index of a checkpoint in several files (``model.safetensors.index.json``) stands for all of them.

    Args:
        wrapper: the key of the state dict in a file that holds several, such as ``model_ema``. By default known
            wrappers (``{"state_dict": ...}``) and prefixes that all keys share (``module.``) are taken off.

    Raises:
        WeightsError: no such file, truncated, not a weights file, or a pickle that holds more than tensors.
    """
    return read_weights(path, wrapper).state


def read_weights(path: str | os.PathLike[str], wrapper: str | None = None) -> WeightsFile:
    """``read_state_dict`` together with what else the file held."""
    path = Path(path)
    try:
        if is_torchscript(path):
            return read_compiled(path)
        return unwrap(read_content(path), path, wrapper)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or short(error)}.") from error


def read_content(path: Path) -> object:
    if path.is_dir():
        indexes = ", ".join(sorted(str(entry) for entry in path.glob(f"*{SUFFIX}")))
        raise WeightsError(
            f"{path} is a folder; give a weights file"
            + (f", such as the index in it: {indexes}." if indexes else ".")
            + " A folder saved by img2vid loads with img2vid.load."
        )
    if not path.is_file():
        raise WeightsError(f"There is no weights file {path}.")
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        raise WeightsError(f"{path} is empty (0 bytes); download or copy it again.")
    files = files_of_index(path)
    if files is not None:
        return read_index(path, files, read_content)
    # content decides, not the suffix: files get renamed. 8 bytes of header length, then the header, which is JSON
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return read_safetensors(path)
    mistaken = something_else(path, head)
    if mistaken is not None:
        raise WeightsError(f"{path} holds no weights that can be read here: it is {mistaken}.")
    return read_safetensors(path) if path.suffix == ".safetensors" and head[:2] != b"PK" else read_pickle(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    state: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            waiting = deque(file.keys())
        with counting(path.stat().st_size) as add:
            while waiting:
                mapped = 0
                with safe_open(path, framework="pt") as file:  # again, so that what has been copied is not kept mapped
                    while waiting and mapped < MAPPED:
                        key = waiting.popleft()
                        state[key] = tensor = file.get_tensor(key).clone()
                        mapped += tensor.nbytes
                        add(tensor.nbytes)
        return state
    except (SafetensorError, ValueError, OSError) as error:
        raise WeightsError(f"{path} is damaged, truncated, or no safetensors file: {short(error)}") from error


def read_pickle(path: Path) -> object:
    try:
        # training scripts save their options along; a Namespace is nothing but attributes
        known: list[Any] = [argparse.Namespace, collections.defaultdict, dict, *((LeftOut, name) for name in LEFT_OUT)]
        with (
            torch.serialization.safe_globals(known),
            counting(path.stat().st_size) as add,
            CountedFile(path, add) as file,
        ):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        why = refused_pickle(path, str(error), None if needed is None else needed[1])
        raise WeightsError(f"{path} was not loaded: {why}") from error
    except STUMBLED as error:
        raise WeightsError(f"{path} is damaged, truncated, or no PyTorch file: {short(error)}") from error


def read_compiled(path: Path) -> WeightsFile:
    try:
        state, activation = read_torchscript(path)
    except (pickle.UnpicklingError, *STUMBLED) as error:
        raise WeightsError(
            f"{path} is a TorchScript archive whose weights cannot be read without its code, which is not run: "
            f"{short(error)}"
        ) from error
    if not state:
        raise WeightsError(f"{path} is a TorchScript archive that holds no weights.")
    return WeightsFile(path, state, activation=activation)


def unwrap(content: Any, path: Path, wrapper: str | None = None) -> WeightsFile:
    """The state dict inside a checkpoint: through at most two wrappers, without a prefix that all its keys share."""
    found = WeightsFile(path, {})
    for level in range(2):
        inside = state_dicts_in(content)
        chosen = wrapper if level == 0 and wrapper is not None else next((w for w in WRAPPERS if w in inside), None)
        if chosen is None:
            break
        if chosen not in inside:
            raise WeightsError(f"{path} holds no state dict {chosen!r}. It has: {', '.join(inside) or 'none'}.")
        found.wrapper = chosen if found.wrapper is None else f"{found.wrapper}.{chosen}"
        found.others += [name for name in inside if name != chosen] if wrapper is None else []
        found.left_out += [str(name) for name, value in content.items() if isinstance(value, Tensor)]
        content = content[chosen]
    nested = state_dicts_in(content)
    if nested:
        raise WeightsError(
            f"{path} holds state dicts under names that do not say which is meant: {', '.join(nested)}. Take one in "
            f"Python, img2vid.weights.files.read_state_dict(path, wrapper={nested[0]!r}), and save it as a file of its "
            "own."
        )
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        kind = f"keys {sorted(map(str, content))[:8]}" if isinstance(content, Mapping) else type(content).__name__
        raise WeightsError(
            f"{path} holds no state dict ({kind}). Expected tensors by name, bare or under {', '.join(WRAPPERS)}."
        )
    nameless = [key for key in content if not isinstance(key, str)]
    if nameless:
        raise WeightsError(
            f"{path} holds no state dict: its keys are not names of parameters but {nameless[0]!r} "
            f"({type(nameless[0]).__name__}) and the like. Save model.state_dict()."
        )
    found.left_out += [key for key, value in content.items() if not isinstance(value, Tensor)]
    found.state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in found.state)), None):
        found.state = {key.removeprefix(prefix): value for key, value in found.state.items()}
    return found


def state_dicts_in(content: object) -> list[str]:
    """Keys of the mappings that hold tensors, directly or under a known wrapper."""
    if not isinstance(content, Mapping):
        return []
    return [key for key, value in content.items() if isinstance(key, str) and holds_tensors(value)]


def holds_tensors(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    return any(isinstance(v, Tensor) for v in value.values()) or any(holds_tensors(value.get(w)) for w in WRAPPERS)


def short(error: BaseException, most: int = 200) -> str:
    """The first line of an error that a library raised, without colours."""
    text = re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]", "", str(error)).strip()
    line = text.splitlines()[0] if text else "no details"
    return f"{type(error).__name__}: {line if len(line) <= most else line[:most] + ' ...'}"
