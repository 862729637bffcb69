"""decord, torchcodec and folders of frames: the same pixels as the default reader, or an error."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from img2vid.data import VideoError, open_video, probe, read_clip
from img2vid.data.errors import missing_extra
from tests.data import clips
from tests.data.clips import same

ORDINARY = ["bframes", "plain_avi", "rotated_90", "rotated_270", "vp9", "bt709_full", "variable_rate", "one_frame"]
REFUSED_BY_DECORD = ["edit_list", "open_gop", "hevc_open_gop", "bframes_avi", "mpeg_ts", "av1", "trim_open_gop"]
REFUSED_BY_BOTH = ["intra_refresh", "false_keyframes", "false_keyframes_mkv", "vp8_hidden"]


@pytest.mark.parametrize("name", ORDINARY)
def test_decord_agrees_on_ordinary_clips(name, folder):
    path = clips.make(name, folder / f"d{name}")
    count = probe(path).frames
    for indices in ([count - 1, 0, 0], sorted(random.Random(1).choices(range(count), k=8))):
        assert torch.equal(read_clip(path, indices, backend="decord"), read_clip(path, indices))


@pytest.mark.parametrize("name", REFUSED_BY_DECORD + REFUSED_BY_BOTH)
def test_decord_is_not_trusted_where_it_is_wrong(name, folder):
    path = clips.make(name, folder / f"w{name}")
    with pytest.raises(VideoError, match='Use backend="pyav"'):
        read_clip(path, [0], backend="decord")


def test_a_hanging_decord_is_stopped(folder, monkeypatch, tmp_path):
    from img2vid.data.backends import decord

    (tmp_path / "decord.py").write_text("import time\nclass VideoReader:\n    def __init__(*a, **k): time.sleep(600)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(decord, "CHILD", decord.Child())
    monkeypatch.setattr(decord, "TIMEOUT_SECONDS", 1.0)
    path = clips.make("bframes", folder / "hang")
    with pytest.raises(VideoError, match="no answer within 1 seconds and was stopped"):
        read_clip(path, [0], backend="decord")
    assert decord.CHILD.process is None


def test_missing_extras_are_named(folder, monkeypatch):
    path = clips.make("one_frame", folder / "missing")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for backend in ("decord", "torchcodec"):
        with pytest.raises(ImportError, match=rf"pip install 'img2vid\[{backend}\]'"):
            read_clip(path, [0], backend=backend)
    assert "img2vid[wds]" in str(missing_extra("webdataset", "wds", "reading tar files"))


TORCHCODEC = """
import sys
from img2vid.data import VideoError, read_clip, probe
import torch
for path in sys.argv[1:]:
    if path == "REFUSED":
        break
    n = probe(path).frames
    for indices in ([n - 1, 0, 0], list(range(0, n, 7))):
        assert torch.equal(read_clip(path, indices, backend="torchcodec"), read_clip(path, indices)), path
for path in sys.argv[sys.argv.index("REFUSED") + 1:]:
    try:
        read_clip(path, [0], backend="torchcodec")
    except VideoError as error:
        assert path in str(error)
    else:
        raise SystemExit(f"not refused: {path}")
print("agreed")
"""


def test_torchcodec_agrees_on_ordinary_clips(folder, tmp_path):
    """torchcodec looks for FFmpeg on the system. PyAV's own serves, under the names torchcodec looks for."""
    import av

    bundled = Path(av.__file__).parents[1] / "av.libs"
    for library in [*bundled.glob("libav*"), *bundled.glob("libsw*")]:
        name, _, rest = library.name.partition("-")
        version = rest.split(".so.")[-1].split(".")[0]
        (tmp_path / f"{name}.so.{version}").symlink_to(library)
    good = [str(clips.make(n, folder / f"t{n}")) for n in (*ORDINARY, "open_gop", "hevc", "edit_list", "av1")]
    bad = [str(clips.make(n, folder / f"t{n}")) for n in ("bframes_avi", "mpeg_ts", "mpeg2_ps", *REFUSED_BY_BOTH)]
    bad.append(str(clips.display_matrix(clips.make("one_frame", folder / "tmirror"), -1, 0, 0, 1)))
    (folder / "not.mp4").write_bytes(b"no video at all")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", TORCHCODEC, *good, "REFUSED", *bad, str(folder / "not.mp4")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip().endswith("agreed"), done.stderr


def test_a_folder_of_frames(folder, tmp_path):
    from PIL import Image

    pictures = clips.moving_picture(12)
    for t, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"frame_{t}.png")  # 2 comes before 10
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / "._frame_0.png").write_text("not a frame either")
    assert same(read_clip(tmp_path, [11, 2, 2, 10]), pictures, [11, 2, 2, 10])
    info = probe(tmp_path)
    assert (info.frames, info.fps, info.height, info.width, info.codec) == (12, None, 96, 128, "png")
    Image.fromarray(pictures[0]).save(tmp_path / "frame_12.jpg", quality=95)
    assert read_clip(tmp_path, [12]).shape == (1, 3, 96, 128)
    (tmp_path / "frame_13.jpg").write_bytes(b"\xff\xd8 broken")
    with pytest.raises(VideoError, match=r"frame frame_13\.jpg is not readable"):
        read_clip(tmp_path, [13])
    Image.fromarray(pictures[0][:50]).save(tmp_path / "frame_14.png")
    with pytest.raises(VideoError, match="change size"):
        read_clip(tmp_path, [0, 14])


def test_frames_of_a_folder_are_upright_eight_bit_and_in_one_order(tmp_path):
    from PIL import Image

    picture = clips.moving_picture(1)[0]
    turn = Image.Exif()
    turn[0x0112] = 6  # shown a quarter turn clockwise
    for name in ("1.png", "01.png", "x\u00b21.png", "x10.jpeg"):  # a superscript two is a digit and no number
        Image.fromarray(picture).save(tmp_path / name, exif=turn)
    expected = np.rot90(picture, -1)
    clip = read_clip(tmp_path, [0, 1, 2, 3])
    assert clip.shape == (4, 3, 128, 96)
    assert same(clip[[0, 1, 3]], [expected], [0, 0, 0])
    assert np.abs(clips.thwc(clip)[2].astype(int) - expected).mean() < 8
    with open_video(tmp_path) as reader:
        assert [file.name for file in reader.files] == ["01.png", "1.png", "x10.jpeg", "x\u00b21.png"]
    deep = tmp_path / "deep"
    deep.mkdir()
    Image.fromarray(picture[..., 0].astype(np.uint16) * 256 + 77).save(deep / "0.png")
    assert same(read_clip(deep, [0]), [np.repeat(picture[..., :1], 3, -1)], [0])


def test_a_missing_ffmpeg_is_explained(folder, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("Could not load libtorchcodec. Likely causes: FFmpeg is not installed")

    monkeypatch.setattr("torchcodec.decoders.VideoDecoder", fails)
    with pytest.raises(ImportError, match="found no FFmpeg it can load"):
        read_clip(clips.make("one_frame", folder / "noffmpeg"), [0], backend="torchcodec")
