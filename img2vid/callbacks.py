"""What a training run shows and leaves behind: throughput, time being learned, checkpoints, and the final model."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Group
from torch import Tensor, nn

from img2vid.temporal.block import SpaceTimeBlock


class ParameterSummary(pl.Callback):
    """Before the first step: how many parameters of each layer group learn, and at which rate."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        from img2vid.reporting import layer_table, optimizer_table, to_text

        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rank_zero_info(to_text(Group(layer_table(module.model), optimizer_table(groups))))


class Throughput(pl.Callback):
    """Logs clips per second over all processes, the share of time spent waiting for data, and the learning rate.

    Averages over ``window`` steps; the first step of an epoch, in which workers start, is left out.
    """

    def __init__(self, window: int = 20) -> None:
        self.window = window
        self.begin()

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.begin()

    def begin(self) -> None:
        self.clips, self.waited, self.since, self.ended = 0, 0.0, None, None

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.ended is not None:
            self.waited += time.perf_counter() - self.ended

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Mapping[str, Any], batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self.since is None:  # counting begins behind the first batch
            self.since = self.ended = now
            return
        self.clips += len(batch["clip"]) * trainer.world_size
        passed = now - self.since
        lr = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        module.log("clips_per_second", self.clips / passed, prog_bar=True)
        module.log("data_wait", self.waited / passed, prog_bar=True)
        module.log("lr", lr, prog_bar=True)
        self.ended = now
        if self.clips >= self.window * len(batch["clip"]) * trainer.world_size:
            self.clips, self.waited, self.since = 0, 0.0, now


class WatchTime(pl.Callback):
    """Logs, layer by layer, how far time has entered: the gate's norm, and what the temporal branch adds to the stream.

    ``gate/blocks.3``: norm of the gate's weights (of tanh of a scalar gate). ``branch/blocks.3``: norm of the branch's
    output over the norm of the stream it is added to, on the current batch. Every ``every`` steps; None for the
    trainer's ``log_every_n_steps``.
    """

    def __init__(self, every: int | None = None) -> None:
        self.every = every
        self.hooks: list[Any] = []

    def due(self, trainer: pl.Trainer) -> bool:
        every = self.every or trainer.log_every_n_steps
        return bool(every) and (trainer.global_step + 1) % every == 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.due(trainer):
            return
        self.streams: dict[str, Tensor] = {}
        self.ratios: dict[str, Tensor] = {}
        for name, block in space_time_blocks(module):
            self.hooks += [
                block.register_forward_pre_hook(lambda _, args, name=name: self.streams.update({name: norm(args[0])})),
                block.temporal_fc.register_forward_hook(
                    lambda _, args, out, name=name: self.ratios.update({name: norm(out) / self.streams[name]})
                ),
            ]

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.hooks:
            return
        self.remove()
        module.log_dict({f"branch/{name}": ratio for name, ratio in self.ratios.items()})
        module.log_dict({f"gate/{name}": value for name, value in gate_norms(module).items()})

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.remove()

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def space_time_blocks(module: pl.LightningModule) -> list[tuple[str, nn.Module]]:
    return [(name, block) for name, block in module.tower.blocks if isinstance(block, SpaceTimeBlock)]


@torch.no_grad()
def norm(x: Tensor) -> Tensor:
    return x.float().norm()


@torch.no_grad()
def gate_norms(module: pl.LightningModule) -> dict[str, Tensor]:
    norms = {}
    for name, block in space_time_blocks(module):
        gate = block.temporal_fc
        weight = gate.alpha.tanh() if hasattr(gate, "alpha") else getattr(gate, "weight", None)
        if weight is not None:
            norms[name] = whole(weight).float().norm()
    return norms


def whole(x: Tensor) -> Tensor:
    """A sharded tensor put together (by all processes at once), any other as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


class CheckpointOnException(pl.Callback):
    """A checkpoint of the last whole step when training is ended by SIGTERM, Ctrl-C or an error.

    differs from Lightning's OnExceptionCheckpoint: it stays there (that one is deleted at the end), and one process
    that fails alone does not wait for the others. Sharded models are saved only when all processes stop together.
    """

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        from lightning.pytorch.strategies import ModelParallelStrategy
        from lightning.pytorch.utilities.exceptions import SIGTERMException

        if not trainer.fit_loop.epoch_loop.batch_progress.total.ready:
            return  # nothing has been learned
        path = Path(trainer.default_root_dir) / "on_exception.ckpt"
        if isinstance(trainer.strategy, ModelParallelStrategy):
            if isinstance(exception, SIGTERMException):
                trainer.save_checkpoint(path)
            return
        checkpoint = trainer._checkpoint_connector.dump_checkpoint()
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            try:
                torch.save(checkpoint, temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            rank_zero_info(f"Stopped by {type(exception).__name__}. To continue: --ckpt_path {path}")


class SaveModel(pl.Callback):
    """After training: the model in img2vid's format, with ``moved.json``, which says how far it went and where.

    Args:
        folder: None for ``model`` in the log directory.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self.folder is not None:
            from img2vid.checkpoints.native import check_replaceable

            check_replaceable(Path(self.folder))  # before the work, not after it

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.interrupted:
            return
        state = {name: whole(tensor).detach().cpu() for name, tensor in module.model.state_dict().items()}
        moved = how_far(module, {name: state[name] for name in module.beginning})
        folder = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "model")
        if not trainer.is_global_zero:
            return
        from img2vid.checkpoints.native import save

        save(module.model, folder, state=state)
        temporary = folder / f".moved.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(moved, indent=2) + "\n")
        os.replace(temporary, folder / "moved.json")
        rank_zero_info(f"Wrote {folder}. Load it with img2vid.load({str(folder)!r}).")


def how_far(module: pl.LightningModule, now: Mapping[str, Tensor]) -> dict[str, Any]:
    """Per layer group: distance from the beginning, relative to where the weights began, and of gates their norm."""
    from img2vid.tuning import layer_groups

    layers = {}
    for group in layer_groups(module.model):
        before = [module.beginning[name].float().cpu() for name in group.parameters]
        change = [now[name].float() - old for name, old in zip(group.parameters, before, strict=True)]
        length, distance = total_norm(before), total_norm(change)
        layers[group.label] = {
            "distance": distance,
            "relative": distance / length if length else None,  # what began at zero has no relative distance
            "changed": sum(int((x != 0).any()) for x in change),
            "tensors": len(change),
        }
    return {"steps": module.global_step, "layers": layers}


def total_norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([x.double().norm() for x in tensors]).norm())
