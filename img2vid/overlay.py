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
    lacks are read from the base, and set on it where the base has them: ``model.output_dict = True`` reaches the code
    that asks for it.

    Args:
        base: the module to lay this one over; ``self.base``, which is no child of it.
        own: attributes that belong to the overlay, whatever the base calls its own.
    """

    def __init__(self, base: nn.Module, **own: Any) -> None:
        super().__init__()
        self.__dict__.update(own)
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = base.__dict__[registry]
        self.__dict__["base"] = base  # past nn.Module.__setattr__, which would register it as a child
        self.training = base.training

    def train(self, mode: bool = True) -> Overlay:
        self.base.training = mode
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> Overlay:
        """Called by ``nn.DataParallel`` for each further device."""
        raise RuntimeError(
            f"A {type(self).__name__} cannot be copied by nn.DataParallel: what is inserted in it refers to its own "
            "blocks, which copies would then use on the wrong device. Use DistributedDataParallel with one process per "
            "GPU: torchrun --nproc_per_node=N train/fit.py fit --config ... --trainer.devices=N."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("base")
        is_own = base is None or name in self.__dict__ or hasattr(type(self), name)
        if is_own or not hasattr(base, name):
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)

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
