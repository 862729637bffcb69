"""One thread per process: tests share the machine, and decoding is tested for exactness, not for speed."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

from img2vid.data.lists import read_list
from img2vid.data.transforms import InputSpec
from tests.data import clips

# No time limit per example: on a busy machine it fails tests that are right.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

SPEC = InputSpec(size=32, mean=(0.48, 0.45, 0.40), std=(0.26, 0.25, 0.27))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a file of tests makes its clips."""
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory):
    """Ten readable videos of 8 to 26 frames in two classes, for tests that must not write there."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(10):
        path = folder / ("run" if i % 2 else "jump") / f"v{i}.mp4"
        path.parent.mkdir(exist_ok=True)
        clips.encode(path, frames=8 + 2 * i, size=(48, 64), seed=i, options={"g": "6", "bf": "2"})
    return folder


@pytest.fixture(scope="session")
def videos(video_folder):
    return read_list(video_folder)
