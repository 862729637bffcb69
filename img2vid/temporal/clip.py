"""The one number that folding time into the batch loses: how many frames a clip has. And which went before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from img2vid.temporal.causal import Past


class ClipContext:
    """Tells every part inside an image model how many frames T the clips now in flight have.

    The image model sees a batch of B*T images and cannot know T. Guessing it from the batch size would be silently
    wrong whenever a wrong T divides B*T, so the video model states it and everything else reads it here. Outside a
    video model's forward there is no T, and asking for it is an error rather than a default.

    Threads that share a model take turns, so that none of them reads another one's T.
    """

    def __init__(self) -> None:
        self._num_frames: int | None = None
        self.past: Past | None = None  # of the stream that the frames now in flight continue
        self.vectors: dict[str, Tensor] = {}  # beside the clips, by name: (B, E) each
        self._turn = threading.RLock()

    @contextmanager
    def of(self, num_frames: int | None) -> Iterator[None]:
        """Inside, clips have so many frames; None where frames are run that make no whole clips, and T is unknown."""
        if torch.compiler.is_compiling():  # a lock cannot be traced
            with self._set(num_frames):
                yield
        else:
            with self._turn, self._set(num_frames):
                yield

    @contextmanager
    def after(self, past: Past) -> Iterator[None]:
        """Inside, clips are the next frames of a stream."""
        with self._turn:
            self.past = past
            try:
                yield
            finally:
                self.past = None

    @contextmanager
    def beside(self, vectors: dict[str, Tensor]) -> Iterator[None]:
        """Inside, these vectors (B, E) belong to the clips that are run, with those laid beside them before."""
        if torch.compiler.is_compiling():
            with self._lay(vectors):
                yield
        else:
            with self._turn, self._lay(vectors):
                yield

    @contextmanager
    def _lay(self, vectors: dict[str, Tensor]) -> Iterator[None]:
        before, self.vectors = self.vectors, {**self.vectors, **vectors}
        try:
            yield
        finally:
            self.vectors = before

    @contextmanager
    def _set(self, num_frames: int | None) -> Iterator[None]:
        before, self._num_frames = self._num_frames, num_frames
        try:
            yield
        finally:
            self._num_frames = before

    def __reduce__(self) -> tuple[type[ClipContext], tuple[()]]:
        return ClipContext, ()  # copies and pickles take no lock along

    @property
    def is_in_flight(self) -> bool:
        """Whether a video model's forward is on its way."""
        return self._num_frames is not None

    @property
    def num_frames(self) -> int:
        if self._num_frames is None:
            raise RuntimeError(
                "This image model has become part of a video model and was called on its own, so it does not know how "
                "many frames make a clip. Call the VideoModel with clips (B, T, C, H, W); one image is a clip of "
                "T = 1. (In backward it was its library's checkpointing that called: use the video model's "
                "set_grad_checkpointing.)"
            )
        return self._num_frames
