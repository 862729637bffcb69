"""What img2vid needs to know about an image tower, whatever library it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from img2vid.class_names import from_id2label
from img2vid.errors import BackboneError
from img2vid.weights.accounting import LoadReport


@dataclass
class Preprocess:
    """How pixels must look: mean and std of RGB in 0..1, and the interpolation used in resizing."""

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"


def call_plainly(module: nn.Module, images: Tensor) -> Any:
    return module(images)


@dataclass
class ImageTower:
    """A module that turns images (B, C, H, W) into features, and where its parts are.

    Args:
        module: the tower; its own forward is what runs.
        blocks: attribute path and module of each transformer block, in order.
        num_prefix_tokens: class, distillation and register tokens P at the front of the sequence *inside the blocks*.
        patch_conv: the patch projection, where it is one plain strided convolution.
        in_channels: channels C of an image, 3 for RGB.
        image_size, patch_size: pixels (height, width).
        any_size: whether forward takes images of other sizes than ``image_size``.
        pads: whether it pads sizes that are no multiple of ``patch_size``.
        position: how places are told apart, for people to read.
        call: how its library wants ``module`` called with images (B, C, H, W): ``call(module, images)`` gives features
            (B, D), or several tensors of which they are the first.
    """

    module: nn.Module
    blocks: list[tuple[str, nn.Module]]
    num_prefix_tokens: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    any_size: bool
    position: str
    patch_conv: nn.Conv2d | None = None
    in_channels: int = 3
    preprocess: Preprocess = field(default_factory=Preprocess)
    pads: bool = False
    call: Callable[[nn.Module, Tensor], Any] = call_plainly

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns) of an image of ``image_size``."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]


@dataclass
class Backbone:
    """A loaded image model: the whole of it (two towers where there is text), and its image tower.

    Args:
        model: the library's own module: a timm model, an open_clip CLIP, CustomTextCLIP or CoCa, a model of
            transformers.
        tower: its image tower.
        name: canonical name, None where the module was passed in by hand.
        arguments: keyword arguments it was built with beyond its name.
        pretrained: where its weights come from, None for random ones.
        report: where every key of a local weights file went.
    """

    model: nn.Module
    tower: ImageTower
    name: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    pretrained: str | None = None
    report: LoadReport = field(default_factory=LoadReport)

    @property
    def has_text(self) -> bool:
        return hasattr(self.model, "encode_text") or hasattr(self.model, "text_decoder")


def structural_copy(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer with the original: no weight is duplicated."""
    import copy

    memo = {} if memo is None else memo
    for tensor in [*module.parameters(), *module.buffers()]:
        memo.setdefault(id(tensor), tensor)
    return copy.deepcopy(module, memo)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of the module with shapes but no numbers, for counting and probing."""
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        twin = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    return structural_copy(module, memo)


def output_dim(tower: ImageTower) -> int:
    """Length of the tower's feature vector, probed with one image on the meta device.

    Raises:
        BackboneError: an image becomes no vector, but a row of tokens.
    """
    module = on_meta(tower.module).eval()
    with torch.no_grad():
        dtype = next(module.parameters()).dtype
        image = torch.zeros(1, tower.in_channels, *tower.image_size, dtype=dtype, device="meta")
        features = tower.call(module, image)
    features = features[0] if isinstance(features, tuple) else features
    if features.ndim != 2:
        raise BackboneError(
            f"This {type(tower.module).__name__} turns an image into tokens {tuple(features.shape[1:])}, not into one "
            "vector, so neither a classifier (num_classes) nor a factorised_encoder can follow it. Build it with "
            "pooling, such as backbone_args={'global_pool': 'avg'}."
        )
    return features.shape[-1]


def classes_of(module: nn.Module) -> int:
    """Classes of an image model's own classifier, 0 where it gives features."""
    if hasattr(module, "reset_classifier"):  # timm
        return module.num_classes
    return module.config.num_labels if is_hf_classifier(module) else 0


def names_of_classes(module: nn.Module) -> tuple[str, ...] | None:
    """What those classes are called; None where the module does not say.

    Raises:
        ConfigError: transformers' ``id2label`` does not name each of them.
    """
    return from_id2label(module.config.id2label, module.config.num_labels) if is_hf_classifier(module) else None


def is_hf_classifier(module: nn.Module) -> bool:
    return type(module).__name__.endswith("ForImageClassification")
