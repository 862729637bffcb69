"""Readers behind `img2vid.data.reading`, all with one shape: open(source) -> .info, .read(indices), .close().

`read` returns a list of uint8 RGB arrays (H, W, 3), upright (rotation applied), one per index, duplicates and order
kept. Readers never resize: that happens once, in reading.py, so that every backend gives the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class VideoInfo:
    """What is known about a video before its frames are asked for.

    frames: how many frames `read_clip` can return (counted, never duration x rate).
    fps: average frames per second, None where there is no clock (a folder of images).
    height, width: pixels, after rotation.
    duration_seconds: what `frames` last, None without a clock.
    rotation: degrees counterclockwise (0, 90, 180 or 270) that were applied to stand upright.
    mirrored: whether left and right were swapped after that.
    damaged_packets: packets flagged by the container, missing from it, or (after a decode) refused or concealed.
    """

    frames: int
    fps: Fraction | None
    height: int
    width: int
    codec: str
    container: str
    duration_seconds: float | None
    rotation: int = 0
    mirrored: bool = False
    damaged_packets: int = 0


class Reader:
    """What readers have in common; subclasses set frames, fps, codec and container, and say how to `read`.

    likely_frames: `frames` at no cost, perhaps not exactly. damaged: packets known to be damaged or missing.
    """

    damaged = 0

    @property
    def likely_frames(self) -> int:
        return self.frames

    @property
    def info(self) -> VideoInfo:
        height, width = self.read([0])[0].shape[:2]
        seconds = float(self.frames / self.fps) if self.fps else None
        return VideoInfo(self.frames, self.fps, height, width, self.codec, self.container, seconds)

    def close(self) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def check_indices(indices, frames: int, label: str) -> list[int]:
    """Frame indices as plain ints, all inside 0 .. frames - 1, or an IndexError that says where the video ends."""
    wanted = [int(index) for index in indices]
    outside = [index for index in wanted if not 0 <= index < frames]
    if outside:
        raise IndexError(f"{label}: frame {outside[0]} asked for, but the video has frames 0 to {frames - 1}")
    return wanted
