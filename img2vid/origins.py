"""Which keys a video model has beyond its image model, all below the image tower, and where each comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable

from img2vid.config import VideoConfig

COPIED_KEYS = r"(.*\.)?temporal_(norm1|attn)\..*"
# graft_* are what img2vid.grafts puts in, and branches of a user's own; their gates are called graft_fc, or zero_*
NEW_KEYS = r"(.*\.)?(temporal_fc\..*|temporal_encoder\..*|time_embed|tubelet_weight|graft_\w+(\..*)?)"
CLASSIFIER_KEYS = r"classifier\..*"  # with num_classes; else an image model's own may be called that
# of the new ones, those that start at zero and keep the function while they stay there
ZERO_KEYS = (
    r"(.*\.)?(temporal_fc\..*|temporal_encoder\..*\.(attn_fc|fc2)\..*|time_embed|tubelet_weight|graft_fc\..*"
    r"|graft_\w+\.(.*\.)?zero_\w+(\..*)?)"
)
OTHER_TOWER = r"(?:.*\.)?graft_\w+\.towers\.\d+\.(?!(?:.*\.)?(?:temporal_|time_embed|tubelet_weight)).*"
GRAFT = r"((?:.*\.)?graft_(?!fc\b)\w+)\..*"  # what a graft has put in one place, by its path

GRAFTED_COPIES = r"(.*\.)?graft_\w+\.copy\..*"  # of whole image blocks


def new_keys(config: VideoConfig) -> list[str]:
    """Regular expressions of the keys of what has no counterpart in the image model."""
    return [NEW_KEYS] if config.num_classes is None else [NEW_KEYS, CLASSIFIER_KEYS]


def origin_of(name: str, config: VideoConfig) -> str:
    """Where a parameter comes from: ``pretrained`` (the image model), ``copied`` from it, or ``new``."""
    if re.fullmatch(GRAFTED_COPIES, name):
        return "copied"
    if any(re.fullmatch(pattern, name) for pattern in new_keys(config)):
        return "new"
    if re.fullmatch(COPIED_KEYS, name):
        return "copied" if config.temporal_init == "copy" else "new"
    return "pretrained"


def zero_names(names: Iterable[str], config: VideoConfig) -> list[str]:
    """Those of the parameters that start at zero and keep the image model's function while they are zero."""
    zero = [name for name in names if re.fullmatch(ZERO_KEYS, name)]
    if config.tubelet_init == "average":  # starts as copies of the image weights instead
        zero = [name for name in zero if not name.endswith("tubelet_weight")]
    return zero


def scion_of(name: str) -> str | None:
    """The path of what a graft has put in one place, for a parameter of it."""
    found = re.fullmatch(GRAFT, name)
    return found[1] if found else None


def is_other_towers(name: str) -> bool:
    """Whether it is a weight that another tower, fused with this one, was pretrained with."""
    return re.fullmatch(OTHER_TOWER, name) is not None
