"""Continued pretraining with Lightning. Read module.py first: model, objective and rates composed.

Importing this imports Lightning; what is optimised (img2vid.objectives) and how (img2vid.tuning) knows nothing of it.
"""

try:
    from img2vid.training.module import TrainingError, VideoTraining
except ModuleNotFoundError as error:
    from img2vid.data.errors import missing_extra

    package = (error.name or "").partition(".")[0]
    if package not in ("lightning", "torchmetrics"):
        raise
    raise missing_extra(package, "train", "Training") from error
from img2vid.tuning.recipe import Tuning

__all__ = ["TrainingError", "Tuning", "VideoTraining"]
