"""Published video checkpoints: imported, they compute what an independent implementation computes; exported, they are
the same file again."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    TimesformerConfig,
    TimesformerForVideoClassification,
    TimesformerModel,
    VivitConfig,
    VivitForVideoClassification,
    VivitModel,
)

import img2vid
from img2vid.model import VideoModel
from tests.conftest import randomize
from tests.parity import made, restated
from tests.parity.made import DEPTH, HEADS

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
ATTENTIONS = ["divided_space_time", "joint_space_time", "space_only"]
SHAPE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "num_labels": 5}


def bitwise(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].shape == b[k].shape for k in a)


def answers(model, clips):
    with torch.no_grad():
        return model(clips)


def oracle(forward, clips):
    with torch.no_grad():
        return torch.stack([forward(clip) for clip in clips])


def saved(path, content):
    torch.save(content, path)
    return path


# ---- transformers as the oracle


@pytest.mark.parametrize(("num_frames", "size"), [(1, 32), (3, 48), (8, 32)])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_transformers_timesformer(attention, num_frames, size, tmp_path):
    config = TimesformerConfig(image_size=size, patch_size=8, num_frames=num_frames, attention_type=attention, **SHAPE)
    theirs = randomize(TimesformerForVideoClassification(config), seed=3, std=0.1).eval()
    theirs.save_pretrained(tmp_path / "hf")
    model = img2vid.import_checkpoint(tmp_path / "hf")
    clips = torch.randn(2, num_frames, 3, size, size)
    logits = answers(theirs, clips).logits
    if attention == "space_only":  # theirs are of frames
        logits = logits.unflatten(0, (2, num_frames)).mean(1)
    torch.testing.assert_close(answers(model, clips), logits, **CLOSE)
    assert img2vid.export_checkpoint(model, tmp_path / "again", "hf-timesformer") == []
    again = TimesformerForVideoClassification.from_pretrained(tmp_path / "again")
    assert bitwise(again.state_dict(), theirs.state_dict())
    assert again.config.attention_type == attention


@pytest.mark.slow
@pytest.mark.parametrize(("num_frames", "size"), [(96, 224), (8, 448), (16, 448)])
def test_transformers_timesformer_at_its_published_sizes(num_frames, size, tmp_path):
    """TimeSformer-L has 96 frames, -HR 16 of 448 pixels; positions and times of that many, in a narrow model."""
    config = TimesformerConfig(image_size=size, patch_size=16, num_frames=num_frames, **SHAPE)
    theirs = randomize(TimesformerForVideoClassification(config), seed=3, std=0.1).eval()
    theirs.save_pretrained(tmp_path / "hf")
    clips = torch.randn(1, num_frames, 3, size, size)
    ours = answers(img2vid.import_checkpoint(tmp_path / "hf"), clips)
    torch.testing.assert_close(ours, answers(theirs, clips).logits, **CLOSE)


@pytest.mark.parametrize(
    ("num_frames", "size", "tubelet_size"), [(2, 32, 1), (4, 48, 2), (8, 32, 2), (9, 32, 3), (2, 32, 2)]
)
def test_transformers_vivit(num_frames, size, tubelet_size, tmp_path):
    config = VivitConfig(image_size=size, tubelet_size=[tubelet_size, 8, 8], num_frames=num_frames, **SHAPE)
    theirs = randomize(VivitForVideoClassification(config), seed=3, std=0.1).eval()
    theirs.save_pretrained(tmp_path / "hf")
    model = img2vid.import_checkpoint(tmp_path / "hf", "vivit")
    clips = torch.randn(2, num_frames, 3, size, size)
    torch.testing.assert_close(answers(model, clips), answers(theirs, clips).logits, **CLOSE)
    img2vid.export_checkpoint(model, tmp_path / "again", "vivit")
    again = VivitForVideoClassification.from_pretrained(tmp_path / "again")
    assert bitwise(again.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("settings", [{"layer_norm_eps": 1e-3}, {"qkv_bias": False}, {"hidden_act": "relu"}])
def test_what_a_configuration_says_beyond_sizes_is_heeded(settings, tmp_path):
    config = TimesformerConfig(image_size=32, patch_size=8, num_frames=2, **SHAPE, **settings)
    theirs = randomize(TimesformerForVideoClassification(config), seed=3, std=0.1).eval()
    theirs.save_pretrained(tmp_path / "hf")
    model = img2vid.import_checkpoint(tmp_path / "hf")
    model.save_pretrained(tmp_path / "ours")
    clips = torch.randn(1, 2, 3, 32, 32)
    for imported in (model, img2vid.load(tmp_path / "ours")):
        torch.testing.assert_close(answers(imported, clips), answers(theirs, clips).logits, **CLOSE)
    img2vid.export_checkpoint(model, tmp_path / "again", "hf-timesformer")
    again = TimesformerForVideoClassification.from_pretrained(tmp_path / "again")
    assert {name: getattr(again.config, name) for name in settings} == settings
    assert bitwise(again.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(
    ("bare", "config"),
    [
        (TimesformerModel, TimesformerConfig(image_size=32, patch_size=8, num_frames=4, **SHAPE)),
        (VivitModel, VivitConfig(image_size=32, tubelet_size=[2, 8, 8], num_frames=4, **SHAPE)),
    ],
)
def test_models_without_a_classifier(bare, config, tmp_path):
    theirs = randomize(bare(config), seed=3, std=0.1).eval()
    theirs.save_pretrained(tmp_path / "hf")
    model = img2vid.import_checkpoint(tmp_path / "hf")
    clips = torch.randn(2, 4, 3, 32, 32)
    torch.testing.assert_close(answers(model, clips), answers(theirs, clips).last_hidden_state[:, 0], **CLOSE)
    assert model.config.num_classes is None


def test_other_numbers_of_frames_are_the_originals_nearest(tmp_path):
    """The embeddings module of transformers resizes time; its layers do not, so the restated forward is the oracle."""
    state = made.timesformer(num_frames=3)
    model = img2vid.import_checkpoint(saved(tmp_path / "a.pyth", state), num_heads=HEADS)
    for num_frames in (2, 5, 8):
        clips = torch.randn(2, num_frames, 3, 32, 32)
        expected = oracle(lambda c: restated.timesformer(state, c, HEADS, DEPTH, "divided_space_time"), clips)
        torch.testing.assert_close(answers(model, clips), expected, **CLOSE)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (16, 32), (40, 24)])
def test_other_image_sizes_are_the_originals_nearest(height, width, tmp_path):
    state = made.timesformer(num_frames=3)
    model = img2vid.import_checkpoint(saved(tmp_path / "a.pyth", state), num_heads=HEADS)
    model.save_pretrained(tmp_path / "ours")
    clips = torch.randn(2, 3, 3, height, width)
    expected = oracle(lambda c: restated.timesformer(state, c, HEADS, DEPTH, "divided_space_time"), clips)
    for imported in (model, img2vid.load(tmp_path / "ours")):
        torch.testing.assert_close(answers(imported, clips), expected, **CLOSE)
    config = dataclasses.replace(model.config, quirks=["drop_path_before_gate"])
    smooth = VideoModel(img2vid.load_backbone(config.backbone, image_size=(32, 32), random_weights=True,
                                              arguments=config.backbone_args).tower.module, config).eval()  # fmt: skip
    smooth.load_state_dict(model.state_dict())
    assert not torch.allclose(answers(smooth, clips), expected, atol=1e-3)


# ---- restated forwards as the oracle


@pytest.mark.parametrize("num_frames", [1, 4, 7])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("wrap", ["model_state", "state_dict", "model"])
def test_original_timesformer(wrap, attention, num_frames, tmp_path):
    state = made.timesformer(attention, num_frames, size=24)
    prefix = {"model_state": "model.", "state_dict": "module.", "model": ""}[wrap]
    content = {wrap: {prefix + key: tensor for key, tensor in state.items()}, "epoch": 15, "cfg": "DATA: ..."}
    path = saved(tmp_path / "a.pyth", content)
    dialect = "timesformer" if attention == "space_only" else "auto"
    model = img2vid.import_checkpoint(path, dialect, num_heads=HEADS)
    assert model.config.attention == attention
    clips = torch.randn(2, num_frames, 3, 24, 24)
    expected = oracle(lambda c: restated.timesformer(state, c, HEADS, DEPTH, attention), clips)
    torch.testing.assert_close(answers(model, clips), expected, **CLOSE)
    img2vid.export_checkpoint(model, tmp_path / "b.pyth", "timesformer")
    again = torch.load(tmp_path / "b.pyth", weights_only=True)["model_state"]
    assert bitwise(again, {f"model.{key}": tensor for key, tensor in state.items()})
    third = img2vid.import_checkpoint(tmp_path / "b.pyth", dialect, num_heads=HEADS)
    assert bitwise(third.state_dict(), model.state_dict())


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_mmaction2(attention, tmp_path):
    state = made.mmaction2(attention, num_frames=3)
    content = {"meta": {"version": "1.0"}, "state_dict": state}
    model = img2vid.import_checkpoint(saved(tmp_path / "a.pth", content), num_heads=HEADS)
    names = restated.MMACTION2 if attention == "divided_space_time" else restated.MMACTION2_UNDIVIDED
    clips = torch.randn(2, 3, 3, 32, 32)
    expected = oracle(lambda c: restated.timesformer(state, c, HEADS, DEPTH, attention, names), clips)
    torch.testing.assert_close(answers(model, clips), expected, **CLOSE)
    img2vid.export_checkpoint(model, tmp_path / "b.pth", "mmaction2-timesformer")
    assert bitwise(torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"], state)


@pytest.mark.parametrize("num_frames", [1, 2, 4])
def test_frozen_in_time(num_frames, tmp_path):
    """With fewer frames than it was made for, Frozen in Time uses the first of its time embeddings."""
    state = made.frozen_in_time(num_frames=4)
    content = {"arch": "FrozenInTime", "state_dict": {f"module.{k}": v for k, v in state.items()}}
    model = img2vid.import_checkpoint(saved(tmp_path / "a.pth", content), num_heads=HEADS)
    clips = torch.randn(2, num_frames, 3, 32, 32)

    def forward(clip):
        feature = restated.space_time_transformer(state, clip, HEADS, DEPTH, "video_model.")
        return restated.linear(state, "vid_proj.0", feature)

    torch.testing.assert_close(answers(model, clips), oracle(forward, clips), **CLOSE)
    img2vid.export_checkpoint(model, tmp_path / "b.pth", "frozen-in-time")
    tower_keys = {key: tensor for key, tensor in state.items() if key.startswith(("video_model.", "vid_proj."))}
    assert bitwise(torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"], tower_keys)


@pytest.mark.parametrize("num_frames", [1, 4])
@pytest.mark.parametrize("gated", [True, False])
def test_lavila(gated, num_frames, tmp_path):
    state = made.lavila(gated=gated)
    content = {"epoch": 4, "state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}
    model = img2vid.import_checkpoint(saved(tmp_path / "a.pth", content), num_heads=HEADS)
    clips = torch.randn(2, num_frames, 3, 32, 32)

    def forward(clip):
        feature = restated.space_time_transformer(state, clip, HEADS, DEPTH, "visual.", is_clip=True)
        return feature @ state["image_projection"]

    torch.testing.assert_close(answers(model, clips), oracle(forward, clips), **CLOSE)
    img2vid.export_checkpoint(model, tmp_path / "b.pth", "lavila")
    tower_keys = {k: v for k, v in state.items() if k.startswith("visual.") or k == "image_projection"}
    again = torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"]
    assert bitwise(again, {f"module.{key}": tensor for key, tensor in tower_keys.items()})


def test_lavila_without_clip_has_the_plain_tower(tmp_path):
    """Its DistilBERT variants: no norm before the blocks, plain GELU, Frozen in Time's projection."""
    shapes = made.space_time_transformer("visual.", 4, 32) | made.pair("image_projection.0", 24, made.DIM)
    state = made.drawn(shapes)
    model = img2vid.import_checkpoint(saved(tmp_path / "a.pth", state), num_heads=HEADS)
    clips = torch.randn(2, 4, 3, 32, 32)

    def forward(clip):
        feature = restated.space_time_transformer(state, clip, HEADS, DEPTH, "visual.")
        return restated.linear(state, "image_projection.0", feature)

    torch.testing.assert_close(answers(model, clips), oracle(forward, clips), **CLOSE)
    assert model.tower.preprocess.mean == (0.485, 0.456, 0.406)  # OpenAI's variants have statistics of their own


def test_lavila_classifier(tmp_path):
    shapes = made.space_time_transformer("visual.", 4, 32, is_clip=True) | made.pair("fc_cls", 7, made.DIM)
    state = made.drawn(shapes)
    model = img2vid.import_checkpoint(saved(tmp_path / "a.pth", state), num_heads=HEADS)
    clips = torch.randn(2, 4, 3, 32, 32)

    def forward(clip):
        feature = restated.space_time_transformer(state, clip, HEADS, DEPTH, "visual.", is_clip=True)
        return restated.linear(state, "fc_cls", feature)

    torch.testing.assert_close(answers(model, clips), oracle(forward, clips), **CLOSE)
    img2vid.export_checkpoint(model, tmp_path / "b.safetensors", "lavila")
    assert bitwise(load_file(tmp_path / "b.safetensors"), state)


# ---- what holds for each of them


CHECKPOINTS = {
    "timesformer": made.timesformer,
    "mmaction2-timesformer": made.mmaction2,
    "frozen-in-time": made.frozen_in_time,
    "lavila": made.lavila,
}


@pytest.mark.parametrize("dialect", CHECKPOINTS)
def test_each_is_told_from_the_others_and_saved_as_a_model_of_ours(dialect, tmp_path):
    path = saved(tmp_path / "a.pth", CHECKPOINTS[dialect]())
    model = img2vid.import_checkpoint(path, num_heads=HEADS)
    assert bitwise(model.state_dict(), img2vid.import_checkpoint(path, dialect, num_heads=HEADS).state_dict())
    model.save_pretrained(tmp_path / "ours")
    again = img2vid.load(tmp_path / "ours")
    clips = torch.randn(1, 4, 3, 32, 32)
    assert bitwise(again.state_dict(), model.state_dict())
    assert torch.equal(answers(again, clips), answers(model, clips))
    assert again.tower.preprocess == model.tower.preprocess


@pytest.mark.parametrize("dialect", CHECKPOINTS)
def test_imported_models_train_alike_with_and_without_checkpointing(dialect, tmp_path):
    """Hooks and quirks must survive the second run of each block."""
    path = saved(tmp_path / "a.pth", CHECKPOINTS[dialect]())
    clips = torch.randn(2, 4, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        model = img2vid.import_checkpoint(path, num_heads=HEADS)
        model.set_grad_checkpointing(checkpointing)
        model(clips).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert all(grad is not None for grad in gradients[-1].values())
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5) for name in gradients[0])


def test_half_precision_stays_half(tmp_path):
    state = {key: tensor.half() for key, tensor in made.timesformer().items()}
    model = img2vid.import_checkpoint(saved(tmp_path / "a.pth", state), num_heads=HEADS)
    img2vid.export_checkpoint(model, tmp_path / "b.safetensors", "timesformer")
    again = img2vid.import_checkpoint(tmp_path / "b.safetensors", num_heads=HEADS)
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.float16}
    assert bitwise(again.state_dict(), model.state_dict())


def test_an_original_becomes_transformers_and_comes_back(tmp_path):
    state = made.timesformer()
    model = img2vid.import_checkpoint(saved(tmp_path / "a.pyth", state), num_heads=HEADS)
    notes = img2vid.export_checkpoint(model, tmp_path / "hf", "hf-timesformer")
    assert notes == ["stochastic depth in training: 0.1 here, 0.0 there"]
    theirs = TimesformerForVideoClassification.from_pretrained(tmp_path / "hf").eval()
    clips = torch.randn(2, 4, 3, 32, 32)
    expected = oracle(lambda c: restated.timesformer(state, c, HEADS, DEPTH, "divided_space_time"), clips)
    torch.testing.assert_close(answers(theirs, clips).logits, expected, **CLOSE)
    described = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert described["image_mean"] == [0.45] * 3
    back = img2vid.import_checkpoint(tmp_path / "hf")
    assert bitwise(back.state_dict(), model.state_dict())
    assert back.tower.preprocess.std == pytest.approx((0.225,) * 3)
