"""benchmarks/ablation.py and benchmarks/recipes.py, on real training runs of two steps."""

import json

import pytest

import img2vid
from benchmarks import ablation, recipes, trials
from img2vid.data.synthetic import main as synth

TRAINING = """
seed_everything: 0
model:
  video: {backbone: nano_clip, num_frames: 4}
  objective: {class_path: img2vid.objectives.Classification, init_args: {head: text, scale: 14.5}}
  how: {lr: 1.0e-3}
data: {train_list: x, val_list: x, num_frames: 4, flip: false, batch_size: 8, num_workers: 0}
trainer: {accelerator: cpu, devices: 1, check_val_every_n_epoch: null, log_every_n_steps: 1}
"""


def test_the_cells_are_the_whole_product_and_every_one_can_be_built():
    cells = ablation.cells()
    assert len(cells) == 28 and list(cells)[-1] == "space_only"
    assert cells["random/tanh/shared"] == {"temporal_init": "random", "gate": "tanh", "prefix_mode": "shared"}
    for cell in cells.values():
        config = img2vid.convert("nano_clip", num_frames=2, **cell).config
        assert all(getattr(config, name) == value for name, value in cell.items())


def test_a_finished_cell_is_not_trained_again(tmp_path, monkeypatch, capsys):
    synth([str(tmp_path / "set"), "--train=16", "--val=8", "--test=8", "--size=32", "--num-frames=8"])
    (tmp_path / "short.yaml").write_text(TRAINING)
    out = tmp_path / "out"
    command = [str(tmp_path / "set"), f"--config={tmp_path}/short.yaml", "--steps=2", "--every=1", f"--out={out}"]
    assert ablation.main([*command, "--only=copy/tanh/shared"]) == 0
    (found,) = json.loads((out / "ablation.json").read_text())
    assert found["name"] == "copy/tanh/shared"
    assert set(found["validation"]) == {"1", "2"} and found["branch"]["2"] > 0
    lines = (out / "ablation.md").read_text().splitlines()
    assert len(lines) == 3 and lines[2].startswith("| copy | tanh | shared |")
    assert len({line.count("|") for line in lines}) == 1
    assert not (out / "training").exists()

    monkeypatch.setattr(trials, "train", lambda *_: pytest.fail("trained again"))
    assert ablation.main([*command, "--only=copy/tanh/shared"]) == 0
    with pytest.raises(SystemExit, match="was made with other seed. Choose another --out"):
        ablation.main([*command, "--only=copy/tanh/shared", "--seed=1"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{set}", "--only=copy/tahn"], "no such trial. There are: copy/temporal_fc/per_frame, "),
        (["{set}/nowhere"], "Make the set first: img2vid data synth"),
        (["{set}", "--steps=0"], "expected a whole number of at least 1"),
    ],
)
def test_bad_arguments_teach(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        ablation.main([argument.format(set=tmp_path) for argument in arguments])
    assert words in capsys.readouterr().err


def test_recipes_are_compared_in_what_they_learn_keep_and_cost(tmp_path, monkeypatch):
    synth([str(tmp_path / "set"), "--train=16", "--val=8", "--test=8", "--size=32", "--num-frames=8"])
    (tmp_path / "short.yaml").write_text(TRAINING)
    monkeypatch.setattr(recipes, "ROUNDS", 2)
    monkeypatch.setattr(recipes, "NAMES", ("full", "aim", "st_adapter", "linear_probe"))
    command = [str(tmp_path / "set"), f"--config={tmp_path}/short.yaml", "--steps=2", "--every=1", f"--out={tmp_path}"]
    assert recipes.main(command) == 0
    results = {found["name"]: found for found in json.loads((tmp_path / "recipes.json").read_text())}
    assert list(results) == list(recipes.NAMES)

    learns = {name: found["costs"]["trainable"] for name, found in results.items()}
    assert learns["linear_probe"] == (64 + 1) * 8
    assert learns["aim"] == 4 * 3 * (2 * 96 * 24 + 24 + 96) + 4 * 96  # r = D / 4; one vector a frame
    assert max(learns, key=learns.get) == "full"
    of_full = {name: found["costs"]["bytes"] / results["full"]["costs"]["bytes"] for name, found in results.items()}
    assert of_full["full"] == 1.0 and all(0.0 < share < 1.0 for name, share in of_full.items() if name != "full")
    assert all(len(found["costs"]["time"]) == 3 for found in results.values())

    assert set(results["linear_probe"]["at the end"]) == {"motion", "opposite", "shuffled"}
    frozen = results["st_adapter"]  # time may move; what it says of digits, on pictures, had no reason to
    assert abs(frozen["at the end"]["still"] - frozen["at step 0"]["still"]) <= 0.25
    lines = (tmp_path / "recipes.md").read_text().splitlines()
    assert len(lines) == 2 + 4 and len({line.count("|") for line in lines}) == 1


def test_every_recipe_is_a_file_that_the_comparison_knows():
    assert {path.stem for path in recipes.FOLDER.glob("*.yaml")} == set(recipes.NAMES)
    for path in recipes.FOLDER.glob("*.yaml"):
        assert path.read_text().startswith("# Promise: ")
