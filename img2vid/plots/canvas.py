"""What every picture shares: matplotlib without windows or global state, and files that are whole or not there."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

from img2vid.errors import Img2VidError

INK, PALE, LINE = "#1f4e79", "#9db8d2", "#444444"


class PlotError(Img2VidError):
    """A picture that cannot be made."""


try:
    from matplotlib.figure import Figure  # no pyplot: no windows, no global state
except ImportError as error:
    raise PlotError("Pictures need matplotlib. Run: pip install 'img2vid[plot]'") from error


def save(figure: Figure, path: str | Path) -> Path:
    """Write a PNG, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(png(figure))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    no_glyph = [w for w in caught if "missing from font" in str(w.message)]
    for warning in caught:
        if warning not in no_glyph:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if no_glyph:
        warnings.warn("Some letters are drawn as boxes: matplotlib's font does not have them.", stacklevel=3)
    return buffer.getvalue()
