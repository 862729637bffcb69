"""Backbones stitched together: layers 0..5 of one model, then 6..11 of another, as one image model.

The first part's model is the frame: its patches and positions in front, its norm, head and text tower behind, its own
forward between. Where the next part is of another width (or where the recipe asks for it), the last block of a part is
followed by a learned linear map, ``bridge``, which belongs to that block: a list of blocks stays a list of blocks, and
everything else in this package works on it. ``img2vid.stitching`` fits bridges and measures junctions.

The name is ``stitched``, the recipe is its arguments, so that a model converted from it says all that is needed to
build it again; ``stitched:FOLDER`` is what ``img2vid stitch`` has written.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from img2vid.backbones import describe, load_backbone
from img2vid.backbones.names import BackboneName
from img2vid.backbones.reading import block_kind, read_block
from img2vid.backbones.tower import Backbone, ImageTower
from img2vid.config import ConfigError, one_of, shown
from img2vid.errors import BackboneError, nearest
from img2vid.temporal.infront import InFront, own_class, put_in_front
from img2vid.temporal.pooling import first
from img2vid.temporal.prefix import with_first
from img2vid.weights.accounting import load_weights
from img2vid.weights.files import read_state_dict

RECIPE, WEIGHTS = "stitched.json", "model.safetensors"


@dataclass(frozen=True)
class Part:
    """Blocks ``layers[0]`` up to, but without, ``layers[1]`` of a backbone.

    Args:
        weights: a local file instead of its pretrained weights.
        arguments: of its library's factory.
        bridge: in front of it, ``auto`` (a linear map where widths differ) or ``linear`` (always).
    """

    backbone: str
    layers: tuple[int, int]
    weights: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    bridge: Literal["auto", "linear"] = "auto"

    def __post_init__(self) -> None:
        one_of("bridge", self.bridge, ("auto", "linear"))
        layers = self.layers
        whole = isinstance(layers, (tuple, list)) and len(layers) == 2 and all(type(n) is int for n in layers)
        if not whole or not 0 <= layers[0] < layers[1]:
            raise ConfigError(f"layers={shown(layers)} of {self.backbone}: expected [first, end], such as [0, 6].")
        object.__setattr__(self, "layers", tuple(layers))

    @property
    def source(self) -> str:
        """What tells one loaded model from another."""
        return json.dumps([self.backbone, self.weights, self.arguments], sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        given = {**asdict(self), "layers": list(self.layers)}
        return {key: value for key, value in given.items() if value not in (None, {}, "auto")}


def read_parts(given: object) -> list[Part]:
    """The parts of a recipe.

    Raises:
        ConfigError: no list of them, an unknown option, or a value it cannot have.
    """
    if not isinstance(given, (list, tuple)) or not given:
        raise ConfigError(
            f"parts={shown(given)}: expected a list of parts, such as [{{backbone: clip_b16, layers: [0, 6]}}, ...]."
        )
    known = list(Part.__dataclass_fields__)
    parts = []
    for one in given:
        if not isinstance(one, Mapping) or not {"backbone", "layers"} <= set(one):
            raise ConfigError(
                f"{shown(one)}: a part needs a backbone and layers, {{backbone: clip_b16, layers: [0, 6]}}."
            )
        for key in one:
            if key not in known:
                raise ConfigError(
                    f"A part has no option {key!r}.{nearest(str(key), known)} It has: {', '.join(known)}."
                )
        parts.append(Part(**one))
    return parts


class Guest(InFront):
    """In front of a block among blocks of another class, whose model calls them with more than tokens."""

    title = "Guest"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x)


class Bridged(InFront):
    """In front of the last block of a part: what comes out, (B, P + N, D), in the width of what follows."""

    title = "Bridged"
    bridge: nn.Linear

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        return with_first(out, self.bridge(first(out)))


def load_parts(
    parts: Sequence[Part], image_size: tuple[int, int] | None, random_weights: bool = False, on_meta: bool = False
) -> list[Backbone]:
    """The backbone of each part, loaded once where several parts are of one."""
    loaded: dict[str, Backbone] = {}
    for part in parts:
        if part.source not in loaded:
            loaded[part.source] = load_backbone(
                part.backbone,
                weights=None if random_weights or on_meta else part.weights,
                random_weights=random_weights,
                image_size=image_size,
                arguments=part.arguments,
                on_meta=on_meta,
            )
    return [loaded[part.source] for part in parts]


def assemble(parts: Sequence[Part], loaded: Sequence[Backbone]) -> Backbone:
    """One model of copies of all parts; bridges pass the first channels on until they are fitted.

    Raises:
        BackboneError: parts whose tokens do not fit together, or blocks that do not exist.
    """
    model = copy.deepcopy(loaded[0].model)
    frame = describe(getattr(model, "visual", model) if loaded[0].has_text else model)
    blocks: list[nn.Module] = []
    ends = []
    for part, backbone in zip(parts, loaded, strict=True):
        check_part(part, backbone.tower, frame)
        chosen = [copy.deepcopy(block) for _, block in backbone.tower.blocks[slice(*part.layers)]]
        for block in chosen:
            if own_class(block) is not own_class(frame.blocks[0][1]):
                put_in_front(block, Guest)
        blocks += chosen
        ends.append(chosen[-1])
    widths = [read_block(end).dim for end in ends]
    frame_width = read_block(frame.blocks[0][1]).dim
    for i, end in enumerate(ends):
        last = i + 1 == len(ends)
        width = frame_width if last else widths[i + 1]
        if widths[i] != width or (not last and parts[i + 1].bridge == "linear"):
            add_bridge(end, widths[i], width)
    put_blocks(frame, blocks)
    source = " + ".join(f"{part.backbone} [{part.layers[0]}:{part.layers[1]}]" for part in parts)
    return Backbone(model, describe(frame.module), "stitched", {"parts": [part.to_dict() for part in parts]}, source)


def add_bridge(block: nn.Module, width: int, following: int) -> None:
    like = next(block.parameters())
    bridge = nn.utils.skip_init(nn.Linear, width, following, device=like.device, dtype=like.dtype)
    nn.init.eye_(bridge.weight)
    nn.init.zeros_(bridge.bias)
    block.add_module("bridge", bridge)
    put_in_front(block, Bridged)


def put_blocks(tower: ImageTower, blocks: list[nn.Module]) -> None:
    path = tower.blocks[0][0].rpartition(".")[0]
    owner, _, name = path.rpartition(".")
    holder = tower.module.get_submodule(owner)
    was = getattr(holder, name)
    setattr(holder, name, nn.Sequential(*blocks) if isinstance(was, nn.Sequential) else nn.ModuleList(blocks))
    for count in ("layers", "depth"):  # open_clip's Transformer, DeepSeek's encoder
        if isinstance(getattr(holder, count, None), int):
            setattr(holder, count, len(blocks))


def check_part(part: Part, tower: ImageTower, frame: ImageTower) -> None:
    """Refuse blocks that could not make sense of the frame's tokens."""
    name, depth = part.backbone, len(tower.blocks)
    if part.layers[1] > depth:
        raise BackboneError(f"layers={list(part.layers)} of {name}: it has {depth} blocks, 0 to {depth - 1}.")
    if tower.num_prefix_tokens != frame.num_prefix_tokens:
        raise BackboneError(
            f"{name} has {tower.num_prefix_tokens} prefix tokens (class, registers) in its blocks, the first part's "
            f"model {frame.num_prefix_tokens}: nothing says what those that one of them lacks should be. Choose "
            "architectures alike in this."
        )
    own, theirs = tower.blocks[0][1], frame.blocks[0][1]
    kinds = [block_kind(block) for block in (own, theirs)]
    told_positions = any(kind.rotary or kind.relative for kind in kinds)
    if told_positions and tower.grid != frame.grid:
        raise BackboneError(
            f"{name} has {tower.grid[0]} x {tower.grid[1]} patches, the first part's {frame.grid[0]} x {frame.grid[1]}:"
            " blocks that are told positions (rotary, relative) are told those of one grid. Give an image_size that "
            "makes them alike; other blocks take any grid."
        )
    of_transformers = any(own_class(block).__module__.startswith("transformers.") for block in (own, theirs))
    if (told_positions or of_transformers) and own_class(own) is not own_class(theirs):
        raise BackboneError(
            f"{name} has blocks of class {own_class(own).__name__}, the first part's are {own_class(theirs).__name__}: "
            "blocks that are told positions (rotary, relative), and those of transformers, go with their own kind only."
        )
    heads = [read_block(block) for block in (own, theirs)]
    if told_positions and heads[0].dim // heads[0].num_heads != heads[1].dim // heads[1].num_heads:
        raise BackboneError(f"{name} has heads of another width than the first part's, whose rotary positions it gets.")


def load_stitched(
    name: BackboneName,
    *,
    weights: str | Path | None = None,
    random_weights: bool = False,
    image_size: tuple[int, int] | None = None,
    arguments: dict[str, Any] | None = None,
    device: str = "cpu",
) -> Backbone:
    """Build a stitched model from its recipe, or from a folder that ``img2vid stitch`` has written."""
    arguments = dict(arguments or {})
    if name.architecture != "stitched":
        folder = Path(name.architecture)
        recipe = read_recipe(folder)
        arguments = {**{key: recipe[key] for key in ("parts", "image_size") if recipe.get(key)}, **arguments}
        weights = folder / WEIGHTS if weights is None and not random_weights else weights
    for key in arguments:
        if key not in ("parts", "image_size"):
            raise BackboneError(f"A stitched backbone takes parts and image_size, not {key!r}; parts have arguments.")
    parts = read_parts(arguments.get("parts"))
    built_only = random_weights or weights is not None
    size = image_size or arguments.get("image_size")
    backbone = assemble(parts, load_parts(parts, size and tuple(size), built_only, on_meta=device == "meta"))
    if arguments.get("image_size"):
        backbone.arguments["image_size"] = list(arguments["image_size"])
    if weights is not None:
        backbone.report = load_weights(backbone.model, read_state_dict(weights), source=str(weights))
    elif random_weights:
        backbone.pretrained = None
    elif any(isinstance(block, Bridged) for _, block in backbone.tower.blocks):
        raise BackboneError(
            "The bridges of this recipe have no weights: img2vid stitch RECIPE.yaml --calibrate LIST --out FOLDER fits "
            "them, and --backbone stitched:FOLDER has them."
        )
    backbone.model.eval()
    return backbone


def read_recipe(folder: Path) -> dict[str, Any]:
    try:
        recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    except OSError as error:
        raise BackboneError(f"{folder} holds no {RECIPE}, so it is not what img2vid stitch writes.") from error
    except ValueError as error:
        raise BackboneError(f"{folder / RECIPE} is not valid JSON: {error}") from error
    if not isinstance(recipe, dict) or "parts" not in recipe:
        raise BackboneError(f"{folder / RECIPE} has no parts.")
    return recipe
