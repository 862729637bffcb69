import copy

import open_clip
import pytest
import timm
import torch
from open_clip.pretrained import get_pretrained_cfg
from safetensors.torch import save_file

import img2vid
from img2vid.backbones import load_backbone, wrap_module
from img2vid.backbones.from_open_clip import draw_projection, tag_arguments
from img2vid.backbones.hub import WeightsUnavailable
from img2vid.backbones.names import ALIASES, parse_name
from img2vid.errors import BackboneError, WeightsError
from tests.conftest import randomize, small_clip


@pytest.mark.parametrize("alias", [a for a in ALIASES if a != "nano_clip"])
def test_aliases_name_weights_that_exist(alias):
    name = parse_name(alias)
    if name.library == "timm":
        assert f"{name.architecture}.{name.tag}" in timm.list_pretrained()
    else:
        assert get_pretrained_cfg(name.architecture, name.tag)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_bse", "Did you mean 'vit_base'"),
        ("vit_base_patch16_224", "'timm:vit_base_patch16_224'"),
        ("timm:vit_base_patch16_225", "no model 'vit_base_patch16_225'.*'vit_base_patch16_224'"),
        ("timm:vit_base_patch16_224.imagenet", "no weights 'imagenet'.*It has: .*augreg_in21k"),
        ("open_clip:ViT-B-17", "no model 'ViT-B-17'.*'ViT-B-16'"),
        ("open_clip:ViT-B-16/opnai", "no weights 'opnai'.*It has: openai"),
        ("open_clip:ViT-B-16", "names no weights. Add a tag"),
        ("jax:something", "Unknown backbone 'jax:something'"),
        ("timm:", "Unknown backbone"),
        ("", "Unknown backbone"),
        ("timm:resnet50", "ResNet cannot become a video model: it has no flat list"),
        ("timm:swin_tiny_patch4_window7_224", "SwinTransformer cannot become a video model"),
        ("timm:xcit_nano_12_p8_224", "cross-covariance"),
        ("open_clip:RN50/openai", "ModifiedResNet cannot become a video tower"),
        ("open_clip:convnext_base/laion400m_s13b_b51k", "ConvNeXt cannot become a video model"),
    ],
)
def test_names_that_do_not_work_say_why(name, message):
    with pytest.raises(BackboneError, match=message):
        load_backbone(name)


def test_without_network_every_way_out_is_named():
    for name in ("vit_tiny", "clip_b32"):
        with pytest.raises(WeightsUnavailable) as caught:
            load_backbone(name)
        assert all(way in str(caught.value) for way in ("--weights", "--random-weights", "nano_clip"))


def test_quick_gelu_comes_from_the_tag():
    """OpenAI's weights run with another activation than the architecture's default; nobody may have to remember it."""
    assert tag_arguments(parse_name("clip_b16"))["force_quick_gelu"]
    assert "force_quick_gelu" not in tag_arguments(parse_name("clip_b16_laion2b"))
    backbone = load_backbone("clip_b32", on_meta=True)
    assert isinstance(backbone.model.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert isinstance(backbone.model.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_local_weights_of_a_timm_model(tmp_path, suffix):
    donor = randomize(timm.create_model("vit_tiny_patch16_224", num_classes=10))
    path = tmp_path / f"w{suffix}"
    state = {k: v.contiguous() for k, v in donor.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    backbone = load_backbone("vit_tiny", weights=path)
    assert backbone.report.dropped == ["head.bias", "head.weight"]
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = donor.eval().forward_head(donor.forward_features(images), pre_logits=True)
        assert torch.equal(backbone.model(images), expected)


def test_local_weights_at_another_size(tmp_path):
    """A 224 checkpoint in a 96 x 160 model: timm's own loader is the oracle for square sizes."""
    donor = randomize(timm.create_model("vit_tiny_patch16_224", num_classes=0))
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    square = load_backbone("vit_tiny", weights=tmp_path / "w.pth", image_size=(96, 96))
    oracle = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=96)
    oracle.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(donor.state_dict(), oracle))
    torch.testing.assert_close(square.model.pos_embed, oracle.pos_embed, atol=1e-6, rtol=1e-5)
    wide = load_backbone("vit_tiny", weights=tmp_path / "w.pth", image_size=(96, 160))
    assert wide.tower.image_size == (96, 160)
    assert wide.model(torch.randn(1, 3, 96, 160)).shape == (1, 192)


def test_foreign_layouts_go_through_timms_own_filter(tmp_path):
    """A DINOv2 release file has other names (register_tokens, mask_token, ls1.gamma)."""
    model = randomize(timm.create_model("vit_small_patch14_reg4_dinov2", img_size=518, num_classes=0, depth=12))
    state = dict(model.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, 384)
    patches = state.pop("pos_embed")
    cls_position = torch.randn(1, 1, 384)
    cls = state["cls_token"]
    state["cls_token"] = cls - cls_position  # timm adds the class token's position into the token
    state["pos_embed"] = torch.cat([cls_position, patches], dim=1)
    torch.save(state, tmp_path / "dinov2.pth")
    backbone = load_backbone("dinov2_reg_s", weights=tmp_path / "dinov2.pth")
    torch.testing.assert_close(backbone.model.cls_token, cls)
    assert torch.equal(backbone.model.reg_token, model.reg_token)


def test_weights_of_another_architecture_are_refused_by_name(tmp_path):
    torch.save(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"blocks.0.attn.proj.weight: \(384, 384\) given, \(192, 192\) expected"):
        load_backbone("vit_tiny", weights=tmp_path / "w.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError):
        load_backbone("clip_b32", weights=tmp_path / "w.pth")


def test_both_kinds_of_weights_at_once():
    with pytest.raises(BackboneError, match="choose one"):
        load_backbone("vit_tiny", weights="x.pth", random_weights=True)


def test_image_sizes_that_cannot_be():
    with pytest.raises(BackboneError, match="multiples of those, such as 224 x 96"):
        load_backbone("vit_tiny", random_weights=True, image_size=(230, 100))


def test_arguments_reach_the_library_or_are_refused():
    backbone = load_backbone("vit_tiny", random_weights=True, arguments={"drop_path_rate": 0.2})
    assert backbone.model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    with pytest.raises(BackboneError, match="drop_path_ratio"):
        load_backbone("vit_tiny", random_weights=True, arguments={"drop_path_ratio": 0.2})


def test_modules_are_taken_as_they_are():
    model = small_clip()
    assert wrap_module(model).has_text
    assert not wrap_module(model.visual).has_text
    wide = wrap_module(small_clip(), image_size=(32, 64))
    assert wide.tower.image_size == (32, 64)
    with pytest.raises(BackboneError, match="torch.nn.modules.linear.Linear was given"):
        img2vid.convert(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        ("timm:beit_base_patch16_224", (64, 96), {"embed_dim": 64, "num_heads": 4}),  # relative bias per block
        ("timm:vit_relpos_small_patch16_224", (64, 96), {"embed_dim": 64, "num_heads": 4}),  # relative bias by an MLP
        ("timm:eva02_tiny_patch14_224", (56, 84), {}),  # rotary and learned
        ("timm:vit_small_patch16_dinov3", (64, 96), {}),  # rotary only, register tokens
        ("timm:vit_small_patch16_rope_mixed_224", (64, 96), {}),  # rotary, learned per block
        ("timm:naflexvit_base_patch16_gap", (64, 96), {"embed_dim": 64, "num_heads": 4}),
        ("timm:vit_base_patch16_siglip_224", (64, 96), {"embed_dim": 64, "num_heads": 4}),  # attention pool
        ("timm:flexivit_small", (64, 96), {}),
    ],
)
def test_other_image_sizes_by_the_backbones_own_means(name, size, arguments):
    """Resized at load, certified there, and, where the backbone can, run at a third size in forward."""
    backbone = load_backbone(name, random_weights=True, image_size=size, arguments={"depth": 2, **arguments})
    randomize(backbone.model, std=0.02)
    reference = copy.deepcopy(backbone.model)
    assert backbone.tower.image_size == size
    model = img2vid.convert(backbone.model, num_frames=2)
    assert img2vid.certify(model, reference, num_frames=(1, 2)).ok
    third = tuple(4 * patch for patch in backbone.tower.patch_size)
    clips = torch.randn(1, 2, 3, *third)
    with torch.no_grad():
        if backbone.tower.any_size:
            expected = reference(clips[0]).mean(0, keepdim=True)
            assert torch.equal(model(clips), expected)
        else:
            with pytest.raises(img2vid.Img2VidError, match="fixed to"):
                model(clips)


def test_random_coca_has_no_memory_for_weights():
    """open_clip leaves one projection as ``torch.empty`` returned it."""
    towers = {"vision_cfg": {"layers": 1, "width": 64, "image_size": 32, "patch_size": 16}}
    text = {"layers": 1, "width": 64, "heads": 2, "context_length": 8, "vocab_size": 50, "embed_cls": True}
    model = open_clip.CoCa(embed_dim=64, **towers, text_cfg=text, multimodal_cfg=text)
    with torch.no_grad():
        model.text_decoder.text_projection.fill_(float("nan"))
    draw_projection(model)
    assert 0.05 < model.text_decoder.text_projection.std() < 0.25
