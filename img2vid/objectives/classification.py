"""Cross-entropy over classes: a linear head, or the text tower's embeddings of their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from img2vid.objectives.base import (
    Objective,
    ObjectiveError,
    Step,
    Surroundings,
    choice,
    is_of_text,
    need_text,
    share,
)


class Classification(Objective):
    """Which class a clip belongs to.

    Args:
        head: ``linear``, the model's own classifier (``num_classes`` in its config), or ``text``: a class is what the
            text tower makes of its prompts, as in ViFi-CLIP (arXiv:2212.03640).
        classes: for ``text``: ``label``, the list's class names, put into the prompts; or ``caption``, every distinct
            caption of the training list as it stands. The latter suits lists of few captions, where a contrastive batch
            would hold the same caption several times, each a false negative for the others.
        prompts: templates with ``{}``; a class's embeddings are normalised, averaged, and normalised again (under
            ``caption``, where they are for validation only, the best one counts).
        label_smoothing: share of the target that is spread over all classes.
        scale: what cosines are multiplied by for the softmax of ``text``; None for the model's own ``logit_scale``. The
            larger, the smaller the angles that suffice to tell classes apart.
        train_text: whether the text tower learns. If not, its embeddings are computed once.
        spread: weight of ``text_spread_loss``, which drives apart classes whose embeddings the text tower cannot tell
            apart, such as words it never met: while two classes have one embedding, no gradient can part their videos.
        spread_steps: steps, before training, in which the text tower alone learns these two losses, whether or not it
            learns afterwards. Words it never met need it: with videos that nobody can tell apart yet, learning both
            at once draws the words together, not apart.
        keep_text: weight of ``text_keep_loss``: one minus the cosine between what the embeddings of the classes, and of
            ``keep_prompts``, are and were before training. Classes then part by no more than they must.
    """

    def __init__(
        self,
        head: str = "linear",
        classes: str = "label",
        prompts: Sequence[str] = ("a video of {}.",),
        label_smoothing: float = 0.0,
        scale: float | None = None,
        train_text: bool = False,
        spread: float = 0.0,
        spread_steps: int = 0,
        keep_text: float = 0.0,
        keep_prompts: Sequence[str] = (),
    ) -> None:
        super().__init__()
        choice("head", head, ("linear", "text"))
        choice("classes", classes, ("label", "caption"))
        share("label_smoothing", label_smoothing)
        if not prompts or any("{}" not in prompt for prompt in prompts):
            raise ObjectiveError(f"prompts={list(prompts)!r}: expected sentences with {{}} where the class name goes.")
        if (spread or keep_text) and not (head == "text" and (train_text or spread_steps)):
            raise ObjectiveError(
                "spread and keep_text are about a text tower that learns: head=text, train_text=true or spread_steps."
            )
        if spread_steps and not spread:
            raise ObjectiveError("spread_steps needs the loss that it minimises: give spread a weight.")
        if keep_prompts and not keep_text:
            raise ObjectiveError("keep_prompts are what keep_text is about: give it a weight.")
        self.head, self.classes, self.prompts = head, classes, list(prompts)
        self.label_smoothing, self.scale, self.train_text = label_smoothing, scale, train_text
        self.spread, self.spread_steps = spread, spread_steps
        self.keep_text, self.keep_prompts = keep_text, list(keep_prompts)
        self.trains_text = head == "text" and train_text
        self.reads_scale = head == "text" and scale is None
        self.index: dict[str, int] = {}  # of captions
        self.text_moves = train_text
        self.known: dict[str, Tensor] = {}  # their embeddings, while the text tower stands still

    def setup(self, around: Surroundings) -> None:
        model = around.model
        if self.head == "linear":
            if getattr(model, "classifier", None) is None:
                raise ObjectiveError("head='linear' needs a classifier: give num_classes in the model's config.")
            return
        need_text(model, "head='text'")
        self.known = {}
        # another objective may train it, though this one does not
        self.text_moves = any(p.requires_grad for name, p in model.named_parameters() if is_of_text(name))
        if self.classes == "label" and around.class_names is None:
            raise ObjectiveError("head='text' needs class names, and the training list has none: give data.classes.")
        if self.classes == "caption" and not around.captions:
            raise ObjectiveError("classes='caption', but the training list has no captions.")

        def tokens(sentences: list[list[str]]) -> Tensor:
            flat = model.tokenize([sentence for of_class in sentences for sentence in of_class])
            return flat.unflatten(0, (len(sentences), -1)).to(next(model.parameters()).device)

        if around.class_names is not None:
            self.keep("label_tokens", tokens([[p.format(name) for p in self.prompts] for name in around.class_names]))
        if self.classes == "caption":
            self.index = {caption: i for i, caption in enumerate(around.captions)}
            self.keep("caption_tokens", tokens([[caption] for caption in around.captions]))
        if self.keep_text:
            own = getattr(self, f"{self.classes}_tokens").flatten(0, 1)
            self.keep("kept_tokens", torch.cat([own, *(tokens([[prompt]])[0] for prompt in self.keep_prompts)]))
            with torch.no_grad():
                self.keep("kept", model.encode_text(self.kept_tokens, normalize=True))
        if self.spread_steps and around.training:
            self.spread_out(Step(model, {}))

    def spread_out(self, step: Step) -> None:
        """Train the text tower alone until its classes have embeddings of their own."""
        tower = [p for name, p in step.model.named_parameters() if is_of_text(name, with_scale=True)]
        frozen = [p for p in tower if not p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(tower, lr=1e-3)
        for _ in range(self.spread_steps):
            optimizer.zero_grad()
            losses = self.text_losses(step, self.embed_classes(step, self.classes, train=True))
            if self.classes == "caption" and hasattr(self, "label_tokens"):
                # what a class means should not depend on the rest of the caption
                labels = self.embed_classes(step, "label", train=True)
                losses["label_spread_loss"] = self.text_losses(step, labels)["text_spread_loss"]
            sum(losses.values()).backward()
            optimizer.step()
        optimizer.zero_grad()
        for parameter in frozen:
            parameter.requires_grad_(False)

    def keep(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)  # follows the model to its device; in no checkpoint

    def class_embeddings(self, step: Step, kind: str) -> Tensor:
        """(classes, D), of length one."""
        moving = self.text_moves and torch.is_grad_enabled()
        if moving:
            self.known = {}  # they are about to change
        elif kind in self.known:
            return self.known[kind]
        text = self.embed_classes(step, kind, train=self.train_text)
        if not moving:
            self.known[kind] = text
        return text

    def embed_classes(self, step: Step, kind: str, train: bool) -> Tensor:
        tokens = getattr(self, f"{kind}_tokens")  # (classes, prompts, L)
        text = step.text(tokens.flatten(0, 1), train=train).unflatten(0, tokens.shape[:2])
        return F.normalize(text.mean(dim=1), dim=-1)

    def forward(self, step: Step) -> dict[str, Tensor]:
        if self.head == "linear":
            logits = step.model.classifier(step.features)
            return {"classification_loss": self.cross_entropy(logits, self.targets(step.batch, logits.device))}
        text = self.class_embeddings(step, self.classes)
        logits = self.factor(step) * step.video @ text.T  # (B, classes)
        losses = {"classification_loss": self.cross_entropy(logits, self.targets(step.batch, logits.device))}
        return losses | self.text_losses(step, text) if self.train_text else losses

    def text_losses(self, step: Step, text: Tensor) -> dict[str, Tensor]:
        losses = {}
        if self.spread:
            scale = self.factor(step)
            scale = scale.detach() if isinstance(scale, Tensor) else scale
            likeness = scale * text @ text.T  # (classes, classes)
            own = torch.arange(len(text), device=text.device)
            losses["text_spread_loss"] = self.spread * F.cross_entropy(likeness, own)
        if self.keep_text:
            now = step.text(self.kept_tokens)
            losses["text_keep_loss"] = self.keep_text * (1 - (now * self.kept).sum(dim=-1)).mean()
        return losses

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)

    def targets(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        """Class numbers (B,), or shares of the classes (B, classes) where clips were mixed."""
        if self.classes == "caption":
            if "soft_label" in batch:
                raise ObjectiveError("Mixed clips have shares of labels, not of captions: use classes='label'.")
            return torch.tensor([self.index[caption] for caption in batch["caption"]], device=device)
        target = batch.get("soft_label", batch["label"])
        if not target.is_floating_point() and (target < 0).any():
            raise ObjectiveError("A video without a label was met; classification needs one in every row of the list.")
        return target

    def predict(self, step: Step) -> Tensor | None:
        if self.head == "linear":
            return step.model.classifier(step.features)
        if not hasattr(self, "label_tokens"):
            return None
        if self.classes == "label":
            return self.factor(step) * step.video @ self.class_embeddings(step, "label").T
        # whole captions were learned, not averages of them: a class is as likely as the likeliest of its prompts
        text = step.text(self.label_tokens.flatten(0, 1), train=False)  # (classes * P, D)
        return self.factor(step) * (step.video @ text.T).unflatten(1, self.label_tokens.shape[:2]).amax(dim=2)

    def factor(self, step: Step) -> Tensor | float:
        return step.model.logit_scale.exp() if self.scale is None else self.scale
