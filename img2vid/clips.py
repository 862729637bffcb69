"""What a clip must look like to enter a model, said in words of clips."""

from __future__ import annotations

import torch
from torch import Tensor

from img2vid.backbones.tower import ImageTower
from img2vid.config import VideoConfig
from img2vid.errors import Img2VidError


class ClipError(Img2VidError):
    """A clip of a shape or type the model cannot take."""


def check_clips(clips: Tensor, tower: ImageTower, config: VideoConfig, weight: Tensor) -> None:
    """Refuse a clip before a library does in its own terms.

    Args:
        weight: the first weight the clip meets, whose dtype it must have.
    """
    if not isinstance(clips, Tensor):
        raise ClipError(f"Clips must be a torch.Tensor (B, T, C, H, W), not a {type(clips).__name__}.")
    if clips.ndim != 5:
        raise ClipError(
            f"Clips of shape {tuple(clips.shape)} were given, expected (B, T, C, H, W)."
            + (" Add the batch: clip[None]." if clips.ndim == 4 else "")
        )
    if not clips.is_floating_point():
        raise ClipError(f"Clips of dtype {clips.dtype} were given; normalise pixels first: model.normalize(clips).")
    check_dtype(clips, weight)
    num_clips, num_frames, channels, *size = clips.shape
    expected = tower.in_channels
    if channels != expected and num_frames == expected:
        raise ClipError(f"Clips of shape {tuple(clips.shape)} look like (B, C, T, H, W); expected (B, T, C, H, W).")
    if channels != expected:
        raise ClipError(f"Frames with {channels} channels were given, expected {expected}: (B, T, {expected}, H, W).")
    if num_clips == 0 or num_frames == 0:
        raise ClipError(f"Clips of shape {tuple(clips.shape)} hold no frames; a clip has at least one (T >= 1).")
    if 0 in size:
        raise ClipError(f"Clips of shape {tuple(clips.shape)} hold no pixels; expected (B, T, {expected}, H, W).")
    if num_frames % config.tubelet_size:
        raise ClipError(f"{num_frames} frames cannot be cut into tubelets of {config.tubelet_size}; give a multiple.")
    native, patch = tower.image_size, tower.patch_size
    if tuple(size) == native:
        return
    if config.time_embed == "per_patch":
        raise ClipError(
            f"Frames of {size[0]} x {size[1]} pixels were given, but time_embed='per_patch' has a row for each patch of"
            f" {native[0]} x {native[1]}. Resize the clip, or make the model with image_size=({size[0]}, {size[1]})."
        )
    if not tower.any_size:
        command = f": python -m img2vid.convert --backbone {config.backbone} --image-size {size[0]}x{size[1]}"
        raise ClipError(
            f"Frames of {size[0]} x {size[1]} pixels were given, but this backbone's positions ({tower.position}) are "
            f"fixed to {native[0]} x {native[1]}. Resize the clip, or convert with image_size=({size[0]}, {size[1]})"
            + ("." if config.backbone is None else command)
        )
    if not tower.pads and (size[0] % patch[0] or size[1] % patch[1]):
        raise ClipError(
            f"Frames of {size[0]} x {size[1]} pixels cannot be cut into patches of {patch[0]} x {patch[1]}; "
            f"use multiples, such as {native[0]} x {native[1]}, which torchvision's center_crop(clip, {list(native)}) "
            "cuts out."
        )


def check_images(images: Tensor) -> None:
    """Refuse what is no batch of images (B, C, H, W); their sizes are checked as those of clips."""
    shape = tuple(images.shape) if isinstance(images, Tensor) else f"a {type(images).__name__}"
    if not isinstance(images, Tensor) or images.ndim != 4:
        is_clips = isinstance(images, Tensor) and images.ndim == 5
        raise ClipError(
            f"Images (B, C, H, W) are expected, {shape} was given."
            + (" Clips (B, T, C, H, W) go to encode_video." if is_clips else "")
        )


def check_dtype(clips: Tensor, weight: Tensor) -> None:
    device = clips.device.type
    is_sharded = hasattr(weight, "device_mesh")  # FSDP casts by its own policy
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if clips.dtype == weight.dtype or is_sharded or is_cast:
        return
    raise ClipError(
        f"Clips of dtype {clips.dtype} were given to a model of {weight.dtype}. Cast one of them, "
        f"clips.to({weight.dtype}) or model.to({clips.dtype}), or run the model under torch.autocast."
    )


def check_pixels(pixels: Tensor, channels: int = 3) -> None:
    """Refuse what cannot be pixels (..., C, H, W) from 0 to 255."""
    if pixels.ndim < 3 or pixels.shape[-3] != channels:
        is_last = pixels.ndim >= 3 and pixels.shape[-1] == channels
        raise ClipError(
            f"Pixels of shape {tuple(pixels.shape)} were given, expected (..., {channels}, H, W)."
            + (" Colours come last here; bring them forward: clips.movedim(-1, -3)." if is_last else "")
        )
    if torch.compiler.is_compiling() or not pixels.is_floating_point() or pixels.numel() == 0:
        return
    largest = float(pixels.max())
    if 0.0 < largest <= 1.0:  # black is black on either scale
        raise ClipError(
            f"Pixels of dtype {pixels.dtype} up to {largest:.3g} were given, expected 0..255. For 0..1 give "
            "model.normalize(clips * 255)."
        )
