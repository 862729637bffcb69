"""A library's factory at work: what it loads is said aloud, and what it stumbles over is told as one error."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf
from pathlib import Path
from typing import Any

from torch import nn

from img2vid.config import shown
from img2vid.errors import BackboneError, Img2VidError
from img2vid.weights.index import bytes_of

log = logging.getLogger("img2vid")  # commands show it
_unannounced: ContextVar[bool] = ContextVar("_unannounced", default=False)
_to_be_loaded: ContextVar[bool] = ContextVar("_to_be_loaded", default=False)
_one_at_a_time = threading.RLock()  # of the threads that change how modules take parameters
# arguments by which timm's and open_clip's factories load weights themselves, and how safely
LOADING = (
    "checkpoint_path",
    "load_weights",
    "pretrained",
    "pretrained_hf",
    "pretrained_image",
    "pretrained_image_path",
    "pretrained_text",
    "pretrained_text_path",
    "require_pretrained",
    "weights_only",
)


@contextmanager
def unannounced() -> Iterator[None]:
    """Build in silence, for a model that gets its weights elsewhere: "random weights" would be read as their loss."""
    token = _unannounced.set(True)
    try:
        yield
    finally:
        _unannounced.reset(token)


@contextmanager
def to_be_loaded() -> Iterator[None]:
    """Inside, models are built all of whose weights will be loaded: by whoever can (timm) ``without_numbers``."""
    token = _to_be_loaded.set(True)
    try:
        yield
    finally:
        _to_be_loaded.reset(token)


def will_be_loaded() -> bool:
    return _to_be_loaded.get()


@contextmanager
def without_numbers() -> Iterator[None]:
    """Parameters are made on torch's meta device, all else as ever: for a model that gets its weights from a file.

    Random ones would take most of the time that loading takes, and as much memory as the file's.
    """
    twins: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # what is shared stays shared

    def register_twin(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if threading.get_ident() == thread and type(parameter) is nn.Parameter and not parameter.is_meta:
            if id(parameter) not in twins:
                twins[id(parameter)] = parameter, nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            parameter = twins[id(parameter)][1]
        register(module, name, parameter)

    with _one_at_a_time:
        register, thread = nn.Module.register_parameter, threading.get_ident()
        nn.Module.register_parameter = register_twin  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def building(name: str, arguments: dict[str, Any]) -> Iterator[None]:
    """Turn whatever a factory raises, which depends on where its arguments first make no sense, into one error.

    Raises:
        BackboneError: the factory failed, or would load weights that nobody accounts for.
    """
    check_arguments(name, arguments)
    try:
        yield
    except (Img2VidError, OSError):  # these are clear, or about fetching
        raise
    except Exception as error:
        lines = " ".join(str(error).split())
        given = f" with {shown(arguments)}" if arguments else ""
        raise BackboneError(
            f"{name} cannot be built{given}: {type(error).__name__}: {lines[:400]}"
            + (". Arguments that change the architecture need --random-weights." if "size mismatch" in lines else "")
        ) from error


def check_arguments(name: str, arguments: dict[str, Any]) -> None:
    """Refuse arguments that load weights: factories skip what does not fit, and ``config.json`` could name any file."""
    given = [argument for argument in LOADING if argument in arguments]
    if given:
        raise BackboneError(
            f"{', '.join(given)}: {name} takes no weights by its arguments, since what does not fit would be left out "
            "in silence. Give a file with --weights FILE (in Python: weights=FILE), or the name of pretrained ones."
        )


def say_loading(name: str, model: nn.Module, weights: str | Path | None, random_weights: bool, part: str = "") -> None:
    """Announce what is about to take its time, with its size. ``model`` may be on the meta device."""
    if _unannounced.get():
        return
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    if weights is not None:
        size = f", {bytes_of(Path(weights)) / 1e6:,.0f} MB" if os.path.isfile(weights) else ""
        source = f"from {weights}{size}"
    elif random_weights:
        source = "with random weights"
    else:
        folder = os.path.isabs(name.removeprefix("hf:"))  # relative ones are made absolute when names are parsed
        source = "from that folder" if folder else "from its library's cache, or downloading it"
    log.info("Building %s (%s%.1f M parameters) %s.", name, part, millions, source)


def set_norm_eps(model: nn.Module, eps: float | dict[str, float] | None) -> None:
    """What norms add to a variance, in place, where the weights were trained with another value than the library's.

    Args:
        eps: one for all norms, or by the path of the norm, ``""`` for all others; None leaves them.
    """
    if eps is None:
        return
    by_path = eps if isinstance(eps, dict) else {"": eps}
    norms = {path: module for path, module in model.named_modules() if isinstance(getattr(module, "eps", None), float)}
    wrong = [path for path in by_path if path not in ("", *norms)]
    wrong += [path for path, value in by_path.items() if not isinstance(value, float) or not 0.0 <= value < inf]
    if wrong or not norms:
        raise BackboneError(
            f"norm_eps={shown(eps)}: expected a number such as 1e-12, or numbers by the path of a norm. "
            f"{type(model).__name__} has {', '.join(norms) or 'none'}."
        )
    for path, module in norms.items():
        module.eps = by_path.get(path, by_path.get("", module.eps))
