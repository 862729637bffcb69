"""Continue pretraining on video: a LightningModule that composes model, objective and tuning.

    module = VideoTraining(VideoConfig("nano_clip", num_frames=4), Classification(head="text"))
    Trainer(max_epochs=10).fit(module, datamodule=data)

The pieces know nothing of Lightning: models are img2vid.model, objectives img2vid.objectives, rates and freezing
img2vid.tuning. `python train/fit.py fit --config ...` and `img2vid train` put a command line in front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from img2vid.backbones import wrap_module
from img2vid.checkpoints.native import load, load_reference
from img2vid.config import ConfigError, VideoConfig
from img2vid.consolidate import ENTRY
from img2vid.convert import convert
from img2vid.data.loading import num_batches
from img2vid.data.order import draw_seed
from img2vid.data.transforms import InputSpec
from img2vid.errors import Img2VidError
from img2vid.model import VideoModel
from img2vid.objectives import Objective, Step, Surroundings
from img2vid.objectives.base import is_of_text
from img2vid.training.averaging import check_averaging
from img2vid.training.callbacks import ParameterSummary, SaveModel, Throughput, WatchTime
from img2vid.training.classes import name_classes, resume_names
from img2vid.training.movement import Beginning
from img2vid.training.stopping import CheckpointOnException, StopBetweenSteps
from img2vid.tuning import GradualUnfreezing, Tuning, bound_temperature, eval_frozen, freeze, penalty
from img2vid.tuning.recipe import put_back, settings_of
from img2vid.two_towers import VideoTextModel, build_model


class TrainingError(Img2VidError):
    """Training that cannot begin, or must not go on."""


class VideoTraining(pl.LightningModule):
    """A video model in training.

    Args:
        video: what the model is; its ``backbone`` is needed unless ``start_from`` is given.
        objective: what is optimised.
        how: learning rates, freezing, schedule.
        start_from: a model folder to go on from, instead of converting a backbone.
        weights: local weights file for the backbone.
        random_weights: build the backbone without loading any weights.
        chunk_size: clips at a time in the video tower (gradient cache); None for all at once.
        grad_checkpointing: keep only each block's input in memory, and run blocks twice; ``trunk`` for the image blocks
            alone, without their branches along time.
        compile: torch.compile each block, for clips of one fixed shape.
        save_to: folder for the trained model in img2vid's format; None for ``model`` beside the logs.
        seed: of dropout, mixing and masks. Each batch has its own seed, so a resumed run need not know more.
    """

    def __init__(
        self,
        video: VideoConfig,
        objective: Objective,
        how: Tuning = Tuning(),  # noqa: B008 (read only)
        start_from: str | None = None,
        weights: str | None = None,
        random_weights: bool = False,
        chunk_size: int | None = None,
        grad_checkpointing: bool | Literal["trunk"] = False,
        compile: bool = False,
        save_to: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = start(video, start_from, weights, random_weights)
        self.objective, self.how, self.chunk_size = objective, how, chunk_size
        self.save_to, self.seed, self.compiles = save_to, seed, compile
        self.accuracy: nn.Module | None = None
        self.unfreezing = GradualUnfreezing(how.unfreeze) if how.unfreeze else None
        freeze(self.model, how.freeze)
        freeze_what_is_not_read(self.model, objective)
        self.model.train()
        eval_frozen(self.model)
        if grad_checkpointing == "trunk":
            getattr(self.model, "visual", self.model).set_grad_checkpointing(trunk_only=True)
        elif grad_checkpointing:
            self.model.set_grad_checkpointing()
        # to say in the end how far it moved; not part of the module's state
        self.beginning = Beginning({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        self.settings: str | None = None  # as YAML, to be saved beside the model; set by the command line
        self.has_objective = False

    @property
    def tower(self) -> Any:
        return getattr(self.model, "visual", self.model).tower

    def input_spec(self) -> InputSpec:
        """What clips must look like for this backbone."""
        pixels, (height, width) = self.tower.preprocess, self.model.config.image_size or self.tower.image_size
        if height != width:
            raise ConfigError(f"image_size {height} x {width}: training data is cut to squares; give equal sides.")
        # videos are RGB; what a model takes beyond that (the graft channels) is for a data module of one's own to add
        return InputSpec(height, tuple(pixels.mean[:3]), tuple(pixels.std[:3]), pixels.interpolation)

    # ---- before the first step

    def setup(self, stage: str) -> None:
        # before a checkpoint is restored, so objectives that compare with the beginning find it
        data = self.trainer.datamodule
        class_names = getattr(data, "class_names", None)
        if not self.has_objective:  # once: testing what was trained does not begin anew
            self.objective.setup(
                Surroundings(
                    self.model,
                    class_names=class_names,
                    captions=captions_of(data),
                    rank=self.trainer.global_rank,
                    world_size=self.trainer.world_size,
                    image_model=self.image_model,
                    training=stage == "fit",
                    sharded=isinstance(self.trainer.strategy, ModelParallelStrategy),
                )
            )
            self.has_objective = stage == "fit"
        if class_names is not None:
            name_classes(getattr(self.model, "visual", self.model), class_names, learns=stage == "fit")
        if class_names is not None and self.accuracy is None:
            from torchmetrics.classification import MulticlassAccuracy

            self.accuracy = MulticlassAccuracy(num_classes=len(class_names), average="micro")
        if isinstance(self.trainer.strategy, DDPStrategy):
            # buffers are constants here; keeping them equal would be one more thing to wait for, and ranks may have
            # unequally many batches to validate
            option = "forward_sync_buffers"  # of torch >= 2.14
            option = option if option in signature(DistributedDataParallel).parameters else "broadcast_buffers"
            self.trainer.strategy._ddp_kwargs.setdefault(option, False)

    def image_model(self) -> VideoModel | VideoTextModel:
        """A frozen copy of the image model as it was in the beginning, applied to each frame."""
        config = VideoConfig(num_frames=1, attention="space_only", image_size=self.model.config.image_size)
        return build_model(wrap_module(load_reference(self.model)), config)

    def configure_model(self) -> None:
        blocks = [block for _, block in self.tower.blocks]
        if self.compiles:
            for block in blocks:
                block.compile(dynamic=False)
            self.compiles = False
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            self.shard(blocks)

    def shard(self, blocks: Sequence[nn.Module]) -> None:
        """FSDP2: each block by itself, the rest as one.

        It cannot shard scalars, so a text model's temperature stands still.
        """
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        if isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in blocks:
            fully_shard(block, mesh=mesh)
        scalars = {p.requires_grad_(False) for p in self.model.parameters() if p.ndim == 0}
        fully_shard(self.model, mesh=mesh, ignored_params=scalars)
        for method in ("encode_video", "encode_text", "clip_features"):
            if hasattr(self.model, method):
                register_fsdp_forward_method(self.model, method)

    def configure_callbacks(self) -> list[pl.Callback]:
        check_averaging(self.trainer, self.model)
        shown, stopping = [ParameterSummary(), Throughput(), WatchTime()], [StopBetweenSteps(), CheckpointOnException()]
        return [*shown, *stopping, SaveModel(self.save_to)]

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer, schedule = self.how.build(self.model, self.total_steps())
        self.asked = settings_of(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimiser steps of the whole training.

        Not ``trainer.estimated_stepping_batches``: that sets the loader up before a checkpoint's place in the epoch is
        known, and the place is never looked at again.
        """
        trainer = self.trainer
        if trainer.max_epochs in (None, -1):
            if trainer.max_steps == -1:
                raise TrainingError("How long to train is not known: set trainer.max_epochs or trainer.max_steps.")
            return trainer.max_steps
        if trainer.datamodule is None:
            return int(trainer.estimated_stepping_batches)
        batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        steps = trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches)
        return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn == "fit" and checkpoint.get("optimizer_states"):
            self.how.check_saved(self.model, checkpoint["optimizer_states"][0]["param_groups"])
        resume_names(getattr(self.model, "visual", self.model), checkpoint.get(ENTRY, {}), self.trainer.datamodule)

    def on_train_start(self) -> None:
        """A checkpoint says what was learned; how to go on is said by this run's settings."""
        put_back(self.asked, self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler)

    # ---- steps

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        torch.manual_seed(batch_seed(self.seed, batch, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        losses = self.objective(self.step_of(batch, batch["clip"]))
        if self.how.l1 or self.how.l2:
            losses["penalty_loss"] = penalty(self.model, l1=self.how.l1, l2=self.how.l2)
        parts = torch.stack([loss.float() for loss in losses.values()])
        total = parts.sum()
        if not torch.isfinite(total):
            raise TrainingError(non_finite(losses, batch, self.global_step, self.current_epoch, batch_idx))
        size = len(batch["clip"])
        seen = torch.cat([total[None], parts]).detach()
        values = self.trainer.strategy.reduce(seen, reduce_op="mean").unbind()  # over processes, in one message
        self.log("loss", values[0], prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": value for name, value in zip(losses, values[1:], strict=True)}, batch_size=size)
        return total

    def step_of(self, batch: Mapping[str, Any], clips: Tensor) -> Step:
        """A batch on its way, its clips in the precision of the weights (another under ``bf16-true``)."""
        clips = clips.to(next(self.model.parameters()).dtype)
        return Step(self.model, {**batch, "clip": clips}, self.chunk_size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.unfreezing is not None:
            self.unfreezing.drop_gradients(self.model, self.current_epoch)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        bound_temperature(self.model, self.beginning)

    def on_validation_epoch_start(self) -> None:
        self.objective.forget()  # the weights may be an average's

    def on_test_epoch_start(self) -> None:
        self.objective.forget()  # the weights may be another checkpoint's

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.evaluate(batch, batch_idx, "test")

    def evaluate(self, batch: Mapping[str, Any], batch_idx: int, name: str) -> None:
        """Accuracy over classes, scores averaged over the views of a video: clip (B, V, T, C, H, W)."""
        clips, label = batch["clip"], batch["label"]
        scores = self.objective.predict(self.step_of(batch, clips.flatten(0, 1)))
        for _ in range(self.still_waiting(batch_idx, name)):
            self.objective.predict(self.step_of(batch, clips.flatten(0, 1)))
        if scores is None or self.accuracy is None:
            return
        shares = scores.float().softmax(dim=-1).unflatten(0, clips.shape[:2]).mean(dim=1)  # (B, classes)
        self.accuracy(shares[label >= 0], label[label >= 0])
        self.log(f"{name}/accuracy", self.accuracy, prog_bar=True, on_epoch=True, batch_size=len(label))

    def still_waiting(self, batch_idx: int, name: str) -> int:
        """Batches that other processes have after this one's last, where sharding has all work on each together."""
        trainer = self.trainer
        if not isinstance(trainer.strategy, ModelParallelStrategy):
            return 0
        if trainer.sanity_checking:
            loader, limit, mine = trainer.val_dataloaders, trainer.num_sanity_val_steps, trainer.num_sanity_val_batches
        elif name == "val":
            loader, limit, mine = trainer.val_dataloaders, trainer.limit_val_batches, trainer.num_val_batches
        else:
            loader, limit, mine = trainer.test_dataloaders, trainer.limit_test_batches, trainer.num_test_batches
        fewest, most = num_batches(loader, limit)
        if not fewest:
            raise TrainingError("There are fewer videos to evaluate than processes, and sharding needs all of them.")
        return most - mine[0] if batch_idx + 1 == mine[0] else 0

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Which model it is; and after an exception, back to the last optimiser step.

        The loader may have given out one batch more than was learned from, and batches whose gradients were still being
        accumulated are learned from again.
        """
        video = getattr(self.model, "visual", self.model)
        checkpoint[ENTRY] = {"video": self.model.config.to_dict(), "image_weights": video.image_weights}
        if video.class_names is not None:
            checkpoint[ENTRY]["class_names"] = video.class_names
        loop = self.trainer.fit_loop.epoch_loop
        done, every = loop.batch_progress.current.processed, self.trainer.accumulate_grad_batches
        whole = done if done >= self.trainer.num_training_batches else done - done % every
        state = checkpoint.get("loops", {}).get("fit_loop", {})
        for loader in state.get("state_dict", {}).get("combined_loader", []):
            loader["batches"] = min(loader["batches"], whole)
        if whole < done:
            progress = state["epoch_loop.batch_progress"]
            back = progress["current"]["completed"] - whole
            for count in (progress["total"], progress["current"]):
                count["completed"] -= back


def start(
    video: VideoConfig, folder: str | None, weights: str | None, random_weights: bool
) -> VideoModel | VideoTextModel:
    """The model that training begins with."""
    if folder is not None:
        if weights is not None or random_weights or video.backbone is not None:
            raise ConfigError("start_from has its own weights and settings: leave out backbone and weights.")
        return load(Path(folder))
    if video.backbone is None:
        raise ConfigError("No backbone was given: set video.backbone, such as nano_clip, or start_from.")
    settings = {name: value for name, value in asdict(video).items() if name != "backbone"}
    return convert(video.backbone, weights=weights, random_weights=random_weights, **settings)


def freeze_what_is_not_read(model: VideoModel | VideoTextModel, objective: Objective) -> None:
    """Parameters that no gradient will reach: DistributedDataParallel would wait for them."""
    for name, parameter in model.named_parameters():
        is_scale = name in ("logit_scale", "logit_bias")
        of_text = hasattr(model, "encode_text") and is_of_text(name)
        if (of_text and not objective.trains_text) or (is_scale and not objective.reads_scale):
            parameter.requires_grad_(False)


def captions_of(data: Any) -> list[str]:
    """All distinct captions of the training list, in a fixed order."""
    videos = getattr(data, "lists", {}).get("train")
    return sorted({caption for row in videos.rows for caption in row.captions}) if videos is not None else []


def batch_seed(seed: int, batch: Mapping[str, Any], epoch: int, batch_idx: int, rank: int) -> int:
    """A seed that only depends on which batch this is, so a resumed run draws what an unbroken one draws."""
    if "position" in batch:
        return draw_seed(seed, int(batch["epoch"][0]), -2 - int(batch["position"][0]))
    return draw_seed(seed, epoch, -2 - batch_idx * 100_003 - rank)


def non_finite(losses: Mapping[str, Tensor], batch: Mapping[str, Any], step: int, epoch: int, batch_idx: int) -> str:
    values = ", ".join(f"{name} = {loss.item():g}" for name, loss in losses.items())
    bad = [name for name, loss in losses.items() if not torch.isfinite(loss)] or ["the sum of the losses"]
    rows = f" Rows of the training list: {batch['index'].tolist()}." if "index" in batch else ""
    return (
        f"{' and '.join(bad)} is not finite at step {step} (epoch {epoch}, batch {batch_idx}): {values}.{rows} Lower "
        "how.lr, lengthen how.warmup, set trainer.gradient_clip_val, or train in bf16-mixed instead of 16-mixed."
    )
