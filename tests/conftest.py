"""Shared small models. One thread, so that equal inputs in one batch give equal bits."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test uses a network

import pytest
import timm
import torch
from torch import nn

torch.set_num_threads(1)
# nn.MultiheadAttention has another code path without gradients, equal only up to rounding
torch.backends.mha.set_fastpath_enabled(False)


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0, std: float = 0.05) -> nn.Module:
    """Move every weight off its initial value, so that no equality holds by accident (zero biases, tiny scales)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def small_vit(**kwargs) -> nn.Module:
    """A ViT of 3 blocks, width 48, on 32 x 32 images (4 x 4 patches), with a class token."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 0}
    return randomize(timm.models.vision_transformer.VisionTransformer(**{**shape, **kwargs})).eval()


def small_eva(**kwargs) -> nn.Module:
    """An EVA-02 of 3 blocks with rotary positions, whose attention reads the weight of ``qkv`` and never calls it."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 0}
    design = {"use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True, "mlp_ratio": 8 / 3}
    return randomize(timm.models.eva.Eva(**{**shape, **design, **kwargs})).eval()


def small_clip(**kwargs) -> nn.Module:
    """An open_clip CLIP of 3 + 2 blocks on 32 x 32 images."""
    import open_clip

    torch.manual_seed(0)
    vision = {"layers": 3, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 200, "width": 32, "heads": 2, "layers": 2}
    kwargs = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, **kwargs}
    return randomize(open_clip.model.CLIP(**kwargs)).eval()


@pytest.fixture
def vit():
    return small_vit()


@pytest.fixture
def clip_model():
    return small_clip()


@pytest.fixture
def clips():
    """Two clips of three frames."""
    return torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def motion_set(tmp_path_factory):
    """Moving digits: 24 videos to train on, 16 to validate, 8 to test, of 4 frames of 32 x 32 pixels."""
    from img2vid.data.synthetic import MotionSettings, make_motion_set

    folder = tmp_path_factory.mktemp("motion") / "set"
    return make_motion_set(folder, MotionSettings(train=24, val=16, test=8, size=32, num_frames=4))


def hear_interrupts() -> None:
    """For ``preexec_fn``: children of a job in the background would ignore SIGINT, as their parents do."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
