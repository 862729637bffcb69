"""Image-text models whose images are clips: the video tower of ``img2vid.model`` in place of the image tower."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from img2vid.backbones.tower import Backbone
from img2vid.checkpoints.saving import Saving
from img2vid.clips import check_images
from img2vid.config import VideoConfig
from img2vid.errors import BackboneError
from img2vid.model import VideoModel
from img2vid.origins import COPIED_KEYS, new_keys
from img2vid.overlay import Overlay
from img2vid.running import Running
from img2vid.temporal.infront import own_class
from img2vid.temporal.pooling import first
from img2vid.weights.accounting import LoadReport
from img2vid.weights.reloading import load_image_weights


class VideoTextModel(Overlay, Running, Saving):
    """A two-tower image-text model whose image tower takes clips; the text tower is untouched.

    Whatever the wrapped class does with images it does with clips, in its own conventions: what ``forward`` returns
    (``output_dict``), whether features are normalised, ``lock_image_tower``, ``set_grad_checkpointing``, ``generate``.

    Args:
        image_text_model: an open_clip CLIP, CustomTextCLIP or CoCa, or a model with text of transformers, with what
            ``wrap_module`` puts in front of it; changed in place.
        config: what to insert in the image tower.
    """

    def __init__(self, image_text_model: nn.Module, config: VideoConfig) -> None:
        super().__init__(image_text_model)
        video = VideoModel(image_text_model.visual, config)
        if video.grafts:
            from img2vid.grafts.grafting import check_beside_text

            check_beside_text(video.grafts)
        if hasattr(image_text_model, "put_tower"):  # transformers, which calls it vision_model
            image_text_model.put_tower(video)
        else:
            image_text_model.visual = video

    @property
    def config(self) -> VideoConfig:
        """What was inserted in its image tower, and is noted there."""
        return self.visual.config

    def encode_video(self, clips: Tensor, normalize: bool | None = None, **beside: Tensor) -> Tensor:
        """Clips (B, T, C, H, W) -> features (B, D) in the space of the text features.

        Args:
            normalize: to length 1; None does what the wrapped class does by default (CLIP: no, CoCa: yes).
            beside: a vector for each clip (B, E) by its name, where a graft takes one.
        """
        if beside:
            with self.beside(**beside):
                return self.encode_video(clips, normalize)
        if normalize is None:
            normalize = inspect.signature(self.base.encode_image).parameters["normalize"].default
        if hasattr(self.base, "to_text_space"):
            features = self.visual.pool(self.to_text_space(first(self.visual.frame_features(clips))))
        else:
            features = first(self.visual(clips))
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def to_text_space(self, frame_features: Tensor) -> Tensor:
        """Features of frames (B, T, D) -> where texts are: transformers projects outside of its image tower."""
        if not hasattr(self.base, "to_text_space"):
            return frame_features
        return self.base.to_text_space(frame_features.flatten(0, 1)).unflatten(0, frame_features.shape[:2])

    def encode_image(self, images: Tensor, normalize: bool | None = None) -> Tensor:
        """Images (B, C, H, W) -> features (B, D); an image is a clip of one frame, or of one tubelet of equal ones."""
        check_images(images)
        return self.encode_video(images.unsqueeze(1).expand(-1, self.config.tubelet_size, -1, -1, -1), normalize)

    def encode_text(self, text: Tensor, normalize: bool | None = None) -> Tensor:
        """Token ids (B, L) -> features (B, D), by the untouched text tower; ``normalize`` as in ``encode_video``."""
        if not hasattr(self.base, "encode_text"):
            raise BackboneError(f"{own_class(self.base).__name__} has no features of texts; it writes captions.")
        if not isinstance(text, Tensor):
            raise BackboneError(
                f"Texts of type {type(text).__name__} were given, expected token ids (B, L): "
                "model.encode_text(model.tokenize(texts))."
            )
        return self.base.encode_text(text) if normalize is None else self.base.encode_text(text, normalize=normalize)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Clips (B, T, C, H, W) and token ids (B, L) -> what the wrapped class makes of images and texts.

        CLIP: (features, text features, scale), normalised, or a dict of them where ``output_dict`` is set: what
        open_clip's losses take. CoCa: a dict that also holds the caption ``logits`` and ``labels``; its decoder sees
        the mean over frames of the image tokens, as many as for an image, whatever T is.
        """
        return self.base(*args, **kwargs)

    def tokenize(self, texts: str | list[str]) -> Tensor:
        """Texts to token ids (B, L), with the tokenizer the text tower was trained with."""
        from img2vid.backbones.tokenizers import tokenize

        return tokenize(self, [texts] if isinstance(texts, str) else texts)

    def normalize(self, clips: Tensor) -> Tensor:
        return self.visual.normalize(clips)

    def origin(self, name: str) -> str:
        return self.visual.origin(name)

    def load_image_weights(self, state: Mapping[str, Tensor], refresh_copies: bool = True) -> LoadReport:
        """Load an image-text checkpoint, both towers; as ``VideoModel.load_image_weights``."""
        time_keys = [*new_keys(self.config), COPIED_KEYS]
        return load_image_weights(self, self.visual, state, refresh_copies, time_keys=time_keys)

    def zero_parameters(self) -> dict[str, nn.Parameter]:
        zero = self.visual.zero_parameters()
        return {f"{self.tower_prefix}{name}": parameter for name, parameter in zero.items()}

    def gates_closed(self) -> AbstractContextManager[None]:
        return self.visual.gates_closed()

    @property
    def tower_prefix(self) -> str:
        """What the keys of the image tower begin with: ``visual.``, in transformers ``vision_model.``."""
        return next(f"{name}." for name, child in self.named_children() if child is self.visual)


def build_model(backbone: Backbone, config: VideoConfig) -> VideoModel | VideoTextModel:
    """The video model of a loaded backbone, in place: with text if it has a text tower and no classifier is wanted."""
    with_text = backbone.has_text and config.num_classes is None
    model = VideoTextModel(backbone.model, config) if with_text else VideoModel(backbone.tower.module, config)
    (model.visual if isinstance(model, VideoTextModel) else model).image_weights = backbone.pretrained or "random"
    return model
