"""Several processes on one evaluation, as torchrun starts them: who am I, wait for the others, share one thing.

    torchrun --nproc_per_node=4 eval/zero_shot.py --model FOLDER --data LIST

Processes never exchange features: each writes its own parts of the cache, and the first one reads them all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from img2vid.leaving import leave_processes


@dataclass(frozen=True)
class Processes:
    """This process is number ``rank`` of ``world_size``."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until every process has come here."""
        if self.world_size > 1:
            dist.barrier()

    def agree(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes torchrun started, or this one alone. gloo: only waiting and small values go over it."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Processes()
        return
    # long enough for the slowest process to finish its videos; a process that dies makes torchrun end the others
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Processes(dist.get_rank(), world_size, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        leave_processes()
