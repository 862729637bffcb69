"""Models of transformers that have an image tower and text, in the words in which video-text models are asked.

A class is put in front of the model's own (``temporal.infront``), so its keys and its own methods stay. What those
methods ask of ``vision_model`` (keywords in, a ``ModelOutput`` out) the video tower in its place answers for clips:
features and tokens, averaged over frames. So ``get_image_features``, ``forward`` and ``generate`` take clips too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from img2vid.errors import BackboneError
from img2vid.temporal.infront import InFront, put_in_front


class TwoTowers(InFront):
    """An image tower ``vision_model``, and text."""

    title = ""  # to those who print it, it still is its library's class

    @property
    def visual(self) -> nn.Module:
        return self.vision_model

    @property
    def context_length(self) -> int:
        return self.config.text_config.max_position_embeddings

    @property
    def vocab_size(self) -> int:
        return self.config.text_config.vocab_size

    def put_tower(self, video: nn.Module) -> None:
        """The video tower in the place of the image tower."""
        put_in_front(video, AnswersTransformers)
        video.tower.call = FeatureAndTokens(video.tower.call)
        self.vision_model = video

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Checkpointing of both towers: of the video tower ours, which knows T, of text transformers' own."""
        self.visual.set_grad_checkpointing(enable)
        for child in self.children():
            if child is not self.visual and getattr(child, "supports_gradient_checkpointing", False):
                child.gradient_checkpointing_enable() if enable else child.gradient_checkpointing_disable()

    def to_text_space(self, features: Tensor) -> Tensor:
        """Features (B, D) of the image tower -> where texts are."""
        return features

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Images (B, C, H, W) -> features (B, D) in the space of the text features."""
        from img2vid.backbones import describe

        features = self.to_text_space(describe(self.visual).call(self.visual, images))
        return nn.functional.normalize(features, dim=-1) if normalize else features


class ClipTowers(TwoTowers):
    def to_text_space(self, features: Tensor) -> Tensor:
        return self.visual_projection(features)

    def encode_text(self, text: Tensor, normalize: bool = False, attention_mask: Tensor | None = None) -> Tensor:
        features = self.get_text_features(input_ids=text, attention_mask=attention_mask).pooler_output
        return nn.functional.normalize(features, dim=-1) if normalize else features


class SiglipTowers(ClipTowers):
    def to_text_space(self, features: Tensor) -> Tensor:
        return features


class BlipTowers(TwoTowers):
    def to_text_space(self, features: Tensor) -> Tensor:
        return self.vision_proj(features)

    def encode_text(self, text: Tensor, normalize: bool = False, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:  # unlike CLIP and SigLIP, it was trained with what fills up a text hidden
            attention_mask = (text != self.config.text_config.pad_token_id).long()
        tokens = self.text_encoder(input_ids=text, attention_mask=attention_mask).last_hidden_state  # (B, L, D)
        features = self.text_proj(tokens[:, 0])
        return nn.functional.normalize(features, dim=-1) if normalize else features


class BlipCaptioner(TwoTowers):
    """A text decoder that reads the image's tokens; there is no feature of a text to compare with."""

    def to_text_space(self, features: Tensor) -> Tensor:
        raise BackboneError(
            "BlipForConditionalGeneration writes captions (model.generate, img2vid caption) and has no space in which "
            "videos and texts meet. model.visual(clips) gives features; BlipForImageTextRetrieval compares with texts."
        )


FRONTS: dict[str, type[TwoTowers]] = {
    "CLIPModel": ClipTowers,
    "SiglipModel": SiglipTowers,
    "BlipForImageTextRetrieval": BlipTowers,
    "BlipForConditionalGeneration": BlipCaptioner,
}


def front_of(model: nn.Module) -> type[TwoTowers] | None:
    """The class that goes in front of a model with text; None where it has none."""
    return next((FRONTS[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in FRONTS), None)


def speak_openly(model: nn.Module) -> nn.Module:
    """The model with what video-text models ask of it in front of its class; an image model as it is."""
    front = front_of(model)
    if front is not None and not isinstance(model, TwoTowers):
        put_in_front(model, front)
    return model


class AnswersTransformers(InFront):
    """In front of the video tower of a model of transformers, whose own code calls it by keywords."""

    title = ""

    def forward(self, clips: Tensor | None = None, *, pixel_values: Tensor | None = None, **others: Any) -> Any:
        if pixel_values is None:
            return super().forward(clips)
        asked = [name for name in ("output_hidden_states", "output_attentions") if others.get(name)]
        if asked:
            raise BackboneError(
                f"{' and '.join(asked)}: what lies inside the tower is of frames, not of clips; use hooks."
            )
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        feature, tokens = super().forward(pixel_values)  # (B, D), (B, P + N, D): means over frames
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=feature)


class FeatureAndTokens:
    """The call of an image tower whose tokens are asked for too, by a text decoder: (feature, tokens), as CoCa's."""

    def __init__(self, feature_only: Any) -> None:
        self.how = feature_only.keywords

    def __call__(self, module: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        from img2vid.backbones.hf_towers import outputs

        output = outputs(module, images, **self.how)
        return self.how["kind"].feature(output), output.last_hidden_state
