"""The model card that is saved beside the weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import timm
from open_clip.pretrained import get_pretrained_cfg
from torch import Tensor

from img2vid._version import __version__
from img2vid.backbones.names import parse_name
from img2vid.checkpoints.importing import DIALECTS
from img2vid.config import QUIRKS, VideoConfig
from img2vid.proof.guarantees import Guarantee

if TYPE_CHECKING:
    from img2vid.certificate import Certificate
    from img2vid.model import VideoModel
    from img2vid.training.movement import Movement
    from img2vid.two_towers import VideoTextModel


def model_card(
    model: VideoModel | VideoTextModel,
    certificate: Certificate | None,
    state: Mapping[str, Tensor] | None = None,
    movement: Movement | None = None,
) -> str:
    """Markdown with the hub's front matter: what it was made from, how, what was proven, and how to run it.

    Args:
        state: the weights, where the model holds only its share of them; None for the model's own.
        movement: how far training moved it.
    """
    zeros = model.zero_parameters()
    values = zeros if state is None else state
    moved = [bool(values[name].detach().any()) for name in zeros]
    config, has_text = model.config, hasattr(model, "encode_video")
    video = model.visual if has_text else model
    kind = "VideoTextModel" if has_text else "VideoModel"  # the type's own name, also where FSDP put another in front
    source = config.backbone or f"a {type(video.base).__name__} passed in by hand"
    settings = "\n".join(
        f"| {name} | {value} |"
        for name, value in {**config.to_dict(), "backbone_args": told_arguments(config)}.items()
        if value not in (None, {}, ()) and name not in ("backbone", "quirks")
    )
    run = (
        f'clip = img2vid.read_clip("video.mp4", num_frames={config.num_frames})'
        "\nclips = model.normalize(clip[None])  # (1, T, 3, H, W); resize to the backbone's size first\n"
    )
    captions = has_text and not hasattr(model.base, "encode_text")
    run += (
        "print(caption(model, clips, tokenizer_of(model)))  # from img2vid.captioning import caption, tokenizer_of"
        if captions
        else 'text = model.encode_text(model.tokenize(["a photo of a cat", "a photo of a dog"]), normalize=True)\n'
        "scores = model.encode_video(clips, normalize=True) @ text.T"
        if has_text
        else "print(model.class_names[model(clips).argmax()])"
        if video.class_names
        else "output = model(clips)"
    )
    proven = (
        f"```\n{certificate}\n```"
        if certificate is not None
        else "No certificate was made when this was saved. Run `img2vid certify FOLDER`."
    )
    made_from = f"base_model: {hub_name}\n" if (hub_name := base_model(video)) else ""
    task = "zero-shot-image-classification" if has_text else "video-classification"
    task = "image-to-text" if captions else task
    trained = f"\n\n{movement}" if movement is not None else ""
    return f"""---
library_name: img2vid
{made_from}pipeline_tag: {task}
tags:
- img2vid
- video
---

{heading(kind, source, video, moved)}{trained}

| setting | value |
|---|---|
{settings}
{peculiarities(config)}
## Certificate

{proven}

## Use

```python
import img2vid

model = img2vid.load("this folder")
{run}
```
"""


def heading(kind: str, source: str, video: VideoModel, moved: list[bool]) -> str:
    """Title and first paragraphs: a conversion of an image model, or somebody's video model taken in."""
    theirs = next((d.title for d in DIALECTS.values() if video.image_weights.startswith(f"{d.title}: ")), None)
    if theirs is None:
        return (
            f"# {source} as a video model\n\nA {kind} made from **{source}** by img2vid {__version__}. "
            f"{origin_of_weights(video)}\n\n{step_zero(video, moved)}"
        )
    name = video.image_weights.removeprefix(f"{theirs}: ")
    return (
        f"# {name}, of {theirs}\n\nA {kind} that img2vid {__version__} has imported from **{name}**, a "
        f"checkpoint of {theirs}: every key is accounted for, and where nothing was resampled it computes what its "
        f"authors' code computes. The image model inside, of the sizes below, is {source}, under that library's names."
    )


def told_arguments(config: VideoConfig) -> dict[str, Any]:
    """``backbone_args`` for people: a whole configuration of transformers is in ``config.json``."""
    return {key: value for key, value in config.backbone_args.items() if key != "config"}


def base_model(video: VideoModel) -> str | None:
    """The repository on the hub that the image weights came from, where they came from there."""
    name = video.config.backbone
    if name is None or not video.image_weights.startswith(("timm ", "open_clip ", "transformers ")):
        return None  # random, from a file, or a video checkpoint's
    parsed = parse_name(name)
    if parsed.library == "hf":
        return None if os.path.isabs(parsed.architecture) else parsed.architecture
    if parsed.library == "timm":
        described = timm.get_pretrained_cfg(str(parsed).removeprefix("timm:"))
        home = getattr(described, "hf_hub_id", None)
        return f"{home}{described.architecture}.{described.tag}" if home and home.endswith("/") else home
    if parsed.scheme == "hf-hub:":
        return parsed.place
    home = (get_pretrained_cfg(parsed.architecture, parsed.tag) or {}).get("hf_hub", "") if parsed.tag else ""
    return "/".join(home.split("/")[:2]) or None


def peculiarities(config: VideoConfig) -> str:
    """What it does differently from a model that img2vid converts; a paragraph, or nothing."""
    lines = "".join(f"- `{name}`: {QUIRKS[name]}\n" for name in config.quirks)
    return f"\nDifferent from what img2vid does by default:\n\n{lines}" if lines else ""


def origin_of_weights(video: VideoModel) -> str:
    """Where the numbers come from; whether they are trained since, only a certificate can tell."""
    if video.image_weights == "random":
        return "It started from random weights: nothing pretrained is in it."
    return f"Its image weights came from {video.image_weights} and keep the image library's names."


def step_zero(video: VideoModel, moved: list[bool]) -> str:
    """What the conversion kept of the image model's function, and whether this model still is there.

    Args:
        moved: for each parameter that starts at zero, whether it has left it.
    """
    config, promise = video.config, Guarantee.of(video.config, video.tower.num_prefix_tokens)
    text = f"Before training, its clip feature is the image model's on {promise.summary}."
    if not promise.strength:
        text = f"It is not the image model's function, not even before training ({promise.summary})."
    if config.tubelet_size > 1 and config.tubelet_init == "average":
        text += f" The patch projection is the image model's divided by {config.tubelet_size}, once for each frame."
    if config.attention == "divided_space_time":
        text += f" {BRANCHES[config.gate]}, {ATTENTIONS[config.temporal_init]}."
    if config.causal:
        text += " A frame sees itself and earlier frames only, so frames can be shown one at a time: model.stream()."
    if config.num_classes is not None:
        text += " The classifier on top of it started at zero."
    if any(moved):
        text += " Training has moved what started at zero: the function now is another one."
    elif moved and promise.strength:
        text += " What started at zero still is at zero."
    return text


BRANCHES = {
    "temporal_fc": "Attention along time stands behind a linear gate that starts at zero",
    "tanh": "Attention along time stands behind a tanh gate that starts at zero",
    "none": "Attention along time has no gate",
}
ATTENTIONS = {
    "copy": "and started as a copy of the attention over space",
    "random": "and started from random weights",
    "zeros": "and started from weights at zero, where it cannot learn",
}
