"""Adapters: a bottleneck, D -> r -> D, behind a sublayer or beside it, in a network that may stay frozen.

Houlsby et al. 2019 (arXiv:1902.00751) put one behind attention and one behind the MLP, before the residual is added:
y + up(act(down(y))). He et al. 2022 (arXiv:2110.04366) and AdaptFormer (arXiv:2205.13535) put one beside the MLP and
give it the MLP's own input: y + scale * up(act(down(x))).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from img2vid.backbones.parts import sublayers
from img2vid.backbones.reading import read_block
from img2vid.config import ConfigError, block_numbers, layer_rule, one_of, shown, whole_number
from img2vid.grafts.base import Graft, GraftError, Site, factor, register
from img2vid.grafts.fronts import TokenScion, listening
from img2vid.proof.guarantees import Guarantee

if TYPE_CHECKING:
    from img2vid.model import VideoModel

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


class Bottleneck(nn.Module):
    """``up(act(down(x)))``, (..., D) -> (..., D) through r numbers: 2 D r + r + D parameters.

    With ``near`` both matrices are drawn from a normal of that deviation, cut off at twice of it, as Houlsby's are;
    otherwise ``up`` starts at zero, and is called so.
    """

    def __init__(self, dim: int, bottleneck: int, activation: str, near: float | None = None) -> None:
        super().__init__()
        self.down, self.act, up = nn.Linear(dim, bottleneck), ACTIVATIONS[activation](), nn.Linear(bottleneck, dim)
        self.gate = "zero_up" if near is None else "up"
        setattr(self, self.gate, up)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(up.bias)
        if near is None:
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(up.weight)
        else:
            for linear in (self.down, up):
                nn.init.trunc_normal_(linear.weight, std=near, a=-2 * near, b=2 * near)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.gate)(self.act(self.down(x)))


class Behind(TokenScion):
    """In series with its host: what it adds is made of the host's output."""

    def __init__(self, adapter: Bottleneck, scale: float = 1.0) -> None:
        super().__init__()
        self.adapter, self.scale = adapter, scale

    def after(self, y: Tensor, x: Tensor, host: nn.Module) -> Tensor:
        return y + self.scale * self.adapter(y)


class Beside(Behind):
    """Parallel to its host: what it adds is made of the host's input."""

    def after(self, y: Tensor, x: Tensor, host: nn.Module) -> Tensor:
        return y + self.scale * self.adapter(x)


@register
@dataclass(frozen=True)
class Adapter(Graft):
    """Bottleneck adapters.

    Args:
        bottleneck: r.
        at: which sublayers get one: ``attn`` (over space), ``mlp``.
        form: ``behind`` (in series, Houlsby) | ``beside`` (parallel, AdaptFormer).
        scale: factor on what it adds; AdaptFormer has 0.1.
        activation: ``gelu`` | ``relu``.
        init: ``zeros``, exactly the identity; or ``near``, Houlsby's: both matrices at random, so close to the identity
            that training is undisturbed, which does not keep the function.
        near: standard deviation with ``init="near"``.
        layers: in which blocks, as ``temporal_layers``.
    """

    type = "adapter"
    where = "behind (Houlsby) or beside (AdaptFormer) attention over space and MLPs, before the residual is added"
    new = "D -> r -> D: 2 D r + r + D numbers each"
    gate = "zero_up"
    identity = "bit for bit; with `init: near`, not"
    folds = "no: it has a nonlinearity inside"

    bottleneck: int = 64
    at: tuple[str, ...] = ("attn", "mlp")
    form: Literal["behind", "beside"] = "behind"
    scale: float = 1.0
    activation: Literal["gelu", "relu"] = "gelu"
    init: Literal["zeros", "near"] = "zeros"
    near: float = 0.01
    layers: str | tuple[int, ...] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("bottleneck", self.bottleneck)
        at = (self.at,) if isinstance(self.at, str) else self.at
        if not isinstance(at, (tuple, list)) or not at:
            raise ConfigError(f"at={shown(self.at)}: expected attn, mlp or both.")
        object.__setattr__(self, "at", tuple(at))
        for one in self.at:
            one_of("each of at", one, ("attn", "mlp"))
        one_of("form", self.form, ("behind", "beside"))
        one_of("activation", self.activation, tuple(ACTIVATIONS))
        one_of("init", self.init, ("zeros", "near"))
        object.__setattr__(self, "scale", factor("scale", self.scale))
        object.__setattr__(self, "near", factor("near", self.near))
        object.__setattr__(self, "layers", layer_rule(self.layers, "layers"))

    def sites(self, video: VideoModel) -> list[Site]:
        numbers = block_numbers(self.layers, len(video.tower.blocks), "layers")
        return [site for i in numbers for site in sublayer_sites(video, i, self.at)]

    def grow(self, video: VideoModel, site: Site) -> TokenScion:
        near = None if self.init == "zeros" else self.near
        adapter = Bottleneck(site.about["dim"], self.bottleneck, self.activation, near)
        return (Behind if self.form == "behind" else Beside)(adapter, self.scale)

    def guarantee(self) -> Guarantee:
        if self.init == "near":
            return Guarantee("none: adapters start near the identity, not at it")
        return super().guarantee()


def sublayer_sites(video: VideoModel, number: int, kinds: tuple[str, ...]) -> list[Site]:
    """The attentions and MLPs of one block, as hosts.

    Raises:
        GraftError: one kind of them does not exist there.
    """
    path, block = video.tower.blocks[number]
    found = sublayers(block)
    has = {kind for kind, _, _ in found}
    for kind in kinds:
        if kind not in has:
            raise GraftError(
                f"{path} has no {kind} of its own to stand by; it has {', '.join(sorted(has)) or 'neither of both'} "
                f"(in {type(block).__name__}, parallel blocks compute attention and MLP as one)."
            )
    about = {"dim": read_block(block).dim}
    return [
        Site(f"{path}.{name}", host, listening(host), {**about, "kind": k}) for k, name, host in found if k in kinds
    ]
