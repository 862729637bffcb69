"""Frames of a video, a folder of frames or a camera in order, one at a time, for as long as they come.

    for seconds, frame in watch("video.mp4", target_fps=2.0):    # uint8 (H, W, 3)
    for seconds, frame in watch("0"):                            # the first camera

Whatever the length, one frame is in memory.
"""

from __future__ import annotations

import glob
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from img2vid.data.errors import DamagedVideoWarning, VideoError
from img2vid.data.reading import open_video

if TYPE_CHECKING:
    import numpy as np

Timed = tuple["float | None", "np.ndarray"]  # seconds since the first frame, None without a clock; (H, W, 3)
# platform -> FFmpeg's input device, and what it calls camera number n
CAMERAS = {"linux": ("v4l2", "/dev/video{n}"), "darwin": ("avfoundation", "{n}")}
ROUNDED = 0.0006  # seconds by which a time may be wrong: some containers keep whole milliseconds
LATE = 0.25  # seconds that a camera's frame may have been waiting
MOST_WAITING = 256  # of its frames, which FFmpeg keeps for whoever is slow


def watch(source: str | os.PathLike, target_fps: float | None = None, on_error: str = "raise") -> Iterator[Timed]:
    """Frames with their times, in order.

    Args:
        source: a path; or the number of a camera, where no file is called that. Of a camera, frames are passed over
            that had to wait: whoever is slower than it sees what is there now, not what was there some time ago.
        target_fps: frames per second: the first one after each such part of a second, the others are passed over. None
            for all of them, as for a folder of frames, which has no clock.
        on_error: of damaged packets, ``raise`` or ``conceal``, which counts them in a ``DamagedVideoWarning``.

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
                part = int((seconds + ROUNDED) * target_fps)
                if part <= passed:
                    continue
                passed = part
            yield seconds, frame


def file_frames(path: str, on_error: str) -> Iterator[Timed]:
    with open_video(path, on_error=on_error) as reader:
        try:
            with closing(reader.timed_frames()) as frames:
                yield from frames
        finally:
            if reader.damaged and on_error == "conceal":
                text = f"{reader.label}: {reader.damaged} damaged packets, concealed or missing; frames may be wrong"
                warnings.warn(text, DamagedVideoWarning, stacklevel=2)


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
        try:
            for frame in fresh(container.decode(video=0), time.monotonic):
                first = frame.time if first is None else first
                yield None if frame.time is None else frame.time - first, frame.to_ndarray(format="rgb24")
        except av.error.FFmpegError as error:
            raise VideoError(f"Camera {number} ({device} {name}) stopped: {error.strerror or error}.") from error


def fresh(frames: Iterator[Any], clock: Callable[[], float]) -> Iterator[Any]:
    """Those of a camera's frames that have not been waiting. How long one has is measured against the promptest."""
    promptest, passed = None, 0
    for frame in frames:
        if frame.time is not None:
            delay = clock() - frame.time
            promptest = delay if promptest is None else min(promptest, delay)
            if delay > promptest + LATE:
                if passed < MOST_WAITING:
                    passed += 1
                    continue
                promptest = delay  # none can be waiting any more: it is the clocks that disagree
        passed = 0
        yield frame
