"""Video-text contrastive learning: CLIP's softmax loss and SigLIP's sigmoid loss, over all processes.

The loss classes are open_clip's. What is easily wrong is how gradients cross processes: with open_clip's default
arguments they are too small by the number of processes, and ``local_loss`` without ``gather_with_grad`` points the
wrong way. With both, two processes with 8 pairs each do what one process does with 16, after the mean over processes
that DistributedDataParallel takes.

CLIP: arXiv:2103.00020. SigLIP: arXiv:2303.15343. Contrastive video-text training from an image model: Frozen in Time,
arXiv:2104.00650.
"""

from __future__ import annotations

import torch
from torch import Tensor

from img2vid.objectives.base import Objective, ObjectiveError, Step, Surroundings, choice, need_text


class Contrastive(Objective):
    """Which text belongs to which clip.

    Args:
        loss: ``clip`` | ``siglip``; the latter needs a model with a ``logit_bias``.
        text: ``caption``, or ``label`` for the prompt of the clip's class. Pairs with equal texts in one batch are
            false negatives for each other; where texts are few, use ``Classification(head="text", classes="caption")``.
        prompt: sentence with ``{}`` for the class name, for ``label``.
        train_text: whether the text tower learns.
    """

    def __init__(
        self, loss: str = "clip", text: str = "caption", prompt: str = "a video of {}.", train_text: bool = True
    ) -> None:
        super().__init__()
        choice("loss", loss, ("clip", "siglip"))
        choice("text", text, ("caption", "label"))
        if "{}" not in prompt:
            raise ObjectiveError(f"prompt={prompt!r}: expected a sentence with {{}} where the class name goes.")
        self.loss, self.source, self.prompt, self.train_text = loss, text, prompt, train_text

        self.trains_text, self.reads_scale = train_text, True

    def setup(self, around: Surroundings) -> None:
        from open_clip.loss import ClipLoss, SigLipLoss

        need_text(around.model, "A contrastive objective")
        if self.loss == "siglip" and getattr(around.model, "logit_bias", None) is None:
            raise ObjectiveError(
                "loss='siglip' needs a model with a logit_bias: at first almost all pairs are negatives, and without a "
                "bias they swamp the loss. Use a SigLIP backbone, backbone_args={'init_logit_bias': -10}, or 'clip'."
            )
        if self.source == "label" and around.class_names is None:
            raise ObjectiveError("text='label' needs class names, and the training list has none: give data.classes.")
        self.class_names = around.class_names
        ranks = {"rank": around.rank, "world_size": around.world_size}
        if self.loss == "clip":
            self.score = ClipLoss(local_loss=True, gather_with_grad=True, **ranks)
        else:
            self.score = SigLipLoss(**ranks)

    def forward(self, step: Step) -> dict[str, Tensor]:
        text = step.text(self.tokens(step), train=self.train_text)  # (B, D)
        if self.loss == "clip":
            loss = self.score(step.video, text, step.model.logit_scale.exp())
        else:
            loss = self.score(step.video, text, step.model.logit_scale.exp(), step.model.logit_bias)
        return {"contrastive_loss": loss}

    def tokens(self, step: Step) -> Tensor:
        """What is paired with each clip, (B, L)."""
        if "soft_label" in step.batch:
            raise ObjectiveError(
                "Mixed clips show two videos each, and would be paired with the text of one. Contrastive learning "
                "needs clips as they are: set data.mixup_alpha and data.cutmix_alpha to 0."
            )
        if self.source == "label":
            labels = step.batch["label"].tolist()
            if min(labels) < 0:  # -1 would be the last class
                raise ObjectiveError("A video without a label was met; text='label' needs one in every row.")
            sentences = [self.prompt.format(self.class_names[label]) for label in labels]
        else:
            sentences = list(step.batch["caption"])
            if not all(sentences):
                raise ObjectiveError("A video without a caption was met; contrastive learning needs one in every row.")
        return step.model.tokenize(sentences).to(step.batch["clip"].device)

    def predict(self, step: Step) -> Tensor | None:
        if self.class_names is None:
            return None
        with torch.no_grad():
            sentences = [self.prompt.format(name) for name in self.class_names]
            text = step.text(step.model.tokenize(sentences).to(step.video.device), train=False)
            return step.model.logit_scale.exp() * step.video @ text.T
