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
        spread_steps: steps, before training, in which the text tower alone learns these losses, whether or not it
            learns afterwards. Words it never met need it: with videos that nobody can tell apart yet, learning both
            at once draws the words together, not apart.
        spread_lr: learning rate of these steps, falling to zero.
        keep_text: weight of ``text_keep_loss``: one minus the cosine between the embeddings of ``keep_prompts``, and
            without ``keep_classes`` of the classes as well, as they are and as they were before training.
        keep_classes: weight of ``class_keep_loss``: divergence of each class's shares of ``keep_prompts``, a softmax of
            cosines times the scale, from what they were. Classes may then part in any direction but those: "the digit
            seven moving left" goes on being nearest to "the digit seven".
        keep_prompts: sentences; those with ``{}`` once for each of ``keep_names``.
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
        spread_lr: float = 1e-3,
        keep_text: float = 0.0,
        keep_classes: float = 0.0,
        keep_prompts: Sequence[str] = (),
        keep_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        choice("head", head, ("linear", "text"))
        choice("classes", classes, ("label", "caption"))
        share("label_smoothing", label_smoothing)
        if not prompts or any("{}" not in prompt for prompt in prompts):
            raise ObjectiveError(f"prompts={list(prompts)!r}: expected sentences with {{}} where the class name goes.")
        if (spread or keep_classes or keep_text) and not (head == "text" and (train_text or spread_steps)):
            raise ObjectiveError(
                "spread, keep_classes and keep_text are about a text tower that learns: head=text, train_text=true or "
                "spread_steps."
            )
        if spread_steps and not spread:
            raise ObjectiveError("spread_steps needs the loss that it minimises: give spread a weight.")
        if keep_prompts and not keep_text:
            raise ObjectiveError("keep_prompts are what keep_text is about: give it a weight.")
        if keep_classes and not keep_prompts:
            raise ObjectiveError("keep_classes keeps the classes' likeness to keep_prompts: give those.")
        if any("{}" in prompt for prompt in keep_prompts) != bool(keep_names):
            raise ObjectiveError("keep_names are what {} stands for in keep_prompts: give both or neither.")
        self.head, self.classes, self.prompts = head, classes, list(prompts)
        self.label_smoothing, self.scale, self.train_text = label_smoothing, scale, train_text
        self.spread, self.spread_steps, self.spread_lr = spread, spread_steps, spread_lr
        self.keep_classes, self.keep_text = keep_classes, keep_text
        self.keep_prompts = [p.format(n) for p in keep_prompts for n in (keep_names if "{}" in p else [""])]
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
        if self.keep_prompts:
            self.keep("kept_tokens", tokens([self.keep_prompts]))
        if self.keep_text:
            step = Step(model, {})
            with torch.no_grad():
                before = self.embed(step, self.learning, train=False)
                for name in self.kept:
                    self.keep(f"{name}_before", before[name])
                if self.keep_classes:
                    self.keep("shares_before", self.shares_of_kept(step, before))
        if self.spread_steps and around.training:
            self.spread_out(Step(model, {}))

    def spread_out(self, step: Step) -> None:
        """Train the text tower alone until its classes have embeddings of their own."""
        tower = [p for name, p in step.model.named_parameters() if is_of_text(name, with_scale=True)]
        frozen = [p for p in tower if not p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(tower, lr=self.spread_lr)
        # down to zero, or the last steps would leave kept prompts wherever they happened to be
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=self.spread_steps)
        has_labels = self.classes == "caption" and hasattr(self, "label_tokens")
        names = self.learning + ["label"] * has_labels
        for _ in range(self.spread_steps):
            optimizer.zero_grad()
            text = self.embed(step, names)
            losses = self.text_losses(step, text)
            if has_labels:  # what a class means should not depend on the rest of the caption
                losses["label_spread_loss"] = self.spread_loss(step, text["label"])
            sum(losses.values()).backward()
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
        for parameter in frozen:
            parameter.requires_grad_(False)

    def keep(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)  # follows the model to its device; in no checkpoint

    @property
    def kept(self) -> list[str]:
        """Whose embeddings are to stay where they were."""
        return ["kept"] * bool(self.keep_prompts) + [self.classes] * (not self.keep_classes)

    @property
    def learning(self) -> list[str]:
        """What the text tower's own losses are about."""
        return [self.classes] + ["kept"] * bool(self.keep_prompts)

    def embed(self, step: Step, names: Sequence[str], train: bool = True) -> dict[str, Tensor]:
        """By name, embeddings of the prompts (classes, prompts, D), each of length one.

        Captions, prompts and what is kept may be the same sentences: each is encoded once.
        """
        tokens = {name: getattr(self, f"{name}_tokens") for name in names}  # each (classes, prompts, L)
        if not tokens:
            return {}
        rows, places = torch.cat([x.flatten(0, 1) for x in tokens.values()]).unique(dim=0, return_inverse=True)
        parts = step.text(rows, train=train)[places].split([x.shape[:2].numel() for x in tokens.values()])
        return {name: part.unflatten(0, x.shape[:2]) for part, (name, x) in zip(parts, tokens.items(), strict=True)}

    def embed_known(self, step: Step, name: str) -> Tensor:
        """As ``embed``, of one name and without gradients, once until the text tower next learns."""
        if name not in self.known:
            self.known |= self.embed(step, [name], train=False)
        return self.known[name]

    def forward(self, step: Step) -> dict[str, Tensor]:
        if self.head == "linear":
            logits = step.logits
            return {"classification_loss": self.cross_entropy(logits, self.targets(step.batch, logits.device))}
        if self.text_moves and torch.is_grad_enabled():
            self.known = {}  # what the text tower says is about to change
        learns = self.train_text and torch.is_grad_enabled()
        text = self.embed(step, self.learning) if learns else {self.classes: self.embed_known(step, self.classes)}
        logits = self.factor(step) * step.video @ class_embeddings(text[self.classes]).T  # (B, classes)
        losses = {"classification_loss": self.cross_entropy(logits, self.targets(step.batch, logits.device))}
        return losses | self.text_losses(step, text) if learns else losses

    def text_losses(self, step: Step, text: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the text tower learns without videos, given what it now makes of classes and kept prompts."""
        losses = {}
        if self.spread:
            losses["text_spread_loss"] = self.spread_loss(step, text[self.classes])
        if self.keep_text:
            cosines = [(text[name] * getattr(self, f"{name}_before")).sum(dim=-1).flatten() for name in self.kept]
            losses["text_keep_loss"] = self.keep_text * (1 - torch.cat(cosines)).mean()
        if self.keep_classes:
            shares = self.shares_of_kept(step, text)
            away = F.kl_div(shares, self.shares_before, reduction="batchmean", log_target=True)
            losses["class_keep_loss"] = self.keep_classes * away
        return losses

    def shares_of_kept(self, step: Step, text: Mapping[str, Tensor]) -> Tensor:
        """What kept prompts the classes are near, (classes, kept), as logarithms of shares.

        Near to the prompts as they were: they are not to follow the classes.
        """
        likeness = class_embeddings(text[self.classes]) @ self.kept_before.flatten(0, 1).T
        return (fixed(self.factor(step)) * likeness).log_softmax(dim=-1)

    def spread_loss(self, step: Step, prompts: Tensor) -> Tensor:
        text = class_embeddings(prompts)
        likeness = fixed(self.factor(step)) * text @ text.T  # (classes, classes)
        return self.spread * F.cross_entropy(likeness, torch.arange(len(text), device=text.device))

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
            return step.logits
        if not hasattr(self, "label_tokens"):
            return None
        prompts = self.embed_known(step, "label")
        if self.classes == "label":
            return self.factor(step) * step.video @ class_embeddings(prompts).T
        # whole captions were learned, not averages of them: a class is as likely as the likeliest of its prompts
        scores = step.video @ prompts.flatten(0, 1).T  # (B, classes * prompts)
        return self.factor(step) * scores.unflatten(1, prompts.shape[:2]).amax(dim=2)

    def forget(self) -> None:
        self.known = {}

    def factor(self, step: Step) -> Tensor | float:
        return step.model.logit_scale.exp() if self.scale is None else self.scale


def class_embeddings(prompts: Tensor) -> Tensor:
    """Embeddings of prompts (classes, prompts, D) -> of classes (classes, D): averaged, and of length one."""
    return F.normalize(prompts.mean(dim=1), dim=-1)


def fixed(scale: Tensor | float) -> Tensor | float:
    """A temperature that no gradient reaches."""
    return scale.detach() if isinstance(scale, Tensor) else scale
