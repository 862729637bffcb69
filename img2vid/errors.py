"""Errors that a user can act on. The command line prints their text alone and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Img2VidError(ValueError):
    """Something given by the user does not fit; the message says what, what was expected, and what to do."""


class BackboneError(Img2VidError):
    """A backbone that is unknown, unsupported, or cannot be built as asked."""


class WeightsError(Img2VidError):
    """A weights file that cannot be read, or does not fit its model."""


def nearest(name: str, known: Iterable[str], most: int = 5) -> str:
    """A sentence naming the known names closest to ``name``; empty where none is close."""
    matches = difflib.get_close_matches(name, list(known), n=most, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""
