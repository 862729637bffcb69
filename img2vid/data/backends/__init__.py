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
    rotation: degrees counterclockwise that were applied to stand upright.
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
    damaged_packets: int = 0


def check_indices(indices, frames: int, label: str) -> list[int]:
    """Frame indices as plain ints, all inside 0 .. frames - 1, or an IndexError that says where the video ends."""
    wanted = [int(index) for index in indices]
    outside = [index for index in wanted if not 0 <= index < frames]
    if outside:
        raise IndexError(f"{label}: frame {outside[0]} asked for, but the video has frames 0 to {frames - 1}")
    return wanted
