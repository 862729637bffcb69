"""How much each temporal branch does: the norm of its gate, and its size beside the stream it is added to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from img2vid.evaluation.conditions import video_part
from img2vid.proof.evidence import in_eval_mode
from img2vid.temporal.block import SpaceTimeBlock
from img2vid.temporal.encoder import TemporalEncoderBlock
from img2vid.temporal.gates import TanhGate


def temporal_branches(model) -> list[tuple[str, nn.Module]]:
    """Every module with a temporal residual branch, by the name of its layer, in order."""
    video = video_part(model)
    found = [(name, block) for name, block in video.tower.blocks if isinstance(block, SpaceTimeBlock)]
    if video.config.attention == "factorised_encoder":
        found += [(f"temporal_encoder.blocks.{i}", b) for i, b in enumerate(video.temporal_encoder.blocks)]
    return found


def gate_norm(branch: nn.Module) -> float | None:
    """Frobenius norm of a gate's weight and bias, |tanh(alpha)| of a scalar one; None where there is no gate."""
    gates = [branch.attn_fc, branch.fc2] if isinstance(branch, TemporalEncoderBlock) else [branch.temporal_fc]
    if isinstance(gates[0], nn.Identity):
        return None
    if isinstance(gates[0], TanhGate):
        return float(gates[0].alpha.detach().float().tanh().abs())
    squares = [p.detach().double().square().sum() for gate in gates for p in gate.parameters()]
    return float(torch.stack(squares).sum().sqrt())


@torch.no_grad()
def branch_ratios(model, clips: Sequence[Tensor]) -> list[dict]:
    """For each layer: ``layer``, ``gate_norm``, and ``branch_to_residual``, |what the branch adds| / |what it adds to|.

    Args:
        clips: normalised batches (B, T, C, H, W); norms are taken over all tokens of all of them.
    """
    branches = temporal_branches(model)
    with in_eval_mode(model), watched([branch for _, branch in branches]) as sums:
        for batch in clips:
            video_part(model).frame_features(batch)
    return [
        {"layer": name, "gate_norm": gate_norm(branch), "branch_to_residual": (added / stream) ** 0.5}
        for (name, branch), (added, stream) in zip(branches, sums, strict=True)
    ]


@contextmanager
def watched(branches: Sequence[nn.Module]) -> Iterator[list[list[float]]]:
    """Inside, forward passes add up [|added|^2, |stream|^2] for each branch."""
    sums = [[0.0, 0.0] for _ in branches]

    def before(total):  # a space-time block: its branch comes first, so it is worked out once more from the input
        def hook(block, args):
            add(total, block.temporal_residual(args[0]), args[0])

        return hook

    def after(total):  # an encoder block is nothing but its branches
        def hook(block, args, out):
            add(total, out - args[0], args[0])

        return hook

    def add(total, added, stream):
        total[0] += float(added.double().square().sum())
        total[1] += float(stream.double().square().sum())

    hooks = [
        branch.register_forward_hook(after(total))
        if isinstance(branch, TemporalEncoderBlock)
        else branch.register_forward_pre_hook(before(total))
        for branch, total in zip(branches, sums, strict=True)
    ]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
