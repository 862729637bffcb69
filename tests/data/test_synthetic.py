"""The motion set: what the captions say is what moves, and nothing but order tells a class from its reversal."""

import filecmp
import json
from pathlib import Path

import numpy as np
import pytest

from img2vid.config import VideoConfig
from img2vid.data import probe, read_clip
from img2vid.data.digits import load_digits
from img2vid.data.lists import read_list
from img2vid.data.sampling import segment_indices
from img2vid.data.synthetic import CLASS_NAMES, MOTIONS, MotionSettings, main, make_motion_set, scene

SMALL = dict(train=24, val=8, test=8, size=48, num_frames=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_motion_set(tmp_path_factory.mktemp("synth") / "set", MotionSettings(**SMALL))


def test_the_lists_are_balanced_and_true(folder):
    for split, count in (("train", 24), ("val", 8), ("test", 8)):
        videos = read_list(folder / f"{split}.csv")
        assert videos.class_names == CLASS_NAMES and len(videos) == count
        assert np.bincount([row.label for row in videos.rows]).tolist() == [count // 8] * 8
        for row in videos.rows:
            motion = CLASS_NAMES[row.label]
            assert row.captions[0].startswith("the digit ") and row.captions[0].endswith(motion)
            assert row.frames == probe(row.path).frames == 8
            assert (probe(row.path).height, probe(row.path).width) == (48, 48)


def test_each_video_is_another_ones_reversal_bit_for_bit(folder):
    """So the frames of the two classes are the same multiset, and no bag of frames tells them apart."""
    rows = read_list(folder / "train.csv").rows
    reverse_of = {a: b for pair in MOTIONS for a, b in (pair, pair[::-1])}
    for forward, backward in zip(rows[::2], rows[1::2], strict=True):
        assert reverse_of[CLASS_NAMES[forward.label]] == CLASS_NAMES[backward.label]
        there, back = read_clip(forward.path, range(8)), read_clip(backward.path, range(8))
        assert np.array_equal(there.numpy(), back.flip(0).numpy())
        assert not np.array_equal(there.numpy(), back.numpy())


def moments(frames):
    """Position (x, y), spread and orientation of what differs from the background, per frame, from the pixels alone."""
    frames = frames.astype(np.float64)
    background = frames[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(1)[:, None, None]
    weight = np.abs(frames - background).sum(-1)
    weight = np.where(weight > 60, 1.0, 0.0)
    yy, xx = np.mgrid[: frames.shape[1], : frames.shape[2]]
    total = weight.sum((1, 2))
    x, y = (weight * xx).sum((1, 2)) / total, (weight * yy).sum((1, 2)) / total
    dx, dy = xx - x[:, None, None], yy - y[:, None, None]
    spread = np.sqrt((weight * (dx**2 + dy**2)).sum((1, 2)) / total)
    tilt = 0.5 * np.arctan2(2 * (weight * dx * -dy).sum((1, 2)), (weight * (dx**2 - dy**2)).sum((1, 2)))
    return x, y, spread, np.unwrap(tilt, period=np.pi)


@pytest.mark.parametrize("axis", range(4))
def test_what_moves_is_what_the_class_says(axis):
    """Measured from the pixels: forward is right, down, larger, counterclockwise."""
    settings = MotionSettings(size=64, num_frames=12, difficulty="easy")
    images, labels = load_digits("train")
    steady = 0
    for seed in range(12):
        keep = labels == 1 if axis == 3 else labels >= 0  # the tilt of a one is plain to see
        frames, _ = scene(np.random.default_rng(seed), images[keep], labels[keep], axis, settings)
        change = moments(frames)[axis]
        assert change[-1] - change[0] > (0.5 if axis == 3 else 3), seed
        steady += np.all(np.diff(change) > -0.05)
    assert steady >= 10


def test_a_clip_of_default_length_and_its_reversal_are_sampled_alike():
    """Else a model that sees no order could still tell them apart by which frames it was given."""
    length, sampled = MotionSettings().num_frames, VideoConfig().num_frames
    indices = segment_indices(length, sampled)
    assert sorted(length - 1 - i for i in indices) == indices


def test_digits_stay_on_the_canvas():
    images, labels = load_digits("val")
    settings = MotionSettings(size=48, num_frames=8, difficulty="easy")
    for axis in range(4):
        for seed in range(10):
            frames, _ = scene(np.random.default_rng(seed), images, labels, axis, settings)
            border = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], 1)
            assert np.ptp(border.astype(int), axis=1).max() <= 6  # the plain background, all around


def test_the_seed_decides_and_splits_are_disjoint(folder, tmp_path):
    again = make_motion_set(tmp_path / "again", MotionSettings(**SMALL))
    other = make_motion_set(tmp_path / "other", MotionSettings(**SMALL, seed=1))
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(names) == 24 + 8 + 8 + 4
    assert all(filecmp.cmp(folder / name, again / name, shallow=False) for name in names)
    assert not filecmp.cmp(folder / "videos/train-000000.mp4", other / "videos/train-000000.mp4", shallow=False)
    images = {split: {image.tobytes() for image in load_digits(split)[0]} for split in ("train", "val", "test")}
    assert not images["train"] & images["test"] and not images["train"] & images["val"]
    assert json.loads((folder / "settings.json").read_text())["size"] == 48


def test_harder_is_less_motion_and_more_noise():
    images, labels = load_digits("train")
    travelled = {}
    for difficulty in ("easy", "medium", "hard"):
        settings = MotionSettings(difficulty=difficulty)
        clips = [scene(np.random.default_rng(seed), images, labels, 0, settings)[0] for seed in range(6)]
        travelled[difficulty] = np.mean([np.abs(np.diff(c[:, :3, :3].astype(float), axis=0)).mean() for c in clips])
    assert travelled["easy"] < 1 < travelled["medium"] < travelled["hard"]  # flicker in a corner: the noise


def test_the_command_and_its_errors(tmp_path, capsys):
    assert (
        main([str(tmp_path / "a"), "--train", "8", "--val", "0", "--test", "0", "--size", "32", "--num-frames", "4"])
        == 0
    )
    assert len(read_list(tmp_path / "a" / "train.csv")) == 8
    for arguments, words in {
        (str(tmp_path / "a"),): "not an empty folder",
        (str(tmp_path / "b"), "--train", "9"): "train=9: expected a multiple of 8",
        (str(tmp_path / "b"), "--size", "33"): "size=33: expected an even number",
        (str(tmp_path / "b"), "--num-frames", "1"): "2 frames or more",
    }.items():
        assert main(list(arguments)) == 2
        assert words in capsys.readouterr().err
    assert [path.name for path in Path(tmp_path).iterdir()] == ["a"]
