"""Datasets of clips: the right frames, the same ones in every worker, and bad videos counted and named."""

import logging
from dataclasses import replace
from random import Random

import pytest
import torch
from torch.utils.data import DataLoader

from img2vid.data import VideoError, read_clip, sampling
from img2vid.data.datasets import ClipSampler, VideoDataset
from img2vid.data.manifest import Row, VideoList
from img2vid.data.order import EpochOrder, Position, draw_seed
from img2vid.data.transforms import TestTransform, TrainTransform
from tests.data.conftest import SPEC

LATE_STARTS = ("spawn", "forkserver")  # their workers import everything anew, which takes seconds


def as_read(clip, seed=None):
    """No transform: what was read, as it was read."""
    return clip if seed is not None else clip[None]


def train_set(videos, sampler=None, **options):
    return VideoDataset(videos, sampler or ClipSampler(4), TrainTransform(SPEC), train=True, **options)


def test_test_items_are_the_frames_the_samplers_say(videos):
    row = videos.rows[9]  # v9.mp4: 26 frames
    assert row.path.endswith("run/v9.mp4") and row.label == 1
    cases = {
        ClipSampler(4): [3, 9, 16, 22],
        ClipSampler(4, frame_interval=3): [8, 11, 14, 17],
        ClipSampler(4, target_fps=12.5): [9, 11, 13, 15],
    }
    for sampler, indices in cases.items():
        item = VideoDataset(videos, sampler, as_read)[9]
        assert torch.equal(item["clip"][0], read_clip(row.path, indices)), sampler
        assert (item["index"], item["label"], item["caption"], item["damaged_packets"]) == (9, 1, "", 0)


def test_training_by_row_number_is_warned_of_when_it_repeats(videos, recwarn):
    dataset = train_set(videos)
    first = dataset[3]["clip"]
    assert not recwarn
    with pytest.warns(UserWarning, match=r"sampler=img2vid.data.loading.TrainSampler"):
        assert torch.equal(dataset[3]["clip"], first)
    VideoDataset(videos, ClipSampler(4), as_read)[3]
    dataset[Position(0, 3)], dataset[3]
    assert len(recwarn) == 0  # one warning is enough; testing repeats rightly


def test_views_are_clips_times_crops(videos):
    dataset = VideoDataset(videos, ClipSampler(4, 2, num_clips=3), TestTransform(SPEC, num_crops=3))
    item = dataset[9]
    assert item["clip"].shape == (9, 4, 3, 32, 32)
    middle = TestTransform(SPEC, num_crops=3)(read_clip(videos.rows[9].path, [9, 11, 13, 15]))
    assert torch.equal(item["clip"][3:6], middle)
    timed = VideoDataset(videos, ClipSampler(4, target_fps=12.5, num_clips=3), TestTransform(SPEC, num_crops=3))[9]
    assert torch.equal(timed["clip"], item["clip"])  # every second frame of 25 per second


def test_training_clips_follow_seed_epoch_and_row(videos):
    dataset = VideoDataset(videos, ClipSampler(4, 3), as_read, train=True, seed=5)
    row_at = EpochOrder(10, seed=5).row
    seen = set()
    for epoch in range(6):
        item = dataset[Position(epoch, 2)]
        index = row_at(epoch, 2)
        assert item["index"] == index
        frames = 8 + 2 * int(videos.rows[index].path[-5])
        expected = sampling.dense_indices(frames, 4, 3, Random(draw_seed(5, epoch, index)))
        assert torch.equal(item["clip"], read_clip(videos.rows[index].path, expected))
        assert torch.equal(item["clip"], dataset[Position(epoch, 2)]["clip"])
        seen.add(index)
    assert len(seen) > 2


def test_time_ranges_captions_and_counts(videos):
    path = videos.rows[9].path  # 25 frames per second
    rows = (
        Row(path, None, ("a", "b", "c"), start_seconds=0.4, end_seconds=0.8, where="list.csv row 2"),
        Row(path, 3, frames=26),
    )
    ranged = VideoList(rows, None, "list.csv")
    dataset = VideoDataset(ranged, ClipSampler(4), as_read)
    assert torch.equal(dataset[0]["clip"][0], read_clip(path, [11, 13, 16, 18]))  # of the frames 10 to 19
    assert (dataset[0]["caption"], dataset[0]["label"]) == ("a", -1)
    assert torch.equal(dataset[1]["clip"][0], read_clip(path, [3, 9, 16, 22]))
    training = VideoDataset(ranged, ClipSampler(4), as_read, train=True, shuffle=False)
    assert {training[Position(epoch, 0)]["caption"] for epoch in range(30)} == {"a", "b", "c"}
    stale = VideoList((replace(rows[1], frames=400, where="list.csv row 3"),), None, "list.csv")
    with pytest.raises(VideoError, match=r"list\.csv row 3: .*frames 0 to 25"):
        VideoDataset(stale, ClipSampler(4), as_read)[0]
    late = VideoList((replace(rows[0], start_seconds=50.0, end_seconds=60.0),), None, "list.csv")
    with pytest.raises(VideoError, match=r"list\.csv row 2: .*lasts 1\.04"):
        VideoDataset(late, ClipSampler(4), as_read)[0]


@pytest.mark.parametrize("start", ["fork", *(pytest.param(s, marks=pytest.mark.multiprocess) for s in LATE_STARTS)])
def test_workers_give_the_same_clips_as_none(videos, start):
    dataset = train_set(videos)
    places = [Position(1, position) for position in range(10)]
    alone = [dataset[place] for place in places]
    loader = DataLoader(dataset, None, sampler=places, num_workers=2, multiprocessing_context=start)
    together = list(loader)
    assert len(together) == 10
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one["clip"], other["clip"]) and one["index"] == other["index"]


def with_bad(videos, *bad):
    rows = list(videos.rows)
    for index in bad:
        rows[index] = replace(rows[index], path=rows[index].path + ".gone", where=f"train.csv row {index + 2}")
    return VideoList(tuple(rows), videos.class_names, "train.csv")


def test_a_bad_video_raises_by_default(videos):
    with pytest.raises(VideoError, match=r"train\.csv row 5: .*\.gone: no such file"):
        VideoDataset(with_bad(videos, 3), ClipSampler(4), as_read)[3]


def test_a_skipped_video_is_replaced_by_the_next_in_order_and_named(videos, caplog):
    dataset = train_set(with_bad(videos, 3), on_bad_video="skip", max_bad_videos=0.1)
    row_at = EpochOrder(10).row
    order = [row_at(0, position) for position in range(10)]
    place = order.index(3)
    with caplog.at_level(logging.WARNING, "img2vid.data"):
        indices = [dataset[Position(0, position)]["index"] for position in range(10)]
    expected = list(order)
    expected[place] = order[(place + 1) % 10]
    assert indices == expected
    assert [row.where for row in dataset.bad_rows()] == ["train.csv row 5"]
    assert len(caplog.records) == 1 and "train.csv row 5" in caplog.text and "1 bad so far" in caplog.text
    assert dataset[Position(1, [row_at(1, p) for p in range(10)].index(3))]["index"] != 3
    assert len(caplog.records) == 1  # known by now


def test_workers_share_the_count_of_bad_videos(videos):
    dataset = train_set(with_bad(videos, 0, 7), on_bad_video="skip", max_bad_videos=0.2)
    loader = DataLoader(dataset, None, sampler=[Position(0, p) for p in range(10)], num_workers=2)
    assert len([item["index"] for item in loader]) == 10
    assert len(dataset.bad_rows()) == 2


def test_too_many_bad_videos_stop_the_run(videos):
    dataset = train_set(with_bad(videos, *range(8)), on_bad_video="skip", max_bad_videos=0.2)
    with pytest.raises(VideoError, match=r"train\.csv: 3 of 10 videos are bad, more than max_bad_videos allows \(2\)"):
        [dataset[Position(0, position)] for position in range(10)]


def test_orders_are_permutations_that_change_with_epoch_and_seed():
    orders = {tuple(EpochOrder(50, seed).row(epoch, p) for p in range(50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9 and all(sorted(order) == list(range(50)) for order in orders)
    assert [EpochOrder(5, shuffle=False).row(3, p) for p in range(7)] == [0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda v: ClipSampler(8, 2, 10.0), "not both"),
        (lambda v: ClipSampler(0), "above 0"),
        (lambda v: ClipSampler(2.5), "whole numbers above 0"),
        (lambda v: ClipSampler(2, frame_interval=1.5), "whole numbers above 0"),  # else cut off in silence
        (lambda v: ClipSampler(2, target_fps=float("nan")), "target_fps=nan"),
        (lambda v: ClipSampler(2, target_fps=0.0), "target_fps=0.0: expected frames per second"),
        (lambda v: ClipSampler(8, 2, short_policy="loop"), "expected one of 'repeat_last'"),
        (lambda v: VideoDataset(v, ClipSampler(4), as_read, on_bad_video="skip"), "twice in testing"),
        (lambda v: VideoDataset(v, ClipSampler(4), as_read, on_bad_video="ignore"), "'raise' or 'skip'"),
        (lambda v: VideoDataset(v, ClipSampler(4), as_read)[10], "row 10 asked for, but the list has 0 to 9"),
    ],
)
def test_wrong_arguments_teach(videos, call, words):
    with pytest.raises((ValueError, IndexError), match=words):
        call(videos)
