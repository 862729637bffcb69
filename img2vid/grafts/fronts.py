"""Where a scion speaks: before its host, after it, or in the weight that its host multiplies with.

One class in front of a host serves all scions of its kind in it. The first one grafted is the closest to the host; each
further one stands around those before it, sees what enters them, and what comes out of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.grafts.base import Site
from img2vid.temporal.clip import ClipContext
from img2vid.temporal.infront import InFront, fronts_of, stand, take_from_front
from img2vid.temporal.pooling import first
from img2vid.temporal.prefix import with_first

PREFIX = "graft_"


class TokenScion(nn.Module):
    """A scion of a module that tokens go through, (B*T, P + N, D) in and out; it says one of the two.

    ``adds_tokens``: the host gets more of them than the model knows of, which only the host should see: such a scion is
    the closest to it, whatever was grafted first.
    """

    adds_tokens = False

    def before(self, x: Tensor, host: nn.Module) -> Tensor:
        """What the host gets instead of ``x``."""
        return x

    def after(self, y: Tensor, x: Tensor, host: nn.Module) -> Tensor:
        """What comes out instead of the host's output ``y``, where ``x`` went in."""
        return y


class WeightScion(nn.Module):
    """A scion of a linear map W: it adds ``delta()`` to W, which is ``forward(x)`` added to W x."""

    clip: ClipContext  # given when it is put on

    def delta(self) -> Tensor:
        """(out, in), to be added to the weight."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), to be added to the map's output: cheaper than ``delta``, without its gradient."""
        return F.linear(x, self.delta())


class Grafted(InFront):
    """In front of a block, an attention or an MLP."""

    title, serves = "Grafted", TokenScion

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        by_name = "hidden_states" if not args else None  # as transformers calls its attentions
        x = kwargs[by_name] if by_name else args[0]
        around = []
        for scion in reversed(outwards(self)):
            around.append((scion, x))
            x = scion.before(x, self)
        out = super().forward(**{**kwargs, by_name: x}) if by_name else super().forward(x, *args[1:], **kwargs)
        y = first(out)
        for scion, x in reversed(around):
            y = scion.after(y, x, self)
        return with_first(out, y)

    def followed(self, y: Tensor, x: Tensor) -> Tensor:
        """What scions make of some of the host's tokens ``y`` that were computed by themselves, from tokens ``x``."""
        for scion in outwards(self):
            y = scion.after(y, x, self)
        return y


class GraftedSequential(Grafted):
    """In front of a Sequential, which would run its scions as further steps."""

    def __iter__(self) -> Iterator[nn.Module]:
        return (module for name, module in self._modules.items() if not name.startswith(PREFIX))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def listening(host: nn.Module) -> type[InFront]:
    """What to put in front of a module that tokens go through."""
    return GraftedSequential if isinstance(host, nn.Sequential) else Grafted


class GraftedLinear(InFront):
    """In front of a Linear. Called, it adds what its scions make of the input; asked for its weight, it gives the sum:
    attentions that read ``qkv.weight`` without ever calling ``qkv`` (EVA, BEiT, PyTorch's own) are not missed. It does
    so during a forward; at other times it is asked by who wants the parameter itself (FSDP2, for one)."""

    title, serves = "Grafted", WeightScion

    @property
    def weight(self) -> Tensor:
        return grown(self, "weight")

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, own_weight(self, "weight"), self.bias)
        for scion in scions(self, WeightScion):
            y = y + scion(x)
        return y


class GraftedProjection(InFront):
    """In front of an attention whose input projection is a bare parameter (PyTorch's, open_clip's)."""

    title, serves = "GraftedProjection", WeightScion

    @property
    def in_proj_weight(self) -> Tensor:
        return grown(self, "in_proj_weight")


WEIGHT_NAMES: dict[type[InFront], str] = {GraftedLinear: "weight", GraftedProjection: "in_proj_weight"}


def own_weight(host: nn.Module, name: str) -> Tensor:
    """The host's own weight, without what scions add to it."""
    return host._parameters[name]


def grown(host: nn.Module, name: str) -> Tensor:
    own = weight = own_weight(host, name)
    for scion in scions(host, WeightScion):
        if scion.clip.is_in_flight:
            weight = weight + scion.delta().to(weight.dtype)
    if weight is not own and own.requires_grad and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        weight.requires_grad_()  # torch.matmul chooses how to multiply, and so to round, by this too
    return weight


@torch.no_grad()
def fold_weight(site: Site, scion: WeightScion) -> None:
    """Add a scion's delta to its host's own weight, in double precision."""
    weight = own_weight(site.host, WEIGHT_NAMES[site.front])
    exact = torch.float32 if weight.device.type == "mps" else torch.float64  # which MPS does not have
    scion.to(exact)
    weight.copy_((weight.to(exact) + scion.delta()).to(weight.dtype))


def scions(host: nn.Module, kind: type[nn.Module] = nn.Module) -> Iterator[Any]:
    return (m for name, m in host._modules.items() if name.startswith(PREFIX) and isinstance(m, kind))


def outwards(host: nn.Module) -> list[TokenScion]:
    """From the closest to the host to the furthest."""
    return [s for adds in (True, False) for s in scions(host, TokenScion) if s.adds_tokens is adds]


def put_on(site: Site, name: str, scion: nn.Module) -> None:
    site.host.add_module(PREFIX + name, scion)
    fronts = fronts_of(site.host)
    if site.front not in fronts:
        fronts = [site.front, *fronts] if getattr(site.front, "innermost", False) else [*fronts, site.front]
        stand(site.host, sorted(fronts, key=lambda front: getattr(front, "outermost", False)))


def take_off(site: Site, name: str) -> None:
    """Undo ``put_on``; with its last scion, a front goes too."""
    delattr(site.host, PREFIX + name)
    if next(scions(site.host, site.front.serves), None) is None:
        take_from_front(site.host, site.front)
