"""Maps against the attention the model really uses, and a planted moving dot."""

import pytest
import timm
import torch

import img2vid
from img2vid.cli import main as cli
from img2vid.evaluation.attention import attention_maps, brightest, dot_seeker, self_test, softmax_attention
from img2vid.evaluation.errors import EvaluationError
from tests.conftest import randomize, small_clip, small_vit


@pytest.mark.parametrize("num_frames", [1, 5])
def test_a_planted_moving_dot_lights_up(num_frames):
    assert self_test(num_frames)
    model, clip, places = dot_seeker(num_frames)
    assert len(set(places)) == num_frames and all(row != column for row, column in places[:3])
    still = clip[:, :1].expand_as(clip)
    assert brightest(attention_maps(model, still).rollout) == places[:1] * num_frames
    assert brightest(attention_maps(model, clip.flip(1)).rollout) == places[::-1]


def test_the_dot_lights_up_along_time_too():
    """A dot that stands where it is in two frames only is what the other frames look at, there."""
    model, clip, places = dot_seeker(4)
    maps = attention_maps(model, clip)
    assert brightest(maps.temporal) == places
    with torch.no_grad():
        for _, block in model.tower.blocks:
            block.temporal_fc.weight.copy_(torch.eye(16) * 0.5)
            block.temporal_attn.qkv.weight[32:] = torch.eye(16)
            block.temporal_attn.proj.weight.copy_(torch.eye(16))
    opened = attention_maps(model, clip)
    assert brightest(opened.rollout) == places and not torch.allclose(opened.rollout, maps.rollout, atol=1e-4)


def test_spatial_maps_are_timms_own_weights():
    """With fused attention off, timm multiplies by the very matrix that the map shows."""
    vit = small_vit()
    model = img2vid.convert(vit, num_frames=2)
    clip = torch.randn(1, 2, 3, 32, 32)
    last, caught = vit.blocks[-1].attn, {}
    last.fused_attn = False
    last.attn_drop.register_forward_hook(lambda m, args, out: caught.update(weights=args[0]))
    maps = attention_maps(model, clip)
    expected = caught["weights"].mean(1)[:, 0, 1:].unflatten(1, (4, 4)).detach()
    torch.testing.assert_close(maps.spatial, expected, atol=1e-6, rtol=1e-5)


def test_spatial_maps_are_open_clips_own_weights():
    model = img2vid.convert(small_clip(), num_frames=2)
    clip = torch.randn(1, 2, 3, 32, 32)
    _, block = model.visual.tower.blocks[-1]
    caught = {}
    block.ln_1.register_forward_hook(lambda m, args, out: caught.update(x=out))
    maps = attention_maps(model, clip)
    x = caught["x"].detach()
    with torch.no_grad():
        _, weights = block.attn(x, x, x, need_weights=True)
    torch.testing.assert_close(maps.spatial, weights[:, 0, 1:].unflatten(1, (4, 4)), atol=1e-6, rtol=1e-5)


def test_temporal_maps_are_the_attentions_own():
    """Weights applied to values and projected give what the module puts out, with one head."""
    vit = randomize(timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=1, num_classes=0))  # fmt: skip
    attention = img2vid.convert(vit, num_frames=3).tower.blocks[0][1].temporal_attn
    x = torch.randn(3, 17, 24)
    with torch.no_grad():
        weights = softmax_attention(attention, x.transpose(0, 1))  # (17, 3, 3)
        values = attention.qkv(x)[..., 48:]
        expected = attention.proj(torch.einsum("stu,usd->tsd", weights, values))
        torch.testing.assert_close(attention(x, 3), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "settings", [{}, {"prefix_mode": "shared"}, {"temporal_layers": "last:1"}, {"tubelet_size": 2}]
)
def test_shares_add_up(settings):
    model = img2vid.convert(small_vit(class_token=False, global_pool="avg"), num_frames=4, **settings)
    randomize(model)
    maps = attention_maps(model, torch.randn(1, 4, 3, 32, 32))
    assert float(maps.rollout.sum()) == pytest.approx(1.0, abs=1e-4)  # no prefix tokens: patches have it all
    assert maps.rollout.shape == maps.spatial.shape == (4 // settings.get("tubelet_size", 1), 4, 4)
    torch.testing.assert_close(maps.frame_to_frame.sum(1), torch.ones(len(maps.rollout)))


def test_closed_gates_leave_the_image_models_rollout():
    clip = torch.randn(1, 3, 3, 32, 32)
    closed = attention_maps(img2vid.convert(small_vit(), num_frames=3), clip).rollout
    image = attention_maps(img2vid.convert(small_vit(), num_frames=3, attention="space_only"), clip)
    torch.testing.assert_close(closed, image.rollout)
    assert image.temporal is None and list(image.rows()) == ["spatial", "rollout"]


@pytest.mark.parametrize("settings", [{"attention": "joint_space_time"}, {"prefix_mode": "global"}])
def test_attention_over_all_frames_is_refused(settings):
    model = img2vid.convert(small_vit(), num_frames=2, **settings)
    with pytest.raises(EvaluationError, match="looks at all frames"):
        attention_maps(model, torch.randn(1, 2, 3, 32, 32))


def test_rotary_attention_is_refused():
    eva = timm.create_model("eva02_tiny_patch14_224", pretrained=False, num_classes=0, depth=2, img_size=28)
    with pytest.raises(EvaluationError, match="positions or an order of its own"):
        attention_maps(img2vid.convert(eva, num_frames=2), torch.randn(1, 2, 3, 28, 28))


def test_command(nano_folder, motion, tmp_path, capsys):
    out = tmp_path / "attention.png"
    video = str(motion / "videos" / "test-000000.mp4")
    assert cli(["plot", "attention", "--model", str(nano_folder), "--video", video, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert cli(["plot", "attention", "--self-test"]) == 0
    assert "lights up" in capsys.readouterr().out
