"""`img2vid doctor`: what is there is tried, what is missing is named with the command that brings it."""

import importlib.metadata
import json

import pytest

from img2vid import doctor
from img2vid.cli import main as cli


@pytest.fixture
def installed(monkeypatch):
    """Versions to pretend: name -> version, or None for not installed."""
    pretended, real = {}, importlib.metadata.version

    def version(name):
        if name in pretended and pretended[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return pretended.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return pretended


def test_here_everything_needed_works(capsys):
    assert cli(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and {"torch", "timm", "av"} <= {package["what"] for package in found["packages"]}
    assert {"what": "pyav", "found": "reads 12 of 12 frames", "ok": True, "mend": ""} in found["readers"]
    assert any(fact["what"] == "processor cores" for fact in found["machine"])


def test_a_missing_extra_is_no_fault_and_comes_with_its_command(installed, capsys):
    installed.update({"peft": None, "lightning": "2.6.3"})
    assert cli(["doctor", "--json"]) == 0
    extras = {extra["what"]: extra for extra in json.loads(capsys.readouterr().out)["extras"]}
    assert extras["peft"] == {
        "what": "peft",
        "found": "peft missing",
        "ok": None,
        "mend": "pip install 'img2vid[peft]'",
    }
    assert "lightning 2.6.3, which is not >=2.6.5" in extras["train"]["found"]
    assert extras["plot"]["ok"] and "lightning" in extras["demo"]["found"]  # which asks for train


def test_a_missing_or_old_core_package_is_wrong_and_nothing_is_run_on_it(installed, capsys):
    installed.update({"timm": "1.0.3", "av": None})
    assert cli(["doctor"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "1.0.3, which is not >=1.0.24" in printed and "pip install 'timm>=1.0.24'" in printed
    assert "pip install 'av>=17.1'" in printed and "12 frames" not in printed


def test_a_reader_with_other_frames_is_wrong(monkeypatch):
    from img2vid.data import reading

    read = reading.read_clip
    darker = lambda path, indices, backend: read(path, indices) // (1 + (backend == "decord"))  # noqa: E731
    monkeypatch.setattr(reading, "read_clip", darker)
    found = {finding.what: finding for finding in doctor.try_readers()}
    assert found["pyav"].ok and found["decord"].ok is False and "other frames" in found["decord"].found


def test_a_reader_that_fails_is_told_with_its_reason(monkeypatch):
    from img2vid.data import reading
    from img2vid.data.errors import VideoError

    def broken(path, indices, backend):
        raise VideoError(f"{backend} finds no library\nand more lines")

    monkeypatch.setattr(reading, "read_clip", broken)
    found = {finding.what: finding for finding in doctor.try_readers()}
    assert found["pyav"].ok is False and found["pyav"].found == "fails: pyav finds no library"
    assert found["decord"].ok is None
