"""A causal video model that is shown frames one at a time, as they come, and answers after each.

    model = img2vid.convert("vit_base", num_frames=8, causal=True)
    stream = model.stream(window=16)
    for frame in frames:          # (B, C, H, W), normalised like the backbone's images
        now = stream(frame)       # now.frame (B, D), now.clip (B, D)

What it answers is what ``model`` computes offline of the frames so far, up to rounding: without a window, frame t's
feature is row t of ``model.frame_features(clips)``, of any clip that begins with these frames.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from img2vid.clips import ClipError
from img2vid.config import whole_number
from img2vid.errors import Img2VidError
from img2vid.temporal.causal import Past
from img2vid.temporal.eager import uncompiled
from img2vid.temporal.pooling import first

if TYPE_CHECKING:
    from img2vid.model import VideoModel
    from img2vid.two_towers import VideoTextModel


MOST_STEPS = 2**31 - 1


class StreamError(Img2VidError):
    """A model that cannot be streamed, or frames that do not continue a stream."""


@dataclass
class Moment:
    """What a stream knows after a frame, or after each of several.

    Args:
        frame: features of the frame (B, D), informed by those before it; of several frames (B, T, D).
        clip: the clip feature so far (B, D), or (B, T, D): the mean of frame features, of the window's where there is
            one; in the space of texts, where the model has a text tower.
        logits: (B, num_classes), or (B, T, num_classes), of a model with a classifier of ours; else None.
    """

    frame: Tensor
    clip: Tensor
    logits: Tensor | None = None


class Stream:
    """Frames in, one after the other; ``model.stream()`` makes one. Several streams of a model do not disturb each
    other, nor its ordinary forwards. B videos at a time are B streams side by side.

    Args:
        model: causal, in eval mode.
        window: steps that a frame sees in each layer, itself included, and that the clip feature is the mean of; memory
            is constant then. None for all there have been: keys and values of every frame are kept.

    Of frames seen, keys and values are kept, not pixels: after a change of weights a stream would go on with what the
    old ones made of them, so reset() it. A model that is moved, cast or fused goes on.

    The windows are of layers: what a frame knows reaches back ``window - 1`` frames further with each layer. That is
    what an offline forward gives whose attention along time has that band for a mask, and showing a new stream a whole
    clip at once is that forward.

    Frame t gets the t-th time embedding, and the last one again where there are fewer (``time_embed_resample="hold"``).
    """

    def __init__(self, model: VideoModel | VideoTextModel, window: int | None = None) -> None:
        self.video = getattr(model, "visual", model)
        self.model = model
        self.window = None if window is None else whole_number("window", window, most=MOST_STEPS)
        check_causal(self.video)
        self.reset()

    def reset(self) -> None:
        """Forget all frames; another video may follow, of another size and number."""
        self.past = Past(self.window)
        self.shape: tuple[int, ...] | None = None
        self.mean: Tensor | None = None  # (B, D), of the frame features so far, and how many those are
        self.count = 0
        self.recent: deque[Tensor] = deque(maxlen=self.window)  # (B, D) each, where there is a window
        self.interrupted = False

    @property
    def num_frames(self) -> int:
        """Frames shown so far."""
        return self.past.num_steps * self.video.config.tubelet_size

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Moment:
        """One frame (B, C, H, W), or the next few (B, T, C, H, W); a multiple of ``tubelet_size`` where that is set.

        Raises:
            ClipError: they are no frames this model can take.
            StreamError: they do not continue this stream, or it was interrupted in the middle of a frame.
        """
        clips = self.checked(frames)
        self.interrupted = True  # until all layers have seen the frames
        with self.video.clip.after(self.past), uncompiled():
            features = first(self.video.frame_features(clips))  # (B, T, D)
        self.past.num_steps += features.shape[1]
        means = torch.stack([self.running_mean(x) for x in self.in_pool(features).unbind(1)], dim=1)
        self.interrupted = False
        classifier = None if self.video.config.num_classes is None else self.video.classifier
        moment = Moment(features, means, None if classifier is None else classifier(means))
        if frames.ndim == 5:
            return moment
        return Moment(*(None if x is None else x[:, 0] for x in (moment.frame, moment.clip, moment.logits)))

    def in_pool(self, features: Tensor) -> Tensor:
        """Frame features as the clip feature averages them: where texts are, if there are texts."""
        return self.model.to_text_space(features) if self.model is not self.video else features

    def running_mean(self, feature: Tensor) -> Tensor:
        """The next frame's feature (B, D) -> the mean so far (B, D)."""
        if self.window is not None:
            self.recent.append(feature)
            return torch.stack([x.to(feature) for x in self.recent], dim=1).mean(dim=1)
        # in float64, as a mean of thousands of frames no longer moves in the precision of half a feature
        wide = torch.float32 if feature.device.type == "mps" else torch.float64
        self.count += 1
        new = feature.to(wide)
        self.mean = new if self.mean is None else self.mean.to(new) + (new - self.mean.to(new)) / self.count
        return self.mean.to(feature.dtype)

    def checked(self, frames: Tensor) -> Tensor:
        """Frames as clips (B, T, C, H, W) that continue this stream."""
        check_causal(self.video)  # it may have been grafted since
        if self.video.training:
            raise StreamError("This model is in training mode, where frames are dropped at random: model.eval() first.")
        if self.interrupted:
            raise StreamError("The last frame was interrupted, so some layers have seen it and others not: reset().")
        if not isinstance(frames, Tensor) or frames.ndim not in (4, 5):
            given = tuple(frames.shape) if isinstance(frames, Tensor) else type(frames).__name__
            raise ClipError(f"A stream takes a frame (B, C, H, W) or the next few (B, T, C, H, W); {given} was given.")
        size = self.video.config.tubelet_size
        if frames.ndim == 4 and size > 1:
            raise ClipError(f"This model sees tubelets of {size} frames: give {size} at a time, (B, {size}, C, H, W).")
        clips = frames.unsqueeze(1) if frames.ndim == 4 else frames
        self.video.check(clips)
        shape = (len(clips), *clips.shape[2:])
        if self.shape is not None and shape != self.shape:
            raise StreamError(
                f"This stream is of {self.shape[0]} videos of {tuple(self.shape[1:])}, (B, C, H, W) = {self.shape}; "
                f"{shape} was given. For other videos: reset(), or another stream."
            )
        self.shape = shape
        return clips


class Streaming:
    """``stream()`` of a model."""

    def stream(self, window: int | None = None) -> Stream:
        """Show the model frames one at a time; see ``img2vid.streaming.Stream``.

        Args:
            window: frames that a frame sees in each layer, itself included; None for all before it.

        Raises:
            StreamError: frames of this model depend on later ones.
        """
        return Stream(self, window)


def check_causal(video: Any) -> None:
    looking_ahead = [graft.name for graft in video.grafts if graft.mixes_frames]
    if looking_ahead:
        raise StreamError(
            f"In this model a frame sees later frames through {', '.join(looking_ahead)}, so it cannot answer before "
            "they are there. Take that off (img2vid.grafts.remove), or train a model without."
        )
    if video.config.causal or not video.config.mixes_frames:
        return
    raise StreamError(
        f"In this model (attention={video.config.attention!r}) a frame sees later frames, so it cannot answer before "
        "they are there. Convert with causal=True (--causal) and train that; a model trained without has learned to "
        "look ahead."
    )
