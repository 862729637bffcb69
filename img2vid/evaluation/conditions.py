"""What is done to a clip before a model sees it, and whether its gates are open: the conditions that are compared.

model        the video model on the clip as it is
frame_mean   the image model of the same weights: gates closed, every frame by itself, mean over frames
shuffled     frames in a random order (never the true one), reversed: backwards
static       the middle frame, T times
half         every second frame
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from img2vid.data.order import draw_seed
from img2vid.evaluation.errors import EvaluationError
from img2vid.model import VideoModel
from img2vid.temporal.pooling import first
from img2vid.two_towers import VideoTextModel

LEVELS = ("frames", "features", "output")


@dataclass(frozen=True)
class Condition:
    order: str = "as_is"  # as_is | shuffled | reversed | static | half
    gates: str = "open"  # open | closed


CONDITIONS = {
    "model": Condition(),
    "frame_mean": Condition(gates="closed"),
    "shuffled": Condition("shuffled"),
    "reversed": Condition("reversed"),
    "static": Condition("static"),
    "half": Condition("half"),
}


def order_frames(clips: Tensor, order: str, rows: Sequence[int], tubelet_size: int = 1) -> Tensor:
    """Clips (B, T, C, H, W) of the videos ``rows``, in another order of frames.

    The shuffle of a video depends on its row alone, not on the batch it is in.
    """
    num_frames = clips.shape[1]
    if order == "as_is":
        return clips
    if order == "reversed":
        return clips.flip(1)
    if order == "static":
        return clips[:, num_frames // 2].unsqueeze(1).expand_as(clips)
    if order == "half":  # every second tubelet, where frames are grouped
        return clips.unflatten(1, (-1, tubelet_size))[:, ::2].flatten(1, 2)
    if order == "shuffled":
        return torch.stack([clip[shuffle(num_frames, row)] for clip, row in zip(clips, rows, strict=True)])
    raise EvaluationError(f"order {order!r}: expected as_is, shuffled, reversed, static or half.")


def shuffle(num_frames: int, row: int) -> list[int]:
    """A permutation of the frames other than the identity (one frame has no other)."""
    rng, indices = Random(draw_seed(0, 0, row)), list(range(num_frames))
    while num_frames > 1 and indices == sorted(indices):
        rng.shuffle(indices)
    return indices


def video_part(model: VideoModel | VideoTextModel) -> VideoModel:
    return model.visual if isinstance(model, VideoTextModel) else model


def has_gates(model: VideoModel | VideoTextModel) -> bool:
    """Whether closing gates gives the image model: not with ``gate: none``, nor with grafts that have no gate."""
    config = model.config
    is_open = config.attention == "divided_space_time" and config.gate == "none"
    return not is_open and all(graft.guarantee().strength for graft in video_part(model).grafts)


@torch.no_grad()
def represent(model: VideoModel | VideoTextModel, clips: Tensor, condition: Condition, level: str) -> Tensor:
    """Normalised clips (B, T, C, H, W) -> (B, S, D) per frame or tubelet, or (B, D) features or model output.

    Closed gates mean the image model: besides closing them, each frame (tubelet) is a clip of its own, because some
    kinds of attention mix frames without a gate. Where guarantees hold for any clip, both are the same bits.
    """
    video = video_part(model)
    if condition.gates == "open":
        x = first(video.frame_features(clips))  # (B, S, D)
    else:
        size = video.config.tubelet_size
        steps = clips.unflatten(1, (-1, size)).flatten(0, 1)  # (B*S, K, C, H, W)
        with video.gates_closed():
            x = first(video.frame_features(steps))  # (B*S, 1, D)
        x = x.squeeze(1).unflatten(0, (len(clips), -1))  # (B, S, D)
    if isinstance(model, VideoTextModel):
        x = model.to_text_space(x)
    if level == "frames":
        return x
    x = video.pool(x)
    return video.classifier(x) if level == "output" and video.config.num_classes is not None else x
