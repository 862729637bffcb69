"""A module laid over another one: new behaviour, the same parameters under the same names."""

from __future__ import annotations

from typing import Any

from torch import nn


class Overlay(nn.Module):
    """Wraps ``base`` without adding a prefix to its keys.

    A wrapper that registers its base as a child renames every parameter ("base.blocks.0..."), and state-dict hooks that
    take the prefix away again leave ``named_parameters`` disagreeing with ``state_dict``. So an overlay shares the
    base's own registries of parameters, buffers and children: image checkpoints fit, optimisers, EMA and FSDP see the
    names that files have, and what is added to the overlay is added to the tree it shares. Attributes that the overlay
    lacks are looked up on the base.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = base.__dict__[registry]
        self.__dict__["base"] = base  # past nn.Module.__setattr__, which would register it as a child
        self.training = base.training

    def train(self, mode: bool = True) -> Overlay:
        self.base.training = mode
        return super().train(mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("base")
            if base is None or (name.startswith("__") and name.endswith("__")):
                raise
            try:
                return getattr(base, name)
            except AttributeError:
                raise AttributeError(
                    f"Neither {type(self).__name__} nor the {type(base).__name__} it is laid over has {name!r}."
                ) from None
