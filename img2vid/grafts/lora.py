"""LoRA: a product of two thin matrices beside each chosen weight, W + (alpha / rank) B A with B = 0.

Hu et al. 2021 (arXiv:2106.09685); scaled by alpha / sqrt(rank) instead, rsLoRA (Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.backbones.parts import ROLES, LinearMap, linear_maps
from img2vid.config import ConfigError, block_numbers, layer_rule, one_of, real_number, shown, whole_number
from img2vid.errors import nearest
from img2vid.grafts.base import Graft, GraftError, Site, factor, register
from img2vid.grafts.fronts import WEIGHT_NAMES, GraftedLinear, GraftedProjection, WeightScion, fold_weight, own_weight

if TYPE_CHECKING:
    from img2vid.model import VideoModel

WORDS = tuple(dict.fromkeys(word for role in ROLES for word in (role.split(".")[0], role)))


class LowRank(WeightScion):
    """``scale * zero_B @ A``, (out, in) of rank r."""

    def __init__(self, out_features: int, in_features: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.zero_B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as peft and loralib
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def delta(self) -> Tensor:
        return self.scale * (self.zero_B @ self.A)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(self.dropout(x), self.A), self.zero_B)


@register
@dataclass(frozen=True)
class LoRA(Graft):
    """Low-rank adaptation of linear maps.

    Args:
        rank: r, at most the narrower side of a weight.
        alpha: B A is scaled by alpha / rank; None for alpha = rank, a scale of 1.
        rslora: scale by alpha / sqrt(rank) instead.
        dropout: of what goes into A, in training. Where a library reads weights and multiplies by itself there is no
            such input, so it must be 0 (EVA and BEiT's qkv, PyTorch's attention).
        targets: what gets one: ``attn`` (over space), ``temporal_attn``, ``mlp``, or a part of these such as
            ``attn.qkv``, ``attn.proj``, ``mlp.fc1``; or regular expressions of whole paths, such as
            ``blocks.[01].mlp.fc2``.
        layers: in which blocks, as ``temporal_layers``: ``all``, ``every:K``, ``last:N``, or block numbers.
    """

    type = "lora"
    where = "weights of attention over space, along time, and of the MLP"
    new = "A (r, in) and B (out, r): (in + out) r numbers for each weight"
    gate = "zero_B"
    identity = "bit for bit"
    folds = "W + scale B A, exactly: no trace, no cost"

    rank: int = 8
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attn",)
    layers: str | tuple[int, ...] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("rank", self.rank)
        object.__setattr__(self, "alpha", factor("alpha", self.rank if self.alpha is None else self.alpha))
        one_of("rslora", self.rslora, (True, False))
        object.__setattr__(self, "dropout", real_number("dropout", self.dropout, least=0.0, below=1.0))
        object.__setattr__(self, "layers", layer_rule(self.layers, "layers"))
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        if not isinstance(targets, (tuple, list)) or not targets or not all(isinstance(t, str) for t in targets):
            raise ConfigError(f"targets={shown(self.targets)}: expected some of {', '.join(WORDS)}, or paths.")
        object.__setattr__(self, "targets", tuple(targets))

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def sites(self, video: VideoModel) -> list[Site]:
        blocks = linear_maps(video.tower)
        among = [found for i in block_numbers(self.layers, len(blocks), "layers") for found in blocks[i]]
        for target in self.targets:
            if not any(is_meant(target, found) for found in among):
                words = [word for word in WORDS if any(is_meant(word, found) for found in among)]
                paths = [found.path for found in among]
                raise GraftError(
                    f"targets: nothing here is called {target!r}.{nearest(target, [*words, *paths])} There are "
                    f"{', '.join(words)}; by path, {', '.join(paths[:8])}{', ...' if len(paths) > 8 else ''}."
                )
        chosen = [found for found in among if any(is_meant(target, found) for target in self.targets)]
        unheard = [found.path for found in chosen if not found.is_called]
        if unheard and self.dropout:
            raise GraftError(
                f"dropout={self.dropout}: {unheard[0]} and {len(unheard) - 1} others never see an input of their own: "
                "their library reads the weight and multiplies by itself. Use dropout=0, or other targets."
            )
        return [site_of(found) for found in chosen]

    def grow(self, video: VideoModel, site: Site) -> LowRank:
        out_features, in_features = own_weight(site.host, WEIGHT_NAMES[site.front]).shape
        if self.rank > min(out_features, in_features):
            raise GraftError(
                f"rank={self.rank}: {site.path} is {out_features} x {in_features}, so its rank is at most "
                f"{min(out_features, in_features)}."
            )
        return LowRank(out_features, in_features, self.rank, self.scale, self.dropout)

    def fold(self, site: Site, scion: nn.Module) -> None:
        fold_weight(site, scion)


def is_meant(target: str, found: LinearMap) -> bool:
    if target in WORDS:
        return any(target in (role, role.split(".")[0]) for role in found.roles)
    try:
        return re.fullmatch(target, found.path) is not None
    except re.error as error:
        raise ConfigError(
            f"targets: {target!r} is neither one of {', '.join(WORDS)} nor a pattern ({error})."
        ) from error


def site_of(found: LinearMap) -> Site:
    front = GraftedLinear if found.weight == "weight" else GraftedProjection
    return Site(found.path, found.host, front, {"map": found})
