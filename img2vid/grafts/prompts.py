"""Visual prompts: learned tokens that patches can attend to, in a frozen network.

VPT (Jia et al. 2022, arXiv:2203.12119) puts them between class token and patches: in front of the first block and
through all of them (shallow), or new ones in front of each block, dropped behind it (deep). Both change the function at
once, since a softmax shares its weight among all it sees.

Can a prompt start exactly absent? A mask on its attention logit can: at -inf its share is exactly 0. But so is then the
derivative of that share by the logit, p (1 - p): what is masked out exactly never comes back. So the exact variant
(gated) gives prompts a softmax of their own, and adds what comes of it through a gate for each head that starts at
zero: attention + gate * attention_to_prompts, as LLaMA-Adapter does (Zhang et al. 2023, arXiv:2303.16199). The
gate has its gradient at the first step, the prompts at the second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.backbones.parts import sublayers
from img2vid.backbones.reading import ATTENTIONS, block_kind, read_block, row
from img2vid.config import block_numbers, layer_rule, one_of, whole_number
from img2vid.grafts.adapters import sublayer_sites
from img2vid.grafts.base import Graft, GraftError, Site, register
from img2vid.grafts.fronts import Grafted, TokenScion, scions
from img2vid.proof.guarantees import Guarantee
from img2vid.temporal.infront import InFront

if TYPE_CHECKING:
    from img2vid.model import VideoModel


class Prompts(TokenScion):
    """``num_tokens`` tokens between prefix and patches from this block on; gone behind it where it ``drops`` them."""

    adds_tokens = True

    def __init__(self, num_tokens: int, dim: int, num_prefix: int, bound: float, adds: bool, drops: bool) -> None:
        super().__init__()
        self.num_tokens, self.num_prefix, self.drops = num_tokens, num_prefix, drops
        self.register_parameter("tokens", nn.Parameter(torch.empty(num_tokens, dim)) if adds else None)
        if adds:
            nn.init.uniform_(self.tokens, -bound, bound)

    def before(self, x: Tensor, host: nn.Module) -> Tensor:  # (B*T, P + N, D) -> (B*T, P + K + N, D)
        if self.tokens is None:
            return x
        prompts = self.tokens.to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.cat([x[:, : self.num_prefix], prompts, x[:, self.num_prefix :]], dim=1)

    def after(self, y: Tensor, x: Tensor, host: nn.Module) -> Tensor:
        if not self.drops:
            return y
        return torch.cat([y[:, : self.num_prefix], y[:, self.num_prefix + self.num_tokens :]], dim=1)


class MoreUnrotated(nn.Module):
    """In an attention with rotary positions: so many more tokens in front have none."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens


class LongerPrefix(InFront):
    """In front of an attention with rotary positions, which leaves out ``num_prefix_tokens`` of them."""

    title, serves = "LongerPrefix", MoreUnrotated

    @property
    def num_prefix_tokens(self) -> int:
        return self.__dict__["num_prefix_tokens"] + sum(more.num_tokens for more in scions(self, MoreUnrotated))


class GatedPrompts(TokenScion):
    """Beside an attention: its queries attend to prompts in a softmax of their own, each head through a gate."""

    def __init__(self, num_tokens: int, dim: int, num_heads: int, bound: float) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(num_tokens, dim))  # as they are behind the block's norm
        self.zero_gate = nn.Parameter(torch.zeros(num_heads, 1, 1))
        nn.init.uniform_(self.tokens, -bound, bound)

    def after(self, y: Tensor, x: Tensor, host: nn.Module) -> Tensor:
        own = row(ATTENTIONS, host)(host)
        wq, wk, wv = own["qkv_weight"].chunk(3)
        bq, bk, bv = (None, None, None) if own["qkv_bias"] is None else own["qkv_bias"].chunk(3)

        def heads(tokens: Tensor, weight: Tensor, bias: Tensor | None, norm: nn.Module | None = None) -> Tensor:
            z = F.linear(tokens, weight, bias).unflatten(-1, (own["num_heads"], -1)).transpose(-3, -2)  # (.., H, S, d)
            return z if norm is None else norm(z)

        q = heads(x, wq, bq, own.get("q_norm"))
        k, v = (
            z.expand(x.shape[0], -1, -1, -1)
            for z in (heads(self.tokens, wk, bk, own.get("k_norm")), heads(self.tokens, wv, bv))
        )
        seen = self.zero_gate * F.scaled_dot_product_attention(q, k, v, scale=own["scale"])
        return y + F.linear(seen.transpose(1, 2).flatten(2), own["proj_weight"])


@register
@dataclass(frozen=True)
class Prompt(Graft):
    """Learned tokens that all others can attend to.

    Args:
        num_tokens: K, of one block (or of all, shallow).
        form: ``shallow`` | ``deep`` (VPT, neither keeps the function) | ``gated`` (keeps it; in each block).
        layers: in which blocks, as ``temporal_layers``; shallow, from the first to the last of them.
    """

    type = "prompt"
    where = "between prefix and patches (shallow, deep), or beside attention over space (gated)"
    new = "K x D numbers, in each block (deep, gated) or once (shallow)"
    gate = "none; gated: zero_gate, one number a head"
    identity = "not at all (the certificate says by how much); gated: bit for bit"
    folds = "no: they are tokens"
    attends = True

    num_tokens: int = 10
    form: Literal["shallow", "deep", "gated"] = "deep"
    layers: str | tuple[int, ...] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("num_tokens", self.num_tokens)
        one_of("form", self.form, ("shallow", "deep", "gated"))
        object.__setattr__(self, "layers", layer_rule(self.layers, "layers"))
        object.__setattr__(self, "leaves_tokens", self.form == "shallow")

    def sites(self, video: VideoModel) -> list[Site]:
        blocks = video.tower.blocks
        numbers = block_numbers(self.layers, len(blocks), "layers")
        if self.form == "gated":
            return [site for i in numbers for site in sublayer_sites(video, i, ("attn",))]
        refuse_impossible(video)
        if self.form == "shallow":
            numbers = list(range(numbers[0], numbers[-1] + 1))
        found = []
        for i in numbers:
            path, block = blocks[i]
            adds, drops = (self.form == "deep" or i == end for end in (numbers[0], numbers[-1]))
            if adds or drops:
                found.append(Site(path, block, Grafted, {"dim": read_block(block).dim, "adds": adds, "drops": drops}))
            for kind, name, module in sublayers(block):
                if kind == "attn" and "num_prefix_tokens" in module.__dict__:
                    found.append(Site(f"{path}.{name}", module, LongerPrefix))
        return found

    def grow(self, video: VideoModel, site: Site) -> nn.Module:
        if site.front is LongerPrefix:
            return MoreUnrotated(self.num_tokens)
        dim, tower = site.about["dim"], video.tower
        bound = math.sqrt(6.0 / (tower.in_channels * math.prod(tower.patch_size) + dim))  # as VPT draws them
        if self.form == "gated":
            return GatedPrompts(self.num_tokens, dim, row(ATTENTIONS, site.host)(site.host)["num_heads"], bound)
        ends = site.about["adds"], site.about["drops"]
        return Prompts(self.num_tokens, dim, tower.num_prefix_tokens, bound, *ends)

    def guarantee(self) -> Guarantee:
        if self.form == "gated":
            return super().guarantee()
        return Guarantee("none: prompts take a share of the attention from the start")


def refuse_impossible(video: VideoModel) -> None:
    """Where a stream of more tokens would be cut wrongly.

    Raises:
        GraftError: with what to use instead.
    """
    block, config = video.tower.blocks[0][1], video.config
    reason = None
    if block_kind(block).relative:
        reason = "its attention has a relative position bias of fixed size, in which prompts have no place"
    elif config.prefix_mode == "global" and video.tower.num_prefix_tokens:
        reason = "prefix_mode='global' computes the clip's class token by itself, which would not see them"
    elif config.time_embed == "per_patch":
        reason = "time_embed='per_patch' has one row for each patch, and none for prompts"
    if reason is not None:
        raise GraftError(f"Prompts among the tokens cannot be put in here: {reason}. Use form='gated'.")
