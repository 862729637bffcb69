"""The model card that is saved beside the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from img2vid._version import __version__

if TYPE_CHECKING:
    from img2vid.certificate import Certificate
    from img2vid.model import VideoModel, VideoTextModel


def model_card(model: VideoModel | VideoTextModel, certificate: Certificate | None) -> str:
    """Markdown with the hub's front matter: what it was made from, how, what was proven, and how to run it."""
    config, has_text = model.config, hasattr(model, "encode_video")
    source = config.backbone or "a module passed in by hand"
    settings = "\n".join(
        f"| {name} | {value} |"
        for name, value in config.to_dict().items()
        if value not in (None, {}) and name != "backbone"
    )
    run = (
        f'clip = img2vid.read_clip("video.mp4", num_frames={config.num_frames})'
        "\nclips = model.normalize(clip[None])  # (1, T, 3, H, W); resize to the backbone's size first\n"
    )
    run += (
        'text = model.encode_text(model.tokenize(["a photo of a cat", "a photo of a dog"]), normalize=True)\n'
        "scores = model.encode_video(clips, normalize=True) @ text.T"
        if has_text
        else "output = model(clips)"
    )
    proven = (
        f"```\n{certificate}\n```"
        if certificate is not None
        else "No certificate was made when this was saved. Run `img2vid certify FOLDER`."
    )
    return f"""---
library_name: img2vid
pipeline_tag: {"zero-shot-image-classification" if has_text else "video-classification"}
tags:
- img2vid
- video
---

# {source} as a video model

A {type(model).__name__} made from **{source}** by img2vid {__version__}. Its image weights keep their names and values;
what is new starts behind gates at zero.

| setting | value |
|---|---|
{settings}

## Certificate

{proven}

## Use

```python
import img2vid

model = img2vid.load("this folder")
{run}
```
"""
