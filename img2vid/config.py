"""One description of a video model, with three faces: Python arguments, YAML, and config.json beside the weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, get_args

from img2vid.errors import Img2VidError, nearest

Attention = Literal["divided_space_time", "joint_space_time", "space_only", "factorised_encoder"]
PrefixMode = Literal["per_frame", "shared", "global"]
TemporalInit = Literal["copy", "random", "zeros"]
Gate = Literal["temporal_fc", "tanh", "none"]
TimeEmbed = Literal["zeros", "per_patch", "none"]
Resample = Literal["linear", "nearest", "crop_or_pad", "hold"]
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

# What published video models do differently from this package, each under the name by which a model asks for it.
QUIRKS = {
    "block_input_residual": "attention over space is added to what entered the block; what attention along time adds "
    "is seen by it and then forgotten (Frozen in Time, LaViLa)",
    "prefix_in_time": "along time, patches also attend to the clip's prefix tokens, and those to all patches of all "
    "frames (Frozen in Time, LaViLa)",
    "time_before_norm_pre": "time_embed is added before the norm in front of the blocks (LaViLa)",
    "drop_path_before_gate": "stochastic depth comes before temporal_fc, whose bias stays (TimeSformer)",
    "no_temporal_drop_path": "no stochastic depth along time (Frozen in Time, LaViLa)",
    "nearest_positions": "images of another size take the nearest patch's position, not bicubic ones (TimeSformer)",
    "mean_before_norm": "frames are averaged as tokens before the final norm, not as features after it "
    "(TimeSformer's space_only)",
}
DIVIDED_QUIRKS = ("block_input_residual", "prefix_in_time", "drop_path_before_gate", "no_temporal_drop_path")
DIVIDED_ONLY = ("temporal_layers", "temporal_init", "gate")  # settings without a meaning for other kinds of attention
# The most that is taken for a number and not for a slip of the hand, which would end in a machine without memory.
MOST = {
    "num_frames": 65_536,
    "tubelet_size": 65_536,
    "encoder_layers": 128,
    "num_classes": 1_000_000,
    "num_channels": 65_536,
    "image_size": 16_384,
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
        causal: whether a frame attends to itself and earlier frames only, so that frames can be shown one at a time as
            they come (``model.stream()``).
        time_embed: ``zeros`` (learned, starting at zero) | ``per_patch`` (one for each patch of each frame: ViViT) |
            ``none``.
        time_embed_resample: ``linear`` | ``nearest`` | ``crop_or_pad`` | ``hold`` (the last entry again for all later
            frames), for other numbers of frames; None for ``linear``, or ``hold`` where causal.
        tubelet_size: frames per tubelet; num_frames counts frames before they are grouped.
        tubelet_init: ``central`` | ``average``.
        encoder_layers: depth of the temporal encoder of ``factorised_encoder``.
        quirks: what a published model does differently, by name, such as ``["block_input_residual"]``: see ``QUIRKS``.
        grafts: what else is inserted, each as options by name, such as ``{"type": "lora", "rank": 8}``: docs/grafts.md.
        num_classes: a zero-initialised linear classifier on the clip feature; None for features.
        backbone_args: keyword arguments of the backbone's own factory (timm.create_model, open_clip.create_model), such
            as ``{"drop_path_rate": 0.1}``.
    """

    backbone: str | None = None
    num_frames: int = 8
    image_size: tuple[int, int] | None = None
    attention: Attention = "divided_space_time"
    prefix_mode: PrefixMode = "per_frame"
    temporal_layers: str | tuple[int, ...] = "all"
    temporal_init: TemporalInit = "copy"
    gate: Gate = "temporal_fc"
    causal: bool = False
    time_embed: TimeEmbed = "zeros"
    time_embed_resample: Resample | None = None
    tubelet_size: int = 1
    tubelet_init: TubeletInit = "central"
    encoder_layers: int = 4
    quirks: tuple[str, ...] = ()
    grafts: tuple[dict[str, Any], ...] = ()
    num_classes: int | None = None
    backbone_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.causal, bool):
            raise ConfigError(f"causal={shown(self.causal)}: expected true or false.")
        if self.time_embed_resample is None:
            object.__setattr__(self, "time_embed_resample", "hold" if self.causal else "linear")
        for name, choices in CHOICES.items():
            one_of(name, getattr(self, name), get_args(choices))
        for name in ("num_frames", "tubelet_size", "encoder_layers", "num_classes"):
            value = getattr(self, name)
            if name != "num_classes" or value is not None:
                object.__setattr__(self, name, whole_number(name, value, most=MOST[name]))
        if self.backbone is not None and not isinstance(self.backbone, str):
            raise ConfigError(f"backbone={self.backbone!r}: expected a name, such as 'vit_base'.")
        if not isinstance(self.backbone_args, Mapping) or not all(isinstance(key, str) for key in self.backbone_args):
            raise ConfigError(
                f"backbone_args={self.backbone_args!r}: expected arguments by name, such as {{'drop_path_rate': 0.1}}."
            )
        if self.num_frames % self.tubelet_size:
            raise ConfigError(
                f"num_frames={self.num_frames} cannot be cut into tubelets of {self.tubelet_size} frames. "
                f"Use a multiple of {self.tubelet_size}, such as "
                f"{-(-self.num_frames // self.tubelet_size) * self.tubelet_size}."
            )
        if self.image_size is not None:
            object.__setattr__(self, "image_size", image_size_pair(self.image_size))
        object.__setattr__(self, "temporal_layers", layer_rule(self.temporal_layers))
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

        object.__setattr__(self, "quirks", quirk_names(self.quirks))
        check_quirks(self)
        if self.causal:
            check_causal(self)
        object.__setattr__(self, "grafts", graft_options(self.grafts))
        if self.time_embed == "per_patch" and self.attention not in ("divided_space_time", "joint_space_time"):
            raise ConfigError(
                f"time_embed='per_patch' has no meaning with attention={self.attention!r}, whose patches have no time."
            )
        if self.attention != "divided_space_time":
            for name in DIVIDED_ONLY:
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

    @property
    def mixes_frames(self) -> bool:
        """Whether a frame's feature depends on the other frames of its clip, once gates are open."""
        return self.attention != "space_only" or "mean_before_norm" in self.quirks

    def layers(self, depth: int) -> list[int]:
        """Numbers of the blocks, of ``depth``, that attend along time."""
        return block_numbers(self.temporal_layers, depth)

    def to_dict(self) -> dict[str, Any]:
        """As JSON and YAML have it, with lists for tuples."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VideoConfig:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{shown(values)}: expected settings by name, such as {{'num_frames': 8}}.")
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"Unknown setting {shown(name)}.{nearest(str(name), known)} Known: {', '.join(sorted(known))}."
                )
        return cls(**values)


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = nearest(str(value), choices)
        raise ConfigError(f"{name}={shown(value)}: expected one of {', '.join(choices)}.{hint}")


def whole_number(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """``value`` as an int; numpy's integers are whole numbers too, True is not."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise ConfigError(f"{name}={shown(value)}: expected a whole number of at least {least}.")
    if most is not None and int(value) > most:
        raise ConfigError(f"{name}={shown(value)}: expected a whole number of at most {most:,}.")
    return int(value)


def layer_rule(layers: object, name: str = "temporal_layers") -> str | tuple[int, ...]:
    """``temporal_layers`` as it is kept: a rule in words, or block numbers."""
    if isinstance(layers, str) and re.fullmatch(r"all|(every|last):[1-9]\d{0,5}", layers):
        return layers
    if isinstance(layers, (tuple, list)) and layers:
        return tuple(whole_number(f"each of {name}", number, least=0) for number in layers)
    raise ConfigError(
        f"{name}={shown(layers)}: expected 'all', 'every:K', 'last:N' or a list of block numbers, such as [0, 5, 11]."
    )


def block_numbers(layers: str | tuple[int, ...], depth: int, name: str = "temporal_layers") -> list[int]:
    """The blocks, of ``depth``, that a rule means.

    Raises:
        ConfigError: there are fewer.
    """
    if layers == "all":
        return list(range(depth))
    if isinstance(layers, str):
        rule, number = layers.split(":")
        if int(number) > depth:
            raise ConfigError(f"{name}={layers!r}, but the backbone has {depth} blocks.")
        blocks = list(range(depth))
        return blocks[int(number) - 1 :: int(number)] if rule == "every" else blocks[-int(number) :]
    if not all(0 <= i < depth for i in layers):
        raise ConfigError(f"{name}={list(layers)}: expected block numbers from 0 to {depth - 1}.")
    return sorted(set(layers))


def graft_options(grafts: object) -> tuple[dict[str, Any], ...]:
    """Each as JSON has it, so that equal models have equal descriptions; ``img2vid.grafts`` knows what they mean."""
    if not isinstance(grafts, (tuple, list)):
        raise ConfigError(f"grafts={shown(grafts)}: expected a list, such as [{{'type': 'lora', 'rank': 8}}].")
    listed = []
    for one in grafts:
        one = {"type": one} if isinstance(one, str) else one.to_dict() if hasattr(one, "to_dict") else one
        if not isinstance(one, Mapping) or not isinstance(one.get("type"), str):
            raise ConfigError(f"grafts: {shown(one)}: expected options by name, such as {{'type': 'lora', 'rank': 8}}.")
        listed.append({str(key): list(value) if isinstance(value, tuple) else value for key, value in one.items()})
    return tuple(listed)


def real_number(name: str, value: object, least: float, below: float = float("inf")) -> float:
    """``value`` as a float of at least ``least``."""
    if not isinstance(value, Real) or isinstance(value, bool) or not least <= float(value) < below:
        most = "" if below == float("inf") else f" and below {below:g}"
        raise ConfigError(f"{name}={shown(value)}: expected a number of at least {least:g}{most}.")
    return float(value)


def quirk_names(quirks: object) -> tuple[str, ...]:
    """Each of them once, in the order of ``QUIRKS``, so that equal models have equal descriptions."""
    if not isinstance(quirks, (tuple, list)):
        raise ConfigError(f"quirks={shown(quirks)}: expected a list of names, of {', '.join(QUIRKS)}.")
    for name in quirks:
        one_of("each of quirks", name, tuple(QUIRKS))
    return tuple(name for name in QUIRKS if name in quirks)


def check_quirks(config: VideoConfig) -> None:
    quirks = config.quirks
    for name in DIVIDED_QUIRKS:
        if name in quirks and config.attention != "divided_space_time":
            raise ConfigError(f"quirk {name!r} is about divided_space_time, not about {config.attention!r}.")
    if "prefix_in_time" in quirks and config.prefix_mode != "global":
        raise ConfigError(
            f"quirk 'prefix_in_time' needs prefix_mode='global', not {config.prefix_mode!r}: only tokens that belong "
            "to the whole clip can attend to all of it."
        )
    if {"drop_path_before_gate", "no_temporal_drop_path"} <= set(quirks):
        raise ConfigError("quirks 'drop_path_before_gate' and 'no_temporal_drop_path' exclude each other.")
    if "mean_before_norm" in quirks and config.attention == "factorised_encoder":
        raise ConfigError("quirk 'mean_before_norm' would leave the factorised_encoder one and the same frame T times.")
    if "time_before_norm_pre" in quirks and not config.has_time_embed:
        raise ConfigError("quirk 'time_before_norm_pre' is about time_embed, which this model does not have.")


def check_causal(config: VideoConfig) -> None:
    """Refuse what would let a frame know later ones."""
    if config.attention not in ("divided_space_time", "factorised_encoder"):
        why = "sees all frames at once" if config.attention == "joint_space_time" else "has no attention along time"
        raise ConfigError(
            f"causal=True is about attention along time, of divided_space_time or factorised_encoder; "
            f"attention={config.attention!r} {why}."
        )
    if config.prefix_mode != "per_frame":
        raise ConfigError(
            f"causal=True with prefix_mode={config.prefix_mode!r}: a class token that belongs to the whole clip brings "
            "what later frames show into earlier ones. Use prefix_mode='per_frame'."
        )
    if config.time_embed_resample not in ("hold", "crop_or_pad"):
        raise ConfigError(
            f"causal=True with time_embed_resample={config.time_embed_resample!r}: which embedding a frame gets would "
            "depend on how many follow. Use 'hold' (the default there) or 'crop_or_pad'."
        )
    if "mean_before_norm" in config.quirks:
        raise ConfigError("causal=True: quirk 'mean_before_norm' gives every frame the mean of all, later ones too.")


def image_size_pair(size: object, name: str = "image_size") -> tuple[int, int]:
    """Pixels as (height, width); one number means a square."""
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) > 0 for n in pair):
        raise ConfigError(f"{name}={shown(size)}: expected one whole number of pixels, or (height, width).")
    height, width = (whole_number(name, n, most=MOST["image_size"]) for n in pair)
    return height, width


def shown(value: object, most: int = 100) -> str:
    """A value as an error repeats it: what is much too long is cut."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print numbers of thousands of digits
        text = f"{type(value).__name__} of very many digits"
    return text if len(text) <= most else f"{text[: most - 30]}...{text[-20:]}"
