"""Frames of a video, a folder of frames or a camera in order, one at a time, for as long as they come.

    for seconds, frame in watch("video.mp4", target_fps=2.0):    # uint8 (H, W, 3)
    for seconds, frame in watch("0"):                            # the first camera

Whatever the length, one frame is in memory.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from img2vid.data.errors import VideoError
from img2vid.data.reading import open_video

if TYPE_CHECKING:
    import numpy as np

Timed = tuple["float | None", "np.ndarray"]  # seconds since the first frame, None without a clock; (H, W, 3)
# platform -> FFmpeg's input device, and what it calls camera number n
CAMERAS = {"linux": ("v4l2", "/dev/video{n}"), "darwin": ("avfoundation", "{n}")}


def watch(source: str | os.PathLike, target_fps: float | None = None, on_error: str = "raise") -> Iterator[Timed]:
    """Frames with their times, in order.

    Args:
        source: a path; or the number of a camera, where no file is called that.
        target_fps: frames per second: the first one after each such part of a second, the others are passed over. None
            for all of them, as for a folder of frames, which has no clock.
        on_error: of damaged packets, ``raise`` or ``conceal``.

    Raises:
        VideoError: there is no such camera, or no readable video.
    """
    if target_fps is not None and not 0.0 < target_fps < float("inf"):
        raise ValueError(f"target_fps={target_fps}: expected frames per second, above 0")
    source = os.fspath(source)
    is_camera = source.isdecimal() and not os.path.exists(source)
    frames = camera_frames(int(source)) if is_camera else file_frames(source, on_error)
    return at_rate(frames, target_fps)


def at_rate(frames: Iterator[Timed], target_fps: float | None) -> Iterator[Timed]:
    passed = -1  # the part of a second, counted from the first, of the last frame that was kept
    with closing(frames):
        for seconds, frame in frames:
            if seconds is not None and target_fps is not None:
                part = int(seconds * target_fps + 1e-6)
                if part <= passed:
                    continue
                passed = part
            yield seconds, frame


def file_frames(path: str, on_error: str) -> Iterator[Timed]:
    with open_video(path, on_error=on_error) as reader:
        fps = reader.fps
        with closing(reader.stream_frames(0, sys.maxsize)) as frames:
            for number, frame in enumerate(frames):
                yield None if fps is None else float(number / fps), frame


def camera_frames(number: int) -> Iterator[Timed]:
    import av

    if sys.platform not in CAMERAS:
        raise VideoError(f"Cameras are not supported on {sys.platform}; give a video file.")
    device, name = CAMERAS[sys.platform]
    name = name.format(n=number)
    try:
        container = av.open(name, format=device)
    except (av.error.FFmpegError, ValueError) as error:
        others = ", ".join(found.removeprefix("/dev/video") for found in sorted(glob.glob("/dev/video[0-9]*")))
        found = f"; cameras found: {others or 'none'}" if sys.platform == "linux" else ""
        reason = getattr(error, "strerror", None) or error
        raise VideoError(
            f"Camera {number} ({device} {name}) cannot be opened: {reason}{found}. "
            "Give another number, or a video file."
        ) from error
    with container:
        first = None
        for frame in container.decode(video=0):
            first = frame.time if first is None else first
            yield None if frame.time is None else frame.time - first, frame.to_ndarray(format="rgb24")
