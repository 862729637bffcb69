"""Keeping experts busy: a term that is least where every expert is asked equally often."""

from __future__ import annotations

import torch
from torch import Tensor

from img2vid.objectives.base import Objective, ObjectiveError, Step, Surroundings, routers


class BalanceExperts(Objective):
    """``balance_loss``: how unevenly the routers of ``experts`` grafts spread the tokens of a batch; 1 is evenly.

    A term beside an objective (``WeightedSum``): alone it would teach routers and nothing else. It is of the clips of
    this process; with ``chunk_size``, of all chunks together.

    Args:
        weight: of the loss, averaged over routers; 0.01 as in Switch Transformers (arXiv:2101.03961).
    """

    def __init__(self, weight: float = 0.01) -> None:
        super().__init__()
        self.weight = weight

    def setup(self, around: Surroundings) -> None:
        if not any(routers(around.model)):
            raise ObjectiveError("BalanceExperts, but this model has no experts: give it some, grafts: [experts].")

    def forward(self, step: Step) -> dict[str, Tensor]:
        _ = step.features  # the tower runs, if it has not yet
        losses = [loss for balance in routers(step.model) if (loss := balance.loss) is not None]
        if not losses:
            raise ObjectiveError("BalanceExperts is a term for training, and no router is in training mode.")
        return {"balance_loss": self.weight * torch.stack(losses).mean()}
