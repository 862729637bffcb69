"""The certificate: proof, by running it, that a video model still is its image model, and that it can learn.

Four kinds of clip are shown to both models on the same folded batch (one frame; one frame repeated; different frames;
those frames shuffled), and what comes out of every block and of the whole is compared. Then the gates are pushed off
zero (the output must move), closed again (it must come back bit for bit), and two optimiser steps show where gradient
arrives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from img2vid.backbones import describe
from img2vid.config import VideoConfig
from img2vid.errors import Img2VidError
from img2vid.model import VideoModel, VideoTextModel, first
from img2vid.temporal.block import SpaceTimeBlock

KINDS = ("single", "static", "moving", "shuffled")
CLOSE = 1e-4  # relative to the largest feature; fp32 rounding stays two orders below, a broken rule two above


@dataclass(frozen=True)
class Guarantee:
    """Which clips a conversion leaves unchanged at step 0: ``bitwise``, ``close`` (up to rounding), or not at all."""

    summary: str
    strength: dict[str, str] = field(default_factory=dict)  # kind of clip: "bitwise" | "close"

    @classmethod
    def of(cls, config: VideoConfig, num_prefix_tokens: int) -> Guarantee:
        """What ``config`` promises on a backbone with that many prefix tokens inside its blocks."""
        attention, prefix = config.attention, config.prefix_mode if num_prefix_tokens else "per_frame"
        if attention == "divided_space_time" and config.gate == "none" and config.temporal_init != "zeros":
            return cls("none: the temporal branch has no gate")
        if attention == "joint_space_time":
            kinds = ("single", "static") if prefix == "per_frame" or not num_prefix_tokens else ("single",)
            promise = cls(f"{' and '.join(kinds)} clips, up to rounding", dict.fromkeys(kinds, "close"))
        elif prefix == "shared":
            promise = cls("single and static clips, up to rounding", dict.fromkeys(("single", "static"), "close"))
        elif prefix == "global":
            promise = cls("single frames, up to rounding", {"single": "close"})
        else:
            promise = cls("any clip, bit for bit on the same folded batch", dict.fromkeys(KINDS, "bitwise"))
        if config.tubelet_size > 1 and config.tubelet_init == "average":
            kinds = {kind: "close" for kind in ("single", "static") if kind in promise.strength}
            return cls("static clips, up to rounding (averaged tubelets)" if kinds else promise.summary, kinds)
        if config.tubelet_size > 1:
            return cls(f"{promise.summary}, of each tubelet's central frame", promise.strength)
        return promise


@dataclass
class Comparison:
    """One clip shown to both models. Differences are the largest absolute ones."""

    kind: str
    num_frames: int
    claimed: str | None  # "bitwise" | "close" | None
    feature_difference: float
    frame_difference: float
    layer_differences: list[float]
    scale: float  # largest absolute feature of the image model

    @property
    def held(self) -> bool | None:
        """Whether the claim held; None where nothing is claimed."""
        if self.claimed is None:
            return None
        outputs = (self.feature_difference, self.frame_difference)
        if self.claimed == "bitwise":
            return all(difference == 0.0 for difference in (*outputs, *self.layer_differences))
        return all(difference <= CLOSE * max(1.0, self.scale) for difference in outputs)  # False for nan


@dataclass
class Liveness:
    """Gradient norms of one layer's gate and temporal attention at two optimiser steps."""

    layer: str
    gate: tuple[float, float] | None  # None for an ungated branch
    attention: tuple[float, float]

    @property
    def alive(self) -> bool:
        return (self.gate is None or self.gate[0] > 0.0) and self.attention[1] > 0.0


@dataclass
class Certificate:
    """Everything that was measured; ``str()`` is the table, ``to_dict()`` the JSON."""

    backbone: str | None
    attention: str
    prefix_mode: str
    guarantee: Guarantee
    num_zero_parameters: int
    gates_moved: float  # largest absolute value among the parameters that start at zero
    comparisons: list[Comparison]
    image_weights_equal: tuple[int, int]  # tensors equal to the image model's, of how many
    perturbed_difference: float | None  # None where there is no gate to move
    closed_difference: float | None
    liveness: list[Liveness]
    expected_alive: bool
    text_difference: float | None = None

    @property
    def held(self) -> bool:
        """Whether every claimed guarantee held (with gates closed, for a model whose gates have moved)."""
        return all(c.held is not False for c in self.comparisons) and not self.text_difference

    @property
    def reversible(self) -> bool:
        return self.closed_difference in (None, 0.0) and self.perturbed_difference != 0.0

    @property
    def alive(self) -> bool:
        return all(layer.alive for layer in self.liveness)

    @property
    def ok(self) -> bool:
        return self.held and self.reversible and (self.alive or not self.expected_alive)

    def to_dict(self) -> dict[str, Any]:
        verdicts = {"ok": self.ok, "held": self.held, "reversible": self.reversible, "alive": self.alive}
        measured = asdict(self)
        for row, comparison in zip(measured["comparisons"], self.comparisons, strict=True):
            row["held"] = comparison.held
        return {**verdicts, **measured}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __str__(self) -> str:
        from img2vid.reporting import render_certificate

        return render_certificate(self)


def certify(
    model: VideoModel | VideoTextModel,
    reference: nn.Module,
    *,
    num_frames: Sequence[int] | None = None,
    seed: int = 0,
) -> Certificate:
    """Compare a video model with the image model it came from. Weights are the same afterwards.

    Args:
        model: a ``VideoModel`` or ``VideoTextModel``. Where training has moved its gates, the claim is about the model
            with gates closed, and ``perturbed_difference`` says how far it has come.
        reference: the image model, as its library made it: a timm model, or an open_clip model or image tower.
        num_frames: numbers of frames T to try; by default 1, 2, 3 and the model's own.
        seed: of the random clips and perturbations.

    Raises:
        Img2VidError: the reference is not an image model of the same architecture.
    """
    video = model.visual if isinstance(model, VideoTextModel) else model
    image = getattr(reference, "visual", reference)
    check_reference(video, image)
    generator = torch.Generator().manual_seed(seed)
    zero_parameters = video.zero_parameters()
    guarantee = Guarantee.of(video.config, video.tower.num_prefix_tokens)
    frames = sorted(set(num_frames or (1, 2, 3, video.config.num_steps)))
    with in_eval_mode(model, reference):
        with torch.no_grad(), video.gates_closed():
            comparisons = [
                compare(video, image, kind, t, guarantee.strength.get(kind), generator)
                for t in frames
                for kind in kinds_for(t, frames)
            ]
        gates_moved = max((largest(p.detach()) for p in zero_parameters.values()), default=0.0)
        perturbed, closed = three_acts(video, generator, perturb=gates_moved == 0.0)
        liveness = measure_liveness(video, generator)
        text_difference = compare_text(model, reference, generator)
    return Certificate(
        backbone=video.config.backbone,
        attention=video.config.attention,
        prefix_mode=video.config.prefix_mode,
        guarantee=guarantee,
        num_zero_parameters=sum(p.numel() for p in zero_parameters.values()),
        gates_moved=gates_moved,
        comparisons=comparisons,
        image_weights_equal=equal_weights(video, image),
        perturbed_difference=perturbed,
        closed_difference=closed,
        liveness=liveness,
        expected_alive=video.config.temporal_init != "zeros",
        text_difference=text_difference,
    )


def check_reference(video: VideoModel, image: nn.Module) -> None:
    if isinstance(image, VideoModel):
        raise Img2VidError("The reference of a certificate is the image model, but a VideoModel was given.")
    if not isinstance(video.base, type(image)) and not isinstance(image, type(video.base)):
        raise Img2VidError(
            f"The reference is a {type(image).__name__}, but the model was made from a {type(video.base).__name__}."
        )


def kinds_for(num_frames: int, frames: Sequence[int]) -> tuple[str, ...]:
    """All kinds of clip at the smallest T above one, moving clips (the hard case) at the others."""
    if num_frames == 1:
        return ("single",)
    return ("static", "moving", "shuffled") if num_frames == min(t for t in frames if t > 1) else ("static", "moving")


def make_clips(video: VideoModel, kind: str, num_steps: int, generator: torch.Generator) -> Tensor:
    """Seeded noise clips (2, T, C, H, W) of one kind; T counts frames, tubelet_size for each step."""
    size, weight = video.tower.image_size, next(video.parameters())
    num_frames = num_steps * video.config.tubelet_size
    clips = torch.randn(2, num_frames, 3, *size, generator=generator)
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
        scale=largest(expected),
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
    return largest(model.encode_text(tokens) - reference.encode_text(tokens, normalize=False))


def equal_weights(video: VideoModel, image: nn.Module) -> tuple[int, int]:
    """How many of the image model's tensors the video model holds unchanged, and how many there are."""
    own, theirs = video.state_dict(), image.state_dict()
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
                noise = 0.02 * torch.randn(parameter.shape, generator=generator)
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
                    parameter -= step_size * grads[parameter] / grads[parameter].norm().clamp_min(1e-12)

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
        path: (list(block.temporal_fc.parameters()), list(block.temporal_attn.parameters()))
        for path, block in video.tower.blocks
        if isinstance(block, SpaceTimeBlock)
    }
    if video.config.attention == "factorised_encoder":
        for i, block in enumerate(video.temporal_encoder.blocks):
            gates = [*block.attn_fc.parameters(), *block.fc2.parameters()]
            layers[f"temporal_encoder.blocks.{i}"] = (gates, list(block.attn.parameters()))
    return layers


def certify_folder(folder: str, num_frames: Sequence[int] | None = None) -> Certificate:
    """Certify a saved model against its backbone, built afresh by its own library.

    The reference gets the image weights that the folder holds, so the proof is about the function: that the video
    model with closed gates computes what the image library computes from these weights.

    Raises:
        WeightsError: not a folder of ours, or one whose backbone has no name to build it from.
    """

    from img2vid.backbones import load_backbone
    from img2vid.checkpoints.native import load
    from img2vid.weights import load_weights

    model = load(folder)
    config = model.config
    backbone = load_backbone(
        config.backbone, random_weights=True, image_size=config.image_size, arguments=config.backbone_args
    )
    image = backbone.model if isinstance(model, VideoTextModel) else backbone.tower.module
    image.to(next(model.parameters()).dtype)
    own = model.state_dict()
    load_weights(image, {key: tensor for key, tensor in own.items() if model.origin(key) == "pretrained"})
    return certify(model, image, num_frames=num_frames)
