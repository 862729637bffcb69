"""Real video files and real trained weights, small: a dozen clips of 32 x 32 and nano_clip."""

import pytest
import torch

import img2vid
from img2vid.data.synthetic import MotionSettings, make_motion_set
from img2vid.evaluation.features import Compute
from tests.conftest import randomize

CPU = Compute(batch_size=4, num_workers=0, device="cpu")


@pytest.fixture(scope="session")
def motion(tmp_path_factory):
    """16 videos to train on and 24 to test on, 8 frames each, eight classes; nobody writes there."""
    folder = tmp_path_factory.mktemp("motion") / "set"
    return make_motion_set(folder, MotionSettings(train=16, val=0, test=24, size=32, num_frames=8, difficulty="easy"))


@pytest.fixture(scope="session")
def nano_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano") / "model"
    img2vid.convert("nano_clip", num_frames=4).save_pretrained(folder)
    return folder


@pytest.fixture
def nano(nano_folder):
    return img2vid.load(nano_folder)


@pytest.fixture
def timely(nano):
    """nano_clip with its gates pushed open, so that the order of frames matters."""
    gates = torch.nn.ModuleList(block.temporal_fc for _, block in nano.visual.tower.blocks)
    randomize(gates, seed=3, std=0.05)
    return nano
