"""How far the reading of a large file has come: counted where bytes are read, shown by whoever watches."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Watcher = Callable[[int, int], None]  # (bytes read, bytes in all)

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
_count: ContextVar[Count | None] = ContextVar("count", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Inside, ``watcher`` hears of everything that is read with ``counting``."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


class Count:
    def __init__(self, total: int, watcher: Watcher | None) -> None:
        self.done, self.total, self.watcher = 0, total, watcher

    def add(self, num_bytes: int) -> None:
        self.done = min(self.done + num_bytes, self.total)  # directories at the end of archives are read twice
        if self.watcher is not None:
            self.watcher(self.done, self.total)


@contextmanager
def counting(total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with each number of bytes that was read, of ``total``.

    Inside another counting, of a checkpoint in several files, those bytes count towards that one's total.
    """
    outer = _count.get()
    if outer is not None:
        yield outer.add
        return
    count = Count(total, _watcher.get())
    token = _count.set(count)
    try:
        yield count.add
    finally:
        _count.reset(token)


class CountedFile(io.BufferedReader):
    """A file opened for reading that says how many bytes were taken out of it."""

    def __init__(self, path: str | os.PathLike, add: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path))
        self._add = add

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._add(len(data))
        return data

    def readinto(self, buffer) -> int:
        length = super().readinto(buffer)
        self._add(length)
        return length
