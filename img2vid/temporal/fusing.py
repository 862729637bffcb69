"""Less arithmetic along time for inference, the same function: a gate folded once (``img2vid.temporal.folding``).

Nothing replaces the weights: the product is kept beside them, outside the state dict, and made again whenever they have
changed. (As batch norm is folded into a convolution.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.errors import Img2VidError
from img2vid.temporal.attention import TemporalAttention
from img2vid.temporal.block import SpaceTimeBlock
from img2vid.temporal.folding import are_linear, folded
from img2vid.temporal.infront import InFront, put_in_front, take_from_front
from img2vid.temporal.unchanged import is_readable, is_watched, sees_the_present, state_of

BRANCHES = (("temporal_attn", "temporal_fc"), ("attn", "attn_fc"))  # attention along time, and the gate behind it


class FusedProjection(nn.Module):
    """An attention's output projection and the gate behind it as one product (..., H * head_dim) -> (..., D).

    It stands in for the two where nobody could tell: in eval mode, where no gradient is to reach them, no hook of
    either waits to be called and nothing has been put in their place. Changed weights are folded anew at the next
    forward; a compiled model, which cannot look for changes, runs the two after ``train()`` or ``load_state_dict``
    until an eager forward, or ``fuse()``. What torch.export records outside of ``as_last_seen`` are the two.
    """

    def __init__(self, attention: TemporalAttention, gate: nn.Module) -> None:
        super().__init__()
        self.training = False
        self.made_of = (attention, gate)  # in a tuple, so that they are no children and keep the names they have
        self.register_buffer("weight", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)
        self.folded: Any = None  # the state of the weights it was made of; None: it must be made again
        self.fold()

    @torch.inference_mode(False)  # what is made here may later be part of a forward with gradients
    @torch.no_grad()
    def fold(self) -> None:
        proj, gate = self.made_of[0].proj, self.made_of[1]
        exact = torch.float32 if proj.weight.device.type == "mps" else torch.float64  # which MPS does not have
        weight, bias = folded(proj, gate, exact)
        self.weight = weight.to(proj.weight.dtype)
        self.bias = None if bias is None else bias.to(proj.weight.dtype)
        self.folded = state_of(*self.sources())

    def sources(self) -> list[Tensor]:
        attention, gate = self.made_of
        return [*attention.proj.parameters(), *gate.parameters()]

    def stands_in(self, attention: nn.Module, gate: nn.Module) -> bool:
        """Whether it does for the two that a block has now, which may have been wrapped or exchanged since."""
        if self.training or (attention, gate) != self.made_of or not are_linear(attention, gate):
            return False
        if is_watched(*self.made_of):
            return False
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.sources()):
            return False
        if torch.compiler.is_compiling():
            return self.folded is not None and (not torch.compiler.is_exporting() or sees_the_present())
        if not all(map(is_readable, self.sources())):
            return False
        if self.folded is None or self.folded != state_of(*self.sources()):
            self.fold()
        return True

    def forward(self, y: Tensor) -> Tensor:
        return F.linear(y, self.weight, self.bias)

    def train(self, mode: bool = True) -> FusedProjection:
        if mode:
            self.folded = None
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.folded = None
        super()._load_from_state_dict(*args, **kwargs)


class FusedBlock(InFront):
    """In front of a SpaceTimeBlock while it is fused."""

    title = "Fused"
    fused: FusedProjection

    def branch(self, y: Tensor) -> Tensor:
        if not self.fused.stands_in(self.temporal_attn, self.temporal_fc):
            return super().branch(y)
        return self.fused(self.temporal_attn.before_proj(self.temporal_norm1(y), self.clip.num_frames))


class Fusing:
    """``fuse()`` and ``unfuse()`` of a model, on whatever branches along time it holds."""

    def fuse(self) -> Fusing:
        """Fold every gate along time into the attention's output projection, for inference; returns the model.

        Weights, their names and the state dict stay as they are, so it can be saved, trained and unfused as before;
        outputs are equal up to rounding. In training mode, or where gradients are asked for, the unfused weights run.

        Raises:
            Img2VidError: the model is in training mode; or no branch of it has two linear maps in a row.
        """
        if self.training:
            raise Img2VidError("fuse() is for inference and this model is in training mode: model.eval().fuse().")
        fused = 0
        self.unfuse()
        for owner, attention, gate in branches(self):
            if can_fuse(owner, attention, gate):
                if isinstance(owner, SpaceTimeBlock):
                    put_in_front(owner, FusedBlock)
                owner.fused = FusedProjection(attention, gate)
                fused += 1
        if not fused:
            raise Img2VidError(
                f"Nothing can be folded in this model (attention={self.config.attention!r}, gate={self.config.gate!r}):"
                " that takes an attention along time whose output projection is followed at once by its gate, both "
                "plain linear maps (not gate='none', nor blocks with their norm after attention). Leave it unfused."
            )
        return self

    def unfuse(self) -> Fusing:
        """Undo ``fuse()``; the weights have never changed."""
        for owner, _, _ in branches(self):
            if isinstance(owner, FusedBlock):
                take_from_front(owner, FusedBlock)
                del owner.fused
            elif not isinstance(owner, SpaceTimeBlock):
                owner.fused = None
        return self


def branches(model: nn.Module) -> list[tuple[nn.Module, TemporalAttention, nn.Module]]:
    found = []
    for module in model.modules():
        for attention, gate in BRANCHES:
            if isinstance(getattr(module, attention, None), TemporalAttention) and hasattr(module, gate):
                found.append((module, getattr(module, attention), getattr(module, gate)))
    return found


def can_fuse(owner: nn.Module, attention: TemporalAttention, gate: nn.Module) -> bool:
    return are_linear(attention, gate) and not getattr(owner, "post_norm", False)
