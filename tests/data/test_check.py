"""`img2vid data check`: everything wrong is found, named and counted; good rows come out with their frame counts."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import pytest

from img2vid.data import check, prepare
from img2vid.data.lists import read_list
from img2vid.data.manifest import Row
from tests.conftest import hear_interrupts
from tests.data import clips


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A list with one of each: good, again, missing, no video, damaged, too short, out of range, only audio."""
    folder = tmp_path_factory.mktemp("mixed")
    good = clips.encode(folder / "good.mp4", frames=20, size=(48, 64))
    shutil.copy(good, folder / "copy.mp4")
    (folder / "text.mp4").write_text("hello")
    clips.encode(folder / "short.mp4", frames=3, size=(48, 64), seed=4)
    clips.encode(folder / "avi.avi", frames=11, size=(48, 64), codec="mpeg4", options={"bf": "2"})
    clips.audio_only(folder / "audio.mp4")
    damaged = bytearray(Path(good).read_bytes())
    start = damaged.find(b"mdat")
    damaged[start + 1200 : start + 1500] = bytes(300)
    (folder / "damaged.mp4").write_bytes(damaged)
    lines = [
        "path,label,start_seconds,end_seconds",
        "good.mp4,run,,",
        "copy.mp4,run,,",
        "gone.mp4,run,,",
        "text.mp4,jump,,",
        "short.mp4,jump,,",
        "avi.avi,walk,,",
        "audio.mp4,walk,,",
        "damaged.mp4,walk,,",
        "good.mp4,run,9,10",
    ]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_everything_wrong_is_found_named_and_counted(mixed, capsys):
    assert check.main([str(mixed / "list.csv"), "--min-frames", "8", "--num-workers", "2"]) == 1
    printed = capsys.readouterr().out
    rows = list(csv.DictReader((mixed / "list.checked.csv").read_text().splitlines()))
    assert [(Path(r["path"]).name, r["label"], r["frames"]) for r in rows] == [
        ("good.mp4", "run", "20"),
        ("copy.mp4", "run", "20"),
        ("avi.avi", "walk", "11"),
    ]
    found = csv.DictReader((mixed / "list.quarantine.csv").read_text().splitlines())
    kinds = {Path(r["path"]).name + r["where"][-6:]: r["kind"] for r in found}
    assert kinds == {
        "gone.mp4 row 4": "missing",
        "text.mp4 row 5": "undecodable",
        "short.mp4 row 6": "too short",
        "audio.mp4 row 8": "undecodable",
        "damaged.mp4 row 9": "damaged",
        "good.mp4row 10": "too short",
    }
    assert "3 of 9 good, 1 duplicates; 1 damaged, 1 missing, 2 too short, 2 undecodable" in printed
    assert "class jump: 0   <- no good video" in printed and "class run: 2" in printed
    assert f"{mixed}/list.csv row 3" in printed and "has the content of" in printed
    assert not [name for name in os.listdir(mixed) if name.endswith(".tmp")]


def test_the_checked_list_is_a_good_list(mixed):
    check.main([str(mixed / "list.csv"), "--min-frames", "8", "--num-workers", "1", "--output", f"{mixed}/b.jsonl"])
    assert [row.frames for row in read_list(mixed / "b.jsonl").rows] == [20, 20, 11]
    assert check.main([str(mixed / "b.jsonl"), "--fast", "--num-workers", "1"]) == 0


def test_folders_named_by_numbers_keep_their_class_numbers(mixed, tmp_path, capsys):
    for name in ("1", "2", "10"):
        (tmp_path / "set" / name).mkdir(parents=True)
        shutil.copy(mixed / "good.mp4", tmp_path / "set" / name / f"{name}.mp4")
    assert check.main([str(tmp_path / "set"), "--output", str(tmp_path / "checked.csv"), "--num-workers", "1"]) == 0
    numbers = {Path(row.path).name: row.label for row in read_list(tmp_path / "set").rows}
    assert {Path(row.path).name: row.label for row in read_list(tmp_path / "checked.csv").rows} == numbers
    (tmp_path / "ones.txt").write_text(f"{mixed}/good.mp4 1\n{mixed}/copy.mp4 2\n")
    assert check.main([str(tmp_path / "ones.txt"), "--num-workers", "1"]) == 0
    assert "labels begin at 1: class numbers count from 0, so 2 needs 3 classes" in capsys.readouterr().out


def test_wrong_lists_exit_with_2(mixed, capsys):
    assert check.main([str(mixed / "none.csv")]) == 2
    (mixed / "bad.csv").write_text("path,label\n,3\n")
    assert check.main([str(mixed / "bad.csv")]) == 2
    assert "bad.csv row 2: no path" in capsys.readouterr().err
    assert check.main([str(mixed / "list.csv"), "--output", "x.txt"]) == 2


def test_folders_that_cannot_be_written_and_wrong_numbers_exit_with_2(mixed, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert check.main([str(mixed / "b.csv"), "--num-workers", "1"]) == 2
    shutil.copy(mixed / "good.mp4", tmp_path)
    (tmp_path / "l.csv").write_text("path\ngood.mp4\n")
    arguments = [str(tmp_path / "l.csv"), "--num-workers", "1", "--output", str(tmp_path / "file" / "x.csv")]
    assert check.main(arguments) == 2
    assert prepare.main([str(tmp_path / "l.csv"), str(tmp_path / "file" / "out"), "--num-workers", "1"]) == 2
    assert capsys.readouterr().err.count("error: ") == 3
    with pytest.raises(SystemExit) as left:
        check.main([str(tmp_path / "l.csv"), "--num-workers", "0"])
    assert left.value.code == 2 and "expected a number, 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "prepare"])
def test_ctrl_c_leaves_whole_files_and_exits_with_130(mixed, tmp_path, command):
    """To every process of the command, as a terminal sends it, while the workers are at it."""
    for number in range(30):
        shutil.copy(mixed / "good.mp4", tmp_path / f"{number}.mp4")
    (tmp_path / "l.csv").write_text("path\n" + "".join(f"{number}.mp4\n" for number in range(30)))
    out = ["--output", str(tmp_path / "checked.csv")] if command == "check" else [str(tmp_path / "out")]
    started = "import sys; print('begun', flush=True)\nfrom img2vid.data import {0}\nsys.exit({0}.main(sys.argv[1:]))"
    running = subprocess.Popen(
        [sys.executable, "-c", started.format(command), str(tmp_path / "l.csv"), *out, "--num-workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_interrupts,
    )
    while len(psutil.Process(running.pid).children()) < 2:  # until the pool is there
        assert running.poll() is None
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    errors = running.communicate(timeout=120)[1]
    assert running.returncode == 130 and "interrupted" in errors.splitlines()[-1]
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "checked.csv").exists()


def test_an_interrupt_while_processes_start_takes_effect_when_they_have(monkeypatch):
    """The thread that manages a pool is awaited while it starts; interrupted there, it can no longer be joined."""
    start, began = ProcessPoolExecutor._start_executor_manager_thread, []

    def interrupted_start(pool):
        signal.raise_signal(signal.SIGINT)
        start(pool)
        began.append(pool)

    monkeypatch.setattr(ProcessPoolExecutor, "_start_executor_manager_thread", interrupted_start)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests' own processes may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            list(check.in_processes(die_on_bad, [Row("a"), Row("b")], (), 1, lambda: None))
        assert len(began) == 2 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def die_on_bad(row):
    if "bad" in row.path:
        os._exit(9)
    return row.path


def test_a_file_that_kills_its_process_is_named():
    rows = [Row("a"), Row("bad"), Row("c"), Row("d")]
    found = dict(check.in_processes(die_on_bad, rows, (), 2, lambda: None))
    assert {number: str(result) for number, result in found.items()} == {
        0: "a",
        1: "bad: reading it killed the process",
        2: "c",
        3: "d",
    }
