"""Weight files in, every key accounted for.

Loading with ``strict=False`` and ignoring what it returns is how a model ends up partly random without anyone noticing.
Here each key ends in one of five columns (loaded, new, dropped on purpose, missing, unexpected), a difference is only
accepted where a pattern names it, and the error prints sorted lists.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from img2vid.errors import WeightsError

WRAPPERS = ("state_dict", "model_state", "model", "module", "model_ema")
PREFIXES = ("module.", "model.")


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` or pickled (``.pt``, ``.pth``, ``.bin``, ``.ckpt``) weights file, on the CPU.

    Pickles are only ever read with ``weights_only=True``: a file made to run code is refused and does not run it.
    Common wrappers of pickled files (``{"state_dict": ...}``, keys starting with ``module.``) are taken off.

    Raises:
        WeightsError: no such file, truncated, not a weights file, or a pickle that holds more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsError(
            f"{path} is a folder; give a weights file. A folder saved by img2vid loads with img2vid.load."
        )
    if not path.is_file():
        raise WeightsError(f"There is no weights file {path}.")
    if path.stat().st_size == 0:
        raise WeightsError(f"{path} is empty (0 bytes); download or copy it again.")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is not a plain weights file and was not loaded: pickles can run code, so only tensors in plain "
            f"containers are accepted. If you trust its author, load it with their own code and save "
            f"torch.save(model.state_dict(), ...) or safetensors. ({first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        # whatever the unpickler stumbles over in a file that is no pickle
        raise WeightsError(f"{path} is damaged, truncated, or no PyTorch file: {first_line(error)}") from error
    return unwrap(content, path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged, truncated, or no safetensors file: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no details'}"


def unwrap(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint: through at most two known wrappers, without a prefix all its keys share."""
    for _ in range(2):
        inner = next((content[k] for k in WRAPPERS if isinstance(content, Mapping) and k in content), None)
        content = inner if isinstance(inner, Mapping) else content
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        kind = f"keys {sorted(map(str, content))[:8]}" if isinstance(content, Mapping) else type(content).__name__
        raise WeightsError(
            f"{path} holds no state dict ({kind}). Expected tensors by name, bare or under {', '.join(WRAPPERS)}."
        )
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    for prefix in PREFIXES:
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


@dataclass
class LoadReport:
    """Where every key of a model and of a file went."""

    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)  # in the model only, and allowed to be
    dropped: list[str] = field(default_factory=list)  # in the file only, and allowed to be
    missing: list[str] = field(default_factory=list)  # in the model only, unforeseen
    unexpected: list[str] = field(default_factory=list)  # in the file only, unforeseen
    misshapen: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        counts = f"{len(self.loaded)} loaded, {len(self.new)} new, {len(self.dropped)} dropped on purpose"
        lists = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.misshapen}
        return counts + "".join(f"\n  {len(keys)} {what}:\n{listed(keys)}" for what, keys in lists.items() if keys)


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    allow_new: Iterable[str] = (),
    allow_dropped: Iterable[str] = (),
    source: str = "the given state dict",
    assign: bool = False,
) -> LoadReport:
    """Load ``state`` into ``model``, accounting for every key; nothing is loaded unless everything is accounted for.

    Args:
        allow_new: regular expressions (full match) of keys that the model may have beyond the file.
        allow_dropped: regular expressions (full match) of keys that the file may have beyond the model.
        source: what the error calls the state dict, e.g. its path.
        assign: put the given tensors in place of the model's, as for a model on the meta device.

    Raises:
        WeightsError: keys missing, unexpected or misshapen, as sorted lists.
    """
    allow_new, allow_dropped = list(allow_new), list(allow_dropped)
    own = model.state_dict()
    report = LoadReport()
    for key in sorted(own.keys() | state.keys()):
        if key not in state:
            (report.new if matches(key, allow_new) else report.missing).append(key)
        elif key not in own:
            (report.dropped if matches(key, allow_dropped) else report.unexpected).append(key)
        elif own[key].shape != state[key].shape:
            report.misshapen.append(f"{key}: {tuple(state[key].shape)} given, {tuple(own[key].shape)} expected")
        else:
            report.loaded.append(key)
    if not report.ok:
        raise WeightsError(
            f"{source} does not fit this {type(model).__name__}, nothing was loaded: {report}\n"
            "Check that the file belongs to this architecture and size. In Python, img2vid.weights.load_weights takes "
            "patterns for differences that are meant (allow_new, allow_dropped)."
        )
    fitting = {key: state[key].to(own[key].dtype) for key in report.loaded}
    model.load_state_dict({**own, **fitting}, assign=assign)
    return report


def listed(keys: list[str], most: int = 20) -> str:
    """Keys one below the other; of a whole wrong file the first ones say enough."""
    lines = keys if len(keys) <= most else [*keys[:most], f"... and {len(keys) - most} more"]
    return "\n".join(f"    {line}" for line in lines)


def matches(key: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in patterns)
