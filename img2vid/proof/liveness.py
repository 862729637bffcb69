"""The second half of a certificate: that what was inserted is connected, reversible, and able to learn time.

A conversion that changes nothing at step 0 is easy to fake by inserting nothing. So the gates are opened and closed
again, frames are swapped behind a frame's back, and two optimiser steps show where gradient arrives.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from img2vid.model import VideoModel
from img2vid.origins import scion_of
from img2vid.proof.evidence import CLOSE, Size, largest, make_clips
from img2vid.temporal.attention import TemporalAttention
from img2vid.temporal.block import SpaceTimeBlock
from img2vid.temporal.pooling import first


@dataclass
class Acts:
    """Largest differences in frame features over the three acts, closed, open, closed again."""

    perturbed: float | None  # open against closed; None where there is no gate to open
    closed: float | None  # closed again against closed
    exchange: float  # gates opened by noise: how far a frame's feature moves when only the other frames change
    leak: float  # and how far a clip's features move when only the other clips of the batch change
    later: float | None  # and a frame's when only later frames change; None where it may see them
    rounding: float  # as much of the last three is rounding: zero, but where tokens are worked on in groups


@torch.no_grad()
def three_acts(video: VideoModel, generator: torch.Generator, as_trained: bool, size: Size = None) -> Acts:
    """Closed = base; open must differ, and frames must know of each other but not of other clips; closed again = base.

    Args:
        as_trained: in act two the gates stand where training left them, instead of being opened by seeded noise.
    """
    gates = video.zero_parameters()
    clips = make_clips(video, "moving", 2, generator, size)

    def output(clips: Tensor) -> Tensor:  # (B, T, D)
        return first(video.frame_features(clips)).clone()

    with video.gates_closed():
        base = output(clips)
        for parameter in gates.values():
            # large enough not to be rounded away
            std = 0.02 if parameter.dtype in (torch.float32, torch.float64) else 0.5
            noise = std * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise.to(parameter.device, parameter.dtype))
        opened = output(clips)
        num_own = video.config.tubelet_size
        exchange = largest(opened[:, -1] - output(swap_others(clips, num_own))[:, -1])
        leak = largest(opened[0] - output(torch.cat([clips[:1], -clips[1:]]))[0])
        changed = torch.cat([clips[:, :num_own], -clips[:, num_own:]], dim=1)
        later = largest(opened[:, 0] - output(changed)[:, 0]) if video.config.causal else None
    groups_tokens = any(graft.groups_tokens for graft in video.grafts)
    rounding = CLOSE[opened.dtype] * largest(opened) if groups_tokens else 0.0
    if not gates:
        return Acts(None, None, exchange, leak, later, rounding)
    if as_trained:
        opened = output(clips)
    with video.gates_closed():
        return Acts(largest(opened - base), largest(output(clips) - base), exchange, leak, later, rounding)


def swap_others(x: Tensor, num_own: int = 1) -> Tensor:
    """(B, T, ...) in which each clip keeps its last ``num_own`` frames and gets those before from another clip.

    The last frame is the one that knows of the others in a causal model, too.
    """
    return torch.cat([x.roll(1, dims=0)[:, :-num_own], x[:, -num_own:]], dim=1)


@dataclass
class Liveness:
    """Of an inserted layer, or a lone zero-initialised parameter such as ``time_embed``: can it learn, does it see?"""

    layer: str
    gate: tuple[float, ...] | None  # gradient norms at the steps (of grafts, the least); None for an ungated branch
    attention: tuple[float, ...] | None = None  # the same behind the gate; None where nothing is behind it
    coupling: float | None = None  # how far its attention's output at a frame moves when only the other frames change
    stray: float | None = None  # how far its output moves everywhere else when one position changes in other frames
    graft: str | None = None  # the name of the graft it is of; None for what is about time
    depth: int = 0  # zero gates of others that it stands behind

    @property
    def alive(self) -> bool:
        """Whether gradient arrives as soon as it can: at the gate one step after the gate it stands behind has moved,
        at what is behind the gate one step later."""
        gate_moves = self.gate is None or self.gate[self.depth] > 0.0
        moves = self.attention is None or self.attention[self.first_behind] > 0.0
        return gate_moves and moves and self.coupling != 0.0

    @property
    def first_behind(self) -> int:
        """The step at which gradient can first arrive behind the gate, counted from 0."""
        return self.depth + (self.graft is None or self.gate is not None)


def measure_liveness(
    video: VideoModel, generator: torch.Generator, size: Size = None, step_size: float = 0.1
) -> list[Liveness]:
    """Gradient norms at two steps of gradient descent on a random linear objective, from closed gates.

    At the first step gradient can reach the gates alone, so moving them is the whole step; at the second it must reach
    the attention behind them. What a graft has put behind such a gate has its turn one step later, so then there are
    three. Ungated branches are measured as they are. All weights get their values back.
    """
    layers, scions = temporal_layers(video), planted(video)
    in_layers = {id(p) for gate, _ in [*layers.values(), *scions.values()] for p in gate}
    alone = {
        name: p
        for name, p in video.zero_parameters().items()
        if id(p) not in in_layers and not name.startswith("classifier.")
    }
    behind = {path: matrices(attention) for path, (_, attention) in layers.items()}
    behind |= {path: others for path, (_, others) in scions.items()}
    gates = [*(p for gate, _ in [*layers.values(), *scions.values()] for p in gate), *alone.values()]
    depths = {path: depth_of(video, path) for path in scions}
    measured = [*gates, *(p for attention in behind.values() for p in attention)]
    if not measured:
        return []
    clips = make_clips(video, "moving", 2, generator, size)
    steps: list[dict[nn.Parameter, float]] = []
    names = {parameter: name for name, parameter in video.named_parameters()}
    objective = None
    with only_requiring_grad(video, measured), video.gates_closed():
        for step in range(2 + max(depths.values(), default=0)):
            features = first(video.clip_features(clips))
            if objective is None:
                objective = torch.randn(features.shape, generator=generator).to(features.device, features.dtype)
            grads = gradients((features * objective).sum(), measured)
            steps.append({p: float(grad.double().norm()) for p, grad in grads.items()})
            with torch.no_grad():
                for parameter in gates:
                    grad = grads[parameter].float()  # norms of half precision gradients overflow
                    # halved each time, or the second step could bring a scalar gate back to zero
                    length = step_size / 2**step
                    parameter.sub_((length * grad / grad.norm().clamp_min(1e-12)).to(parameter.dtype))
        stray = measure_stray(video, clips)  # here gates are open

    def norms(parameters: Sequence[nn.Parameter]) -> tuple[float, ...] | None:
        return tuple(sum(step[p] ** 2 for p in parameters) ** 0.5 for step in steps) if parameters else None

    def least(parameters: Sequence[nn.Parameter]) -> tuple[float, ...] | None:
        groups: dict[str, list[nn.Parameter]] = {}
        for parameter in parameters:  # of experts, which of them are asked is a matter of the clip
            groups.setdefault(re.sub(r"zero_experts\.\d+", "zero_experts", names[parameter]), []).append(parameter)
        each = [norms(group) for group in groups.values()]
        return tuple(map(min, zip(*each, strict=True))) if parameters else None

    coupling = measure_coupling(video, {path: attention for path, (_, attention) in layers.items()}, clips)
    return [
        *(
            Liveness(path, norms(gate), norms(behind[path]), coupling[path], stray.get(path))
            for path, (gate, _) in layers.items()
        ),
        *(
            Liveness(path, least(gate), least(others), graft=graft_name(path), depth=depths[path])
            for path, (gate, others) in scions.items()
        ),
        *(Liveness(name, norms([parameter])) for name, parameter in alone.items()),
    ]


@torch.no_grad()
def measure_coupling(video: VideoModel, layers: dict[str, TemporalAttention], clips: Tensor) -> dict[str, float]:
    """Largest change of each temporal attention's output at a clip's last frame when its other frames are swapped.

    Each is given the tokens it sees in the model, so one that ignores the other frames cannot hide behind one that
    does not.
    """
    moved: dict[str, float] = {}

    def look(path: str, attention: TemporalAttention, args: tuple[Any, ...], out: Tensor) -> None:
        x, num_frames, *rest = args  # (B*T, N, D)
        swapped = swap_others(x.unflatten(0, (-1, num_frames))).flatten(0, 1)
        moved[path] = largest((attention.forward(swapped, num_frames, *rest) - out)[num_frames - 1 :: num_frames])

    hooks = [
        attention.register_forward_hook(lambda module, args, out, path=path: look(path, module, args, out))
        for path, attention in layers.items()
    ]
    try:
        video.frame_features(clips)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: moved.get(path, 0.0) for path in layers}  # one that was never called sees nothing


@torch.no_grad()
def measure_stray(video: VideoModel, clips: Tensor) -> dict[str, float]:
    """Largest change of each block's temporal branch away from one position at which all frames but the last changed.

    The branch alone, as its image block mixes positions by right. A token attends along its own position, so this is
    zero to the bit; a branch that folded its tokens in the wrong order would pass every other test of this certificate.
    """
    moved: dict[str, float] = {}

    def look(path: str, block: SpaceTimeBlock, args: tuple[Any, ...]) -> None:
        x = args[0].contiguous()  # (B*T, P + N, D), in one layout with `swapped`: kernels round by layout
        num_clip_keys = getattr(block.temporal_attn, "num_clip_keys", 0)  # of the quirk prefix_in_time
        position = (max(block.num_shared_tokens, num_clip_keys) + x.shape[1]) // 2
        elsewhere = torch.arange(x.shape[1], device=x.device) != position
        swapped = swap_others(rearrange(x, "(b t) n d -> b t n d", t=video.clip.num_frames)).flatten(0, 1)
        swapped[:, elsewhere] = x[:, elsewhere]
        change = block.temporal_residual(swapped) - block.temporal_residual(x)
        elsewhere[:num_clip_keys] = False  # which attend to all positions by design
        moved[path] = float(change[:, elsewhere].abs().sum())

    hooks = [
        block.register_forward_pre_hook(lambda block, args, path=path: look(path, block, args))
        for path, block in video.tower.blocks
        if isinstance(block, SpaceTimeBlock)
    ]
    try:
        video.frame_features(clips)
    finally:
        for hook in hooks:
            hook.remove()
    return moved


def gradients(objective: Tensor, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Gradients by parameter, zeros where the objective does not depend on one."""
    if not objective.requires_grad:
        return {p: torch.zeros_like(p) for p in parameters}
    grads = torch.autograd.grad(objective, parameters, allow_unused=True)
    return {p: torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True)}


@contextmanager
def only_requiring_grad(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    wanted = {id(p) for p in parameters}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def temporal_layers(video: VideoModel) -> dict[str, tuple[list[nn.Parameter], TemporalAttention]]:
    """Layer: (parameters of its gates, its temporal attention), for each layer that attends along time."""
    layers = {
        path: (list(block.temporal_fc.parameters()), block.temporal_attn)
        for path, block in video.tower.blocks
        if isinstance(block, SpaceTimeBlock)
    }
    if video.config.attention == "factorised_encoder":
        for i, block in enumerate(video.temporal_encoder.blocks):
            gates = [*block.attn_fc.parameters(), *block.fc2.parameters()]
            layers[f"temporal_encoder.blocks.{i}"] = (gates, block.attn)
    return layers


def planted(video: VideoModel) -> dict[str, tuple[list[nn.Parameter], list[nn.Parameter]]]:
    """What grafts have put in each place, by its path: (parameters of its gate, its other parameters)."""
    zero = {id(p) for p in video.zero_parameters().values()}
    found: dict[str, tuple[list[nn.Parameter], list[nn.Parameter]]] = {}
    for name, parameter in video.named_parameters():
        is_zero = id(parameter) in zero
        if (path := place_of(name, is_zero)) is not None:
            found.setdefault(path, ([], []))[0 if is_zero else 1].append(parameter)
    # a branch of a user's own may keep its gate beside it (graft_fc): then this is no place of its own
    names = {graft.name for graft in video.grafts}
    return {path: parts for path, parts in found.items() if graft_name(path) in names}


def place_of(name: str, is_zero: bool) -> str | None:
    """Where a parameter was grafted; what another tower has along time stands behind a gate of its own there."""
    path = scion_of(name)
    if path is None or name.startswith("classifier."):  # which is behind the features that are measured
        return None
    if ".towers." not in name:
        return path
    block, time, _ = name.partition(".temporal_")
    return block if time else name if is_zero else path


def graft_name(path: str) -> str:
    return f".{path}".rpartition(".graft_")[2].split(".")[0]


def depth_of(video: VideoModel, path: str) -> int:
    """How many zero gates of others stand between a place and the residual stream: a graft on attention along time has
    one, so has what another tower has along time, and what a graft puts in front of another part of its own says so by
    its ``depth``."""
    module = dict(video.named_modules()).get(path)  # None where a place is one parameter
    own: int = getattr(module, "depth", 0)
    return own + int("temporal_attn." in path or ".towers." in path)


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """Its weight matrices: a bias can receive gradient while the attention itself is dead."""
    return [parameter for parameter in module.parameters() if parameter.ndim > 1]
