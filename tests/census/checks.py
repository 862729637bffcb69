"""What must hold for a converted architecture."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence

import open_clip
import torch
from timm.models import vision_transformer
from torch import Tensor, nn

from img2vid.backbones import describe
from img2vid.backbones.from_timm import image_class
from img2vid.backbones.reading import block_kind, child, read_block
from img2vid.backbones.tower import ImageTower, structural_copy
from img2vid.certificate import Certificate, certify
from img2vid.config import ConfigError, VideoConfig
from img2vid.evidence import largest
from img2vid.model import VideoModel
from img2vid.origins import COPIED_KEYS, NEW_KEYS
from tests.census.models import WIDE_GRID

COPY_TOLERANCE = 1e-5  # of the largest value; the copy computes the same in another order
MODES = {
    "shared": {"prefix_mode": "shared"},
    "global": {"prefix_mode": "global"},
    "joint": {"attention": "joint_space_time"},
    "joint, shared": {"attention": "joint_space_time", "prefix_mode": "shared"},
}


def check_full_size(tower: ImageTower) -> dict[str, bool]:
    """On the meta device: the keys of the image model survive, and so does the shape of what it gives."""
    image_keys = set(tower.module.state_dict())
    frames = torch.zeros(2, 3, *tower.image_size, device="meta")
    expected = [x.shape[1:] for x in as_tuple(tower.module.eval()(frames))]
    video = VideoModel(tower.module, VideoConfig(num_frames=2)).eval()
    features = as_tuple(video(frames.unsqueeze(0)))
    new_keys = set(video.state_dict()) - image_keys
    return {
        "image keys kept": image_keys <= set(video.state_dict()),
        "new keys are about time": all(re.fullmatch(f"{NEW_KEYS}|{COPIED_KEYS}", key) for key in new_keys),
        "shapes": [x.shape[1:] for x in features] == expected,
    }


def check_small(image: nn.Module, num_frames: Sequence[int]) -> tuple[dict[str, bool], float | None]:
    """On the CPU: the certificate, every tensor the tower gives, and the copied attention (with its error)."""
    reference = structural_copy(image)
    video = video_model(image)
    certificate = certify(video, reference, num_frames=num_frames)
    error = copy_error(video, reference)
    checks = {
        **verdicts(certificate),
        "all outputs equal": outputs_equal(video, reference),
        "copied attention": error is None or error < COPY_TOLERANCE,
    }
    return checks, error


def check_modes(image: nn.Module) -> dict[str, bool | str]:
    """Other ways of inserting time: True where the certificate holds, False where it does not, or why it is refused."""
    found: dict[str, bool | str] = {}
    for mode, settings in MODES.items():
        try:
            video = video_model(structural_copy(image), **settings)
        except ConfigError as refusal:
            found[mode] = str(refusal)
            continue
        found[mode] = certify(video, image, num_frames=(1, 2)).ok
    return found


def video_model(image: nn.Module, **settings) -> VideoModel:
    # where a tower takes one size only by itself, the comparison stays with that
    takes_any_size = describe(image).any_size and not isinstance(image, open_clip.transformer.VisionTransformer)
    video = VideoModel(image, VideoConfig(num_frames=2, **settings)).eval()
    if takes_any_size:
        video.tower.image_size = tuple(n * patch for n, patch in zip(WIDE_GRID, video.tower.patch_size, strict=True))
    return video


def verdicts(certificate: Certificate) -> dict[str, bool]:
    equal, of = certificate.image_weights_equal
    return {
        "bitwise": certificate.held and all(c.claimed == "bitwise" for c in certificate.comparisons),
        "opened gates move it": bool(certificate.perturbed_difference),
        "closed gates restore it": certificate.closed_difference == 0.0,
        "every layer learns": certificate.alive and bool(certificate.liveness),
        "image weights kept": equal == of,
    }


@torch.no_grad()
def outputs_equal(video: VideoModel, image: nn.Module) -> bool:
    """Every tensor the tower returns, on frames that it can tell apart. (nan equals nothing, so it is not equal.)"""
    clips = torch.randn(2, 2, 3, *video.tower.image_size, generator=torch.Generator().manual_seed(2))
    ours, theirs = as_tuple(video.frame_features(clips)), as_tuple(image(clips.flatten(0, 1)))
    tells_apart = not torch.equal(theirs[0][0], theirs[0][1])
    return tells_apart and all(torch.equal(a.flatten(0, 1), b) for a, b in zip(ours, theirs, strict=True))


def kinds_of_attention(tower: ImageTower) -> set[tuple]:
    """What the reader finds in the blocks, once for blocks that are alike."""
    spatials = [(image_class(block).__name__, read_block(block)) for _, block in tower.blocks]
    return {
        (block, s.num_heads, tuple(s.qkv_weight.shape), s.qkv_bias is None, s.q_norm is None, s.layer_scale is None)
        for block, s in spatials
    }


# ---- the copied attention


@torch.no_grad()
def copy_error(video: VideoModel, image: nn.Module, num_frames: int = 3) -> float | None:
    """Temporal attention against what the image block itself would add, had it been given time for space.

    Relative to the largest value; None where parts of the image attention are left behind.
    """
    worst = 0.0
    for (_, ours), (_, theirs) in zip(video.tower.blocks, describe(image).blocks, strict=True):
        spatial = read_block(theirs)
        if spatial.left_behind:
            return None
        x = torch.randn(2 * num_frames, 5, spatial.dim, generator=torch.Generator().manual_seed(3))  # (B*T, S, D)
        columns = x.unflatten(0, (2, num_frames)).transpose(1, 2).flatten(0, 1)  # (B*S, T, D)
        expected = own_residual(theirs)(columns).unflatten(0, (2, 5)).transpose(1, 2).flatten(0, 1)
        if spatial.post_norm:
            copied = ours.temporal_norm1(ours.temporal_attn(x, num_frames))
        else:
            copied = ours.temporal_attn(ours.temporal_norm1(x), num_frames)
        worst = max(worst, largest(copied - expected) / largest(expected))
    return worst


def own_residual(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """``layer_scale * attn(norm(x))`` by the image block's own modules, without rotary codes."""
    if isinstance(block, vision_transformer.ParallelScalingBlock):
        return without_mlp(block)
    kind = block_kind(block)
    attn, norm = child(block, kind.attn), child(block, kind.norm)
    scale = child(block, kind.layer_scale) if kind.layer_scale else None

    def attend(x: Tensor) -> Tensor:
        return attn(x, x, x, need_weights=False)[0] if isinstance(attn, nn.MultiheadAttention) else attn(x)

    def residual(x: Tensor) -> Tensor:
        y = norm(attend(x)) if kind.post_norm else attend(norm(x))
        return y if scale is None else scale * y

    return residual


def without_mlp(block: vision_transformer.ParallelScalingBlock) -> Callable[[Tensor], Tensor]:
    """Attention and MLP share their projections here: silence the MLP, and see what the whole block adds."""
    block, hidden = copy.deepcopy(block), block.in_split[0]
    silenced = [block.in_proj.weight[:hidden], block.mlp_bias]
    silenced += [None if block.in_proj.bias is None else block.in_proj.bias[:hidden]]
    silenced += [(block.out_proj or block.mlp_out_proj).bias]
    for tensor in silenced:
        if tensor is not None:
            tensor.zero_()
    return lambda x: block(x) - x


def as_tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)
