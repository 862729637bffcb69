"""Continue pretraining on video: a LightningModule that composes model, objective and tuning.

    module = VideoTraining(VideoConfig("nano_clip", num_frames=4), Classification(head="text"))
    Trainer(max_epochs=10).fit(module, datamodule=data)

The pieces know nothing of Lightning: models are img2vid.model, objectives img2vid.objectives, rates and freezing
img2vid.tuning. `python train/fit.py fit --config ...` and `img2vid train` put a command line in front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from img2vid.backbones import wrap_module
from img2vid.callbacks import CheckpointOnException, ParameterSummary, SaveModel, Throughput, WatchTime
from img2vid.checkpoints.native import load, load_reference
from img2vid.config import ConfigError, VideoConfig
from img2vid.convert import convert
from img2vid.data.order import draw_seed
from img2vid.data.transforms import InputSpec
from img2vid.errors import Img2VidError
from img2vid.model import VideoModel, VideoTextModel, build_model
from img2vid.objectives import Objective, Step, Surroundings
from img2vid.tuning import (
    GradualUnfreezing,
    build_optimizer,
    build_schedule,
    eval_frozen,
    freeze,
    parameter_groups,
    penalty,
)


class TrainingError(Img2VidError):
    """Training that cannot begin, or must not go on."""


@dataclass
class Tuning:
    """How the weights are moved (img2vid.tuning has the meanings in full).

    Args:
        lr: learning rate of pretrained parameters.
        multipliers: of the rates of ``pretrained`` (1), ``copied`` (5) and ``new`` (10) parameters, and on top of
            that of the text tower (``text``, 1) and the time embedding (``time_embed``, 1).
        layer_decay: factor on the rate per layer, from the output down; None for none.
        weight_decay: of matrices; norms, biases, gates and embeddings have none.
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
    weight_decay: float = 0.05
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
        grad_checkpointing: keep only each block's input in memory, and run blocks twice.
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
        grad_checkpointing: bool = False,
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
        if grad_checkpointing:
            self.model.set_grad_checkpointing()
        # where each weight began, to say in the end how far it moved; not part of the module's state
        self.__dict__["beginning"] = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @property
    def tower(self) -> Any:
        return getattr(self.model, "visual", self.model).tower

    def input_spec(self) -> InputSpec:
        """What clips must look like for this backbone."""
        pixels, (height, width) = self.tower.preprocess, self.model.config.image_size or self.tower.image_size
        if height != width:
            raise ConfigError(f"image_size {height} x {width}: training data is cut to squares; give equal sides.")
        return InputSpec(height, tuple(pixels.mean), tuple(pixels.std), pixels.interpolation)

    # ---- before the first step

    def setup(self, stage: str) -> None:
        # before a checkpoint is restored, so objectives that compare with the beginning find it
        data = self.trainer.datamodule
        class_names = getattr(data, "class_names", None)
        self.objective.setup(
            Surroundings(
                self.model,
                class_names=class_names,
                captions=captions_of(data),
                rank=self.trainer.global_rank,
                world_size=self.trainer.world_size,
                image_model=self.image_model,
            )
        )
        if class_names is not None and self.accuracy is None:
            from torchmetrics.classification import MulticlassAccuracy

            self.accuracy = MulticlassAccuracy(num_classes=len(class_names), average="micro")
        if isinstance(self.trainer.strategy, DDPStrategy):
            # buffers are constants here; keeping them equal would be one more thing to wait for, and ranks may have
            # unequally many batches to validate
            self.trainer.strategy._ddp_kwargs.setdefault("broadcast_buffers", False)

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
        return [ParameterSummary(), Throughput(), WatchTime(), CheckpointOnException(), SaveModel(self.save_to)]

    def configure_optimizers(self) -> dict[str, Any]:
        how = self.how
        groups = parameter_groups(
            self.model,
            how.lr,
            multipliers=how.multipliers,
            layer_decay=how.layer_decay,
            weight_decay=how.weight_decay,
        )
        optimizer = build_optimizer(groups, how.optimizer, betas=how.betas, momentum=how.momentum)
        schedule = build_schedule(
            optimizer,
            how.schedule,
            total_steps=self.total_steps(),
            warmup=how.warmup,
            final=how.final,
            milestones=how.milestones,
            factors=how.factors,
        )
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

    # ---- steps

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        torch.manual_seed(batch_seed(self.seed, batch, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        losses = self.objective(Step(self.model, batch, self.chunk_size))
        if self.how.l1 or self.how.l2:
            losses["penalty_loss"] = penalty(self.model, l1=self.how.l1, l2=self.how.l2)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        if not torch.isfinite(total):
            raise TrainingError(non_finite(losses, batch, self.global_step, self.current_epoch, batch_idx))
        size = len(batch["clip"])
        self.log("loss", total.detach(), prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": loss.detach() for name, loss in losses.items()}, batch_size=size)
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.unfreezing is not None:
            self.unfreezing.drop_gradients(self.model, self.current_epoch)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: Mapping[str, Any], name: str) -> None:
        """Accuracy over classes, scores averaged over the views of a video: clip (B, V, T, C, H, W)."""
        clips, label = batch["clip"], batch["label"]
        scores = self.objective.predict(Step(self.model, {**batch, "clip": clips.flatten(0, 1)}))
        if scores is None or self.accuracy is None:
            return
        shares = scores.float().softmax(dim=-1).unflatten(0, clips.shape[:2]).mean(dim=1)  # (B, classes)
        self.accuracy(shares[label >= 0], label[label >= 0])
        self.log(f"{name}/accuracy", self.accuracy, prog_bar=True, on_epoch=True, batch_size=len(label))

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # after an exception within a step, the loader has given out one batch more than was learned from
        loop = self.trainer.fit_loop
        for state in checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get("combined_loader", []):
            state["batches"] = min(state["batches"], loop.epoch_loop.batch_progress.current.processed)


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
        of_text = hasattr(model, "encode_text") and not name.startswith("visual.") and not is_scale
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
