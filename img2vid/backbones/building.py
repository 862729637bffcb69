"""A library's factory at work: what it loads is said aloud, and what it stumbles over is told as one error."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import nn

from img2vid.config import shown
from img2vid.errors import BackboneError, Img2VidError
from img2vid.weights.index import bytes_of

log = logging.getLogger("img2vid")  # commands show it
_unannounced: ContextVar[bool] = ContextVar("_unannounced", default=False)


@contextmanager
def unannounced() -> Iterator[None]:
    """Build in silence, for a model that gets its weights elsewhere: "random weights" would be read as their loss."""
    token = _unannounced.set(True)
    try:
        yield
    finally:
        _unannounced.reset(token)


@contextmanager
def building(name: str, arguments: dict[str, Any]) -> Iterator[None]:
    """Turn whatever a factory raises, which depends on where its arguments first make no sense, into one error.

    Raises:
        BackboneError: the factory failed.
    """
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
    wrong = [path for path, value in by_path.items() if path not in ("", *norms) or not isinstance(value, float)]
    if wrong or not norms:
        raise BackboneError(
            f"norm_eps={shown(eps)}: expected a number such as 1e-12, or numbers by the path of a norm. "
            f"{type(model).__name__} has {', '.join(norms) or 'none'}."
        )
    for path, module in norms.items():
        module.eps = by_path.get(path, by_path.get("", module.eps))
