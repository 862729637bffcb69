"""More input channels than the image model was trained on: RGB and optical flow, depth, a mask.

A convolution of more channels whose new columns are zero is the old one (network morphism; ControlNet's zero
convolution at the very entrance): conv(rgb) + zero_conv(more). The image weights keep their key and shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.backbones.tower import Preprocess
from img2vid.config import ConfigError, shown, whole_number
from img2vid.grafts.base import Graft, GraftError, Site, register
from img2vid.grafts.fronts import Grafted, TokenScion

if TYPE_CHECKING:
    from img2vid.model import VideoModel


class KnownChannels(TokenScion):
    """Around the patch projection: of frames (B*T, K * (C + E), H, W), K a tubelet, it gets the C channels it knows.

    What is new comes last, so none of several needs to know how many channels the others have brought.
    """

    def __init__(self, more: int, tubelet_size: int) -> None:
        super().__init__()
        self.more, self.tubelet_size = more, tubelet_size

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        frames = x.unflatten(1, (self.tubelet_size, -1))
        known, more = frames[:, :, : -self.more], frames[:, :, -self.more :]
        return known.flatten(1, 2).contiguous(), more.flatten(1, 2).contiguous()

    def before(self, x: Tensor, host: nn.Module) -> Tensor:
        return self.split(x)[0]


class MoreChannels(KnownChannels):
    """What the others give is added to what comes out."""

    def __init__(self, conv: nn.Conv2d, more: int, tubelet_size: int) -> None:
        super().__init__(more, tubelet_size)
        self.zero_weight = nn.Parameter(torch.zeros(conv.out_channels, tubelet_size * more, *conv.kernel_size))

    def after(self, y: Tensor, x: Tensor, host: nn.Module) -> Tensor:
        return y + F.conv2d(self.split(x)[1], self.zero_weight, None, host.stride, host.padding, host.dilation)


@register
@dataclass(frozen=True)
class Channels(Graft):
    """Clips (B, T, C + E, H, W): the E last channels are new.

    Args:
        more: E.
        mean, std: of the new channels, on the scale of pixels divided by 255, for ``model.normalize``; one number for
            all of them, or a list.
    """

    type = "channels"
    where = "the patch projection"
    new = "a column for each new channel: D x E x h x w numbers"
    gate = "zero_weight"
    identity = "bit for bit, of the channels it had"
    folds = "no: the image library's convolution has no place for them"

    more: int = 2
    mean: float | tuple[float, ...] = 0.5
    std: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("more", self.more, most=4096)
        for name in ("mean", "std"):
            value = getattr(self, name)
            values = value if isinstance(value, (tuple, list)) else (value,) * self.more
            is_right = all(
                isinstance(v, (int, float)) and math.isfinite(v) and (name == "mean" or v > 0) for v in values
            )
            if len(values) != self.more or not is_right:
                raise ConfigError(f"{name}={shown(value)}: expected one number, or {self.more}, for channels more.")
            object.__setattr__(self, name, tuple(float(v) for v in values))

    def sites(self, video: VideoModel) -> list[Site]:
        conv = video.tower.patch_conv
        if conv is None:
            raise GraftError(
                f"Patches of {type(video.base).__name__} do not come from one plain convolution, which is what can be "
                "given more channels."
            )
        return [Site(next(path for path, module in video.named_modules() if module is conv), conv, Grafted)]

    def grow(self, video: VideoModel, site: Site) -> MoreChannels:
        return MoreChannels(site.host, self.more, video.config.tubelet_size)

    def planted(self, video: VideoModel) -> None:
        pixels = video.tower.preprocess
        video.tower.in_channels += self.more
        video.tower.preprocess = Preprocess(pixels.mean + self.mean, pixels.std + self.std, pixels.interpolation)
        self.expect(video, self.more)

    def uprooted(self, video: VideoModel) -> None:
        pixels, others = video.tower.preprocess, [one for one in video.grafts if isinstance(one, Channels)]
        end = video.tower.in_channels - sum(one.more for one in others[others.index(self) + 1 :])
        mean, std = (v[: end - self.more] + v[end:] for v in (pixels.mean, pixels.std))
        video.tower.in_channels -= self.more
        video.tower.preprocess = Preprocess(mean, std, pixels.interpolation)
        self.expect(video, -self.more)

    def expect(self, video: VideoModel, more: int) -> None:
        """transformers counts channels before its convolution does."""
        for parent in video.base.modules():
            if hasattr(parent, "num_channels") and any(child is video.tower.patch_conv for child in parent.children()):
                parent.num_channels += more * video.config.tubelet_size
