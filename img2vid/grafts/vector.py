"""A further vector for each clip, given beside it: an embedding of its sound, of its title, what is known of it.

A linear head of more inputs whose new columns are zero is the old head: W f + Z v, Z = 0. Where the model has a
classifier, that is the head. Otherwise it is what the tower ends in, the projection to where texts are in CLIP: Z v is
added to the tower's own feature of each step, and so to their mean; texts and other towers' features meet it there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.beside import BesideError
from img2vid.config import ConfigError, whole_number
from img2vid.grafts.base import Graft, Site, register
from img2vid.grafts.fronts import Grafted, TokenScion, scions
from img2vid.grafts.fusion import feature_dim
from img2vid.temporal.clip import ClipContext
from img2vid.temporal.infront import InFront
from img2vid.temporal.pooling import first
from img2vid.temporal.prefix import with_first

if TYPE_CHECKING:
    from img2vid.model import VideoModel

TAKEN = ("self", "clips", "normalize")  # what forward and encode_video call their own


class VectorColumns(TokenScion):
    """Columns of a head for a vector that is not among its inputs, but beside the clips in flight."""

    def __init__(self, name: str, length: int, dim: int, clip: ClipContext) -> None:
        super().__init__()
        self.given_as, self.clip = name, clip
        self.zero_columns = nn.Parameter(torch.zeros(dim, length))

    def after(self, y: Tensor, x: Tensor, host: nn.Module) -> Tensor:
        """What the head makes of its own inputs, (B, D) or (B, S, D) of S steps -> of the vector as well."""
        vector = self.clip.vectors.get(self.given_as)
        if vector is None:
            name, length = self.given_as, self.zero_columns.shape[1]
            raise BesideError(
                f"This model takes {name}, a vector of {length} numbers for each clip, and none was given: "
                f"model(clips, {name}=...), or `with model.beside({name}=...):` around what calls it. Commands that "
                f"read videos alone have none to give; img2vid graft FOLDER --remove {name} --out FOLDER goes without."
            )
        if len(vector) != len(y):
            raise BesideError(f"{len(vector)} vectors {self.given_as} were given beside {len(y)} clips.")
        more = F.linear(vector.to(y), self.zero_columns.to(y.dtype))
        return y + (more if y.ndim == 2 else more.unsqueeze(1))


class WithVectors(InFront):
    """In front of a video model without a classifier: the feature of each step, and what the clip's vector adds."""

    title, serves = "", VectorColumns  # untitled: it is still saved and loaded as what it is
    innermost = True  # its own tower's feature, before other towers' join it, in whatever order they were grafted

    def frame_features(self, clips: Tensor) -> Tensor | tuple[Tensor, ...]:
        features = super().frame_features(clips)
        for scion in scions(self, VectorColumns):
            features = with_first(features, scion.after(first(features), clips, self))
        return features


@register
@dataclass(frozen=True)
class Vector(Graft):
    """A vector beside each clip, ``model(clips, NAME=vectors)``, where NAME is the graft's.

    Args:
        dim: how many numbers it has.
    """

    type = "vector"
    where = "the head: the classifier, or where there is none, the feature of each step"
    new = "a column for each number of a vector beside the clip: (classes or D) x dim numbers"
    gate = "zero_columns"
    identity = "bit for bit"
    folds = "no: it reads an input of its own"

    dim: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("dim", self.dim)
        if self.name in TAKEN:
            raise ConfigError(f"name={self.name!r} is what forward calls another input. Choose another, such as audio.")

    def takes_beside(self) -> dict[str, int]:
        return {self.name: self.dim}

    def sites(self, video: VideoModel) -> list[Site]:
        if video.config.num_classes is not None:
            return [Site("classifier", video.classifier, Grafted)]
        return [Site("", video, WithVectors)]

    def grow(self, video: VideoModel, site: Site) -> VectorColumns:
        dim = video.config.num_classes or feature_dim(video, alone=True)
        return VectorColumns(self.name, self.dim, dim, video.clip)
