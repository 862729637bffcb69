"""Every video once, whatever happens: caches, kills, repaired files, dying workers, other batch sizes."""

import os
import shutil
import time

import pytest
import torch

import img2vid
from img2vid.data.lists import read_list
from img2vid.data.manifest import VideoList
from img2vid.evaluation.conditions import CONDITIONS, has_gates, order_frames, represent, shuffle
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.features import Compute, batched, extract
from img2vid.evaluation.reading import Problem, Videos, Views, input_spec, stamp
from img2vid.evaluation.store import Store
from tests.conftest import small_clip, small_vit
from tests.evaluation.conftest import CPU

VIEWS = Views(num_frames=4)


@pytest.fixture
def videos(motion):
    return read_list(motion / "test.csv")


@pytest.fixture
def broken(motion, tmp_path):
    """The test list with one video missing, one empty and one that is no video."""
    rows = list(read_list(motion / "test.csv").rows)
    for number, content in ((3, b""), (10, b"not a video" * 100)):
        path = tmp_path / f"broken{number}.mp4"
        path.write_bytes(content)
        rows[number] = rows[number].__class__(str(path), rows[number].label)
    rows[17] = rows[17].__class__(str(tmp_path / "gone.mp4"), rows[17].label)
    return VideoList(tuple(rows), read_list(motion / "test.csv").class_names, "broken.csv")


def by_hand(model, videos, row, num_frames=4):
    """The feature of a video as the README gets it."""
    clip = img2vid.read_clip(videos.rows[row].path, num_frames=num_frames, short_side=32)
    with torch.no_grad():
        return model.encode_video(model.normalize(clip[None]))[0]


def test_features_are_those_of_the_readme(timely, videos):
    found = extract(timely, videos, VIEWS, compute=Compute(batch_size=1, num_workers=0))
    assert found.rows == list(range(24)) and found.problems == {}
    assert found.of["model"].shape == (24, 1, 64)
    for row in (0, 7, 23):
        assert torch.equal(found.of["model"][row, 0], by_hand(timely, videos, row))


def test_frame_mean_is_the_image_library_on_every_frame(timely, videos):
    """Against the image model built by open_clip, with the weights in the package."""
    from img2vid.backbones.nano_clip import load_nano_clip

    found = extract(timely, videos, VIEWS, ["model", "frame_mean"], compute=Compute(batch_size=1, num_workers=0))
    image_model = load_nano_clip()
    for row in (0, 11):
        clip = img2vid.read_clip(videos.rows[row].path, num_frames=4)
        with torch.no_grad():
            expected = image_model.encode_image(timely.normalize(clip)).mean(0)
        assert torch.equal(found.of["frame_mean"][row, 0], expected)
        assert not torch.allclose(found.of["model"][row, 0], expected, atol=1e-3)


@pytest.mark.parametrize("mode", ["shared", "global", "joint", "factorised", "tubelets"])
def test_frame_mean_where_closed_gates_are_not_enough(mode):
    """Attention modes that mix frames without a gate, and tubelets."""
    settings = {
        "shared": {"prefix_mode": "shared"},
        "global": {"prefix_mode": "global"},
        "joint": {"attention": "joint_space_time"},
        "factorised": {"attention": "factorised_encoder", "encoder_layers": 2},
        "tubelets": {"tubelet_size": 2},
    }[mode]
    model = img2vid.convert(small_vit(), num_frames=4, **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.zero_parameters().values():
            parameter.normal_(std=0.1)
    clips = torch.randn(2, 4, 3, 32, 32)
    got = represent(model, clips, CONDITIONS["frame_mean"], "features")
    image_model = small_vit()
    frames = clips[:, 1::2] if mode == "tubelets" else clips  # the central frame of two is the second
    with torch.no_grad():
        expected = image_model(frames.flatten(0, 1)).unflatten(0, (2, -1)).mean(1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(represent(model, clips, CONDITIONS["model"], "features"), expected, atol=1e-3)


def test_levels(vit):
    model = img2vid.convert(vit, num_frames=3, num_classes=5)
    with torch.no_grad():
        model.classifier.weight.normal_()
    clips = torch.randn(2, 3, 3, 32, 32)
    frames = represent(model, clips, CONDITIONS["model"], "frames")
    assert frames.shape == (2, 3, 48)
    assert torch.equal(represent(model, clips, CONDITIONS["model"], "features"), frames.mean(1))
    with torch.no_grad():
        assert torch.equal(represent(model, clips, CONDITIONS["model"], "output"), model(clips))


def test_orders_of_frames():
    clips = torch.arange(6).view(1, 6, 1, 1, 1).repeat(2, 1, 1, 1, 1)

    def order(name, tubelet_size=1):
        return order_frames(clips, name, [4, 9], tubelet_size).flatten(1).tolist()

    assert order("as_is") == [[0, 1, 2, 3, 4, 5]] * 2
    assert order("reversed") == [[5, 4, 3, 2, 1, 0]] * 2
    assert order("static") == [[3] * 6] * 2
    assert order("half") == [[0, 2, 4]] * 2
    assert order("half", 2) == [[0, 1, 4, 5]] * 2
    assert order("shuffled") == [shuffle(6, 4), shuffle(6, 9)] and shuffle(6, 4) != shuffle(6, 9)
    for row in range(50):
        assert shuffle(2, row) == [1, 0] and shuffle(1, row) == [0]
        assert sorted(shuffle(4, row)) == [0, 1, 2, 3] != shuffle(4, row)
    with pytest.raises(EvaluationError, match="expected as_is"):
        order("backwards")


def test_views_are_clips_times_crops(timely, videos):
    views = Views(2, frame_interval=1, num_clips=3, num_crops=3, short_side=40)
    found = extract(timely, videos, views, compute=CPU)
    assert found.of["model"].shape == (24, 9, 64)
    clip = img2vid.read_clip(videos.rows[5].path, [3, 4])  # the second of three runs of 2 in 8 frames
    clip = torch.nn.functional.interpolate(clip.float(), (40, 40), mode="bicubic", antialias=True).round().clamp(0, 255)
    crop = clip[..., 4:36, 8:40]  # the last of three along the width
    with torch.no_grad():
        expected = timely.encode_video(timely.normalize(crop[None]))[0]
    torch.testing.assert_close(found.of["model"][5, 5], expected, atol=2e-2, rtol=2e-2)  # uint8 against float resizing
    others = [found.of["model"][5, v] for v in range(9) if v != 5]
    assert all((found.of["model"][5, 5] - expected).norm() < (other - expected).norm() for other in others)


def test_batch_size_and_workers_do_not_matter(timely, videos):
    reference = extract(timely, videos, VIEWS, ["model", "shuffled"], compute=Compute(1, 0))
    for batch_size, num_workers in ((3, 0), (16, 2)):
        found = extract(timely, videos, VIEWS, ["model", "shuffled"], compute=Compute(batch_size, num_workers))
        assert found.rows == reference.rows
        for name in ("model", "shuffled"):
            torch.testing.assert_close(found.of[name], reference.of[name], atol=1e-5, rtol=1e-5)
    same = [extract(timely, videos, VIEWS, compute=Compute(3, workers)).of["model"] for workers in (0, 1)]
    assert torch.equal(*same)  # to the bit, at one batch size


def test_bad_videos_are_named_and_left_out(timely, broken):
    found = extract(timely, broken, VIEWS, compute=CPU)
    assert {row: problem.kind for row, problem in found.problems.items()} == {
        3: "undecodable",
        10: "undecodable",
        17: "missing",
    }
    assert "broken3.mp4" in found.problems[3].text and "gone.mp4" in found.problems[17].text
    assert found.rows == [row for row in range(24) if row not in (3, 10, 17)]
    for place, row in ((3, 4), (20, 23)):  # later videos keep their own features
        torch.testing.assert_close(found.of["model"][place, 0], by_hand(timely, broken, row), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_strict(timely, broken, tmp_path, cached):
    if cached:
        extract(timely, broken, VIEWS, compute=CPU, cache=tmp_path / "cache")
    with pytest.raises(EvaluationError, match="undecodable: .*broken3.mp4"):
        extract(timely, broken, VIEWS, compute=CPU, strict=True, cache=tmp_path / "cache" if cached else None)


def test_no_readable_video_is_an_error(timely, broken):
    rows = tuple(broken.rows[i] for i in (3, 17))
    with pytest.raises(EvaluationError, match="None of the 2 videos of broken.csv can be read"):
        extract(timely, VideoList(rows, None, "broken.csv"), VIEWS, compute=CPU)


@pytest.fixture
def counted(monkeypatch):
    """Rows in the order they are decoded."""
    rows, original = [], Videos.__getitem__
    monkeypatch.setattr(Videos, "__getitem__", lambda self, row: rows.append(row) or original(self, row))
    return rows


def test_cache_reads_each_video_once(timely, videos, tmp_path, counted):
    first = extract(timely, videos, VIEWS, compute=CPU, cache=tmp_path)
    assert counted == list(range(24))
    again = extract(timely, videos, VIEWS, compute=CPU, cache=tmp_path)
    assert counted == list(range(24)) and torch.equal(first.of["model"], again.of["model"])
    extract(timely, videos, VIEWS, ["model", "reversed", "static"], compute=CPU, cache=tmp_path)
    assert counted == list(range(24)) * 2  # once more for all new conditions together


def test_cache_is_keyed_by_all_that_matters(timely, videos, tmp_path, counted):
    def number_decoded(model=timely, views=VIEWS, **changes):
        counted.clear()
        extract(model, videos, views, compute=Compute(4, 0, **changes), cache=tmp_path)
        return len(counted)

    assert number_decoded() == 24
    assert number_decoded(views=Views(4, frame_interval=1)) == 24
    assert number_decoded(precision="bfloat16") == 24
    with torch.no_grad():
        timely.visual.tower.blocks[0][1].temporal_fc.bias[0] += 1e-3
    assert number_decoded() == 24
    assert number_decoded() == 0


def test_a_killed_run_goes_on_where_it_was(timely, videos, tmp_path, counted):
    whole = extract(timely, videos, VIEWS, compute=CPU)
    counted.clear()

    def die(count, seen=[]):  # noqa: B006 (shared on purpose)
        seen.append(count)
        if sum(seen) > 13:  # within the second part of eight
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(timely, videos, VIEWS, compute=CPU, cache=tmp_path, on_progress=die)
    assert len(counted) >= 13
    counted.clear()
    done = []
    found = extract(timely, videos, VIEWS, compute=CPU, cache=tmp_path, on_progress=done.append)
    assert counted == list(range(8, 24)) and sum(done) == 24
    assert torch.equal(found.of["model"], whole.of["model"])
    assert not list(tmp_path.rglob("*.tmp"))


def test_damaged_or_outdated_parts_are_made_again(timely, videos, tmp_path, counted):
    found = extract(timely, videos, VIEWS, compute=CPU, cache=tmp_path)
    part = next(tmp_path.rglob("000001.safetensors"))
    part.write_bytes(part.read_bytes()[:100])
    counted.clear()
    again = extract(timely, videos, VIEWS, compute=CPU, cache=tmp_path)
    assert counted == list(range(8, 16)) and torch.equal(found.of["model"], again.of["model"])


def test_parts_of_another_format_are_made_again(timely, videos, tmp_path, counted):
    from safetensors.torch import save_file

    extract(timely, videos, VIEWS, compute=CPU, cache=tmp_path)
    save_file({"rows": torch.arange(8)}, next(tmp_path.rglob("000001.safetensors")))  # whole, but says nothing
    counted.clear()
    extract(timely, videos, VIEWS, compute=CPU, cache=tmp_path)
    assert counted == list(range(8, 16))


def test_a_process_that_died_once_is_not_held_against_the_video(timely, videos, tmp_path, monkeypatch, counted):
    """Memory may have run out: the video is named and left out now, and tried again in the next run."""
    videos, original = VideoList(videos.rows[:12], videos.class_names, videos.source), Videos.__getitem__

    def deadly(self, row):
        if row == 5:
            os._exit(9)
        return original(self, row)

    with monkeypatch.context() as once:
        once.setattr(Videos, "__getitem__", deadly)
        assert list(extract(timely, videos, VIEWS, compute=Compute(4, 1), cache=tmp_path).problems) == [5]
    found = extract(timely, videos, VIEWS, compute=CPU, cache=tmp_path)
    assert counted == list(range(8)) and found.problems == {} and len(found.rows) == 12


def test_a_changed_frame_in_a_folder_of_frames_is_noticed(tmp_path):
    folder = tmp_path / "video"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(b"12345")
        os.utime(folder / f"{i}.png", ns=(10**18, 10**18))
    os.utime(folder, ns=(10**18, 10**18))
    before = stamp(str(folder))
    os.utime(folder / "1.png", ns=(2 * 10**18, 2 * 10**18))  # which leaves the folder itself as it was
    assert stamp(str(folder)) != before and stamp(str(tmp_path / "gone")) is None


def test_no_more_than_one_batch_of_clips_is_held():
    items = ((i, torch.zeros(1), None if i != 2 else Problem("missing", "gone")) for i in range(8))
    problems, done = {}, []
    held = [[row for row, _ in batch] for batch in batched(items, 3, problems, done.append)]
    assert held == [[0, 1, 3], [4, 5, 6], [7]] and list(problems) == [2] and len(done) == 8


def test_a_repaired_video_is_read_again(timely, broken, tmp_path, motion, counted):
    assert 3 in extract(timely, broken, VIEWS, compute=CPU, cache=tmp_path).problems
    shutil.copy(motion / "videos" / "test-000003.mp4", broken.rows[3].path)
    counted.clear()
    found = extract(timely, broken, VIEWS, compute=CPU, cache=tmp_path)
    assert counted == list(range(8)) and 3 in found.rows and set(found.problems) == {10, 17}


@pytest.mark.parametrize(("crime", "bad"), [("die", [5, 23]), ("hang", [5])])
def test_a_video_that_kills_or_hangs_its_process_is_named(timely, videos, monkeypatch, crime, bad):
    original = Videos.__getitem__

    def deadly(self, row):
        if row in bad and crime == "die":
            os._exit(11)
        if row in bad:
            time.sleep(600)
        return original(self, row)

    monkeypatch.setattr(Videos, "__getitem__", deadly)
    found = extract(timely, videos, VIEWS, compute=Compute(4, 2, timeout_seconds=300 if crime == "die" else 5))
    assert list(found.problems) == bad and "ends or hangs a process" in found.problems[5].text
    assert found.rows == [row for row in range(24) if row not in bad]
    torch.testing.assert_close(found.of["model"][5, 0], by_hand(timely, videos, 6), atol=1e-5, rtol=1e-5)


def test_parts_cover_every_row_once(videos):
    for count in (1, 7, 8, 9, 600, 5000, 200_000):
        store = Store(None, [None] * count)
        assert [row for part in range(store.num_parts) for row in store.rows(part)] == list(range(count))
        assert store.num_parts <= 800


def test_settings_that_do_not_fit(timely, videos):
    tubelets = img2vid.convert(small_clip(), num_frames=4, tubelet_size=2)
    with pytest.raises(EvaluationError, match="no multiple of this model's tubelets of 2"):
        extract(tubelets, videos, Views(3))
    with pytest.raises(EvaluationError, match="Expected conditions of"):
        extract(timely, videos, VIEWS, ["backwards"])
    with pytest.raises(EvaluationError, match="expected 1 \\(centre\\) or 3"):
        extract(timely, videos, Views(4, num_crops=2))
    with pytest.raises(EvaluationError, match="precision='half'"):
        Compute(precision="half")
    oblong = img2vid.convert(small_vit(img_size=(32, 16)), num_frames=2)
    with pytest.raises(EvaluationError, match="32 x 16 pixels; evaluation cuts squares"):
        input_spec(oblong)


def test_diverged_weights_are_said_to_be(timely, videos):
    with torch.no_grad():
        timely.visual.tower.blocks[0][1].temporal_fc.weight.fill_(float("inf"))
    with pytest.raises(EvaluationError, match="nan or infinite"):
        extract(timely, videos, VIEWS, compute=CPU)


def test_modules_are_as_they_were(nano, videos):
    nano.train()
    before = {name: p.clone() for name, p in nano.named_parameters()}
    extract(nano, videos, VIEWS, ["model", "frame_mean"], compute=CPU)
    assert nano.training and all(torch.equal(before[name], p) for name, p in nano.named_parameters())
    assert has_gates(nano)
    assert not has_gates(img2vid.convert(small_vit(), num_frames=2, gate="none"))
