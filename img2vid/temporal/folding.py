"""Two linear maps in a row are one: an attention's output projection, and the gate behind it.

    temporal_fc(proj(y)) = W_fc (W_proj y + b_proj) + b_fc = (W_fc W_proj) y + (W_fc b_proj + b_fc)

A tanh gate g is a special case, W_fc = g and b_fc = 0. In training the weights are multiplied in every step, and
autograd goes through that product to both of them: with more tokens than channels that is less arithmetic than
multiplying the tokens twice, forward and backward, and what lies between the two maps need not be kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.temporal.attention import TemporalAttention
from img2vid.temporal.clip import ClipContext
from img2vid.temporal.gates import TanhGate
from img2vid.temporal.infront import InFront
from img2vid.temporal.unchanged import is_watched


def are_linear(attention: nn.Module, gate: nn.Module) -> bool:
    """Types are compared exactly: what has been wrapped (LoRA, quantised) is more than its weight."""
    return type(attention.proj) is nn.Linear and type(gate) in (nn.Linear, TanhGate)


def folded(proj: nn.Linear, gate: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight (D, H * head_dim) and bias (D,) of the one map that both are, worked out in ``dtype``."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor if dtype is None else tensor.to(dtype)

    weight, bias = cast(proj.weight), None if proj.bias is None else cast(proj.bias)
    if isinstance(gate, TanhGate):
        scale = cast(gate.alpha).tanh()
        return scale * weight, None if bias is None else scale * bias
    outer = cast(gate.weight)
    through = None if bias is None else outer @ bias
    if gate.bias is None:
        return outer @ weight, through
    return outer @ weight, gate.bias if through is None else through + gate.bias


class FoldedInTraining(InFront):
    """In front of a SpaceTimeBlock: the two are folded where gradients are asked for, if nobody could tell.

    Equal up to rounding. Where a hook waits for one of them (time is being watched, say), a wrapper stands in its place
    or its weights are elsewhere (sharded), they run one after the other.
    """

    title = "Folded"
    clip: ClipContext
    temporal_norm1: nn.Module
    temporal_attn: TemporalAttention
    temporal_fc: nn.Module
    temporal_drop_path: nn.Module
    post_norm: bool

    def branch(self, y: Tensor) -> Tensor:  # (B*T, S, D)
        if not self.is_worth_folding(num_tokens=y.shape[0] * y.shape[1]):
            return super().branch(y)
        y = self.temporal_attn.before_proj(self.temporal_norm1(y), self.clip.num_frames)
        return self.temporal_drop_path(F.linear(y, *folded(self.temporal_attn.proj, self.temporal_fc)))

    def is_worth_folding(self, num_tokens: int) -> bool:
        attention, gate = self.temporal_attn, self.temporal_fc
        if not self.training or not torch.is_grad_enabled() or self.post_norm or not are_linear(attention, gate):
            return False
        weights = [*attention.proj.parameters(), *gate.parameters()]
        if any(hasattr(weight, "device_mesh") for weight in weights) or is_watched(attention, gate):
            return False
        return num_tokens > attention.proj.in_features
