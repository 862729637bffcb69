"""The pieces every objective shares: what it may know before training, what it sees at a step, and weighted sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from img2vid.errors import Img2VidError, nearest


class ObjectiveError(Img2VidError):
    """An objective that does not fit the model, the data, or its own settings."""


@dataclass
class Surroundings:
    """What an objective may ask for before the first step.

    Args:
        model: the video model that is trained, with the weights it starts from.
        class_names: of the training list, in the order of its labels; None where only numbers are known.
        captions: all distinct captions of the training list.
        rank, world_size: of this process.
        image_model: builds the frozen image model; called only by objectives that compare with it.
        training: False where the model is only to be scored, and must stay as it is.
        sharded: whether every process will hold only its share of each weight.
    """

    model: nn.Module
    class_names: Sequence[str] | None = None
    captions: Sequence[str] = ()
    rank: int = 0
    world_size: int = 1
    image_model: Callable[[], nn.Module] | None = None
    training: bool = True
    sharded: bool = False

    def teacher(self, what: str) -> Teacher:
        if self.image_model is None:
            raise ObjectiveError(f"{what} needs the image model to compare with: give Surroundings(image_model=).")
        return Teacher(self.image_model())


class Teacher:
    """The frozen image model, beside the registered modules: it is neither trained, saved nor averaged.

    Copies of what holds it share it. It is made before the trainer has placed the model, and follows the clips.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict) -> Teacher:
        return self

    def on(self, clips: Tensor) -> nn.Module:
        """The model, on the device and in the precision of these clips."""
        weight = next(self.model.parameters())
        if (weight.device, weight.dtype) != (clips.device, clips.dtype):
            self.model.to(clips.device, clips.dtype)
        return self.model


class Step:
    """One batch on its way through the model. However many objectives look, the video tower runs once.

    Args:
        model: a VideoModel or VideoTextModel.
        batch: clip (B, T, C, H, W) and what else the objectives read.
        chunk_size: clips at a time, or None for all at once. In chunks, only features stay in memory and each chunk is
            run again for its gradients: the gradient cache of arXiv:2101.06983, as activation checkpointing of the
            whole tower, so that a contrastive batch may be larger than what fits.
    """

    def __init__(self, model: Any, batch: Mapping[str, Any], chunk_size: int | None = None) -> None:
        self.model, self.batch, self.chunk_size = model, batch, chunk_size
        self.asked: list[Any] = []  # what routers of experts note, while the clips of the step are encoded

    @cached_property
    def encoded(self) -> tuple[Tensor, Tensor]:
        self.asked = list(routers(self.model))
        for balance in self.asked:
            balance.begin()
        try:
            return self.encode(self.batch["clip"])
        finally:
            self.asked = []  # when a chunk is run again for its gradients, nothing is noted twice

    @property
    def features(self) -> Tensor:
        """Clip features (B, D), of the length the model gives them."""
        return self.encoded[0]

    @property
    def tokens(self) -> Tensor:
        """What the last block put out, (B*T, P + N, D)."""
        return self.encoded[1]

    @property
    def logits(self) -> Tensor:
        """What the model's own classifier makes of the features, (B, num_classes)."""
        features = self.features
        vectors = self.vectors(len(features))
        with self.model.beside(**vectors) if vectors else nullcontext():
            return self.model.classifier(features)

    @cached_property
    def video(self) -> Tensor:
        """Clip features (B, D) of length one."""
        return F.normalize(self.features, dim=-1)

    def encode(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Clips (B, T, C, H, W) -> features (B, D) and last tokens (B*T, P + N, D)."""
        vectors = self.vectors(len(clips))

        def encode(part: Tensor, *beside: Tensor) -> tuple[Tensor, Tensor]:
            encoded = encode_clips(self.model, part, dict(zip(vectors, beside, strict=True)))
            for balance in self.asked:
                balance.take()
            return encoded

        return in_chunks(encode, self.chunk_size, clips, *vectors.values())

    def vectors(self, num_clips: int) -> dict[str, Tensor]:
        """What the batch holds beside each of its clips, (B, E) by name; all V views of a video share it, (B*V, E)."""
        found: dict[str, Tensor] = {}
        for name in getattr(self.model, "takes_beside", ()):
            if name not in self.batch:
                raise ObjectiveError(
                    f"The model takes {name!r} beside clips, and batches hold {', '.join(self.batch)}. Let a data "
                    "module of your own add it in on_after_batch_transfer; batch['index'] says which rows they are."
                )
            vector = self.batch[name]
            found[name] = vector.repeat_interleave(num_clips // len(vector), dim=0)
        return found

    def text(self, tokens: Tensor, train: bool = True) -> Tensor:
        """Token ids (N, L) -> features (N, D) of length one."""
        with torch.set_grad_enabled(train and torch.is_grad_enabled()):
            encoded = in_chunks(lambda part: (self.model.encode_text(part, normalize=True),), self.chunk_size, tokens)
        return encoded[0]


def routers(model: nn.Module) -> Iterator[Any]:
    """What each router of experts notes of a step."""
    return (module.balance for module in model.modules() if hasattr(module, "zero_experts"))


def in_chunks(encode: Callable[..., tuple[Tensor, ...]], size: int | None, *inputs: Tensor) -> tuple[Tensor, ...]:
    if size is None or not torch.is_grad_enabled() or len(inputs[0]) <= size:
        return encode(*inputs)
    split = zip(*(x.split(size) for x in inputs), strict=True)
    parts = [checkpoint(encode, *part, use_reentrant=False) for part in split]
    return tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))


def encode_clips(model: Any, clips: Tensor, beside: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Clips (B, T, C, H, W) -> features (B, D), before any classifier, and the last block's output (B*T, P + N, D).

    Args:
        beside: a vector for each clip (B, E) by its name, where the model takes one.
    """
    tower, seen = getattr(model, "visual", model).tower, []
    hook = tower.blocks[-1][1].register_forward_hook(lambda block, inputs, output: seen.append(output))
    try:
        with model.beside(**beside) if beside else nullcontext():
            features = model.encode_video(clips) if hasattr(model, "encode_video") else model.clip_features(clips)
    finally:
        hook.remove()
    first = [x[0] if isinstance(x, tuple) else x for x in (features, seen[-1])]
    return first[0], first[1]


class Objective(nn.Module):
    """One way of scoring a model on a batch. It has no parameters of its own.

    trains_text, reads_scale: whether gradients reach the text tower, and the model's ``logit_scale``. What they do not
    reach must be frozen, or processes would wait for it.
    """

    trains_text = False
    reads_scale = False

    def setup(self, around: Surroundings) -> None:
        """Called once before the first step."""

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Scalars, each named ``*_loss``, to be added up."""
        raise NotImplementedError

    def predict(self, step: Step) -> Tensor | None:
        """Scores (B, classes) for the labels of the list; None where the objective knows no classes."""
        return None

    def forget(self) -> None:
        """Drop what was worked out with weights that may since have been exchanged (a checkpoint, an average)."""
        for part in self.modules():
            if isinstance(part, Objective) and part is not self:
                part.forget()


class WeightedSum(Objective):
    """Any objectives, added up with weights; their losses come back weighted, each under its own name.

    Args:
        objectives: by a name of your choice.
        weights: by the same names; 1 for those not named.
    """

    def __init__(self, objectives: dict[str, Objective], weights: dict[str, float] | None = None) -> None:
        super().__init__()
        self.weights = dict(weights or {})
        if not objectives:
            raise ObjectiveError("WeightedSum has no objectives; give at least one.")
        for name in self.weights:
            if name not in objectives:
                raise ObjectiveError(
                    f"weights: no objective is called {name!r}.{nearest(name, objectives)} "
                    f"There are: {', '.join(objectives)}."
                )
        self.objectives = nn.ModuleDict(objectives)
        self.trains_text = any(objective.trains_text for objective in objectives.values())
        self.reads_scale = any(objective.reads_scale for objective in objectives.values())

    def setup(self, around: Surroundings) -> None:
        for objective in self.objectives.values():
            objective.setup(around)

    def forward(self, step: Step) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for name, objective in self.objectives.items():
            for key, loss in objective(step).items():
                key = f"{name}_{key}" if key in total else key
                total[key] = self.weights.get(name, 1.0) * loss
        return total

    def predict(self, step: Step) -> Tensor | None:
        found = (objective.predict(step) for objective in self.objectives.values())
        return next((scores for scores in found if scores is not None), None)


def choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        hint = nearest(str(value), choices)
        raise ObjectiveError(f"{name}={value!r}: expected one of {', '.join(choices)}.{hint}")


def share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ObjectiveError(f"{name}={value!r}: expected a number from 0 to below 1.")


# open_clip's image tower; transformers', and the projections it keeps outside of that
OF_IMAGE = ("visual.", "vision_model.", "visual_projection.", "vision_proj.")


def is_of_text(name: str, with_scale: bool = False) -> bool:
    """Whether a parameter of a VideoTextModel belongs to its text tower; its temperature belongs to both towers."""
    return not name.startswith(OF_IMAGE) and (with_scale or name not in ("logit_scale", "logit_bias"))


def need_text(model: nn.Module, what: str) -> None:
    if not hasattr(model, "encode_text"):
        raise ObjectiveError(
            f"{what} needs a text tower, which this {type(model).__name__} has not. Use a backbone that has one "
            "(open_clip:..., nano_clip), without num_classes."
        )
