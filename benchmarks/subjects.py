"""Who is compared: img2vid, its peers, the image model on each frame, and the arithmetic limit. All weights are random.

img2vid              divided space-time, a class token in each frame (the default)
img2vid shared       one class token a clip: the same function as transformers' model, weights given
img2vid fused        after ``model.fuse()``; inference only
transformers         TimesformerModel, as the library makes it
timesformer-pytorch  0.4 from PyPI, where installed; its MLP is gated (half as many products more), it has no gate
                     behind attention along time, and its class token attends to all frames
image model          timm's ViT on each frame by itself: no time
limit, limit folded  the matrix products of img2vid, and of img2vid fused, alone (benchmarks/limit.py)
limit image          those of the image model
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import img2vid
import img2vid.tuning
from benchmarks.limit import VIT, Limit, Sizes

BACKBONES = {"ViT-S/16": "vit_small_patch16_224", "ViT-B/16": "vit_base_patch16_224"}
OURS = {
    "img2vid": {},
    "img2vid shared": {"prefix_mode": "shared"},
    "img2vid fused": {},
    "img2vid last 4": {"temporal_layers": "last:4"},
}

NAMES = (*OURS, "transformers", "timesformer-pytorch", "image model", "limit", "limit folded", "limit image")


class Missing(Exception):
    """A subject that cannot take part here; says why."""


def build(name: str, size: str, num_frames: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model that takes clips (B, T, C, H, W), in eval mode.

    Raises:
        Missing: its library is not installed.
        ValueError: there is no such subject.
    """
    torch.manual_seed(0)
    sizes = VIT[size]
    if name in OURS:
        backbone = image_model(size)
        model = opened(img2vid.convert(backbone, num_frames=num_frames, **OURS[name]))
        model = model.eval().fuse() if name == "img2vid fused" else model
    elif name == "transformers":
        model = transformers_model(sizes, num_frames)
    elif name == "timesformer-pytorch":
        model = pypi_model(sizes, num_frames)
    elif name == "image model":
        model = OnFrames(image_model(size))
    else:
        raise ValueError(f"{name!r} is no subject; there are {', '.join(NAMES)} and what TRAINING makes of them")
    return model.eval().to(device, dtype)


def image_model(size: str) -> nn.Module:
    import timm

    return timm.create_model(BACKBONES[size], num_classes=0)


class OnFrames(nn.Module):
    """An image model on each frame, and the mean."""

    def __init__(self, image_model: nn.Module) -> None:
        super().__init__()
        self.image_model = image_model

    def forward(self, clips: Tensor) -> Tensor:
        return self.image_model(clips.flatten(0, 1)).unflatten(0, clips.shape[:2]).mean(dim=1)


def opened(model: nn.Module) -> nn.Module:
    """Gates as training leaves them: nothing may be saved because it is zero."""
    for parameter in model.zero_parameters().values():
        nn.init.normal_(parameter, std=0.02)
    return model


def transformers_model(sizes: Sizes, num_frames: int) -> nn.Module:
    try:
        from transformers import TimesformerConfig, TimesformerModel
    except ImportError as error:
        raise Missing("transformers is not installed: pip install 'img2vid[hf]'") from error
    config = TimesformerConfig(
        image_size=sizes.image,
        patch_size=sizes.patch,
        num_frames=num_frames,
        hidden_size=sizes.dim,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.dim,
    )
    return TimesformerModel(config)


def pypi_model(sizes: Sizes, num_frames: int) -> nn.Module:
    try:
        from timesformer_pytorch import TimeSformer
    except ImportError as error:
        raise Missing("timesformer-pytorch is not installed: pip install timesformer-pytorch") from error
    return TimeSformer(
        dim=sizes.dim,
        depth=sizes.depth,
        heads=sizes.heads,
        dim_head=sizes.dim // sizes.heads,
        image_size=sizes.image,
        patch_size=sizes.patch,
        num_frames=num_frames,
        num_classes=1,
    )


def answer(out: object) -> Tensor:
    return out.last_hidden_state if hasattr(out, "last_hidden_state") else out


def inference(
    name: str, size: str, num_frames: int, device: str = "cpu", dtype: torch.dtype = torch.float32, batch: int = 1
) -> Callable[[], object]:
    """One forward of one clip (or ``batch``) without gradients."""
    if name.startswith("limit"):
        frames = None if name == "limit image" else num_frames
        return Limit(VIT[size], batch * num_frames, frames, name == "limit folded", dtype=dtype, device=device)
    model = build(name, size, num_frames, device, dtype)
    clips = torch.randn(batch, num_frames, 3, 224, 224, device=device, dtype=dtype)
    return torch.no_grad()(lambda: model(clips))


TRAINING = {
    "img2vid checkpointed": "img2vid",
    "img2vid temporal only": "img2vid",
    "img2vid last 4 only": "img2vid last 4",
    "img2vid temporal only, trunk twice": "img2vid",
    "transformers checkpointed": "transformers",
}


def training_step(
    name: str, size: str, num_frames: int, device: str = "cpu", bf16: bool = False, batch: int = 1
) -> Callable[[], object]:
    """Forward and backward of one clip, without the optimiser.

    ``img2vid temporal only`` is the freeze policy of that name: what was pretrained is frozen. In ``last 4 only``,
    besides, the last four blocks alone attend along time, so no gradient passes the eight below. The ``checkpointed``
    ones run each block twice; ``trunk twice`` the image blocks without their branches.
    """
    if name.startswith("limit"):
        frames = None if name == "limit image" else num_frames
        dtype = torch.bfloat16 if bf16 else torch.float32
        folded = name == "limit folded"
        return Limit(VIT[size], batch * num_frames, frames, folded, train=True, dtype=dtype, device=device)
    model = build(TRAINING.get(name, name), size, num_frames, device).train()
    if name == "img2vid checkpointed":
        model.set_grad_checkpointing()
    if name == "transformers checkpointed":
        model.gradient_checkpointing_enable()
    if name == "img2vid temporal only, trunk twice":
        model.set_grad_checkpointing(trunk_only=True)
    if name.startswith("img2vid temporal only") or name == "img2vid last 4 only":
        img2vid.tuning.freeze(model, "temporal_only")
    clips = torch.randn(batch, num_frames, 3, 224, 224, device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = answer(model(clips)).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step
