"""The order of an epoch, and every random choice in it, as functions of (seed, epoch, position): nothing to save.

A sampler sends positions, not rows, so a worker that meets a bad video knows which row comes next in the epoch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch


class Position(NamedTuple):
    """One place in one epoch's order."""

    epoch: int
    position: int


@dataclass(frozen=True)
class EpochOrder:
    """Which row stands at which position. rows: how many there are; shuffle: anew for each epoch, by seed."""

    rows: int
    seed: int = 0
    shuffle: bool = True

    def row(self, epoch: int, position: int) -> int:
        """Positions past the end begin again, as the "next" of the last row."""
        position %= self.rows
        return int(_permutation(self.rows, self.seed, epoch)[position]) if self.shuffle else position


def draw_seed(seed: int, epoch: int, row: int, purpose: str = "") -> int:
    """A seed of 63 bits for the random choices made on one row in one epoch, unrelated to its neighbours'."""
    digest = hashlib.blake2b(f"{seed} {epoch} {row}{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@lru_cache(maxsize=4)
def _permutation(rows: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw_seed(seed, epoch, -1))
    return torch.randperm(rows, generator=generator)
