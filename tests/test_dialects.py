"""Published video checkpoints: what is wrong with a file is said by name; and back to the image model."""

import collections
import json
import os
import pathlib
import re
import shutil
import sys
import types

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import img2vid
from img2vid import choices
from img2vid.checkpoints.dialect import Foreign
from img2vid.checkpoints.importing import DIALECTS
from img2vid.cli import main
from img2vid.config import ConfigError, VideoConfig
from img2vid.errors import WeightsError
from img2vid.model import VideoModel
from img2vid.weights import keytable
from tests.conftest import randomize, small_clip, small_vit
from tests.parity import made
from tests.parity.made import HEADS

MAKERS = {
    "timesformer": made.timesformer,
    "mmaction2-timesformer": made.mmaction2,
    "frozen-in-time": made.frozen_in_time,
    "lavila": made.lavila,
}


def saved(path, content):
    torch.save(content, path)
    return path


def bitwise(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- tables


@pytest.mark.parametrize("name", DIALECTS)
def test_tables_are_one_to_one_and_sorted_into_two_columns(name):
    table = DIALECTS[name].table
    theirs, ours = zip(*table, strict=True)
    assert len(set(theirs)) == len(theirs)
    assert len(set(ours)) == len(ours)
    for row in table:
        their_key = row[0].replace("{i}", "11")
        our_key = keytable.renamed(their_key, table)
        back = keytable.renamed(our_key, tuple((b, a) for a, b in table))
        assert our_key == row[1].replace("{i}", "11")
        assert back == their_key


def test_a_row_means_the_name_its_weight_and_its_bias_and_nothing_else():
    table = (("a.{i}.norm", "b.{i}.norm1"), ("q", "qkv[q]"))
    assert keytable.renamed("a.3.norm.weight", table) == "b.3.norm1.weight"
    assert keytable.renamed("q.bias", table) == "qkv.bias[q]"
    for other in ("a.3.norm2.weight", "a.x.norm.weight", "aa.3.norm.weight", "a.3.norm.running_mean", "a_3_norm"):
        assert keytable.renamed(other, table) is None


# ---- files that are not quite right


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


def renamed_key(state, key, to):
    return {to if k == key else k: v for k, v in state.items()}


SABOTAGE = {
    "missing": lambda s, key: without(s, key),
    "unexpected": lambda s, key: {**s, "blocks.0.extra": torch.ones(1), "another": torch.ones(2)},
    "misshapen": lambda s, key: {**s, key: s[key][:-1]},
    "renamed": lambda s, key: renamed_key(s, key, key + "_old"),
    "whole numbers": lambda s, key: {**s, key: s[key].to(torch.int8)},
}


@pytest.mark.parametrize("dialect", MAKERS)
@pytest.mark.parametrize("how", SABOTAGE)
def test_what_does_not_fit_is_named(how, dialect, tmp_path):
    state = MAKERS[dialect]()
    key = next(k for k in state if k.endswith(("mlp.fc2.bias", "ffns.0.layers.1.bias")) and "1" in k)
    path = saved(tmp_path / "a.pth", SABOTAGE[how](state, key))
    with pytest.raises(WeightsError) as caught:
        img2vid.import_checkpoint(path, dialect, num_heads=HEADS)
    text = str(caught.value)
    named = {
        "missing": ["1 missing", key],
        "unexpected": ["2 unexpected", "another", "blocks.0.extra"],
        "misshapen": [f"{key}: (47,) given, (48,) expected"],
        "renamed": ["1 missing", "1 unexpected", key, key + "_old"],
        "whole numbers": [f"{key}: torch.int8 given"],
    }[how]
    assert all(part in text for part in named), text
    assert "nothing was imported" in text
    if how == "unexpected":
        assert text.index("another") < text.index("blocks.0.extra")


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("hf")
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    shape |= {"image_size": 32, "num_frames": 4}
    config = transformers.VivitConfig(tubelet_size=[2, 8, 8], **shape)
    transformers.VivitForVideoClassification(config).save_pretrained(home / "vivit")
    config = transformers.TimesformerConfig(patch_size=8, **shape)
    transformers.TimesformerForVideoClassification(config).save_pretrained(home / "hf-timesformer")
    return home


@pytest.mark.parametrize("dialect", ["hf-timesformer", "vivit"])
@pytest.mark.parametrize("how", SABOTAGE)
@pytest.mark.parametrize("name", ["encoder.layer.1.output.dense.weight", "embeddings.position_embeddings"])
def test_what_does_not_fit_in_a_folder_is_named(name, how, dialect, hf_folders, tmp_path):
    state = load_file(hf_folders / dialect / "model.safetensors")
    config = json.loads((hf_folders / dialect / "config.json").read_text())
    key = next(k for k in state if k.endswith(name))
    path = folder(tmp_path / "hf", SABOTAGE[how](state, key), **config)
    with pytest.raises(WeightsError) as caught:
        img2vid.import_checkpoint(path, num_heads=HEADS)
    assert {"unexpected": "blocks.0.extra"}.get(how, key) in str(caught.value)
    assert "nothing was imported" in str(caught.value)


@pytest.mark.parametrize("part", ["query.weight", "key.bias", "value.weight"])
def test_one_of_three_projections(part, hf_folders, tmp_path):
    state = load_file(hf_folders / "vivit" / "model.safetensors")
    config = json.loads((hf_folders / "vivit" / "config.json").read_text())
    key = f"vivit.encoder.layer.1.attention.attention.{part}"
    with pytest.raises(WeightsError, match=f"1 missing:\n +{re.escape(key)}"):
        img2vid.import_checkpoint(folder(tmp_path / "a", without(state, key), **config))
    with pytest.raises(WeightsError, match=f"{re.escape(key)}: .* given"):
        img2vid.import_checkpoint(folder(tmp_path / "b", {**state, key: state[key][:-1]}, **config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 8}, "is for 32 patches, but config.json describes 64"),
        ({"tubelet_size": [4, 8, 8]}, "is for 32 patches, but config.json describes 16"),
        (
            {"tubelet_size": 2},
            "config.json is not that of transformers' ViViT: tubelet_size=2: expected .frames, height",
        ),
        ({"tubelet_size": []}, r"tubelet_size=\[\]: expected \[frames, height, width\]"),
        ({"tubelet_size": [2, 8, 8, 8]}, r"tubelet_size=\[2, 8, 8, 8\]: expected"),
    ],
)
def test_a_vivit_whose_description_does_not_fit(change, message, hf_folders, tmp_path):
    state = load_file(hf_folders / "vivit" / "model.safetensors")
    config = json.loads((hf_folders / "vivit" / "config.json").read_text())
    with pytest.raises(WeightsError, match=message):
        img2vid.import_checkpoint(folder(tmp_path / "a", state, **{**config, **change}))
    with pytest.raises(WeightsError, match="comes without its config.json"):
        alone = shutil.copy(hf_folders / "vivit" / "model.safetensors", tmp_path / "alone.safetensors")
        img2vid.import_checkpoint(alone)


@pytest.mark.parametrize("shape", [(2,), (1, 1), (0,)])
@pytest.mark.parametrize("key", ["visual.blocks.1.alpha_timeattn", "image_projection"])
def test_what_is_reshaped_is_looked_at_first(key, shape, tmp_path):
    state = {**made.lavila(), key: torch.zeros(shape)}
    with pytest.raises(WeightsError, match=f"nothing was imported(.|\n)*{key}"):
        img2vid.import_checkpoint(saved(tmp_path / "a.pth", state), "lavila", num_heads=HEADS)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("pos_embed", "lacks pos_embed, from which the size"),
        ("time_embed", "lacks time_embed, from which the size"),  # and is no space-only model with 16 tensors too many
        ("patch_embed.proj.weight", "lacks patch_embed.proj.weight"),
        ("blocks.0.mlp.fc1.weight", "lacks blocks.0.mlp.fc1.weight"),
    ],
)
def test_keys_that_sizes_are_read_from(key, message, tmp_path):
    path = saved(tmp_path / "a.pth", without(made.timesformer(), key))
    with pytest.raises(WeightsError, match=message):
        img2vid.import_checkpoint(path, "timesformer", num_heads=HEADS)


@pytest.mark.parametrize("shape", [(), (0,), (17,), (1, 1, 1, 17, 48)])
@pytest.mark.parametrize(
    "key", ["pos_embed", "time_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "head.weight"]
)
def test_tensors_of_another_number_of_axes_that_sizes_are_read_from(key, shape, tmp_path):
    state = {**made.timesformer(), key: torch.zeros(shape)}
    with pytest.raises(WeightsError, match=f"{key}.* is {re.escape(str(shape))}, expected was .*nothing was imported"):
        img2vid.import_checkpoint(saved(tmp_path / "a.pth", state), num_heads=HEADS)


@pytest.mark.parametrize(
    ("dialect", "key"),
    [
        ("timesformer", "blocks.0.attn.qkv.bias"),
        ("timesformer", "blocks.0.temporal_attn.qkv.weight"),
        ("timesformer", "blocks.0.temporal_fc.weight"),
        ("timesformer", "head.bias"),
        ("mmaction2-timesformer", "backbone.transformer_layers.layers.0.attentions.0.temporal_fc.weight"),
        ("mmaction2-timesformer", "cls_head.fc_cls.bias"),
        ("frozen-in-time", "video_model.blocks.0.attn.qkv.bias"),
        ("frozen-in-time", "vid_proj.0.bias"),
        ("lavila", "visual.blocks.0.alpha_timeattn"),
    ],
)
def test_what_the_first_block_or_head_lacks_is_missing_and_not_too_much_elsewhere(dialect, key, tmp_path):
    path = saved(tmp_path / "a.pth", without(MAKERS[dialect](), key))
    with pytest.raises(WeightsError, match=f"1 missing:\n +{re.escape(key)}$"):
        img2vid.import_checkpoint(path, dialect, num_heads=HEADS)


def test_what_no_dialect_knows(tmp_path):
    image = small_vit().state_dict()
    with pytest.raises(WeightsError, match="of no video dialect .* not imported but converted.*--from timesformer"):
        img2vid.import_checkpoint(saved(tmp_path / "a.pth", image))
    with pytest.raises(ConfigError, match="dialect='timeformer': expected one of auto, .*Did you mean 'timesformer'"):
        img2vid.import_checkpoint(tmp_path / "a.pth", "timeformer")
    with pytest.raises(WeightsError, match="lacks video_model"):
        img2vid.import_checkpoint(tmp_path / "a.pth", "frozen-in-time", num_heads=HEADS)


def test_a_model_of_ours_is_not_taken_for_a_timesformer(tmp_path):
    """Its names would pass; that each frame has a class token of its own is not in them."""
    img2vid.convert(small_vit(), num_frames=2).save_pretrained(tmp_path / "ours")
    with pytest.raises(WeightsError, match="already is a model of img2vid"):
        img2vid.import_checkpoint(tmp_path / "ours" / "model.safetensors", num_heads=4)


def test_heads_are_asked_for_or_said(tmp_path):
    path = saved(tmp_path / "a.pth", made.timesformer())
    with pytest.raises(WeightsError, match="does not say how many attention heads .* no multiple of 64"):
        img2vid.import_checkpoint(path)
    with pytest.raises(WeightsError, match="num_heads=5, but tokens of 48"):
        img2vid.import_checkpoint(path, num_heads=5)
    with pytest.raises(ConfigError, match="num_heads=0"):
        img2vid.import_checkpoint(path, num_heads=0)


def test_positions_that_are_no_square(tmp_path):
    state = made.timesformer()
    state["pos_embed"] = torch.zeros(1, 16, made.DIM)
    with pytest.raises(WeightsError, match="positions for 15 patches, which are no square"):
        img2vid.import_checkpoint(saved(tmp_path / "a.pth", state), num_heads=HEADS)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, (os.environ["IMG2VID_TEST_VICTIM"],)


@pytest.mark.parametrize("where", ["beside", "inside", "whole"])
def test_a_file_made_to_run_code_does_not_run_it(where, tmp_path, monkeypatch):
    victim = tmp_path / "it_ran"
    monkeypatch.setenv("IMG2VID_TEST_VICTIM", str(victim))
    state = made.timesformer()
    content = {
        "beside": {"model_state": state, "cfg": RunsCode()},
        "inside": {"model_state": {**state, "blocks.0.extra": RunsCode()}},
        "whole": RunsCode(),
    }[where]
    path = saved(tmp_path / "a.pyth", content)
    with pytest.raises(WeightsError, match=r"was not loaded: .* needs posix\.mkdir"):
        img2vid.import_checkpoint(path, num_heads=HEADS)
    assert not victim.exists()
    torch.load(path, weights_only=False)  # it would have
    assert victim.exists()


def test_settings_that_training_scripts_save_along_are_left_out(tmp_path, monkeypatch):
    """Frozen in Time's files hold its ConfigParser, MMAction2's its curves: neither's code is here, or wanted."""
    module = types.ModuleType("parse_config")

    class ConfigParser:
        def __init__(self):
            self._config, self._save_dir = collections.OrderedDict(arch={}), pathlib.PosixPath("exps/models")

        def __setstate__(self, state):
            raise AssertionError("code of the file's author ran")

    ConfigParser.__module__, ConfigParser.__qualname__ = "parse_config", "ConfigParser"
    module.ConfigParser = ConfigParser
    monkeypatch.setitem(sys.modules, "parse_config", module)
    content = {
        "arch": "FrozenInTime",
        "state_dict": made.frozen_in_time(),
        "monitor_best": np.float64(0.5),
        "curve": np.arange(3.0),
        "config": ConfigParser(),
    }
    path = saved(tmp_path / "a.pth", content)
    model = img2vid.import_checkpoint(path, num_heads=HEADS)
    assert model.config.prefix_mode == "global"


# ---- folders


def folder(path, state, **config):
    path.mkdir()
    save_file(state, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_folders_that_are_not_quite_right(tmp_path):
    model = img2vid.import_checkpoint(saved(tmp_path / "a.pth", made.timesformer()), num_heads=HEADS)
    img2vid.export_checkpoint(model, tmp_path / "hf", "hf-timesformer")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    state = load_file(tmp_path / "hf" / "model.safetensors")
    cases = {
        "joint": ({"attention_type": "joint_space_time"}, "says attention_type 'joint_space_time', but the weights"),
        "act": ({"hidden_act": "mish_2"}, "hidden_act is 'mish_2', which timm does not have. Known: gelu"),
        "deeper": ({"num_hidden_layers": 3}, "missing:\n *timesformer.encoder.layer.2"),
        "frames": ({"image_size": 64}, r"position_embeddings: \(1, 17, 48\) given, \(1, 65, 48\) expected"),
        "steps": ({"num_frames": 9}, "says num_frames 9, but the weights have time embeddings for 4"),
        "heads": ({"num_attention_heads": 5}, "num_attention_heads is 5, which hidden_size 48"),
        "none": ({"num_hidden_layers": 0}, "num_hidden_layers=0: expected a whole number of at least 1"),
        "size": ({"image_size": "32"}, "image_size='32'"),
        "words": ({"hidden_size": "wide"}, "config.json is not that of transformers' TimeSformer"),
        "other": ({"model_type": "videomae"}, "of no video dialect"),
        "types": ({"model_type": ["timesformer"]}, "of no video dialect"),
        "nan": ({"layer_norm_eps": float("nan")}, "layer_norm_eps=nan: expected a number"),
        "null": ({"layer_norm_eps": None}, "layer_norm_eps=None: expected a number"),
        "patch": ({"patch_size": [8, 8, 8]}, r"patch_size=\[8, 8, 8\]: expected a whole number"),
        "always": ({"drop_path_rate": 1.5}, "drop_path_rate=1.5: expected a number of at least 0 and below 1"),
        "biased": ({"qkv_bias": "false"}, "qkv_bias='false': expected true or false"),
        "many": ({"num_channels": 2**40}, "num_channels=1099511627776: expected a whole number of at most"),
    }
    for name, (change, message) in cases.items():
        with pytest.raises(WeightsError, match=message):
            img2vid.import_checkpoint(folder(tmp_path / name, state, **{**config, **change}))
    lacking = {k: v for k, v in config.items() if k != "hidden_size"}
    with pytest.raises(WeightsError, match="config.json is not that of .* it lacks 'hidden_size'"):
        img2vid.import_checkpoint(folder(tmp_path / "lacking", state, **lacking))
    (tmp_path / "lacking" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be read as JSON"):
        img2vid.import_checkpoint(tmp_path / "lacking")
    (tmp_path / "lacking" / "config.json").unlink()
    with pytest.raises(WeightsError, match="folder without config.json"):
        img2vid.import_checkpoint(tmp_path / "lacking")
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(WeightsError, match="already is a model of img2vid"):
        img2vid.import_checkpoint(tmp_path / "ours")
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="holds no weights: expected model.safetensors or pytorch_model.bin"):
        img2vid.import_checkpoint(tmp_path / "hf")


def test_weights_in_several_files(tmp_path):
    model = img2vid.import_checkpoint(saved(tmp_path / "a.pth", made.timesformer()), num_heads=HEADS)
    img2vid.export_checkpoint(model, tmp_path / "hf", "hf-timesformer")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: state[key] for key in keys}, tmp_path / "hf" / file)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    home = {key: file for file, keys in halves.items() for key in keys}
    index.write_text(json.dumps({"weight_map": home}))
    for path in (tmp_path / "hf", index):  # from the index alone nobody would know the heads
        assert bitwise(img2vid.import_checkpoint(path).state_dict(), model.state_dict())
    index.write_text(json.dumps({"weight_map": {**home, "more.weight": "a.safetensors"}}))
    with pytest.raises(WeightsError, match=r"lacks 1 tensors by the word of .*: more\.weight"):
        img2vid.import_checkpoint(tmp_path / "hf")
    index.write_text(json.dumps({"weight_map": {"more.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(WeightsError, match="expected a file beside the index"):
        img2vid.import_checkpoint(tmp_path / "hf")


# ---- other sizes at import


def test_other_sizes_at_import_are_resampled_as_asked(tmp_path):
    state = made.timesformer(num_frames=4, size=32)
    path = saved(tmp_path / "a.pth", state)
    plain = img2vid.import_checkpoint(path, num_heads=HEADS, image_size=64, num_frames=6)
    quirky = img2vid.import_checkpoint(
        path, num_heads=HEADS, image_size=64, num_frames=6, pos_embed_resample="nearest_1d"
    )
    places = state["pos_embed"][:, 1:].transpose(1, 2)
    stretched = F.interpolate(places, size=64, mode="nearest").transpose(1, 2)
    assert torch.equal(quirky.base.pos_embed[:, 1:], stretched)
    assert torch.equal(quirky.base.pos_embed[:, :1], state["pos_embed"][:, :1])
    grid = timm.layers.resample_abs_pos_embed(state["pos_embed"], [8, 8], [4, 4], 1)
    assert torch.equal(plain.base.pos_embed, grid)
    times = F.interpolate(state["time_embed"].transpose(1, 2), size=6, mode="nearest").transpose(1, 2)
    assert torch.equal(plain.time_embed, times)
    with pytest.raises(ConfigError, match="pos_embed_resample='nearest': expected one of bicubic, nearest_1d"):
        img2vid.import_checkpoint(path, num_heads=HEADS, pos_embed_resample="nearest")


def test_published_sizes_are_recognised():
    """8 frames of 224 pixels, 16 of 448 (HR) and 96 of 224 (L), without their numbers."""
    for num_frames, size in [(8, 224), (16, 448), (96, 224)]:
        config = VideoConfig(num_frames=num_frames, prefix_mode="shared", num_classes=400)
        backbone = img2vid.load_backbone("timm:vit_base_patch16_224", image_size=(size, size), on_meta=True)
        model = VideoModel(backbone.tower.module, config)
        file = Foreign(pathlib.Path("a.pyth"), DIALECTS["timesformer"].to_theirs(model.state_dict(), config))
        described = DIALECTS["timesformer"].describe(file)
        assert described.backbone == "timm:vit_base_patch16_224"
        assert described.num_frames == num_frames
        assert described.image_size == (None if size == 224 else (size, size))
        assert described.backbone_args == {"drop_path_rate": 0.1}
        assert "12 attention heads" in file.notes[0]


# ---- exports that would be another function


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "prefix_mode is 'per_frame' here, 'shared' there"),
        ({"prefix_mode": "shared", "gate": "tanh"}, r"no place for 3 tensors .*\n +blocks.0.temporal_fc.alpha"),
        (
            {"prefix_mode": "shared", "temporal_layers": "last:2"},
            "temporal_layers is 'last:2' here, 'all' there",
        ),
        (
            {"prefix_mode": "shared", "quirks": ["block_input_residual"]},
            "quirk block_input_residual: this model has",
        ),
        ({"prefix_mode": "shared", "tubelet_size": 2}, "no place for 1 tensors"),
        ({"attention": "space_only"}, "quirk mean_before_norm: the dialect has it, this model not"),
    ],
)
def test_a_model_that_a_dialect_cannot_express_is_refused(settings, message, tmp_path):
    model = img2vid.convert(small_vit(), num_frames=4, num_classes=5, **settings)
    with pytest.raises(WeightsError, match=message):
        img2vid.export_checkpoint(model, tmp_path / "a.pyth", "timesformer")
    assert not (tmp_path / "a.pyth").exists()


def test_heads_and_norms_are_compared_too(tmp_path):
    from functools import partial

    norm = partial(torch.nn.LayerNorm, eps=1e-5)
    model = img2vid.convert(small_vit(norm_layer=norm), num_frames=2, prefix_mode="shared", num_classes=5)
    with pytest.raises(WeightsError, match=r"norm_eps are \[1e-05\] here, \[1e-06\] there"):
        img2vid.export_checkpoint(model, tmp_path / "a.pyth", "timesformer")
    registers = img2vid.convert(small_vit(reg_tokens=2), num_frames=2, prefix_mode="shared", num_classes=5)
    with pytest.raises(WeightsError, match="no place for 1 tensors of this model:\n +reg_token"):
        img2vid.export_checkpoint(registers, tmp_path / "a.pyth", "timesformer")
    with pytest.raises(WeightsError, match="has no text tower. Export model.visual"):
        img2vid.export_checkpoint(img2vid.convert(small_clip()), tmp_path / "a.pyth", "timesformer")


def test_a_converted_model_can_be_exported_and_differs_only_in_training(tmp_path):
    model = randomize(img2vid.convert(small_vit(), num_frames=2, prefix_mode="shared", num_classes=5), seed=4)
    notes = img2vid.export_checkpoint(model, tmp_path / "a.pyth", "timesformer")
    assert [note.split(":")[0] for note in notes] == [
        "quirk drop_path_before_gate",
        "quirk nearest_positions",
        "stochastic depth in training",
        "other numbers of frames",
    ]
    again = img2vid.import_checkpoint(tmp_path / "a.pyth", num_heads=4)
    clips = torch.randn(1, 2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(clips), model(clips), atol=1e-6, rtol=1e-6)


def test_nothing_is_overwritten_or_left_half_written(tmp_path):
    model = img2vid.import_checkpoint(saved(tmp_path / "a.pth", made.timesformer()), num_heads=HEADS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(WeightsError, match="not an empty folder"):
        img2vid.export_checkpoint(model, tmp_path / "full", "hf-timesformer")
    with pytest.raises(WeightsError, match="is a folder; --format timesformer writes one file"):
        img2vid.export_checkpoint(model, tmp_path / "full", "timesformer")
    with pytest.raises(WeightsError, match="cannot be written"):
        img2vid.export_checkpoint(model, tmp_path / "a.pth" / "b.pth", "timesformer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


# ---- back to the image model


@pytest.mark.parametrize("settings", [{}, {"prefix_mode": "shared", "gate": "tanh"}, {"tubelet_size": 2}])
def test_closed_gates_give_the_image_checkpoint_back(settings, tmp_path):
    model = img2vid.convert(small_vit(), num_frames=4, **settings)
    img2vid.export_checkpoint(model, tmp_path / "image.safetensors", "image")
    fresh = small_vit()
    state = load_file(tmp_path / "image.safetensors")
    assert bitwise(state, fresh.state_dict())
    fresh.load_state_dict(state)


def test_both_towers_come_back(tmp_path):
    model = img2vid.convert(small_clip(), num_frames=4)
    img2vid.export_checkpoint(model, tmp_path / "image.safetensors", "image")
    state = load_file(tmp_path / "image.safetensors")
    assert bitwise(state, small_clip().state_dict())
    assert isinstance(small_clip(), open_clip.CLIP)
    small_clip().load_state_dict(state)


def test_open_gates_do_not(tmp_path):
    model = img2vid.convert(small_vit(), num_frames=4)
    with torch.no_grad():
        model.blocks[1].temporal_fc.bias[3] = 1e-30
    with pytest.raises(WeightsError, match=r"another function: blocks.1.temporal_fc.bias. .*interpolate image"):
        img2vid.export_checkpoint(model, tmp_path / "image.safetensors", "image")
    ungated = img2vid.convert(small_vit(), gate="none", time_embed="none")
    with pytest.raises(WeightsError, match="has no gates"):
        img2vid.export_checkpoint(ungated, tmp_path / "image.safetensors", "image")
    averaged = img2vid.convert(small_vit(), num_frames=4, tubelet_size=2, tubelet_init="average")
    with pytest.raises(WeightsError, match="Averaged tubelets"):
        img2vid.export_checkpoint(averaged, tmp_path / "image.safetensors", "image")
    assert list(tmp_path.iterdir()) == []


# ---- the commands


def test_import_and_export_on_the_command_line(tmp_path, capsys):
    path = saved(tmp_path / "a.pyth", {"model_state": {f"model.{k}": v for k, v in made.timesformer().items()}})
    assert main(["import", str(path), "--num-heads", "4", "--out", str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    assert "It is TimeSformer: divided_space_time, 4 frames, prefix shared." in said
    assert "loaded, 0 dropped on purpose, none left over" in said
    assert "drop_path_before_gate" in said
    out = tmp_path / "hf"
    assert main(["export", str(tmp_path / "ours"), "--format", "hf-timesformer", "--out", str(out)]) == 0
    assert "stochastic depth in training" in capsys.readouterr().out
    assert main(["import", str(out), "--from", "hf-timesformer", "--out", str(tmp_path / "again")]) == 0
    ours, again = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "again"))
    assert bitwise(ours, again)
    capsys.readouterr()
    for dialect in ("frozen-in-time", "lavila"):  # what is peculiar to a model is not asked of other modes
        path = saved(tmp_path / f"{dialect}.pth", MAKERS[dialect]())
        assert main(["import", str(path), "--num-heads", "4", "--out", str(tmp_path / dialect)]) == 0
        assert main(["inspect", str(tmp_path / dialect)]) == 0
        assert main(["certify", str(tmp_path / dialect), "--certify-frames", "1", "2"]) == 0
        assert "divided_space_time / global (this one)" in capsys.readouterr().out
    assert main(["import", str(tmp_path / "nothing.pth"), "--out", str(tmp_path / "x")]) == 2
    assert "There is no weights file" in capsys.readouterr().err
    assert main(["import", "", "--out", str(tmp_path / "x")]) == 2
    assert "path is empty" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "ours"), "--format", "image", "--out", str(tmp_path / "i")]) == 2
    assert "Gates of this model are open" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# ---- quirks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quirks": ["prefix_in_time"]}, "needs prefix_mode='global'"),
        ({"quirks": ["block_inputs"]}, "Did you mean 'block_input_residual'"),
        ({"quirks": "block_input_residual"}, "expected a list of names"),
        ({"quirks": ["block_input_residual"], "attention": "joint_space_time"}, "is about divided_space_time"),
        ({"quirks": ["drop_path_before_gate", "no_temporal_drop_path"]}, "exclude each other"),
        ({"quirks": ["mean_before_norm"], "attention": "factorised_encoder"}, "one and the same frame"),
        ({"quirks": ["time_before_norm_pre"], "time_embed": "none"}, "does not have"),
        ({"time_embed": "per_patch", "attention": "space_only"}, "have no time"),
    ],
)
def test_quirks_that_have_no_meaning_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        VideoConfig(**settings)


def test_quirks_that_a_tower_cannot_have_are_refused():
    with pytest.raises(ConfigError, match="no norm before its blocks"):
        img2vid.convert(small_vit(), quirks=["time_before_norm_pre"])
    with pytest.raises(ConfigError, match="norm that only attention over space reads"):
        block = timm.models.vision_transformer.ParallelScalingBlock
        img2vid.convert(small_vit(block_fn=block), quirks=["block_input_residual"])
    for tower in (small_vit(reg_tokens=2), small_vit(no_embed_class=True), small_clip().visual):
        with pytest.raises(ConfigError, match="a plain ViT's table of positions"):
            img2vid.convert(tower, quirks=["nearest_positions"])
    with pytest.raises(ConfigError, match="needs all patches"):
        img2vid.convert(small_vit(patch_drop_rate=0.5), time_embed="per_patch")


@pytest.mark.parametrize(
    ("quirks", "expected"),
    [((), "nothing"), (("drop_path_before_gate",), "bias"), (("no_temporal_drop_path",), "everything")],
)
def test_where_stochastic_depth_is(quirks, expected):
    """Dropped for certain, a branch adds nothing; its bias where the drop comes first; all where there is none."""
    model = img2vid.convert(small_vit(drop_path_rate=1.0), num_frames=3, quirks=quirks)
    block = randomize(model, seed=5).blocks[-1].train()
    x = torch.randn(6, 17, 48)
    with torch.no_grad(), model.clip.of(3):
        got = block.temporal_residual(x)
        block.eval()
        full = block.temporal_residual(x)
    wanted = {"nothing": torch.zeros_like(x), "bias": block.temporal_fc.bias.detach().expand_as(x), "everything": full}
    rounding = 1e-6 if expected == "everything" else 0.0  # training multiplies in another order
    torch.testing.assert_close(got, wanted[expected], rtol=0.0, atol=rounding)
    assert not torch.equal(full, wanted["bias"])


QUIRKY = [
    {"quirks": ["block_input_residual"]},
    {"quirks": ["block_input_residual", "prefix_in_time", "no_temporal_drop_path"], "prefix_mode": "global"},
    {"quirks": ["drop_path_before_gate"], "prefix_mode": "shared"},
    {"quirks": ["mean_before_norm"], "attention": "space_only"},
    {"time_embed": "per_patch"},
    {"time_embed": "per_patch", "attention": "joint_space_time", "prefix_mode": "shared"},
    {"time_embed_resample": "crop_or_pad"},
]


@pytest.mark.parametrize("settings", QUIRKY)
@pytest.mark.parametrize("make", [small_vit, small_clip], ids=["timm", "open_clip"])
def test_quirks_keep_the_function_as_guaranteed(make, settings):
    model = img2vid.convert(make(), num_frames=3, **settings)
    certificate = img2vid.certify(model, make(), num_frames=[1, 3])
    assert certificate.ok, str(certificate)


def test_time_before_norm_pre_keeps_the_function_and_differs_when_open(clips):
    before = img2vid.convert(small_clip().visual, num_frames=3, quirks=["time_before_norm_pre"])
    assert img2vid.certify(before, small_clip().visual, num_frames=[1, 3]).ok
    after = img2vid.convert(small_clip().visual, num_frames=3)
    with torch.no_grad():
        for model in (before, after):
            model.time_embed.copy_(torch.randn(model.time_embed.shape, generator=torch.Generator().manual_seed(2)))
        assert not torch.allclose(before(clips), after(clips), atol=1e-3)


def test_nearest_positions_promise_nothing_at_another_size():
    model = img2vid.convert(small_vit(dynamic_img_size=True), num_frames=2, quirks=["nearest_positions"])
    own = img2vid.certify(model, small_vit(dynamic_img_size=True), num_frames=[1, 2])
    assert own.ok and own.guarantee.strength["moving"] == "bitwise"
    other = img2vid.certify(model, small_vit(dynamic_img_size=True), num_frames=[1, 2], image_size=(48, 48))
    assert other.ok and not other.guarantee.strength
    assert max(comparison.feature_difference for comparison in other.comparisons) > 1e-3
    assert "none at another image size" in str(other)


def test_crop_or_pad_takes_the_first_and_zeros():
    model = img2vid.convert(small_vit(), num_frames=3, time_embed_resample="crop_or_pad")
    with torch.no_grad():
        model.time_embed.normal_()
    assert torch.equal(model.time_at(2), model.time_embed[:, :2])
    assert torch.equal(model.time_at(5)[:, :3], model.time_embed)
    assert not model.time_at(5)[:, 3:].any()


def test_time_of_each_patch_has_one_size(clips):
    model = img2vid.convert(small_vit(), num_frames=3, time_embed="per_patch")
    assert model.time_embed.shape == (1, 3, 16, 48)
    assert model(torch.randn(1, 5, 3, 32, 32)).shape == (1, 48)  # any T
    with pytest.raises(img2vid.Img2VidError, match="a row for each patch of 32 x 32"):
        model(torch.randn(1, 3, 3, 64, 64))


def test_the_commands_know_every_dialect():
    assert set(choices.DIALECTS) == set(DIALECTS)


def test_classes_for_the_same_activation_are_one(tmp_path):
    """torch's GELU(approximate="tanh"), timm's GELUTanh and transformers' gelu_pytorch_tanh are one function."""
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 1}
    model = img2vid.convert(
        "timm:vit_tiny_patch16_224",
        random_weights=True,
        image_size=32,
        num_frames=4,
        prefix_mode="shared",
        backbone_args={**sizes, "activation": "gelu_tanh"},
    )
    assert isinstance(model.blocks[0].mlp.act, torch.nn.GELU)
    img2vid.export_checkpoint(randomize(model), tmp_path / "hf", "hf-timesformer")
    theirs = transformers.TimesformerModel.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.hidden_act == "gelu_pytorch_tanh"
    clips = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(clips).last_hidden_state[:, 0], model(clips), atol=1e-5, rtol=1e-5)
    again = img2vid.import_checkpoint(tmp_path / "hf")
    assert type(again.blocks[0].mlp.act) is not torch.nn.GELU
    img2vid.export_checkpoint(again, tmp_path / "again", "hf-timesformer")


def test_what_else_a_file_may_be_is_said(hf_folders, tmp_path):
    path = saved(tmp_path / "a.pth", made.lavila())
    with pytest.raises(WeightsError, match="lacks video_model(.|\n)*By its names it is LaViLa's .* --from lavila"):
        img2vid.import_checkpoint(path, "frozen-in-time", num_heads=HEADS)
    with pytest.raises(WeightsError, match="it lacks 'tubelet_size'(.|\n)*--from hf-timesformer"):
        img2vid.import_checkpoint(hf_folders / "hf-timesformer", "vivit")
    image = transformers.ViTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32)
    transformers.ViTModel(image).save_pretrained(tmp_path / "vit")
    with pytest.raises(WeightsError, match="'vit', an image model.*convert --backbone hf:.*vit"):
        img2vid.import_checkpoint(tmp_path / "vit")


def test_a_file_inside_a_folder_of_transformers_is_read_with_what_lies_beside_it(tmp_path):
    """Its weights alone would say neither the heads nor the activation."""
    config = transformers.TimesformerConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, image_size=32,
        patch_size=8, num_frames=4, hidden_act="relu", layer_norm_eps=1e-3,
    )  # fmt: skip
    transformers.TimesformerModel(config).save_pretrained(tmp_path / "hf")
    model = img2vid.import_checkpoint(tmp_path / "hf" / "model.safetensors")
    assert isinstance(model.blocks[0].mlp.act, torch.nn.ReLU) and model.blocks[0].norm1.eps == 1e-3
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    state = {f"timesformer.{k}": v for k, v in load_file(tmp_path / "hf" / "model.safetensors").items()}
    unsaid = {key: value for key, value in config.items() if key != "model_type"}
    assert img2vid.import_checkpoint(folder(tmp_path / "by_names", state, **unsaid)).config.num_frames == 4
    shifted = {key: tensor + 1 for key, tensor in load_file(tmp_path / "hf" / "model.safetensors").items()}
    again = img2vid.import_checkpoint(saved(tmp_path / "hf" / "pytorch_model.bin", shifted))
    assert torch.equal(again.base.pos_embed, model.base.pos_embed + 1)  # the file that was given, not its neighbour
    assert again.blocks[0].norm1.eps == 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_pool": "avg", "fc_norm": False}, r"pooling are \['avg'\] here, \['token'\] there"),
        ({"activation": "gelu_tanh"}, r"activations are \['gelu_tanh'\] here, \['gelu'\] there"),
        ({"final_norm": False}, r"nothing was written(.|\n)*2 missing:"),
    ],
)
def test_what_no_key_and_no_shape_shows_is_compared_too(arguments, message, tmp_path):
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 1}
    model = img2vid.convert(
        "timm:vit_tiny_patch16_224",
        random_weights=True,
        image_size=32,
        num_frames=4,
        prefix_mode="shared",
        backbone_args=sizes | arguments,
    )
    with pytest.raises(WeightsError, match=message):
        img2vid.export_checkpoint(model, tmp_path / "a.pyth", "timesformer")
    assert not any(tmp_path.iterdir())


def test_the_card_of_an_import_says_whose_model_it_is(hf_folders, tmp_path):
    """It is no conversion: nobody knows where its gates and its attention along time began."""
    model = img2vid.import_checkpoint(hf_folders / "hf-timesformer")
    model.save_pretrained(tmp_path / "ours")
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "# hf-timesformer, of transformers' TimeSformer" in card
    assert "imported from **hf-timesformer**" in card and "nearest_positions" in card
    assert not any(words in card for words in ("started at zero", "Before training", "base_model"))
    img2vid.load(tmp_path / "ours").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card
