"""Checkpoints in several files are read as one, every tensor accounted for."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

import img2vid
from img2vid.errors import WeightsError
from img2vid.weights.accounting import read_state_dict
from tests.conftest import randomize

PARTS = {"a": {"x": torch.arange(3.0), "y": torch.ones(2)}, "b": {"z": torch.zeros(4)}}


def write(folder, parts, pickled=False, names=None):
    """An index over one file for each part, as Hugging Face's libraries write it."""
    save, name = (torch.save, "pytorch_model-{}.bin") if pickled else (save_file, "model-{}.safetensors")
    for part, state in parts.items():
        save(state, folder / name.format(part))
    listed = {key: name.format(part) for part, state in parts.items() for key in state} if names is None else names
    index = folder / ("pytorch_model.bin.index.json" if pickled else "model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": listed}, indent=2))
    return index


@pytest.mark.parametrize("pickled", [False, True])
def test_all_files_are_read(tmp_path, pickled):
    index = write(tmp_path, PARTS, pickled)
    state, expected = read_state_dict(index), {**PARTS["a"], **PARTS["b"]}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    renamed = index.rename(tmp_path / "weights")  # content decides, not the suffix
    assert read_state_dict(renamed).keys() == expected.keys()


@pytest.mark.parametrize("pickled", [False, True])
def test_a_model_is_converted_from_several_files(tmp_path, pickled):
    arguments = {"depth": 2, "embed_dim": 48, "num_heads": 4}
    image_model = randomize(timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments))
    state = image_model.state_dict()
    keys = sorted(state)
    index = write(tmp_path, {str(k): {key: state[key] for key in keys[k::3]} for k in range(3)}, pickled)
    video = img2vid.convert("vit_tiny", weights=index, backbone_args=arguments)
    own = video.state_dict()
    assert all(torch.equal(own[key], state[key]) for key in state)


def test_what_does_not_fit_the_index_is_named(tmp_path):
    index = write(tmp_path, PARTS)
    (tmp_path / "model-b.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"names 2 files, of which 1 are not beside it: model-b\.safetensors\. Down"):
        read_state_dict(index)
    save_file({"z": torch.zeros(4), "more": torch.zeros(1)}, tmp_path / "model-b.safetensors")
    with pytest.raises(WeightsError, match=r"model-b\.safetensors also holds 1 tensors by the word of .*: more\."):
        read_state_dict(index)
    save_file({"other": torch.zeros(4)}, tmp_path / "model-b.safetensors")
    with pytest.raises(WeightsError, match=r"model-b\.safetensors lacks 1 tensors .*: z\."):
        read_state_dict(index)
    (tmp_path / "model-b.safetensors").write_bytes(b"<html>")
    with pytest.raises(WeightsError, match=r"model-b\.safetensors holds no weights .* HTML page"):
        read_state_dict(index)
    with pytest.raises(WeightsError, match=r"such as the index in it: .*model\.safetensors\.index\.json\."):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../model.safetensors", "", "sub/model.safetensors"])
def test_files_elsewhere_are_not_read(tmp_path, name):
    index = write(tmp_path, PARTS, names={"x": name})
    with pytest.raises(WeightsError, match="expected a file beside the index"):
        read_state_dict(index)


@pytest.mark.parametrize("weight_map", [{}, [], {"x": 3}, None, "model.safetensors"])
def test_a_damaged_index_is_said(tmp_path, weight_map):
    (tmp_path / "w.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError, match="weight_map"):
        read_state_dict(tmp_path / "w.index.json")


def test_an_index_of_indexes_is_refused(tmp_path):
    """It may name itself, and would be read for ever."""
    (tmp_path / "w.index.json").write_text(json.dumps({"weight_map": {"x": "w.index.json"}}))
    with pytest.raises(WeightsError, match=r"names w\.index\.json, which is no weights file but an index itself"):
        read_state_dict(tmp_path / "w.index.json")
    (tmp_path / "v.bin").write_text(json.dumps({"weight_map": {"x": "u.bin"}}))
    (tmp_path / "u.bin").write_text(json.dumps({"weight_map": {"x": "v.bin"}}))
    with pytest.raises(WeightsError, match=r"v\.bin names u\.bin, which is no weights file but an index"):
        read_state_dict(tmp_path / "v.bin")
