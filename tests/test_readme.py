"""Every snippet of the README runs, and says what it claims."""

import numpy as np

import img2vid
from img2vid.data.synthetic import write_video
from tests.documents import ROOT, blocks, dead_links, run_command

README = (ROOT / "README.md").read_text()


def test_python(tmp_path, monkeypatch):
    """One after the other in one session, as a reader would."""
    monkeypatch.chdir(tmp_path)
    frames = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    write_video(frames, tmp_path / "my_video.mp4", frames_per_second=12)
    names = {}
    assert len(blocks(README, "python")) >= 2
    for block in blocks(README, "python"):
        exec(compile("\n" * block.line + block.text, "README.md", "exec"), names)
    assert names["scores"].shape == (1, 2) and abs(float(names["scores"].detach().sum()) - 1) < 1e-5
    assert img2vid.load("runs/my_model").config.num_frames == 8
    assert names["logits"].shape == (2, 10) and not names["logits"].any()
    assert sum(len(group) for group in names["groups"].values()) > 200


def test_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    lines = [line for block in blocks(README, "bash") for line in block.commands if "venv" not in line]
    assert len(lines) >= 5
    for line in lines:
        assert line.startswith(("python -m img2vid.convert ", "img2vid "))
        run_command(line)


def test_the_two_setup_commands():
    commands = [block.text.strip() for block in blocks(README, "bash") if "venv" in block.text]
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/python -m img2vid.convert --backbone nano_clip")
    assert commands[1].endswith("python -m pytest -n auto")


def test_links_lead_somewhere():
    assert dead_links(ROOT / "README.md") == []
