"""Further insertions under the contract of temporal attention: see base.py first."""

from __future__ import annotations

from img2vid.grafts import (  # noqa: F401 (they register their types)
    adapters,
    along_time,
    channels,
    control,
    experts,
    fusion,
    lora,
    prompts,
    vector,
)
from img2vid.grafts.base import GRAFTS, Graft, GraftError, Site, read_graft, read_grafts, register
from img2vid.grafts.fronts import TokenScion, WeightScion
from img2vid.grafts.grafting import fold, graft, remove

__all__ = [
    "GRAFTS",
    "Graft",
    "GraftError",
    "Site",
    "TokenScion",
    "WeightScion",
    "fold",
    "graft",
    "read_graft",
    "read_grafts",
    "register",
    "remove",
]
