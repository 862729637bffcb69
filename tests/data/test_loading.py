"""Samplers and loaders: every row where it belongs, over processes, workers and interruptions."""

import time
from dataclasses import replace

import pytest
import torch

from img2vid.data.datasets import ClipSampler, VideoDataset
from img2vid.data.loading import ClipLoader, EvalSampler, TrainSampler, safe_start_method, worker_options
from img2vid.data.order import draw_seed
from img2vid.data.transforms import TrainTransform
from tests.data.conftest import SPEC


def loader(videos, rank=0, world_size=1, batch_size=2, num_workers=0, seed=0):
    dataset = VideoDataset(videos, ClipSampler(2), TrainTransform(SPEC), train=True, seed=seed)
    sampler = TrainSampler(len(dataset), rank, world_size)
    options = worker_options(num_workers, 60)
    return ClipLoader(dataset, batch_size, sampler=sampler, drop_last=True, **options)


def rows(batches):
    return [index for batch in batches for index in batch["index"].tolist()]


def test_ranks_share_an_epoch_without_overlap(videos):
    for world_size in (1, 2, 3):
        shares = [rows(loader(videos, rank, world_size, 1)) for rank in range(world_size)]
        assert {len(share) for share in shares} == {10 // world_size}
        together = [row for share in shares for row in share]
        assert len(set(together)) == len(together)


def test_two_ranks_see_what_one_sees(videos):
    alone = rows(loader(videos))
    shares = [rows(loader(videos, rank, 2, 1)) for rank in range(2)]
    assert [index for pair in zip(*shares, strict=True) for index in pair] == alone


def test_epochs_differ(videos):
    source = loader(videos)
    first = rows(source)
    source.sampler.set_epoch(1)
    assert rows(source) != first
    source.sampler.set_epoch(0)
    assert rows(source) == first


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_epoch_gives_exactly_the_rest(videos, num_workers):
    whole = loader(videos, num_workers=num_workers)
    whole.sampler.set_epoch(3)
    expected = list(whole)
    for stop in range(6):
        stopped = loader(videos, num_workers=num_workers)
        stopped.sampler.set_epoch(3)
        batches = iter(stopped)
        taken = [next(batches) for _ in range(stop)]
        state = stopped.state_dict()
        assert (state["epoch"], state["batches"]) == (3, stop)
        resumed = loader(videos, num_workers=num_workers)
        resumed.load_state_dict(state)
        if stop == 5:
            assert resumed.sampler.epoch == 4
            rest = []
        else:
            resumed.sampler.set_epoch(3)  # told again, as trainers do: the place is kept
            rest = list(resumed)
        assert len(taken + rest) == len(expected) == len(resumed) == 5
        for got, want in zip(taken + rest, expected, strict=True):
            assert torch.equal(got["clip"], want["clip"]) and torch.equal(got["index"], want["index"])
        resumed.sampler.set_epoch(4)
        assert len(list(resumed)) == 5  # the next epoch is a whole one


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(world_size=2), "world_size was 1 and is 2"),
        (dict(batch_size=3), "batch_size was 2 and is 3"),
        (dict(seed=9), "seed was 0 and is 9"),
        (dict(fewer=1), "rows was 10 and is 9"),
    ],
)
def test_a_begun_epoch_is_not_resumed_as_another_one(videos, change, words):
    begun = loader(videos)
    batches = iter(begun)
    next(batches)
    fewer = replace(videos, rows=videos.rows[: len(videos) - change.pop("fewer", 0)])
    with pytest.raises(ValueError, match=rf"after 1 batches.*{words}"):
        loader(fewer, **change).load_state_dict(begun.state_dict())
    list(batches)
    other = loader(fewer, **change)
    other.load_state_dict(begun.state_dict())  # between two epochs everything may change
    assert other.sampler.epoch == 1 and other.sampler.start == 0


def test_the_epoch_may_be_set_after_the_iterator_was_asked_for(videos):
    late, early = loader(videos), loader(videos)
    batches = iter(late)
    late.sampler.set_epoch(2)
    early.sampler.set_epoch(2)
    assert rows(batches) == rows(early)


def test_evaluation_sees_every_row_once():
    for world_size in (1, 2, 3, 7, 20):
        shares = [list(EvalSampler(10, rank, world_size)) for rank in range(world_size)]
        assert sorted(row for share in shares for row in share) == list(range(10))
        assert [len(EvalSampler(10, rank, world_size)) for rank in range(world_size)] == [len(s) for s in shares]


def test_wrong_ranks():
    with pytest.raises(ValueError, match="rank=2: expected 0 to 1"):
        TrainSampler(10, 2, 2)
    with pytest.raises(ValueError, match="3 videos cannot be shared among 4"):
        TrainSampler(3, 0, 4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_after_bad_videos_is_exact(videos, tmp_path, num_workers):
    """What stands in for a bad video follows from the epoch's order, so nothing about it need be saved."""
    (tmp_path / "bad.mp4").write_text("no video")
    rows = [
        replace(row, path=str(tmp_path / "bad.mp4")) if n in (2, 3, 7) else row for n, row in enumerate(videos.rows)
    ]

    def skipping():
        made = loader(replace(videos, rows=tuple(rows)), num_workers=num_workers)
        made.dataset.on_bad_video, made.dataset.bad_limit = "skip", 5
        return made

    expected = [batch["clip"] for batch in skipping()]
    for stop in range(1, 5):
        begun = skipping()
        taken = [batch["clip"] for _, batch in zip(range(stop), begun, strict=False)]
        resumed = skipping()
        resumed.load_state_dict(begun.state_dict())
        got = taken + [batch["clip"] for batch in resumed]
        assert len(got) == len(expected) == 5 and all(map(torch.equal, got, expected)), stop


class StuckAt(TrainTransform):
    """A worker that hangs on one row, as in a driver or on a network disk."""

    stuck: int

    def __call__(self, clip, seed):
        if seed == self.stuck:
            time.sleep(3600)
        return super().__call__(clip, seed)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_hung_worker_ends_the_run_and_the_videos_are_named(videos):
    hanging = loader(videos, num_workers=2)
    batches = rows(loader(videos))
    transform = hanging.dataset.transform = StuckAt(SPEC)
    transform.stuck = draw_seed(0, 0, batches[5])  # in the third batch of two
    hanging.timeout = 20
    taken = []
    with pytest.raises(RuntimeError, match="no batch came for 20 seconds.*batch 2 of epoch 0") as caught:
        for batch in hanging:
            taken += batch["index"].tolist()
    assert taken == batches[:4]
    assert all(videos.rows[row].path in str(caught.value) for row in batches[4:6])
    assert not any(videos.rows[row].path in str(caught.value) for row in batches[:4])


@pytest.mark.parametrize(
    ("version", "grouped", "expected"),
    [
        ((3, 11, 7), True, "spawn"),
        ((3, 10, 14), True, "spawn"),
        ((3, 11, 7), False, None),  # no threads of a process group, nothing to be caught in
        ((3, 10, 15), True, None),
        ((3, 11, 10), True, None),
        ((3, 13, 0), True, None),
    ],
)
def test_processes_are_not_forked_where_that_can_hang(version, grouped, expected, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: grouped)
    monkeypatch.setattr("img2vid.data.loading.get_start_method", lambda: "fork")
    assert safe_start_method(version) == expected
    monkeypatch.setattr("img2vid.data.loading.get_start_method", lambda: "forkserver")
    assert safe_start_method(version) is None
