"""More input channels: one wide convolution by hand, tubelets, normalisation, and who counts channels."""

import pytest
import torch

import img2vid
from img2vid.certificate import certify
from img2vid.grafts import GraftError, graft, read_graft, remove
from tests.conftest import small_clip, small_eva, small_vit
from tests.test_grafts import features, push
from tests.test_transformers import make as make_hf


@pytest.mark.parametrize("make", [small_vit, small_eva, lambda: small_clip().visual], ids=["vit", "eva", "clip"])
@torch.no_grad()
def test_it_is_one_convolution_of_all_channels(make):
    model = push(
        img2vid.convert(make(), num_frames=2, attention="space_only", grafts=[{"type": "channels", "more": 3}])
    )
    conv = model.tower.patch_conv
    x = torch.randn(2, 6, 32, 32)
    wide = torch.cat([conv.weight, conv.graft_channels.zero_weight], dim=1)
    expected = torch.nn.functional.conv2d(x, wide, conv.bias, stride=8)
    torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-5)
    assert conv.graft_channels.zero_weight.numel() == conv.out_channels * 3 * 8 * 8


@torch.no_grad()
def test_in_tubelets_each_frame_has_its_own():
    settings = {"num_frames": 4, "tubelet_size": 2}
    model = img2vid.convert(small_vit(), **settings, grafts=[{"type": "channels", "more": 1}])
    certificate = certify(model, small_vit(), num_frames=[1, 2], at_step_0=True)
    assert certificate.ok and certificate.alive
    clips = torch.randn(1, 4, 4, 32, 32)
    plain = img2vid.convert(small_vit(), **settings)
    assert torch.equal(model(clips), plain(clips[:, :, :3]))
    push(model)
    seen = [model(clips)]
    for frame in range(2):
        other = clips.clone()
        other[:, frame, 3] += 1
        seen.append(model(other))
    assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])


@torch.no_grad()
def test_only_zeros_in_the_new_channels_change_nothing_even_when_trained():
    model = push(img2vid.convert(small_vit(), attention="space_only", grafts=["channels"]))
    rgb = torch.randn(2, 3, 3, 32, 32)
    plain = img2vid.convert(small_vit(), attention="space_only")
    torch.testing.assert_close(model(torch.cat([rgb, torch.zeros(2, 3, 2, 32, 32)], dim=2)), plain(rgb))


def test_pixels_and_shapes_are_told_by_the_number_of_channels(tmp_path):
    spec = {"type": "channels", "more": 2, "mean": [0.5, 0.0], "std": [0.25, 1.0]}
    model = img2vid.convert("nano_clip", num_frames=2, grafts=[spec])
    pixels = torch.full((2, 5, 32, 32), 255, dtype=torch.uint8)
    assert torch.equal(model.normalize(pixels)[:, 3:], torch.tensor([2.0, 1.0]).view(1, 2, 1, 1).expand(2, 2, 32, 32))
    with pytest.raises(img2vid.Img2VidError, match="Frames with 3 channels were given, expected 5"):
        model.encode_video(torch.randn(1, 2, 3, 32, 32))
    model.save_pretrained(tmp_path)
    again = img2vid.load(tmp_path)
    assert again.visual.tower.preprocess.mean[3:] == (0.5, 0.0) and again.visual.tower.in_channels == 5
    remove(again)
    assert again.visual.tower.in_channels == 3 and len(again.visual.tower.preprocess.std) == 3
    features(again)


def test_transformers_which_counts_channels_itself():
    model = img2vid.convert(make_hf("Dinov2Model"), num_frames=2, grafts=["channels"])
    assert certify(model, make_hf("Dinov2Model"), num_frames=[1, 2]).ok
    remove(model)
    features(model)


def test_two_modalities_one_after_the_other():
    model = img2vid.convert(small_vit(), num_frames=2, grafts=[{"type": "channels", "more": 2}])
    graft(model, [{"type": "channels", "more": 1, "name": "depth"}])
    assert model.tower.in_channels == 6 and certify(model, small_vit(), num_frames=[1, 2]).ok
    features(push(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"more": 0}, "more=0"), ({"mean": [0.5]}, "expected one number, or 2"), ({"std": 0.0}, "std=0.0")],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(img2vid.Img2VidError, match=message):
        img2vid.convert(small_vit(), grafts=[{"type": "channels", **options}])


def test_patches_that_are_no_convolution(monkeypatch):
    model = img2vid.convert(small_vit())
    model.tower.patch_conv = None
    with pytest.raises(GraftError, match="do not come from one plain convolution"):
        graft(model, ["channels"])
    assert model.config.grafts == () and model.tower.in_channels == 3


@pytest.mark.parametrize("first", ["flow", "depth"])
@torch.no_grad()
def test_modalities_leave_in_any_order_with_their_pixel_statistics(first):
    flow = {"type": "channels", "name": "flow", "more": 2, "mean": [0.1, 0.2]}
    depth = {"type": "channels", "name": "depth", "more": 1, "mean": 0.3, "std": 0.7}
    model = push(img2vid.convert(small_vit(), num_frames=2, grafts=[flow, depth]))
    clip = torch.randn(1, 2, 6, 32, 32)
    left, kept = (depth, [0, 1, 2, 5]) if first == "flow" else (flow, [0, 1, 2, 3, 4])
    remove(model, first)
    assert model.tower.in_channels == len(kept) and model.tower.preprocess.mean[3:] == tuple(read_graft(left).mean)
    never = img2vid.convert(small_vit(), num_frames=2, grafts=[left])
    never.load_state_dict(model.state_dict())
    assert torch.equal(model(clip[:, :, kept]), never(clip[:, :, kept]))
    remove(model)
    assert model.tower.in_channels == 3 and model.tower.preprocess == img2vid.convert(small_vit()).tower.preprocess
