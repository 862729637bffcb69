"""Subjects take turns; what is compared are medians, and of each round its own ratios.

A machine that drifts, or that something else disturbs, does so for all of them alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], Any]


def take_turns(subjects: dict[str, Run], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each call. A round that is not counted comes first: it fills caches and chooses kernels."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds + 1):
        for name, run in subjects.items():
            gc.collect()
            wait(device)
            started = time.perf_counter()
            run()
            wait(device)
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def spread(values: list[float]) -> list[float]:
    """Median, lowest, highest."""
    return [statistics.median(values), min(values), max(values)]


def ratio(seconds: dict[str, list[float]], of: str, to: str) -> list[float]:
    """Median, lowest and highest of the rounds' ratios; empty where one of the two was left out."""
    if of not in seconds or to not in seconds:
        return []
    return spread([a / b for a, b in zip(seconds[of], seconds[to], strict=True)])
