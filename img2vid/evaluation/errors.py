"""The error of this package."""

from __future__ import annotations

from img2vid.errors import Img2VidError


class EvaluationError(Img2VidError):
    """An evaluation that cannot be run as asked, or that would not mean anything."""
