"""Open-VCLIP's interpolated-weight regularisation (arXiv:2302.00624): be good on the way back to the image model too.

Zero-shot ability survives where the straight line between image weights and video weights stays good. So the inner
objective is also scored at a random point of that line, and its gradient taken with respect to the video weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from img2vid.objectives.base import Objective, ObjectiveError, Step, Surroundings, share


class InterpolatedWeights(Objective):
    """An objective, also scored between the trained weights and those it started from.

    Args:
        objective: what is scored, at the trained weights and between them and the starting ones.
        weight: of the losses in between, which are named ``interpolated_*_loss``.
        most: the image model's share is drawn from 0 to this.

    Costs a second forward and backward pass, and a copy of the starting weights. Not for sharded parameters (FSDP2).
    """

    def __init__(self, objective: Objective, weight: float = 1.0, most: float = 0.6) -> None:
        super().__init__()
        share("most", most)
        if not weight or not most:
            raise ObjectiveError("InterpolatedWeights with weight=0 or most=0 does nothing: give its objective alone.")
        self.objective, self.weight, self.most = objective, weight, most
        self.trains_text, self.reads_scale = objective.trains_text, objective.reads_scale
        self.start: dict[str, Tensor] = {}

    def setup(self, around: Surroundings) -> None:
        if around.sharded:
            raise ObjectiveError("InterpolatedWeights needs whole weights, not sharded ones (FSDP2): use strategy ddp.")
        self.objective.setup(around)
        # outside the registered modules: part of the beginning, not of the state
        if around.training:
            self.start = {name: p.detach().clone() for name, p in around.model.named_parameters() if p.requires_grad}

    def forward(self, step: Step) -> dict[str, Tensor]:
        losses = self.objective(step)
        share_of_start = self.most * torch.rand(()).item()
        weights = dict(step.model.named_parameters())
        between = {}
        for name, start in self.start.items():
            start = self.start[name] = start.to(weights[name])  # the trainer may have moved the model since
            between[f"model.{name}"] = torch.lerp(weights[name], start, share_of_start)
        run = Scored(step.model, self.objective)
        there = torch.func.functional_call(run, between, (step.batch,))
        return losses | {f"interpolated_{name}": self.weight * loss for name, loss in there.items()}

    def predict(self, step: Step) -> Tensor | None:
        return self.objective.predict(step)


class Scored(nn.Module):
    """A model and an objective as one module, so that one call can borrow other weights."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.__dict__["objective"] = objective

    def forward(self, batch: dict) -> dict[str, Tensor]:
        return self.objective(Step(self.model, batch))
