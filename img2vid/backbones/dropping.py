"""Exchange the libraries' random dropping for one that draws once per clip."""

from __future__ import annotations

import open_clip.transformer as open_clip_transformer
from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices
from torch import nn

from img2vid.temporal.clip import ClipContext
from img2vid.temporal.dropping import ClipDropPath, ClipPatchDropout

HF_DROP_PATHS = ("Dinov2DropPath", "Dinov2WithRegistersDropPath")  # of transformers, which need not be installed
PATCH_DROPOUTS = (PatchDropout, PatchDropoutWithIndices, open_clip_transformer.PatchDropout, ClipPatchDropout)


def drop_once_per_clip(tower: nn.Module, clip: ClipContext) -> None:
    """Replace every stochastic-depth and patch-dropout layer in ``tower``; none of them has weights or keys."""
    for parent in list(tower.modules()):
        for name, module in list(parent.named_children()):
            replacement = per_clip(module, clip)
            if replacement is not None:
                setattr(parent, name, replacement.train(module.training))


def per_clip(module: nn.Module, clip: ClipContext) -> nn.Module | None:
    if isinstance(module, DropPath):
        return ClipDropPath(module.drop_prob, clip, module.scale_by_keep)
    if type(module).__name__ in HF_DROP_PATHS:
        return ClipDropPath(module.drop_prob, clip)
    if isinstance(module, (PatchDropout, PatchDropoutWithIndices)):
        with_indices = isinstance(module, PatchDropoutWithIndices) or getattr(module, "return_indices", False)
        return ClipPatchDropout(module.prob, module.num_prefix_tokens, clip, module.ordered, with_indices)
    if isinstance(module, open_clip_transformer.PatchDropout):
        return ClipPatchDropout(module.prob, int(module.exclude_first_token), clip)
    return None


def drop_path_rate(block: nn.Module) -> float:
    """Stochastic depth rate of an image block, 0 where it has none."""
    return next((m.drop_prob for m in block.modules() if is_drop_path(m)), 0.0)


def is_drop_path(module: nn.Module) -> bool:
    return isinstance(module, (DropPath, ClipDropPath)) or type(module).__name__ in HF_DROP_PATHS
