"""How much of a weights file has been read is counted where it is read, and shown by commands."""

import io

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from img2vid.command import Progress, with_bar
from img2vid.weights.accounting import read_state_dict
from img2vid.weights.bytecount import watching
from tests.test_weightindex import write

STATE = {f"w{k}": torch.full((50_000,), float(k)) for k in range(4)}  # 4 x 200 kB


def reads_of(path):
    seen = []
    with watching(lambda done, total: seen.append((done, total))):
        state = read_state_dict(path)
    assert all(torch.equal(state[key], STATE[key]) for key in STATE)
    read_state_dict(path)  # nobody watches any more
    return seen


def test_bytes_are_told_as_they_are_read(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors")
    torch.save(STATE, tmp_path / "w.pth")
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    index = write(tmp_path, {"a": {k: STATE[k] for k in ("w0", "w1")}, "b": {k: STATE[k] for k in ("w2", "w3")}})
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pth", index):
        seen = reads_of(path)
        done, totals = zip(*seen, strict=True)
        assert len(set(totals)) == 1 and 800_000 < totals[0] < 810_000
        assert list(done) == sorted(done) and len(set(done)) >= 4
        assert 0 < done[0] < 400_000 and 800_000 <= done[-1] <= totals[0]
    reads_of(tmp_path / "old.pth")


def test_a_terminal_shows_a_bar(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    console.print(with_bar("Loading [vit_base]", 120_000_000, 346_000_000))
    shown = console.file.getvalue()
    assert "Loading [vit_base]" in shown and "━" in shown and "120 of 346 MB" in shown
    assert "MB" not in str(with_bar("Loading", 346, 346))


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_stage_watches(tmp_path, is_terminal):
    save_file(STATE, tmp_path / "w.safetensors")
    progress = Progress()
    progress.console = Console(file=io.StringIO(), force_terminal=is_terminal, width=100)
    progress.seconds_between_lines = 0.0
    with progress.stage("Loading"):
        read_state_dict(tmp_path / "w.safetensors")
    text = progress.console.file.getvalue()
    assert "Loading" in text and ("Read 1 of 1 MB" in text) == (not is_terminal)
