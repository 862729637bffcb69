"""`img2vid data prepare`: the same pictures in files that are quick to read; resumable, atomic, failures named."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from img2vid.data import prepare, probe, read_clip
from img2vid.data.lists import read_list
from tests.data import clips


@pytest.fixture
def listed(tmp_path):
    clips.encode(tmp_path / "a.mp4", frames=40, size=(128, 180), options={"bf": "3", "g": "250"})
    clips.encode(tmp_path / "b.avi", frames=30, size=(48, 64), codec="mpeg4", seed=2)
    (tmp_path / "c.mp4").write_text("no video")
    (tmp_path / "list.csv").write_text(
        "path,label,caption,start_seconds,end_seconds\na.mp4,run,,,\nb.avi,jump,a cube,0.4,0.8\nc.mp4,jump,,,\n"
    )
    return tmp_path


def run(folder, *more):
    return prepare.main(
        [str(folder / "list.csv"), str(folder / "out"), "--num-workers", "2", "--short-side", "96", *more]
    )


def test_prepared_videos_show_the_same_and_read_quickly(listed, capsys):
    assert run(listed) == 1
    printed = capsys.readouterr().out
    assert "prepared 2 of 3 videos" in printed and "times as fast" in printed
    assert "failed:" in printed and "list.csv row 4" in printed
    videos = read_list(listed / "out" / "manifest.csv")
    assert [(row.label, row.captions, row.frames, row.start_seconds) for row in videos.rows] == [
        (1, (), 40, None),
        (0, ("a cube",), 10, None),
    ]
    with av.open(videos.rows[0].path) as container:
        stream = container.streams.video[0]
        keys = [i for i, packet in enumerate(container.demux(stream)) if packet.size and packet.is_keyframe]
        assert keys[0] == 0 and np.diff([*keys, 40]).max() <= 16
        assert not stream.codec_context.has_b_frames
    assert (probe(videos.rows[0].path).height, probe(videos.rows[0].path).width) == (96, 136)
    original = read_clip(listed / "a.mp4", range(40), short_side=96).float()
    prepared = read_clip(videos.rows[0].path, range(40)).float()
    assert (original[..., :134] - prepared[..., :134]).abs().mean() < 8  # 135 pixels wide became 136
    cut = read_clip(videos.rows[1].path, range(10)).float()
    assert (cut - read_clip(listed / "b.avi", range(10, 20)).float()).abs().mean() < 6


def test_a_second_run_makes_only_what_is_missing(listed):
    run(listed)
    files = sorted((listed / "out" / "videos").iterdir())
    assert len(files) == 2
    times = {file: file.stat().st_mtime_ns for file in files}
    files[0].unlink()
    run(listed)
    again = {file: file.stat().st_mtime_ns for file in (listed / "out" / "videos").iterdir()}
    assert again.keys() == times.keys()
    assert again[files[1]] == times[files[1]] and again[files[0]] != times[files[0]]


def test_a_changed_source_or_encoding_is_made_anew(listed):
    row = read_list(listed / "list.csv").rows[0]
    encoding = prepare.Encoding()
    first = prepare.prepared_path(row, listed, encoding)
    assert prepare.prepared_path(row, listed, encoding) == first
    assert prepare.prepared_path(row, listed, prepare.Encoding(crf=30)) != first
    clips.encode(row.path, frames=12, size=(48, 64))
    assert prepare.prepared_path(row, listed, encoding) != first


def test_a_failure_leaves_no_file(listed):
    data = bytearray((listed / "a.mp4").read_bytes())
    middle = data.find(b"mdat") + 3000
    data[middle : middle + 400] = os.urandom(400)
    (listed / "a.mp4").write_bytes(data)
    assert run(listed) == 1
    quarantine = list(csv.DictReader((listed / "out" / "quarantine.csv").read_text().splitlines()))
    assert [Path(row["path"]).name for row in quarantine] == ["a.mp4", "c.mp4"]
    assert [file.suffix for file in (listed / "out" / "videos").iterdir()] == [".mp4"]  # of b.avi


def test_a_missing_video_is_called_what_it_is_called_elsewhere(tmp_path, capsys):
    (tmp_path / "list.csv").write_text("path,label\ngone.mp4,0\n")
    assert prepare.main([str(tmp_path / "list.csv"), str(tmp_path / "out"), "--num-workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert f"failed: {tmp_path}/list.csv row 2: {tmp_path}/gone.mp4: no such file" in printed and "Errno" not in printed


def test_folders_of_frames_can_be_prepared(tmp_path):
    from PIL import Image

    pictures = clips.moving_picture(9, 48, 64)
    (tmp_path / "in" / "walk" / "clip1").mkdir(parents=True)
    for t, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "in" / "walk" / "clip1" / f"{t}.png")
    row = prepare.prepare_row(read_list(tmp_path / "in").rows[0], tmp_path / "out", prepare.Encoding())
    assert row.frames == 9
    clip = read_clip(row.path, range(9)).permute(0, 2, 3, 1).numpy()
    assert np.abs(clip.astype(float) - pictures).mean() < 6


def test_wrong_arguments_exit_with_2(listed, capsys):
    assert prepare.main([str(listed / "none.csv"), str(listed / "out")]) == 2
    assert run(listed, "--crf", "80") == 2
    assert "crf from 0 to 51" in capsys.readouterr().err


def test_a_prepared_file_that_is_not_whole_is_made_anew(listed):
    """As a power failure leaves them: there, by the right name, and cut off."""
    run(listed)
    for file in (listed / "out" / "videos").iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    assert run(listed) == 1  # of c.mp4 alone
    assert [row.frames for row in read_list(listed / "out" / "manifest.csv").rows] == [40, 10]


def test_a_full_disk_ends_the_run_and_blames_no_video(listed):
    """A limit on the size of files stands for the disk: writing fails in the middle of a video."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    arguments = [str(listed / "list.csv"), str(listed / "out"), "--num-workers", "1", "--short-side", "96"]
    code = f"{limited}; import sys; from img2vid.data import prepare; sys.exit(prepare.main({arguments!r}))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "File too large" in ended.stderr and "Traceback" not in ended.stderr
    left = [path for path in (listed / "out").rglob("*") if path.is_file()]
    assert all(
        path.suffix == ".mp4" and probe(path).frames == 10 for path in left
    )  # b.avi's may have been small enough
    assert run(listed) == 1  # goes on where it stopped
    assert len(read_list(listed / "out" / "manifest.csv")) == 2
