"""Which activation a model computes, and another one in its place: weights do not show it, and fit any."""

from __future__ import annotations

import functools
from collections.abc import Callable

import open_clip.transformer
from timm.layers import activations
from torch import nn

from img2vid.errors import BackboneError

# name (timm's): whether a module is that, and how to make one
ACTIVATIONS: dict[str, tuple[Callable[[nn.Module], bool], Callable[[], nn.Module]]] = {
    "quick_gelu": (
        lambda m: isinstance(m, (open_clip.transformer.QuickGELU, activations.QuickGELU)),
        activations.QuickGELU,
    ),
    "gelu_tanh": (
        lambda m: isinstance(m, activations.GELUTanh) or (isinstance(m, nn.GELU) and m.approximate == "tanh"),
        functools.partial(nn.GELU, approximate="tanh"),
    ),
    "gelu": (lambda m: isinstance(m, (nn.GELU, activations.GELU)), nn.GELU),
    "silu": (lambda m: isinstance(m, nn.SiLU), nn.SiLU),
    "relu": (lambda m: isinstance(m, nn.ReLU), nn.ReLU),
}
HF_NAMES = {  # transformers' names for the same functions
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def name_of(module: nn.Module) -> str | None:
    return next((name for name, (is_it, _) in ACTIVATIONS.items() if is_it(module)), None)


def activations_of(model: nn.Module) -> list[str]:
    """Names of the activations in a model."""
    return sorted({name for module in model.modules() if (name := name_of(module)) is not None})


def set_activation(model: nn.Module, wanted: str | dict[str, str] | None) -> None:
    """Exchange a model's activations, in place, where its weights were trained with another than the library's.

    Args:
        wanted: one for all, or by the path of a part, such as ``{"visual": "quick_gelu"}``; None leaves them.
    """
    if wanted is None:
        return
    for path, name in (wanted if isinstance(wanted, dict) else {"": wanted}).items():
        if name not in ACTIVATIONS:
            raise BackboneError(f"activation={name!r}: expected one of {', '.join(ACTIVATIONS)}.")
        try:
            part = model.get_submodule(path)
        except AttributeError:
            raise BackboneError(f"activation is given for {path!r}, which {type(model).__name__} has not.") from None
        for parent in list(part.modules()):
            for child_name, child in list(parent.named_children()):
                if name_of(child) not in (None, name):
                    setattr(parent, child_name, ACTIVATIONS[name][1]().train(child.training))
