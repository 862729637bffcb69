"""One description of a video model, with three faces: Python arguments, YAML, and config.json beside the weights."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from img2vid.errors import Img2VidError, nearest

Attention = Literal["divided_space_time", "joint_space_time", "space_only", "factorised_encoder"]
PrefixMode = Literal["per_frame", "shared", "global"]
TemporalInit = Literal["copy", "random", "zeros"]
Gate = Literal["temporal_fc", "tanh", "none"]
TimeEmbed = Literal["zeros", "none"]
Resample = Literal["linear", "nearest"]
TubeletInit = Literal["central", "average"]

CHOICES = {
    "attention": Attention,
    "prefix_mode": PrefixMode,
    "temporal_init": TemporalInit,
    "gate": Gate,
    "time_embed": TimeEmbed,
    "time_embed_resample": Resample,
    "tubelet_init": TubeletInit,
}


class ConfigError(Img2VidError):
    """A setting that is not one of its choices, out of range, or at odds with another."""


@dataclass(frozen=True)
class VideoConfig:
    """How an image model becomes a video model.

    Args:
        backbone: canonical name of the image model, such as ``timm:vit_base_patch16_224``; None for a module that was
            passed in and has no name to rebuild it from.
        num_frames: frames per clip T that ``time_embed`` is made for; any other number works in forward.
        image_size: pixels (height, width); None keeps the backbone's own.
        attention: ``divided_space_time`` | ``joint_space_time`` | ``space_only`` | ``factorised_encoder``.
        prefix_mode: whether class and register tokens exist once per frame (``per_frame``), once per clip with averaged
            updates (``shared``, TimeSformer), or once per clip attending to all frames (``global``, Frozen in Time).
        temporal_layers: which blocks attend along time: ``all``, ``every:K`` (the last of each K), ``last:N``, or a
            list of block numbers.
        temporal_init: ``copy`` | ``random`` | ``zeros``.
        gate: ``temporal_fc`` | ``tanh`` | ``none``.
        time_embed: ``zeros`` (learned, starting at zero) | ``none``.
        time_embed_resample: ``linear`` | ``nearest``, for other numbers of frames.
        tubelet_size: frames per tubelet; num_frames counts frames before they are grouped.
        tubelet_init: ``central`` | ``average``.
        encoder_layers: depth of the temporal encoder of ``factorised_encoder``.
        num_classes: a zero-initialised linear classifier on the clip feature; None for features.
        backbone_args: keyword arguments the backbone was built with beyond its name.
    """

    backbone: str | None = None
    num_frames: int = 8
    image_size: tuple[int, int] | None = None
    attention: Attention = "divided_space_time"
    prefix_mode: PrefixMode = "per_frame"
    temporal_layers: str | tuple[int, ...] = "all"
    temporal_init: TemporalInit = "copy"
    gate: Gate = "temporal_fc"
    time_embed: TimeEmbed = "zeros"
    time_embed_resample: Resample = "linear"
    tubelet_size: int = 1
    tubelet_init: TubeletInit = "central"
    encoder_layers: int = 4
    num_classes: int | None = None
    backbone_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            one_of(name, getattr(self, name), get_args(choices))
        for name in ("num_frames", "tubelet_size", "encoder_layers"):
            at_least_one(name, getattr(self, name))
        if self.num_classes is not None:
            at_least_one("num_classes", self.num_classes)
        if self.num_frames % self.tubelet_size:
            raise ConfigError(
                f"num_frames={self.num_frames} cannot be cut into tubelets of {self.tubelet_size} frames. "
                f"Use a multiple of {self.tubelet_size}, such as "
                f"{-(-self.num_frames // self.tubelet_size) * self.tubelet_size}."
            )
        if self.image_size is not None:
            object.__setattr__(self, "image_size", image_size_pair(self.image_size))
        if not isinstance(self.temporal_layers, (str, tuple, list)):
            raise ConfigError(f"temporal_layers={self.temporal_layers!r}: expected a text or a list of block numbers.")
        if not isinstance(self.temporal_layers, str):
            object.__setattr__(self, "temporal_layers", tuple(self.temporal_layers))
        elif not re.fullmatch(r"all|(every|last):[1-9]\d*", self.temporal_layers):
            raise ConfigError(
                f"temporal_layers={self.temporal_layers!r}: expected 'all', 'every:K', 'last:N' or block numbers."
            )
        if self.prefix_mode == "global" and self.attention != "divided_space_time":
            raise ConfigError(
                f"prefix_mode='global' belongs to attention='divided_space_time', not to {self.attention!r}; "
                "use per_frame or shared."
            )
        if self.attention in ("space_only", "factorised_encoder") and self.prefix_mode != "per_frame":
            raise ConfigError(
                f"attention={self.attention!r} treats frames separately, so prefix_mode={self.prefix_mode!r} has no "
                "meaning there; leave it at per_frame."
            )

        if self.attention != "divided_space_time":
            for name in ("temporal_layers", "temporal_init", "gate"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} is about divided_space_time and would be ignored "
                        f"with attention={self.attention!r}; leave it out."
                    )

    @property
    def num_steps(self) -> int:
        """Positions in time that tokens have: frames, or tubelets where those group frames."""
        return self.num_frames // self.tubelet_size

    @property
    def has_time_embed(self) -> bool:
        return self.time_embed != "none" and self.attention != "space_only"

    def layers(self, depth: int) -> list[int]:
        """Numbers of the blocks, of ``depth``, that attend along time."""
        layers = self.temporal_layers
        if layers == "all":
            return list(range(depth))
        if isinstance(layers, str):
            rule, number = layers.split(":")
            if int(number) > depth:
                raise ConfigError(f"temporal_layers={layers!r}, but the backbone has {depth} blocks.")
            return (
                list(range(depth))[int(number) - 1 :: int(number)]
                if rule == "every"
                else list(range(depth))[-int(number) :]
            )
        if not layers or not all(0 <= i < depth for i in layers):
            raise ConfigError(f"temporal_layers={list(layers)}: expected block numbers from 0 to {depth - 1}.")
        return sorted(set(layers))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VideoConfig:
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"Unknown setting {name!r}.{nearest(name, known)} Known: {', '.join(sorted(known))}.")
        return cls(**values)


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = nearest(str(value), choices)
        raise ConfigError(f"{name}={value!r}: expected one of {', '.join(choices)}.{hint}")


def at_least_one(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r}: expected a whole number of at least 1.")


def image_size_pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """Pixels as (height, width); one number means a square."""
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ConfigError(f"image_size={size!r}: expected one whole number of pixels, or (height, width).")
    return pair
