"""Whether a model can be built again from its description, asked when it is saved and not when it is needed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from img2vid.backbones import Backbone, describe, load_backbone
from img2vid.backbones.building import unannounced
from img2vid.config import VideoConfig
from img2vid.errors import WeightsError
from img2vid.model import VideoModel
from img2vid.two_towers import VideoTextModel, build_model
from img2vid.weights.accounting import listed


def build_backbone(config: VideoConfig, on_meta: bool = False) -> Backbone:
    """The image model of a configuration, without its weights; on torch's meta device, without any numbers."""
    with unannounced():
        return load_backbone(
            config.backbone,
            random_weights=True,
            image_size=config.image_size,
            arguments=config.backbone_args,
            on_meta=on_meta,
        )


def check_rebuildable(model: VideoModel | VideoTextModel, state: Mapping[str, Tensor]) -> None:
    """Refuse a model that its configuration no longer describes: its own library's methods change it in place.

    One without a backbone's name is built again by the user, who may make the same changes, so it is not asked.

    Raises:
        WeightsError: weights that would not fit, or another image size; with the setting to convert with instead.
    """
    config = model.config
    if config.backbone is None:
        return
    rebuilt = build_model(build_backbone(config, on_meta=True), config)
    was, now = tower_of(rebuilt).tower.image_size, describe(tower_of(model).base).image_size
    expected = {key: tuple(tensor.shape) for key, tensor in rebuilt.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in state.items()}
    differences = [
        f"{key}: {given.get(key, 'nothing')} in the model, {expected.get(key, 'nothing')} in what would be built"
        for key in sorted(expected.keys() | given.keys())
        if expected.get(key) != given.get(key)
    ]
    if was == now and not differences:
        return
    advice = []
    if was != now:
        advice.append(
            f"It was resized after the conversion, from {was[0]} x {was[1]} to {now[0]} x {now[1]} pixels: convert "
            f"with image_size={now} instead of calling set_input_size."
        )
    if any(key.startswith(("head", "fc", "visual.head")) for key in given.keys() ^ expected.keys()):
        advice.append(
            "It was given another head by reset_classifier: convert with num_classes=N instead, which puts a "
            "classifier on the feature of the clip."
        )
    raise WeightsError(
        f"Nothing was saved: img2vid.load would build {config.backbone} from this model's settings, and that is not "
        f"this model any more. {' '.join(advice)}"
        + (f"\n{listed(differences)}\n" if differences else " ")
        + "The weights alone: torch.save(model.state_dict(), 'weights.pth')."
    )


def tower_of(model: VideoModel | VideoTextModel) -> VideoModel:
    return model.visual if isinstance(model, VideoTextModel) else model
