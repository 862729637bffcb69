"""READ FIRST. A video model is an image model with frames folded into its batch, and blocks that also see time.

    clips (B, T, C, H, W) -> frames (B*T, C, H, W) -> image model -> features (B*T, D) -> (B, T, D) -> mean over T

The image model's own forward does the work, so everything it can do (position embeddings at other sizes, rotary codes,
LayerScale, pooling of any kind, ...) keeps working. What is new sits inside its blocks (``img2vid.temporal.block``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn

from img2vid.backbones import describe
from img2vid.backbones.any_size import NearestPositions, take_any_size
from img2vid.backbones.dropping import drop_once_per_clip
from img2vid.backbones.tower import ImageTower, classes_of, names_of_classes, output_dim
from img2vid.checkpoints.saving import Saving
from img2vid.clips import check_clips, check_pixels
from img2vid.config import ConfigError, VideoConfig
from img2vid.errors import BackboneError
from img2vid.origins import COPIED_KEYS, new_keys, origin_of, zero_names
from img2vid.overlay import Overlay
from img2vid.running import Running
from img2vid.surgery import insert_time, num_shared_tokens
from img2vid.temporal.causal import make_causal
from img2vid.temporal.checkpointing import CheckpointedBlock
from img2vid.temporal.clip import ClipContext
from img2vid.temporal.embeddings import resample_time_embed, time_from, time_of_tokens
from img2vid.temporal.encoder import TemporalEncoder
from img2vid.temporal.gates import zero_linear
from img2vid.temporal.infront import own_class, put_in_front, put_innermost, take_from_front
from img2vid.temporal.pooling import first, mean_over_frames, over
from img2vid.weights.accounting import LoadReport
from img2vid.weights.reloading import load_image_weights

if TYPE_CHECKING:
    from img2vid.grafts import Graft


class VideoModel(Overlay, Running, Saving):
    """An image tower that takes clips.

    It is laid over the image model (``img2vid.overlay``): ``self.base`` is that model, and both have the same
    parameters under the same names.

    Args:
        image_model: a timm model, an image model of transformers, or the ``visual`` tower of an open_clip model. It is
            changed in place and shares its parameters, under their own names, with the video model laid over it.
        config: what to insert.

    Raises:
        BackboneError: the tower is not supported.
        ConfigError: it cannot do what ``config`` asks for.
    """

    config: VideoConfig
    tower: ImageTower
    clip: ClipContext  # knows T while clips are in flight
    image_weights: str
    grafts: tuple[Graft, ...]  # in the order they were put in

    def __init__(self, image_model: nn.Module, config: VideoConfig) -> None:
        super().__init__(
            image_model,
            config=config,
            tower=describe(image_model),
            clip=ClipContext(),
            image_weights="a module that was given",  # where they come from, for people to read
            class_names=names_of_classes(image_model),  # what the numbers of a classifier stand for, if known
            grafts=(),
        )
        if getattr(image_model, "is_laid_under_video", False):
            raise BackboneError(
                f"This {type(image_model).__name__} already is part of a video model. Convert a freshly built one."
            )
        if config.num_classes is not None and (num_classes := classes_of(image_model)):
            raise ConfigError(
                f"num_classes={config.num_classes} puts a classifier on the features of this "
                f"{type(image_model).__name__}, but its own classifier turns them into {num_classes} logits. Take that "
                "off first: image_model.reset_classifier(0); or leave num_classes out to keep it."
            )
        some_weight = next(image_model.parameters())
        on_device = {"device": some_weight.device, "dtype": some_weight.dtype}

        needs_dim = config.attention == "factorised_encoder" or config.num_classes is not None
        dim = output_dim(self.tower) if needs_dim else 0  # asked while it still is an image model

        entrance = insert_time(self.tower, config, self.clip)
        drop_once_per_clip(image_model, self.clip)
        if entrance is not None and config.has_time_embed:
            places = [math.prod(self.tower.grid)] if config.time_embed == "per_patch" else []
            self.time_embed = nn.Parameter(torch.zeros(1, config.num_steps, *places, entrance.dim, **on_device))
            entrance.block.register_forward_pre_hook(self.enter_time)
        if config.attention == "factorised_encoder":
            self.temporal_encoder = TemporalEncoder(dim, config.encoder_layers).to(**on_device)
            for block in self.temporal_encoder.blocks if config.causal else ():
                make_causal(block.attn, self.clip)
            if config.has_time_embed:
                self.time_embed = nn.Parameter(torch.zeros(1, config.num_steps, dim, **on_device))
        if config.num_classes is not None:
            self.classifier = zero_linear(dim, config.num_classes, **on_device)
        if config.grafts:
            from img2vid.grafts.grafting import plant

            plant(self)
        self.train(image_model.training)
        # the libraries' own checkpointing would rerun blocks when T is no longer known, so ours takes over
        names = ("grad_checkpointing", "gradient_checkpointing")  # the latter is transformers'
        checkpointing = [(m, name) for m in image_model.modules() for name in names if getattr(m, name, False) is True]
        for module, name in checkpointing:
            setattr(module, name, False)
        if checkpointing:
            self.set_grad_checkpointing()
        take_any_size(self.tower)
        if "nearest_positions" in config.quirks:
            put_in_front(image_model, NearestPositions)
        image_model.is_laid_under_video = True

    # ---- forward, from clips to features

    def forward(self, clips: Tensor, **beside: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Clips (B, T, C, H, W), normalised like the backbone's images -> features (B, D), or logits (B, num_classes).

        A tower that returns several tensors for an image (CoCa: pooled, tokens) returns each of them for the clip.

        Args:
            beside: a vector for each clip (B, E) by its name, where a graft takes one (``img2vid.grafts.vector``).
        """
        if beside:
            with self.beside(**beside):
                return self.forward(clips)
        features = self.clip_features(clips)
        return features if self.config.num_classes is None else self.classifier(first(features))

    @property
    def num_logits(self) -> int | None:
        """Classes of which ``forward`` gives logits, by our classifier or the image model's own; None for features."""
        return classes_of(self.base) or None if self.config.num_classes is None else self.config.num_classes

    def clip_features(self, clips: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Clips (B, T, C, H, W) -> (B, D): the mean over frames, before any classifier of ours."""
        return self.pool(self.frame_features(clips))

    def pool(self, frame_features: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """One feature per frame (B, T, D) -> one per clip (B, D)."""
        return mean_over_frames(frame_features)

    def frame_features(self, clips: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Clips (B, T, C, H, W) -> one feature per frame, or per tubelet (B, T, D), already informed by all frames."""
        self.check(clips)
        steps = self.tubelets(clips)  # (B, T, C, H, W); T counts tubelets from here on
        num_steps = steps.shape[1]
        with self.clip.of(num_steps):
            features = self.tower.call(self.base, rearrange(steps, "b t c h w -> (b t) c h w"))  # (B*T, D)
        features = over(lambda x: rearrange(x, "(b t) ... -> b t ...", t=num_steps), features)
        if self.config.attention == "factorised_encoder":
            features = self.encode_time(features)
        return features

    def encode_time(self, features: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """The factorised encoder: frame features (B, T, D) -> (B, T, D) that know of each other."""
        x = first(features)
        if self.config.has_time_embed:
            x = x + self.time_at(x.shape[1]).to(x.dtype)
        x = self.temporal_encoder(x)
        return (x, *features[1:]) if isinstance(features, tuple) else x

    def tubelets(self, clips: Tensor) -> Tensor:
        """Group K frames: (B, T, C, H, W) -> (B, T/K, K*C, H, W)."""
        return rearrange(clips, "b (t k) c h w -> b t (k c) h w", k=self.config.tubelet_size)

    def enter_time(self, block: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of the first block that sees time: add ``time_embed`` to its tokens (B*T, P + N, D)."""
        x, *rest = args
        time = self.time_at(self.clip.num_frames).squeeze(0)  # (T, D), or (T, N, D)
        num_prefix, num_shared = self.tower.num_prefix_tokens, num_shared_tokens(self.tower, self.config)
        return (x + time_of_tokens(time, x.shape, num_prefix, num_shared).to(x.dtype), *rest)

    def time_at(self, num_steps: int) -> Tensor:
        """Time embedding (1, T, D), or (1, T, N, D) where each patch has its own, for any T; of a stream the next."""
        mode, past = self.config.time_embed_resample, self.clip.past
        if past is not None:
            return time_from(self.time_embed, past.num_steps, num_steps, mode)
        return resample_time_embed(self.time_embed, num_steps, mode)

    def check(self, clips: Tensor) -> None:
        """Say what is wrong with a clip before a library does in its own terms."""
        conv = self.tower.patch_conv
        check_clips(clips, self.tower, self.config, next(self.base.parameters()) if conv is None else conv.weight)

    def normalize(self, clips: Tensor) -> Tensor:
        """Pixels (..., C, H, W) from 0 to 255, as read from a video, to what the backbone was trained on (float32).

        Floats are on the same scale as bytes: 0..1 must be multiplied by 255 first.
        """
        check_pixels(clips, self.tower.in_channels)
        shape = (-1, 1, 1)  # (C, 1, 1)
        mean = torch.tensor(self.tower.preprocess.mean, device=clips.device).view(shape)
        std = torch.tensor(self.tower.preprocess.std, device=clips.device).view(shape)
        return (clips.float() / 255.0 - mean) / std

    # ---- what is new in it

    def origin(self, name: str) -> str:
        """Where a parameter comes from: ``pretrained`` (the image model), ``copied`` from it, or ``new``."""
        return origin_of(name, self.config)

    def zero_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that start at zero and keep the image model's function while they are zero."""
        parameters = dict(self.named_parameters())
        return {name: parameters[name] for name in zero_names(parameters, self.config)}

    @contextmanager
    def gates_closed(self) -> Iterator[None]:
        """Inside, every zero-initialised parameter is zero again; afterwards all have their values back."""
        parameters = self.zero_parameters().values()
        values = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, values, strict=True):
                    parameter.copy_(value)

    def load_image_weights(self, state: Mapping[str, Tensor], refresh_copies: bool = True) -> LoadReport:
        """Load an image checkpoint: its keys fit as they are, and exactly the keys about time may be missing.

        Args:
            refresh_copies: where temporal attention began as a copy of attention over space, copy it again from the new
                weights. False keeps it as it is, trained or a copy of the old ones.

        Raises:
            WeightsError: keys that do not fit; or copies to be refreshed that training has put to use.
        """
        return load_image_weights(self, self, state, refresh_copies, time_keys=[*new_keys(self.config), COPIED_KEYS])

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the image tower as open_clip does, all but its last groups; what is about time stays trainable."""
        if not hasattr(self.base, "lock"):
            raise BackboneError(
                f"{own_class(self.base).__name__} has no lock, which is open_clip's. To freeze all but what is about "
                "time: img2vid.tuning.freeze(model, 'temporal_only')."
            )
        about_time = {p: p.requires_grad for name, p in self.named_parameters() if self.origin(name) != "pretrained"}
        self.base.lock(unlocked_groups=unlocked_groups, freeze_bn_stats=freeze_bn_stats)
        for parameter, flag in about_time.items():
            parameter.requires_grad_(flag)

    @property
    def grad_checkpointing(self) -> bool:
        return any(isinstance(block, CheckpointedBlock) for _, block in self.tower.blocks)

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        self.set_grad_checkpointing(enable)

    def set_grad_checkpointing(self, enable: bool = True, trunk_only: bool = False) -> None:
        """Keep only each block's input during training and run the block, temporal branch included, twice.

        Args:
            trunk_only: the image blocks without their branches, which is what a frozen trunk should not keep.
        """
        for _, block in self.tower.blocks:
            if isinstance(block, CheckpointedBlock):
                take_from_front(block, CheckpointedBlock)
            if enable:
                (put_innermost if trunk_only else put_in_front)(block, CheckpointedBlock)
                block.clip = self.clip
