"""The first half of a certificate: clips shown to both models, and what came out compared; weights compared too."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from img2vid.backbones import describe
from img2vid.config import VideoConfig
from img2vid.model import VideoModel
from img2vid.temporal.pooling import first

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


def kinds_for(num_frames: int, frames: Sequence[int], strength: Mapping[str, str]) -> tuple[str, ...]:
    """All kinds of clip at the smallest T above one; at the others the hardest kind that something is claimed for."""
    if num_frames == 1:
        return ("single",)
    if num_frames == min(t for t in frames if t > 1):
        return ("static", "moving", "shuffled")
    return ("moving",) if "moving" in strength else ("static",)


Size = tuple[int, int] | None  # pixels (height, width) of the clips; None for the backbone's own


def make_clips(video: VideoModel, kind: str, num_steps: int, generator: torch.Generator, size: Size = None) -> Tensor:
    """Seeded noise clips (2, T, C, H, W) of one kind; T counts frames, tubelet_size for each step."""
    size, weight = size or video.tower.image_size, next(video.parameters())
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
    size: Size = None,
) -> Comparison:
    """Show one clip to both models, the image model on the same folded batch."""
    clips = make_clips(video, kind, num_steps, generator, size)
    with recorded([block for _, block in video.tower.blocks]) as layers:
        frame_features = video.frame_features(clips)
    tower = describe(image)
    with recorded([block for _, block in tower.blocks]) as expected_layers:
        expected = first(tower.call(image, central_frames(video, clips)[:, : tower.in_channels])).unflatten(
            0, (len(clips), num_steps)
        )
    own = [first(features)[..., : expected.shape[-1]] for features in (video.pool(frame_features), frame_features)]
    return Comparison(
        kind=kind,
        num_frames=clips.shape[1],
        claimed=claimed,
        feature_difference=largest(own[0] - expected.mean(dim=1)),
        frame_difference=largest(own[1] - expected),
        layer_differences=[
            largest(same_tokens(a, b, tower.num_prefix_tokens) - b)
            for a, b in zip(layers, expected_layers, strict=True)
        ],
        tolerance=CLOSE[clips.dtype] * largest(expected),
    )


def same_tokens(tokens: Tensor, expected: Tensor, num_prefix: int) -> Tensor:
    """Without the tokens that a graft has put into the stream, which stand between prefix and patches."""
    more = tokens.shape[1] - expected.shape[1]
    return torch.cat([tokens[:, :num_prefix], tokens[:, num_prefix + more :]], dim=1) if more else tokens


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
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Inside, everything is in eval mode; afterwards each module is in the mode it was in, frozen parts included."""
    modes = [(module, module.training) for model in models for module in [model, *model.modules()]]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def compare_text(model: nn.Module, reference: nn.Module, generator: torch.Generator) -> float | None:
    """Largest difference between both models' text features on random tokens; None where either has no text tower."""
    if not (hasattr(model, "encode_text") and hasattr(reference, "encode_text")):
        return None
    length = model.context_length if isinstance(getattr(model, "context_length", None), int) else 16
    vocabulary = model.vocab_size if isinstance(getattr(model, "vocab_size", None), int) else 100
    tokens = torch.randint(1, vocabulary, (2, length), generator=generator).to(next(model.parameters()).device)
    return largest(model.encode_text(tokens, normalize=False) - reference.encode_text(tokens, normalize=False))


def image_weights(model: nn.Module, reference: nn.Module, config: VideoConfig) -> dict[str, Tensor]:
    """What ``model`` holds under the keys of ``reference``, bar a patch projection that was divided among frames.

    Args:
        model: the image model itself, or the video model it became.
        reference: the image model, for its names.
        config: of the video model, which knows what was changed on purpose.
    """
    state, keys = model.state_dict(), reference.state_dict().keys()
    if config.tubelet_size > 1 and config.tubelet_init == "average":
        patches = describe(getattr(reference, "visual", reference)).patch_conv.weight
        keys = keys - {name for name, parameter in reference.named_parameters() if parameter is patches}
    return {key: state[key] for key in sorted(keys)}


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bits of all tensors."""
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
