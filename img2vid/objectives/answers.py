"""Keeping zero-shot answers: what the image model says to some questions, the video model is to go on saying.

Learning without Forgetting (arXiv:1606.09282), with prompts for classes as in ZSCL (arXiv:2303.06628).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from img2vid.objectives.base import Objective, ObjectiveError, Step, Surroundings, need_text


class KeepAnswers(Objective):
    """``answers_loss``: divergence of the video model's shares of ``classes`` from the frozen image model's frame mean.

    Distilling features (``Distillation``) asks for the same vector, and so also forbids directions in which time could
    be written; this asks for the same answers alone.

    Args:
        classes: names that the image model can tell apart, such as ``["zero", "one"]``.
        prompts: templates with ``{}``; a class's embeddings are normalised, averaged, and normalised again, once and by
            the text tower as it was in the beginning.
        weight: of the loss.
    """

    def __init__(
        self, classes: Sequence[str], prompts: Sequence[str] = ("a photo of {}.",), weight: float = 1.0
    ) -> None:
        super().__init__()
        if len(classes) < 2:
            raise ObjectiveError(f"classes={list(classes)!r}: expected two names or more, or there is one answer only.")
        if not prompts or any("{}" not in prompt for prompt in prompts):
            raise ObjectiveError(f"prompts={list(prompts)!r}: expected sentences with {{}} where the class name goes.")
        self.classes, self.prompts, self.weight = list(classes), list(prompts), weight

    @torch.no_grad()
    def setup(self, around: Surroundings) -> None:
        need_text(around.model, "KeepAnswers")
        self.teacher = around.teacher("KeepAnswers")
        image_model = self.teacher.on(next(around.model.parameters()))
        tokens = around.model.tokenize([prompt.format(name) for name in self.classes for prompt in self.prompts])
        text = image_model.encode_text(tokens.to(next(image_model.parameters()).device), normalize=True)
        text = F.normalize(text.unflatten(0, (len(self.classes), -1)).mean(dim=1), dim=-1)  # (classes, D)
        self.register_buffer("questions", image_model.logit_scale.exp() * text, persistent=False)

    def forward(self, step: Step) -> dict[str, Tensor]:
        with torch.no_grad():
            clips = step.batch["clip"]
            expected = self.teacher.on(clips).encode_video(clips, normalize=True) @ self.questions.T  # (B, classes)
        given = step.video @ self.questions.T
        shares = [scores.float().log_softmax(dim=-1) for scores in (given, expected)]
        return {"answers_loss": self.weight * F.kl_div(*shares, reduction="batchmean", log_target=True)}
