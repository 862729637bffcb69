"""Reading against a plain sequential decode, on real clips and on one made-up clip per thing that makes it hard."""

import io
import pickle
import random
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from img2vid.data import VideoError, open_video, probe, read_clip
from tests.data import clips
from tests.data.clips import same


def random_requests(frames: int, seed: int = 0):
    """Single frames, short lists in any order, lists with duplicates, ends included."""
    rng = random.Random(seed)
    yield [0], [frames - 1], [frames - 1, 0, 0]
    for size in (1, 1, 1, 2, 4, 8, 8, 20):
        yield ([rng.randrange(frames) for _ in range(size)],)


@pytest.mark.parametrize("name", sorted(clips.HARD))
def test_hard_clips_equal_a_sequential_decode(name, folder):
    path = clips.make(name, folder / name)
    reference = clips.decoded_in_order(path)
    assert probe(path).frames == len(reference)
    for requests in random_requests(len(reference)):
        for indices in requests:
            assert same(read_clip(path, indices), reference, indices), indices
    info = probe(path, decode=True)
    assert (info.height, info.width) == reference[0].shape[:2]
    assert info.damaged_packets == 0


def test_the_hard_clips_are_hard(folder):
    """The generator does what its names say, else the test above proves nothing."""
    with open_video(clips.make("edit_list", folder / "e")) as reader:
        assert reader.index.discarded > 0 and len(reader.index.pts) < reader.index.packets
    with open_video(clips.make("edit_list_end", folder / "ee")) as reader:
        assert len(reader.index.pts) == 20 and reader.stream.frames == 40 and reader.damaged == 0
    with open_video(clips.make("open_gop", folder / "o")) as reader:
        assert reader.index.open_gop and len(reader.index.keyframes) > 2
    with open_video(clips.make("variable_rate", folder / "v")) as reader:
        assert len(set(np.diff(reader.index.pts))) > 3
    with open_video(clips.make("bt709_full", folder / "b")) as reader:
        assert reader.stream.codec_context.colorspace == 1 and reader.stream.codec_context.color_range == 2
    with open_video(clips.make("vp8_hidden", folder / "h")) as reader:
        assert reader.index.hidden == 3 and len(reader.index.pts) == 37
    for name in ("false_keyframes", "false_keyframes_mkv"):
        with open_video(clips.make(name, folder / name)) as reader:
            assert len(reader.index.keyframes) == reader.index.packets == 40
    assert probe(clips.make("rotated_90", folder / "r")).rotation == 270
    assert probe(clips.make("av1", folder / "t")).codec == "av1"


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda a: a),
        ((-1, 0, 0, 1), lambda a: a[:, ::-1]),  # a mirror: left and right
        ((1, 0, 0, -1), lambda a: a[::-1]),
        ((-1, 0, 0, -1), lambda a: a[::-1, ::-1]),
        ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
        ((0, -1, 1, 0), lambda a: np.rot90(a)),
        ((0, 1, 1, 0), lambda a: a.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda a: a[::-1, ::-1].swapaxes(0, 1)),
    ],
)
def test_pictures_stand_upright_and_the_right_way_round(matrix, shown, folder):
    path = folder / "matrix.mp4"
    plain = clips.decoded_in_order(clips.encode(path, frames=2))
    clips.display_matrix(path, *matrix)
    expected = [shown(picture) for picture in plain]
    for source in (path, path.read_bytes()):
        assert same(read_clip(source, [1, 0]), expected, [1, 0])
    info = probe(path)
    assert info.mirrored == (matrix[0] * matrix[3] - matrix[1] * matrix[2] < 0)
    turned = np.rot90(plain[0], info.rotation // 90)
    assert np.array_equal(turned[:, ::-1] if info.mirrored else turned, expected[0])


@pytest.mark.parametrize("path", clips.real_clips(), ids=lambda path: path.stem)
def test_real_clips_equal_a_sequential_decode(path):
    reference = clips.decoded_in_order(path)
    assert probe(path).frames == len(reference)
    for indices in ([len(reference) - 1, 0, 7, 7], list(range(0, len(reference), 17))):
        assert same(read_clip(path, indices), reference, indices)


def test_reading_is_not_sequential_where_an_index_serves(folder):
    """The fallback must not hide a broken index: ordinary files never need it."""
    for name in ("bframes", "open_gop", "edit_list", "vp9", "hevc", "av1", "variable_rate_mkv"):
        with open_video(clips.make(name, folder / f"x{name}")) as reader:
            reader._read_sequentially = None  # calling it would raise
            reader.read([reader.frames - 1, 3, 0])


def test_num_frames_takes_the_middle_of_equal_parts(folder):
    path = clips.make("bframes", folder / "n")  # 40 frames, parts of 10: middles 5, 15, 25, 35
    assert torch.equal(read_clip(path, num_frames=4), read_clip(path, [5, 15, 25, 35]))
    assert torch.equal(read_clip(path, num_frames=1), read_clip(path, [20]))
    avi = clips.make("bframes_avi", folder / "na")
    assert torch.equal(read_clip(avi, num_frames=4), read_clip(avi, [5, 15, 25, 35]))


def test_a_chooser_sees_the_true_count_even_if_packets_mislead(folder):
    path = clips.make("plain_avi", folder / "c")
    with open_video(path) as reader:
        reader.index.packets += 5  # as in files with empty packets
        from img2vid.data.reading import read_chosen

        asked = []
        clip, indices = read_chosen(reader, lambda frames, fps: asked.append(frames) or [frames - 1])
    assert asked == [45, 40] and indices == [39]
    assert same(clip, clips.decoded_in_order(path), [39])


def test_bytes_and_file_objects_read_like_paths(folder):
    path = clips.make("bframes", folder / "f")
    expected = read_clip(path, [3, 30])
    assert torch.equal(read_clip(path.read_bytes(), [3, 30]), expected)
    with open(path, "rb") as file:
        file.seek(100)
        assert torch.equal(read_clip(file, [3, 30]), expected)
        assert not file.closed
    assert torch.equal(read_clip(io.BytesIO(path.read_bytes()), [3, 30], backend="decord"), expected)
    assert torch.equal(read_clip(str(path), [3, 30]), expected)


def test_short_side(folder):
    path = clips.make("bframes", folder / "s")  # 96 x 128
    clip = read_clip(path, [0, 5], short_side=48)
    assert clip.shape == (2, 3, 48, 64)
    whole = read_clip(path, [0, 5]).float()
    averaged = torch.nn.functional.avg_pool2d(whole, 2)  # halving, by other means
    assert (clip.float() - averaged).abs().mean() < 6
    with pytest.raises(ValueError, match="short_side=0"):
        read_clip(path, [0], short_side=0)


def test_indices_outside_are_index_errors(folder):
    for name in ("bframes", "plain_avi"):
        path = clips.make(name, folder / f"i{name}")
        for bad in ([40], [-1], [0, 1000]):
            with pytest.raises(IndexError, match=r"a\.\w+: frame -?\d+ asked for, but the video has frames 0 to 39"):
                read_clip(path, bad)


def test_wrong_arguments_teach():
    with pytest.raises(ValueError, match="either indices or num_frames"):
        read_clip("x.mp4")
    with pytest.raises(ValueError, match="expected one of 'auto', 'pyav'"):
        read_clip("x.mp4", [0], backend="opencv")
    with pytest.raises(ValueError, match="'raise', 'conceal'"):
        read_clip("x.mp4", [0], on_error="ignore")
    with pytest.raises(TypeError, match="given: int"):
        read_clip(3, [0])
    with pytest.raises(ValueError, match="num_frames=0"):
        read_clip("x.mp4", num_frames=0)
    for wrong in ("8", 2.5, [8]):
        with pytest.raises(TypeError, match="num_frames=.*expected a whole number"):
            read_clip("x.mp4", num_frames=wrong)


def test_a_frame_between_two_frames_is_refused(folder):
    path = clips.make("one_frame", folder / "between")
    for wrong in ([0.5], "0", [None], torch.tensor([0.5])):
        with pytest.raises(TypeError, match="frame indices are whole numbers"):
            read_clip(path, wrong)
    for right in (np.array([0]), torch.tensor([0]), range(1)):
        assert len(read_clip(path, right)) == 1


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(VideoError.about("a.mp4", "is no video")))
    assert error.path == "a.mp4" and str(error) == "a.mp4: is no video"


def test_reading_from_several_threads(folder):
    path = clips.make("bframes", folder / "threads")
    expected, failures = read_clip(path, [35, 2]), []

    def read():
        for _ in range(10):
            if not torch.equal(read_clip(path, [35, 2]), expected):
                failures.append(1)

    threads = [threading.Thread(target=read) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures


def test_importing_the_package_is_light():
    code = (
        "import sys, img2vid.data; print(sorted({'av','lightning','webdataset','decord','pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unreadable_permissions_or_unicode_names(folder):
    path = folder / "vidéo with spaces (1).mp4"
    shutil.copy(clips.make("one_frame", folder / "names"), path)
    assert read_clip(path, [0]).shape == (1, 3, 96, 128)
