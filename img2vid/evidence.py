"""What a certificate is made of: clips, comparisons with the image model, the three acts, and gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from img2vid.backbones import describe
from img2vid.model import VideoModel, first
from img2vid.temporal.block import SpaceTimeBlock

# What "up to rounding" may be, relative to the largest feature. Measured rounding stays an order of magnitude below,
# broken rules an order or more above.
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class Comparison:
    """One clip shown to both models. Differences are the largest absolute ones."""

    kind: str
    num_frames: int
    claimed: str | None  # "bitwise" | "close" | None
    feature_difference: float
    frame_difference: float
    layer_differences: list[float]
    tolerance: float  # what counts as close: depends on the precision and on the largest feature

    @property
    def held(self) -> bool | None:
        """Whether the claim held; None where nothing is claimed."""
        if self.claimed is None:
            return None
        outputs = (self.feature_difference, self.frame_difference)
        if self.claimed == "bitwise":
            return all(difference == 0.0 for difference in (*outputs, *self.layer_differences))
        return all(difference <= self.tolerance for difference in outputs)  # False for nan


@dataclass
class Liveness:
    """Gradient norms of one layer's gate and temporal attention at two optimiser steps."""

    layer: str
    gate: tuple[float, float] | None  # None for an ungated branch
    attention: tuple[float, float]

    @property
    def alive(self) -> bool:
        return (self.gate is None or self.gate[0] > 0.0) and self.attention[1] > 0.0


def kinds_for(num_frames: int, frames: Sequence[int]) -> tuple[str, ...]:
    """All kinds of clip at the smallest T above one, moving clips (the hard case) at the others."""
    if num_frames == 1:
        return ("single",)
    return ("static", "moving", "shuffled") if num_frames == min(t for t in frames if t > 1) else ("static", "moving")


def make_clips(video: VideoModel, kind: str, num_steps: int, generator: torch.Generator) -> Tensor:
    """Seeded noise clips (2, T, C, H, W) of one kind; T counts frames, tubelet_size for each step."""
    size, weight = video.tower.image_size, next(video.parameters())
    num_frames = num_steps * video.config.tubelet_size
    clips = torch.randn(2, num_frames, video.tower.in_channels, *size, generator=generator)
    if kind == "static" or (kind == "single" and video.config.tubelet_init == "average"):
        clips = clips[:, :1].expand_as(clips)
    if kind == "shuffled":
        clips = clips[:, torch.randperm(num_frames, generator=generator)]
    return clips.to(weight.device, weight.dtype)


def central_frames(video: VideoModel, clips: Tensor) -> Tensor:
    """The frames the image model sees: every one, or the middle one of each tubelet. (B, T, C, H, W) -> (B*T, ...)."""
    size = video.config.tubelet_size
    return clips.unflatten(1, (-1, size))[:, :, size // 2].flatten(0, 1)


def compare(
    video: VideoModel,
    image: nn.Module,
    kind: str,
    num_steps: int,
    claimed: str | None,
    generator: torch.Generator,
) -> Comparison:
    """Show one clip to both models, the image model on the same folded batch."""
    clips = make_clips(video, kind, num_steps, generator)
    with recorded([block for _, block in video.tower.blocks]) as layers:
        frame_features = first(video.frame_features(clips))
    with recorded([block for _, block in describe(image).blocks]) as expected_layers:
        expected = first(image(central_frames(video, clips))).unflatten(0, (len(clips), num_steps))
    return Comparison(
        kind=kind,
        num_frames=clips.shape[1],
        claimed=claimed,
        feature_difference=largest(first(video.clip_features(clips)) - expected.mean(dim=1)),
        frame_difference=largest(frame_features - expected),
        layer_differences=[largest(a - b) for a, b in zip(layers, expected_layers, strict=True)],
        tolerance=CLOSE[clips.dtype] * largest(expected),
    )


def largest(x: Tensor) -> float:
    return float(x.abs().max())


@contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What each block puts out, in order."""
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda module, args, out: outputs.append(out.detach())) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def in_eval_mode(*modules: nn.Module) -> Iterator[None]:
    were_training = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, training in zip(modules, were_training, strict=True):
            module.train(training)


@torch.no_grad()
def compare_text(model: nn.Module, reference: nn.Module, generator: torch.Generator) -> float | None:
    """Largest difference between both models' text features on random tokens; None where either has no text tower."""
    if not (hasattr(model, "encode_text") and hasattr(reference, "encode_text")):
        return None
    length = model.context_length if isinstance(getattr(model, "context_length", None), int) else 16
    vocabulary = model.vocab_size if isinstance(getattr(model, "vocab_size", None), int) else 100
    tokens = torch.randint(1, vocabulary, (2, length), generator=generator).to(next(model.parameters()).device)
    return largest(model.encode_text(tokens, normalize=False) - reference.encode_text(tokens, normalize=False))


def fingerprint(model: nn.Module, image_model: nn.Module | None = None) -> str:
    """SHA-256 of all weights by name; of a video model, of those named like ``image_model``'s."""
    state, digest = model.state_dict(), hashlib.sha256()
    for key in sorted(state if image_model is None else image_model.state_dict()):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def equal_weights(video: VideoModel, image: nn.Module) -> tuple[int, int]:
    """How many of the image model's tensors the video model holds unchanged, and how many should be."""
    own, theirs = video.state_dict(), image.state_dict()
    if video.config.tubelet_size > 1 and video.config.tubelet_init == "average":  # divides the patch projection
        averaged = next(name for name, p in image.named_parameters() if p is describe(image).patch_conv.weight)
        theirs.pop(averaged)
    return sum(key in own and torch.equal(own[key], tensor) for key, tensor in theirs.items()), len(theirs)


@torch.no_grad()
def three_acts(video: VideoModel, generator: torch.Generator, perturb: bool) -> tuple[float | None, float | None]:
    """Closed = base; open must differ; closed again = base. Returns how far acts two and three are from act one.

    Args:
        perturb: open the gates by seeded noise, for a model whose gates still are closed.
    """
    gates = video.zero_parameters()
    if not gates:
        return None, None
    clips = make_clips(video, "moving", 2, generator)

    def output() -> Tensor:
        return first(video.clip_features(clips)).clone()

    with video.gates_closed():
        base = output()
        if perturb:
            for parameter in gates.values():
                # large enough not to be rounded away
                std = 0.02 if parameter.dtype in (torch.float32, torch.float64) else 0.5
                noise = std * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise.to(parameter.device, parameter.dtype))
            opened = output()
    if not perturb:
        opened = output()
    with video.gates_closed():
        return largest(opened - base), largest(output() - base)


def measure_liveness(video: VideoModel, generator: torch.Generator, step_size: float = 0.1) -> list[Liveness]:
    """Gradient norms at two steps of gradient descent on a random linear objective, from closed gates.

    At the first step gradient can reach the gates alone, so moving them is the whole step; at the second it must reach
    the attention behind them. Ungated branches are measured as they are. All weights get their values back.
    """
    layers = temporal_layers(video)
    measured = [p for gate, attention in layers.values() for p in [*gate, *attention]]
    if not measured:
        return []
    clips = make_clips(video, "moving", 2, generator)
    steps: list[dict[nn.Parameter, float]] = []
    objective = None
    with only_requiring_grad(video, measured), video.gates_closed():
        for _ in range(2):
            features = first(video.clip_features(clips))
            if objective is None:
                objective = torch.randn(features.shape, generator=generator).to(features.device, features.dtype)
            grads = gradients((features * objective).sum(), measured)
            steps.append({p: float(grad.double().norm()) for p, grad in grads.items()})
            with torch.no_grad():
                for parameter in (p for gate, _ in layers.values() for p in gate):
                    grad = grads[parameter].float()  # norms of half precision gradients overflow
                    parameter -= (step_size * grad / grad.norm().clamp_min(1e-12)).to(parameter.dtype)

    def both(parameters: list[nn.Parameter]) -> tuple[float, float]:
        first_step, second_step = (sum(step[p] ** 2 for p in parameters) ** 0.5 for step in steps)
        return first_step, second_step

    return [Liveness(name, both(gate) if gate else None, both(attn)) for name, (gate, attn) in layers.items()]


def gradients(objective: Tensor, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Gradients by parameter, zeros where the objective does not depend on one."""
    if not objective.requires_grad:
        return {p: torch.zeros_like(p) for p in parameters}
    grads = torch.autograd.grad(objective, parameters, allow_unused=True)
    return {p: torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True)}


@contextmanager
def only_requiring_grad(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    wanted = {id(p) for p in parameters}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def temporal_layers(video: VideoModel) -> dict[str, tuple[list[nn.Parameter], list[nn.Parameter]]]:
    """Layer: (parameters of its gates, of its temporal attention), for each layer that attends along time."""
    layers = {
        path: (list(block.temporal_fc.parameters()), matrices(block.temporal_attn))
        for path, block in video.tower.blocks
        if isinstance(block, SpaceTimeBlock)
    }
    if video.config.attention == "factorised_encoder":
        for i, block in enumerate(video.temporal_encoder.blocks):
            gates = [*block.attn_fc.parameters(), *block.fc2.parameters()]
            layers[f"temporal_encoder.blocks.{i}"] = (gates, matrices(block.attn))
    return layers


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """Its weight matrices: a bias can receive gradient while the attention itself is dead."""
    return [parameter for parameter in module.parameters() if parameter.ndim > 1]
