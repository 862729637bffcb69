"""How a video model is tuned: one ordered list of layer groups drives freezing, learning rates, decay and logging."""

from img2vid.tuning.freezing import GradualUnfreezing, eval_frozen, freeze, frozen_by
from img2vid.tuning.groups import LayerGroup, TuningError, layer_groups
from img2vid.tuning.optimizers import bound_temperature, build_optimizer, parameter_groups, penalty
from img2vid.tuning.recipe import Tuning
from img2vid.tuning.schedules import build_schedule

__all__ = [
    "GradualUnfreezing",
    "LayerGroup",
    "Tuning",
    "TuningError",
    "bound_temperature",
    "build_optimizer",
    "build_schedule",
    "eval_frozen",
    "freeze",
    "frozen_by",
    "layer_groups",
    "parameter_groups",
    "penalty",
]
