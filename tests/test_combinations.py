"""Settings, libraries and modes in combination: each pair here once crashed, or was quietly wrong."""

import copy
import functools
from unittest import mock

import open_clip
import pytest
import timm
import torch
from torch import nn

import img2vid
from img2vid.backbones.any_size import set_cait_size
from img2vid.backbones.tower import structural_copy
from img2vid.clips import ClipError
from img2vid.config import ConfigError, VideoConfig
from img2vid.errors import BackboneError
from img2vid.model import VideoModel
from img2vid.two_towers import VideoTextModel
from tests.conftest import randomize, small_clip, small_vit

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 0}
CUSTOM_VISION = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32, "block_type": "custom"}
DROPS = {"proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "pos_drop_rate": 0.3, "drop_path_rate": 0.3}


def small_eva(**kwargs):
    torch.manual_seed(0)
    return randomize(timm.models.eva.Eva(**{**SHAPE, "use_rot_pos_emb": True, **kwargs})).eval()


def small_beit(**kwargs):
    torch.manual_seed(0)
    return randomize(timm.models.beit.Beit(**{**SHAPE, **kwargs})).eval()


def small_cait(**kwargs):
    torch.manual_seed(0)
    return randomize(timm.models.cait.Cait(**{**SHAPE, **kwargs})).eval()


def plain_eva(**kwargs):
    return small_eva(use_rot_pos_emb=False, **kwargs)


def custom_tower():
    return small_clip(vision_cfg={**CUSTOM_VISION, "qk_norm": True, "scale_attn_inner": True}).visual


def small_coca():
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32, "output_tokens": True}
    vision |= {"attentional_pool": True, "attn_pooler_heads": 4}
    text = {"context_length": 16, "vocab_size": 200, "width": 64, "heads": 2, "layers": 2, "embed_cls": True}
    text |= {"output_tokens": True}
    multimodal = {"context_length": 16, "vocab_size": 200, "width": 64, "heads": 2, "layers": 2}
    model = open_clip.coca_model.CoCa(64, multimodal, text, vision)
    torch.nn.init.zeros_(model.text_decoder.text_projection)  # open_clip leaves whatever was in memory, nan at times
    return randomize(model).eval()


def small_timm_clip(name, **kwargs):
    """open_clip's own class around a timm tower that was built for one size."""
    vision = {"timm_model_name": name, "timm_pool": "token", "timm_proj": "linear", "image_size": 32}
    text = {"context_length": 16, "vocab_size": 200, "width": 32, "heads": 2, "layers": 2}
    shape = {key: SHAPE[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    create = functools.partial(timm.create_model, **{**shape, **kwargs})
    with mock.patch.object(timm, "create_model", create):
        return randomize(open_clip.CustomTextCLIP(embed_dim=24, vision_cfg=vision, text_cfg=text)).eval()


# ---- prefix tokens of a clip


@pytest.mark.parametrize("prefix_mode", ["shared", "global"])
@pytest.mark.parametrize(
    "make_tower",
    [
        functools.partial(small_vit, reg_tokens=2, **DROPS),
        functools.partial(plain_eva, **DROPS),
        functools.partial(plain_eva, qkv_fused=False, **DROPS),
        functools.partial(plain_eva, use_post_norm=True, **DROPS),
        custom_tower,
    ],
    ids=["vit", "eva", "eva split", "eva post-norm", "open_clip custom"],
)
def test_copies_of_a_clips_prefix_stay_equal_under_dropout(make_tower, prefix_mode, clips):
    video = VideoModel(make_tower(), VideoConfig(prefix_mode=prefix_mode, temporal_layers="last:1"))
    randomize(video, seed=9).train()
    seen = []
    for _, block in video.tower.blocks:
        block.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
    video.frame_features(clips)
    for tokens in seen:
        prefix = tokens.detach().unflatten(0, (2, 3))[:, :, : video.tower.num_prefix_tokens]
        assert torch.equal(prefix, prefix[:, :1].expand_as(prefix))


def test_global_prefix_obeys_dropout(clips):
    """Attention and projection dropout at rate 1 leave nothing of the class token's update, as in the image block."""
    video = VideoModel(small_vit(depth=1), VideoConfig(prefix_mode="global"))
    attention, got = video.blocks[0].attn.train(), []
    attention.register_forward_hook(lambda module, args, output: got.append(output.detach()))
    tokens = torch.randn(6, 17, 48)
    with torch.no_grad(), video.clip.of(3):
        attention.attn_drop.p = 1.0
        attention(tokens)
        attention.attn_drop.p, attention.proj_drop.p = 0.0, 1.0
        attention(tokens)
    assert torch.equal(got[0], attention.proj.bias.detach().expand_as(got[0]))
    assert torch.equal(got[1], torch.zeros_like(got[1]))


class LowRank(nn.Module):
    """What a LoRA library puts in the place of a projection."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.delta = linear, nn.Linear(linear.in_features, linear.out_features, bias=False)

    def forward(self, x):
        return self.linear(x) + self.delta(x)


@pytest.mark.parametrize("name", ["qkv", "proj"])
def test_global_prefix_sees_what_is_wrapped_around_projections(name, clips):
    video = VideoModel(small_vit(depth=1, global_pool="token"), VideoConfig(prefix_mode="global"))
    attention = video.blocks[0].attn
    setattr(attention, name, LowRank(getattr(attention, name)))
    with torch.no_grad():
        before = video(clips[:1, :1])
        getattr(attention, name).delta.weight.normal_(generator=torch.Generator().manual_seed(0))
        assert not torch.allclose(video(clips[:1, :1]), before, atol=1e-3)
        one_frame = video(clips[:1, :1])
        video.config = VideoConfig()
        for hooked in (attention, *video.blocks):
            hooked._forward_hooks.clear()  # the image model again, as T is 1
        torch.testing.assert_close(video(clips[:1, :1]), one_frame, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_shared", [True, False])
def test_global_prefix_refuses_relative_positions(use_shared):
    with pytest.raises(ConfigError, match="relative bias positions .* Use per_frame or shared"):
        img2vid.convert(small_beit(use_shared_rel_pos_bias=use_shared), prefix_mode="global")


@pytest.mark.parametrize(
    "make_tower",
    [
        functools.partial(small_vit, qk_norm=True, scale_attn_norm=True),
        functools.partial(plain_eva, scale_attn_inner=True),
        functools.partial(plain_eva, qkv_fused=False),
        custom_tower,
    ],
    ids=["vit", "eva", "eva split", "open_clip custom"],
)
def test_global_prefix_is_certified_for_every_plain_attention(make_tower):
    image_model = make_tower()
    reference = structural_copy(image_model)
    model = img2vid.convert(image_model, prefix_mode="global", num_frames=2)
    assert img2vid.certify(model, reference, num_frames=(1, 2)).ok


# ---- joint attention with rotary positions


@pytest.mark.parametrize("rope_type", ["cat", "mixed", "dinov3"])
def test_joint_attention_with_rotary_codes_and_patch_dropout(rope_type):
    settings = {"attention": "joint_space_time"}
    image_model = small_eva(rope_type=rope_type, class_token=False, global_pool="avg", patch_drop_rate=0.5)
    video = VideoModel(image_model, VideoConfig(**settings)).train()
    frames = torch.randn(2, 1, 3, 32, 32)

    def run(num_frames, seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return video(frames.expand(-1, num_frames, -1, -1, -1))

    # a static clip is its frame, where both keep the same patches
    torch.testing.assert_close(run(3, seed=0), run(1, seed=0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run(3, seed=0), run(3, seed=1), atol=1e-2)
    shared = VideoModel(
        small_eva(rope_type=rope_type, patch_drop_rate=0.5), VideoConfig(prefix_mode="shared", **settings)
    )
    assert shared.train()(torch.randn(2, 3, 3, 32, 32)).shape == (2, 48)


# ---- other sizes in forward


@pytest.mark.parametrize("size", [(64, 32), (24, 40)])
@pytest.mark.parametrize(
    "make_tower",
    [
        small_vit,
        small_cait,
        functools.partial(small_eva, rope_type="cat"),
        functools.partial(small_eva, rope_type="mixed"),
        functools.partial(small_eva, rope_type="dinov3"),
    ],
    ids=["vit", "cait", "eva", "eva mixed", "eva dinov3"],
)
def test_modules_built_for_one_size_take_others(make_tower, size):
    """Against timm's own resizing at load; and back at the size it was built for, every bit is as before."""
    image_model = make_tower()
    reference, resized = copy.deepcopy(image_model), copy.deepcopy(image_model)
    set_cait_size(resized, size) if isinstance(resized, timm.models.cait.Cait) else resized.set_input_size(size)
    video = VideoModel(image_model, VideoConfig()).eval()
    other, native = torch.randn(1, 2, 3, *size), torch.randn(1, 2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(video(other), resized(other[0]).mean(0, keepdim=True), atol=1e-6, rtol=1e-6)
        assert torch.equal(video(native), reference(native[0]).mean(0, keepdim=True))
        assert torch.equal(copy.deepcopy(video)(other), video(other))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_timm_towers_of_open_clip_take_any_size(name):
    model = small_timm_clip(name)
    reference = copy.deepcopy(model)
    reference.visual.set_input_size((48, 64))
    video = VideoTextModel(model, VideoConfig())
    clips = torch.randn(1, 2, 3, 48, 64)
    with torch.no_grad():
        expected = reference.encode_image(clips[0]).mean(0, keepdim=True)
        torch.testing.assert_close(video.encode_video(clips), expected, atol=1e-6, rtol=1e-6)


def test_cait_is_resized_at_load_with_its_weights(tmp_path):
    name = "timm:cait_xxs24_224"
    model = img2vid.convert(name, random_weights=True, image_size=(64, 96), backbone_args={"depth": 1})
    assert model.pos_embed.shape == (1, 4 * 6, 192)
    model.save_pretrained(tmp_path / "m")
    again = img2vid.load(tmp_path / "m")
    clips = torch.randn(1, 2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(again(clips), model(clips))


@pytest.mark.parametrize("make_tower", [small_vit, small_eva])
@pytest.mark.parametrize("dynamic", [True, False])
def test_sizes_that_the_backbone_pads(make_tower, dynamic):
    image_model = make_tower(dynamic_img_pad=True, dynamic_img_size=dynamic)
    reference = make_tower(dynamic_img_pad=True, dynamic_img_size=True)
    video = VideoModel(image_model, VideoConfig()).eval()
    clips = torch.randn(1, 2, 3, 30, 45)
    with torch.no_grad():
        assert torch.equal(video(clips), reference(clips[0]).mean(0, keepdim=True))


def test_relative_positions_say_how_to_convert_for_another_size():
    model = img2vid.convert(
        "timm:beit_base_patch16_224", random_weights=True, backbone_args={"depth": 1, "embed_dim": 48}
    )
    with pytest.raises(ClipError, match="--backbone timm:beit_base_patch16_224 --image-size 64x96"):
        model(torch.zeros(1, 2, 3, 64, 96))


# ---- conventions of open_clip


@pytest.fixture
def text():
    return torch.randint(1, 200, (2, 16), generator=torch.Generator().manual_seed(2))


def test_forward_returns_what_clip_returns(clips, text):
    image_model = small_clip()
    reference = copy.deepcopy(image_model)
    model = VideoTextModel(image_model, VideoConfig())
    with torch.no_grad():
        features, text_features, scale = model(clips, text)
        assert torch.equal(features, model.encode_video(clips, normalize=True))
        assert torch.equal(text_features, reference(clips[:, 0], text)[1])
        assert torch.equal(scale, reference.logit_scale.exp())
        assert model(text=text)[0] is None
        model.output_dict = True
        assert set(model(clips, text)) == {"image_features", "text_features", "logit_scale"}
        loss = open_clip.ClipLoss()(**model(clips, text))
    assert loss.isfinite()


def test_coca_captions_a_clip(clips, text):
    """The decoder sees image tokens averaged over frames, so a static clip is captioned as its frame is."""
    image_model = small_coca()
    reference = copy.deepcopy(image_model)
    model = VideoTextModel(image_model, VideoConfig())
    with torch.no_grad():
        got = model(clips[:, :1].expand(-1, 2, -1, -1, -1), text)
        expected = reference(clips[:, 0], text)
        moving = model(clips, text)["logits"]
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-5, rtol=1e-5)
    assert moving.shape == expected["logits"].shape
    assert not torch.allclose(moving, got["logits"], atol=1e-3)


@pytest.mark.parametrize("make_model", [small_clip, small_coca])
def test_features_are_normalised_where_the_class_does_so(make_model, clips, text):
    image_model = make_model()
    reference = copy.deepcopy(image_model)
    model = VideoTextModel(image_model, VideoConfig())
    frame = clips[:, 0]
    with torch.no_grad():
        assert torch.equal(model.encode_image(frame), reference.encode_image(frame))
        assert torch.equal(model.encode_text(text), reference.encode_text(text))
        for normalize in (True, False):
            expected = reference.encode_image(frame, normalize=normalize)
            assert torch.equal(model.encode_video(clips[:, :1], normalize=normalize), expected)
        certificate = img2vid.certify(model, reference, num_frames=(1, 2))
    assert certificate.ok
    assert certificate.text_difference == 0.0


def test_images_are_tubelets_of_equal_frames():
    image_model = small_clip()
    reference = copy.deepcopy(image_model)
    model = VideoTextModel(image_model, VideoConfig(tubelet_size=2))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), reference.encode_image(images))


@pytest.mark.parametrize("unlocked_groups", [0, 1, 2])
@pytest.mark.parametrize("make_model", [small_clip, functools.partial(small_timm_clip, "vit_tiny_patch16_224")])
def test_locking_the_image_tower_keeps_time_trainable(make_model, unlocked_groups):
    image_model = make_model()
    reference = copy.deepcopy(image_model)
    reference.lock_image_tower(unlocked_groups=unlocked_groups)
    model = VideoTextModel(image_model, VideoConfig())
    model.visual.time_embed.requires_grad_(False)  # frozen by hand, and staying so
    model.lock_image_tower(unlocked_groups=unlocked_groups)
    trainable = {name for name, p in model.visual.named_parameters() if p.requires_grad}
    about_time = {name for name, _ in model.visual.named_parameters() if model.origin(name) != "pretrained"}
    assert trainable & about_time == about_time - {"time_embed"}
    if make_model is small_clip:
        assert trainable - about_time == {n for n, p in reference.visual.named_parameters() if p.requires_grad}
    elif unlocked_groups == 0:
        assert not any(name.startswith("trunk.") for name in trainable - about_time)


def test_locking_without_a_library_that_locks_says_what_freezes():
    with pytest.raises(BackboneError, match=r"VisionTransformer has no lock.*tuning.freeze\(model, 'temporal_only'\)"):
        VideoModel(small_vit(), VideoConfig()).lock()


def test_attributes_set_on_the_video_model_reach_the_image_model(clips):
    model = VideoTextModel(small_clip(), VideoConfig())
    model.visual.output_tokens = True
    pooled, tokens = model.visual(clips)
    assert (pooled.shape, tokens.shape) == ((2, 24), (2, 16, 64))
    model.logit_bias = nn.Parameter(torch.zeros([]))
    assert model.base.logit_bias is model.logit_bias
    assert "logit_bias" in model.state_dict()
    model.note = "mine"
    assert not hasattr(model.base, "note")
    model.visual.config = VideoConfig(num_frames=2)  # the video model's own, whatever the base has
    assert model.visual.config.num_frames == 2


def test_checkpointing_is_switched_by_every_door(clips, text):
    model = VideoTextModel(small_coca(), VideoConfig())
    model.set_grad_checkpointing()
    assert model.visual.grad_checkpointing
    assert model.base.text.transformer.grad_checkpointing
    assert model.base.text_decoder.grad_checkpointing
    model.train()(clips, text)["logits"].sum().backward()
    model.visual.grad_checkpointing = False
    assert not model.visual.grad_checkpointing
    video = VideoModel(small_vit(), VideoConfig()).train()
    video.base.grad_checkpointing = True  # timm's own, past the video model
    with pytest.raises(RuntimeError, match="set_grad_checkpointing"):
        video(clips).sum().backward()


def test_gates_of_a_two_tower_model_close(clips):
    image_model = small_clip()
    reference = copy.deepcopy(image_model)
    model = VideoTextModel(image_model, VideoConfig())
    gates = model.zero_parameters()
    assert set(gates) <= set(dict(model.named_parameters()))
    with torch.no_grad():
        for gate in gates.values():
            gate.add_(torch.randn_like(gate))
        frames = reference.encode_image(clips.flatten(0, 1)).unflatten(0, (2, 3)).mean(1)
        assert not torch.allclose(model.encode_video(clips), frames, atol=1e-3)
        with model.gates_closed():
            assert torch.equal(model.encode_video(clips), frames)
        assert not torch.allclose(model.encode_video(clips), frames, atol=1e-3)


@pytest.mark.parametrize("scale", ["ignored", "one-dimensional"])
def test_fsdp2_shards_two_tower_models(scale, clips, text, tmp_path):
    """The recipe of docs/performance.md, in one process."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = VideoTextModel(small_clip(nonscalar_logit_scale=scale == "one-dimensional"), VideoConfig())
    reference = copy.deepcopy(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for block in [*model.visual.transformer.resblocks, *model.transformer.resblocks]:
            fully_shard(block, mesh=mesh)
        options = {"ignored_params": {model.logit_scale}} if scale == "ignored" else {}
        fully_shard(model, mesh=mesh, **options)
        for method in ("encode_video", "encode_text"):
            register_fsdp_forward_method(model, method)
        out = model(clips, text)
        torch.testing.assert_close(out, reference(clips, text))
        (out[0] @ out[1].T * out[2]).sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "temporal_fc" in name)
        torch.testing.assert_close(model.encode_video(clips), reference.encode_video(clips))
    finally:
        dist.destroy_process_group()


# ---- what is refused


def test_two_classifiers_are_refused():
    image_model = small_vit(num_classes=10)
    with pytest.raises(ConfigError, match=r"10 logits.*reset_classifier\(0\)"):
        img2vid.convert(image_model, num_classes=5)
    assert image_model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)  # as it was
    assert img2vid.convert(image_model)(torch.zeros(1, 2, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("settings", [{"attention": "space_only"}, {"attention": "factorised_encoder"}], ids=str)
def test_no_second_conversion_even_where_blocks_are_untouched(settings):
    image_model = small_vit()
    VideoModel(image_model, VideoConfig(**settings))
    with pytest.raises(img2vid.Img2VidError, match="already is part of a video model"):
        VideoModel(image_model, VideoConfig())


def test_dtypes_that_do_not_fit(clips):
    model = VideoModel(small_vit(), VideoConfig())
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(ClipError, match=rf"dtype {dtype} were given to a model of torch.float32.*autocast"):
            model(clips.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(clips.bfloat16()).shape == (2, 48)
    assert model.double()(clips.double()).dtype == torch.float64


def test_pixels_that_are_none():
    model = VideoModel(small_vit(), VideoConfig())
    pixels = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(model.normalize(pixels.float()), model.normalize(pixels))
    assert model.normalize(torch.zeros(1, 2, 3, 8, 8)).shape == (1, 2, 3, 8, 8)
    with pytest.raises(ClipError, match=r"Colours come last here.*clips.movedim\(-1, -3\)"):
        model.normalize(pixels.movedim(-3, -1))
    with pytest.raises(ClipError, match=r"expected \(\.\.\., 3, H, W\)"):
        model.normalize(pixels[:, :, 0])
    with pytest.raises(ClipError, match=r"expected 0..255.*model.normalize\(clips \* 255\)"):
        model.normalize(pixels / 255)
