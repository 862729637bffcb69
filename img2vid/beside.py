"""What a model takes beside clips: a vector for each of them, such as an embedding of its sound or what is known of it.

A graft (``vector``) says so by name and length. Vectors are handed to ``forward``, or laid beside whatever calls the
model; what reads them finds them with the clips in flight (``img2vid.temporal.clip``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from img2vid.errors import Img2VidError, nearest

if TYPE_CHECKING:
    from img2vid.model import VideoModel


class BesideError(Img2VidError):
    """Vectors beside clips that are missing, unknown, or of another shape."""


class Beside:
    """``takes_beside`` and ``beside()`` of a model."""

    @property
    def takes_beside(self) -> dict[str, int]:
        """The vectors it takes, each by its name, and how long they are."""
        video: Any = getattr(self, "visual", self)
        return {name: length for graft in video.grafts for name, length in graft.takes_beside().items()}

    @contextmanager
    def beside(self, **vectors: Tensor) -> Iterator[None]:
        """Inside, these vectors (B, E) belong to the B clips of each forward, whoever calls it.

        Raises:
            BesideError: a name or length that no graft of this model has.
        """
        takes = self.takes_beside
        for name, vector in vectors.items():
            check_vector(name, vector, takes)
        video: Any = getattr(self, "visual", self)
        with video.clip.beside(vectors):
            yield


def check_vector(name: str, vector: Any, takes: dict[str, int]) -> None:
    if name not in takes:
        listed = ", ".join(f"{known} (B, {length})" for known, length in takes.items())
        raise BesideError(
            f"This model takes no {name!r} beside clips.{nearest(name, takes)} It takes: {listed or 'nothing'}. "
            "img2vid.graft(model, [{'type': 'vector', 'name': ..., 'dim': ...}]) makes room for one."
        )
    if not isinstance(vector, Tensor) or vector.ndim != 2 or vector.shape[1] != takes[name]:
        given = tuple(vector.shape) if isinstance(vector, Tensor) else f"a {type(vector).__name__}"
        raise BesideError(f"{name} of {given} was given, expected one vector for each clip, (B, {takes[name]}).")
    if not vector.is_floating_point():
        raise BesideError(f"{name} of dtype {vector.dtype} was given, expected floats: {name}.float().")


@contextmanager
def examples_beside(video: VideoModel, num_clips: int, generator: torch.Generator | None = None) -> Iterator[None]:
    """Inside, noise stands beside clips, for whoever runs a model to look at it."""
    weight = next(video.parameters())
    shapes = {name: (num_clips, length) for name, length in video.takes_beside.items()}
    if weight.is_meta:
        vectors = {name: weight.new_zeros(shape) for name, shape in shapes.items()}
    else:
        vectors = {name: torch.randn(shape, generator=generator).to(weight) for name, shape in shapes.items()}
    with video.beside(**vectors):
        yield
