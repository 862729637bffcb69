"""CLIP_benchmark's layout, written by hand and read as a list."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from img2vid.cli import main as cli
from img2vid.data.lists import read_list
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.protocols import gather_lists


def add(tar, name, content: bytes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def folder(motion, tmp_path):
    """Ten of the test videos in two shards, with classes, templates and captions."""
    videos = read_list(motion / "test.csv")
    folder = tmp_path / "wds"
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(videos.class_names) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a video of {c}\n{c}.\n")
    (folder / "test" / "nshards.txt").write_text("2\n")
    for shard in range(2):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for i in range(5 * shard, 5 * shard + 5):
                row = videos.rows[i]
                add(tar, f"s{i:04d}.cls", str(row.label).encode())
                add(tar, f"s{i:04d}.mp4", Path(row.path).read_bytes())
                add(tar, f"s{i:04d}.txt", row.captions[0].encode())
    return folder


def test_it_is_the_list_it_was_made_from(folder, motion, tmp_path):
    found, expected = gather_lists([folder], unpack_to=tmp_path / "u").videos, read_list(motion / "test.csv")
    assert found.class_names == expected.class_names and len(found) == 10
    for row, other in zip(found.rows, expected.rows[:10], strict=True):
        assert (row.label, row.captions) == (other.label, other.captions)
        assert Path(row.path).read_bytes() == Path(other.path).read_bytes()


def test_unpacked_once_and_again_when_a_shard_changes(folder, tmp_path):
    first = gather_lists([folder], unpack_to=tmp_path / "u").videos
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "u").rglob("*.mp4")}
    assert gather_lists([folder], unpack_to=tmp_path / "u").videos == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "u").rglob("*.mp4")} == times
    with tarfile.open(folder / "test" / "1.tar", "w") as tar:
        add(tar, "x.mp4", b"other")
        add(tar, "x.cls", b"3")
    again = gather_lists([folder], unpack_to=tmp_path / "u").videos
    assert len(again) == 6 and Path(again.rows[5].path).read_bytes() == b"other"


def test_any_order_and_any_folder_of_members(folder, tmp_path):
    """`tar cf 0.tar ./*` writes "./7.mp4", folders may hold dots, and a tar need not keep a sample together."""
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for name, number in (("./a", 0), ("v1.0/a", 1), ("b", 2)):
            add(tar, f"{name}.cls", str(number).encode())
        for name, content in (("b", b"third"), ("v1.0/a", b"second"), ("./a", b"first")):
            add(tar, f"{name}.mp4", content)
    rows = gather_lists([folder], unpack_to=tmp_path / "u").videos.rows[:3]
    assert [(row.label, Path(row.path).read_bytes()) for row in rows] == [(0, b"first"), (1, b"second"), (2, b"third")]


def test_a_sample_without_a_video_is_missing_and_not_forgotten(folder, nano_folder, tmp_path, capsys):
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        add(tar, "lost.cls", b"0")
    given = ["--model", str(nano_folder), "--data", str(folder), "--cache", str(tmp_path / "c"), "--num-workers", "0"]
    assert cli(["eval", "zero-shot", *given, "--out", str(tmp_path / "z.json")]) == 0
    assert "5 of 6 videos; 1 missing: " in capsys.readouterr().out


def test_members_cannot_leave_the_folder(folder, tmp_path):
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        add(tar, "../../evil.mp4", b"x")
        add(tar, "../../evil.cls", b"0")
    rows = gather_lists([folder], unpack_to=tmp_path / "a" / "b").videos.rows
    assert Path(rows[0].path).is_relative_to(tmp_path / "a" / "b") and not list(tmp_path.glob("**/evil*"))


def test_zero_shot_takes_its_templates(folder, nano_folder, tmp_path):
    given = ["--model", str(nano_folder), "--data", str(folder), "--cache", str(tmp_path / "c"), "--num-workers", "0"]
    assert cli(["eval", "zero-shot", *given, "--out", str(tmp_path / "z.json")]) == 0
    result = json.loads((tmp_path / "z.json").read_text())
    assert result["protocol"]["templates"]["texts"] == ["a video of {}", "{}."] and result["data"]["used"] == 10
    assert cli(["eval", "zero-shot", *given, "--templates", "name", "--out", str(tmp_path / "z.json")]) == 0
    assert json.loads((tmp_path / "z.json").read_text())["protocol"]["templates"]["texts"] == ["{}"]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda test: (test / "1.tar").unlink(), "1.tar is missing; nshards.txt says there are 2"),
        (lambda test: (test / "nshards.txt").write_text("two"), "must hold one number"),
        (lambda test: (test / "1.tar").write_bytes(b"no tar" * 200), "is no shard of this layout"),
        (lambda test: (test.parent / "classnames.txt").write_text("one\n"), "but classnames.txt has 1"),
    ],
)
def test_what_does_not_fit_is_said(folder, tmp_path, break_it, said):
    break_it(folder / "test")
    with pytest.raises(EvaluationError, match=said):
        gather_lists([folder], unpack_to=tmp_path / "u")
