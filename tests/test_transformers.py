"""Backbones of transformers, against transformers' own forward on modules that were never touched."""

import copy
import json
import pickle
import re
import sys

import pytest
import torch
import transformers

import img2vid
from img2vid.backbones import as_reference, load_backbone, wrap_module
from img2vid.backbones.hub import WeightsUnavailable
from img2vid.cli import main as cli
from img2vid.errors import BackboneError, Img2VidError, WeightsError
from img2vid.model import VideoModel
from img2vid.tuning.groups import layer_groups
from img2vid.two_towers import VideoTextModel
from tests.conftest import randomize

IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
DINO = {key: value for key, value in IMAGE.items() if key != "intermediate_size"}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 16,
    "bos_token_id": 95,
    "eos_token_id": 97,
    "pad_token_id": 0,
}
BLIP_TEXT = {**TEXT, "encoder_hidden_size": 32, "sep_token_id": 96, "is_decoder": True}


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    t = transformers
    builders = {
        "CLIPModel": lambda: t.CLIPModel(t.CLIPConfig(vision_config=IMAGE, text_config=TEXT, projection_dim=20)),
        "SiglipModel": lambda: t.SiglipModel(
            t.SiglipConfig(vision_config=IMAGE, text_config={**TEXT, "projection_size": 32})
        ),
        "BlipForConditionalGeneration": lambda: t.BlipForConditionalGeneration(
            t.BlipConfig(vision_config=IMAGE, text_config=BLIP_TEXT)
        ),
        "BlipForImageTextRetrieval": lambda: t.BlipForImageTextRetrieval(
            t.BlipConfig(vision_config=IMAGE, text_config=BLIP_TEXT, image_text_hidden_size=20)
        ),
        "CLIPVisionModel": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**IMAGE)),
        "CLIPVisionModelWithProjection": lambda: t.CLIPVisionModelWithProjection(
            t.CLIPVisionConfig(**IMAGE, projection_dim=20)
        ),
        "SiglipVisionModel": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**IMAGE)),
        "BlipVisionModel": lambda: t.BlipVisionModel(t.BlipVisionConfig(**IMAGE)),
        "ViTModel": lambda: t.ViTModel(t.ViTConfig(**IMAGE)),
        "ViTForImageClassification": lambda: t.ViTForImageClassification(t.ViTConfig(**IMAGE, num_labels=5)),
        "Dinov2Model": lambda: t.Dinov2Model(t.Dinov2Config(**DINO)),
        "Dinov2ForImageClassification": lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**DINO, num_labels=5)),
        "Dinov2WithRegistersModel": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**DINO)),
    }
    return randomize(builders[name]()).eval()


def published(model: torch.nn.Module, images: torch.Tensor, **how) -> torch.Tensor:
    """The feature of images, by transformers' documented ways alone."""
    name = type(model).__name__
    if name in ("CLIPModel", "SiglipModel"):
        return model.get_image_features(pixel_values=images, **how).pooler_output
    if name == "BlipForImageTextRetrieval":
        return model.vision_proj(model.vision_model(pixel_values=images, **how).last_hidden_state[:, 0])
    if name == "BlipForConditionalGeneration":
        return model.vision_model(pixel_values=images, **how).last_hidden_state[:, 0]
    output = model(pixel_values=images, **how)
    if name.endswith("ForImageClassification"):
        return output.logits
    if name == "CLIPVisionModelWithProjection":
        return output.image_embeds
    return output.last_hidden_state[:, 0] if name == "BlipVisionModel" else output.pooler_output


def video_feature(model, clips):
    if isinstance(model, VideoModel):
        return model(clips)
    has_text = hasattr(model.base, "encode_text")
    return model.encode_video(clips) if has_text else model.visual(clips)[0]


PREFIXES = {"SiglipModel": 0, "SiglipVisionModel": 0, "Dinov2WithRegistersModel": 5}
WITH_TEXT = ("CLIPModel", "SiglipModel", "BlipForImageTextRetrieval", "BlipForConditionalGeneration")
ALONE = (
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "SiglipVisionModel",
    "BlipVisionModel",
    "ViTModel",
    "ViTForImageClassification",
    "Dinov2Model",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersModel",
)
ALL = (*WITH_TEXT, *ALONE)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_any_clip_is_bitwise_the_mean_of_its_frames(name):
    reference = make(name)
    model = img2vid.convert(copy.deepcopy(reference), num_frames=2)
    assert isinstance(model, VideoTextModel if name in WITH_TEXT else VideoModel)
    video = model.visual if name in WITH_TEXT else model
    assert video.tower.num_prefix_tokens == PREFIXES.get(name, 1)
    for num_frames in (1, 2, 3):
        clips = torch.randn(2, num_frames, 3, 32, 32)
        expected = published(reference, clips.flatten(0, 1)).unflatten(0, (2, num_frames)).mean(dim=1)
        assert torch.equal(video_feature(model, clips), expected)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_image_keys_survive_and_image_weights_load(name):
    reference = make(name)
    model = img2vid.convert(copy.deepcopy(reference), num_frames=2)
    image, state = reference.state_dict(), model.state_dict()
    assert all(torch.equal(image[key], state[key]) for key in image)
    new = {key for key in state if key not in image}
    assert new and all("temporal_" in key or key.endswith("time_embed") for key in new)
    other = {key: tensor + 0.1 for key, tensor in randomize(make(name), seed=5).state_dict().items()}
    model.load_image_weights(other)
    reference.load_state_dict(other)
    clips = torch.randn(2, 2, 3, 32, 32)
    expected = published(reference, clips.flatten(0, 1)).unflatten(0, (2, 2)).mean(dim=1)
    assert torch.equal(video_feature(model, clips), expected)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_three_acts(name):
    model = img2vid.convert(make(name), num_frames=3)
    clips = torch.randn(2, 3, 3, 32, 32)
    fresh = video_feature(model, clips)
    for parameter in model.zero_parameters().values():
        parameter.normal_(std=0.1)
    moved = video_feature(model, clips)
    assert (moved - fresh).abs().max() > 1e-4
    video = model.visual if name in WITH_TEXT else model
    with video.gates_closed():
        assert torch.equal(video_feature(model, clips), fresh)
    assert torch.equal(video_feature(model, clips), moved)


MODES = [
    {},
    {"prefix_mode": "shared"},
    {"prefix_mode": "global"},
    {"attention": "joint_space_time"},
    {"attention": "factorised_encoder"},
    {"tubelet_size": 2, "tubelet_init": "average", "num_frames": 4},
]


@pytest.mark.parametrize("settings", MODES, ids=str)
@pytest.mark.parametrize("name", [*WITH_TEXT, "BlipVisionModel", "ViTModel", "Dinov2WithRegistersModel"])
def test_the_certificate_holds_against_an_untouched_module(name, settings):
    reference = make(name)
    model = img2vid.convert(copy.deepcopy(reference), **{"num_frames": 2, **settings})
    before = type(reference)
    certificate = img2vid.certify(model, reference, num_frames=[1, 2], at_step_0=True)
    assert certificate.ok, str(certificate)
    assert type(reference) is before  # certifying does not change what the reference is
    assert (certificate.text_difference == 0.0) == hasattr(model.base, "encode_text")


def test_blip_drawn_at_random_says_why_it_fails():
    """transformers draws its image tower with a deviation of 1e-10: what one frame tells another is rounded away."""
    model = transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(vision_config=IMAGE, text_config=BLIP_TEXT)
    )
    assert model.config.vision_config.initializer_range == 1e-10
    certificate = img2vid.certify(img2vid.convert(copy.deepcopy(model.eval()), num_frames=2), model)
    assert certificate.held and not certificate.ok
    (why,) = certificate.failures
    assert "no frame's feature notices" in why and "deviation of 1e-10" in why and "initializer_range" in why
    assert "FAILED: with open gates" in str(certificate) and json.loads(certificate.to_json())["failures"] == [why]
    drawn = {**IMAGE, "initializer_range": 0.02}
    model = transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(vision_config=drawn, text_config=BLIP_TEXT)
    )
    certificate = img2vid.certify(img2vid.convert(copy.deepcopy(model.eval()), num_frames=2), model)
    assert certificate.ok and certificate.failures == []


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("SiglipModel", "SiglipVisionModel")])
@torch.no_grad()
def test_a_global_prefix_sees_all_frames_as_keys(name):
    """The steps agree with transformers' own attention: at T = 1 nothing but rounding differs."""
    reference = make(name)
    model = img2vid.convert(copy.deepcopy(reference), prefix_mode="global")
    clips = torch.randn(2, 1, 3, 32, 32)
    torch.testing.assert_close(video_feature(model, clips), published(reference, clips[:, 0]), rtol=0, atol=1e-5)
    moving = torch.randn(2, 3, 3, 32, 32)
    apart = published(reference, moving.flatten(0, 1)).unflatten(0, (2, 3)).mean(dim=1)
    assert (video_feature(model, moving) - apart).abs().max() > 1e-4


def test_models_are_copied_and_pickled():
    model, clips = img2vid.convert(make("CLIPModel")), torch.randn(1, 2, 3, 32, 32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.encode_video(clips), model.encode_video(clips))
        assert twin.get_image_features(pixel_values=clips).pooler_output.shape == (1, 20)


def test_precision_is_kept():
    model = img2vid.convert(make("CLIPModel"), num_frames=2, dtype="bfloat16")
    assert img2vid.certify(model, make("CLIPModel").to(torch.bfloat16), num_frames=[1, 2]).ok


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [(48, 48), (32, 64), (64, 16)], ids=str)
@torch.no_grad()
def test_other_image_sizes_are_resampled_by_transformers(name, size):
    reference = make(name)
    model = img2vid.convert(copy.deepcopy(reference), num_frames=2)
    clips = torch.randn(2, 2, 3, *size)
    if name == "ViTForImageClassification" or not name.startswith("Dinov2"):
        expected = published(reference, clips.flatten(0, 1), interpolate_pos_encoding=True)
    else:
        expected = published(reference, clips.flatten(0, 1))
    assert torch.equal(video_feature(model, clips), expected.unflatten(0, (2, 2)).mean(dim=1))


@pytest.mark.parametrize("name", [n for n in WITH_TEXT if n != "BlipForConditionalGeneration"])
@torch.no_grad()
def test_the_text_tower_is_untouched(name):
    reference = make(name)
    model = img2vid.convert(copy.deepcopy(reference))
    tokens = torch.randint(1, 90, (3, 9))
    if name == "BlipForImageTextRetrieval":
        expected = reference.text_proj(reference.text_encoder(input_ids=tokens).last_hidden_state[:, 0])
    else:
        expected = reference.get_text_features(input_ids=tokens).pooler_output
    assert torch.equal(model.encode_text(tokens), expected)
    assert torch.equal(model.encode_text(tokens, normalize=True), torch.nn.functional.normalize(expected, dim=-1))
    if name != "BlipForImageTextRetrieval":
        assert torch.equal(model.logit_scale, reference.logit_scale)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.encode_image(images), published(reference, images))


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
@torch.no_grad()
def test_forward_of_transformers_takes_clips(name):
    """T = 1 is bitwise; beyond, transformers projects the mean over frames instead of averaging projections."""
    reference = make(name)
    model = img2vid.convert(copy.deepcopy(reference))
    tokens, clips = torch.randint(1, 90, (3, 9)), torch.randn(2, 3, 3, 32, 32)
    one = reference(input_ids=tokens, pixel_values=clips[:, 0]).logits_per_image
    assert torch.equal(model(input_ids=tokens, pixel_values=clips[:, :1]).logits_per_image, one)
    features = model(input_ids=tokens, pixel_values=clips).image_embeds
    torch.testing.assert_close(features, model.encode_video(clips, normalize=True), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "Dinov2Model", "ViTModel", "BlipForImageTextRetrieval"])
def test_every_parameter_learns_and_has_its_layer(name):
    model = img2vid.convert(make(name), num_frames=2).train()
    groups = layer_groups(model)
    towers = {group.tower for group in groups}
    assert towers == ({"image", "text", "both"} if name in ("CLIPModel", "SiglipModel") else {"image", "text"}) or (
        name in ALONE and towers == {"image"}
    )
    stem = next(group for group in groups if group.tower == "image" and group.depth == 0)
    assert any("patch_embedding" in key for key in stem.parameters)
    heads = {key for group in groups if group.tower == "image" and group.name == "head" for key in group.parameters}
    assert any("projection" in k or "proj" in k or "norm" in k or "pooler" in k or "head" in k for k in heads)
    model.set_grad_checkpointing()
    video_feature(model, torch.randn(2, 2, 3, 32, 32)).square().sum().backward()
    video = model.visual if name in WITH_TEXT else model
    assert all(p.grad.abs().max() > 0 for n, p in video.named_parameters() if "temporal_fc" in n)


def test_checkpointing_of_transformers_is_taken_over():
    image = make("Dinov2Model").train()
    image.gradient_checkpointing_enable()
    model = img2vid.convert(image, num_frames=2).train()
    assert model.grad_checkpointing
    model(torch.randn(2, 2, 3, 32, 32)).sum().backward()  # transformers' own would no longer know T here
    assert model.get_parameter("encoder.layer.0.temporal_fc.weight").grad.abs().max() > 0


def test_stochastic_depth_draws_once_per_clip():
    image = transformers.Dinov2Model(transformers.Dinov2Config(**DINO, drop_path_rate=0.5))
    model = img2vid.convert(randomize(image)).train()
    clips = torch.randn(8, 1, 3, 32, 32).expand(-1, 3, -1, -1, -1)
    frames = model.frame_features(clips)
    assert all(torch.equal(frames[:, 0], frames[:, t]) for t in (1, 2))
    assert model.tower.blocks[0][1].temporal_drop_path.drop_prob == 0.5


@pytest.mark.parametrize("name", [n for n in ALL if not n.endswith("ForImageClassification")])
@torch.no_grad()
def test_load_save_load_from_a_folder(name, tmp_path):
    reference = make(name)
    reference.save_pretrained(tmp_path / "image")
    model = img2vid.convert(f"hf:{tmp_path / 'image'}", num_frames=3)
    randomize(model, std=0.1)
    clips = torch.randn(2, 3, 3, 32, 32)
    model.save_pretrained(tmp_path / "video")
    (tmp_path / "image").rename(tmp_path / "gone")  # what is saved stands on its own
    again = type(model).from_pretrained(tmp_path / "video")
    assert torch.equal(video_feature(again, clips), video_feature(model, clips))
    again.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("video", "second"))
    assert first == second


@pytest.mark.parametrize("name", ["ViTForImageClassification", "Dinov2ForImageClassification"])
@torch.no_grad()
def test_checkpoints_with_a_classifier_come_without_it(name, tmp_path):
    reference = make(name)
    reference.save_pretrained(tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}")
    assert backbone.report.dropped == ["classifier.bias", "classifier.weight"]
    model, clips = img2vid.convert(f"hf:{tmp_path}", num_classes=7), torch.randn(2, 1, 3, 32, 32)
    trunk = reference.vit if name.startswith("ViT") else reference.dinov2
    expected = trunk(pixel_values=clips[:, 0]).last_hidden_state[:, 0]
    assert torch.equal(model.clip_features(clips), expected)
    assert model(clips).shape == (2, 7)
    with pytest.raises(Img2VidError, match="into 5 logits"):
        img2vid.convert(make(name), num_classes=7)


def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make("CLIPModel").save_pretrained("clip")
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3, "do_normalize": True}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(pixels))
    assert cli(["inspect", "hf:clip", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["block_class"] == "CLIPEncoderLayer" and facts["feature_dim"] == 32
    options = ["--num-frames", "2", "--image-size", "48", "--out", "out"]
    assert cli(["convert", "--backbone", "hf:clip", *options]) == 0
    printed = capsys.readouterr().out
    assert "any clip, bit for bit" in printed and "Result      OK" in printed
    assert cli(["certify", "out"]) == 0
    assert cli(["inspect", "out"]) == 0
    model = img2vid.load("out")
    assert model.visual.tower.preprocess.mean == (0.1, 0.2, 0.3)
    assert model.visual.tower.image_size == (48, 48)
    assert cli(["convert", "--backbone", "hf:clip", "--weights", "clip/model.safetensors", "--out", "b"]) == 0
    assert cli(["convert", "--backbone", "hf:clip", "--random-weights", "--num-classes", "3", "--out", "c"]) == 0


BAD = [
    ("hf:no-such/repository", "Not in the local cache"),
    ("hf:./nowhere", "is no folder with a config.json"),
    ("hf:", "Unknown backbone"),
    ("hf:empty", "holds no config.json"),
    ("hf:bert", "model_type 'bert'.*Supported of transformers are clip, "),
    ("hf:swin", "model_type 'swin'"),
    ("hf:listed", r"model_type \['clip'\]"),
    ("hf:kernel", "attention by 'owner/repo', code from a hub"),
    ("hf:kernels", r"attention by \{'': 'owner/repo'\}, code from a hub"),
    ("hf:broken", "cannot be read as JSON"),
    ("hf:partial", "layernorm.bias"),
    ("hf:foreign", "has no place for.*surprise"),
    ("hf:unweighted", "cannot be read"),
]


@pytest.mark.parametrize("named", [-1, True, {"a": 1}, [], None], ids=str)
def test_a_configuration_that_names_no_class_means_the_usual_one(named, tmp_path):
    make("CLIPModel").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": named}))
    assert type(img2vid.convert(f"hf:{tmp_path}", num_frames=2).base).__name__ == "CLIPModel"


@pytest.mark.parametrize(("name", "message"), BAD)
def test_bad_input_is_one_clear_error(name, message, tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file, save_file

    monkeypatch.chdir(tmp_path)
    types = {"bert": '"bert"', "swin": '"swin"', "listed": '["clip"]'}
    attention = '{"model_type": "clip", "vision_config": {"attn_implementation": {"": "owner/repo"}}}'
    kernels = [("kernel", '{"model_type": "vit", "attn_implementation": "owner/repo"}'), ("kernels", attention)]
    for folder, content in [
        ("broken", "{"),
        *kernels,
        *((key, f'{{"model_type": {value}}}') for key, value in types.items()),
    ]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(content)
    (tmp_path / "empty").mkdir()
    for folder in ("partial", "foreign", "unweighted"):
        make("ViTModel").save_pretrained(folder)
    state = load_file("partial/model.safetensors")
    save_file({k: v for k, v in state.items() if k != "layernorm.bias"}, "partial/model.safetensors", {"format": "pt"})
    save_file({**state, "surprise.weight": torch.zeros(2)}, "foreign/model.safetensors", {"format": "pt"})
    (tmp_path / "unweighted" / "model.safetensors").unlink()
    capsys.readouterr()
    assert cli(["convert", "--backbone", name, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    assert re.search(message, error, flags=re.DOTALL), error
    assert not (tmp_path / "out").exists()


def test_bad_arguments(tmp_path):
    make("CLIPModel").save_pretrained(tmp_path)
    for arguments, message in (
        ({"drop_pth": 0.1}, "has no field 'drop_pth'"),
        ({"architecture": "CLIPTextModel"}, "can be loaded as CLIPModel"),
        ({"config": 3}, "expected transformers' fields"),
        ({"add_pooling_layer": False}, "is of ViTModel"),
    ):
        with pytest.raises(BackboneError, match=message):
            load_backbone(f"hf:{tmp_path}", arguments=arguments)
    with pytest.raises(BackboneError, match="cannot be cut into patches"):
        load_backbone(f"hf:{tmp_path}", image_size=(33, 33))
    tower = load_backbone(f"hf:{tmp_path}", arguments={"architecture": "CLIPVisionModel"})
    assert "text_projection.weight" in tower.report.dropped and not tower.has_text


def test_hub_names_teach_without_a_network():
    with pytest.raises(WeightsUnavailable) as caught:
        load_backbone("hf:openai/clip-vit-base-patch32")
    assert "hf:FOLDER" in str(caught.value) and "network" in str(caught.value)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackboneError, match=r"pip install 'img2vid\[hf\]'"):
        load_backbone("hf:openai/clip-vit-base-patch32")


def test_what_cannot_be_is_refused():
    with pytest.raises(BackboneError, match="of frames, not of clips"):
        clips = torch.randn(1, 2, 3, 32, 32)
        img2vid.convert(make("CLIPModel")).get_image_features(pixel_values=clips, output_hidden_states=True)
    with pytest.raises(BackboneError, match="without its pooling head"):
        config = transformers.SiglipVisionConfig(**IMAGE, vision_use_head=False)
        img2vid.convert(transformers.SiglipVisionModel(config))
    with pytest.raises(BackboneError, match="BertModel of transformers cannot become a video model"):
        img2vid.convert(transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, hidden_size=12)))
    with pytest.raises(BackboneError, match="CLIPTextModel of transformers cannot"):
        img2vid.convert(make("CLIPModel").text_model)
    with pytest.raises(BackboneError, match="already is a video model"):
        wrap_module(img2vid.convert(make("CLIPModel")).base)
    captioner = img2vid.convert(make("BlipForConditionalGeneration"))
    with pytest.raises(BackboneError, match="writes captions"):
        captioner.encode_text(torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(BackboneError, match="writes captions"):
        captioner.encode_video(torch.randn(1, 1, 3, 32, 32))
    with pytest.raises(Img2VidError, match="cannot be cut into patches"):
        img2vid.convert(make("ViTModel"))(torch.randn(1, 1, 3, 33, 33))


def test_a_vit_without_its_pooler_says_so(tmp_path):
    model = transformers.ViTModel(transformers.ViTConfig(**IMAGE), add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="'add_pooling_layer': False"):
        load_backbone(f"hf:{tmp_path}")
    backbone = load_backbone(f"hf:{tmp_path}", arguments={"add_pooling_layer": False})
    assert backbone.arguments["add_pooling_layer"] is False


def test_references_are_copies_that_share_weights():
    reference = make("CLIPModel")
    asked = as_reference(reference)
    assert asked is not reference and not hasattr(reference, "encode_text") and hasattr(asked, "encode_text")
    assert asked.logit_scale is reference.logit_scale


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "BlipForImageTextRetrieval"])
def test_evaluation_measures_in_the_space_of_texts(name):
    from img2vid.evaluation.conditions import Condition, represent

    model, clips = img2vid.convert(make(name)), torch.randn(2, 3, 3, 32, 32)
    randomize(model.visual, std=0.05)
    opened = represent(model, clips, Condition(gates="open"), "features")
    assert torch.equal(opened, model.encode_video(clips).detach())
    with torch.no_grad(), model.gates_closed():
        expected = model.encode_video(clips)
    closed = represent(model, clips, Condition(gates="closed"), "features")
    torch.testing.assert_close(closed, expected, rtol=0, atol=1e-5)


def test_cards_speak_of_what_the_model_is():
    from img2vid.checkpoints.card import model_card

    model = img2vid.convert(make("BlipForConditionalGeneration"))
    assert "caption(model, clips" in model_card(model, None) and "encode_text" not in model_card(model, None)
    assert "pipeline_tag: image-to-text" in model_card(model, None)


def test_a_folder_without_its_library_is_told(tmp_path):
    make("ViTModel").save_pretrained(tmp_path / "vit")
    with pytest.raises(BackboneError, match="folder of transformers: --backbone hf:"):
        img2vid.convert(str(tmp_path / "vit"))


@torch.no_grad()
def test_texts_are_filled_up_as_in_training(tmp_path):
    """BLIP's text tower must not see what fills up a shorter text, so whatever stands beside a text changes nothing."""
    make("BlipForImageTextRetrieval").save_pretrained(tmp_path / "blip")
    words = ["[PAD]", *(f"word{i}" for i in range(1, 96)), "[SEP]", "[CLS]", "[UNK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "blip")
    model = img2vid.convert(f"hf:{tmp_path / 'blip'}")
    tokens = model.tokenize(["word3", "word4 word5 word6"])
    assert tokens.tolist() == [[97, 3, 96, 0, 0], [97, 4, 5, 6, 96]]
    alone = model.encode_text(model.tokenize("word3"))
    torch.testing.assert_close(model.encode_text(tokens)[:1], alone, rtol=0, atol=1e-5)


def test_a_tokenizer_that_is_none_or_another_models_is_refused(tmp_path):
    """transformers makes one of special tokens from config.json alone, to which all texts are the same."""
    make("BlipForImageTextRetrieval").save_pretrained(tmp_path / "blip")
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "blip")("word1 word2")["input_ids"]) == 4
    model = img2vid.convert(f"hf:{tmp_path / 'blip'}")
    with pytest.raises(BackboneError, match="holds no tokenizer: .* without a single word"):
        model.tokenize(["word1 word2"])
    words = ["[PAD]", "[SEP]", "[CLS]", "[UNK]", *(f"word{i}" for i in range(4, 200))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "blip")
    assert model.tokenize(["word5"]).tolist() == [[2, 5, 1]]
    with pytest.raises(BackboneError, match="not its text tower's: it gives the id 199"):
        model.tokenize(["word199"])


def test_folders_of_transformers_given_in_the_wrong_place_are_sent_to_the_right_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make("BlipForImageTextRetrieval").save_pretrained(tmp_path / "blip")
    config = transformers.VivitConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32, num_frames=2
    )
    transformers.VivitModel(config).save_pretrained(tmp_path / "vivit")
    with pytest.raises(WeightsError, match=r"transformers \(blip\).*img2vid convert --backbone hf:.*blip"):
        img2vid.load(tmp_path / "blip")
    with pytest.raises(WeightsError, match=r"transformers \(vivit\).*img2vid import .*vivit"):
        img2vid.load(tmp_path / "vivit")
    with pytest.raises(BackboneError, match=r"It is a video model already: img2vid import .*vivit"):
        img2vid.convert(f"hf:{tmp_path / 'vivit'}")
    with pytest.raises(BackboneError, match=r"is a file. Give the folder that holds it: hf:blip"):
        img2vid.convert("hf:blip/model.safetensors")
