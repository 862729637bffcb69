"""What training optimises: each objective a small class that returns a dict of ``*_loss``. No Lightning in here.

    objective = Classification(head="text", prompts=["a video of {}"])
    objective.setup(Surroundings(model, class_names=("jump", "run")))
    losses = objective(Step(model, batch))     # {"classification_loss": ...}; what is minimised is their sum

A batch is a dict as ``img2vid.data.module`` makes it: clip (B, T, C, H, W) normalised; label (B,); caption, B texts;
soft_label (B, classes) where clips were mixed.
"""

from img2vid.objectives.answers import KeepAnswers
from img2vid.objectives.balance import BalanceExperts
from img2vid.objectives.base import Objective, ObjectiveError, Step, Surroundings, WeightedSum
from img2vid.objectives.classification import Classification
from img2vid.objectives.contrastive import Contrastive
from img2vid.objectives.distillation import Distillation
from img2vid.objectives.interpolated import InterpolatedWeights

__all__ = [
    "BalanceExperts",
    "Classification",
    "Contrastive",
    "Distillation",
    "InterpolatedWeights",
    "KeepAnswers",
    "Objective",
    "ObjectiveError",
    "Step",
    "Surroundings",
    "WeightedSum",
]
