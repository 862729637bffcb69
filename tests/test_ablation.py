"""benchmarks/ablation.py: every cell once, on real training runs of two steps."""

import json

import pytest

import img2vid
from benchmarks import ablation
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
    assert len(cells) == 28 and len({ablation.name_of(cell) for cell in cells}) == 28
    assert cells[-1] == {"attention": "space_only"}
    for cell in cells:
        config = img2vid.convert("nano_clip", num_frames=2, **cell).config
        assert all(getattr(config, name) == value for name, value in cell.items())


def test_a_finished_cell_is_not_trained_again(tmp_path, monkeypatch, capsys):
    synth([str(tmp_path / "set"), "--train=16", "--val=8", "--test=8", "--size=32", "--num-frames=8"])
    (tmp_path / "short.yaml").write_text(TRAINING)
    out = tmp_path / "out"
    command = [str(tmp_path / "set"), f"--config={tmp_path}/short.yaml", "--steps=2", "--every=1", f"--out={out}"]
    assert ablation.main([*command, "--only=copy/tanh/shared"]) == 0
    (found,) = json.loads((out / "ablation.json").read_text())
    assert found["cell"] == {"temporal_init": "copy", "gate": "tanh", "prefix_mode": "shared"}
    assert set(found["validation"]) == {"1", "2"} and found["branch"]["2"] > 0
    lines = (out / "ablation.md").read_text().splitlines()
    assert len(lines) == 3 and lines[2].startswith("| copy | tanh | shared |")
    assert len({line.count("|") for line in lines}) == 1
    assert not (out / "training").exists()

    monkeypatch.setattr(ablation, "train", lambda *_: pytest.fail("trained again"))
    assert ablation.main([*command, "--only=copy/tanh/shared"]) == 0
    with pytest.raises(SystemExit, match="was made with other seed. Choose another --out"):
        ablation.main([*command, "--only=copy/tanh/shared", "--seed=1"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{set}", "--only=copy/tahn"], "no such cell. There are: copy/temporal_fc/per_frame, "),
        (["{set}/nowhere"], "Make the set first: img2vid data synth"),
        (["{set}", "--steps=0"], "expected a whole number of at least 1"),
    ],
)
def test_bad_arguments_teach(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        ablation.main([argument.format(set=tmp_path) for argument in arguments])
    assert words in capsys.readouterr().err
