"""Which state dict is taken out of a file, and what a file is called that holds none."""

import argparse
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from img2vid.errors import WeightsError
from img2vid.weights.accounting import load_weights, read_state_dict, read_weights

STATE = {"weight": torch.arange(3.0)}
OTHER = {"weight": torch.ones(3)}


def archive(path, name):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, "world")


def cut(path):
    torch.save({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_text("\n <!DOCTYPE html><html>Sign in</html>"), "an HTML page, probably a login or error"),
        (lambda p: p.write_bytes(b"\xef\xbb\xbf<html>"), "an HTML page"),
        (lambda p: p.write_text("<?xml version='1.0'?><Error>"), "an XML page"),
        (lambda p: p.write_text('{"error": "Invalid username or password."}'), "JSON text, perhaps an error answer"),
        (lambda p: p.write_text('{\n "weight_map": {}}'), "checkpoint in several files, but its weight_map is empty"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"), "git lfs pull"),
        (lambda p: archive(p, "hello"), r"a zip archive of other files \(hello\)"),
        (lambda p: archive(p, "weight.npy"), "NumPy archive. Let timm read it"),
        (lambda p: archive(p, "model/constants.pkl"), "TorchScript archive, which is code"),
        (lambda p: np.save(p.open("wb"), np.zeros(3)), "NumPy archive"),
        (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "HDF5"),
        (lambda p: p.write_bytes(b"\x1f\x8b" + bytes(100)), "compressed"),
        (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(100)), "whose end is missing"),
        (cut, "whose end is missing"),
        (lambda p: p.write_bytes((2**31).to_bytes(8, "little") + b"{" + bytes(100)), "header too large"),
        (lambda p: p.write_bytes((200).to_bytes(8, "little") + b'{"a":' + bytes(50)), "damaged, truncated"),
        (lambda p: torch.save(nn.Linear(2, 2), p), "needs torch.nn.modules.linear.Linear to be rebuilt, as whole"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(WeightsError, match=message) as caught:
        read_state_dict(tmp_path / name)
    text = str(caught.value)
    assert name in text
    assert len(text) < 700
    assert "\x1b" not in text
    assert "\n" not in text


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_no_unpickler_takes_is_told_apart(tmp_path):
    """Bytes that are no pickle, a pickle of another writer, one of more than tensors: three things, three sentences."""
    path = tmp_path / "w.pth"

    def said(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(WeightsError) as caught:
            read_state_dict(path)
        return str(caught.value)

    for seed in range(40):
        text = said(random.Random(seed).randbytes(3000))
        assert "more than tensors" not in text and len(text) < 400
    assert "neither a file of torch.save nor of safetensors" in said(b"\xcfabcdefgh")
    assert "it begins with b'\\xcfabcdefg'" in said(b"\xcfabcdefgh")
    assert "such as pickle.dump" in said(pickle.dumps({"weight": [1.0, 2.0]}, protocol=5))
    assert "holds more than tensors" in said(b"\x80\x02]K\x00K\x01s.")  # what no list would do
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for part in (b"ctorch._utils", b"weight"):  # behind the pickles that say what kind of file it is
        assert "damaged" in said(whole.replace(part, b"\xff" + part[1:]))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["archive", "legacy", "torchscript", "safetensors"])
def test_damaged_files_are_called_so_wherever_the_damage_is(kind, tmp_path):
    path, flipped = tmp_path / "w.pth", random.Random(0)
    if kind == "torchscript":
        torch.jit.script(nn.Linear(2, 2)).save(str(path))
    elif kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save({"state_dict": STATE, "epoch": 3}, path, _use_new_zipfile_serialization=kind == "archive")
    whole, told = path.read_bytes(), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(flipped.choice((1, 3, 30))):
            damaged[flipped.randrange(len(damaged))] = flipped.randrange(256)
        path.write_bytes(damaged)
        try:
            read_state_dict(path)  # where a number of a tensor was hit, nothing can tell
        except WeightsError as error:
            told += str(path) in str(error)
    assert told > 20


def test_content_decides_not_the_suffix(tmp_path):
    save_file(STATE, tmp_path / "w.pth")
    torch.save(STATE, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        assert torch.equal(read_state_dict(tmp_path / name)["weight"], STATE["weight"])


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "model.module."])
def test_prefixes_of_both_kinds_of_file(tmp_path, prefix):
    state = {prefix + key: value for key, value in STATE.items()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"model_state_dict": state}, tmp_path / "w.pth")
    for name in ("w.pth", "w.safetensors"):
        assert read_state_dict(tmp_path / name).keys() == STATE.keys()
    save_file({**state, "alone": torch.zeros(1)}, tmp_path / "w.safetensors")
    assert read_state_dict(tmp_path / "w.safetensors").keys() == {*state, "alone"}


def test_of_several_state_dicts_the_choice_is_said_and_can_be_made(tmp_path):
    path = tmp_path / "w.pth"
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}
    torch.save({"model_ema": OTHER, "model": STATE, "optimizer": optimizer, "args": argparse.Namespace(lr=1.0)}, path)
    file = read_weights(path)
    assert torch.equal(file.state["weight"], STATE["weight"])
    assert (file.wrapper, file.others) == ("model", ["model_ema"])
    assert "'model' was taken, model_ema left" in file.notes[0]
    assert "wrapper='model_ema'" in file.notes[0]
    assert torch.equal(read_state_dict(path, wrapper="model_ema")["weight"], OTHER["weight"])
    assert read_weights(path, wrapper="model_ema").notes == []
    with pytest.raises(WeightsError, match=r"no state dict 'ema'. It has: model_ema, model\."):
        read_state_dict(path, wrapper="ema")
    torch.save({"student": STATE, "teacher": OTHER, "epoch": 3}, path)
    with pytest.raises(WeightsError, match="do not say which is meant: student, teacher"):
        read_state_dict(path)
    assert torch.equal(read_state_dict(path, wrapper="teacher")["weight"], OTHER["weight"])


def test_what_is_left_out_is_named(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({**STATE, "epoch": 3, "config": {"lr": 0.1}}, path)
    assert "no" not in read_state_dict(path)
    assert "epoch, config" in read_weights(path).notes[0]
    torch.save({"state_dict": STATE, "step": torch.tensor(5), "epoch": 3}, path)
    assert read_weights(path).left_out == ["step"]
    torch.save({**STATE, "head": OTHER}, path)
    with pytest.raises(WeightsError, match="do not say which is meant: head"):
        read_state_dict(path)
    torch.save({0: torch.zeros(1), "weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"not names of parameters but 0 \(int\)"):
        read_state_dict(path)


def test_quantised_weights_are_not_cast_to_nonsense():
    model = nn.Linear(3, 2)
    with pytest.raises(WeightsError, match=r"weight: torch.int8 given, torch.float32 expected"):
        load_weights(model, {"weight": torch.ones(2, 3, dtype=torch.int8), "bias": torch.zeros(2)})


def test_precisions_of_the_file_or_of_the_model():
    state = {"weight": torch.ones(2, 3, dtype=torch.float64), "bias": torch.ones(2, dtype=torch.bfloat16)}
    model = nn.Linear(3, 2)
    load_weights(model, state)
    assert (model.weight.dtype, model.bias.dtype) == (torch.float32, torch.float32)
    load_weights(model, state, keep_dtypes=True)
    assert (model.weight.dtype, model.bias.dtype) == (torch.float64, torch.bfloat16)
