"""``weights=FILE`` for timm and open_clip: every key accounted for, every resampling said."""

import pytest
import timm
import torch

import img2vid
from img2vid.backbones import describe, load_backbone
from img2vid.backbones.open_clip_weights import fit_positions
from img2vid.backbones.open_clip_weights import load_file as load_clip_file
from img2vid.backbones.timm_weights import load_file
from img2vid.errors import WeightsError
from img2vid.temporal.embeddings import resample_pos_embed
from tests.conftest import randomize, small_clip

TINY = {"depth": 1, "embed_dim": 48, "num_heads": 4}


def timm_file(path, name="vit_tiny_patch16_224", **arguments):
    model = randomize(timm.create_model(name, num_classes=0, **{**TINY, **arguments}))
    torch.save(model.state_dict(), path)
    return model


def load_vit(path, **options):
    return load_backbone("vit_tiny", weights=path, arguments=TINY, **options)


def test_another_patch_size_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    timm_file(path, patch_size=32)
    with pytest.raises(WeightsError, match=r"patches of 32 x 32 .*\(48, 3, 32, 32\), \(48, 3, 16, 16\) expected"):
        load_vit(path)


def test_resampled_positions_are_reported(tmp_path):
    path = tmp_path / "w.pth"
    model = timm_file(path, img_size=64)
    report = load_vit(path).report
    assert report.resampled == ["pos_embed (grid 4 x 4 to 14 x 14)"]
    assert "Resampled: pos_embed (grid 4 x 4 to 14 x 14)." in report.differences
    assert "1 resampled:\n    pos_embed" in str(report)
    backbone = load_vit(path, image_size=(64, 64))  # not by way of 14 x 14
    assert torch.equal(backbone.model.pos_embed, model.pos_embed)
    assert backbone.report.differences == []
    assert timm.models.vision_transformer.resample_abs_pos_embed.__name__ == "resample_abs_pos_embed"
    assert not hasattr(timm.models.vision_transformer.resample_abs_pos_embed, "__wrapped__")  # watched no more


def test_resampled_relative_positions_are_reported(tmp_path):
    path, name = tmp_path / "w.pth", "beit_base_patch16_224"
    timm_file(path, name, img_size=64)
    report = load_backbone(f"timm:{name}", weights=path, arguments=TINY).report
    assert report.resampled == ["blocks.0.attn.relative_position_bias_table ((52, 4) to (732, 4))"]


def test_what_timms_reader_leaves_out_is_named(tmp_path):
    path = tmp_path / "w.pth"
    state = timm_file(path).state_dict()
    torch.save({"model": {**state, "pre_logits.fc.weight": torch.ones(2)}, "model_ema": state}, path)
    backbone = load_vit(path)
    notes = "\n".join(backbone.report.notes)
    assert "left out by timm's reader: pre_logits.fc.weight" in notes
    assert "'model' was taken, model_ema left" in notes
    with pytest.warns(UserWarning, match="'model' was taken, model_ema left"):
        img2vid.convert("vit_tiny", weights=path, backbone_args=TINY)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY)
    assert len(load_file(model, path)[0].loaded) == len(state)


@pytest.fixture(scope="module")
def nano():
    return load_backbone("nano_clip").model.state_dict()


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {f"module.{k}": s[k] for k in s}])
def test_open_clip_files_are_accounted_for(tmp_path, nano, wrap):
    path = tmp_path / "w.pth"
    # sizes as OpenAI's files have them, and a number as a list
    torch.save(wrap({**nano, "context_length": torch.tensor(16), "logit_scale": nano["logit_scale"][None]}), path)
    backbone = load_backbone("nano_clip", weights=path)
    assert all(torch.equal(v, nano[k]) for k, v in backbone.model.state_dict().items())
    assert set(backbone.report.loaded) == set(nano)
    assert backbone.report.dropped == ["context_length"]


def test_open_clip_files_that_do_not_fit_are_told_shortly(tmp_path, nano):
    path = tmp_path / "w.pth"
    state = {**nano, "visual.conv1.weight": torch.zeros(96, 3, 7, 7), "extra": torch.zeros(1)}
    del state["ln_final.bias"]
    torch.save(state, path)
    with pytest.raises(WeightsError) as caught:
        load_backbone("nano_clip", weights=path)
    text = str(caught.value)
    assert "1 missing:\n    ln_final.bias" in text
    assert "1 unexpected:\n    extra" in text
    assert "(96, 3, 7, 7) given, (96, 3, 4, 4) expected" in text
    timm_file(path)
    with pytest.raises(WeightsError) as caught:
        load_backbone("nano_clip", weights=path)
    assert len(str(caught.value).splitlines()) < 60


def test_open_clip_positions(tmp_path, nano):
    path = tmp_path / "w.pth"
    torch.save(nano, path)
    expected = load_backbone("nano_clip", image_size=(64, 64))
    assert expected.report.resampled == ["visual.positional_embedding (grid 8 x 8 to 16 x 16)"]
    torch.save(expected.model.state_dict(), path)
    again = load_backbone("nano_clip", weights=path, image_size=(64, 64))
    assert torch.equal(again.model.visual.positional_embedding, expected.model.visual.positional_embedding)
    assert again.report.resampled == []
    assert load_backbone("nano_clip", weights=path).report.resampled[0].endswith("(grid 16 x 16 to 8 x 8)")
    torch.save({**nano, "visual.positional_embedding": torch.zeros(13, 96)}, path)
    with pytest.raises(WeightsError, match="13 entries, no square grid"):
        load_backbone("nano_clip", weights=path)


def test_open_clip_positions_of_a_timm_trunk():
    from open_clip.timm_model import TimmModel

    def trunk(size):
        visual = TimmModel("vit_tiny_patch16_224", embed_dim=24, image_size=224, pretrained=False).eval()
        visual.set_input_size((size, size))
        return visual

    state = {f"visual.{key}": value for key, value in randomize(trunk(64)).state_dict().items()}
    before, visual = dict(state), trunk(32)
    assert fit_positions(visual, describe(visual), state, "w.pth") == ["visual.trunk.pos_embed (grid 4 x 4 to 2 x 2)"]
    assert state["visual.trunk.pos_embed"].shape == visual.trunk.pos_embed.shape
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], before[key]) for key in state if key != "visual.trunk.pos_embed")


def test_a_logit_bias_that_the_file_lacks_is_zero_and_said(tmp_path):
    model, donor = small_clip(init_logit_bias=-10.0), small_clip()
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    report, _ = load_clip_file(model, describe(model.visual), tmp_path / "w.pth")
    assert model.logit_bias.item() == 0.0
    assert report.notes == ["logit_bias is not in the file and was set to zero, which changes nothing."]


def test_converting_says_it(tmp_path, capsys):
    from img2vid.convert import main

    path = tmp_path / "w.pth"
    torch.save(randomize(timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64)).state_dict(), path)
    assert main(["--backbone", "vit_tiny", "--weights", str(path), "--num-frames", "2", "--image-size", "32",
                 "--out", str(tmp_path / "m")]) == 0  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    assert "Resampled: pos_embed (grid 4 x 4 to 2 x 2)." in said
    assert "Dropped on purpose from the file: head.bias, head.weight." in said
    assert img2vid.load(tmp_path / "m").image_weights == "the file w.pth"


def test_the_grid_of_a_table_that_is_not_square_can_be_stated(tmp_path):
    path = tmp_path / "w.pth"
    model = timm_file(path, img_size=(64, 32))
    with pytest.raises(WeightsError, match=r"a table of 8 patches, no square, .*'img_size': \(256, 128\)"):
        load_vit(path, image_size=(128, 64))
    stated = {**TINY, "img_size": (64, 32)}
    as_it_is = load_backbone("vit_tiny", weights=path, arguments=stated)
    assert torch.equal(as_it_is.model.pos_embed, model.pos_embed)
    assert "grid of 4 rows x 2 columns, which a file does not say" in as_it_is.report.notes[0]
    larger = load_backbone("vit_tiny", weights=path, arguments=stated, image_size=(128, 64))
    torch.testing.assert_close(larger.model.pos_embed, resample_pos_embed(model.pos_embed, (8, 4), (4, 2), 1))
    assert larger.report.resampled == ["positions (images of 64 x 32 to 128 x 64 pixels)"]
    with pytest.warns(UserWarning, match="4 rows x 2 columns"):
        video = img2vid.convert("vit_tiny", weights=path, backbone_args=stated, image_size=(128, 64))
    video.save_pretrained(tmp_path / "saved")
    assert torch.equal(img2vid.load(tmp_path / "saved").pos_embed, larger.model.pos_embed)
