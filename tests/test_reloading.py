"""``load_image_weights``: new image weights, and what was made from the old ones."""

import copy

import pytest
import torch

import img2vid
from img2vid.errors import WeightsError
from tests.conftest import randomize, small_clip, small_vit

VIT = {"init_values": 0.1, "qk_norm": True}


def other_vit():
    return randomize(small_vit(**VIT), seed=4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gate": "tanh"},
        {"gate": "none"},
        {"tubelet_size": 2, "tubelet_init": "average"},
        {"tubelet_size": 2},
        {"attention": "joint_space_time"},
        {"temporal_layers": "last:1"},
    ],
    ids=str,
)
def test_the_result_is_the_conversion_of_the_new_image_model(settings):
    model = img2vid.convert(small_vit(**VIT), num_frames=4, **settings)
    before = {name: id(p) for name, p in model.named_parameters()}
    report = model.load_image_weights(other_vit().state_dict())
    expected = img2vid.convert(other_vit(), num_frames=4, **settings).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert [k for k, v in model.state_dict().items() if not torch.equal(v, expected[k])] == []
    assert before == {name: id(p) for name, p in model.named_parameters()}  # optimisers hold them
    copied = settings.get("attention") is None
    assert any("copied again" in note for note in report.notes) == copied
    assert img2vid.certify(model, other_vit(), num_frames=(1, 2)).held


@pytest.mark.parametrize("gate", ["temporal_fc", "tanh", "none"])
def test_trained_copies_are_not_thrown_away_unasked(gate):
    model = randomize(img2vid.convert(small_vit(), gate=gate), seed=8, std=0.01)
    before = copy.deepcopy(model.state_dict())
    other = randomize(small_vit(), seed=4).state_dict()
    with pytest.raises(WeightsError, match="have moved, nothing was loaded.*refresh_copies=False"):
        model.load_image_weights(other)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.load_image_weights(other, refresh_copies=False)
    state = model.state_dict()
    assert all(torch.equal(state[k], other[k] if k in other else before[k]) for k in state)


def test_copies_that_were_never_copies_stay():
    model = img2vid.convert(small_vit(), temporal_init="random")
    before = copy.deepcopy(model.state_dict())
    other = randomize(small_vit(), seed=4).state_dict()
    model.load_image_weights(other)
    state = model.state_dict()
    assert all(torch.equal(state[k], other[k] if k in other else before[k]) for k in state)


@pytest.mark.parametrize("keep", [lambda k: True, lambda k: "temporal_fc" in k or "temporal" not in k])
def test_a_video_checkpoint_is_called_so(keep):
    model = img2vid.convert(small_vit())
    before = copy.deepcopy(model.state_dict())
    state = {k: v + 1 for k, v in model.state_dict().items() if keep(k)}
    with pytest.raises(WeightsError, match=r"checkpoint of a video model, nothing was loaded: \d+ keys are about time"):
        model.load_image_weights(state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_both_towers(tmp_path):
    model = img2vid.convert(small_clip(), tubelet_size=2, tubelet_init="average", num_frames=4)
    other = randomize(small_clip(), seed=4)
    report = model.load_image_weights(other.state_dict())
    expected = img2vid.convert(randomize(small_clip(), seed=4), tubelet_size=2, tubelet_init="average", num_frames=4)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in expected.state_dict().items())
    assert report.new
    assert model.visual.image_weights == "a checkpoint given to load_image_weights"
    with pytest.raises(WeightsError, match="1 missing:\n    visual.conv1.weight"):
        model.load_image_weights({k: v for k, v in other.state_dict().items() if k != "visual.conv1.weight"})
