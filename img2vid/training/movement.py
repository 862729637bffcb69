"""The certificate of a training, ``moved.json``: how far a model went from where it began, and where.

In its weights, layer by layer; in what it computes, on some clips of its own training; and whether the order of frames
has come to matter, which it cannot have at the start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from img2vid.model import VideoModel
from img2vid.proof.evidence import fingerprint, in_eval_mode
from img2vid.temporal.pooling import first
from img2vid.tuning.groups import image_tower_of, layer_groups
from img2vid.two_towers import VideoTextModel


class Beginning(dict):
    """The state dict that training began with. Copies of what holds it share it, as it never changes."""

    def __deepcopy__(self, memo: dict) -> Beginning:
        return self


@dataclass
class Movement:
    """What was measured.

    Args:
        steps: optimiser steps.
        image_weights: SHA-256 of the weights that come from the image model, ``before`` and ``now``, as a certificate
            of the conversion has it.
        features: of ``clips`` and of ``stills`` (first frames, repeated): mean cosine between a clip's feature in the
            beginning and now. ``order_before`` and ``order_now``: one minus the mean cosine between a clip's feature
            and that of the same frames backwards. Empty where no clip was seen.
        layers: of each layer group: ``distance`` from the beginning; the same ``relative`` to the length of the weights
            then, None where they began at zero; how many of its ``tensors`` have ``changed``.
    """

    steps: int
    image_weights: dict[str, str]
    features: dict[str, float]
    layers: dict[str, dict[str, Any]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def __str__(self) -> str:
        changed = {name for name, layer in self.layers.items() if layer["changed"]}
        text = f"{self.steps:,} steps moved {len(changed)} of {len(self.layers)} groups of layers"
        if self.features:
            f = self.features
            text += (
                f". On clips of the training, features have a cosine of {f['clips']:.3f} with those of the beginning "
                f"({f['stills']:.3f} for still clips), and of {1 - f['order_now']:.3f} with those of the same frames "
                f"backwards ({1 - f['order_before']:.3f} in the beginning)"
            )
        return text + "."


def measure_movement(
    model: VideoModel | VideoTextModel,
    beginning: Mapping[str, Tensor],
    steps: int,
    clips: Tensor | None = None,
    beside: Mapping[str, Tensor] | None = None,
) -> Movement:
    """How far a model is from a state dict of its own.

    Args:
        model: on the CPU, as trained; unchanged afterwards.
        clips: normalised, (B, T, C, H, W); None to compare weights alone.
        beside: a vector for each clip (B, E) by its name, where the model takes one.
    """
    now = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    features: dict[str, float] = {}
    if clips is not None:
        clips = clips.to(next(model.parameters()).dtype)
        with torch.no_grad(), in_eval_mode(model), model.beside(**(beside or {})):
            after = [feature(model, x) for x in (clips, stills(clips), clips.flip(1))]
            try:
                model.load_state_dict(beginning)
                before = [feature(model, x) for x in (clips, stills(clips), clips.flip(1))]
            finally:
                model.load_state_dict(now)
        features = {
            "clips": cosine(before[0], after[0]),
            "stills": cosine(before[1], after[1]),
            "order_before": 1 - cosine(before[0], before[2]),
            "order_now": 1 - cosine(after[0], after[2]),
        }
    hashes = {name: image_fingerprint(model, state) for name, state in (("before", beginning), ("now", now))}
    return Movement(steps, hashes, features, layer_movement(model, beginning, now))


def feature(model: VideoModel | VideoTextModel, clips: Tensor) -> Tensor:
    """Clip features (B, D), before any classifier."""
    return first(model.encode_video(clips) if isinstance(model, VideoTextModel) else model.clip_features(clips))


def stills(clips: Tensor) -> Tensor:
    return clips[:, :1].expand_as(clips)


def cosine(x: Tensor, y: Tensor) -> float:
    return float(F.cosine_similarity(x.double(), y.double(), dim=-1).mean())


def image_fingerprint(model: VideoModel | VideoTextModel, state: Mapping[str, Tensor]) -> str:
    """SHA-256 of what comes from the image model, bar a patch projection that was divided among frames."""
    config, left_out = model.config, set()
    if config.tubelet_size > 1 and config.tubelet_init == "average":
        patches = image_tower_of(model).tower.patch_conv.weight
        left_out = {name for name, parameter in model.named_parameters() if parameter is patches}
    return fingerprint(
        {key: tensor for key, tensor in state.items() if model.origin(key) == "pretrained" and key not in left_out}
    )


def layer_movement(
    model: VideoModel | VideoTextModel, before: Mapping[str, Tensor], now: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    layers = {}
    for group in layer_groups(model):
        old = [before[name].double() for name in group.parameters]
        change = [now[name].double() - start for name, start in zip(group.parameters, old, strict=True)]
        length, distance = norm(old), norm(change)
        layers[group.label] = {
            "distance": distance,
            "relative": distance / length if length else None,
            "changed": sum(bool((x != 0).any()) for x in change),
            "tensors": len(change),
        }
    return layers


def norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([x.norm() for x in tensors]).norm())
