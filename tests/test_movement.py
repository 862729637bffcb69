"""The certificate of a training says how far a model moved, and nothing where it did not."""

import json

import pytest
import torch

import img2vid
from img2vid.certificate import certify
from img2vid.checkpoints.native import load_reference, recorded_fingerprint
from img2vid.cli import main
from img2vid.errors import WeightsError
from img2vid.training.movement import Beginning, measure_movement
from tests.conftest import small_clip, small_vit


@pytest.fixture
def model():
    return img2vid.convert(small_vit(), num_frames=3)


def beginning_of(model):
    return Beginning({name: tensor.clone() for name, tensor in model.state_dict().items()})


def test_a_model_that_stood_still(model, clips):
    movement = measure_movement(model, beginning_of(model), steps=0, clips=clips)
    assert movement.features["clips"] == movement.features["stills"] == pytest.approx(1.0, abs=1e-12)
    assert movement.features["order_before"] == movement.features["order_now"] == pytest.approx(0.0, abs=1e-12)
    assert movement.image_weights["before"] == movement.image_weights["now"]
    assert {(layer["distance"], layer["changed"]) for layer in movement.layers.values()} == {(0.0, 0)}


def test_distances_by_hand_and_the_model_is_left_as_it_was(model, clips):
    beginning = beginning_of(model)
    with torch.no_grad():
        model.blocks[1].temporal_fc.weight.fill_(0.5)
        model.blocks[0].mlp.fc1.bias.add_(2.0)
        model.time_embed.copy_(torch.randn(model.time_embed.shape))  # without it, no order can be told
    trained = beginning_of(model)
    movement = measure_movement(model, beginning, steps=7, clips=clips)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    gate, bias = model.blocks[1].temporal_fc.weight.numel(), model.blocks[0].mlp.fc1.bias.numel()
    new = movement.layers["block_1/new"]
    assert new["distance"] == pytest.approx(0.5 * gate**0.5) and new["relative"] is None and new["changed"] == 1
    old = movement.layers["block_0/pretrained"]
    assert old["distance"] == pytest.approx(2.0 * bias**0.5, rel=1e-6) and old["relative"] > 0
    assert movement.layers["block_2/copied"]["changed"] == 0
    assert movement.features["clips"] < 1 and movement.features["order_before"] < 1e-12
    assert movement.features["order_now"] > 1e-9
    assert movement.image_weights["before"] != movement.image_weights["now"]
    assert "7 steps moved 3 of" in str(movement) and json.loads(movement.to_json())["steps"] == 7


def test_the_fingerprint_is_the_one_of_conversion_certificates(clips):
    model = img2vid.convert(small_clip(), num_frames=3)
    certificate = certify(model, small_clip(), num_frames=[1])
    movement = measure_movement(model, beginning_of(model), steps=0, clips=clips)
    assert movement.image_weights["now"] == certificate.weights_now


def test_certify_reads_it_and_other_models_remove_it(tmp_path, capsys):
    from img2vid.checkpoints.native import save

    model = img2vid.convert("nano_clip", num_frames=2)
    beginning = beginning_of(model)
    model.visual.tower.blocks[0][1].temporal_fc.weight.data.fill_(0.01)
    save(model, tmp_path, movement=measure_movement(model, beginning, 3), settings="seed_everything: 0\n")
    assert (tmp_path / "training.yaml").read_text() == "seed_everything: 0\n"
    assert "3 steps moved 1 of" in (tmp_path / "README.md").read_text()
    assert recorded_fingerprint(tmp_path) == certify(model, load_reference(model), num_frames=[1]).weights_now
    assert main(["certify", str(tmp_path), "--certify-frames", "1", "2"]) == 0
    assert "unchanged since the conversion" in capsys.readouterr().out
    (tmp_path / "moved.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"moved.json is not a certificate"):
        recorded_fingerprint(tmp_path)
    save(img2vid.convert("nano_clip"), tmp_path)
    assert not (tmp_path / "moved.json").exists() and not (tmp_path / "training.yaml").exists()
