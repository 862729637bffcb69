"""Samplers against index lists worked by hand, naive restatements, and properties of all inputs."""

from fractions import Fraction
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from img2vid.data import sampling

counts = st.integers(1, 400)
small = st.integers(1, 40)
seeds = st.integers(0, 2**32)
policies = st.sampled_from(["repeat_last", "wrap"])


@pytest.mark.parametrize(
    ("frames", "num_frames", "expected"),
    [
        (12, 3, [2, 6, 10]),
        (12, 12, list(range(12))),
        (10, 4, [1, 3, 6, 8]),  # parts of 2.5 frames, middles 1.25, 3.75, 6.25, 8.75
        (3, 5, [0, 0, 1, 2, 2]),  # middles .3, .9, 1.5, 2.1, 2.7
        (1, 4, [0, 0, 0, 0]),
        (300, 8, [18, 56, 93, 131, 168, 206, 243, 281]),
    ],
)
def test_segment_centres_by_hand(frames, num_frames, expected):
    assert sampling.segment_indices(frames, num_frames) == expected


@pytest.mark.parametrize(
    ("frames", "num_frames", "interval", "policy", "expected"),
    [
        (12, 3, 2, "error", [3, 5, 7]),
        (5, 3, 2, "error", [0, 2, 4]),  # fits exactly
        (4, 3, 2, "repeat_last", [0, 2, 3]),
        (4, 3, 2, "wrap", [0, 2, 0]),
        (1, 3, 7, "repeat_last", [0, 0, 0]),
        (5, 4, 3, "wrap", [0, 3, 1, 4]),
    ],
)
def test_dense_by_hand(frames, num_frames, interval, policy, expected):
    assert sampling.dense_indices(frames, num_frames, interval, short_policy=policy) == expected


def test_views_by_hand():
    assert sampling.view_indices(12, 2, 2, 3) == [[0, 2], [4, 6], [9, 11]]
    assert sampling.view_indices(12, 3, 2, 1) == [sampling.dense_indices(12, 3, 2)]
    assert sampling.view_indices(2, 3, 2, 2) == [[0, 1, 1], [0, 1, 1]]
    assert sampling.segment_views(6, 3, 2) == [[0, 2, 4], [1, 3, 5]]
    assert sampling.segment_views(8, 4, 1) == [sampling.segment_indices(8, 4)]


def test_fps_by_hand():
    assert sampling.fps_indices(11, 25, 5, 10) == [0, 2, 5, 7, 10]
    assert sampling.fps_indices(13, 30, 5, 10) == [0, 3, 6, 9, 12]
    assert sampling.fps_indices(100, Fraction(30000, 1001), 4, Fraction(30000, 1001)) == [48, 49, 50, 51]
    assert sampling.fps_views(21, 25, 3, 10, 3) == [[0, 2, 5], [7, 9, 12], [15, 17, 20]]
    assert sampling.fps_views(21, 25, 3, 10, 1) == [sampling.fps_indices(21, 25, 3, 10)]
    assert sampling.fps_views(3, 25, 3, 10, 2, "wrap") == [[0, 2, 2]] * 2
    assert sampling.fps_indices(4, 5, 8, 10) == [0, 0, 1, 1, 2, 2, 3, 3]  # more samples than frames: frames repeat


def test_ranges_by_hand():
    assert sampling.frame_range(100, 25, None, None) == (0, 100)
    assert sampling.frame_range(100, 25, 1, 2) == (25, 50)
    assert sampling.frame_range(100, 25, 1.01, 1.99) == (25, 50)
    assert sampling.frame_range(100, 25, 1.04, 1.96) == (26, 49)
    assert sampling.frame_range(100, 25, 3, 60) == (75, 100)
    assert sampling.frame_range(100, 25, None, 0.5) == (0, 13)
    assert sampling.frame_range(100, Fraction(30000, 1001), 0.1, None) == (2, 100)
    assert sampling.frame_range(100, 10, 0.3, 0.7) == (3, 7)  # 0.7 * 10 is 6.999... in floating point


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sampling.segment_indices(0, 4), "frames=0"),
        (lambda: sampling.dense_indices(4, 0, 1), "num_frames=0"),
        (lambda: sampling.dense_indices(4, 1, 0), "frame_interval=0"),
        (lambda: sampling.view_indices(4, 1, 1, 0), "num_clips=0"),
        (lambda: sampling.dense_indices(4, 3, 2, short_policy="error"), "needs 5 frames, there are 4"),
        (lambda: sampling.dense_indices(4, 3, 2, short_policy="black"), "expected one of 'repeat_last'"),
        (lambda: sampling.fps_indices(4, 0, 2, 10), "rates above 0"),
        (lambda: sampling.fps_indices(4, None, 2, 10), "rates above 0"),
        (lambda: sampling.frame_range(100, 25, 4, 5), "lasts 4.00"),
        (lambda: sampling.frame_range(100, 25, 2, 2), "empty"),
        (lambda: sampling.frame_range(100, None, 1, 2), "frame rate"),
        (lambda: sampling.frame_range(100, 25, -1, 2), "before 0"),
    ],
)
def test_what_cannot_be_sampled_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@given(counts, small)
def test_segment_centres_lie_in_the_middle_of_their_part(frames, num_frames):
    indices = sampling.segment_indices(frames, num_frames)
    for i, index in enumerate(indices):
        middle = Fraction((2 * i + 1) * frames, 2 * num_frames)  # in frames, as an exact number
        assert index <= middle < index + 1


@given(counts, small, seeds)
def test_random_segments_stay_in_their_part(frames, num_frames, seed):
    indices = sampling.segment_indices(frames, num_frames, Random(seed))
    assert indices == sorted(indices) and len(indices) == num_frames
    for i, index in enumerate(indices):
        assert i * frames // num_frames <= index <= max(i * frames // num_frames, ((i + 1) * frames // num_frames) - 1)
    assert indices == sampling.segment_indices(frames, num_frames, Random(seed))
    if frames >= num_frames:
        assert len(set(indices)) == num_frames


def test_random_segments_reach_every_frame():
    seen = {i for seed in range(200) for i in sampling.segment_indices(10, 3, Random(seed))}
    assert seen == set(range(10))


@given(counts, small, st.integers(1, 16), seeds, policies)
def test_dense_runs(frames, num_frames, interval, seed, policy):
    for rng in (None, Random(seed)):
        indices = sampling.dense_indices(frames, num_frames, interval, rng, policy)
        assert len(indices) == num_frames and all(0 <= i < frames for i in indices)
        if frames >= sampling.span(num_frames, interval):
            assert all(b - a == interval for a, b in pairwise(indices))
        elif policy == "repeat_last":
            assert indices == sorted(indices) and indices[0] == 0 and indices[-1] == frames - 1
        else:
            assert indices == [(k * interval) % frames for k in range(num_frames)]


def test_dense_runs_start_everywhere_they_can():
    starts = {sampling.dense_indices(10, 3, 2, Random(seed))[0] for seed in range(200)}
    assert starts == set(range(6))


@given(counts, small, st.integers(1, 16), st.integers(1, 10))
def test_views_cover_start_and_end(frames, num_frames, interval, num_clips):
    views = sampling.view_indices(frames, num_frames, interval, num_clips)
    assert len(views) == num_clips
    assert all(0 <= i < frames for view in views for i in view)
    starts = [view[0] for view in views]
    assert starts == sorted(starts)
    if num_clips > 1:
        assert starts[0] == 0 and views[-1][-1] == frames - 1
        gaps = [b - a for a, b in pairwise(starts)]
        assert max(gaps) - min(gaps) <= 1


@given(counts, small, st.integers(1, 6))
def test_segment_views_share_out_the_finer_segments(frames, num_frames, num_clips):
    views = sampling.segment_views(frames, num_frames, num_clips)
    merged = sorted(index for view in views for index in view)
    assert merged == sampling.segment_indices(frames, num_frames * num_clips)
    assert all(view == sorted(view) for view in views)


rates = st.fractions(Fraction(1), Fraction(120), max_denominator=1001)


@given(counts, rates, small, rates, seeds, policies)
def test_fps_runs_show_what_is_on_screen(frames, video_fps, num_frames, target_fps, seed, policy):
    indices = sampling.fps_indices(frames, video_fps, num_frames, target_fps, Random(seed), policy)
    assert len(indices) == num_frames and all(0 <= i < frames for i in indices)
    clear = indices[0] + (num_frames - 1) * video_fps / target_fps < frames
    for k, index in enumerate(indices):
        moment = k / target_fps  # seconds after the clip's first frame
        if clear:
            assert (index - indices[0]) / video_fps <= moment < (index - indices[0] + 1) / video_fps


@given(st.integers(1, 60), st.integers(1, 12))
def test_the_same_moments_from_files_of_other_rates(seconds, num_frames):
    """A file and the same file with every frame doubled: the frames chosen show the same moments."""
    slow = sampling.fps_indices(seconds * 10, 10, num_frames, 5)
    fast = sampling.fps_indices(seconds * 20, 20, num_frames, 5)
    if slow[-1] < seconds * 10 - 1:
        assert all(abs(f - 2 * s) <= 1 for f, s in zip(fast, slow, strict=True))


@given(counts, rates, st.integers(0, 5000), st.integers(1, 5000))
def test_ranges_hold_exactly_the_frames_on_screen(frames, fps, start_ms, length_ms):
    start, end = Fraction(start_ms, 1000), Fraction(start_ms + length_ms, 1000)
    on_screen = [i for i in range(frames) if i / fps < end and (i + 1) / fps > start]
    if not on_screen:
        with pytest.raises(ValueError):
            sampling.frame_range(frames, fps, start_ms / 1000, (start_ms + length_ms) / 1000)
    else:
        found = sampling.frame_range(frames, fps, start_ms / 1000, (start_ms + length_ms) / 1000)
        assert found == (on_screen[0], on_screen[-1] + 1)
