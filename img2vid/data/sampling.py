"""Which frames make a clip: integer mathematics on frame counts, no files.

A video has `frames` frames; a sampler picks `num_frames` of them. Drawings for 12 frames, x = picked:

    segments, centre     num_frames=3                  . . x . . . x . . . x .      the middle of each third
    segments, random     num_frames=3                  x . . . . . . x . x . .      anywhere in each third
    dense                num_frames=3, interval=2      . . . x . x . x . . . .      one run, placed at random or centred
    views                num_frames=2, interval=2,     1 . 1 . . 2 . 2 . 3 . 3      num_clips runs, spread from start
                         num_clips=3                                                to end, to be averaged

A run that does not fit (frames < (num_frames - 1) * interval + 1) is short; `short_policy` decides:

    repeat_last          4 frames, num_frames=3, interval=2      x . x X            the last frame stands in
    wrap                                                         x y x .            0 2 4 -> 0 2 0: start over
    error                                                        ValueError

Segments never run short: fewer frames than segments repeat frames in order (0 0 1 1 2 for 5 of 3).
Every function returns plain ints in playing order, inside 0 .. frames - 1. `rng` is a `random.Random`; None means the
deterministic choice made in testing.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from random import Random

SHORT_POLICIES = ("repeat_last", "wrap", "error")


def segment_indices(frames: int, num_frames: int, rng: Random | None = None) -> list[int]:
    """One frame from each of `num_frames` equal parts: the middle one, or with `rng` a random one (TSN sampling).

    Part i covers the frames from i * frames // num_frames up to, without, (i + 1) * frames // num_frames, so sizes
    differ by at most one.
    """
    _check(frames=frames, num_frames=num_frames)
    if rng is None:
        return [(2 * i + 1) * frames // (2 * num_frames) for i in range(num_frames)]
    starts = [i * frames // num_frames for i in range(num_frames + 1)]
    # A part without frames (fewer frames than parts) takes the frame it starts at.
    return [rng.randrange(a, b) if b > a else a for a, b in pairwise(starts)]


def dense_indices(
    frames: int,
    num_frames: int,
    frame_interval: int,
    rng: Random | None = None,
    short_policy: str = "repeat_last",
) -> list[int]:
    """A run of `num_frames` frames, `frame_interval` apart: at a random place with `rng`, else in the middle."""
    _check(frames=frames, num_frames=num_frames, frame_interval=frame_interval)
    room = frames - span(num_frames, frame_interval)  # how many places beside the first the run can start at
    start = 0 if room <= 0 else room // 2 if rng is None else rng.randint(0, room)
    return _run(start, frames, num_frames, frame_interval, short_policy)


def view_indices(
    frames: int,
    num_frames: int,
    frame_interval: int,
    num_clips: int,
    short_policy: str = "repeat_last",
) -> list[list[int]]:
    """`num_clips` dense runs for multi-view testing: the first at the start, the last at the end, evenly between.

    One clip is centred. A video with no room gives the same clip `num_clips` times.
    """
    _check(frames=frames, num_frames=num_frames, frame_interval=frame_interval, num_clips=num_clips)
    starts = view_starts(frames - span(num_frames, frame_interval), num_clips)
    return [_run(start, frames, num_frames, frame_interval, short_policy) for start in starts]


def segment_views(frames: int, num_frames: int, num_clips: int) -> list[list[int]]:
    """`num_clips` clips of one frame per segment, each at another place inside its segments.

    With num_clips * num_frames equal parts, clip k takes the middles of the parts k, k + num_clips, ...:
    6 frames, num_frames=3, num_clips=2 gives  1 2 1 2 1 2  (the number says which clip takes the frame).
    """
    _check(frames=frames, num_frames=num_frames, num_clips=num_clips)
    fine = segment_indices(frames, num_frames * num_clips)
    return [fine[k::num_clips] for k in range(num_clips)]


def interval_at_fps(video_fps: Fraction | float, target_fps: Fraction | float) -> Fraction:
    """Frames between samples so that a clip plays at `target_fps` whatever the video's rate; may be a fraction."""
    if video_fps is None or video_fps <= 0 or target_fps <= 0:
        raise ValueError(f"sampling by time needs rates above 0; given: video {video_fps}, wanted {target_fps}")
    return Fraction(video_fps).limit_denominator(10**6) / Fraction(target_fps).limit_denominator(10**6)


def fps_indices(
    frames: int,
    video_fps: Fraction | float,
    num_frames: int,
    target_fps: Fraction | float,
    rng: Random | None = None,
    short_policy: str = "repeat_last",
) -> list[int]:
    """A run sampled `target_fps` times per second: sample k shows the frame on screen at k / target_fps seconds.

        25 frames/s at 10 per second: 0 . 2 . . 5 . 7 . . 10      steps of 2.5, rounded down
        30 frames/s at 10 per second: 0 . . 3 . . 6 . . 9         the same moments of another file

    Times are those of a constant rate (the average one, for a file of variable rate).
    """
    _check(frames=frames, num_frames=num_frames)
    steps = steps_at_fps(num_frames, interval_at_fps(video_fps, target_fps))
    room = frames - 1 - steps[-1]
    start = 0 if room <= 0 else room // 2 if rng is None else rng.randint(0, room)
    return shorten([start + step for step in steps], frames, short_policy)


def fps_views(
    frames: int,
    video_fps: Fraction | float,
    num_frames: int,
    target_fps: Fraction | float,
    num_clips: int,
    short_policy: str = "repeat_last",
) -> list[list[int]]:
    """`num_clips` runs by time for multi-view testing, spread as those of `view_indices` are."""
    _check(frames=frames, num_frames=num_frames, num_clips=num_clips)
    steps = steps_at_fps(num_frames, interval_at_fps(video_fps, target_fps))
    starts = view_starts(frames - 1 - steps[-1], num_clips)
    return [shorten([start + step for step in steps], frames, short_policy) for start in starts]


def view_starts(room: int, num_clips: int) -> list[int]:
    """Where runs begin that have `room` places beside the first: one in the middle, more from start to end."""
    room = max(0, room)
    return [room // 2] if num_clips == 1 else [i * room // (num_clips - 1) for i in range(num_clips)]


def steps_at_fps(num_frames: int, interval: Fraction) -> list[int]:
    return [k * interval.numerator // interval.denominator for k in range(num_frames)]


def frame_range(
    frames: int, fps: Fraction | float | None, start_seconds: float | None, end_seconds: float | None
) -> tuple[int, int]:
    """The frames on screen between two times, as (first, one past last); the whole video where a time is None.

    Frame i is on screen from i / fps on, so the first is floor(start * fps) and the end is ceil(end * fps). An end
    after the video's is moved to it (annotated ends are often rounded up); a start after it is a ValueError.
    """
    if start_seconds is None and end_seconds is None:
        return 0, frames
    if fps is None:
        raise ValueError("a time range needs a frame rate, and this video has none")
    fps = Fraction(fps)
    start = Fraction(str(start_seconds)) if start_seconds is not None else Fraction(0)
    end = Fraction(str(end_seconds)) if end_seconds is not None else frames / fps
    if start < 0 or end <= start:
        raise ValueError(f"the time range {start_seconds} to {end_seconds} seconds is empty or starts before 0")
    first, stop = start * fps // 1, -(-end * fps // 1)
    if first >= frames:
        seconds = float(frames / fps)
        raise ValueError(f"the time range starts at {start_seconds} seconds, but the video lasts {seconds:.2f}")
    return int(first), int(min(stop, frames))


def span(num_frames: int, frame_interval: int) -> int:
    """How many frames a run covers, from its first to its last."""
    return (num_frames - 1) * frame_interval + 1


def shorten(indices: list[int], frames: int, short_policy: str) -> list[int]:
    """Bring the indices of a run that goes past the end back inside, the way `short_policy` says."""
    if short_policy not in SHORT_POLICIES:
        raise ValueError(f"short_policy={short_policy!r}: expected one of {', '.join(map(repr, SHORT_POLICIES))}")
    if indices[-1] < frames:
        return indices
    if short_policy == "error":
        needed = indices[-1] - indices[0] + 1
        raise ValueError(f"too short: the clip needs {needed} frames, there are {frames} (short_policy='error')")
    if short_policy == "wrap":
        return [index % frames for index in indices]
    # The last frame stands in, rather than the last on the run's grid: it is the end of the action.
    return [min(index, frames - 1) for index in indices]


def _run(start: int, frames: int, num_frames: int, frame_interval: int, short_policy: str) -> list[int]:
    return shorten([start + k * frame_interval for k in range(num_frames)], frames, short_policy)


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more")
