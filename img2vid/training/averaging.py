"""Averages of the weights along a training, as callbacks: moving (EMA) and over its last epochs (SWA).

trainer:
  callbacks:
    - class_path: img2vid.training.averaging.MovingAverage        # or EpochAverage
      init_args: {decay: 0.999}

What is validated, put into checkpoints as ``state_dict`` and saved in the end is the average; training itself goes on
from the plain weights, also when it is resumed. Moving: as in Mean Teacher, arXiv:1703.01780. Over epochs: stochastic
weight averaging, arXiv:1803.05407, under whatever schedule is set (``constant`` is usual).

differs from lightning's callbacks: a weight that does not move has itself as its average, bit for bit, so frozen
parameters stay what they were; buffers (masks, indices) are copied, never averaged; an average that has not begun
replaces nothing; and no schedule or rate is exchanged.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from img2vid.config import ConfigError

OURS = "img2vid.training.averaging.MovingAverage (EMA) or img2vid.training.averaging.EpochAverage (SWA)"


class RunningAverage(WeightAveraging):
    """What both have in common; ``share(n)`` is how much of the newest weights enters after n averaged ones."""

    def __init__(self) -> None:
        super().__init__(use_buffers=False)
        self.swapped = False  # the module holds the average, and the average's place the weights in training

    def share(self, averaged: int) -> float:
        raise NotImplementedError

    @property
    def begun(self) -> bool:
        return self._average_model is not None and bool(self._average_model.n_averaged > 0)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing yet: the module has not set itself up."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.prepare(pl_module)
        self._average_model.to(pl_module.device)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.prepare(pl_module)
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def prepare(self, module: pl.LightningModule) -> None:
        """A copy of the module, for the average to be kept in, in full precision: its steps are small."""

        def mix(average: Tensor, newest: Tensor, averaged: Tensor) -> Tensor:
            # lerp of equal numbers is that number; a sum of shares is not
            return torch.lerp(average, newest.to(average.dtype), self.share(int(averaged)))

        if self._average_model is None:
            self._average_model = AveragedModel(module, avg_fn=mix).float()

    def exchange(self, module: pl.LightningModule) -> None:
        self._swap_models(module)
        self.swapped = not self.swapped

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.begun:
            self.exchange(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.swapped:
            self.exchange(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_validation_epoch_end(trainer, pl_module)  # or the checkpoint would take one for the other

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.begun:
            super().on_train_end(trainer, pl_module)
        else:
            pl.utilities.rank_zero_warn(f"{type(self).__name__} never began: the final weights are the plain ones.")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.begun:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "latest_update_epoch": self._latest_update_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._latest_update_epoch = state_dict["latest_update_epoch"]


class MovingAverage(RunningAverage):
    """Exponential moving average, updated after every optimiser step.

    Args:
        decay: what of the average stays at a step: 0.999 looks back about a thousand steps.
        starting_at_step: optimiser steps before it begins.
    """

    def __init__(self, decay: float = 0.999, starting_at_step: int = 0) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"decay={decay!r}: expected a number from 0 to below 1, such as 0.999.")
        self.decay, self.starting_at_step = decay, starting_at_step

    def share(self, averaged: int) -> float:
        return 1.0 - self.decay

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= self.starting_at_step


class EpochAverage(RunningAverage):
    """The mean of the weights at the ends of epochs.

    Args:
        first_epoch: the first epoch, counted from 0, that takes part.
    """

    def __init__(self, first_epoch: int) -> None:
        super().__init__()
        if first_epoch < 0:
            raise ConfigError(f"first_epoch={first_epoch!r}: expected 0 or more.")
        self.first_epoch = first_epoch

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.max_epochs not in (None, -1) and self.first_epoch >= trainer.max_epochs:
            raise ConfigError(f"first_epoch={self.first_epoch}, but training ends after {trainer.max_epochs} epochs.")
        super().setup(trainer, pl_module, stage)

    def share(self, averaged: int) -> float:
        return 1.0 / (averaged + 1)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None and epoch_idx >= self.first_epoch

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """The epoch's last weights take part before they are validated, not after."""
        super().on_train_batch_end(trainer, pl_module, *args)
        if trainer.is_last_batch:
            self.on_train_epoch_end(trainer, pl_module)  # once an epoch


def check_averaging(trainer: pl.Trainer, model: torch.nn.Module) -> None:
    """Refuse averages that would not be what they seem.

    Raises:
        ConfigError: with the callback's name and what to use instead.
    """
    averages = [c for c in trainer.callbacks if isinstance(c, (WeightAveraging, StochasticWeightAveraging))]
    if averages and isinstance(trainer.strategy, ModelParallelStrategy):
        raise ConfigError(
            f"{type(averages[0]).__name__} keeps a whole copy of the model, which sharding (FSDP2) does not allow. "
            "Train with trainer.strategy=ddp, or average the saved models afterwards: img2vid interpolate --average."
        )
    for callback in averages:
        if isinstance(callback, StochasticWeightAveraging):
            raise ConfigError(
                "Lightning's StochasticWeightAveraging exchanges the schedule and gives all parameter groups one "
                f"learning rate, so that how.multipliers would be lost. Use {OURS}."
            )
        frozen = sum(not p.requires_grad for p in model.parameters())
        if frozen and not isinstance(callback, RunningAverage):
            raise ConfigError(
                f"{type(callback).__name__} would move the {frozen} frozen parameters, by rounding. Use {OURS}."
            )
