"""Video in: `probe` says what a video is, `read_clip` returns exactly the frames asked for.

    info = probe("video.mp4")                                  # frames, fps, height, width, ...
    clip = read_clip("video.mp4", num_frames=8)                # uint8 (8, 3, H, W), one frame from each eighth
    clip = read_clip("video.mp4", [0, 30, 30, 15])             # these frames, in this order
    clip = read_clip("video.mp4", num_frames=8, short_side=256)

Frame i always means: the i-th frame a sequential decode would give. All backends agree on it, or refuse the file.
"""

from __future__ import annotations

import io
import operator
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from importlib import import_module
from numbers import Integral
from typing import TYPE_CHECKING

from img2vid.data.backends import VideoInfo
from img2vid.data.errors import DamagedVideoWarning, VideoError

if TYPE_CHECKING:
    import torch

BACKENDS = {
    "pyav": ("img2vid.data.backends.pyav", "PyAVReader"),
    "decord": ("img2vid.data.backends.decord", "DecordReader"),
    "torchcodec": ("img2vid.data.backends.torchcodec", "TorchcodecReader"),
    "frames": ("img2vid.data.backends.frames", "FrameFolderReader"),
}
ON_ERROR = ("raise", "conceal")

# What to read, decided when the video is open: (frames, fps) -> indices. Pure, because it may be asked twice.
Chooser = Callable[[int, "Fraction | None"], Sequence[int]]


def open_video(source, backend: str = "auto", on_error: str = "raise", name: str | None = None):
    """A reader for `source`, as a context manager with `.frames`, `.fps`, `.info`, `.read(indices)`, `.damaged`.

    source: a path, a folder of frames, bytes, or a binary file object (read from its start, left open).
    backend: "auto" ("frames" for a folder, otherwise "pyav"), "pyav", "decord", "torchcodec" or "frames".
    on_error: "raise" on damaged packets, or "conceal": keep what the decoder makes of them, and count.
    name: what to call bytes or a file object in errors.
    Raises VideoError, starting with the path, for anything that is not a readable video.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error={on_error!r}: expected one of {', '.join(map(repr, ON_ERROR))}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of 'auto', {', '.join(map(repr, BACKENDS))}")
    source, label = _source(source, name)
    if backend == "auto":
        backend = "frames" if isinstance(source, str) and os.path.isdir(source) else "pyav"
    if backend != "frames":
        _check_is_file(source, label)
    module, reader = BACKENDS[backend]
    return getattr(import_module(module), reader)(source, label, on_error)


def probe(source, decode: bool = False, backend: str = "auto", name: str | None = None) -> VideoInfo:
    """What a video is: frames (counted), fps, height and width after rotation, codec, duration, damaged packets.

    decode: also decode every frame and count the packets a decoder refuses or conceals. Without it only packets that
    the container itself shows to be damaged or missing are counted, and indexed containers are not decoded.
    Raises VideoError if there is no readable video.
    """
    with open_video(source, backend, "conceal", name) as reader:
        if decode and hasattr(reader, "decode_everything"):
            reader.decode_everything()
            counted = reader.damaged  # before `info` decodes a frame again
            return replace(reader.info, damaged_packets=counted)
        return reader.info


def read_clip(
    source,
    indices: Sequence[int] | Chooser | None = None,
    *,
    num_frames: int | None = None,
    short_side: int | None = None,
    backend: str = "auto",
    on_error: str = "raise",
    name: str | None = None,
) -> torch.Tensor:
    """Frames of a video as uint8 RGB (T, C, H, W), upright, in memory channels-last.

    indices: which frames, order and duplicates kept; or a pure function (frames, fps) -> indices.
    num_frames: instead of indices, the middle frame of each of that many equal parts of the video.
    short_side: pixels; resizes (antialiased bilinear) so that the shorter side has this length. None keeps the size.
    source, backend, on_error, name: as in `open_video`.
    Raises IndexError outside the video and VideoError (with the path) where it cannot be read; with
    on_error="conceal" damage is counted in a DamagedVideoWarning instead.
    """
    if (indices is None) == (num_frames is None):
        raise ValueError("read_clip: give either indices or num_frames, one of the two")
    if num_frames is not None:
        indices = middle_frames(num_frames)
    with open_video(source, backend, on_error, name) as reader:
        clip, _ = read_chosen(reader, indices)
        if reader.damaged:
            text = f"{reader.label}: {reader.damaged} damaged packets, concealed or missing; frames may be wrong"
            warnings.warn(text, DamagedVideoWarning, stacklevel=2)
    return clip if short_side is None else resize_short_side(clip, short_side)


def read_chosen(reader, indices: Sequence[int] | Chooser) -> tuple[torch.Tensor, list[int]]:
    """Read `indices` (or what a Chooser makes of the frame count) from an open reader: (clip, the indices read)."""
    import numpy as np
    import torch

    if not callable(indices):
        chosen = whole_numbers(indices, reader.label)
        frames = reader.read(chosen)
    else:
        # Where counting means decoding, read for the likely count first: nearly always right, and half the work.
        likely = reader.likely_frames
        chosen = [int(index) for index in indices(likely, reader.fps)]
        try:
            frames = reader.read(chosen, count=True)
        except IndexError:
            if reader.frames == likely:
                raise
        if reader.frames != likely:
            chosen = [int(index) for index in indices(reader.frames, reader.fps)]
            frames = reader.read(chosen)
    if not frames:
        raise ValueError(f"{reader.label}: no frame indices were given")
    sizes = sorted({frame.shape[:2] for frame in frames})
    if len(sizes) > 1:
        listed = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise VideoError.about(reader.label, f"its frames change size ({listed}), so they do not form one clip")
    thwc = torch.from_numpy(np.stack(frames))  # (T, H, W, C)
    return thwc.permute(0, 3, 1, 2), chosen  # (T, C, H, W); the memory stays channels-last, which resizing likes


def whole_numbers(indices: Sequence[int], label: str) -> list[int]:
    """Ints out of ints, NumPy's or torch's; 1.5 is no frame, and rounding it would pick one in silence."""
    try:
        return [operator.index(index) for index in indices]
    except TypeError:
        raise TypeError(f"{label}: frame indices are whole numbers such as [0, 30]; given: {indices!r}") from None


def middle_frames(num_frames: int) -> Chooser:
    if not isinstance(num_frames, Integral):
        raise TypeError(f"num_frames={num_frames!r}: expected a whole number, 1 or more")
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames}: expected 1 or more")
    return lambda frames, fps: [(2 * i + 1) * frames // (2 * num_frames) for i in range(num_frames)]


def resize_short_side(clip: torch.Tensor, short_side: int) -> torch.Tensor:
    """uint8 (T, C, H, W) -> uint8 (T, C, H', W') with min(H', W') == short_side; as it is if it already fits."""
    from torchvision.transforms.v2 import functional as F

    if short_side < 1:
        raise ValueError(f"short_side={short_side}: expected pixels, 1 or more")
    return clip if min(clip.shape[-2:]) == short_side else F.resize(clip, [short_side], antialias=True)


def _source(source, name: str | None):
    """(path or seekable binary file, what to call it in errors)."""
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        return path, name or path
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source), name or f"<{len(source)} bytes>"
    if hasattr(source, "read"):
        label = name or str(getattr(source, "name", None) or f"<{type(source).__name__}>")
        if isinstance(source, io.BytesIO):
            return source, label
        if hasattr(source, "seekable") and source.seekable():
            source.seek(0)
        return io.BytesIO(source.read()), label
    raise TypeError(f"a video is a path, bytes or a binary file object; given: {type(source).__name__}")


def _check_is_file(source, label: str) -> None:
    """Say the simple things simply: FFmpeg would say "Invalid data found" to nearly all of them, or wait on a pipe."""
    if not isinstance(source, str):
        empty = source.getbuffer().nbytes == 0
    elif not os.path.lexists(source):
        raise VideoError.about(label, f"no such file (looked from {os.getcwd()})")
    elif os.path.isdir(source):
        raise VideoError.about(label, "a folder, not a video file")
    elif not os.path.isfile(source):
        raise VideoError.about(label, "a broken link or a special file, not a video file")
    else:
        empty = os.path.getsize(source) == 0
    if empty:
        raise VideoError.about(label, "an empty file (0 bytes)")
