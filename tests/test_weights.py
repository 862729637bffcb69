import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

import img2vid
from img2vid.errors import WeightsError
from img2vid.weights.accounting import load_weights, read_state_dict
from tests.parity import made


class RunsCode:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_made_to_run_code_does_not_run_it(tmp_path):
    trap = tmp_path / "trap"
    with (tmp_path / "bad.pth").open("wb") as file:
        pickle.dump({"weight": RunsCode(trap)}, file)
    torch.save({"weight": RunsCode(trap)}, tmp_path / "bad2.pth")
    for name in ("bad.pth", "bad2.pth"):
        with pytest.raises(WeightsError, match="can run code"):
            read_state_dict(tmp_path / name)
    assert not trap.exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 1000, -1])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_files_are_named(tmp_path, suffix, keep):
    from safetensors.torch import save_file

    path = tmp_path / f"weights{suffix}"
    state = {"weight": torch.randn(40, 40)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"weights\.(safetensors|pth)"):
        read_state_dict(path)


def test_text_and_zip_and_folder_and_nothing(tmp_path):
    (tmp_path / "a.pth").write_text("these are not weights\n" * 10)
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        archive.writestr("hello", "world")
    for name in ("a.pth", "b.pth", "missing.pth", "."):
        with pytest.raises(WeightsError):
            read_state_dict(tmp_path / name)
    (tmp_path / "c.safetensors").write_text("not safetensors either, but long enough")
    with pytest.raises(WeightsError, match="no safetensors file"):
        read_state_dict(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {}},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"model_state": {f"model.{k}": v for k, v in s.items()}},
    ],
)
def test_wrappers_are_taken_off(tmp_path, wrap):
    state = nn.Linear(3, 2).state_dict()
    torch.save(wrap(state), tmp_path / "w.pth")
    read = read_state_dict(tmp_path / "w.pth")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[k], state[k]) for k in state)


def test_a_file_without_tensors_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="'epoch', 'lr'"):
        read_state_dict(tmp_path / "w.pth")


def test_nothing_is_loaded_unless_everything_is_accounted_for():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {
        "0.weight": torch.zeros(2, 3),
        "1.weight": torch.zeros(2, 3),
        "0.bias": torch.zeros(2),
        "extra": torch.zeros(1),
    }
    with pytest.raises(WeightsError) as caught:
        load_weights(model, state, source="file.pth")
    text = str(caught.value)
    assert "file.pth does not fit this Sequential, nothing was loaded" in text
    assert "1 missing:\n    1.bias" in text
    assert "1 unexpected:\n    extra" in text
    assert "1.weight: (2, 3) given, (2, 2) expected" in text
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("backbone.weight", "backbone.bias"), r"start with 'backbone\.'; without it they fit"),
        (("weight", "bias", "blocks.0.temporal_fc.weight"), "is a video model's"),
    ],
    ids=["prefix", "video"],
)
def test_frequent_misfits_are_explained(names, message):
    with pytest.raises(WeightsError, match=message):
        load_weights(nn.Linear(2, 2), {name: torch.zeros((2, 2) if "weight" in name else 2) for name in names})


def test_differences_named_by_pattern_are_reported():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    state = {"0.weight": torch.zeros(2, 3), "0.bias": torch.ones(2), "head.weight": torch.zeros(1)}
    report = load_weights(model, state, allow_new=[r"1\..*"], allow_dropped=[r"head\..*"])
    assert (report.loaded, report.new, report.dropped) == (
        ["0.bias", "0.weight"],
        ["1.bias", "1.weight"],
        ["head.weight"],
    )
    assert torch.equal(model[0].bias, torch.ones(2))
    with pytest.raises(WeightsError):  # a pattern matches whole keys, not parts
        load_weights(model, state, allow_new=["1"], allow_dropped=["head"])


def test_a_published_video_checkpoint_is_sent_to_import(tmp_path):
    torch.save(made.lavila(num_frames=2), tmp_path / "lavila.pth")
    sizes = {"embed_dim": made.DIM, "depth": made.DEPTH, "num_heads": made.HEADS, "patch_size": made.PATCH}
    with pytest.raises(WeightsError, match="is a video model's, not an image model's(.|\n)*img2vid import"):
        img2vid.convert("timm:vit_base_patch16_224", weights=tmp_path / "lavila.pth", backbone_args=sizes)
