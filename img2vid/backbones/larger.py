"""What a library's factory must be told to build a deeper or wider model of the same name, and which cannot be."""

from __future__ import annotations

from typing import Any

from img2vid.backbones.names import parse_name
from img2vid.errors import BackboneError


def larger_arguments(
    backbone: str, arguments: dict[str, Any], depth: int | None, mlp_ratio: float | None, heads: int | None
) -> dict[str, Any]:
    """``backbone_args`` of the larger model.

    Args:
        arguments: of the model as it is.
        depth, mlp_ratio, heads: of its image tower, None where they stay as they are. ``heads`` is not the factory's:
            those are added to what it has built (``img2vid.backbones.widening``).

    Raises:
        BackboneError: nothing can be told to this library.
    """
    name = parse_name(backbone)
    changes = {"depth": depth, "mlp_ratio": mlp_ratio}
    wanted: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    arguments = arguments if heads is None else {**arguments, "heads": heads}
    if name.library == "timm":
        return {**arguments, **wanted}
    if name.library not in ("open_clip", "nano_clip"):
        libraries = {"hf": "transformers reads sizes from the model's config", "stitched": "its blocks are parts'"}
        raise BackboneError(
            f"{backbone} cannot be grown: the larger model is built by its name, with what the factories of timm and "
            f"open_clip take, and {libraries[name.library]}. Convert timm:NAME or open_clip:ARCH."
        )
    if not wanted:
        return arguments
    vision = {**vision_config(backbone), **arguments.get("vision_cfg", {})}
    if vision.get("timm_model_name"):
        raise BackboneError(
            f"{backbone} cannot have another {' or '.join(wanted)}: open_clip builds this image tower as timm's "
            f"{vision['timm_model_name']}, by its name alone. Its heads can be more; timm:{vision['timm_model_name']} "
            "itself, without a text tower, can grow in all ways."
        )
    for option in ("image_size", "patch_dropout"):  # vision_cfg has the last word
        if f"force_{option}" in arguments:
            vision[option] = arguments[f"force_{option}"]
    names = {"depth": "layers", "mlp_ratio": "mlp_ratio"}
    return {**arguments, "vision_cfg": {**vision, **{names[key]: value for key, value in wanted.items()}}}


def vision_config(backbone: str) -> dict[str, Any]:
    """How open_clip builds the image tower of this name."""
    from open_clip.factory import get_model_config

    from img2vid.backbones.nano_clip import register_nano_clip

    register_nano_clip()
    return dict(get_model_config(parse_name(backbone).architecture)["vision_cfg"])
