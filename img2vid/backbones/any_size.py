"""Let a tower that was built for one image size take others in forward, by its own library's means.

At the size it was built for its own code runs as it is. Elsewhere learned positions are resampled in 2-D (bicubic,
antialias, in fp32, both grids explicit) and rotary angles are computed for the new grid. Relative position biases
belong to a window of one size: timm resizes them at load (``image_size=``), not in forward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import Format, HybridEmbed, PatchEmbed, RotaryEmbeddingCat
from timm.models import cait, eva, vision_transformer
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.backbones.tower import ImageTower
from img2vid.temporal.embeddings import resample_pos_embed
from img2vid.temporal.infront import InFront, put_in_front


def take_any_size(tower: ImageTower) -> None:
    """Change the tower's timm model in place, and say so in ``tower.any_size``, where that can be done."""
    trunk = getattr(tower.module, "trunk", tower.module)
    embed = getattr(trunk, "patch_embed", None)
    if tower.any_size or not isinstance(embed, (PatchEmbed, HybridEmbed)) or not embed.flatten or not embed.img_size:
        return
    is_ragged = any(pixels % patch for pixels, patch in zip(tower.image_size, tower.patch_size, strict=True))
    if is_ragged and not embed.dynamic_img_pad:
        return  # SigLIP at 384 pixels is 27.4 patches of 14, which timm takes at that very size only
    if isinstance(trunk, cait.Cait):
        put_in_front(trunk, AnySizeCait)
    elif isinstance(trunk, (vision_transformer.VisionTransformer, eva.Eva)):
        put_in_front(trunk, AnySize)
    else:
        return
    tower.any_size = True


class AnySize(InFront):
    """Stands in front of timm's ViT or EVA and, for images of another size, takes timm's own path for any size."""

    title = ""  # to those who print it, it still is its library's class

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # (B, C, H, W)
        if tuple(x.shape[-2:]) == tuple(self.patch_embed.img_size):
            return super().forward_features(x, *args, **kwargs)
        with self.dynamic(self.patch_embed.dynamic_feat_size(x.shape[-2:])):
            return super().forward_features(x, *args, **kwargs)

    @contextmanager
    def dynamic(self, grid: tuple[int, int]) -> Iterator[None]:
        """Inside, this is the model that ``dynamic_img_size=True`` would have built."""
        embed, rope = self.patch_embed, getattr(self, "rope", None)
        self.dynamic_img_size, embed.strict_img_size = True, False
        embed.flatten, embed.output_fmt = False, Format.NHWC
        if isinstance(rope, RotaryEmbeddingCat):  # built for one grid it knows no other; it has no parameters
            self.rope = copy.deepcopy(rope)
            self.rope.update_feat_shape(grid)
        try:
            yield
        finally:
            self.dynamic_img_size, embed.strict_img_size = False, True
            embed.flatten, embed.output_fmt = True, Format.NCHW
            if rope is not None:
                self.rope = rope


def can_take_nearest(tower: ImageTower) -> bool:
    """Whether positions are a plain ViT's: one table, with a row for the class token and no other prefix."""
    vit = tower.module
    is_plain = isinstance(vit, vision_transformer.VisionTransformer) and getattr(vit, "pos_embed", None) is not None
    return is_plain and tower.num_prefix_tokens == 1 and not vit.no_embed_class


class NearestPositions(InFront):
    """Stands in front of a plain ViT and gives patches of another grid the position of the nearest patch of its own.

    What TimeSformer's code does (quirk nearest_positions); positions in between would be smoother.
    """

    title = ""

    def _pos_embed(self, x: Tensor) -> Tensor:  # (B, h, w, D) where images may have any size, else (B, N, D)
        native = self.patch_embed.grid_size
        if x.ndim != 4 or tuple(x.shape[1:3]) == tuple(native):
            return super()._pos_embed(x)
        places = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, native)  # (1, D, h, w)
        places = F.interpolate(places, size=x.shape[1:3], mode="nearest").flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)
        return self.pos_drop(tokens + torch.cat([self.pos_embed[:, :1], places], dim=1))


class AnySizeCait(InFront):
    """CaiT adds its learned positions as they are; here they fit the patches first."""

    title = ""

    def forward_features(self, x: Tensor) -> Tensor:
        grid, native = self.patch_embed.dynamic_feat_size(x.shape[-2:]), self.patch_embed.grid_size
        if tuple(grid) == tuple(native):
            return super().forward_features(x)
        self.patch_embed.strict_img_size = False
        x = self.patch_embed(x) + resample_pos_embed(self.pos_embed, grid, native, num_prefix_tokens=0)
        x = self.blocks(self.pos_drop(x))  # (B, N, D)
        return self.norm(self.forward_cls(x))


def set_cait_size(model: nn.Module, image_size: tuple[int, int]) -> None:
    """Another native image size for a CaiT, in place; timm itself has no means for it."""
    old, native = model.pos_embed, model.patch_embed.grid_size
    model.patch_embed.set_input_size(image_size)
    resampled = resample_pos_embed(old.detach(), model.patch_embed.grid_size, native, num_prefix_tokens=0)
    model.pos_embed = nn.Parameter(resampled, requires_grad=old.requires_grad)
