"""Model folders: save, load, hub methods."""

import functools
import json
import os
from pathlib import Path

import pytest
import torch

import img2vid
from img2vid.checkpoints import native
from img2vid.errors import WeightsError
from tests.conftest import randomize, small_clip, small_vit


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


def test_push_to_hub_uploads_the_folder(model, tmp_path, monkeypatch):
    """The hub's client is replaced by one that copies to a local folder; loading comes from there."""
    import shutil

    from huggingface_hub import hub_mixin

    class LocalHub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **kwargs):
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"local/{repo_id}"

    monkeypatch.setattr(hub_mixin, "HfApi", LocalHub)
    assert model.push_to_hub("someone/model") == "local/someone/model"
    monkeypatch.setattr("img2vid.checkpoints.saving.snapshot_download", lambda repo, **kwargs: tmp_path / repo)
    again = img2vid.VideoModel.from_pretrained("someone/model")
    assert equal(model.state_dict(), again.state_dict())
    assert "library_name: img2vid" in (tmp_path / "someone/model/README.md").read_text()


def test_a_repository_that_cannot_be_reached():
    with pytest.raises(img2vid.Img2VidError, match="could not be downloaded"):
        img2vid.VideoModel.from_pretrained("nobody/nothing")
