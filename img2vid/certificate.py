"""The certificate: proof, by running it, that a video model still is its image model, and that it can learn.

Four kinds of clip are shown to both models on the same folded batch (one frame; one frame repeated; different frames;
those frames shuffled), and what comes out of every block and of the whole is compared. Then the gates are pushed off
zero (the output must move, and each frame must notice when the others of its clip change, at each token's own position,
and nothing else), closed again (it must come back bit for bit), and two optimiser steps show where gradient arrives.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from img2vid.backbones import as_reference, describe
from img2vid.beside import examples_beside
from img2vid.errors import Img2VidError
from img2vid.model import VideoModel
from img2vid.proof.evidence import (
    Comparison,
    compare,
    compare_text,
    fingerprint,
    image_weights,
    in_eval_mode,
    kinds_for,
    largest,
)
from img2vid.proof.failures import failures
from img2vid.proof.guarantees import Guarantee
from img2vid.proof.liveness import Liveness, measure_liveness, three_acts
from img2vid.temporal.infront import own_class
from img2vid.two_towers import VideoTextModel
from img2vid.weights.accounting import listed

log = logging.getLogger("img2vid")  # commands show it


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
    exchange: float  # how far a frame's feature moves when only the other frames of its clip change, gates opened
    leak: float  # how far a clip's features move when only the other clips of its batch change, gates opened
    liveness: list[Liveness]
    expected_alive: bool
    weights_now: str  # fingerprint of the weights that come from the image model
    weights_before: str | None = None  # the same before the conversion, where it was noted
    weights_at_conversion: str | None = None  # the same when a saved model was made: training may have changed them
    text_difference: float | None = None
    later: float | None = None  # of a causal model: how far a frame's feature moves when only later ones change
    mixes_frames: bool = True  # whether frames are meant to know of each other
    rounding: float = 0.0  # what of exchange, leak and later may be rounding, where groups of tokens depend on all
    at_step_0: bool = False  # the model comes straight from its conversion, so nothing can have moved its gates

    @property
    def held(self) -> bool:
        """Whether every claimed guarantee held (with gates closed, for a model that training may have moved)."""
        equal, total = self.image_weights_equal
        same_weights = equal == total and self.weights_before in (None, self.weights_now)
        started_closed = self.gates_moved == 0.0 or not self.at_step_0
        same_function = all(c.held is not False for c in self.comparisons) and not self.text_difference
        return same_weights and started_closed and same_function

    @property
    def reversible(self) -> bool:
        moved = self.perturbed_difference
        return self.closed_difference in (None, 0.0) and (moved is None or moved > 0.0)  # False for nan

    @property
    def separate(self) -> bool:
        """Whether clips of a batch know nothing of each other, nor, along time, patches of other positions; in a causal
        model, frames nothing of later ones."""
        apart = self.leak <= self.rounding and (self.later is None or self.later <= self.rounding)  # False for nan
        return apart and all(layer.stray in (None, 0.0) for layer in self.liveness)

    @property
    def alive(self) -> bool:
        """Whether every inserted layer can learn, and frames can know of each other where the design says so."""
        connected = (self.exchange > self.rounding) == self.mixes_frames
        return connected and all(layer.alive for layer in self.liveness)

    @property
    def ok(self) -> bool:
        return self.held and self.separate and self.reversible and (self.alive or not self.expected_alive)

    @property
    def failures(self) -> list[str]:
        """Which checks failed, and why where that is known, a sentence each."""
        return failures(self)

    def to_dict(self) -> dict[str, Any]:
        verdicts = {name: getattr(self, name) for name in ("ok", "held", "reversible", "separate", "alive", "failures")}
        measured = asdict(self)
        for row, comparison in zip(measured["comparisons"], self.comparisons, strict=True):
            row["held"] = comparison.held
        return {**verdicts, **measured}

    def to_json(self) -> str:
        return json.dumps(without_nan(self.to_dict()), indent=2, allow_nan=False) + "\n"

    def __str__(self) -> str:
        from img2vid.reporting import render_certificate

        return render_certificate(self)


def certify(
    model: VideoModel | VideoTextModel,
    reference: nn.Module | None = None,
    *,
    num_frames: Sequence[int] | None = None,
    image_size: tuple[int, int] | None = None,
    weights_before: str | None = None,
    at_step_0: bool = False,
    seed: int = 0,
) -> Certificate:
    """Compare a video model with the image model it came from. Weights are the same afterwards.

    Args:
        model: a ``VideoModel`` or ``VideoTextModel``. Where training has moved its gates, the claim is about the model
            with gates closed, and ``perturbed_difference`` says how far it has come.
        reference: the image model, as its library made it: a timm model, an open_clip model or image tower, or a model
            of transformers. None has the library build it from its name, around the image weights that ``model`` holds
            now.
        num_frames: numbers of frames T to try (of tubelets, where those group frames); by default 1, 2, 3 and the
            model's own.
        image_size: pixels (height, width) of the clips, for backbones that take other sizes than their own: a large
            model is certified faster on small frames.
        weights_before: fingerprint of the image model before it was converted, where
            ``reference`` shares weights with the video model and so cannot tell whether they were changed.
        at_step_0: the model comes straight from its conversion: gates that are not at zero are no training then, but a
            broken promise.
        seed: of the random clips and perturbations.

    Raises:
        Img2VidError: the reference is not an image model of the same architecture.
    """
    if not isinstance(model, (VideoModel, VideoTextModel)):
        raise Img2VidError(f"Only a VideoModel or VideoTextModel can be certified, not a {type(model).__name__}.")
    if reference is None:
        from img2vid.checkpoints.native import load_reference

        reference = load_reference(model)
    reference = as_reference(reference)
    video = model.visual if isinstance(model, VideoTextModel) else model
    image = getattr(reference, "visual", reference)
    # the text tower counts as image weights too, where both have one
    has_text = isinstance(model, VideoTextModel) and image is not reference
    whole, image_whole = (model, reference) if has_text else (video, image)
    if num_frames is not None and (not num_frames or min(num_frames) < 1):
        raise Img2VidError(f"num_frames={list(num_frames)}: expected numbers of frames of at least 1, such as 1 2 8.")
    check_reference(video, image)
    generator = torch.Generator().manual_seed(seed)
    zero_parameters = video.zero_parameters()
    at_own_size = image_size is None or tuple(image_size) == tuple(video.tower.image_size)
    guarantee = Guarantee.of(video.config, video.tower.num_prefix_tokens, at_own_size)
    frames = sorted(set(num_frames or (1, 2, 3, video.config.num_steps)))
    vectors = torch.Generator().manual_seed(seed)  # its own, so that clips are the same with and without
    with in_eval_mode(model, reference), examples_beside(video, 2, vectors):
        with torch.no_grad(), video.gates_closed():
            comparisons = []
            for t in frames:
                for kind in kinds_for(t, frames, guarantee.strength):
                    log.info("Comparing on a %s clip, T = %d", kind, t)
                    comparisons.append(
                        compare(video, image, kind, t, guarantee.strength.get(kind), generator, image_size)
                    )
        gates = [largest(p.detach()) for p in zero_parameters.values()]
        gates_moved = largest(torch.tensor(gates or [0.0], dtype=torch.float64))  # max() of Python loses nan
        log.info("Opening the gates, closing them again")
        acts = three_acts(video, generator, as_trained=gates_moved != 0.0, size=image_size)
        log.info("Two optimiser steps")
        liveness = measure_liveness(video, generator, image_size)
        text_difference = compare_text(model, reference, generator)
    own, theirs = (image_weights(m, image_whole, video.config) for m in (whole, image_whole))
    return Certificate(
        backbone=video.config.backbone,
        attention=video.config.attention,
        mixes_frames=video.config.mixes_frames or any(graft.mixes_frames for graft in video.grafts),
        prefix_mode=video.config.prefix_mode,
        guarantee=guarantee,
        num_zero_parameters=sum(p.numel() for p in zero_parameters.values()),
        gates_moved=gates_moved,
        comparisons=comparisons,
        image_weights_equal=(sum(torch.equal(own[key], theirs[key]) for key in theirs), len(theirs)),
        perturbed_difference=acts.perturbed,
        closed_difference=acts.closed,
        exchange=acts.exchange,
        leak=acts.leak,
        later=acts.later,
        rounding=acts.rounding,
        liveness=liveness,
        expected_alive=video.config.temporal_init != "zeros",
        weights_now=fingerprint(own),
        weights_before=weights_before,
        text_difference=text_difference,
        at_step_0=at_step_0,
    )


def check_reference(video: VideoModel, image: nn.Module) -> None:
    """Say how the reference is another model, before a library does in its own terms."""
    if isinstance(image, VideoModel):
        raise Img2VidError("The reference of a certificate is the image model, but a VideoModel was given.")
    if not isinstance(video.base, own_class(image)) and not isinstance(image, own_class(video.base)):
        raise Img2VidError(
            f"The reference is a {own_class(image).__name__}, but the model was made from a "
            f"{own_class(video.base).__name__}."
        )
    some, same = next(image.parameters()), next(video.parameters())
    if (some.dtype, some.device) != (same.dtype, same.device):
        raise Img2VidError(
            f"The reference is in {some.dtype} on {some.device}, but the model in {same.dtype} on {same.device}. Bring "
            f"them together: reference.to({str(same.device)!r}, {same.dtype})."
        )
    own = {key: tuple(t.shape) for key, t in video.state_dict().items() if video.origin(key) == "pretrained"}
    theirs = {key: tuple(t.shape) for key, t in image.state_dict().items()}
    differences = [
        f"{key}: {theirs.get(key, 'nothing')} in the reference, {own.get(key, 'nothing')} in the model"
        for key in sorted(own.keys() | theirs.keys())
        if own.get(key) != theirs.get(key)
    ]
    tower = describe(image)
    if tower.image_size != video.tower.image_size and not tower.any_size:
        differences.append(f"made for images of {tower.image_size} pixels, the model for {video.tower.image_size}")
    if differences:
        if {id(p) for p in image.parameters()} & {id(p) for p in video.parameters()}:
            raise Img2VidError(
                "The reference shares its parameters with the video model: converting works in place, so it has time "
                "in it by now. Build a second image model of the same name and load the original weights into it."
            )
        raise Img2VidError(
            f"The reference is a {type(image).__name__} of another architecture or size than the one this model was "
            f"made from. Build it with the same name and arguments:\n{listed(differences)}"
        )


def without_nan(value: Any) -> Any:
    """JSON has no nan and no infinity; as text they survive and are seen."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
