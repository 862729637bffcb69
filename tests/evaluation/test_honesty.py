"""The panel against clips whose frames were moved by hand, and the layers against their definition."""

import json

import pytest
import torch

import img2vid
from img2vid.cli import main as cli
from img2vid.evaluation.conditions import shuffle
from img2vid.evaluation.honesty import honesty
from img2vid.evaluation.layers import branch_ratios, gate_norm, temporal_branches
from img2vid.evaluation.prompts import class_embeddings
from img2vid.evaluation.protocols import gather_lists
from img2vid.evaluation.reading import Views
from tests.conftest import randomize, small_vit
from tests.evaluation.conftest import CPU


@pytest.fixture
def ordered(timely):
    """A model for which places in time differ, so that order matters."""
    with torch.no_grad():
        timely.visual.time_embed.normal_(std=1.0, generator=torch.Generator().manual_seed(4))
    return timely


MOVED = {
    "model": lambda t, row: list(range(t)),
    "shuffled": shuffle,
    "reversed": lambda t, row: list(range(t))[::-1],
    "static": lambda t, row: [t // 2] * t,
    "half": lambda t, row: list(range(0, t, 2)),
}


def test_panel(ordered, motion):
    lists = gather_lists([motion / "test.csv"])
    names, rows = lists.videos.class_names, lists.videos.rows
    result = honesty(ordered, lists, Views(4), templates=["{}"], compute=CPU)
    weights, labels, predicted = class_embeddings(ordered, names, ["{}"]), torch.tensor([r.label for r in rows]), {}
    for condition, moved in MOVED.items():
        predicted[condition] = []
        for number, row in enumerate(rows):
            clip = img2vid.read_clip(row.path, num_frames=4)[moved(4, number)]
            with torch.no_grad():
                video = ordered.encode_video(ordered.normalize(clip[None]), normalize=True)
            predicted[condition].append(int((video @ weights.T).argmax()))
        predicted[condition] = torch.tensor(predicted[condition])
    assert len({tuple(p.tolist()) for p in predicted.values()}) > 3  # the conditions do differ
    for condition, p in predicted.items():
        found, right = result["metrics"][condition], (p == labels).double()
        assert found["top1"]["value"] == pytest.approx(float(right.mean()))
        assert found["changed"]["value"] == pytest.approx(float((p != predicted["model"]).double().mean()))
        as_is = (predicted["model"] == labels).double()
        assert found["lost"]["value"] == pytest.approx(float(as_is.mean() - right.mean()))
    assert result["metrics"]["shuffled"]["changed"]["value"] > 0


def test_a_fresh_model_cannot_tell_the_order(nano, motion):
    found = honesty(nano, gather_lists([motion / "test.csv"]), Views(4), compute=CPU)["metrics"]
    assert all(found[name]["changed"]["value"] == 0.0 for name in ("shuffled", "reversed", "frame_mean"))


def naive_ratio(model, clips, number):
    """Outputs before and after one block's temporal branch, from a model in which later code does not matter."""
    block, seen = model.tower.blocks[number][1], {}
    block.temporal_norm1.register_forward_pre_hook(lambda m, args: seen.update(stream=args[0].clone()))
    block.temporal_fc.register_forward_hook(lambda m, args, out: seen.update(added=out.clone()))
    with torch.no_grad():
        model(clips)
    return float(seen["added"].norm() / seen["stream"].norm()), seen


def test_layers_of_divided_attention():
    model = img2vid.convert(small_vit(), num_frames=3, temporal_layers=(0, 2)).eval()
    assert [entry["branch_to_residual"] for entry in branch_ratios(model, [torch.randn(1, 3, 3, 32, 32)])] == [0.0, 0.0]
    for number in (0, 2):
        randomize(model.tower.blocks[number][1].temporal_fc, seed=number)
    clips = torch.randn(2, 3, 3, 32, 32)
    found = branch_ratios(model, [clips[:1], clips[1:]])
    assert len(found) == 2
    for entry, number in zip(found, (0, 2), strict=True):
        fc = model.tower.blocks[number][1].temporal_fc
        assert entry["layer"].endswith(str(number))
        expected = (fc.weight.detach().double().square().sum() + fc.bias.detach().double().square().sum()).sqrt()
        assert entry["gate_norm"] == pytest.approx(float(expected))
        assert entry["branch_to_residual"] == pytest.approx(naive_ratio(model, clips, number)[0], rel=1e-4)


def test_layers_of_other_kinds():
    tanh = img2vid.convert(small_vit(), num_frames=2, gate="tanh")
    _, branch = temporal_branches(tanh)[0]
    with torch.no_grad():
        branch.temporal_fc.alpha.fill_(-0.7)
    assert gate_norm(branch) == pytest.approx(0.6043677771)
    ungated = img2vid.convert(small_vit(), num_frames=2, gate="none")
    found = branch_ratios(ungated, [torch.randn(1, 2, 3, 32, 32)])
    assert all(entry["gate_norm"] is None and entry["branch_to_residual"] > 0 for entry in found)
    encoder = img2vid.convert(small_vit(), num_frames=2, attention="factorised_encoder", encoder_layers=2)
    assert [e["branch_to_residual"] for e in branch_ratios(encoder, [torch.randn(1, 2, 3, 32, 32)])] == [0.0, 0.0]
    with torch.no_grad():
        encoder.temporal_encoder.blocks[1].fc2.bias.fill_(0.5)
    _, second = branch_ratios(encoder, [torch.randn(1, 2, 3, 32, 32)])
    assert second["gate_norm"] == pytest.approx(0.5 * 48**0.5) and second["branch_to_residual"] > 0
    assert branch_ratios(img2vid.convert(small_vit(), num_frames=2, attention="space_only"), []) == []


def test_command_writes_one_json_and_one_picture(nano_folder, motion, tmp_path, capsys):
    given = ["--model", str(nano_folder), "--data", str(motion / "test.csv"), "--cache", str(tmp_path / "cache")]
    assert cli(["eval", "honesty", *given, "--num-workers", "0", "--out", str(tmp_path / "h.json")]) == 0
    assert "frames reversed" in capsys.readouterr().out
    result = json.loads((tmp_path / "h.json").read_text())
    assert set(result["metrics"]) == {"model", "shuffled", "reversed", "static", "half", "frame_mean"}
    assert len(result["layers"]) == 4 and result["protocol"]["templates"]["name"] == "action"
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
