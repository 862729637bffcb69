"""Loaders that know where they are: exact over processes and workers, resumable in the middle of an epoch.

    sampler = TrainSampler(len(dataset), rank=0, world_size=2)
    loader = ClipLoader(dataset, batch_size=8, sampler=sampler, drop_last=True, num_workers=4)
    state = loader.state_dict()                # {"epoch": 3, "batches": 17, ...}: the same on every rank
    loader.load_state_dict(state)              # the next batch is batch 17 of epoch 3

Both samplers are DistributedSamplers, so that Lightning tells them the epoch and leaves them in place.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from multiprocessing import get_start_method

import torch
from torch.utils.data import DataLoader, DistributedSampler

from img2vid.data.order import Position


class TrainSampler(DistributedSampler):
    """The positions of one process in each epoch's order: rank, rank + world_size, ...; all ranks get equally many.

    The order itself (a permutation by seed and epoch) is the dataset's, see order.py. `start` is where the next
    iteration begins, counted in samples of this rank, and is used once.
    """

    def __init__(self, rows: int, rank: int = 0, world_size: int = 1):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: expected 0 to {world_size - 1} (world_size={world_size})")
        if rows < world_size:
            raise ValueError(f"{rows} videos cannot be shared among {world_size} processes")
        # Without the parent's __init__: it asks for a dataset and pads it.
        self.rows, self.rank, self.num_replicas, self.epoch, self.start = rows, rank, world_size, 0, 0

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return self.rows // self.num_replicas

    def __iter__(self) -> Iterator[Position]:
        start, self.start = self.start, 0
        for step in range(start, len(self)):
            yield Position(self.epoch, step * self.num_replicas + self.rank)


class EvalSampler(DistributedSampler):
    """Every row exactly once over all processes, in order: ranks may differ by one, and nothing is counted twice."""

    def __init__(self, rows: int, rank: int = 0, world_size: int = 1):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: expected 0 to {world_size - 1} (world_size={world_size})")
        self.rows, self.rank, self.num_replicas, self.epoch = rows, rank, world_size, 0

    def __len__(self) -> int:
        return len(range(self.rank, self.rows, self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.rows, self.num_replicas))


def num_batches(loader: DataLoader, limit: int | float = 1.0) -> tuple[int, int]:
    """Batches of the process that has the fewest to evaluate, and of that with the most; 0 for loaders of others.

    limit: batches at most, or a share of them, as trainers take it.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, EvalSampler):
        return 0, 0
    rows = (sampler.rows // sampler.num_replicas, -(-sampler.rows // sampler.num_replicas))
    fewest, most = (-(-n // loader.batch_size) for n in rows)
    return tuple(min(n, limit) if isinstance(limit, int) else int(n * limit) for n in (fewest, most))


class ClipLoader(DataLoader):
    """A DataLoader over a `TrainSampler` whose state counts the batches given out, not those workers made ahead.

    Iteration starts with the first `next`, not with `iter`: whoever asks for an iterator early (Lightning does) can
    still set the epoch before the workers begin.
    """

    batches = 0

    def __iter__(self):
        self.batches = self.sampler.start // self.batch_size
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                raise RuntimeError(self._who_is_late()) from error
            self.batches += 1
            yield batch

    def _who_is_late(self) -> str:
        """Workers hang without a word, but batches come in order, so what the next one holds is known."""
        sampler, first = self.sampler, self.batches * self.batch_size
        places = [step * sampler.num_replicas + sampler.rank for step in range(first, first + self.batch_size)]
        rows = [self.dataset.videos.rows[self.dataset.order.row(sampler.epoch, place)] for place in places]
        return (
            f"no batch came for {self.timeout:g} seconds (timeout_seconds). One of the videos of batch {self.batches} "
            f"of epoch {sampler.epoch} blocks a worker, or they are too slow: {', '.join(r.path for r in rows)}"
        )

    def state_dict(self) -> dict:
        return {"epoch": self.sampler.epoch, "batches": self.batches, **self._plan()}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if an epoch was begun under other circumstances (`refuse_another_plan`)."""
        state = {**self._plan(), **state}
        epoch, batches = state["epoch"], state["batches"]
        if batches >= state["rows"] // state["world_size"] // state["batch_size"]:  # saved after the epoch's last batch
            epoch, batches = epoch + 1, 0
        refuse_another_plan(state, self._plan(), batches)
        self.sampler.set_epoch(epoch)
        self.sampler.start, self.batches = batches * self.batch_size, batches

    def _plan(self) -> dict:
        """What decides which videos the batches of an epoch hold."""
        sizes = {"rows": self.sampler.rows, "world_size": self.sampler.num_replicas, "batch_size": self.batch_size}
        return {**sizes, "seed": self.dataset.seed}


def refuse_another_plan(saved: dict, plan: dict, batches: int) -> None:
    """A number of batches means nothing for a list, a world size or a seed other than it was counted with."""
    changed = [f"{name} was {saved[name]} and is {value}" for name, value in plan.items() if saved[name] != value]
    if changed and batches:
        raise ValueError(
            f"the checkpoint was saved in the middle of an epoch (after {batches} batches), and what remains of it "
            f"cannot be told: {', '.join(changed)}. Keep these as they were, or resume from the end of an epoch"
        )


GRACE_SECONDS = 20


def begin_worker(worker_id: int) -> None:
    """Workers are the parallelism, threads inside them would be in each other's way; and they end after their parent.

    Schedulers and terminals send signals to all processes of a job. A worker that died of one would take the step from
    its parent that the parent is about to finish. So Ctrl-C is the parent's matter, and SIGTERM gives it some time.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_SECONDS))


def safe_start_method(version: tuple[int, ...] = sys.version_info[:3]) -> str | None:
    """How to start processes: None for the system's way, ``spawn`` where that way is a fork that may hang.

    The threads of a process group enter Python for moments. A child forked in such a moment waits for ever in Pythons
    before 3.10.15 and 3.11.10 (github.com/python/cpython/issues/112275), and everybody else waits for it.
    """
    mended = version >= {10: (3, 10, 15), 11: (3, 11, 10)}.get(version[1], version)
    threaded = torch.distributed.is_available() and torch.distributed.is_initialized()
    return None if mended or not threaded or get_start_method() != "fork" else "spawn"


def worker_options(num_workers: int, timeout_seconds: float, start_method: str | None = None) -> dict:
    """DataLoader arguments for workers that cannot hang in silence."""
    if num_workers == 0:
        return {"num_workers": 0}
    return {
        "num_workers": num_workers,
        "timeout": timeout_seconds,
        "worker_init_fn": begin_worker,
        "persistent_workers": True,
        "multiprocessing_context": start_method or safe_start_method(),
    }
