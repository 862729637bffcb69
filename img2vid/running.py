"""Ways to run a model: with vectors beside clips; folded, frame by frame, some at a time, which change nothing."""

from __future__ import annotations

from img2vid.beside import Beside
from img2vid.streaming import Streaming
from img2vid.temporal.fusing import Fusing
from img2vid.temporal.long import LongClips


class Running(Beside, Fusing, Streaming, LongClips):
    """``beside()``, ``fuse()``, ``stream()`` and ``set_frames_at_a_time()``."""
