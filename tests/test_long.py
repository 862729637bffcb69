"""Some frames at a time: the same features, less memory."""

import re

import pytest
import torch

import img2vid
import img2vid.grafts
from img2vid.config import ConfigError
from img2vid.footprint import Meter
from img2vid.temporal.infront import fronts_of
from tests.conftest import randomize, small_clip, small_eva, small_vit


def make(image_model=None, **settings):
    model = img2vid.convert(small_vit() if image_model is None else image_model, num_frames=4, **settings)
    return randomize(model, seed=3).eval()


@pytest.fixture
def long():
    return torch.randn(2, 11, 3, 32, 32, generator=torch.Generator().manual_seed(1))


MODELS = {
    "divided": lambda: make(),
    "causal": lambda: make(causal=True),
    "fused": lambda: make().fuse(),
    "some layers": lambda: make(temporal_layers="last:1"),
    "rotary": lambda: make(small_eva()),
    "encoder on top": lambda: make(attention="factorised_encoder", encoder_layers=1),
    "frames alone": lambda: make(attention="space_only"),
    "block input residual": lambda: make(quirks=("block_input_residual",)),
    "nothing to share": lambda: make(small_vit(class_token=False, global_pool="avg"), prefix_mode="shared"),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("number", [1, 3, 22, 100])
@torch.no_grad()
def test_the_same_features(kind, number, long):
    model = MODELS[kind]()
    whole, classes = model.frame_features(long), [type(block) for _, block in model.tower.blocks]
    model.set_frames_at_a_time(number)
    torch.testing.assert_close(model.frame_features(long), whole, atol=3e-6, rtol=1e-5)
    model.set_frames_at_a_time(None)
    assert [type(block) for _, block in model.tower.blocks] == classes
    assert torch.equal(model.frame_features(long), whole)


def peak(model, clips):
    with torch.no_grad(), Meter([*model.parameters(), clips]) as meter:
        model(clips)
    return meter.most_activations


def test_less_memory():
    model, clips = make(), torch.randn(1, 64, 3, 32, 32)
    tokens = 64 * 17 * 48 * 4
    at_once = peak(model, clips)
    model.set_frames_at_a_time(4)
    assert at_once > 8 * tokens > 5.5 * tokens > peak(model, clips)


def test_gradients_and_two_towers(long):
    model, plain = make(), make()
    model.set_frames_at_a_time(3)
    for each in (model, plain):
        each(long).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    clip = make(small_clip())
    with torch.no_grad():
        whole = clip.encode_video(long)
        clip.set_frames_at_a_time(3)
        assert "InParts" in [front.title for front in fronts_of(clip.visual.tower.blocks[0][1])]
        torch.testing.assert_close(clip.encode_video(long), whole, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"prefix_mode": "shared"}, {"prefix_mode": "global"}, {"attention": "joint_space_time"}],
    ids=str,
)
def test_frames_that_are_not_independent(settings):
    with pytest.raises(ConfigError, match="see all frames of a clip at once"):
        make(**settings).set_frames_at_a_time(4)
    with pytest.raises(ConfigError, match="number=0"):
        make().set_frames_at_a_time(0)


GRAFTS = {
    "adapter": ({"type": "adapter", "bottleneck": 8}, None),
    "lora": ({"type": "lora", "rank": 4}, None),
    "aim": ({"type": "aim"}, "may mix their frames|does not know how many"),
    "st_adapter": ({"type": "st_adapter", "bottleneck": 8}, "may mix their frames|does not know how many"),
}


@pytest.mark.parametrize("kind", GRAFTS)
@pytest.mark.parametrize("grafted_first", [True, False])
@torch.no_grad()
def test_grafts_that_mix_frames_are_never_run_on_a_part_of_them(kind, grafted_first, long):
    spec, refused = GRAFTS[kind]
    model = img2vid.convert(small_vit(), num_frames=4, grafts=[spec] if grafted_first else [])
    try:
        model.set_frames_at_a_time(3)
        if not grafted_first:
            img2vid.grafts.graft(model, [spec])
        randomize(model, seed=3).eval()
        found = model.frame_features(long)
    except (ConfigError, RuntimeError) as error:
        assert refused is not None and re.search(refused, str(error))
        return
    assert refused is None or not grafted_first  # put on later, they stand in front and see all frames
    model.set_frames_at_a_time(None)
    torch.testing.assert_close(found, model.frame_features(long), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"temporal_layers": "last:1"}], ids=str)
@pytest.mark.parametrize("trunk_only", [False, True])
@pytest.mark.parametrize("checkpointing_first", [False, True])
@torch.no_grad()
def test_beside_checkpointing(settings, trunk_only, checkpointing_first, long):
    """Which has nothing to do without gradients, in whatever order the two were asked for."""
    model = make(**settings)
    whole = model.frame_features(long)
    steps = [lambda: model.set_frames_at_a_time(3), lambda: model.set_grad_checkpointing(trunk_only=trunk_only)]
    for step in reversed(steps) if checkpointing_first else steps:
        step()
    for mode in (False, True):
        torch.testing.assert_close(model.train(mode).frame_features(long), whole, atol=3e-6, rtol=1e-5)
