"""Ending a run from outside, and what it leaves: signals are noted when they come and obeyed between two optimiser
steps, by all processes at once; then a checkpoint is written that loses nothing."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from img2vid.data.loading import num_batches


class Terminated(SIGTERMException):
    """SIGTERM came; raised by all processes between the same two steps."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came; raised by all processes between the same two steps."""


class StopBetweenSteps(pl.Callback):
    """SIGTERM and Ctrl-C end training after the step they came in, a second Ctrl-C at once.

    Under SLURM with requeueing, its signal (SIGUSR1) has Lightning write a checkpoint and queue the job again.

    differs from Lightning: its handlers exchange messages between processes in the midst of whatever each is doing, and
    then wait for each other until they are killed, without a checkpoint.
    """

    def __init__(self) -> None:
        self.asked = 0  # the signal that came, 0 for none
        self.requeue: Callable[[int, Any], None] | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.asked, self.requeue = 0, None
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may say what signals do

        def note(number: int, frame: Any) -> None:
            self.asked = max(self.asked, number)  # SIGTERM over SIGUSR1 over SIGINT
            if number == signal.SIGTERM and trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(number)  # processes that this one has started
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if trainer.is_global_zero:
                    print("\nStopping after this step; Ctrl-C again to stop at once.", file=sys.stderr)

        # Lightning sets its own before training starts and puts the former ones back when it ends
        signal.signal(signal.SIGTERM, note)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
            signal.signal(signal.SIGINT, note)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self.requeue = trainer._signal_connector._slurm_sigusr_handler_fn
            signal.signal(environment.requeue_signal, note)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:  # else gradients that no checkpoint holds would be lost
            self.obey(trainer)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        fewest, _ = num_batches(trainer.val_dataloaders, trainer.limit_val_batches)
        if not trainer.sanity_checking and batch_idx < fewest:
            self.obey(trainer)

    def obey(self, trainer: pl.Trainer) -> None:
        asked = self.asked
        if trainer.world_size > 1:  # the processes may have heard of it at different steps
            signals = torch.tensor(asked, device=trainer.strategy.root_device)
            asked = int(trainer.strategy.reduce(signals, reduce_op="max"))
        if asked == signal.SIGTERM:
            raise Terminated
        if asked == signal.SIGINT:
            raise Interrupted
        if asked and self.requeue is not None:
            self.asked = 0
            self.requeue(asked, None)


class CheckpointOnException(pl.Callback):
    """``on_exception.ckpt``: the state after the last whole step, when training is ended by a signal or an error.

    differs from Lightning's OnExceptionCheckpoint: it stays there (that one is deleted at the end), and one process
    that fails alone does not wait for the others. Sharded models are saved only when all processes stop together.
    """

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if not trainer.fit_loop.epoch_loop.batch_progress.total.ready:
            return  # nothing has been learned
        path = Path(trainer.default_root_dir) / "on_exception.ckpt"
        if isinstance(exception, (Terminated, Interrupted)):
            trainer.save_checkpoint(path)
        elif isinstance(trainer.strategy, ModelParallelStrategy):
            return
        else:
            save_alone(trainer, path)
        rank_zero_info(f"Stopped by {type(exception).__name__}. To continue: --ckpt_path {path}")


def save_alone(trainer: pl.Trainer, path: Path) -> None:
    """A checkpoint by the first process, without waiting for any other."""
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    if not trainer.is_global_zero:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
