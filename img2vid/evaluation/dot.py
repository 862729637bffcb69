"""The self-test of attention pictures: a model made to look at what is bright, and a moving dot for it to find."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

import img2vid
from img2vid.evaluation.attention import attention_maps


def dot_seeker(num_frames: int) -> tuple[nn.Module, Tensor, list[tuple[int, int]]]:
    """A model that attends to what is bright, a clip with a moving dot, and where the dot is: (row, column) by frame.

    The model sees 8 x 8 patches of 4 pixels. Its first channel is brightness, every query asks for it, and nothing is
    added to the stream.
    """
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=1, num_classes=0
    )
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
        vit.patch_embed.proj.weight[0] = 1.0
        vit.patch_embed.proj.bias[1] = vit.cls_token[..., 1] = 1.0
        for block in vit.blocks:
            block.norm1.weight.fill_(1.0)
            block.attn.qkv.bias[0] = 8.0  # the query
            block.attn.qkv.weight[16, 0] = 1.0  # the key
        vit.norm.weight.fill_(1.0)
    places = [(1 + t % 6, (2 * t + 4) % 8) for t in range(num_frames)]  # off the diagonal
    clip = torch.zeros(1, num_frames, 3, 32, 32)
    for t, (row, column) in enumerate(places):
        clip[0, t, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1.0
    return img2vid.convert(vit, num_frames=num_frames), clip, places


def brightest(maps: Tensor) -> list[tuple[int, int]]:
    """(row, column) of the largest value of each frame's map."""
    return [divmod(int(m.argmax()), m.shape[-1]) for m in maps]


def self_test(num_frames: int = 5) -> bool:
    """Whether the dot lights up where and when it is, in the map over space, along time, and in the rollout."""
    model, clip, places = dot_seeker(num_frames)
    maps = attention_maps(model, clip)
    return all(brightest(m) == places for m in maps.rows().values())
