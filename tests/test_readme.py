"""Every snippet of the README runs, and says what it claims."""

import re
import shlex
from pathlib import Path

import pytest

import img2vid
from img2vid.cli import main as cli
from img2vid.convert import main as convert

README = (Path(__file__).parents[1] / "README.md").read_text()


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_python(tmp_path, monkeypatch):
    """One after the other in one session, as a reader would."""
    monkeypatch.chdir(tmp_path)
    img2vid.convert("nano_clip").save_pretrained("runs/convert/nano_clip")  # as the first command has done
    names = {}
    assert len(snippets("python")) >= 4
    for code in snippets("python"):
        exec(compile(code, "README.md", "exec"), names)
    assert names["features"].shape == (1, 192)
    assert names["scores"].shape == (1, 2) and abs(float(names["scores"].detach().sum()) - 1) < 1e-5
    assert names["accuracy"] == pytest.approx(0.98, abs=0.01)
    assert sum(len(group) for group in names["groups"].values()) > 200


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(Path(__file__).parents[1] / "configs")
    lines = [line for block in snippets("bash") for line in block.splitlines() if "venv" not in line]
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line)
        if words[:3] == ["python", "-m", "img2vid.convert"]:
            assert convert(words[3:]) == 0, line
        else:
            assert words[0] == "img2vid"
            assert cli(words[1:]) == 0, line


def test_the_two_setup_commands():
    commands = [block.strip() for block in snippets("bash") if "venv" in block]
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/python -m img2vid.convert --backbone nano_clip")
    assert commands[1].endswith("python -m pytest -n auto")


def test_links_lead_somewhere():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (root / target).exists(), target
