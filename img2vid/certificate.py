"""The certificate: proof, by running it, that a video model still is its image model, and that it can learn.

Four kinds of clip are shown to both models on the same folded batch (one frame; one frame repeated; different frames;
those frames shuffled), and what comes out of every block and of the whole is compared. Then the gates are pushed off
zero (the output must move), closed again (it must come back bit for bit), and two optimiser steps show where gradient
arrives.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from img2vid.errors import Img2VidError
from img2vid.evidence import (
    Comparison,
    Liveness,
    compare,
    compare_text,
    equal_weights,
    fingerprint,
    in_eval_mode,
    kinds_for,
    largest,
    measure_liveness,
    three_acts,
)
from img2vid.guarantees import Guarantee
from img2vid.model import VideoModel, VideoTextModel


@dataclass
class Certificate:
    """Everything that was measured; ``str()`` is the table, ``to_dict()`` the JSON."""

    backbone: str | None
    attention: str
    prefix_mode: str
    guarantee: Guarantee
    num_zero_parameters: int
    gates_moved: float  # largest absolute value among the parameters that start at zero
    comparisons: list[Comparison]
    image_weights_equal: tuple[int, int]  # tensors equal to the image model's, of how many
    perturbed_difference: float | None  # None where there is no gate to move
    closed_difference: float | None
    liveness: list[Liveness]
    expected_alive: bool
    text_difference: float | None = None
    weights_before: str | None = None  # fingerprints of the image model's weights before the conversion, and now
    weights_after: str | None = None

    @property
    def held(self) -> bool:
        """Whether every claimed guarantee held (with gates closed, for a model whose gates have moved)."""
        equal, total = self.image_weights_equal
        same_weights = equal == total and self.weights_before in (None, self.weights_after)
        return same_weights and all(c.held is not False for c in self.comparisons) and not self.text_difference

    @property
    def reversible(self) -> bool:
        return self.closed_difference in (None, 0.0) and self.perturbed_difference != 0.0

    @property
    def alive(self) -> bool:
        return all(layer.alive for layer in self.liveness)

    @property
    def ok(self) -> bool:
        return self.held and self.reversible and (self.alive or not self.expected_alive)

    def to_dict(self) -> dict[str, Any]:
        verdicts = {"ok": self.ok, "held": self.held, "reversible": self.reversible, "alive": self.alive}
        measured = asdict(self)
        for row, comparison in zip(measured["comparisons"], self.comparisons, strict=True):
            row["held"] = comparison.held
        return {**verdicts, **measured}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __str__(self) -> str:
        from img2vid.reporting import render_certificate

        return render_certificate(self)


def certify(
    model: VideoModel | VideoTextModel,
    reference: nn.Module,
    *,
    num_frames: Sequence[int] | None = None,
    weights_before: str | None = None,
    seed: int = 0,
) -> Certificate:
    """Compare a video model with the image model it came from. Weights are the same afterwards.

    Args:
        model: a ``VideoModel`` or ``VideoTextModel``. Where training has moved its gates, the claim is about the model
            with gates closed, and ``perturbed_difference`` says how far it has come.
        reference: the image model, as its library made it: a timm model, or an open_clip model or image tower.
        num_frames: numbers of frames T to try; by default 1, 2, 3 and the model's own.
        weights_before: ``fingerprint`` of the image model before it was converted, where ``reference`` shares weights
            with the video model and so cannot tell whether they were changed.
        seed: of the random clips and perturbations.

    Raises:
        Img2VidError: the reference is not an image model of the same architecture.
    """
    video = model.visual if isinstance(model, VideoTextModel) else model
    image = getattr(reference, "visual", reference)
    check_reference(video, image)
    generator = torch.Generator().manual_seed(seed)
    zero_parameters = video.zero_parameters()
    if num_frames is not None and (not num_frames or min(num_frames) < 1):
        raise Img2VidError(f"num_frames={list(num_frames)}: expected numbers of frames of at least 1, such as 1 2 8.")
    guarantee = Guarantee.of(video.config, video.tower.num_prefix_tokens)
    frames = sorted(set(num_frames or (1, 2, 3, video.config.num_steps)))
    with in_eval_mode(model, reference):
        with torch.no_grad(), video.gates_closed():
            comparisons = [
                compare(video, image, kind, t, guarantee.strength.get(kind), generator)
                for t in frames
                for kind in kinds_for(t, frames)
            ]
        gates_moved = max((largest(p.detach()) for p in zero_parameters.values()), default=0.0)
        perturbed, closed = three_acts(video, generator, perturb=gates_moved == 0.0)
        liveness = measure_liveness(video, generator)
        text_difference = compare_text(model, reference, generator)
    return Certificate(
        backbone=video.config.backbone,
        attention=video.config.attention,
        prefix_mode=video.config.prefix_mode,
        guarantee=guarantee,
        num_zero_parameters=sum(p.numel() for p in zero_parameters.values()),
        gates_moved=gates_moved,
        comparisons=comparisons,
        image_weights_equal=equal_weights(video, image),
        weights_before=weights_before,
        weights_after=fingerprint(model, reference) if weights_before else None,
        perturbed_difference=perturbed,
        closed_difference=closed,
        liveness=liveness,
        expected_alive=video.config.temporal_init != "zeros",
        text_difference=text_difference,
    )


def check_reference(video: VideoModel, image: nn.Module) -> None:
    if isinstance(image, VideoModel):
        raise Img2VidError("The reference of a certificate is the image model, but a VideoModel was given.")
    if not isinstance(video.base, type(image)) and not isinstance(image, type(video.base)):
        raise Img2VidError(
            f"The reference is a {type(image).__name__}, but the model was made from a {type(video.base).__name__}."
        )
