"""Image models that learn time through adapters alone: AIM and ST-Adapter, published for frozen CLIP towers.

Both go with ``attention="space_only"``, where nothing else lets frames know of each other; they can stand beside other
attention along time, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.backbones.reading import read_block
from img2vid.config import ConfigError, block_numbers, layer_rule, one_of, shown, whole_number
from img2vid.grafts.adapters import ACTIVATIONS, Behind, Beside, Bottleneck, sublayer_sites
from img2vid.grafts.base import Graft, GraftError, Site, factor, register
from img2vid.grafts.fronts import Grafted, TokenScion
from img2vid.surgery import num_shared_tokens
from img2vid.temporal.attention import attend
from img2vid.temporal.clip import ClipContext
from img2vid.temporal.embeddings import resample_time_embed, time_of_tokens

if TYPE_CHECKING:
    from img2vid.model import VideoModel


class ReusedAttention(TokenScion):
    """In front of a block: its own attention over space, used along time, and an adapter behind that.

    ``x + adapter(attention(norm(x)))`` along T, with the block's live weights: no attention is added, none is copied.
    What belongs to space (rotary and relative positions) is left out along time.
    """

    def __init__(self, adapter: Bottleneck, clip: ClipContext, num_shared_tokens: int) -> None:
        super().__init__()
        self.adapter, self.clip, self.num_shared_tokens = adapter, clip, num_shared_tokens

    def before(self, x: Tensor, host: nn.Module) -> Tensor:  # (B*T, P + N, D)
        y = self.adapter(self.along_time(x[:, self.num_shared_tokens :], host))
        return x + F.pad(y, (0, 0, self.num_shared_tokens, 0)).to(x.dtype)

    def along_time(self, x: Tensor, host: nn.Module) -> Tensor:
        space = read_block(host)
        y = F.linear(x if space.post_norm else space.norm(x), space.qkv_weight, space.qkv_bias)
        heads = {"t": self.clip.num_frames, "qkv": 3, "h": space.num_heads}
        q, k, v = rearrange(y, "(b t) s (qkv h d) -> qkv b s h t d", **heads)
        q, k = (norm(z) if norm is not None else z for norm, z in ((space.q_norm, q), (space.k_norm, k)))
        y = rearrange(attend(q, k, v, space.scale), "b s h t d -> (b t) s (h d)")
        y = F.linear(y if space.inner_norm is None else space.inner_norm(y), space.proj_weight, space.proj_bias)
        return space.norm(y) if space.post_norm else y


class TimeStamp(ReusedAttention):
    """The first block's: before anything looks along time, frames are told apart by a learned vector each."""

    def __init__(
        self, adapter: Bottleneck, clip: ClipContext, num_shared_tokens: int, num_prefix: int, num_steps: int, dim: int
    ) -> None:
        super().__init__(adapter, clip, num_shared_tokens)
        self.num_prefix = num_prefix
        self.zero_time = nn.Parameter(torch.zeros(1, num_steps, dim))

    def before(self, x: Tensor, host: nn.Module) -> Tensor:
        time = resample_time_embed(self.zero_time, self.clip.num_frames, "linear").squeeze(0)  # (T, D)
        stamped = x + time_of_tokens(time, x.shape, self.num_prefix, self.num_shared_tokens).to(x.dtype)
        return super().before(stamped, host)


@register
@dataclass(frozen=True)
class AIM(Graft):
    """Yang et al. 2023, "AIM: Adapting Image Models for Efficient Video Action Recognition" (arXiv:2302.03024).

    Three adapters a block: behind its attention reused along time, behind its attention over space, beside its MLP;
    and one vector a frame in front of the first block.

    Args:
        ratio: bottleneck as a share of the width D.
        scale: factor on the adapter beside the MLP.
        activation: ``gelu`` | ``relu``.
        layers: in which blocks, as ``temporal_layers``.
    """

    type = "aim"
    where = "each block: its own attention reused along time, attention over space, MLP"
    new = "three adapters D -> r -> D a block, 2 D r + r + D numbers each; T x D for frames"
    gate = "zero_up, zero_time"
    identity = "bit for bit"
    folds = "no: it has nonlinearities inside"
    mixes_frames = attends = True

    ratio: float = 0.25
    scale: float = 0.5
    activation: Literal["gelu", "relu"] = "gelu"
    layers: str | tuple[int, ...] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ratio", factor("ratio", self.ratio))
        object.__setattr__(self, "scale", factor("scale", self.scale))
        one_of("activation", self.activation, tuple(ACTIVATIONS))
        object.__setattr__(self, "layers", layer_rule(self.layers, "layers"))

    def sites(self, video: VideoModel) -> list[Site]:
        found = []
        for n, i in enumerate(block_numbers(self.layers, len(video.tower.blocks), "layers")):
            path, block = video.tower.blocks[i]
            beside = sublayer_sites(video, i, ("attn", "mlp"))
            found += [Site(path, block, Grafted, {**beside[0].about, "kind": "time", "is_first": n == 0}), *beside]
        return found

    def grow(self, video: VideoModel, site: Site) -> TokenScion:
        dim = site.about["dim"]
        adapter = Bottleneck(dim, max(1, int(dim * self.ratio)), self.activation)
        if site.about["kind"] == "attn":
            return Behind(adapter)
        if site.about["kind"] == "mlp":
            return Beside(adapter, self.scale)
        shared = num_shared_tokens(video.tower, video.config)
        if not site.about["is_first"]:
            return ReusedAttention(adapter, video.clip, shared)
        return TimeStamp(adapter, video.clip, shared, video.tower.num_prefix_tokens, video.config.num_steps, dim)


class Convolved(TokenScion):
    """In front of a block: patch tokens D -> C, each channel convolved over (T, H, W) with itself, C -> D."""

    def __init__(self, dim: int, bottleneck: int, kernel: tuple[int, int, int], init: str) -> None:
        super().__init__()
        self.down, up = nn.Linear(dim, bottleneck), nn.Linear(bottleneck, dim, bias=False)
        padding = tuple(k // 2 for k in kernel)
        conv = nn.Conv3d(bottleneck, bottleneck, kernel, padding=padding, groups=bottleneck)
        nn.init.zeros_(self.down.bias)
        self.kernel, self.names = kernel, ("zero_conv", "up") if init == "conv" else ("conv", "zero_up")
        nn.init.zeros_((conv if init == "conv" else up).weight)
        nn.init.zeros_(conv.bias)
        self.zero_bias = nn.Parameter(torch.zeros(dim))  # of up: it must be closed, too, for nothing to be added
        setattr(self, self.names[0], conv)
        setattr(self, self.names[1], up)
        self.clip: ClipContext
        self.num_prefix, self.grid = 0, (1, 1)

    def before(self, x: Tensor, host: nn.Module) -> Tensor:  # (B*T, P + N, D)
        conv, up = (getattr(self, name) for name in self.names)
        rows, columns = self.grid_of(x.shape[1] - self.num_prefix)
        places = {"t": self.clip.num_frames, "h": rows, "w": columns}
        y = rearrange(self.down(x[:, self.num_prefix :]), "(b t) (h w) c -> b c t h w", **places)
        y = up(rearrange(conv(y), "b c t h w -> (b t) (h w) c")) + self.zero_bias
        return x + F.pad(y, (0, 0, self.num_prefix, 0)).to(x.dtype)

    def grid_of(self, num_patches: int) -> tuple[int, int]:
        """Rows and columns of the patches: those of the backbone's own size, or of its shape at another size."""
        if self.kernel[1:] == (1, 1):
            return num_patches, 1
        rows, columns = self.grid
        times = math.sqrt(num_patches / (rows * columns))
        if round(rows * times) * round(columns * times) != num_patches:
            raise GraftError(
                f"{num_patches} patches are no grid of the shape {rows} x {columns}, as other image shapes and patch "
                f"dropout give, so a kernel {self.kernel} knows no neighbours in space. Use kernel=[3, 1, 1]."
            )
        return round(rows * times), round(columns * times)


@register
@dataclass(frozen=True)
class STAdapter(Graft):
    """Pan et al. 2022, "ST-Adapter: Parameter-Efficient Image-to-Video Transfer Learning" (arXiv:2206.13559).

    Args:
        bottleneck: channels C of the convolution.
        kernel: its size in (frames, rows, columns), odd numbers.
        init: what starts at zero: ``conv``, as in the paper's code, or ``up``.
        layers: in which blocks, as ``temporal_layers``.
    """

    type = "st_adapter"
    where = "in front of blocks, patch tokens only"
    new = "D -> C, depthwise convolution over (T, H, W), C -> D: 2 D C + C + D + C (k + 1) numbers each"
    gate = "zero_conv or zero_up; zero_bias"
    identity = "bit for bit"
    folds = "no: it looks at other frames"
    mixes_frames = counts_patches = True

    bottleneck: int = 384
    kernel: tuple[int, int, int] = field(default=(3, 1, 1))
    init: Literal["conv", "up"] = "conv"
    layers: str | tuple[int, ...] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("bottleneck", self.bottleneck)
        if not isinstance(self.kernel, (tuple, list)) or len(self.kernel) != 3:
            raise ConfigError(f"kernel={shown(self.kernel)}: expected (frames, rows, columns), such as [3, 1, 1].")
        for size in self.kernel:
            if whole_number("each of kernel", size) % 2 == 0:
                raise ConfigError(f"kernel={shown(self.kernel)}: expected odd numbers, which have a middle.")
        object.__setattr__(self, "kernel", tuple(self.kernel))
        one_of("init", self.init, ("conv", "up"))
        object.__setattr__(self, "layers", layer_rule(self.layers, "layers"))

    def sites(self, video: VideoModel) -> list[Site]:
        blocks = video.tower.blocks
        return [Site(*blocks[i], Grafted) for i in block_numbers(self.layers, len(blocks), "layers")]

    def grow(self, video: VideoModel, site: Site) -> Convolved:
        scion = Convolved(read_block(site.host).dim, self.bottleneck, self.kernel, self.init)
        scion.clip, scion.num_prefix, scion.grid = video.clip, video.tower.num_prefix_tokens, video.tower.grid
        return scion
