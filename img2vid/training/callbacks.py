"""What a training run shows, and the model it leaves: parameters, throughput, time being learned."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Group
from torch import Tensor, nn

from img2vid.temporal.block import SpaceTimeBlock


class Bar(RichProgressBar):
    """Lightning's bar, with rates of 1e-5 not shown as 0.000."""

    def __init__(self) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_format=".4g"))

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return without_version(super().get_metrics(trainer, pl_module))


class Lines(ProgressBar):
    """The same numbers where there is no terminal, such as in a job's log: a line every ``log_every_n_steps``."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % (trainer.log_every_n_steps or 50) == 0:
            done = f"{batch_idx + 1} of {trainer.num_training_batches}"
            self.say(trainer, pl_module, f"epoch {trainer.current_epoch}, batch {done}, step {trainer.global_step}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.say(trainer, pl_module, f"validated at step {trainer.global_step}")

    def say(self, trainer: pl.Trainer, module: pl.LightningModule, where: str) -> None:
        numbers = without_version(self.get_metrics(trainer, module)).items()
        told = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in numbers]
        rank_zero_info(f"{where}: {', '.join(told)}")

    def disable(self) -> None:
        """Nothing to do: rank_zero_info speaks for the first process only."""

    enable = disable


def without_version(numbers: dict[str, Any]) -> dict[str, Any]:
    """The folder's number is in the folder's name."""
    return {name: value for name, value in numbers.items() if name != "v_num"}


class ParameterSummary(pl.Callback):
    """Before the first step: how many parameters of each layer group learn, and at which rate.

    Rates are what this run was asked for, not what a checkpoint remembers, and not the first step of a warm-up.
    """

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        from img2vid.reporting import layer_table, optimizer_table, to_text

        trained = zip(trainer.optimizers[0].param_groups, module.asked, strict=True)
        groups = [{**group, **asked} for group, asked in trained]
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
    trainer's ``log_every_n_steps``. Compiled blocks run uncompiled in these steps, as they do not hear of new hooks.
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

        if self.hooks:
            torch.compiler.set_stance("force_eager")

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
        if self.hooks:
            torch.compiler.set_stance("default")
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


class SaveModel(pl.Callback):
    """After training: the model in img2vid's format, with ``moved.json`` (movement.py) and ``training.yaml``.

    Args:
        folder: None for ``model`` in the log directory.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self.clips: Tensor | None = None  # some of those trained on, to compare features on
        self.beside: dict[str, Tensor] = {}  # what the model takes beside them

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self.folder is not None:
            from img2vid.checkpoints.native import check_replaceable

            check_replaceable(Path(self.folder))  # before the work, not after it

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.clips is None and trainer.is_global_zero:
            self.clips = batch["clip"][:4].detach().float().cpu()
            names = module.model.takes_beside
            self.beside = {name: batch[name][:4].detach().float().cpu() for name in names if name in batch}

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.interrupted:
            return
        state = gathered(module.model, keep=trainer.is_global_zero)
        folder = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "model")  # asks all processes
        if not trainer.is_global_zero:
            return
        from img2vid.checkpoints.native import build_backbone, save
        from img2vid.training.movement import measure_movement
        from img2vid.two_towers import build_model

        model = build_model(build_backbone(module.model.config), module.model.config)
        model.load_state_dict(state)
        movement = measure_movement(model, module.beginning, trainer.global_step, self.clips, self.beside)
        save(module.model, folder, state=state, movement=movement, settings=module.settings)
        rank_zero_info(f"{movement}\nWrote {folder}. Load it with img2vid.load({str(folder)!r}).")


def gathered(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The weights on the CPU, put together by all processes; empty where they are not to be kept."""
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = whole(tensor)
        if keep:
            state[name] = tensor.detach().cpu()
    return state
