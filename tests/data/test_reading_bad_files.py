"""Files that are no videos, or broken ones: an error with the path or a count, never a hang, a crash or a leak."""

import ctypes
import gc
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import psutil
import pytest

from img2vid.data import DamagedVideoWarning, VideoError, open_video, probe, read_clip
from tests.data import clips
from tests.data.clips import same


def bad_files(folder: Path) -> dict[str, Path]:
    good = clips.make("bframes", folder / "good").read_bytes()
    contents = {
        "empty.mp4": b"",
        "text.mp4": b"hello, I am not a video\n" * 50,
        "text.txt": b"hello, I am not a video\n" * 50,
        "playlist.m3u8": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "header_cut.mp4": good[:40],
        "index_cut.mp4": good[: len(good) // 2],  # the index is at the end
        "zeros.mp4": bytes(5000),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    clips.audio_only(folder / "audio.mp4")
    import av

    with av.open(str(folder / "no_frames.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        container.start_encoding()
    (folder / "directory.mp4").mkdir(exist_ok=True)
    (folder / "link.mp4").unlink(missing_ok=True)
    (folder / "link.mp4").symlink_to(folder / "nowhere.mp4")
    if not (folder / "pipe.mp4").exists():
        os.mkfifo(folder / "pipe.mp4")
    names = [*contents, "audio.mp4", "no_frames.mkv", "directory.mp4", "link.mp4", "pipe.mp4", "missing.mp4"]
    return {name: folder / name for name in names}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["auto", "decord"])
def test_bad_files_are_video_errors_with_the_path(folder, backend):
    for name, path in bad_files(folder).items():
        for act in (lambda p: read_clip(p, [0], backend=backend), lambda p: probe(p, backend=backend)):
            with pytest.raises(VideoError) as caught:
                act(path)
            assert str(path) in str(caught.value), name
            assert caught.value.path == str(path)


def test_messages_say_what_the_thing_is(folder):
    files = bad_files(folder)
    for name, words in {
        "empty.mp4": "0 bytes",
        "audio.mp4": "no decodable video stream .it holds: audio",
        "directory.mp4": "folder without frames",
        "missing.mp4": "no such file",
        "pipe.mp4": "special file",
    }.items():
        with pytest.raises(VideoError, match=words):
            read_clip(files[name], [0])
    with pytest.raises(VideoError, match="sample 7 of shard 3"):
        read_clip(b"garbage", [0], name="sample 7 of shard 3")


def test_truncated_files_raise_or_count(folder):
    """Index at the front, data cut: the packets are known to be missing."""
    path = folder / "faststart.mp4"
    whole = clips.make("bframes", folder / "whole")
    import av

    with av.open(str(whole)) as given, av.open(str(path), "w", options={"movflags": "faststart"}) as taken:
        out = taken.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = out
                taken.mux(packet)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(VideoError, match="damaged or missing"):
        read_clip(path, [0])
    info = probe(path)
    assert info.damaged_packets > 5 and info.frames < 40
    reference = clips.decoded_in_order(whole)
    with pytest.warns(DamagedVideoWarning, match=r"faststart\.mp4: \d+ damaged packets"):
        clip = read_clip(path, [0, 5], on_error="conceal")
    assert same(clip, reference, [0, 5])


@pytest.mark.parametrize("name", ["variable_rate_mkv", "vp9", "lossless_rgb", "plain_avi", "bframes_avi", "h264_avi"])
def test_avi_and_matroska_that_were_cut_off_are_noticed_wherever_the_cut_is(folder, name):
    whole = clips.make(name, folder / f"cut{name}").read_bytes()
    assert probe(whole).damaged_packets == 0
    for share in (0.5, 0.66, 0.9, 0.99):
        cut = whole[: int(share * len(whole))]
        with pytest.raises(VideoError, match="damaged or missing"):
            read_clip(cut, [0])
        assert probe(cut).damaged_packets > 0


def test_a_length_that_is_not_known_is_no_damage(folder):
    """Live recordings: Matroska with all bits of the length set, AVI with length 0."""
    matroska = bytearray(clips.make("vp9", folder / "live").read_bytes())
    at = matroska.find(b"\x18\x53\x80\x67") + 4
    assert matroska[at] == 1  # eight bytes of length
    matroska[at : at + 8] = b"\x01" + b"\xff" * 7
    assert read_clip(bytes(matroska), [0, 39]).shape[0] == 2
    avi = bytearray(clips.make("plain_avi", folder / "live2").read_bytes())
    avi[4:8] = bytes(4)
    assert read_clip(bytes(avi), [0, 39]).shape[0] == 2


def flip_bits(data: bytes, seed: int, flips: int = 30) -> bytes:
    """Damage in the coded pictures, the index at the end left alone."""
    rng, out = random.Random(seed), bytearray(data)
    start, stop = data.find(b"mdat") + 800, data.rfind(b"moov") - 8
    for _ in range(flips):
        out[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(out)


def test_bit_flips_raise_or_are_counted(folder):
    whole = clips.make("bframes", folder / "flip").read_bytes()
    noticed = 0
    for seed in range(8):
        data = flip_bits(whole, seed)
        try:
            read_clip(data, range(40))
        except VideoError as error:
            noticed += 1
            assert str(error).count("on_error=") == 1 == str(error).count(f"<{len(data)} bytes>"), error  # said once
            with pytest.warns(DamagedVideoWarning, match=r"\d+ damaged packets"):
                assert read_clip(data, range(40), on_error="conceal").shape == (40, 3, 96, 128)
            assert probe(data, decode=True).damaged_packets > 0
    assert noticed >= 6  # a flip in a residual can decode to other, legal pixels: no reader can notice that


def test_a_packet_counts_once(folder):
    """However often it is decoded again: one clip asked for as one, and frame by frame from one reader."""
    data = flip_bits(clips.make("bframes", folder / "once").read_bytes(), seed=1)
    total = probe(data, decode=True).damaged_packets
    assert total > 0
    with open_video(data, on_error="conceal") as reader:
        for _ in range(3):
            for index in range(reader.frames):
                reader.read([index])
            assert reader.damaged <= total
        reader.decode_everything()
        assert reader.damaged == total


def test_clean_files_do_not_warn(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_clip(clips.make("open_gop", folder / "clean"), [30, 12], on_error="conceal")


FUZZ = """
import random, sys
from img2vid.data import VideoError, read_clip
for path in sys.argv[1:]:
    whole = open(path, "rb").read()
    for seed in range(60):
        rng, data = random.Random(seed), bytearray(whole)
        for _ in range(rng.choice([1, 5, 50, 500])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if seed % 3 == 0:
            data = data[: rng.randrange(len(data))]
        if seed % 20 == 1:
            data = bytearray(rng.randbytes(2000))
        for act in ({"num_frames": 4}, {"indices": [3, 1], "on_error": "conceal"}):
            try:
                read_clip(bytes(data), **act)
            except (VideoError, IndexError):
                pass
print("survived")
"""


@pytest.mark.timeout(300)
def test_fuzzed_bytes_never_crash_the_process(folder):
    import img2vid.data

    names = ("bframes", "plain_avi", "vp9", "mpeg_ts", "hevc")
    paths = [str(clips.make(name, folder / f"z{name}")) for name in names]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FUZZ, *paths],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(img2vid.data.__file__).parents[2])},
    )
    assert done.stdout.strip() == "survived", (done.returncode, done.stderr[-2000:])


class Allocations(ctypes.Structure):
    """The C library's own count of memory, in bytes: unlike the pages of the process, it is exact."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "free", "fast", "mapped", "in_maps", "unused", "fast_bytes", "in_use", "idle", "top")
    ]


def test_two_thousand_opens_leave_nothing_behind(folder):
    path, text = clips.make("one_frame", folder / "leak"), folder / "leak.txt"
    text.write_text("not a video")
    process = psutil.Process()

    def work(times):
        for _ in range(times):
            read_clip(path, [0])
            with pytest.raises(VideoError):
                probe(text)

    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Allocations

    def in_use():
        gc.collect()
        return libc.mallinfo2().in_use

    work(200)
    gc.collect()
    work(50)
    assert gc.collect() < 50, "frames wait for the garbage collector"
    counted = in_use()
    for _ in range(1000):
        read_clip(path, [0])
    assert in_use() - counted < 60 * 1000
    files, memory = process.num_fds(), process.memory_info().rss
    work(1000)
    assert process.num_fds() <= files
    assert process.memory_info().rss - memory < 12 * 2**20
