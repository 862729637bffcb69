"""A second input beside the frames (optical flow, depth, a spectrogram), read by trainable copies of trained blocks.

ControlNet (Zhang et al. 2023, arXiv:2302.05543) for a vision transformer: the first blocks are copied; the copies run
on the same tokens, to which a stem adds what it makes of the second input through a zero map, and what they make of it
is added behind each original through another:

    c = x + zero_in(stem(control))        at the first block
    y = block(x) + zero_out(c),  c = copy(c)

The originals may stay frozen. With zero_out closed nothing is added; it learns at the first step, the copies at the
second, and what stands behind both zeros, the stem, at the third.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.backbones.dropping import PATCH_DROPOUTS
from img2vid.backbones.reading import read_block
from img2vid.config import whole_number
from img2vid.grafts.base import GraftError, Site, register
from img2vid.grafts.channels import Channels, KnownChannels
from img2vid.grafts.fronts import PREFIX, Grafted, scions
from img2vid.surgery import num_shared_tokens
from img2vid.temporal.gates import zero_linear
from img2vid.temporal.infront import InFront, own_class
from img2vid.temporal.pooling import first
from img2vid.temporal.prefix import with_first

if TYPE_CHECKING:
    from img2vid.model import VideoModel


class Hint:
    """What the stem made of the second input, on its way to the first block, past all that is in between."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None


class Stem(KnownChannels):
    """Around the patch projection, which gets its own channels; the others become a hint (B*T, N, D)."""

    depth = 1  # what it makes passes zero_out of the copies

    def __init__(self, conv: nn.Conv2d, more: int, tubelet_size: int, hint: Hint) -> None:
        super().__init__(more, tubelet_size)
        self.stem = nn.Conv2d(tubelet_size * more, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        self.zero_in = zero_linear(conv.out_channels, conv.out_channels)
        self.hint = hint

    def before(self, x: Tensor, host: nn.Module) -> Tensor:
        known, more = self.split(x)
        self.hint.tokens = self.zero_in(self.stem(more).flatten(2).transpose(1, 2))
        return known


class Copied(nn.Module):
    """In a block: its copy, and what lets the copy's output into the stream."""

    def __init__(
        self, block: nn.Module, dim: int, num_prefix: int, num_shared: int, hint: Hint | None, ends: bool
    ) -> None:
        super().__init__()
        self.copy, self.zero_out = block, zero_linear(dim, dim)
        self.num_prefix, self.num_shared, self.hint, self.ends = num_prefix, num_shared, hint, ends

    def enter(self, x: Tensor) -> Tensor:
        """Tokens (B*T, P + N, D) with those of control between prefix and patches, (B*T, P + (P + N) + N, D)."""
        if self.hint is None:
            return x
        hint, self.hint.tokens = self.hint.tokens, None
        control = x + F.pad(hint, (0, 0, self.num_prefix, 0)).to(x.dtype)
        return self.join(x, control)

    def join(self, x: Tensor, control: Tensor) -> Tensor:
        return torch.cat([x[:, : self.num_prefix], control, x[:, self.num_prefix :]], dim=1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        num_patches = (x.shape[1] - 2 * self.num_prefix) // 2
        prefix, control, patches = x.split([self.num_prefix, self.num_prefix + num_patches, num_patches], dim=1)
        return torch.cat([prefix, patches], dim=1), control

    def let_in(self, control: Tensor) -> Tensor:
        """Tokens that belong to the whole clip are the same in each frame, and get nothing of one frame's."""
        return F.pad(self.zero_out(control[:, self.num_shared :]), (0, 0, self.num_shared, 0))


class Controlled(InFront):
    """In front of a block: tokens of control come and go with its own, so that a block may be run twice."""

    title, serves = "Controlled", Copied
    outermost = True  # for whatever else stands there, a block has the tokens it always had

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for branch in scions(self, Copied):  # outside of forward, which checkpointing runs again
            x = branch.enter(x)
        return super().__call__(x, *args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        (branch,) = scions(self, Copied)
        x, control = branch.split(x)
        out = super().forward(x, *args, **kwargs)
        control = first(branch.copy(control, *args, **kwargs))
        y = first(out) + branch.let_in(control)
        return with_first(out, y if branch.ends else branch.join(y, control))


@register
@dataclass(frozen=True)
class Control(Channels):
    """A control branch. Clips are (B, T, C + E, H, W): the E last channels are the second input.

    Args:
        more: E.
        mean, std: of these channels, on the scale of pixels divided by 255.
        copies: how many of the first blocks are copied; None for half of them.
    """

    type = "control"
    where = "beside the first blocks"
    new = "a stem, E x D x h x w + D, a zero map D x D, and for each a copy of the block and a zero map"
    gate = "zero_out; behind it, zero_in"
    identity = "bit for bit, of the channels it had"
    folds = "no: it reads an input of its own"
    attends = counts_patches = True

    copies: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copies is not None:
            whole_number("copies", self.copies)

    def sites(self, video: VideoModel) -> list[Site]:
        blocks = video.tower.blocks
        number = (len(blocks) + 1) // 2 if self.copies is None else self.copies
        if number > len(blocks):
            raise GraftError(f"copies={number}, but the backbone has {len(blocks)} blocks.")
        if any(isinstance(m, PATCH_DROPOUTS) and m.prob > 0.0 for m in video.base.modules()):
            raise GraftError("A control branch needs all patches of a grid, but this backbone drops some in training.")
        if video.config.time_embed == "per_patch":
            raise GraftError("time_embed='per_patch' has one row for each patch, and none for tokens of control.")
        if any(isinstance(one, Control) and one is not self for one in video.grafts):
            raise GraftError("This model has a control branch already; give that more channels instead.")
        (patches,), hint = super().sites(video), Hint()
        found = [Site(patches.path, patches.host, Grafted, {"hint": hint})]
        for i, (path, block) in enumerate(blocks[:number]):
            found.append(Site(path, block, Controlled, {"hint": None if i else hint, "ends": i + 1 == number}))
        return found

    def grow(self, video: VideoModel, site: Site) -> nn.Module:
        hint, tower = site.about["hint"], video.tower
        if site.front is Grafted:
            return Stem(site.host, self.more, video.config.tubelet_size, hint)
        dim, shared = read_block(site.host).dim, num_shared_tokens(tower, video.config)
        block = image_copy(site.host, video)
        return Copied(block, dim, tower.num_prefix_tokens, shared, hint, site.about["ends"])


def image_copy(block: nn.Module, video: VideoModel) -> nn.Module:
    """A trainable copy of the image block alone, as it was before anything was put into it."""
    twin = copy.deepcopy(block, {id(video.clip): video.clip})
    for module in twin.modules():
        module.__class__ = own_class(module)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
        for name in [name for name in module._modules if name.startswith((PREFIX, "temporal_"))]:
            delattr(module, name)
    return twin.requires_grad_(True)
