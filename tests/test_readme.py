"""Every snippet of the README runs, and says what it claims."""

import pytest

import img2vid
from tests.documents import ROOT, blocks, dead_links, run_command

README = (ROOT / "README.md").read_text()


def test_python(tmp_path, monkeypatch):
    """One after the other in one session, as a reader would."""
    monkeypatch.chdir(tmp_path)
    img2vid.convert("nano_clip").save_pretrained("runs/convert/nano_clip")  # as the first command has done
    names = {}
    assert len(blocks(README, "python")) >= 4
    for block in blocks(README, "python"):
        exec(compile("\n" * block.line + block.text, "README.md", "exec"), names)
    assert names["features"].shape == (1, 192)
    assert names["scores"].shape == (1, 2) and abs(float(names["scores"].detach().sum()) - 1) < 1e-5
    assert names["accuracy"] == pytest.approx(0.98, abs=0.01)
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
