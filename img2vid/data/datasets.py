"""A list of videos as a dataset of clips.

videos = read_list("train.csv")
sampler = ClipSampler(num_frames=8, frame_interval=4)
dataset = VideoDataset(videos, sampler, TrainTransform(spec), train=True, seed=0)
dataset[3]["clip"]                     # uint8 (T, C, H, W)

dataset = VideoDataset(videos, ClipSampler(8, 4, num_clips=4), TestTransform(spec, num_crops=3))
dataset[3]["clip"]                     # uint8 (V, T, C, H, W), V = num_clips x num_crops views, clip by clip
"""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from random import Random

import torch
from torch.utils.data import Dataset, get_worker_info

from img2vid.data import sampling
from img2vid.data.errors import VideoError
from img2vid.data.manifest import Row, VideoList
from img2vid.data.order import EpochOrder, Position, draw_seed
from img2vid.data.reading import open_video, read_chosen

log = logging.getLogger("img2vid.data")

ON_BAD_VIDEO = ("raise", "skip")


@dataclass(frozen=True)
class ClipSampler:
    """How clips are cut from a video.

    num_frames: T. frame_interval: frames between two of them, for a dense run; or target_fps: frames per second,
    whatever the video's own rate; or neither: one frame from each of `num_frames` equal segments.
    num_clips: clips per video in testing. short_policy: for runs that do not fit (sampling.py).
    """

    num_frames: int
    frame_interval: int | None = None
    target_fps: float | None = None
    num_clips: int = 1
    short_policy: str = "repeat_last"

    def __post_init__(self):
        if self.frame_interval is not None and self.target_fps is not None:
            raise ValueError("give frame_interval or target_fps, not both")
        counts = [self.num_frames, self.num_clips, 1 if self.frame_interval is None else self.frame_interval]
        if not all(isinstance(n, Integral) and not isinstance(n, bool) and n >= 1 for n in counts):
            raise ValueError(f"num_frames, num_clips and frame_interval: expected whole numbers above 0: {self}")
        if self.target_fps is not None and not 1e-3 <= self.target_fps <= 1e4:  # nan is neither
            raise ValueError(f"target_fps={self.target_fps}: expected frames per second, from 0.001 to 10000")
        if self.short_policy not in sampling.SHORT_POLICIES:
            known = ", ".join(map(repr, sampling.SHORT_POLICIES))
            raise ValueError(f"short_policy={self.short_policy!r}: expected one of {known}")

    def clips(self, frames: int, fps: Fraction | None, rng: Random | None) -> list[list[int]]:
        """Frame indices of each clip: one random clip with `rng`, `num_clips` fixed ones without."""
        if self.target_fps is not None and rng is not None:
            return [sampling.fps_indices(frames, fps, self.num_frames, self.target_fps, rng, self.short_policy)]
        if self.target_fps is not None:
            cut = (self.num_frames, self.target_fps, self.num_clips, self.short_policy)
            return sampling.fps_views(frames, fps, *cut)
        if self.frame_interval is not None and rng is not None:
            return [sampling.dense_indices(frames, self.num_frames, self.frame_interval, rng, self.short_policy)]
        if self.frame_interval is not None:
            cut = (self.num_frames, self.frame_interval, self.num_clips, self.short_policy)
            return sampling.view_indices(frames, *cut)
        if rng is not None:
            return [sampling.segment_indices(frames, self.num_frames, rng)]
        return sampling.segment_views(frames, self.num_frames, self.num_clips)


class VideoDataset(Dataset):
    """Clips of a list of videos, by row number, or by `Position` as samplers give them (module.py).

    train: random clips and a transform that takes a seed; else fixed views. Choices depend on (seed, epoch, row) alone,
    and plain row numbers are epoch 0: train with a `TrainSampler`, or every epoch cuts the same clips.
    on_bad_video: "raise", or "skip" (training): take the next row in the epoch's order instead, and say so in the log.
    max_bad_videos: with "skip", the share of the list that may be bad before the run is stopped.
    Items: clip, index (the row it really is), label (-1 if there is none), caption ("" if there is none; one of several
    at random in training, the first in testing), epoch and position (as asked for), damaged_packets.
    Raises VideoError, which names the list's file and row as well as the path.
    """

    def __init__(
        self,
        videos: VideoList,
        sampler: ClipSampler,
        transform,
        train: bool = False,
        seed: int = 0,
        shuffle: bool | None = None,
        backend: str = "auto",
        on_error: str = "raise",
        on_bad_video: str = "raise",
        max_bad_videos: float = 0.01,
    ):
        if on_bad_video not in ON_BAD_VIDEO:
            raise ValueError(f"on_bad_video={on_bad_video!r}: expected 'raise' or 'skip'")
        if on_bad_video == "skip" and not train:
            raise ValueError("on_bad_video='skip' would count a video twice in testing: use 'img2vid data check' first")
        self.videos, self.sampler, self.transform, self.train, self.seed = videos, sampler, transform, train, seed
        self.backend, self.on_error, self.on_bad_video = backend, on_error, on_bad_video
        self.order = EpochOrder(len(videos), seed, train if shuffle is None else shuffle)
        self.bad_limit = math.ceil(max_bad_videos * len(videos))
        self.taken: set[int] = set()  # rows asked for by number
        self.warned = False
        # One flag per row, in memory the workers share: no two of them count a video twice, and no lock is needed.
        self.bad = torch.zeros(len(videos), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, place: int | Position) -> dict:
        if not isinstance(place, tuple):
            if not 0 <= place < len(self):
                raise IndexError(f"{self.videos.source}: row {place} asked for, but the list has 0 to {len(self) - 1}")
            if self.train:
                self._warn_of_repetition(place)
            return self.load(place, Position(0, place))
        for step in range(len(self)):
            index = self.order.row(place[0], place[1] + step)
            if self.bad[index]:
                continue
            try:
                return self.load(index, Position(*place))
            except VideoError as error:
                if self.on_bad_video == "raise":
                    raise
                self._count_bad(index, error)
        raise VideoError.about(self.videos.source, "every video of the list is bad")

    def _warn_of_repetition(self, index: int) -> None:
        """A plain sampler says which row, not which epoch, so every epoch would cut the same clips from it."""
        if not self.warned and (index in self.taken or get_worker_info() is not None):
            self.warned = True
            warnings.warn(
                "Training clips asked for by row number are the same in every epoch. Give the DataLoader "
                "sampler=img2vid.data.loading.TrainSampler(len(dataset)) and call its set_epoch(epoch).",
                stacklevel=3,
            )
        self.taken.add(index)

    def load(self, index: int, place: Position) -> dict:
        row = self.videos.rows[index]
        draw = draw_seed(self.seed, place.epoch, index)
        rng = Random(draw) if self.train else None
        try:
            clips, damaged = self._read(row, draw if self.train else None)
        except (VideoError, IndexError, ValueError) as error:
            raise VideoError(f"{row.where}: {error}", row.path) from error
        if self.train:
            clip = self.transform(clips[0], draw)  # (T, C, size, size)
            caption = rng.choice(row.captions) if row.captions else ""
        else:
            clip = torch.cat([self.transform(clip) for clip in clips])  # (V, T, C, size, size)
            caption = row.captions[0] if row.captions else ""
        return {
            "clip": clip,
            "index": index,
            "label": -1 if row.label is None else row.label,
            "caption": caption,
            "epoch": place.epoch,
            "position": place.position,
            "damaged_packets": damaged,
        }

    def bad_rows(self) -> list[Row]:
        """The rows skipped so far, by all workers on this machine."""
        return [self.videos.rows[index] for index in self.bad.nonzero().flatten().tolist()]

    def _read(self, row: Row, draw: int | None) -> tuple[list[torch.Tensor], int]:
        """The clips of one row, each uint8 (T, C, H, W), and how many damaged packets were concealed."""

        def choose(frames: int, fps: Fraction | None) -> list[int]:
            first, stop = sampling.frame_range(frames, fps, row.start_seconds, row.end_seconds)
            rng = None if draw is None else Random(draw)  # made anew: a chooser may be asked twice
            return [first + i for clip in self.sampler.clips(stop - first, fps, rng) for i in clip]

        with open_video(row.path, self.backend, self.on_error) as reader:
            # A counted list saves counting where that means decoding.
            wanted = choose if row.frames is None else choose(row.frames, reader.fps)
            flat, _ = read_chosen(reader, wanted)  # (num_clips * T, C, H, W)
            return list(flat.split(self.sampler.num_frames)), reader.damaged

    def _count_bad(self, index: int, error: VideoError) -> None:
        self.bad[index] = 1
        count = int(self.bad.sum())
        log.warning("%s -- skipped, the next in the epoch's order stands in (%d bad so far)", error, count)
        if count > self.bad_limit:
            share = f"{count} of {len(self)} videos are bad, more than max_bad_videos allows ({self.bad_limit})"
            advice = "Run 'img2vid data check' on the list; the last one was"
            raise VideoError(f"{self.videos.source}: {share}. {advice}: {error}", error.path) from error
