"""``img2vid estimate``: what training will cost, before renting anything. What is measured and what is arithmetic is
said line by line; docs/scaling.md has examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from img2vid.backbones import load_backbone
from img2vid.choices import OPTIMIZER_STATES, TRAINING_PRECISIONS
from img2vid.config import ConfigError, VideoConfig, one_of
from img2vid.footprint import Footprint, measure_on_nothing
from img2vid.model import VideoModel
from img2vid.tuning import freeze, layer_groups
from img2vid.tuning.groups import image_tower_of
from img2vid.two_towers import VideoTextModel, build_model

# peak dense TFLOP/s of one NVIDIA A100 (its data sheet): without tensor cores for 32-true, with them otherwise
A100_TFLOPS = {"32-true": 19.5, "bf16-mixed": 312.0, "16-mixed": 312.0, "bf16-true": 312.0}
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes for one GPU; ``clips`` is what the whole training sees, epochs times the set."""

    backbone: str
    settings: dict[str, Any]
    parameters: int
    trainable: int
    weight_bytes: int
    largest_layer_bytes: int
    footprint: Footprint
    batch_size: int
    gpus: int
    clips: int
    precision: str
    checkpointing: bool
    freeze_policy: str
    optimizer: str
    device_tflops: float
    mfu: float

    @property
    def optimizer_bytes(self) -> int:
        return OPTIMIZER_STATES[self.optimizer] * self.footprint.gradient_bytes

    @property
    def bucket_bytes(self) -> int:
        """DistributedDataParallel's copy of the gradients (unless ``gradient_as_bucket_view``)."""
        return self.footprint.gradient_bytes if self.gpus > 1 else 0

    @property
    def ddp_bytes(self) -> int:
        return self.weight_bytes + self.optimizer_bytes + self.bucket_bytes + self.footprint.peak_bytes

    @property
    def sharded_bytes(self) -> int:
        """Weights, gradients and optimiser states of one GPU out of ``gpus``."""
        return (self.weight_bytes + self.footprint.gradient_bytes + self.optimizer_bytes) // self.gpus

    @property
    def fsdp_bytes(self) -> int:
        return self.sharded_bytes + 2 * self.largest_layer_bytes + self.footprint.activation_bytes

    @property
    def flops_per_clip(self) -> float:
        return self.footprint.step_flops / self.batch_size

    @property
    def clips_per_second(self) -> float:
        """Of one GPU."""
        return self.device_tflops * 1e12 * self.mfu / self.flops_per_clip

    @property
    def gpu_hours(self) -> float:
        return self.clips / self.clips_per_second / 3600

    def to_dict(self) -> dict[str, Any]:
        derived = ("optimizer_bytes", "ddp_bytes", "fsdp_bytes", "flops_per_clip", "clips_per_second", "gpu_hours")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    def __str__(self) -> str:
        return "\n".join(lines(self))


def estimate(
    backbone: str,
    *,
    batch_size: int = 8,
    gpus: int = 1,
    clips: int = 1_000_000,
    precision: str = "bf16-mixed",
    checkpointing: bool = False,
    freeze_policy: str | Sequence[str] = "none",
    optimizer: str = "adamw",
    device_tflops: float | None = None,
    mfu: float = 0.35,
    **settings: Any,
) -> Estimate:
    """Estimate a training. Nothing is downloaded, and no weights are read or made.

    Args:
        backbone: alias, ``timm:NAME``, ``open_clip:ARCH`` or ``nano_clip``.
        batch_size: clips for each GPU and step.
        gpus: in all nodes together.
        clips: seen in the whole training.
        precision: ``32-true`` | ``bf16-mixed`` | ``16-mixed`` | ``bf16-true``.
        checkpointing: run blocks again in backward instead of keeping their activations.
        freeze_policy: as in ``img2vid.tuning.freeze``.
        optimizer: ``adamw`` | ``sgd``.
        device_tflops: peak of the GPU at this precision; None for an A100's.
        mfu: share of the peak that training reaches ("model FLOPs utilisation", recomputation included here).
        settings: fields of ``VideoConfig``, such as ``num_frames=16``.

    Raises:
        Img2VidError: a setting out of range, or a backbone that is unknown or unsupported.
    """
    one_of("precision", precision, TRAINING_PRECISIONS)
    one_of("optimizer", optimizer, tuple(OPTIMIZER_STATES))
    device_tflops = A100_TFLOPS[precision] if device_tflops is None else device_tflops
    for name, value in {"batch_size": batch_size, "gpus": gpus, "clips": clips}.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r}: expected a whole number of at least 1.")
    if not (math.isfinite(device_tflops) and device_tflops > 0.0):
        raise ConfigError(f"device_tflops={device_tflops!r}: expected TFLOP/s above 0, such as 312 for an A100.")
    if not 0.0 < mfu <= 1.0:
        raise ConfigError(f"mfu={mfu!r}: expected a share of the peak, above 0 and at most 1.")
    config = VideoConfig.from_dict({**settings, "backbone": backbone})
    loaded = load_backbone(backbone, image_size=config.image_size, arguments=config.backbone_args, on_meta=True)
    if precision == "bf16-true":
        loaded.model.to(torch.bfloat16)
    model = build_model(loaded, config)
    model.set_grad_checkpointing(checkpointing)
    freeze(model, freeze_policy)
    sizes = sizes_of(model)
    footprint = measure_on_nothing(model, batch_size, autocast=precision.endswith("mixed"))
    return Estimate(
        backbone=backbone,
        settings={"image_size": image_tower_of(model).tower.image_size, "num_frames": config.num_frames, **settings},
        **sizes,
        footprint=footprint,
        batch_size=batch_size,
        gpus=gpus,
        clips=clips,
        precision=precision,
        checkpointing=checkpointing,
        freeze_policy=freeze_policy if isinstance(freeze_policy, str) else ", ".join(freeze_policy),
        optimizer=optimizer,
        device_tflops=device_tflops,
        mfu=mfu,
    )


def sizes_of(model: VideoModel | VideoTextModel) -> dict[str, int]:
    parameters = list(model.parameters())
    size = parameters[0].element_size()
    layers: dict[str, int] = {}
    for group in layer_groups(model):
        layers[group.name] = layers.get(group.name, 0) + group.numel()
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "weight_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "largest_layer_bytes": max(layers.values()) * size,
    }


def lines(e: Estimate) -> list[str]:
    """The estimate as people read it, arithmetic included."""
    cost, size = e.footprint, " x ".join(map(str, e.settings["image_size"]))
    states = OPTIMIZER_STATES[e.optimizer]
    forward = cost.forward_flops / e.batch_size
    again = ", blocks run twice" if e.checkpointing else ""
    steps = math.ceil(e.clips / (e.batch_size * e.gpus))
    per_number = cost.gradient_bytes / e.trainable
    sent = 2 * (e.gpus - 1) / e.gpus * cost.gradient_bytes
    frames_per_second = e.clips_per_second * e.settings["num_frames"]
    gpus = f"{e.gpus} GPU" + "s" * (e.gpus > 1)

    def memory(what: str, size: float, how: str) -> str:
        return f"  {what:<36}{in_units(size):>11}   {how}".rstrip()

    return [
        f"{e.backbone}: {e.settings['num_frames']} frames of {size} pixels, {e.precision}, {e.optimizer}, "
        f"{e.batch_size} clips for each GPU, {gpus}",
        f"Parameters   {e.parameters:,}, of which {e.trainable:,} train (freeze_policy: {e.freeze_policy})",
        f"FLOPs        forward {forward / 1e9:,.1f} G a clip, training {e.flops_per_clip / 1e9:,.1f} G a clip "
        f"({e.flops_per_clip / forward:.2f} x{again}); measured on fake tensors",
        "Memory of one GPU, everything replicated (DDP)",
        memory("weights", e.weight_bytes, f"{e.parameters / 1e6:,.1f} M parameters"),
        memory("optimiser states", e.optimizer_bytes, f"{states} x {in_units(cost.gradient_bytes)}"),
        memory("gradient buckets", e.bucket_bytes, f"{e.trainable / 1e6:,.1f} M x {per_number:g} bytes, none on 1 GPU"),
        memory("activations and gradients, at most", cost.peak_bytes, "measured on fake tensors"),
        memory("total", e.ddp_bytes, ""),
        f"Memory of one GPU, sharded over {gpus} (FSDP2)",
        memory("weights, gradients, optimiser", e.sharded_bytes, f"all of them / {e.gpus}"),
        memory("layers gathered", 2 * e.largest_layer_bytes, "2 x the largest, as the next is fetched ahead"),
        memory("activations, at most", cost.activation_bytes, "measured on fake tensors"),
        memory("total", e.fsdp_bytes, ""),
        f"  Kept from forward to backward: {in_units(cost.stored_bytes)}. The GPU's own context, gaps in its memory "
        "and workspaces come on top.",
        "Time, by arithmetic",
        f"  {e.device_tflops:g} TFLOP/s x {e.mfu:g} / {e.flops_per_clip / 1e12:.4g} TFLOP = {e.clips_per_second:,.4g} "
        f"clips/s on each GPU, for which {frames_per_second:,.4g} frames/s must be decoded",
        f"  {e.clips:,} clips / {e.clips_per_second:,.4g} clips/s / 3600 = {e.gpu_hours:,.3g} GPU-hours",
        f"  {e.gpu_hours:,.3g} GPU-hours / {gpus} = {e.gpu_hours / e.gpus:,.3g} hours; {steps:,} steps",
        f"  gradients that each GPU sends in a step: {in_units(sent)} (ring all-reduce, 2 (n - 1) / n of them)",
    ]


def in_units(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"
