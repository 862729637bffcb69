"""Image checkpoints as their authors publish them: OpenAI's CLIP, MAE, DINOv2, DINOv3, and transformers' folders."""

import functools
import json
import re
import zipfile
from unittest import mock

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import img2vid
from img2vid.backbones.activations import activations_of
from img2vid.errors import BackboneError, WeightsError
from img2vid.weights.accounting import read_weights
from tests.conftest import randomize, small_clip

VISION = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192}
VISION |= {"image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
TEXT |= {"vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 98, "bos_token_id": 97}
ARGS = {"embed_dim": 48, "depth": 2, "num_heads": 4, "patch_size": 8}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def oracle(cls, config, seed=3):
    torch.manual_seed(0)
    return randomize(cls(config), seed=seed, std=0.1).eval()


def folder(model, path, **pixels):
    model.save_pretrained(path)
    if pixels:
        (path / "preprocessor_config.json").write_text(json.dumps(pixels))
    return path


def images(num=2):
    return torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def convert(backbone, weights, **args):
    return img2vid.convert(backbone, weights=weights, image_size=32, num_frames=2, backbone_args={**ARGS, **args})


def feature(model, pictures):
    with torch.no_grad():
        return model(pictures.unsqueeze(1))


# ---- transformers into timm


def test_vit_with_its_own_eps_and_pixels(tmp_path):
    theirs = oracle(transformers.ViTForImageClassification, transformers.ViTConfig(**VISION))
    path = folder(theirs, tmp_path / "hf", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3)
    with pytest.warns(UserWarning, match="norms add 1e-12"):
        model = convert("timm:vit_base_patch16_224", path)
    with torch.no_grad():
        expected = theirs.vit(images()).last_hidden_state[:, 0]
    torch.testing.assert_close(feature(model, images()), expected, **CLOSE)
    assert model.config.backbone_args["norm_eps"] == 1e-12
    assert model.tower.preprocess.mean == pytest.approx((0.1, 0.2, 0.3))
    model.save_pretrained(tmp_path / "ours")
    again = img2vid.load(tmp_path / "ours")
    assert torch.equal(feature(again, images()), feature(model, images()))
    assert again.tower.preprocess == model.tower.preprocess


@pytest.mark.parametrize(
    ("name", "architecture", "settings"),
    [
        ("Dinov2", "vit_base_patch14_dinov2", {}),
        ("Dinov2WithRegisters", "vit_base_patch14_reg4_dinov2", {}),
    ],
)
def test_dinov2(name, architecture, settings, tmp_path):
    config = getattr(transformers, f"{name}Config")(**VISION, **settings)
    theirs = oracle(getattr(transformers, f"{name}Model"), config)
    with pytest.warns(UserWarning, match="mask_token"):
        model = convert(f"timm:{architecture}", folder(theirs, tmp_path / "hf"))
    with torch.no_grad():
        expected = theirs(images()).last_hidden_state[:, 0]
    torch.testing.assert_close(feature(model, images()), expected, **CLOSE)


def test_dinov2_with_gated_mlps(tmp_path):
    """The giant's: width of the MLP as DINOv2 counts it."""
    config = transformers.Dinov2Config(**VISION, use_swiglu_ffn=True, mlp_ratio=3)
    theirs = oracle(transformers.Dinov2Model, config)  # two thirds of 3 * 48, twice: 4 * 48
    with pytest.warns(UserWarning):
        model = convert("timm:vit_giant_patch14_dinov2", folder(theirs, tmp_path / "hf"), mlp_ratio=4)
    with torch.no_grad():
        expected = theirs(images()).last_hidden_state[:, 0]
    torch.testing.assert_close(feature(model, images()), expected, **CLOSE)


def clip(act="quick_gelu", **vision):
    config = transformers.CLIPConfig(
        text_config={**TEXT, "hidden_act": act},
        vision_config={**VISION, "hidden_act": act, **vision},
        projection_dim=24,
    )
    return oracle(transformers.CLIPModel, config)


def pooled(features):
    return getattr(features, "pooler_output", features)


def open_clip_folder(path, quick_gelu, **vision):
    path.mkdir()
    shape = {"layers": 2, "width": 48, "head_width": 12, "patch_size": 8, "image_size": 32, **vision}
    text = {"context_length": 16, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 24, "quick_gelu": quick_gelu, "vision_cfg": shape, "text_cfg": text}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return f"open_clip:local-dir:{path}"


def sentences():
    ids = torch.randint(1, 90, (2, 16), generator=torch.Generator().manual_seed(3))
    ids[:, 9], ids[:, 10:] = 98, 0  # the highest number ends a sentence
    return ids


@pytest.mark.parametrize("built_quick", [True, False])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_both_towers(act, built_quick, tmp_path, recwarn):
    """The activation is the file's, whatever the architecture has, and a saved model keeps it."""
    theirs = clip(act)
    path = folder(theirs, tmp_path / "hf", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    backbone = open_clip_folder(tmp_path / "oc", quick_gelu=built_quick)
    model = img2vid.convert(backbone, weights=path, num_frames=2)
    said = [str(warning.message) for warning in recwarn if "The activation of visual" in str(warning.message)]
    assert len(said) == ((act == "quick_gelu") != built_quick)
    with torch.no_grad():
        image, text = pooled(theirs.get_image_features(images())), pooled(theirs.get_text_features(sentences()))
        torch.testing.assert_close(model.encode_image(images()), image, **CLOSE)
        torch.testing.assert_close(model.encode_text(sentences()), text, **CLOSE)
        assert model.logit_scale == theirs.logit_scale
    assert model.visual.tower.preprocess.std == pytest.approx((0.4, 0.5, 0.6))
    model.save_pretrained(tmp_path / "ours")
    again = img2vid.load(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again.encode_image(images()), model.encode_image(images()))
        assert torch.equal(again.encode_text(sentences()), model.encode_text(sentences()))


def test_clip_image_tower_into_timm(tmp_path):
    theirs = clip()
    path = folder(theirs, tmp_path / "hf")
    with pytest.warns(UserWarning, match="left out by timm's reader: .*text_projection"):
        model = convert("timm:vit_base_patch16_clip_quickgelu_224", path, num_classes=24)
    with torch.no_grad():
        expected = pooled(theirs.get_image_features(images()))
    torch.testing.assert_close(feature(model, images()), expected, **CLOSE)
    with pytest.warns(UserWarning, match="Its activation is quick_gelu, .* instead of gelu"):
        model = convert("timm:vit_base_patch16_clip_224", path, num_classes=24)
    assert model.config.backbone_args["activation"] == "quick_gelu"
    torch.testing.assert_close(feature(model, images()), expected, **CLOSE)


def test_clip_of_other_heads_or_norms_is_refused(tmp_path):
    heads = open_clip_folder(tmp_path / "heads", quick_gelu=True, head_width=24)
    with pytest.raises(WeightsError, match="the image tower has 4 attention heads, the model built here 2"):
        img2vid.convert(heads, weights=folder(clip(), tmp_path / "a"), num_frames=2)
    plain = open_clip_folder(tmp_path / "plain", quick_gelu=True)
    with pytest.raises(WeightsError, match=r"has 0.001 as eps of its norms, the model built here 1e-05"):
        img2vid.convert(plain, weights=folder(clip(layer_norm_eps=1e-3), tmp_path / "b"), num_frames=2)


def test_a_configuration_that_leaves_out_its_defaults_means_them(tmp_path):
    path = folder(clip(), tmp_path / "hf")
    config = json.loads((path / "config.json").read_text())
    del config["vision_config"]["hidden_act"], config["text_config"]["hidden_act"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="The activation of transformer is quick_gelu now"):
        model = img2vid.convert(open_clip_folder(tmp_path / "oc", quick_gelu=False), weights=path, num_frames=2)
    assert model.config.backbone_args == {"activation": {"visual": "quick_gelu", "transformer": "quick_gelu"}}


def test_a_missing_projection_of_three_is_named(tmp_path):
    path = folder(clip(), tmp_path / "hf")
    state = load_file(path / "model.safetensors")
    del state["vision_model.encoder.layers.1.self_attn.k_proj.weight"]
    save_file(state, path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"there is no vision_model\.encoder\.layers\.1\.self_attn\.k_proj\.weight"):
        img2vid.convert(open_clip_folder(tmp_path / "oc", quick_gelu=True), weights=path, num_frames=2)
    state["surprise"] = torch.ones(1)
    state["vision_model.encoder.layers.1.self_attn.k_proj.weight"] = torch.ones(48, 48)
    save_file(state, path / "model.safetensors")
    with pytest.raises(WeightsError, match="1 unexpected:\n +surprise"):
        img2vid.convert(open_clip_folder(tmp_path / "oc2", quick_gelu=True), weights=path, num_frames=2)


def test_siglip_both_towers(tmp_path):
    config = transformers.SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=VISION)
    config.text_config.hidden_size = 48  # both towers are of one width
    config.text_config.num_attention_heads, config.text_config.intermediate_size = 4, 192
    config.text_config.projection_size = 48
    theirs = oracle(transformers.SiglipModel, config)
    path = folder(theirs, tmp_path / "hf")
    (tmp_path / "oc").mkdir()
    vision = {"image_size": 32, "timm_model_name": "vit_base_patch16_siglip_224", "timm_model_pretrained": False}
    vision |= {"timm_pool": "map", "timm_proj": "none"}
    text = {"context_length": 16, "vocab_size": 99, "width": 48, "heads": 4, "layers": 2, "no_causal_mask": True}
    text |= {"proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    described = {"embed_dim": 48, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "oc" / "open_clip_config.json").write_text(json.dumps({"model_cfg": described, "preprocess_cfg": {}}))
    create = functools.partial(timm.create_model, img_size=32, **ARGS)
    said = pytest.warns(UserWarning, match="The activation of text is gelu_tanh now")
    with mock.patch.object(timm, "create_model", create), said:
        model = img2vid.convert(f"open_clip:local-dir:{tmp_path / 'oc'}", weights=path, num_frames=2)
    with torch.no_grad():
        image, words = pooled(theirs.get_image_features(images())), pooled(theirs.get_text_features(sentences()))
        torch.testing.assert_close(model.encode_image(images()), image, **CLOSE)
        torch.testing.assert_close(model.encode_text(sentences()), words, **CLOSE)
        assert model.logit_bias == theirs.logit_bias
    with pytest.warns(UserWarning):
        tower = convert("timm:vit_base_patch16_siglip_224", path)
    torch.testing.assert_close(feature(tower, images()), image, **CLOSE)


# ---- OpenAI's CLIP


def openai_state(model):
    sizes = {"input_resolution": 32, "context_length": 16, "vocab_size": 200}
    return {**model.state_dict(), **{name: torch.tensor(value) for name, value in sizes.items()}}


def quick(**kwargs):
    return small_clip(quick_gelu=True, **kwargs)


def small_folder(path, quick_gelu):
    vision = {"layers": 3, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 200, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": 24, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}
    path.mkdir()
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return f"open_clip:local-dir:{path}"


def archive(model, path):
    """A TorchScript archive with the image and text forward of a CLIP inside, as OpenAI's are."""
    model.output_dict = False
    for name, size in (("input_resolution", 32), ("context_length", 16), ("vocab_size", 200)):
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(size))
    traced = torch.jit.trace(model.eval(), (images(1), torch.ones(1, 16, dtype=torch.long)), check_trace=False)
    torch.jit.save(traced, str(path))
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["state dict", "archive", "half"])
def test_openai_clip(form, tmp_path):
    path = tmp_path / "ViT.pt"
    if form == "archive":
        archive(quick(), path)
    else:
        state = openai_state(quick())
        torch.save({k: t.half() if form == "half" and t.is_floating_point() else t for k, t in state.items()}, path)
    model = img2vid.convert(small_folder(tmp_path / "oc", True), weights=path, num_frames=2)
    expected = quick()
    for key, tensor in expected.state_dict().items():
        own = model.state_dict()[key]
        assert torch.equal(own, tensor.half().to(own.dtype) if form == "half" else tensor), key
    plain = img2vid.convert(small_folder(tmp_path / "plain", False), weights=path, num_frames=2)
    assert activations_of(model) == activations_of(plain) == ["quick_gelu"]


@pytest.mark.filterwarnings("ignore")
def test_an_archive_says_its_activation_and_its_code_is_not_run(tmp_path):
    assert read_weights(archive(quick(), tmp_path / "quick.pt")).activation == "quick_gelu"
    assert read_weights(archive(small_clip(), tmp_path / "plain.pt")).activation == "gelu"
    with mock.patch.object(torch.jit, "load", side_effect=AssertionError("code was compiled")):
        state = read_weights(tmp_path / "quick.pt").state
    assert set(quick().state_dict()) <= set(state)
    # the code may be anything: it is not even looked at as code
    spoilt = tmp_path / "spoilt.pt"
    with zipfile.ZipFile(tmp_path / "quick.pt") as source, zipfile.ZipFile(spoilt, "w") as target:
        for name in source.namelist():
            target.writestr(name, b"import os" if name.endswith(".py") else source.read(name))
    again = read_weights(spoilt)
    assert all(torch.equal(again.state[key], state[key]) for key in state)


class WithLists(nn.Module):
    sizes: list[int]
    named: dict[str, float]

    def __init__(self):
        super().__init__()
        self.inner, self.sizes, self.named = nn.Linear(2, 3), [1, 2], {"a": 1.0}

    def forward(self, x):
        return self.inner(x) * self.sizes[0] * self.named["a"]


@pytest.mark.filterwarnings("ignore")
def test_attributes_of_an_archive_that_are_no_tensors(tmp_path):
    model = WithLists()
    torch.jit.save(torch.jit.script(model), str(tmp_path / "a.pt"))
    file = read_weights(tmp_path / "a.pt")
    assert file.activation is None
    assert file.state.keys() == model.state_dict().keys()
    assert all(torch.equal(file.state[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_an_archive_made_to_run_code_does_not_run_it(tmp_path):
    archive(quick(), tmp_path / "a.pt")
    victim = tmp_path / "it_ran"
    evil = b"\x80\x02cposix\nmkdir\nX" + len(str(victim)).to_bytes(4, "little") + str(victim).encode() + b"\x85R."
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "b.pt", "w") as target:
        for name in source.namelist():
            target.writestr(name, evil if name.endswith("/data.pkl") else source.read(name))
    with pytest.raises(WeightsError, match="cannot be read without its code, which is not run"):
        read_weights(tmp_path / "b.pt")
    assert not victim.exists()


# ---- MAE, DINOv2 and DINOv3 as their repositories publish them


def timm_model(name, **settings):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "num_classes": 0, **ARGS, **settings}
    return randomize(timm.create_model(name, **sizes), seed=3, std=0.1).eval()


def test_mae_with_its_decoder(tmp_path):
    image_model = timm_model("vit_base_patch16_224")
    state = dict(image_model.state_dict())
    state |= {"mask_token": torch.ones(1, 1, 32), "decoder_pos_embed": torch.ones(1, 17, 32)}
    for name in ("decoder_embed", "decoder_pred", "decoder_norm", "decoder_blocks.0.attn.qkv"):
        state |= {f"{name}.weight": torch.ones(2, 2), f"{name}.bias": torch.ones(2)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    with pytest.warns(UserWarning, match="mask_token"):
        model = convert("timm:vit_base_patch16_224", tmp_path / "mae.pth")
    with torch.no_grad():
        assert torch.equal(feature(model, images()), image_model(images()))
    encoder = {key: tensor for key, tensor in state.items() if not key.startswith(("decoder", "mask_token"))}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    plain = convert("timm:vit_base_patch16_224", tmp_path / "encoder.pth")
    assert all(torch.equal(plain.state_dict()[key], tensor) for key, tensor in image_model.state_dict().items())


def test_dinov2_original_with_registers(tmp_path):
    image_model = timm_model("vit_base_patch14_reg4_dinov2")
    state = dict(image_model.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    row = torch.randn(1, 1, 48)  # DINOv2 adds a position to its class token, timm has it inside the token
    state["pos_embed"] = torch.cat([row, state["pos_embed"]], dim=1)
    state["cls_token"], state["mask_token"] = state["cls_token"] - row, torch.ones(1, 48)
    torch.save(state, tmp_path / "dinov2.pth")
    with pytest.warns(UserWarning, match="mask_token"):
        model = convert("timm:vit_base_patch14_reg4_dinov2", tmp_path / "dinov2.pth")
    with torch.no_grad():
        torch.testing.assert_close(feature(model, images()), image_model(images()), **CLOSE)


def dinov3_original(image_model, bias):
    state = {}
    for key, tensor in image_model.state_dict().items():
        key = key.replace("reg_token", "storage_tokens")
        key = re.sub(r"gamma_(\d)", r"ls\1.gamma", key)
        state[key] = tensor
    for i in range(2):
        state[f"blocks.{i}.attn.qkv.bias"] = torch.full((144,), bias)
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(144)
    return state | {"mask_token": torch.ones(1, 48), "rope_embed.periods": torch.ones(3)}


def test_dinov3_original(tmp_path, capsys):
    image_model = timm_model("vit_small_patch16_dinov3")
    torch.save(dinov3_original(image_model, 0.0), tmp_path / "dinov3.pth")
    with pytest.warns(UserWarning, match="mask_token"):
        model = convert("timm:vit_small_patch16_dinov3", tmp_path / "dinov3.pth")
    with torch.no_grad():
        torch.testing.assert_close(feature(model, images()), image_model(images()), **CLOSE)
    torch.save(dinov3_original(image_model, 0.5), tmp_path / "biased.pth")
    with pytest.raises(WeightsError, match=r"has biases in attention, .*blocks.0.attn.qkv.bias.*_qkvb"):
        convert("timm:vit_small_patch16_dinov3", tmp_path / "biased.pth")


# ---- what a folder can lack


def test_folders_that_hold_something_else(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"a folder without config\.json"):
        convert("timm:vit_base_patch16_224", tmp_path / "empty")
    theirs = oracle(transformers.ViTModel, transformers.ViTConfig(**VISION))
    path = folder(theirs, tmp_path / "hf")
    with pytest.raises(WeightsError, match=r"missing:\n.*ln_final"):  # before anything finer is said
        img2vid.convert(open_clip_folder(tmp_path / "oc", quick_gelu=True), weights=path, num_frames=2)
    with pytest.raises(WeightsError, match="has 4 attention heads, the model built here 2"):
        convert("timm:vit_base_patch16_224", path, num_heads=2)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "hidden_act": "mish"}))
    with pytest.raises(WeightsError, match="hidden_act is 'mish'; known are quick_gelu"):
        convert("timm:vit_base_patch16_224", path)


@pytest.mark.parametrize(
    "described",
    [
        {"image_mean": []},
        {"image_mean": [0.5]},
        {"image_mean": ["a", "b", "c"]},
        {"image_std": [0.5, 0.0, 0.5]},
        {"image_std": [0.5, float("nan"), 0.5]},
        {"image_std": 0.5},
        {"rescale_factor": 0},
        {"rescale_factor": float("nan")},
        {"resample": [2]},
    ],
    ids=str,
)
def test_pixels_that_cannot_be(described, tmp_path):
    """A model would be made of them that takes everything to nan, or to the pixels of another model."""
    theirs = oracle(transformers.ViTModel, transformers.ViTConfig(**VISION))
    with pytest.raises(WeightsError, match=r"preprocessor_config\.json describes no normalisation of pixels"):
        convert("timm:vit_base_patch16_224", folder(theirs, tmp_path / "hf", **described))


def test_activations_are_told_apart():
    plain, tanh = nn.Sequential(nn.GELU()), nn.Sequential(nn.GELU(approximate="tanh"))
    assert activations_of(plain) == ["gelu"]
    assert activations_of(tanh) == ["gelu_tanh"]
    assert activations_of(quick()) == ["quick_gelu"]
    assert activations_of(timm_model("vit_base_patch32_siglip_256")) == ["gelu_tanh"]
    with pytest.raises(BackboneError, match="activation='mish': expected one of"):
        img2vid.convert("vit_tiny", random_weights=True, backbone_args={"activation": "mish"})
    with pytest.raises(BackboneError, match="activation is given for 'texts'"):
        img2vid.convert("nano_clip", backbone_args={"activation": {"texts": "gelu"}})
    with pytest.raises(BackboneError, match="norm_eps='small': expected a number"):
        img2vid.convert("vit_tiny", random_weights=True, backbone_args={"norm_eps": "small"})
    with pytest.raises(BackboneError, match="norm_eps=nan: expected a number"):
        img2vid.convert("vit_tiny", random_weights=True, backbone_args={"norm_eps": float("nan")})
