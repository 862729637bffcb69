"""Stitch backbones together: fit the bridges between them, measure how alike both sides of a junction are, choose it.

A stitched model is none of its parts: nothing is preserved, and a junction's similarity says how far from that it is.
Bridges are fitted one after the other by least squares, on the tokens that really arrive, to the tokens that the next
part's own model would have there, on the same images (Bansal et al. 2021, arXiv:2106.07682). Similarity is linear CKA
(Kornblith et al. 2019, arXiv:1905.00414), which no rotation and no common factor changes.

A part whose model cuts images into another grid of patches runs on the first part's, as at another image size; what its
own model knows is interpolated to that grid, to be compared with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.backbones import Backbone
from img2vid.backbones.stitched import RECIPE, WEIGHTS, Part, assemble
from img2vid.backbones.tower import ImageTower
from img2vid.checkpoints.folders import replacing
from img2vid.checkpoints.native import separate
from img2vid.errors import Img2VidError
from img2vid.temporal.pooling import first

NOTHING_KEPT = "none: a stitched model is none of the models it is made of"


class StitchError(Img2VidError):
    """A recipe that cannot be fitted, or nothing to fit it on."""


@dataclass(frozen=True)
class Junction:
    """Where one part ends and the next begins.

    Args:
        at: the number of the block behind it, in the stitched model.
        before, after: what meets there.
        bridge: ``none`` (same width), ``fitted`` or ``untrained``.
        arriving: linear CKA of the tokens that arrive, and those that the next part knows in this place.
        bridged: the same behind the bridge.
        error: squared distance of the two behind the bridge, as a share of the known ones' variance: 0 is the same.
    """

    at: int
    before: str
    after: str
    bridge: str
    arriving: float | None = None
    bridged: float | None = None
    error: float | None = None


def stitch(
    parts: Sequence[Part], loaded: Sequence[Backbone], images: Tensor | None, batch_size: int = 16
) -> tuple[Backbone, list[Junction]]:
    """A stitched model and the report of its junctions.

    Args:
        parts: of the recipe.
        loaded: their backbones (``img2vid.backbones.stitched.load_parts``), which stay as they are.
        images: (N, C, H, W) from 0 to 1, to fit bridges and to measure on; None leaves bridges as they start.

    Raises:
        BackboneError: parts that do not fit together.
    """
    stitched = assemble(parts, loaded)
    blocks = [block for _, block in stitched.tower.blocks]
    junctions, at = [], 0
    for i, part in enumerate(parts):
        at += part.layers[1] - part.layers[0]
        last = blocks[at - 1]
        bridge = getattr(last, "bridge", None)
        is_end = i + 1 == len(parts)
        if (
            is_end
            and bridge is None
            and part.source == parts[0].source
            and part.layers[1] == len(loaded[0].tower.blocks)
        ):
            continue  # the frame's own end
        follower = loaded[0] if is_end else loaded[i + 1]
        number = len(loaded[0].tower.blocks) if is_end else parts[i + 1].layers[0]
        junction = Junction(
            at,
            f"{part.backbone} {part.layers[1] - 1}",
            f"{parts[0].backbone} norm" if is_end else f"{parts[i + 1].backbone} {number}",
            "none" if bridge is None else "untrained",
        )
        if images is not None:
            known = tokens_at(follower.tower, number, images, batch_size, like=stitched.tower)
            arriving = tokens_at(stitched.tower, at, images, batch_size, before_bridge=True)
            if bridge is not None:
                fit_linear(bridge, arriving, known)
            there = arriving if bridge is None else through(bridge, arriving)
            variance = (known - known.mean(dim=0)).square().sum()
            junction = replace(
                junction,
                bridge="none" if bridge is None else "fitted",
                arriving=linear_cka(arriving, known),
                bridged=linear_cka(there, known),
                error=float((there - known).square().sum() / variance),
            )
        junctions.append(junction)
    return stitched, junctions


@torch.no_grad()
def fit_linear(bridge: nn.Linear, x: Tensor, y: Tensor) -> None:
    """Least squares of ``y`` (n, D') on ``x`` (n, D) and a constant, in double precision.

    Raises:
        StitchError: fewer tokens than unknowns: the fit would be of the images, not of the models.
    """
    if len(x) <= x.shape[1]:
        raise StitchError(
            f"{len(x)} tokens are too few to fit a bridge of {x.shape[1]} inputs. Calibrate on more videos or frames."
        )
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
    weight = torch.linalg.lstsq(x - mean_x, y - mean_y, driver="gelsd" if x.device.type == "cpu" else None).solution.T
    bridge.weight.copy_(weight)
    bridge.bias.copy_(mean_y - weight @ mean_x)


@torch.no_grad()
def through(bridge: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, bridge.weight.double(), bridge.bias.double())


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two sets of tokens (n, D), (n, D'), from 0 to 1, without their (n, n) Gram matrices."""
    x, y = x.double() - x.double().mean(dim=0), y.double() - y.double().mean(dim=0)
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def tokens_at(
    tower: ImageTower,
    number: int,
    images: Tensor,
    batch_size: int = 16,
    before_bridge: bool = False,
    like: ImageTower | None = None,
) -> Tensor:
    """Tokens (n * (P + N), D) in front of block ``number`` (behind the last one for the number of blocks), in double.

    Args:
        images: (n, C, H, W) from 0 to 1, resized and normalised as the tower wants them.
        before_bridge: where the block in front has a bridge, what goes into it.
        like: a tower on whose grid of patches they are wanted; None for their own.
    """
    return tokens_of(tower, [number], images, batch_size, before_bridge, like=like)[number]


@torch.no_grad()
def tokens_of(
    tower: ImageTower,
    numbers: Sequence[int],
    images: Tensor,
    batch_size: int = 16,
    before_bridge: bool = False,
    stride: int = 1,
    like: ImageTower | None = None,
) -> dict[int, Tensor]:
    """As ``tokens_at``, in front of several blocks at once, and of each image every ``stride``-th token."""
    seen: dict[int, list[Tensor]] = {number: [] for number in numbers}
    with ExitStack() as hooks:
        for number in seen:
            hooks.enter_context(listening(tower, number, before_bridge, seen[number].append))
        for batch in images.split(batch_size):
            tower.call(tower.module, prepared(tower, batch))
    return {
        number: torch.cat([on_grid(tokens.double(), tower, like)[:, ::stride].flatten(0, 1) for tokens in parts])
        for number, parts in seen.items()
    }


def on_grid(tokens: Tensor, tower: ImageTower, like: ImageTower | None) -> Tensor:
    """Tokens (B, P + N, D) of a tower, its patches interpolated to the grid of another, (B, P + N', D)."""
    if like is None or like.grid == tower.grid:
        return tokens
    prefix, patches = tokens.split([tower.num_prefix_tokens, tokens.shape[1] - tower.num_prefix_tokens], dim=1)
    grid = patches.transpose(1, 2).unflatten(2, tower.grid)  # (B, D, h, w)
    grid = F.interpolate(grid, size=like.grid, mode="bilinear", antialias=True)
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)


@contextmanager
def listening(tower: ImageTower, number: int, before_bridge: bool, hear: Callable[[Tensor], Any]) -> Iterator[None]:
    blocks = [block for _, block in tower.blocks]
    if number < len(blocks) and not before_bridge:
        hook = blocks[number].register_forward_pre_hook(
            lambda m, args, kwargs: hear(read(args, kwargs)), with_kwargs=True
        )
    elif before_bridge and hasattr(blocks[number - 1], "bridge"):
        hook = blocks[number - 1].bridge.register_forward_pre_hook(lambda m, args: hear(args[0]))
    else:
        hook = blocks[number - 1].register_forward_hook(lambda m, args, out: hear(first(out)))
    try:
        yield
    finally:
        hook.remove()


def read(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def prepared(tower: ImageTower, images: Tensor) -> Tensor:
    """Images (N, C, H, W) from 0 to 1 as a tower wants them: its size, its mean and deviation, its precision."""
    wanted, weight = tower.preprocess, next(tower.module.parameters())
    if tuple(images.shape[-2:]) != tuple(tower.image_size):
        if wanted.interpolation not in ("bilinear", "bicubic"):
            raise StitchError(
                f"Frames cannot be resized by {wanted.interpolation!r} here, as a part's model wants them."
            )
        images = F.interpolate(images, size=tower.image_size, mode=wanted.interpolation, antialias=True)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (wanted.mean, wanted.std))
    return ((images - mean) / std).to(weight.device, weight.dtype)


def save_stitched(
    folder: Path, stitched: Backbone, junctions: Sequence[Junction], candidates: Sequence[Any] = ()
) -> None:
    """Write what ``stitched:FOLDER`` reads: the weights, the recipe, and what was measured."""
    described = {
        **stitched.arguments,
        "guarantee": NOTHING_KEPT,
        "junctions": [asdict(one) for one in junctions],
        "candidates": [asdict(one) for one in candidates[:20]],
    }
    with replacing(folder, (WEIGHTS, RECIPE), outdated=()) as temporary:
        save_file(separate(stitched.model.state_dict()), temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / RECIPE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
