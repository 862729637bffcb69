"""Between two models in weight space: WiSE-FT (arXiv:2109.01903) from an image model to the video model it became,
from one video model to another, and the average of several (model soups, arXiv:2203.05482).

What starts at zero is scaled along: alpha = 0 is bitwise the model that conversion makes of the image weights, so it
keeps whatever that keeps (docs/guarantees.md), and alpha = 1 is bitwise the trained model. Alpha means the same for
both kinds of gate. A ``temporal_fc`` enters linearly, so its weight and bias are interpolated; a tanh gate lets through
tanh(g) of its branch, so tanh(g) is interpolated, not g. With ``gate="none"`` there is no identity to go back to.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from img2vid.backbones import Backbone, load_backbone, wrap_module
from img2vid.backbones.tower import on_meta
from img2vid.checkpoints.native import (
    WEIGHTS,
    check_replaceable,
    describe_model,
    load,
    main_dtype,
    read_description,
    save,
)
from img2vid.config import VideoConfig
from img2vid.errors import Img2VidError, WeightsError
from img2vid.model import VideoModel
from img2vid.proof.guarantees import Guarantee
from img2vid.tuning.groups import image_tower_of
from img2vid.two_towers import VideoTextModel, build_model
from img2vid.weights.accounting import load_weights, read_state_dict

TANH_GATES = r"(.*\.)?temporal_fc\.alpha"


class InterpolationError(Img2VidError):
    """Models between which there is no straight line, or an alpha outside of it."""


def interpolate(start: nn.Module, trained: VideoModel | VideoTextModel, alpha: float) -> VideoModel | VideoTextModel:
    """A new model on the line from ``start`` to ``trained``.

    Args:
        start: a video model of the same configuration, or the image model that ``trained`` was made from. An image
            model knows nothing of parameters that were drawn at random or belong to a classifier: with it, they are
            those of ``trained`` for every alpha. It is not changed.
        alpha: from 0, bitwise the start, to 1, bitwise ``trained``.

    Raises:
        InterpolationError: alpha is outside 0..1, or configurations differ, with the fields that do.
        WeightsError: the image model has other weights than ``trained`` needs.
    """
    check_alpha(alpha)
    if isinstance(start, (VideoModel, VideoTextModel)):
        check_same(["the start", "the trained model"], [describe_model(start), describe_model(trained)])
        begin = start.state_dict()
    else:
        loaded = wrap_module(copy.deepcopy(start), trained.config.image_size)
        begin = state_at_step_zero(loaded, trained)
    model = copy.deepcopy(trained)
    load_weights(model, between(begin, trained.state_dict(), alpha), source="the interpolated weights")
    return model


def between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """State dicts of the same keys, interpolated; both ends are exact."""
    check_alpha(alpha)
    return {key: mix([start[key], end[key]], [1.0 - alpha, alpha], is_tanh_gate(key)) for key in end}


def average(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of state dicts of the same keys; of tanh gates, the mean of what they let through."""
    share = [1.0 / len(states)] * len(states)
    return {key: mix([state[key] for state in states], share, is_tanh_gate(key)) for key in states[-1]}


def is_tanh_gate(key: str) -> bool:
    return re.fullmatch(TANH_GATES, key) is not None


def mix(tensors: list[Tensor], shares: list[float], is_gate: bool = False) -> Tensor:
    """Weighted mean, in double precision; where all agree, and where one has it all, bitwise that.

    Counters and masks have no mean: they are the last tensor's.
    """
    last = tensors[-1]
    if 1.0 in shares:
        return tensors[shares.index(1.0)].detach().clone()
    if not last.is_floating_point():
        return last.detach().clone()
    values = [t.detach().to(device=last.device, dtype=torch.float64) for t in tensors]
    if is_gate:
        values = [value.tanh() for value in values]
    mean = sum(share * value for share, value in zip(shares, values, strict=True))
    if is_gate:
        mean = mean.clamp(-1 + 2**-53, 1 - 2**-53).atanh()  # gates so far open that tanh rounds to 1 stay finite
    agree = torch.stack([t.detach().to(last.device) == last.detach() for t in tensors]).all(dim=0)
    return torch.where(agree, last.detach(), mean.to(last.dtype))


def state_at_step_zero(image: Backbone, trained: VideoModel | VideoTextModel) -> dict[str, Tensor]:
    """What converting the image model, in place, as ``trained`` was gives; ``trained``'s own where that is by chance.

    Raises:
        WeightsError: its weights do not fit.
    """
    image.model.to(main_dtype(trained))
    begin, end = build_model(image, trained.config), trained.state_dict()
    zero = {id(p) for p in image_tower_of(begin).zero_parameters().values()}
    state = begin.state_dict()
    by_chance = {
        name
        for name, p in begin.named_parameters()
        # averaged tubelets do not start at zero, and yet come from the image weights
        if begin.origin(name) == "new" and id(p) not in zero and not name.endswith("tubelet_weight")
    }
    state.update({name: end[name] for name in by_chance if name in end})
    load_weights(on_meta(trained), state, source="the image model", assign=True)  # for its account of every key
    return state


# ---- what cannot be interpolated


def check_alpha(alpha: float) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0.0 <= alpha <= 1.0:
        raise InterpolationError(f"alpha={alpha!r}: expected a number from 0 (the start) to 1 (the trained model).")


def check_same(names: Sequence[str], described: Sequence[dict[str, Any]]) -> tuple[str, ...] | None:
    """What the classes of models, described as in config.json, are called, where one of them knows.

    Raises:
        InterpolationError: with the fields in which they differ.
    """
    settings = [settings_of(one) for one in described]
    class_names = next((one["class_names"] for one in settings if one["class_names"] is not None), None)
    for one in settings:  # not known is not different
        one["class_names"] = one["class_names"] or class_names
    differing = [field for field in settings[0] if any(one[field] != settings[0][field] for one in settings)]
    if differing:
        lines = [
            f"  {field}: " + ", ".join(f"{one[field]!r} in {name}" for name, one in zip(names, settings, strict=True))
            for field in differing
        ]
        raise InterpolationError(
            "These models differ in more than their weights, so there is nothing between them:\n" + "\n".join(lines)
        )
    return None if class_names is None else tuple(class_names)


def settings_of(described: dict[str, Any]) -> dict[str, Any]:
    config = VideoConfig.from_dict(described["video"])
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        "kind": described["kind"],
        "dtype": described["dtype"],
        "class_names": described.get("class_names"),
        **fields,
    }


# ---- the command line


def run(models: list[str], out: Path, alpha: float | None, weights: str | None) -> int:
    """Interpolate (with an alpha) or average folders, and save; says what it does. Returns the exit code."""
    names = ["the image model" if name == "image" else name for name in models]
    folders = [Path(name) for name in models if name != "image"]
    described = [read_description(folder) for folder in folders]
    class_names = check_same([str(folder) for folder in folders], described)
    if any(folder.resolve() == out.resolve() for folder in folders):
        raise InterpolationError(f"--out {out} is one of the models to be read. Choose another folder.")
    check_replaceable(out)
    model = load(folders[-1])
    if models[0] == "image":
        image = original_image_model(model, weights)
        noted = image_tower_of(model).image_weights
        print(f"Image weights: {image.pretrained}; the model's came from {noted}.")
        begin = state_at_step_zero(image, model)
        states = [begin, model.state_dict()]
    else:
        states = [checked_weights(folder, model) for folder in folders]
    if alpha is None:
        state = average(states)
        print(f"Average of {len(states)} models: {', '.join(names)}.")
    else:
        state = between(*states, alpha)
        print(f"{1 - alpha:g} x {names[0]} + {alpha:g} x {names[1]}.")
    if models[0] == "image":
        kept = Guarantee.of(model.config, image_tower_of(model).tower.num_prefix_tokens).summary
        print(f"Kept of the image model's function at alpha = 0: {kept}.")
    load_weights(model, state, source="the interpolated weights")
    image_tower_of(model).class_names = class_names
    save(model, out)
    print(f"Wrote {out}. Load it with img2vid.load({str(out)!r}).")
    return 0


def checked_weights(folder: Path, model: VideoModel | VideoTextModel) -> dict[str, Tensor]:
    """A folder's weights, every key of which is the model's."""
    state = read_state_dict(folder / WEIGHTS)
    load_weights(model, state, source=str(folder / WEIGHTS))
    return state


def original_image_model(model: VideoModel | VideoTextModel, weights: str | None) -> Backbone:
    """The image model that a saved model was made from: its backbone's name says which weights, unless a file does."""
    config = model.config
    if config.backbone is None:
        raise WeightsError(
            "This model was made from a module passed in by hand, so its image weights have no name. Give the folder "
            "that was converted, before training, in place of the word image; or use img2vid.interpolation.interpolate."
        )
    if weights is None and image_tower_of(model).image_weights == "random":
        raise WeightsError(
            "This model was converted from random weights, which have no name. Give the folder that was converted, "
            "before training, in place of the word image."
        )
    return load_backbone(config.backbone, weights=weights, image_size=config.image_size, arguments=config.backbone_args)
