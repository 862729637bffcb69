"""``img2vid stream``: frames of files and cameras come one at a time, at the rate asked for, and are scored."""

import json
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

import img2vid
from img2vid.cli import main
from img2vid.data import live, read_clip
from img2vid.data.errors import DamagedVideoWarning, VideoError
from img2vid.data.live import at_rate, watch
from img2vid.data.transforms import TestTransform
from img2vid.evaluation.prompts import class_embeddings, read_templates
from img2vid.evaluation.reading import input_spec
from tests.conftest import randomize

CLASSES = ["zero", "one", "two"]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Two seconds at 10 frames a second, 48 x 40 pixels, lossless."""
    path = tmp_path_factory.mktemp("video") / "noise.mkv"
    generator = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10, width=48, height=40, pix_fmt="bgr0")
        for _ in range(20):
            pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = img2vid.convert("nano_clip", num_frames=4, causal=True)
    randomize(model.visual, seed=3, std=0.02)
    path = tmp_path_factory.mktemp("model") / "causal"
    model.save_pretrained(path)
    return str(path)


def said(capsys, *words):
    code = main(["stream", *words])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_frames_and_their_times(video):
    everything = list(watch(video))
    assert [seconds for seconds, _ in everything] == pytest.approx([i / 10 for i in range(20)])
    pixels = torch.from_numpy(np.stack([frame for _, frame in everything])).permute(0, 3, 1, 2)
    assert torch.equal(pixels, read_clip(video, range(20)))
    assert [round(10 * seconds) for seconds, _ in watch(video, target_fps=4.0)] == [0, 3, 5, 8, 10, 13, 15, 18]
    assert len(list(watch(video, target_fps=25.0))) == 20, "there are no more than there are"


def test_rates_of_uneven_times():
    times = [0.0, 0.4, 0.9, 3.2, 3.3, 4.1]
    assert [t for t, _ in at_rate(((t, None) for t in times), 1.0)] == [0.0, 3.2, 4.1], "after a gap it goes on at once"
    assert len(list(at_rate(((None, None) for _ in times), 1.0))) == 6, "without a clock, every frame"


def test_a_camera(monkeypatch):
    """FFmpeg's test pattern stands in for the device."""
    monkeypatch.setattr(live, "CAMERAS", dict.fromkeys(("linux", "darwin"), ("lavfi", "testsrc=size=64x48:rate={n}")))
    found = list(islice(watch("20", target_fps=5.0), 3))
    assert [seconds for seconds, _ in found] == pytest.approx([0.0, 0.2, 0.4])
    assert found[0][1].shape == (48, 64, 3) and found[0][1].dtype == np.uint8
    monkeypatch.setattr(live.sys, "platform", "plan9")
    with pytest.raises(VideoError, match="not supported on plan9"):
        list(watch("0"))


def test_no_camera():
    with pytest.raises(VideoError, match=r"Camera 77 .* cannot be opened.*Give another number, or a video file"):
        list(watch("77"))


def test_running_scores_are_the_offline_ones(folder, video, capsys):
    words = (folder, video, "--classes", *CLASSES, "--json")
    code, lines, _ = said(capsys, *words, "--target-fps", "5", "--max-frames", "6", "--no-window")
    assert code == 0 and len(lines) == 6
    model = img2vid.load(folder)
    clip = TestTransform(input_spec(model))(read_clip(video, range(0, 12, 2)))  # (1, 6, 3, H, W)
    texts = class_embeddings(model, CLASSES, read_templates("action")[0])
    for t, line in enumerate(map(json.loads, lines)):
        assert line["frame"] == t + 1 and line["seconds"] == pytest.approx(0.2 * t)
        with torch.no_grad():
            feature = model.encode_video(model.normalize(clip[:, : t + 1]), normalize=True)
            expected = (model.logit_scale.exp() * feature @ texts.T).softmax(-1)[0]
        assert [line["scores"][name] for name in CLASSES] == pytest.approx(expected.tolist(), abs=1e-4)

    def scores(*options):
        return [json.loads(line)["scores"] for line in said(capsys, *words, "--target-fps", "5", *options)[1]]

    windowed = scores("--window", "2")
    assert windowed[1] == pytest.approx(json.loads(lines[1])["scores"], abs=1e-4)
    assert windowed[5] != pytest.approx(json.loads(lines[5])["scores"], abs=1e-3)
    assert scores("--window", "2", "--fuse")[5] == pytest.approx(windowed[5], abs=1e-4)


def test_for_people(folder, video, capsys, tmp_path):
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(CLASSES))
    code, lines, _ = said(capsys, folder, video, "--classes", str(names), "--top", "2")
    assert code == 0 and len(lines) == 4
    assert lines[1].split()[:2] == ["0.50", "s"] and lines[1].count("%") == 2


def test_a_classifier_of_its_own(video, capsys, tmp_path):
    model = randomize(img2vid.convert("nano_clip", num_frames=4, causal=True, num_classes=3, tubelet_size=2))
    model.save_pretrained(tmp_path / "model")
    code, lines, _ = said(capsys, str(tmp_path / "model"), video, "--json")
    assert code == 0 and len(lines) == 2, "one for each tubelet"
    assert set(json.loads(lines[0])["scores"]) == {"class 0", "class 1", "class 2"}
    code, _, err = said(capsys, str(tmp_path / "model"), video, "--classes", "a", "b")
    assert code == 2 and "2 classes were named" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.mp4"], "missing.mp4: no such file"),
        (["VIDEO", "--window", "0"], "window=0"),
        (["VIDEO", "--target-fps", "0"], "--target-fps 0.0"),
        (["VIDEO", "--top", "0"], "--top 0"),
        (["VIDEO", "--classes", "one", "one"], "'one' twice"),
        (["VIDEO", "--classes", "no-such-file.txt"], "neither a file"),
    ],
    ids=str,
)
def test_bad_input(words, message, folder, video, capsys):
    words = [video if word == "VIDEO" else word for word in words]
    classes = [] if "--classes" in words else ["--classes", *CLASSES]
    code, _, err = said(capsys, folder, *words, *classes)
    assert code == 2 and message in err


def test_a_model_that_looks_ahead(video, capsys, tmp_path):
    img2vid.convert("nano_clip", num_frames=4).save_pretrained(tmp_path / "model")
    code, _, err = said(capsys, str(tmp_path / "model"), video, "--classes", *CLASSES)
    assert code == 2 and "--causal" in err
    assert Path(tmp_path / "model").is_dir()


def damage(path, to):
    """Some bytes in the middle of the second half, where packets are."""
    data = bytearray(Path(path).read_bytes())
    start = len(data) * 3 // 4
    data[start : start + 400] = bytes(255 - byte for byte in data[start : start + 400])
    Path(to).write_bytes(data)
    return str(to)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "noise.mp4"
    write_video(path, "libx264", [i * 100 for i in range(30)])
    return str(path)


def write_video(path, codec, times, size=(48, 64)):
    """Noise, at these milliseconds."""
    generator = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, width=size[1], height=size[0], pix_fmt="yuv420p")
        stream.codec_context.time_base = Fraction(1, 1000)
        for time in times:
            frame = av.VideoFrame.from_ndarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_uneven_times_are_the_files_own(tmp_path):
    """As screen recordings have them, which hold a frame where something has changed."""
    times = [0, 40, 80, 5000, 5040, 9000]
    for name, codec in (("uneven.mp4", "libx264"), ("uneven.mkv", "libx264"), ("uneven.webm", "libvpx-vp9")):
        write_video(tmp_path / name, codec, times)
        found = [seconds for seconds, _ in watch(tmp_path / name)]
        assert found == pytest.approx([time / 1000 for time in times], abs=1e-3), name
        assert [round(s) for s, _ in watch(tmp_path / name, target_fps=1.0)] == [0, 5, 9], name


def test_times_in_whole_milliseconds_lose_no_frame(tmp_path):
    """33 ms are less than a thirtieth of a second."""
    write_video(tmp_path / "even.mkv", "libx264", [round(i * 1000 / 30) for i in range(40)])
    assert len(list(watch(tmp_path / "even.mkv", target_fps=30.0))) == 40


def test_damage_is_told_or_counted(compressed, tmp_path, folder, capsys):
    broken = damage(compressed, tmp_path / "broken.mp4")
    with pytest.raises(VideoError, match=r"broken\.mp4: .*conceal"):
        list(watch(broken))
    with pytest.warns(DamagedVideoWarning, match=r"broken\.mp4: \d+ damaged packets"):
        found = list(watch(broken, on_error="conceal"))
    assert len(found) > 20
    code, lines, err = said(capsys, folder, broken, "--classes", *CLASSES)
    assert code == 2 and len(lines) >= 2 and "broken.mp4" in err, "what came before has been seen"
    with pytest.warns(DamagedVideoWarning):
        assert said(capsys, folder, broken, "--classes", *CLASSES, "--conceal")[0] == 0


class Clock:
    """Of a camera of 10 frames a second and of who watches; reading waits for a frame, or finds it waiting."""

    def __init__(self, ahead=5.0):
        self.now, self.ahead = 0.0, ahead

    def frames(self, count):
        for i in range(count):
            self.now = max(self.now, i / 10)
            yield SimpleNamespace(time=i / 10 + self.ahead, number=i)

    def __call__(self):
        return self.now


def test_who_is_slower_than_a_camera_sees_what_is_there_now():
    clock, late = Clock(), []
    for frame in live.fresh(clock.frames(200), clock):
        late.append(clock.now - frame.number / 10)
        clock.now += 0.42
    assert max(late) < 0.26 and 40 < len(late) < 60
    clock = Clock()
    assert [f.number for f in live.fresh(clock.frames(200), clock)] == list(range(200)), "and who is not, all"


def test_clocks_that_disagree_do_not_end_it():
    """After as many frames as can be waiting, a frame is new whatever its time says."""
    clock = Clock()
    seen = []
    for frame in live.fresh(clock.frames(2000), lambda: clock.now + (100.0 if clock.now > 5 else 0.0)):
        seen.append(frame.number)
    assert len(seen) == 2000 - live.MOST_WAITING


def test_a_camera_that_is_unplugged(monkeypatch):
    monkeypatch.setattr(live, "CAMERAS", dict.fromkeys(("linux", "darwin"), ("lavfi", "testsrc=size=64x48:rate={n}")))

    def unplugged(frames, clock):
        yield from islice(frames, 2)
        raise av.error.OSError(19, "No such device")

    monkeypatch.setattr(live, "fresh", unplugged)
    frames = watch("20")
    assert len([next(frames), next(frames)]) == 2
    with pytest.raises(VideoError, match=r"Camera 20 .*stopped: No such device"):
        next(frames)


def test_frames_of_other_sizes_are_cut_to_the_models(folder, tmp_path, capsys):
    from PIL import Image

    for i, size in enumerate([(48, 40), (40, 48), (200, 33), (32, 32)]):
        Image.fromarray(np.full((size[1], size[0], 3), 50 * i, np.uint8)).save(tmp_path / f"{i}.png")
    code, lines, _ = said(capsys, folder, str(tmp_path), "--classes", *CLASSES)
    assert code == 0 and [line.split()[:2] for line in lines] == [["frame", str(i)] for i in range(1, 5)]
