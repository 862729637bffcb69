"""Model folders: save, load, hub methods."""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, hub_mixin

import img2vid
from img2vid.backbones.names import parse_name
from img2vid.checkpoints import native
from img2vid.checkpoints.card import model_card
from img2vid.errors import WeightsError
from tests.conftest import randomize, small_clip, small_vit
from tests.parity import made


@pytest.fixture
def model():
    model = img2vid.convert("vit_tiny", random_weights=True, num_frames=2, image_size=32, backbone_args={"depth": 2})
    return randomize(model, seed=5)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_round_trip_is_bitwise(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    again = img2vid.load(tmp_path / "m")
    assert equal(model.state_dict(), again.state_dict())
    assert again.config == model.config
    assert not again.training
    clips = torch.randn(1, 2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(clips), model(clips))
    again.save_pretrained(tmp_path / "n")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "n" / name).read_bytes()


def test_saving_and_loading_speak_of_no_random_weights(tmp_path, caplog):
    caplog.set_level("INFO", logger="img2vid")
    model = img2vid.convert("vit_tiny", random_weights=True, num_frames=2, image_size=32, backbone_args={"depth": 2})
    assert "with random weights" in caplog.text  # true here
    caplog.clear()
    model.save_pretrained(tmp_path / "m")
    native.load_reference(img2vid.load(tmp_path / "m"))
    assert "random weights" not in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, r"num_heads \[4\], .* \[3\]"),
        ({"act_layer": torch.nn.SiLU}, r"activations \['GELU'\], .* \['SiLU'\]"),
        ({"norm_layer": functools.partial(torch.nn.LayerNorm, eps=1e-5)}, r"norm_eps \[1e-06\], .* \[1e-05\]"),
    ],
    ids=["heads", "activation", "eps"],
)
def test_a_module_that_the_weights_fit_and_that_is_another_function(change, message, tmp_path):
    img2vid.convert(small_vit()).save_pretrained(tmp_path / "m")
    with pytest.raises(WeightsError, match=message):
        img2vid.load(tmp_path / "m", image_model=small_vit(**change))


def test_modules_without_a_name_need_the_module_again(tmp_path):
    model = randomize(img2vid.convert(small_clip()), seed=5)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(WeightsError, match="image_model=module"):
        img2vid.load(tmp_path / "m")
    again = img2vid.load(tmp_path / "m", image_model=small_clip())
    assert equal(model.state_dict(), again.state_dict())
    assert isinstance(
        img2vid.VideoTextModel.from_pretrained(tmp_path / "m", image_model=small_clip()), img2vid.VideoTextModel
    )
    with pytest.raises(WeightsError, match="holds a VideoTextModel"):
        img2vid.VideoModel.from_pretrained(tmp_path / "m", image_model=small_clip())
    with pytest.raises(WeightsError, match="given, .* expected"):
        img2vid.load(tmp_path / "m", image_model=small_clip(embed_dim=12))


def test_overwriting_replaces_the_certificate_too(tmp_path):
    reference = small_vit()
    model = img2vid.convert(small_vit())
    model.save_pretrained(tmp_path / "m", certificate=img2vid.certify(model, reference, num_frames=(1, 2)))
    assert (tmp_path / "m" / "certificate.json").exists()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / "certificate.json").exists()
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["m"]


def test_an_interrupted_save_leaves_nothing(model, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(native, "save_file", fail)
    with pytest.raises(WeightsError, match="m: OSError: disk full"):
        model.save_pretrained(tmp_path / "m")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no img2vid model"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "lacks kind, video, dtype"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]), "truncated"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights file"),
        (lambda f: edit(f, video={"num_frame": 3}), "Unknown setting 'num_frame'"),
        (lambda f: edit(f, format=99), "format 99"),
    ],
)
def test_damaged_folders_are_explained(model, tmp_path, damage, message):
    model.save_pretrained(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(img2vid.Img2VidError, match=message):
        img2vid.load(tmp_path / "m")


def edit(folder: Path, **values):
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **values}))


def test_file_permissions_are_the_usual_ones(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "usual").write_text("")
    for name in os.listdir(tmp_path / "m"):
        assert (tmp_path / "m" / name).stat().st_mode == (tmp_path / "usual").stat().st_mode


class LocalHub:
    """The hub's client, with folders for repositories: what would be uploaded is there to be looked at."""

    def __init__(self, home):
        self.home, self.asked = home, []

    def __call__(self, token=None):
        self.asked.append({"token": token})
        return self

    def create_repo(self, repo_id, **kwargs):
        self.asked.append({"repo_id": repo_id, **kwargs})
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id, folder_path, **kwargs):
        self.asked.append(kwargs)
        shutil.copytree(folder_path, self.home / repo_id)
        return f"local/{repo_id}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = LocalHub(tmp_path / "hub")
    monkeypatch.setattr(hub_mixin, "HfApi", hub)
    monkeypatch.setattr("img2vid.checkpoints.saving.snapshot_download", lambda repo, **kwargs: hub.home / repo)
    return hub


def test_push_to_hub_uploads_the_folder(model, hub):
    assert model.push_to_hub("someone/model") == "local/someone/model"
    again = img2vid.VideoModel.from_pretrained("someone/model")
    assert equal(model.state_dict(), again.state_dict())
    assert again.config == model.config
    uploaded = {path.name for path in (hub.home / "someone/model").iterdir()}
    assert uploaded == {"model.safetensors", "config.json", "README.md"}
    card = ModelCard.load(hub.home / "someone/model/README.md")  # the hub's own reader
    assert card.data.library_name == "img2vid"
    assert card.data.pipeline_tag == "video-classification"
    assert card.data.base_model is None  # random weights come from nowhere
    assert "No certificate was made" in card.text


def test_the_certificate_goes_along(hub, tmp_path):
    model, reference = img2vid.convert(small_clip()), small_clip()
    certificate = img2vid.certify(model, reference, num_frames=(1, 2))
    options = {"commit_message": "first", "private": True, "token": "hf_x", "branch": "try"}
    model.push_to_hub("someone/clip", certificate=certificate, **options)
    assert {"token": "hf_x"} in hub.asked
    assert any(asked.get("private") is True for asked in hub.asked)
    assert any(asked.get("commit_message") == "first" and asked["revision"] == "try" for asked in hub.asked)
    folder = hub.home / "someone/clip"
    assert json.loads((folder / "certificate.json").read_text())["ok"] is True
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert "Result      OK" in card.text
    again = img2vid.VideoTextModel.from_pretrained("someone/clip", image_model=small_clip())
    assert equal(model.state_dict(), again.state_dict())
    model.save_pretrained(tmp_path / "both", certificate=certificate, push_to_hub=True, repo_id="someone/both")
    for path in (tmp_path / "both", hub.home / "someone/both"):
        assert json.loads((path / "certificate.json").read_text())["ok"] is True


@pytest.mark.parametrize(
    ("backbone", "image_weights", "expected"),
    [
        (
            "vit_tiny",
            "timm vit_tiny_patch16_224.augreg_in21k_ft_in1k",
            "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        ),
        ("vit_tiny", "the file mine.pth", None),
        ("timm:vit_tiny_patch16_224", "timm vit_tiny_patch16_224", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        ("clip_b16_laion2b", "open_clip ViT-B-16/laion2b_s34b_b88k", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),
        ("nano_clip", "the file nano_clip.safetensors", None),
    ],
)
def test_the_card_names_the_repository_of_the_image_model(model, backbone, image_weights, expected):
    model.image_weights = image_weights
    model.__dict__["config"] = dataclasses.replace(model.config, backbone=str(parse_name(backbone)))
    assert ModelCard(model_card(model, None)).data.base_model == expected


def test_the_card_of_an_imported_model_says_what_is_different(tmp_path, hub):
    torch.save(made.frozen_in_time(), tmp_path / "cc-webvid.pth")
    model = img2vid.import_checkpoint(tmp_path / "cc-webvid.pth", num_heads=4)
    model.push_to_hub("someone/frozen")
    text = ModelCard.load(hub.home / "someone/frozen/README.md").text
    assert "# cc-webvid.pth, of Frozen in Time's video tower" in text
    assert "- `block_input_residual`: attention over space is added to what entered the block" in text
    again = img2vid.VideoModel.from_pretrained("someone/frozen")
    assert equal(model.state_dict(), again.state_dict())
    assert again.config.quirks == model.config.quirks


def test_a_repository_that_cannot_be_reached():
    with pytest.raises(img2vid.Img2VidError, match="could not be downloaded"):
        img2vid.VideoModel.from_pretrained("nobody/nothing")
