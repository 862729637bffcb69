"""Embeddings of place and time: resampled in 2-D and 1-D, and patches that span several frames."""

from __future__ import annotations

import torch
from einops import rearrange
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F


def resample_pos_embed(
    pos_embed: Tensor, new_grid: tuple[int, int], old_grid: tuple[int, int], num_prefix_tokens: int
) -> Tensor:
    """Position embedding on another patch grid: (1, P + h*w, D) -> (1, P + h'*w', D), bicubic with antialias in fp32.

    Both grids (rows, columns) are explicit: a token count alone cannot tell 8 x 18 from 12 x 12, and treating the
    tokens as a 1-D sequence (as the original TimeSformer loader does) puts most of them in the wrong place. The P
    prefix entries stay as they are.
    """
    if pos_embed.shape[1] != num_prefix_tokens + old_grid[0] * old_grid[1]:
        raise ValueError(
            f"The position embedding has {pos_embed.shape[1]} entries, but {num_prefix_tokens} prefix tokens and a "
            f"{old_grid[0]} x {old_grid[1]} grid make {num_prefix_tokens + old_grid[0] * old_grid[1]}. "
            "Give the grid (rows, columns) that the embedding was trained on."
        )
    if tuple(new_grid) == tuple(old_grid):
        return pos_embed
    return resample_abs_pos_embed(
        pos_embed, list(new_grid), list(old_grid), num_prefix_tokens, interpolation="bicubic", antialias=True
    )


def resample_time_embed(time_embed: Tensor, num_frames: int, mode: str = "linear") -> Tensor:
    """Time embedding for another number of frames: (1, T, ..., D) -> (1, T', ..., D).

    Args:
        mode: ``linear`` (half-pixel centres, so both ends of the clip keep their meaning); ``nearest``, which is what
            the original TimeSformer does; ``crop_or_pad``, the first T' entries and zeros where there are fewer, which
            is what Frozen in Time does; ``hold``, the first T' entries and the last again where there are fewer.
    """
    if mode == "hold":
        return time_from(time_embed, 0, num_frames, mode)
    # an exported program must not be fixed to the number of frames it was traced with
    if not torch.compiler.is_exporting() and time_embed.shape[1] == num_frames:
        return time_embed
    signal = time_embed.flatten(2).transpose(1, 2)  # (1, ... * D, T)
    if mode == "linear":
        signal = F.interpolate(signal.float(), size=num_frames, mode="linear", align_corners=False)
    elif mode == "nearest":
        signal = F.interpolate(signal.float(), size=num_frames, mode="nearest")
    else:
        signal = F.pad(signal, (0, num_frames))[..., :num_frames]
    return signal.transpose(1, 2).unflatten(2, time_embed.shape[2:]).to(time_embed.dtype)


def time_from(time_embed: Tensor, start: int, num_frames: int, mode: str) -> Tensor:
    """Embedding of T' frames of a longer clip, from frame ``start`` on: (1, T, ..., D) -> (1, T', ..., D).

    Args:
        mode: ``hold`` or ``crop_or_pad``, under which a frame's entry does not depend on how many frames there are.
    """
    frames = torch.arange(start, start + num_frames, device=time_embed.device)
    rows = time_embed[:, frames.clamp(max=time_embed.shape[1] - 1)]
    if mode == "hold":
        return rows
    known = (frames < time_embed.shape[1]).to(rows.dtype)
    return rows * known.view(-1, *[1] * (rows.ndim - 2))


def time_of_tokens(time: Tensor, shape: torch.Size, num_prefix: int, num_shared: int) -> Tensor:
    """What ``time_embed`` adds to tokens of ``shape`` (B*T, P + N, D), from one row a frame (T, D) or patch (T, N, D).

    Args:
        num_prefix: prefix tokens P, which have no place and so get nothing where each patch has a row of its own.
        num_shared: those of them that belong to the whole clip and so are at no time in particular.
    """
    if time.ndim == 3:
        time, num_shared = F.pad(time, (0, 0, num_prefix, 0)), num_prefix  # (T, P + N, D)
    else:
        time = time.unsqueeze(1).expand(-1, shape[1], -1)
    time = time.repeat(shape[0] // time.shape[0], 1, 1)  # (B*T, P + N, D)
    if not num_shared:
        return time
    return torch.cat([torch.zeros_like(time[:, :num_shared]), time[:, num_shared:]], dim=1)


def resample_patch_times(
    time_embed: Tensor, num_frames: int, new_grid: tuple[int, int], old_grid: tuple[int, int], mode: str = "linear"
) -> Tensor:
    """One embedding for each patch of each frame, at another clip size: (1, T, h*w, D) -> (1, T', h'*w', D)."""
    if tuple(new_grid) != tuple(old_grid):
        frames = [resample_pos_embed(frame, new_grid, old_grid, 0) for frame in time_embed.unbind(1)]
        time_embed = torch.stack(frames, dim=1)
    return resample_time_embed(time_embed, num_frames, mode)


class TubeletConv2d(nn.Conv2d):
    """A patch projection that also looks at the frames around the one it was trained on.

    A tubelet of K frames is stacked in the channels, (B*T, K*C, H, W); a stride-K 3-D convolution over it is one 2-D
    convolution per frame, summed. The image weights keep their key and serve the central frame K // 2; the others are
    new in ``tubelet_weight`` (K - 1, D, C, h, w). At zero they are ViViT's "central frame initialisation"
    (arXiv:2103.15691, section 3.4), and the result is the image model's on central frames, bit for bit.
    """

    tubelet_size: int

    def forward(self, x: Tensor) -> Tensor:
        frames = rearrange(x, "b (k c) h w -> b k c h w", k=self.tubelet_size)
        centre = self.tubelet_size // 2
        around = torch.cat([frames[:, :centre], frames[:, centre + 1 :]], dim=1)
        around = rearrange(around, "b k c h w -> b (k c) h w")  # k: the K - 1 other frames
        weight = rearrange(self.tubelet_weight, "k d c h w -> d (k c) h w")
        central = super().forward(frames[:, centre].contiguous())
        return central + F.conv2d(around, weight, None, self.stride, self.padding, self.dilation)


@torch.no_grad()
def inflate_to_tubelets(conv: nn.Conv2d, tubelet_size: int, init: str = "central") -> None:
    """Turn a patch projection into a ``TubeletConv2d`` in place.

    Args:
        tubelet_size: frames K per tubelet.
        init: ``central`` keeps the image weights for the central frame and zero for the others; ``average`` gives every
            frame the image weights divided by K, which keeps the function on static clips only.
    """
    weight = conv.weight
    around = torch.zeros(tubelet_size - 1, *weight.shape, dtype=weight.dtype, device=weight.device)
    if init == "average":
        around += weight / tubelet_size
        conv.weight = nn.Parameter(weight / tubelet_size, requires_grad=weight.requires_grad)
    conv.__class__ = TubeletConv2d
    conv.tubelet_size = tubelet_size
    conv.tubelet_weight = nn.Parameter(around)
