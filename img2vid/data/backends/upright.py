"""From a decoded frame to the picture a player shows: RGB, turned and mirrored as the file asks for.

Cameras store pixels as the sensor gives them and write a display matrix beside them: a phone held upright asks for a
quarter turn, a front camera for a mirror image. FFmpeg tells the angle of each frame; whether there is a mirror too is
read here from the mp4 or mov itself. (A frame's matrix could be asked for, but asking makes the frame part of a
reference cycle, and its pixels then stay in memory until the garbage collector comes by.)
Source: ISO/IEC 14496-12: movie header, track header.
"""

from __future__ import annotations

import contextlib
import struct

import numpy as np


def quarter_turns(degrees: float, mirrored: bool) -> int:
    """Quarter turns counterclockwise to make first, before left and right are swapped (if mirrored)."""
    turns = round(degrees / 90) % 4
    return (turns + 2) % 4 if mirrored and turns in (0, 2) else turns  # the mirror itself reads as half a turn


def upright_rgb(frame, reformatter, mirrored: bool) -> np.ndarray:
    """uint8 (H, W, 3) of a decoded frame, turned as it says itself, then mirrored."""
    array = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()  # (H, W, 3)
    turns = quarter_turns(frame.rotation, mirrored)
    array = np.rot90(array, turns) if turns else array
    return array[:, ::-1] if mirrored else array


def is_mirrored(source, track_id: int) -> bool:
    """Do the matrices of an mp4 or mov (a path or a BytesIO) swap the sides of this track's pictures?"""
    # A file too broken for this cannot be read by FFmpeg either, which says so in its own words.
    with contextlib.suppress(struct.error):
        if isinstance(source, str):
            with open(source, "rb") as file:
                return _swaps(file, file.seek(0, 2), track_id) == 1
        at = source.tell()  # where FFmpeg, which reads from the same object, means it to be
        try:
            return _swaps(source, source.getbuffer().nbytes, track_id) == 1
        finally:
            source.seek(at)
    return False


def _swaps(file, size: int, track_id: int) -> int:
    movie = [box for top in _boxes(file, 0, size, b"moov") for box in _boxes(file, *top)]
    swaps = sum(_matrix_swaps(file, start, 36) for kind, start, _ in movie if kind == b"mvhd")
    tracks = [header for kind, *track in movie if kind == b"trak" for header in _boxes(file, *track, b"tkhd")]
    return swaps + sum(_matrix_swaps(file, at, 40) for at, _ in tracks if _number(file, at, 12) == track_id)


def _boxes(file, at: int, end: int, wanted: bytes | None = None) -> list[tuple]:
    """(kind, start of content, end) of the boxes one after another in a stretch of the file; without kind if wanted."""
    found = []
    while at + 8 <= end:
        file.seek(at)
        size, kind = struct.unpack(">I4s", file.read(8))
        header = 8
        if size == 1:
            size, header = struct.unpack(">Q", file.read(8))[0], 16
        size = size if size else end - at  # 0: up to the end
        if size < header:
            break
        if wanted in (None, kind):
            found.append((kind, at + header, at + size) if wanted is None else (at + header, at + size))
        at += size
    return found


def _number(file, start: int, offset: int) -> int:
    """32 bits behind the two dates of a header; these are twice as wide in version 1."""
    file.seek(start)
    file.seek(start + offset + (8 if file.read(1) == b"\x01" else 0))
    return struct.unpack(">I", file.read(4))[0]


def _matrix_swaps(file, start: int, offset: int) -> bool:
    """Is the determinant of the matrix negative? It lies behind the dates and the duration."""
    file.seek(start)
    file.seek(start + offset + (12 if file.read(1) == b"\x01" else 0))
    a, b, _, c, d = struct.unpack(">5i", file.read(20))
    return a * d - b * c < 0
