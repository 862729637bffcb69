"""Feature fusion: further towers look at the same clip, and what they see is joined to the feature of each step.

``gate`` starts at the first tower alone: f + G LayerNorm(g), with G = 0, where g are the others' features side by side.
Its sum stays where the first tower's features are, so texts and classifiers go on to work. ``concat`` puts all side by
side (a classifier that is there gets zero columns for the new ones); ``mean`` and ``max`` are what they are called.

Clips arrive once, normalised for the first tower: each of the others undoes that, resizes frames to its own size in its
own interpolation, and normalises with its own mean and deviation. All keys of another tower are below
``graft_<name>.towers.<i>.``, so one folder holds everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.backbones.tower import Preprocess, on_meta
from img2vid.beside import examples_beside
from img2vid.checkpoints.native import load, read_description
from img2vid.checkpoints.rebuilding import build_backbone
from img2vid.config import ConfigError, VideoConfig, one_of, shown
from img2vid.grafts.base import Graft, GraftError, Site, register
from img2vid.grafts.fronts import PREFIX, scions
from img2vid.model import VideoModel
from img2vid.proof.guarantees import KINDS, Guarantee
from img2vid.temporal.gates import zero_linear
from img2vid.temporal.infront import InFront
from img2vid.temporal.pooling import first
from img2vid.temporal.prefix import with_first
from img2vid.weights.accounting import load_weights

if TYPE_CHECKING:
    from img2vid.backbones import Backbone

MODES = ("gate", "concat", "mean", "max")
BESIDE_CONFIG = ("weights", "random_weights", "preprocess")  # of a tower, beside the fields of VideoConfig


class OtherTowers(nn.Module):
    """The scion of a whole tower: the others, and how what they see is joined to what it sees."""

    def __init__(self, towers: list[VideoModel], dims: list[int], dim: int, mode: str, train: bool) -> None:
        super().__init__()
        self.mode, self.trains = mode, train
        self.towers = nn.ModuleList(towers).requires_grad_(train)
        if mode == "gate":
            self.zero_gate = zero_linear(sum(dims), dim)

    def train(self, on: bool = True) -> OtherTowers:
        super().train(on)
        self.towers.train(on and self.trains)
        return self

    def forward(self, x: Tensor, clips: Tensor, host: VideoModel) -> Tensor:
        """Features (B, S, D) of the first tower's steps, and the clips (B, T, C, H, W) it saw -> (B, S, D), joined."""
        others = [in_steps(first(t.frame_features(seen_by(t, clips, host))), x.shape[1]) for t in self.towers]
        if self.mode == "gate":
            return x + self.zero_gate(torch.cat([F.layer_norm(y, y.shape[-1:]) for y in others], dim=-1))
        if self.mode == "concat":
            return torch.cat([x, *others], dim=-1)
        stacked = torch.stack([x, *others])  # (towers, B, S, D)
        return stacked.mean(dim=0) if self.mode == "mean" else stacked.amax(dim=0)


def seen_by(tower: VideoModel, clips: Tensor, host: VideoModel) -> Tensor:
    """Clips (B, T, C, H, W), normalised for ``host``, as ``tower`` wants them: its size, its mean and deviation."""
    given, wanted, size = host.tower.preprocess, tower.tower.preprocess, tower.tower.image_size
    known = tower.tower.in_channels  # of the first tower's there may be more, by a graft of its own
    clips, mean, std = clips[:, :, :known], given.mean[:known], given.std[:known]
    if tuple(clips.shape[-2:]) != tuple(size):
        frames = clips.flatten(0, 1).float()  # resizing and normalising commute, up to rounding
        frames = F.interpolate(frames, size=size, mode=wanted.interpolation, antialias=True)
        clips = frames.unflatten(0, clips.shape[:2]).to(clips.dtype)
    if (tuple(mean), tuple(std)) == (tuple(wanted.mean), tuple(wanted.std)):
        return clips
    was_mean, was_std, own_mean, own_std = (
        torch.tensor(values, device=clips.device).view(-1, 1, 1) for values in (mean, std, wanted.mean, wanted.std)
    )
    return ((clips * was_std + was_mean - own_mean) / own_std).to(clips.dtype)


def in_steps(x: Tensor, num_steps: int) -> Tensor:
    """(B, S', D) -> (B, S, D): where the first tower groups more frames in a step, the mean over them."""
    return x if x.shape[1] == num_steps else x.unflatten(1, (num_steps, -1)).mean(dim=2)


class WithOthers(InFront):
    """In front of a video model: its features of each step, joined with those of other towers."""

    title, serves = "", OtherTowers  # untitled: it is still saved and loaded as what it is

    def frame_features(self, clips: Tensor) -> Tensor | tuple[Tensor, ...]:
        features = super().frame_features(clips)
        for scion in scions(self, OtherTowers):
            features = with_first(features, scion(first(features), clips, self))
        return features


class FurtherColumns(nn.Module):
    """The scion of a classifier whose input has grown: columns of zeros for what is new in it."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.zero_columns = nn.Parameter(torch.zeros(num_classes, dim))


class WithColumns(InFront):
    """In front of a classifier: its own columns for the features it knows, further ones for the rest."""

    title, serves = "Widened", FurtherColumns

    def forward(self, x: Tensor) -> Tensor:
        further = list(scions(self, FurtherColumns))
        known, *new = x.split([self.in_features, *(s.zero_columns.shape[1] for s in further)], dim=-1)
        logits = super().forward(known)
        for scion, part in zip(further, new, strict=True):
            logits = logits + F.linear(part, scion.zero_columns)
        return logits


@register
@dataclass(frozen=True)
class Fusion(Graft):
    """Features of several backbones on the same clip.

    Args:
        towers: the others: names of backbones (frame by frame, unless they are told otherwise), folders of models of
            ours with what they learned of time, or fields of ``VideoConfig`` by name, such as
            ``{backbone: dinov2_s, attention: divided_space_time, num_frames: 8}``; there also ``weights``, a
            local file, and ``random_weights``.
        mode: ``gate`` | ``concat`` | ``mean`` | ``max``; the last two need features of one length.
        train: whether the other towers learn too.
    """

    type = "fusion"
    where = "behind the tower: the feature of each step"
    new = "whole towers that see the same clip, and D x (sum of their D) + D numbers for the gate"
    gate = "zero_gate; zero_columns of a classifier (concat)"
    identity = "`mode: gate`, bit for bit; `concat`, bit for bit in the first D columns; `mean` and `max`, not"
    folds = "no: it looks at the pixels itself"

    folders: ClassVar[list[str | None]]  # where to read weights, once, when it is grafted

    towers: tuple[Any, ...] = ()
    mode: Literal["gate", "concat", "mean", "max"] = "gate"
    train: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("mode", self.mode, MODES)
        one_of("train", self.train, (True, False))
        given = (self.towers,) if isinstance(self.towers, (str, Mapping)) else self.towers
        if not isinstance(given, (tuple, list)) or not given:
            raise ConfigError(f"towers={shown(self.towers)}: expected names of backbones, or model folders.")
        folders = [str(one) if isinstance(one, (str, Path)) and Path(one).is_dir() else None for one in given]
        object.__setattr__(self, "folders", folders)
        object.__setattr__(self, "towers", tuple(map(described, given, folders)))
        object.__setattr__(self, "mixes_frames", any(config.mixes_frames for config in self.configs))
        object.__setattr__(self, "keeps_length", self.mode != "concat")

    @property
    def configs(self) -> list[VideoConfig]:
        return [config_of(one) for one in self.towers]

    def guarantee(self) -> Guarantee:
        if self.mode in ("mean", "max"):
            return Guarantee(f"none: the {self.mode} of several towers' features is none of theirs")
        part = "in the first tower's columns" if self.mode == "concat" else ""
        return Guarantee("any clip, bit for bit on the same folded batch", dict.fromkeys(KINDS, "bitwise"), part)

    def sites(self, video: VideoModel) -> list[Site]:
        sites = [Site("", video, WithOthers)]
        if self.mode == "concat" and video.config.num_classes is not None:
            sites.append(Site("classifier", video.classifier, WithColumns))
        return sites

    def grow(self, video: VideoModel, site: Site) -> nn.Module:
        no_numbers = site.front is WithColumns or next(video.base.parameters()).is_meta
        towers = [
            build(build_backbone(config, no_numbers), config, one)
            for config, one in zip(self.configs, self.towers, strict=True)
        ]
        dims = [feature_dim(tower) for tower in towers]
        if site.front is WithColumns:
            return FurtherColumns(sum(dims), video.config.num_classes)
        for tower in towers:
            self.check(tower, video)
        dim = feature_dim(video)
        if self.mode in ("mean", "max") and {*dims} != {dim}:
            raise GraftError(
                f"mode={self.mode!r} needs features of one length, but they have {', '.join(map(str, [dim, *dims]))}. "
                "mode='gate' projects them, mode='concat' puts them side by side."
            )
        return OtherTowers(towers, dims, dim, self.mode, self.train)

    def check(self, other: VideoModel, video: VideoModel) -> None:
        """Refuse a tower that cannot look at the same clips."""
        name = other.config.backbone
        if other.config.num_classes is not None:
            raise GraftError(
                f"{name} would give logits, not features: leave out num_classes={other.config.num_classes}."
            )
        channels = video.tower.in_channels - sum(getattr(one, "more", 0) for one in video.grafts)
        if other.tower.in_channels != channels:
            raise GraftError(
                f"{name} takes images of {other.tower.in_channels} channels, the first tower of {channels}."
            )
        if video.config.tubelet_size % other.config.tubelet_size:
            raise GraftError(
                f"{name} groups {other.config.tubelet_size} frames, the first tower {video.config.tubelet_size}: "
                "expected a divisor of that."
            )
        if other.tower.preprocess.interpolation not in ("bilinear", "bicubic"):
            raise GraftError(
                f"{name} wants frames resized by {other.tower.preprocess.interpolation!r}; only bilinear and bicubic "
                "exist inside a model. Say which is close enough: {preprocess: {mean: ..., std: ..., interpolation: "
                "bicubic}}."
            )

    def fetch(self, video: VideoModel) -> None:
        """Give the other towers the weights they are named after."""
        towers = getattr(video, PREFIX + self.name).towers
        for tower, config, one, folder in zip(towers, self.configs, self.towers, self.folders, strict=True):
            if folder is not None:
                source = load(folder)
                state = getattr(source, "visual", source).state_dict()
                load_weights(tower, state, source=folder)
            elif not one.get("random_weights"):
                from img2vid.backbones import load_backbone

                loaded = load_backbone(
                    config.backbone,
                    weights=one.get("weights"),
                    image_size=config.image_size,
                    arguments=config.backbone_args,
                )
                tower.load_image_weights(loaded.tower.module.state_dict())


def described(given: Any, folder: str | None) -> dict[str, Any]:
    """A tower as ``config.json`` has it: fields of ``VideoConfig``, and its pixel statistics where they were saved."""
    if folder is not None:
        read = read_description(Path(folder))
        return {**read["video"], "preprocess": read["preprocess"]}
    one = {"backbone": given} if isinstance(given, str) else given
    if not isinstance(one, Mapping) or one.get("backbone") is None:
        raise ConfigError(
            f"towers: {shown(given)} is neither the name of a backbone, nor a model folder that is there, nor options "
            "by name with a backbone among them."
        )
    one = {"attention": "space_only", **one}
    config_of(one)
    return one


def config_of(one: Mapping[str, Any]) -> VideoConfig:
    return VideoConfig.from_dict({key: value for key, value in one.items() if key not in BESIDE_CONFIG})


def build(backbone: Backbone, config: VideoConfig, one: Mapping[str, Any]) -> VideoModel:
    """A video model of the image tower alone."""
    tower = VideoModel(backbone.tower.module, config)
    if "preprocess" in one:
        pixels = one["preprocess"]
        tower.tower.preprocess = Preprocess(tuple(pixels["mean"]), tuple(pixels["std"]), pixels["interpolation"])
    return tower


@torch.no_grad()
def feature_dim(video: VideoModel, alone: bool = False) -> int:
    """Length of the feature of a step, probed without numbers; ``alone``, of its own tower, without what is behind."""
    twin, weight = on_meta(video).eval(), next(video.parameters())
    shape = (1, video.config.tubelet_size, video.tower.in_channels, *video.tower.image_size)
    with examples_beside(twin, 1):
        run = VideoModel.frame_features if alone else type(twin).frame_features
        return first(run(twin, torch.zeros(shape, dtype=weight.dtype, device="meta"))).shape[-1]
