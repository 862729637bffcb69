"""Sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055): an MLP becomes E of them, and a router sends each
token to the k that suit it.

Each expert is kept as its difference from the MLP it began as, which starts at zero: so all experts start as copies,
and closing the gate makes them copies again. While the MLP itself is frozen (``freeze: grafts_only``), training
differences is training E separate copies. The router's k weights are divided by their sum, and the other k - 1 outputs
are added as differences from the first: of equal outputs the sum is that output, to the bit, whatever the router says.

What is left to rounding is the multiplication. ``compute: sparse`` shows an expert its own tokens only, and a product
with other rows beside it may round otherwise: kept up to rounding. ``dense`` shows all tokens to all experts, in the
MLP's own shape: kept bit for bit, for E / k times the work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call

from img2vid.config import ConfigError, block_numbers, layer_rule, one_of, whole_number
from img2vid.grafts.adapters import sublayer_sites
from img2vid.grafts.base import Graft, GraftError, Site, register
from img2vid.grafts.fronts import PREFIX, GraftedSequential, scions
from img2vid.proof.guarantees import KINDS, Guarantee
from img2vid.temporal.infront import InFront, own_class

if TYPE_CHECKING:
    from img2vid.model import VideoModel


class Balance:
    """Where a router sends the tokens of a step (``objectives.Step``); no part of the model, so never copied.

    The step may run in several forwards (``chunk_size``): of each it takes sums, so together they are the whole. What a
    forward notes is always the same, whether it is taken or not: checkpointing compares it with a second run.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.latest: tuple[Tensor, Tensor] | None = None
        self.parts: list[tuple[Tensor, Tensor]] = []

    def note(self, shares: Tensor, chosen: Tensor) -> None:
        """What the router says (n, E), and which experts are asked (n, k), in one forward."""
        self.latest = shares.sum(dim=0), counted(chosen, shares)

    def take(self) -> None:
        """Count the latest forward as one of the step."""
        if self.latest is not None:
            self.parts.append(self.latest)
            self.latest = None

    @property
    def loss(self) -> Tensor | None:
        """``balance_loss`` of all tokens noted; None where there are none."""
        return uneven(*map(sum, zip(*self.parts, strict=True))) if self.parts else None

    def __deepcopy__(self, memo: dict) -> Balance:
        return Balance()

    def __reduce__(self) -> tuple[type[Balance], tuple]:
        return Balance, ()


class Experts(nn.Module):
    """The scion of an MLP: a router, and the experts' differences from their host."""

    def __init__(self, host: nn.Module, dim: int, num_experts: int, top_k: int, compute: str) -> None:
        super().__init__()
        self.router = nn.Linear(dim, num_experts, bias=False)
        nn.init.normal_(self.router.weight, std=0.02)
        self.zero_experts = nn.ModuleList(zeros_like(host) for _ in range(num_experts))
        self.top_k, self.compute, self.balance = top_k, compute, Balance()
        self.__dict__["host"] = host  # it is the parent, no child

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., N, D) -> the same, each of its k experts."""
        shares = self.router(x).float().softmax(dim=-1)  # (..., N, E)
        top, chosen = shares.topk(self.top_k, dim=-1)  # (..., N, k)
        if self.training:
            self.balance.note(shares.flatten(0, -2), chosen.flatten(0, -2))
        weights = (top / top.sum(dim=-1, keepdim=True)).to(x.dtype).unsqueeze(-1)  # (..., N, k, 1)
        # a program that is exported or compiled has one shape for whatever a router says
        is_dense = self.compute == "dense" or torch.compiler.is_compiling()
        outputs = self.dense(x, chosen) if is_dense else self.sparse(x, chosen)
        best, others = outputs[..., :1, :], outputs[..., 1:, :]
        return best.squeeze(-2) + (weights[..., 1:, :] * (others - best)).sum(dim=-2)

    def dense(self, x: Tensor, chosen: Tensor) -> Tensor:
        """All experts on all tokens, then those that were chosen: (..., N, D) -> (..., N, k, D)."""
        every = torch.stack([self.expert(e)(x) for e in range(len(self.zero_experts))], dim=-2)
        return every.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, every.shape[-1]))

    def sparse(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Each expert on its own tokens: (..., N, D) -> (..., N, k, D)."""
        asked = chosen.flatten()
        order = asked.argsort(stable=True)
        counts = how_many(asked, len(self.zero_experts))
        parts = x.flatten(0, -2)[order // self.top_k].split(counts)
        in_order = torch.cat([self.expert(e)(part) for e, part in enumerate(parts)])
        return in_order[order.argsort()].view(*chosen.shape, -1)

    def expert(self, number: int) -> Callable[[Tensor], Tensor]:
        """The host's own function, with its weights (and what other grafts make of them) plus a difference."""
        expert = self.zero_experts[number]
        weights = {name: summed(attrgetter(name)(self.host), p) for name, p in expert.named_parameters()}
        return lambda x: functional_call(expert, weights, (x,))


def how_many(asked: Tensor, num_experts: int) -> list[int]:
    """Tokens of each expert; of tokens without numbers (meta or fake tensors), as of a router that is fair."""
    if asked.is_meta or isinstance(asked, FakeTensor):
        return [len(asked) // num_experts + (e < len(asked) % num_experts) for e in range(num_experts)]
    return asked.bincount(minlength=num_experts).tolist()


def summed(own: Tensor, difference: Tensor) -> Tensor:
    weight = own + difference
    if own.requires_grad and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        weight.requires_grad_()  # torch.matmul chooses how to multiply, and so to round, by this too
    return weight


def balance_loss(shares: Tensor, chosen: Tensor) -> Tensor:
    """E sum_e f_e P_e (Fedus et al. 2021, arXiv:2101.03961): share of tokens times mean share of the router; 1 is even.

    Args:
        shares: (n, E), what the router says.
        chosen: (n, k), which experts were asked.
    """
    return uneven(shares.sum(dim=0), counted(chosen, shares))


def counted(chosen: Tensor, shares: Tensor) -> Tensor:
    """How often each expert was asked, (n, k) -> (E,)."""
    is_asked = chosen.flatten().unsqueeze(1) == torch.arange(shares.shape[1], device=chosen.device)  # (n k, E)
    return is_asked.to(shares.dtype).sum(dim=0)


def uneven(shares: Tensor, asked: Tensor) -> Tensor:
    """``balance_loss`` of sums over tokens, both (E,)."""
    return len(shares) * (asked / asked.sum() * (shares / shares.detach().sum())).sum()


@torch.no_grad()
def zeros_like(host: nn.Module) -> nn.Module:
    """A module of the host's own class, without grafts, all of whose parameters are zero."""
    twin = copy.deepcopy(host)
    for module in list(twin.modules()):
        for name in [name for name in module._modules if name.startswith(PREFIX)]:
            delattr(module, name)
        module.__class__ = own_class(module)
    for parameter in twin.parameters():
        parameter.zero_()
    return twin.requires_grad_(True)


class Routed(InFront):
    """In front of an MLP, behind whatever else stands there: its experts answer in its place."""

    title = "Routed"
    serves = Experts
    innermost = True

    def forward(self, x: Tensor) -> Tensor:
        return next(scions(self, Experts))(x)


class RoutedSequential(Routed):
    """In front of a Sequential, which would run its scions as further steps."""

    __iter__ = GraftedSequential.__iter__
    __len__ = GraftedSequential.__len__


@register
@dataclass(frozen=True)
class Upcycling(Graft):
    """A mixture of experts in place of MLPs.

    Args:
        num_experts: E.
        top_k: k, how many a token is sent to; at least 2, as one weight divided by itself teaches a router nothing.
        compute: ``sparse`` (each expert on its tokens; all on all where it is exported) or ``dense`` (all on all).
        layers: in which blocks, as ``temporal_layers``: ``all``, ``every:K``, ``last:N``, or block numbers.
    """

    type = "experts"
    where = "MLPs, in their place"
    new = "E differences from the MLP, each of its size, and a router of E D numbers"
    gate = "zero_experts"
    identity = "up to rounding; with `compute: dense`, bit for bit"
    folds = "no: which expert answers depends on the token"

    num_experts: int = 4
    top_k: int = 2
    compute: Literal["sparse", "dense"] = "sparse"
    layers: str | tuple[int, ...] = "every:2"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("num_experts", self.num_experts)
        whole_number("top_k", self.top_k)
        if not 2 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"top_k={self.top_k} of num_experts={self.num_experts}: expected 2 to that many. Of one expert alone "
                "the weight is always 1, from which no router learns."
            )
        one_of("compute", self.compute, ("sparse", "dense"))
        object.__setattr__(self, "layers", layer_rule(self.layers, "layers"))

    @property
    def groups_tokens(self) -> bool:
        return self.compute == "sparse"

    def sites(self, video: VideoModel) -> list[Site]:
        numbers = block_numbers(self.layers, len(video.tower.blocks), "layers")
        found = [site for i in numbers for site in sublayer_sites(video, i, ("mlp",))]
        for site in found:
            others = [name for name, m in site.host.named_children() if isinstance(m, Experts)]
            if any(name != PREFIX + self.name for name in others):
                raise GraftError(f"{site.path} has experts already, from {others[0].removeprefix(PREFIX)}.")
        kinds = {True: RoutedSequential, False: Routed}
        return [Site(s.path, s.host, kinds[isinstance(s.host, nn.Sequential)], s.about) for s in found]

    def grow(self, video: VideoModel, site: Site) -> Experts:
        return Experts(site.host, site.about["dim"], self.num_experts, self.top_k, self.compute)

    def guarantee(self) -> Guarantee:
        if self.groups_tokens:
            return Guarantee("any clip, up to rounding", dict.fromkeys(KINDS, "close"))
        return super().guarantee()
