"""``img2vid stream``: frames of files and cameras come one at a time, at the rate asked for, and are scored."""

import json
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import img2vid
from img2vid.cli import main
from img2vid.data import live, read_clip
from img2vid.data.errors import VideoError
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
