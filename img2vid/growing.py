"""Make a model deeper and wider without changing what it computes: Net2Net (Chen et al. 2016, arXiv:1511.05641).

Deeper: a block whose residual branches end in zeros is the identity, x + 0. It is put behind a trained block as a copy
of it, with those zeros: its output projections learn at the first step, the rest of it from the second.

Wider: hidden units of an MLP occur several times, and what leaves a unit is shared among its copies:

    fc2 act(fc1 x) = sum over copies j of unit i of share_ij fc2[:, i] act(fc1[i] x)        sum over j of share_ij = 1

Heads of attention, over space and along time, likewise, whole heads at a time (``img2vid.backbones.widening``). The
shares are unequal at random, or copies would get equal gradients and stay copies forever.

What comes out is an ordinary model of its library: its ``backbone_args`` say how its factory builds it.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from img2vid.backbones.larger import larger_arguments
from img2vid.backbones.parts import LinearMap, linear_maps
from img2vid.backbones.reading import block_kind, child, read_block
from img2vid.backbones.widening import Widening, widen
from img2vid.checkpoints.native import main_dtype
from img2vid.checkpoints.rebuilding import build_backbone, tower_of
from img2vid.config import VideoConfig, real_number, whole_number
from img2vid.errors import BackboneError, Img2VidError
from img2vid.model import VideoModel
from img2vid.proof.evidence import CLOSE, in_eval_mode, largest, make_clips
from img2vid.temporal.pooling import first
from img2vid.two_towers import VideoTextModel, build_model
from img2vid.weights.accounting import load_weights


class GrowthError(Img2VidError):
    """A model that cannot become the one asked for and stay the same function."""


@dataclass
class Growth:
    """What became of a model: which old block each new one is, and how far features moved."""

    blocks: list[tuple[int, bool]]  # of each new block: the old one's number, and whether it is an identity after it
    hidden: tuple[int, int]  # width of an MLP before and after
    heads: tuple[int, int]  # of an attention before and after
    difference: float  # largest, in features of noise clips
    tolerance: float

    @property
    def held(self) -> bool:
        return self.difference <= self.tolerance  # False for nan

    def __str__(self) -> str:
        new = sum(is_new for _, is_new in self.blocks)
        return (
            f"{len(self.blocks) - new} blocks and {new} identities behind them, MLPs of {self.hidden[0]} -> "
            f"{self.hidden[1]}, {self.heads[0]} -> {self.heads[1]} heads: features moved by {self.difference:.3g} (at "
            f"most {self.tolerance:.3g} is rounding)"
        )


def grow(
    model: VideoModel | VideoTextModel,
    depth: int | None = None,
    mlp_ratio: float | None = None,
    heads: int | None = None,
    seed: int = 0,
) -> tuple[VideoModel | VideoTextModel, Growth]:
    """A deeper or wider model of the same function; ``model`` is not changed.

    Args:
        depth: blocks, at least as many as it has; identities are spread evenly.
        mlp_ratio: hidden width of MLPs as a multiple of the token width, as its library's factory takes it.
        heads: of attention over space and along time, each as wide as they are; at least as many as it has.
        seed: of which units and heads are repeated, and how unequal their shares are.

    Raises:
        GrowthError: its library cannot build the larger one by a name, it has grafts, or blocks for which this is not
            exact.
    """
    video, config = tower_of(model), model.config
    before = len(video.tower.blocks)
    depth = before if depth is None else whole_number("depth", depth, least=before)
    refuse_impossible(video, is_deeper=depth > before)
    mlp_ratio = None if mlp_ratio is None else real_number("mlp_ratio", mlp_ratio, least=1e-6)
    blocks = spread(before, depth)
    grown = build(config, blocks, mlp_ratio, heads, video)
    grown.to(main_dtype(model))
    generator = torch.Generator().manual_seed(seed)
    counts = [read_block(one.tower.blocks[0][1]).num_heads for one in (video, tower_of(grown))]
    if counts[1] < counts[0]:
        raise GrowthError(f"heads={heads}: there are {counts[0]} already; they only ever become more.")
    source = with_heads(model, counts[1], generator)
    old_maps, new_maps = linear_maps(video.tower), linear_maps(tower_of(grown).tower)
    hidden = width_of_mlp(old_maps[0]), width_of_mlp(new_maps[0])
    if hidden[1] < hidden[0]:
        raise GrowthError(f"mlp_ratio={mlp_ratio}: MLPs are {hidden[0]} wide already; they only ever grow.")
    picks = [Widening.draw(*hidden, generator) for _ in range(before)]
    load_weights(
        grown, transferred(source, grown, blocks, picks, old_maps), keep_dtypes=True, source="the smaller model"
    )
    for (_, is_new), maps, (_, block) in zip(blocks, new_maps, tower_of(grown).tower.blocks, strict=True):
        if is_new:
            make_identity(block, maps)
    tower_of(grown).image_weights = f"{video.image_weights}, grown"
    tower_of(grown).class_names = video.class_names
    tower_of(grown).tower.preprocess = video.tower.preprocess
    grown.train(model.training)
    return grown, compare(video, tower_of(grown), blocks, hidden, (counts[0], counts[1]))


def refuse_impossible(video: VideoModel, is_deeper: bool) -> None:
    config = video.config
    if config.backbone is None:
        raise GrowthError(
            "A module passed in by hand cannot be grown: the larger model is built by its name. Convert timm:NAME or "
            "open_clip:ARCH."
        )
    if config.grafts:
        raise GrowthError("A model with grafts cannot be grown; fold them or take them off first: img2vid graft.")
    if is_deeper and read_block(video.tower.blocks[0][1]).post_norm:
        raise GrowthError(
            "In blocks with their norm after attention, zero weights are no identity, so there is no depth to add. "
            "They can be wider: mlp_ratio, heads."
        )


def spread(before: int, depth: int) -> list[tuple[int, bool]]:
    """Old block of each new one, evenly: the first of each is itself, the others are identities."""
    numbers = [j * before // depth for j in range(depth)]
    return [(i, j > 0 and numbers[j - 1] == i) for j, i in enumerate(numbers)]


def build(
    config: VideoConfig,
    blocks: list[tuple[int, bool]],
    mlp_ratio: float | None,
    heads: int | None,
    video: VideoModel,
) -> VideoModel | VideoTextModel:
    """The larger model, its weights still random."""
    depth = len(blocks) if len(blocks) > len(video.tower.blocks) else None
    layers: Any = config.temporal_layers
    if layers != "all":
        attending = set(config.layers(len(video.tower.blocks)))
        layers = tuple(j for j, (i, is_new) in enumerate(blocks) if i in attending and not is_new)
    try:
        arguments = larger_arguments(str(config.backbone), config.backbone_args, depth, mlp_ratio, heads)
        config = dataclasses.replace(config, backbone_args=arguments, temporal_layers=layers)
        return build_model(build_backbone(config), config)
    except BackboneError as error:
        raise GrowthError(f"The larger model cannot be built: {error}") from error


def with_heads(model: Any, heads: int, generator: torch.Generator) -> Any:
    """The model with so many heads over space and along time, for its weights; itself where it has them already."""
    if read_block(tower_of(model).tower.blocks[0][1]).num_heads == heads:
        return model
    model = copy.deepcopy(model)
    for _, block in tower_of(model).tower.blocks:
        for attn in (child(block, block_kind(block).attn), getattr(block, "temporal_attn", None)):
            if attn is not None:
                widen(attn, Widening.draw(attn.num_heads, heads, generator))
    return model


def width_of_mlp(maps: list[LinearMap]) -> int:
    """Hidden units of a block's MLP, which fc2 takes in.

    Raises:
        GrowthError: they are not alone there.
    """
    found = [m.host for m in maps if "mlp.fc2" in m.roles]
    if len(found) != 1 or any(len(m.roles) > 1 for m in maps):
        raise GrowthError("Blocks with several MLPs, or an MLP in one matrix with attention, cannot be grown.")
    return found[0].weight.shape[1]


def transferred(
    model: nn.Module,
    grown: nn.Module,
    blocks: list[tuple[int, bool]],
    picks: list[Widening],
    old_maps: list[list[LinearMap]],
) -> dict[str, Tensor]:
    """The smaller model's weights under the larger one's keys."""
    old, new = model.state_dict(), grown.state_dict()
    prefix = grown.tower_prefix if isinstance(grown, VideoTextModel) else ""
    source = {
        f"{prefix}{path}.": (f"{prefix}{tower_of(model).tower.blocks[i][0]}.", i)
        for (path, _), (i, _) in zip(tower_of(grown).tower.blocks, blocks, strict=True)
    }
    state = {}
    for key, wanted in new.items():
        home = next((start for start in source if key.startswith(start)), None)
        if home is None:
            state[key] = old[key]
            continue
        begin, number = source[home]
        name = begin + key.removeprefix(home)
        tensor, pick = old[name], picks[number]
        roles = {role for m in old_maps[number] if name.startswith(f"{prefix}{m.path}.") for role in m.roles}
        if "mlp.fc1" in roles:
            tensor = pick.enter(tensor)
        elif "mlp.fc2" in roles and tensor.ndim == 2:
            tensor = pick.leave(tensor)
        elif tensor.shape != wanted.shape and not pick.is_even:
            raise GrowthError(
                f"{name} is of {tuple(tensor.shape)} and would have to become {tuple(wanted.shape)}: with a norm over "
                f"hidden units, repeating some of them is another function. Give an mlp_ratio that makes a multiple of "
                f"{pick.before}, which repeats all of them alike; only depth can grow by any number."
            )
        elif tensor.shape != wanted.shape:  # of a norm over hidden units
            tensor = pick.enter(tensor)
        state[key] = tensor
    return state


@torch.no_grad()
def make_identity(block: nn.Module, maps: list[LinearMap]) -> None:
    """Zero what its residual branches end in."""
    ends = [m.host for m in maps if {"attn.proj", "mlp.fc2"} & set(m.roles)]
    for module in [*ends, getattr(block, "temporal_fc", None)]:
        for parameter in [] if module is None else module.parameters():
            parameter.zero_()


@torch.no_grad()
def compare(
    video: VideoModel,
    grown: VideoModel,
    blocks: list[tuple[int, bool]],
    hidden: tuple[int, int],
    heads: tuple[int, int],
) -> Growth:
    clips = make_clips(video, "moving", 2, torch.Generator().manual_seed(0))
    with in_eval_mode(video, grown):
        expected = first(video.frame_features(clips))
        difference = largest(first(grown.frame_features(clips)) - expected)
    # ten times nearer than what elsewhere counts as rounding
    return Growth(blocks, hidden, heads, difference, 0.1 * CLOSE[expected.dtype] * largest(expected))
