"""What may be left out, or remembered, because it cannot make a difference now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from img2vid.temporal.block import SpaceTimeBlock
from img2vid.temporal.gates import TanhGate
from img2vid.temporal.infront import InFront


def state_of(*tensors: Tensor) -> tuple[Any, ...]:
    """Equal as long as the tensors hold the same numbers: where they are, and how often they were written to.

    Writing through ``tensor.data`` leaves no trace; write under ``torch.no_grad()`` instead.
    """
    return tuple((t.data_ptr(), t.dtype, times_written(t)) for t in tensors)


def times_written(tensor: Tensor) -> int:
    """Of tensors made in inference mode torch keeps no count; a sum of their bits, each by its place, does for one."""
    if not tensor.is_inference():
        return tensor._version
    if tensor.is_meta:
        return 0
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.flatten().view(whole).long()
    # odd factors: a plain sum is blind to order, and times an even one the highest bit would be lost
    return int((bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum())


def is_watched(*modules: nn.Module) -> bool:
    """Whether a hook waits for one of the modules, or a module inside, to be called."""
    return any(m._forward_hooks or m._forward_pre_hooks for module in modules for m in module.modules())


def is_readable(tensor: Tensor) -> bool:
    """Whether its numbers can be asked for: not meta or fake, sharded, or seen through a function transform."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta
    return is_plain and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


_seen_is_present = ContextVar("seen_is_present", default=False)


@contextmanager
def as_last_seen() -> Iterator[None]:
    """Let torch.export, which sees no numbers, go by what the last eager forward saw: no weight has changed since."""
    token = _seen_is_present.set(True)
    try:
        yield
    finally:
        _seen_is_present.reset(token)


def sees_the_present() -> bool:
    return _seen_is_present.get()


class ShutGate:
    """Remembers whether a gate is exactly zero and frozen, so that the branch behind it need not be computed."""

    def __init__(self) -> None:
        self.state: Any = None
        self.is_zero = False

    def shuts(self, gate: nn.Module, *behind: nn.Module) -> bool:
        """Whether adding ``gate(behind(x))`` would change nothing, to outputs or to gradients.

        A compiled program cannot look, nor can an exported one (``as_last_seen``). Of a gate that has been wrapped or
        reparametrised, parameters at zero do not say that it is.
        """
        parameters = list(gate.parameters())
        if type(gate) not in (nn.Linear, TanhGate) or any(parameter.requires_grad for parameter in parameters):
            return False
        # a zero gradient is not the same as none: optimisers decay the one weight and leave the other
        if torch.is_grad_enabled() and any(p.requires_grad for module in behind for p in module.parameters()):
            return False
        if is_watched(gate, *behind):
            return False
        if torch.compiler.is_compiling():
            return torch.compiler.is_exporting() and self.is_zero and sees_the_present()
        if not all(map(is_readable, parameters)):
            return False
        if (state := state_of(*parameters)) != self.state:
            self.is_zero, self.state = not any(bool(parameter.any()) for parameter in parameters), state
        return self.is_zero


class SkippedWhenShut(InFront):
    """In front of a SpaceTimeBlock: frozen at zero its branch adds +0.0 and is left out.

    All numbers compare equal; a -0.0 stays one.
    """

    title = "SkippedWhenShut"
    shut: ShutGate

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.adds_nothing():
            return super(SpaceTimeBlock, self).forward(x, *args, **kwargs)  # the image block at once
        return super().forward(x, *args, **kwargs)

    def adds_nothing(self) -> bool:
        if self.training and not isinstance(self.temporal_drop_path, nn.Identity):
            return False  # it draws random numbers, and others come after it
        return self.shut.shuts(self.temporal_fc, self.temporal_norm1, self.temporal_attn)
