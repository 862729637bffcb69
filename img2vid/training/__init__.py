"""Continued pretraining with Lightning. Read module.py first: model, objective and rates composed.

Importing this imports Lightning; what is optimised (img2vid.objectives) and how (img2vid.tuning) knows nothing of it.
"""

from img2vid.training.module import TrainingError, VideoTraining
from img2vid.tuning.recipe import Tuning

__all__ = ["TrainingError", "Tuning", "VideoTraining"]
