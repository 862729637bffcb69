"""Other image weights into a video model, and what was made from the old ones made anew."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from img2vid.backbones.reading import read_block
from img2vid.errors import WeightsError
from img2vid.origins import GRAFTED_COPIES, scion_of
from img2vid.temporal.attention import TemporalAttention
from img2vid.temporal.block import SpaceTimeBlock
from img2vid.weights.accounting import LoadReport, listed, load_weights

if TYPE_CHECKING:
    from img2vid.model import VideoModel


def load_image_weights(
    model: nn.Module, video: VideoModel, state: Mapping[str, Tensor], refresh_copies: bool, time_keys: Sequence[str]
) -> LoadReport:
    """``VideoModel.load_image_weights``; ``model`` is ``video``, or the image-text model whose tower it is.

    Copies behind closed gates are refreshed without loss. Where training has opened the gates, the copies have become
    weights of their own; discarding those is not done unasked. Averaged tubelets are the image's patch projection
    divided among frames, so they are always made anew.
    """
    about_time = sorted(key for key in state if any(re.fullmatch(pattern, key) for pattern in time_keys))
    if about_time:
        raise WeightsError(
            f"This is the checkpoint of a video model, nothing was loaded: {len(about_time)} keys are about time,\n"
            f"{listed(about_time, most=5)}\nload_image_weights takes image checkpoints. A video model of the same "
            "configuration loads by model.load_state_dict(state), a model folder by img2vid.load(folder)."
        )
    state, copied = dict(state), video.config.attention == "divided_space_time" and video.config.temporal_init == "copy"
    if copied and refresh_copies and copies_in_use(video):
        raise WeightsError(
            "The gates of this model have moved, nothing was loaded: its temporal attention, once a copy of attention "
            "over space, has been trained. Give refresh_copies=False to keep it beside the new image weights, or "
            "convert the new image model to start afresh."
        )
    if video.config.tubelet_size > 1 and video.config.tubelet_init == "average":
        divide_among_frames(model, video, state)
    blocks = grafted_copies(video)
    if refresh_copies and any(bool(p.any()) for name, p in video.zero_parameters().items() if scion_of(name) in blocks):
        raise WeightsError(
            "The gates of copied blocks have moved, nothing was loaded: a graft's copies have been trained. Give "
            "refresh_copies=False to keep them beside the new image weights."
        )
    report = load_weights(model, state, allow_new=time_keys, source="the image checkpoint")
    if copied and refresh_copies:
        copy_again(video)
        report.notes.append("Temporal attention was copied again from the new weights.")
    if blocks and refresh_copies:
        own = video.state_dict()
        with torch.no_grad():
            for key, source in (pair for pairs in blocks.values() for pair in pairs.items()):
                own[key].copy_(own[source])
        report.notes.append("A graft's copies of blocks were copied again from the new weights.")
    video.image_weights = "a checkpoint given to load_image_weights"
    return report


def grafted_copies(video: VideoModel) -> dict[str, dict[str, str]]:
    """What grafts have copied of whole blocks, place by place: its keys, and those it was copied from."""
    found: dict[str, dict[str, str]] = {}
    for key in video.state_dict():
        place = scion_of(key)
        if place is not None and re.fullmatch(GRAFTED_COPIES, key):
            home, rest = place.rpartition("graft_")[0], key.removeprefix(f"{place}.copy.")
            found.setdefault(place, {})[key] = home + rest
    return found


def temporal_blocks(video: VideoModel) -> list[SpaceTimeBlock]:
    return [block for _, block in video.tower.blocks if isinstance(block, SpaceTimeBlock)]


def copies_in_use(video: VideoModel) -> bool:
    """Whether temporal attention has become more than a copy: behind an open gate, or trained where there is none."""
    for block in temporal_blocks(video):
        gate = list(block.temporal_fc.parameters())
        if any(bool(parameter.any()) for parameter in gate):
            return True
        if not gate:
            copy = TemporalAttention.from_spatial(read_block(block), "copy").state_dict()
            now = block.temporal_attn.state_dict()
            if any(not torch.equal(now[key], tensor) for key, tensor in copy.items()):
                return True
    return False


def copy_again(video: VideoModel) -> None:
    """In place, so that optimisers and weight averages still hold the same tensors."""
    for block in temporal_blocks(video):
        spatial = read_block(block)
        block.temporal_norm1.load_state_dict(spatial.norm.state_dict())
        copy = TemporalAttention.from_spatial(spatial, "copy").state_dict()
        block.temporal_attn.load_state_dict({**block.temporal_attn.state_dict(), **copy})  # grafts in it stay


def divide_among_frames(model: nn.Module, video: VideoModel, state: dict[str, Tensor]) -> None:
    """Patch projection (D, C, h, w) of an image -> that of K averaged frames, as ``inflate_to_tubelets`` makes it."""
    path = next(name for name, module in model.named_modules() if module is video.tower.patch_conv)
    weight = state.get(f"{path}.weight")
    if weight is not None:  # else the key is missing, and will be called so
        share = weight / video.config.tubelet_size
        state[f"{path}.weight"] = share
        state[f"{path}.tubelet_weight"] = share.expand(video.config.tubelet_size - 1, *share.shape)
