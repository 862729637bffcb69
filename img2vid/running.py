"""Ways to run a model that leave its weights and what it computes alone: folded, frame by frame, some at a time."""

from __future__ import annotations

from img2vid.streaming import Streaming
from img2vid.temporal.fusing import Fusing
from img2vid.temporal.long import LongClips


class Running(Fusing, Streaming, LongClips):
    """``fuse()``, ``stream()`` and ``set_frames_at_a_time()``."""
