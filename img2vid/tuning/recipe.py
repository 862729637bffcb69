"""All settings of tuning in one place, and what they make: groups, optimiser, schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from img2vid.model import VideoModel
from img2vid.tuning.groups import TuningError
from img2vid.tuning.optimizers import build_optimizer, parameter_groups
from img2vid.tuning.schedules import build_schedule
from img2vid.two_towers import VideoTextModel

USUAL_DECAY = {"adamw": 0.05, "sgd": 1e-4}


@dataclass
class Tuning:
    """How the weights are moved; each setting is explained in full where it is used.

    Args:
        lr: learning rate of pretrained parameters.
        multipliers: of the rates of ``pretrained`` (1), ``copied`` (5) and ``new`` (10) parameters, and on top of
            that of the text tower (``text``, 1) and the time embedding (``time_embed``, 1).
        layer_decay: factor on the rate per layer, from the output down; None for none.
        weight_decay: of matrices; norms, biases, gates and embeddings have none. None for what each optimiser is used
            with: 0.05 for AdamW, 1e-4 for SGD, where it is a penalty of the gradient and not of the weight.
        optimizer: ``adamw`` (betas) | ``sgd`` (momentum).
        schedule: ``cosine`` | ``constant`` | ``step`` (at milestones, by factors).
        warmup: steps, or a fraction of all steps below 1.
        freeze: ``none``, ``temporal_only``, ``image``, ``text``, ``first:N``, a regular expression, or a list of these.
        unfreeze: epoch -> how many layers from the output train from then on, or ``all``.
        l1, l2: penalties added to the loss.
    """

    lr: float = 1e-5
    multipliers: dict[str, float] = field(default_factory=dict)
    layer_decay: float | None = None
    weight_decay: float | None = None
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.98)
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup: int | float = 0.05
    final: float = 0.0
    milestones: list[int | float] = field(default_factory=list)
    factors: float | list[float] = 0.1
    freeze: str | list[str] = "none"
    unfreeze: dict[int, int | str] = field(default_factory=dict)
    l1: float = 0.0
    l2: float = 0.0

    def groups(self, model: VideoModel | VideoTextModel) -> list[dict[str, Any]]:
        return parameter_groups(
            model,
            self.lr,
            multipliers=self.multipliers,
            layer_decay=self.layer_decay,
            weight_decay=USUAL_DECAY.get(self.optimizer, 0.0) if self.weight_decay is None else self.weight_decay,
        )

    def build(self, model: VideoModel | VideoTextModel, total_steps: int) -> tuple[Optimizer, LambdaLR]:
        """An optimiser over what is not frozen, and the schedule to be stepped after each of its steps.

        Args:
            total_steps: optimiser steps of the whole training.
        """
        optimizer = build_optimizer(self.groups(model), self.optimizer, betas=self.betas, momentum=self.momentum)
        schedule = build_schedule(
            optimizer,
            self.schedule,
            total_steps=total_steps,
            warmup=self.warmup,
            final=self.final,
            milestones=self.milestones,
            factors=self.factors,
        )
        return optimizer, schedule

    def check_saved(self, model: VideoModel | VideoTextModel, saved: Sequence[Mapping[str, Any]]) -> None:
        """Whether what an optimiser remembers can be taken over.

        Args:
            saved: its ``param_groups``, from a checkpoint.

        Raises:
            TuningError: it was another optimiser, or had other groups of parameters.
        """
        was = "adamw" if "betas" in saved[0] else "sgd"
        ours, theirs = (
            [f"{group['name']} of {len(group['params'])} tensors" for group in groups]
            for groups in (self.groups(model), saved)
        )
        if was != self.optimizer or ours != theirs:
            raise TuningError(
                f"The checkpoint was made by {was} with the groups {', '.join(theirs)}. This run has {self.optimizer} "
                f"with {', '.join(ours)}, so what was remembered of each weight belongs to another. Resume with the "
                "same optimizer, freeze and layer_decay, or begin anew from saved weights: start_from."
            )


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Rates, weight decay and the like of each group."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def put_back(settings: Sequence[Mapping[str, Any]], optimizer: Optimizer, schedule: LambdaLR) -> None:
    """Settings that loading a state dict has exchanged for its own; the schedule goes on from where it is."""
    schedule.base_lrs = [group["initial_lr"] for group in settings]
    for group, given, factor in zip(optimizer.param_groups, settings, schedule.lr_lambdas, strict=True):
        group.update({**given, "lr": given["initial_lr"] * factor(schedule.last_epoch)})
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
