"""Without torch.compile, for what depends on more than a compiled program can look at."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside: list[Any] = []  # one entry for each thread that is inside; the first knows how to undo


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, what has been compiled runs as it was written.

    torch keeps that choice for the whole process, so of several threads the first that comes makes it and the last that
    goes takes it back. As long as nothing has loaded the compiler nothing is compiled, and loading it takes a second.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _lock:
        if not _inside:
            stance = torch.compiler.set_stance("force_eager")
            stance.__enter__()
            _inside.append(stance)
        else:
            _inside.append(None)
    try:
        yield
    finally:
        with _lock:
            first = _inside[0]
            _inside.pop()
            if not _inside:
                first.__exit__(None, None, None)
