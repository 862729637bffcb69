"""Webdataset shards: what goes in comes out, epochs have a fixed length, bad samples are named."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from img2vid.data import ListError, VideoError, prepare
from img2vid.data.check import named_rows
from img2vid.data.datasets import ClipSampler
from img2vid.data.lists import read_list
from img2vid.data.shards import ShardedVideos, ShardLoader, write_shards
from img2vid.data.transforms import TrainTransform
from tests.data.conftest import SPEC


@pytest.fixture
def shards(videos, tmp_path):
    return write_shards(named_rows(videos, videos.rows), tmp_path / "shards", 4)


def stream(shards, samples=12, **options):
    options = {"class_names": ["jump", "run"], "shuffle_buffer": 4, **options}
    return ShardedVideos(shards, ClipSampler(4), TrainTransform(SPEC), samples, **options)


def test_shards_hold_every_video_once_and_unchanged(videos, shards):
    assert [shard.name for shard in shards] == ["000000.tar", "000001.tar", "000002.tar"]
    found = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            found |= {name: tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".mp4")}
    assert len(found) == 10
    assert found["00000003.mp4"] == Path(videos.rows[3].path).read_bytes()
    with tarfile.open(shards[0]) as tar:
        first = [name for name in tar.getnames() if name.endswith(".mp4")]
    assert first != sorted(found)[:4]  # shuffled, for lists sorted by class


def test_an_epoch_has_a_fixed_length_whatever_the_shards(shards):
    for world_size, workers in ((1, 0), (1, 2), (3, 2)):
        for rank in range(world_size):
            dataset = stream(shards, 13, rank=rank, world_size=world_size)
            items = list(DataLoader(dataset, None, num_workers=workers))
            assert len(items) == dataset.share == 13 // world_size
            assert all(item["clip"].shape == (4, 3, 32, 32) and item["label"] in (0, 1) for item in items)


def test_streams_repeat_by_seed_and_epoch_and_differ_by_rank(shards):
    def clips_of(**options):
        dataset = stream(shards, 6, world_size=1, **{k: v for k, v in options.items() if k != "epoch"})
        dataset.set_epoch(options.get("epoch", 0))
        return torch.stack([item["clip"] for item in dataset])

    assert torch.equal(clips_of(seed=1), clips_of(seed=1))
    assert not torch.equal(clips_of(seed=1), clips_of(seed=2))
    assert not torch.equal(clips_of(seed=1), clips_of(seed=1, epoch=1))
    assert not torch.equal(clips_of(seed=1), clips_of(seed=1, rank=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_gives_exactly_the_rest(shards, workers):
    def loader():
        return ShardLoader(stream(shards, 13), 2, drop_last=True, num_workers=workers)

    unbroken = loader()
    expected = [[batch["clip"] for batch in unbroken] for _ in range(2)]  # two epochs
    for stop in (1, 2, 5, 6):
        begun = loader()
        taken = [batch["clip"] for _, batch in zip(range(stop), begun, strict=False)]
        resumed = loader()
        resumed.load_state_dict(begun.state_dict())
        epochs = [taken + [batch["clip"] for batch in resumed]] if stop < 6 else [taken]
        epochs.append([batch["clip"] for batch in resumed])
        for got, want in zip(epochs, expected, strict=True):
            assert len(got) == len(want) == 6 and all(map(torch.equal, got, want)), stop
    other = ShardLoader(stream(shards, 13), 3, drop_last=True, num_workers=workers)
    begun = loader()
    next(iter(begun))
    with pytest.raises(ValueError, match="batch_size was 2 and is 3"):
        other.load_state_dict(begun.state_dict())


def shard_of(path, **members):
    """A tar of one sample, its members by extension."""
    with tarfile.open(path, "w") as tar:
        for extension, data in members.items():
            info = tarfile.TarInfo(f"1.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def broken_shard(path):
    return shard_of(path, mp4=b"no video", json=b'{"label": 1}')


@pytest.mark.parametrize(
    ("members", "label", "caption"),
    [
        ({}, -1, ""),
        ({"json": b'{"label": "run", "captions": ["a dog"]}'}, 1, "a dog"),
        ({"json": b'{"label": 0, "captions": "a dog"}'}, 0, "a dog"),  # not one of its letters
        ({"json": b'{"caption": "a dog"}'}, -1, "a dog"),
        ({"cls": b"1", "txt": "ein H\u00fcndchen\n".encode()}, 1, "ein H\u00fcndchen"),
        ({"json": b'{"label": 0}', "cls": b"1", "txt": b""}, 0, ""),
    ],
)
def test_samples_of_other_tools(videos, tmp_path, members, label, caption):
    shard = shard_of(tmp_path / "s.tar", mp4=Path(videos.rows[0].path).read_bytes(), **members)
    items = list(stream([shard], 3))
    assert [(item["label"], item["caption"]) for item in items] == [(label, caption)] * 3


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"json": b"[1]"}, "no object with label"),
        ({"json": b"{"}, "not JSON"),
        ({"json": b'{"label": 7}'}, "label 7 is none of the 2 class_names"),
        ({"json": b'{"label": -1}'}, "label -1 is none"),
        ({"json": b'{"label": 1.5}'}, "label 1.5 is none"),
        ({"json": b'{"label": true}'}, "label True is none"),
        ({"json": b'{"captions": [3]}'}, "captions must be a list of sentences"),
        ({"cls": b"run"}, r"its \.cls is no number"),
        ({"txt": b"\xff\xfe"}, r"its \.txt no text"),
    ],
)
def test_samples_that_say_nonsense(videos, tmp_path, members, words):
    shard = shard_of(tmp_path / "s.tar", mp4=Path(videos.rows[0].path).read_bytes(), **members)
    with pytest.raises(VideoError, match=rf"s\.tar sample 1: .*{words}"):
        list(stream([shard], 3))


def test_shards_that_are_none(shards, tmp_path):
    """None of them may be read for ever, or end a worker in the words of a library."""
    empty = shard_of(tmp_path / "empty.tar")
    text, cut, nothing = (tmp_path / name for name in ("text.tar", "cut.tar", "nothing.tar"))
    text.write_text("no tar" * 1000)
    cut.write_bytes(shards[0].read_bytes()[:3000])
    nothing.write_bytes(b"")
    for shard, words in (
        (empty, "no samples"),
        (text, "no tar"),
        (cut, "cut off"),
        (nothing, "empty file|no tar|no samples"),
    ):
        with pytest.raises(VideoError, match=rf"{shard.name}: .*({words})"):
            list(stream([shard], 3))
    with pytest.raises(VideoError, match="1.avi.exe|a key ends at its first dot"):
        list(stream([shard_of(tmp_path / "dots.tar", **{"x.mp4": b"", "json": b"{}"})], 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_with_bad_videos_resumes_exactly(shards, tmp_path, workers):
    """A bad video moves nothing: its place is taken by the next good one, which keeps its own place too."""
    given = [shards[0], broken_shard(tmp_path / "bad.tar")]

    def loader():
        dataset = stream(given, 12, max_bad_videos=100, shuffle_buffer=3)
        return ShardLoader(dataset, 2, drop_last=True, num_workers=workers)

    expected = [batch["clip"] for batch in loader()]
    assert len(expected) == 6
    for stop in range(1, 6):
        begun = loader()
        taken = [batch["clip"] for _, batch in zip(range(stop), begun, strict=False)]
        resumed = loader()
        resumed.load_state_dict(begun.state_dict())
        got = taken + [batch["clip"] for batch in resumed]
        assert len(got) == 6 and all(map(torch.equal, got, expected)), stop


def test_bad_videos_do_not_shift_the_others(shards, tmp_path, caplog):
    clean = list(stream(shards, 30, shuffle_buffer=1))
    bad = tmp_path / "000001.tar"
    with tarfile.open(shards[1]) as source, tarfile.open(bad, "w") as target:
        for number, member in enumerate(source.getmembers()):
            data = source.extractfile(member).read()
            data = b"no video".ljust(len(data)) if number == 0 else data
            target.addfile(member, io.BytesIO(data))
    shards[1].write_bytes(bad.read_bytes())
    skipping = list(stream(shards, 30, shuffle_buffer=1, max_bad_videos=30))
    assert len(skipping) == 30 and [item["position"] for item in skipping] == list(range(30))
    same = [torch.equal(a["clip"], b["clip"]) for a, b in zip(clean, skipping, strict=True)]
    assert 0 < same.count(False) == caplog.text.count("skipped") < 30


def test_bad_samples_are_named_and_limited(shards, tmp_path, caplog):
    broken = broken_shard(tmp_path / "bad.tar")
    with pytest.raises(VideoError, match=r"bad\.tar sample 1"):
        list(stream([broken]))
    items = list(stream([*shards, broken], 40, max_bad_videos=40))
    assert len(items) == 40 and "bad.tar sample 1" in caplog.text
    with pytest.raises(ListError, match=r"gone\.tar: no such shard"):
        stream([tmp_path / "gone.tar"])
    with pytest.raises(ListError, match="no shards"):
        stream([])
    with pytest.raises(VideoError, match="none of the 1 class_names"):
        list(stream(shards, class_names=["swim"]))
    with pytest.raises(VideoError, match=r"no class names were given: set data\.classes"):
        list(stream(shards, class_names=None))


def test_what_a_tar_cannot_hold_is_refused(videos, tmp_path):
    for row in (replace(videos.rows[0], start_seconds=0.1), replace(videos.rows[0], path=str(tmp_path))):
        with pytest.raises(ListError, match="prepare"):
            write_shards([row], tmp_path / "s", 4)
    with pytest.raises(ValueError, match="videos_per_shard=0"):
        write_shards(videos.rows, tmp_path / "s", 0)


def test_prepare_writes_shards(video_folder, tmp_path):
    arguments = [str(video_folder), str(tmp_path / "out"), "--num-workers", "1", "--shard-videos", "5"]
    assert prepare.main(arguments) == 0
    shards = sorted((tmp_path / "out" / "shards").glob("*.tar"))
    assert len(shards) == 2
    names = read_list(tmp_path / "out" / "manifest.csv").class_names
    assert len(list(stream(shards, 6, class_names=names))) == 6
