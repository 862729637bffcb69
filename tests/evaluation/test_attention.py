"""Maps against the attention the model really uses, and a planted moving dot."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import img2vid
from img2vid.backbones.reading import block_kind, child, read_block
from img2vid.cli import main as cli
from img2vid.evaluation.attention import attention_maps
from img2vid.evaluation.capture import Recorder, capturing, weights_of
from img2vid.evaluation.dot import brightest, dot_seeker, self_test
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.layers import branch_ratios
from img2vid.plots import attention_figure
from tests.census.models import load_full_size, load_small
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


# smallest of their kind: rotary codes (of three classes, mixed per block), relative biases (own, shared), plain
KINDS = [
    "timm:vit_small_patch16_rope_mixed_224",
    "timm:vit_tiny_patch16_dinov3_qkvb",
    "timm:vit_pe_core_tiny_patch16_384",
    "timm:eva02_tiny_patch14_224",
    "timm:beit_base_patch16_224",
    "timm:vit_relpos_small_patch16_224",
    "timm:vit_srelpos_small_patch16_224",
    "timm:test_vit4",
    "open_clip:ViT-B-32",
    "open_clip:coca_ViT-B-32",
]


def small_video(name, num_frames=3, **settings):
    model = img2vid.convert(load_small(name, load_full_size(name).tower), num_frames=num_frames, **settings)
    torch.manual_seed(0)
    return model, torch.randn(1, num_frames, 3, *model.tower.image_size)


@pytest.mark.parametrize("name", KINDS)
def test_weights_applied_to_values_are_what_the_attention_gives(name):
    """The oracle: values and projection read from the weights, caught attention between them, the module's own output
    on the other side."""
    model, clip = small_video(name)
    block = model.tower.blocks[-1][1]
    attention, read = child(block, block_kind(block).attn), read_block(block)
    seen, given = [], {}
    attention.register_forward_pre_hook(lambda module, args: given.update(x=args[0]))
    attention.register_forward_hook(lambda module, args, out: given.update(out=out))
    with torch.no_grad(), Recorder(lambda weights: seen.append(weights) if "out" not in given else None):
        model.frame_features(clip)
        weights = seen[-1]  # (T, H, S, S): the last ones before it had an output
        x, out = given["x"], given["out"][0] if isinstance(given["out"], tuple) else given["out"]
        values = F.linear(x, read.qkv_weight, read.qkv_bias).chunk(3, dim=-1)[2]  # (T, S, D)
        y = (weights @ values.unflatten(-1, (read.num_heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
        y = y if read.inner_norm is None else read.inner_norm(y)
        torch.testing.assert_close(F.linear(y, read.proj_weight, read.proj_bias), out, atol=1e-4, rtol=1e-4)
    shown = attention_maps(model, clip)
    assert shown.refused is None and set(shown.rows()) == {"spatial", "temporal", "rollout"}
    assert 0 < float(shown.rollout.sum()) < 1 + 1e-5


def test_torchs_fast_path_is_seen_too():
    """Without gradients nn.MultiheadAttention may run as one call that shows nothing of itself."""
    model, clip = img2vid.convert(small_clip(), num_frames=2), torch.randn(1, 2, 3, 32, 32)
    expected = attention_maps(model, clip)
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        torch.testing.assert_close(attention_maps(model, clip).rollout, expected.rollout)
    finally:
        torch.backends.mha.set_fastpath_enabled(False)


def test_temporal_maps_are_the_attentions_own():
    """Weights applied to values and projected give what the module puts out."""
    attention = img2vid.convert(small_vit(), num_frames=3).tower.blocks[0][1].temporal_attn
    x, seen = torch.randn(3, 17, 48), []
    with torch.no_grad(), Recorder(seen.append):
        out = attention(x, 3)
        values = attention.qkv(x)[..., 96:].unflatten(-1, (4, 12))  # (T, S, H, head_dim)
        y = torch.einsum("shtu,ushd->tshd", seen[0][0], values)
        torch.testing.assert_close(out, attention.proj(y.flatten(2)), atol=1e-5, rtol=1e-4)


def test_weights_that_do_not_give_the_output_are_an_error():
    x = torch.randn(1, 2, 5, 8)
    mask = torch.rand(5, 5) > 0.3
    for options in ({}, {"scale": 0.7}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": mask.float()}):
        weights = weights_of(F.scaled_dot_product_attention(x, x, x, **options), x, x, x, **options)
        assert weights.shape == (1, 2, 5, 5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 5))
    grouped = {"query": x.repeat(1, 2, 1, 1), "key": x, "value": x, "enable_gqa": True}
    assert weights_of(F.scaled_dot_product_attention(**grouped), **grouped).shape == (1, 4, 5, 5)
    with pytest.raises(EvaluationError, match="do not give"):
        weights_of(torch.zeros_like(x), x, x, x)


MODES = [
    {},
    {"prefix_mode": "shared"},
    {"prefix_mode": "global"},
    {"attention": "joint_space_time"},
    {"attention": "joint_space_time", "prefix_mode": "shared"},
    {"attention": "space_only"},
    {"attention": "factorised_encoder", "encoder_layers": 2},
]


@pytest.mark.parametrize("settings", MODES, ids=lambda settings: "-".join(map(str, settings.values())) or "divided")
def test_rollout_is_a_product_of_matrices(settings):
    """Restated with one (T*S, T*S) matrix for each step, from output tokens to the input tokens they are made of."""
    T, S, model = 3, 17, randomize(img2vid.convert(small_vit(), num_frames=3, **settings), std=0.1)
    clip = torch.randn(1, T, 3, 32, 32)
    with torch.no_grad(), capturing(model) as found:
        model.frame_features(clip)
    joint, mode = model.config.attention == "joint_space_time", model.config.prefix_mode
    row = torch.full((T,), 1 / T)
    for layer in reversed(found.encoder):
        row = row @ (torch.eye(T) + layer.ratio * layer.temporal[0, 0]) / (1 + layer.ratio)
    share = torch.zeros(T * S)
    share[::S] = row  # the class token of each frame
    for layer in reversed(found.blocks):
        across = torch.zeros(T * S, T * S)
        columns = [t * S + s for t in range(T) for s in range(S)]
        if joint and mode == "shared":  # one class token, then all patches
            place = [[t * S for t in range(T)]] + [[t * S + s] for t in range(T) for s in range(1, S)]
            for i, rows in enumerate(place):
                for j, to in enumerate(place):
                    for a in rows:
                        across[a, to] = layer.attention[0][0, i, j] / len(to)
        elif joint:
            across = layer.attention[0][0]
        else:
            for t in range(T):
                for s in range(S):
                    across[t * S + s, t * S : (t + 1) * S] = layer.attention[0][t, s]
            if mode == "shared":
                across[::S] = across[::S].mean(0)
            if mode == "global":
                for t in range(T):
                    across[t * S] = 0
                    across[t * S, ::S] = layer.attention[1][0, 0, 0] / T
                    across[t * S, [c for c in columns if c % S]] = layer.attention[1][0, 0, 1:]
        share = share @ (0.5 * torch.eye(T * S) + 0.5 * across)
        if layer.temporal is not None:
            along, first = torch.eye(T * S), S - layer.temporal.shape[1]
            for s in range(first, S):
                for t in range(T):
                    along[t * S + s] /= 1 + layer.ratio
                    for u in range(T):
                        along[t * S + s, u * S + s] += (
                            layer.ratio / (1 + layer.ratio) * layer.temporal[0, s - first, t, u]
                        )
            share = share @ along
    maps = attention_maps(model, clip)
    torch.testing.assert_close(maps.rollout, share.view(T, S)[:, 1:].unflatten(1, (4, 4)))
    assert float(share.sum()) == pytest.approx(1.0, abs=1e-5)
    assert (maps.temporal is None) == (settings.get("attention") == "space_only")
    if maps.temporal is not None:
        torch.testing.assert_close(maps.frame_to_frame.sum(1), torch.ones(T))


def test_ratio_is_what_the_branch_adds():
    model = randomize(img2vid.convert(small_vit(), num_frames=3), std=0.1)
    clip = torch.randn(1, 3, 3, 32, 32)
    with torch.no_grad(), capturing(model) as found:
        model.frame_features(clip)
    expected = [entry["branch_to_residual"] for entry in branch_ratios(model, [clip])]
    assert [layer.ratio for layer in found.blocks] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("pool", "class_token", "read"), [("token", True, [0]), ("avg", True, range(1, 17)), ("avg", False, range(16))]
)
def test_the_rollout_starts_where_the_pooling_reads(pool, class_token, read):
    """A class token that the feature does not depend on is no query, and without one all patches are."""
    model = img2vid.convert(small_vit(class_token=class_token, global_pool=pool), num_frames=2)
    clip = torch.randn(1, 2, 3, 32, 32)
    with torch.no_grad(), capturing(model) as found:
        model.frame_features(clip)
    assert [i for i, does in enumerate(found.reads[0].tolist()) if does] == list(read)
    expected = found.blocks[-1].attention[0][:, list(read), int(class_token) :].mean(1).unflatten(1, (4, 4))
    torch.testing.assert_close(attention_maps(model, clip).spatial, expected)


@pytest.mark.parametrize("name", ["timm:vit_base_patch16_siglip_224", "open_clip:coca_ViT-B-32"])
def test_an_attention_pool_says_what_it_reads(name):
    model, clip = small_video(name)
    with torch.no_grad(), capturing(model) as found:
        model.frame_features(clip)
    pool, last = found.pooling[-1][:, 0], found.blocks[-1].attention[0]
    expected = torch.einsum("ts,tsu->tu", pool, last)[:, -4:]  # test models see 2 x 2 patches
    torch.testing.assert_close(attention_maps(model, clip).spatial, expected.unflatten(1, (2, 2)))


def test_what_is_no_share_is_refused_by_name_and_time_is_still_shown():
    model, clip = small_video("timm:cait_xxs24_224")
    maps = attention_maps(model, clip)
    assert maps.spatial is None and maps.rollout is None
    assert "LayerScaleBlock" in maps.refused and "mixes its heads" in maps.refused
    assert list(maps.rows()) == ["temporal"] and maps.temporal.shape == (3, 2, 2)


def test_one_clip_is_asked_for():
    with pytest.raises(EvaluationError, match="Expected one clip"):
        attention_maps(img2vid.convert(small_vit(), num_frames=2), torch.randn(2, 2, 3, 32, 32))


def test_frames_are_drawn_under_their_own_numbers():
    maps = torch.rand(40, 2, 2)
    figure = attention_figure(np.zeros((40, 8, 8, 3)), {"spatial": maps, "temporal": maps}, torch.rand(40, 40))
    titles = [axis.get_title() for axis in figure.axes if axis.get_title().isdecimal()]
    assert len(titles) == 16 and titles[0] == "0" and titles[-1] == "39"
    drawn = figure.axes[17 + 15].images[1].get_array()  # the last frame of the second row of 17
    assert np.array_equal(drawn, maps[39])
    assert np.array_equal(figure.axes[2 * 17 + 16].images[0].get_array().shape, (40, 40))


def test_command(nano_folder, motion, tmp_path, capsys):
    out = tmp_path / "attention.png"
    video = str(motion / "videos" / "test-000000.mp4")
    assert cli(["plot", "attention", "--model", str(nano_folder), "--video", video, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert cli(["plot", "attention", "--self-test"]) == 0
    assert "lights up" in capsys.readouterr().out
