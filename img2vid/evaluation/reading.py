"""Videos for an evaluation: clips cut the way a protocol says, and every video accounted for."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from img2vid.data.datasets import ClipSampler, VideoDataset
from img2vid.data.errors import VideoError
from img2vid.data.loading import safe_start_method
from img2vid.data.manifest import Row, VideoList
from img2vid.data.reading import BACKENDS
from img2vid.data.transforms import InputSpec, TestTransform
from img2vid.evaluation.conditions import video_part
from img2vid.evaluation.errors import EvaluationError


@dataclass(frozen=True)
class Views:
    """How a video becomes clips: ``num_clips`` clips of ``num_frames``, each cut to ``num_crops`` squares.

    frame_interval, target_fps, short_policy: as in ``img2vid.data.datasets.ClipSampler``.
    short_side: pixels the shorter side is resized to before the cut; None for the model's own size.
    """

    num_frames: int
    frame_interval: int | None = None
    target_fps: float | None = None
    num_clips: int = 1
    num_crops: int = 1
    short_policy: str = "repeat_last"
    short_side: int | None = None
    backend: str = "auto"

    @property
    def number(self) -> int:
        return self.num_clips * self.num_crops


@dataclass(frozen=True)
class Problem:
    """Why a video is left out: ``missing`` or ``undecodable``, and a sentence.

    try_again: whether another run may find it otherwise (memory that ran out once, a disk that was slow).
    """

    kind: str
    text: str
    try_again: bool = False


class Videos(Dataset):
    """Row -> (row, clips uint8 (V, T, C, H, W), None), or (row, None, Problem) for a video that cannot be read."""

    def __init__(self, videos: VideoList, views: Views, spec: InputSpec) -> None:
        if views.backend not in ("auto", *BACKENDS):
            raise EvaluationError(f"backend={views.backend!r}: expected one of auto, {', '.join(BACKENDS)}.")
        try:
            sampler = ClipSampler(
                views.num_frames, views.frame_interval, views.target_fps, views.num_clips, views.short_policy
            )
            transform = TestTransform(spec, views.num_crops, views.short_side)
        except ValueError as error:
            raise EvaluationError(str(error)) from error
        self.dataset = VideoDataset(videos, sampler, transform, backend=views.backend)
        self.num_views = views.number

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[int, Tensor | None, Problem | None]:
        path, where = self.dataset.videos.rows[row].path, self.dataset.videos.rows[row].where
        if not os.path.exists(path):
            return row, None, Problem("missing", f"{where}: {path}: no such file".removeprefix(": "))
        try:
            return row, self.dataset[row]["clip"], None
        except VideoError as error:
            return row, None, Problem("undecodable", str(error))


def input_spec(model) -> InputSpec:
    """What the model's backbone expects of its pixels, asked before a video is read.

    Raises:
        EvaluationError: frames that are not square, or a model that takes more than the frames of a video.
    """
    video = video_part(model)
    tower = video.tower
    height, width = tower.image_size
    if height != width:
        raise EvaluationError(
            f"This model takes frames of {height} x {width} pixels; evaluation cuts squares. "
            f"Convert with image_size=({height}, {height})."
        )
    more = [one.name for one in video.grafts if hasattr(one, "more")]
    if more:
        raise EvaluationError(
            f"This model takes {tower.in_channels} channels, and videos hold 3, nothing for {', '.join(more)}. "
            f"img2vid graft FOLDER --remove {' '.join(more)} --out FOLDER goes without."
        )
    if missing := [name for name in video.takes_beside if name not in video.clip.vectors]:
        listed = ", ".join(f"{name}, a vector of {video.takes_beside[name]} numbers" for name in missing)
        raise EvaluationError(
            f"This model takes {listed} for each clip, and videos alone have none to give. img2vid graft FOLDER "
            f"--remove {' '.join(missing)} --out FOLDER goes without; from Python: model(clips, {missing[0]}=...)."
        )
    pixels = tower.preprocess
    try:
        return InputSpec(height, tuple(pixels.mean), tuple(pixels.std), pixels.interpolation)
    except ValueError as error:
        raise EvaluationError(f"Preprocessing of this backbone: {error}") from error


Item = tuple[int, "Tensor | None", "Problem | None"]


def read_in_order(
    videos: Videos, rows: Sequence[int], num_workers: int, timeout_seconds: float = 300.0
) -> Iterator[Item]:
    """The videos of ``rows`` in order, decoded ahead by ``num_workers`` processes.

    A video that kills its process, or keeps it for longer than ``timeout_seconds``, is found by giving each suspect a
    process of its own, and becomes a Problem; then reading goes on.
    """
    if num_workers == 0:
        yield from (videos[row] for row in rows)
        return
    done = 0
    while done < len(rows):
        for item in pooled(videos, rows[done:], num_workers, timeout_seconds):
            done += 1
            yield item
        suspects = rows[done : done + 3 * num_workers]  # what the processes may have had in hand
        for row in suspects:
            alone = list(pooled(videos, [row], 1, timeout_seconds))
            path = videos.dataset.videos.rows[row].path
            done += 1
            yield (
                alone[0]
                if alone
                else (row, None, Problem("undecodable", f"{path}: reading it ends or hangs a process", try_again=True))
            )


def pooled(videos: Videos, rows: Sequence[int], num_workers: int, timeout_seconds: float) -> Iterator[Item]:
    """The videos of ``rows`` in order, until one of them ends or hangs its process."""
    # not a DataLoader: where one of its workers dies, an exception is thrown into whatever the main process is doing
    context = get_context(safe_start_method())
    pool = ProcessPoolExecutor(num_workers, context, initializer=start_worker, initargs=(videos,))
    left, waiting = deque(rows), deque()
    try:
        while left or waiting:
            while left and len(waiting) < 3 * num_workers:
                waiting.append(pool.submit(read_one, left.popleft()))
            row, clip, problem = waiting.popleft().result(timeout_seconds)
            yield row, None if clip is None else torch.from_numpy(clip), problem
    except (BrokenProcessPool, FutureTimeout):
        for process in list(pool._processes.values()):  # a hung process would be waited for, for ever
            process.kill()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def start_worker(videos: Videos) -> None:
    global _videos
    torch.set_num_threads(1)  # workers are the parallelism
    _videos = videos


def read_one(row: int) -> tuple[int, np.ndarray | None, Problem | None]:
    row, clip, problem = _videos[row]
    return row, None if clip is None else clip.numpy(), problem  # as plain bytes: shared memory dies with its process


def stamp(path: str) -> list[int] | None:
    """Size and time of change of a file, or of all in a folder, to notice another one; None where there is none."""
    try:
        status = os.stat(path)
        if not os.path.isdir(path):
            return [status.st_size, status.st_mtime_ns]
        frames = [entry.stat() for entry in os.scandir(path)]
    except OSError:
        return None
    newest = max([status.st_mtime_ns, *(frame.st_mtime_ns for frame in frames)])
    return [sum(frame.st_size for frame in frames), newest, len(frames)]


def identity(row: Row) -> tuple:
    """What makes two rows the same video: the file, wherever the list was opened from, and the part of it."""
    return os.path.abspath(row.path), row.start_seconds, row.end_seconds
