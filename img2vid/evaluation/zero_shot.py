"""Zero-shot classification of videos, with the image model of the same weights beside it.

img2vid eval zero-shot --model runs/convert/nano_clip --data test.csv --templates action
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from img2vid.choices import FUSIONS
from img2vid.data.manifest import VideoList
from img2vid.evaluation import metrics
from img2vid.evaluation.conditions import has_gates
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.features import Compute, Features, extract
from img2vid.evaluation.own_classes import in_own_classes
from img2vid.evaluation.processes import Processes
from img2vid.evaluation.prompts import (
    check_distinct,
    class_embeddings,
    embed_texts,
    read_templates,
    readable,
    template_hash,
)
from img2vid.evaluation.protocols import Lists, Round, rounds, summarise
from img2vid.evaluation.reading import Views
from img2vid.evaluation.results import describe_run, names_of
from img2vid.evaluation.scores import OwnHead, TextHead, score


def zero_shot(
    model,
    lists: Lists,
    views: Views,
    *,
    templates="action",
    protocol: str = "list",
    fusion: str | None = None,
    baseline: bool = True,
    keep_predictions: bool = False,
    seed: int = 0,
    source: str | None = None,
    cache: str | Path | None = None,
    compute: Compute | None = None,
    strict: bool = False,
    shared: Processes | None = None,
    on_progress=lambda count: None,
    **protocol_options,
) -> dict | None:
    """Measure a model on labelled videos; the result is what goes into the JSON file.

    A model with a classifier of its own is asked for its logits instead of being compared with texts.

    Args:
        protocol_options: of ``protocols.rounds``: num_rounds, class_splits, base_classes.

    Returns:
        The result, in the first process; None in the others.
    """
    compute, shared = compute or Compute(), shared or Processes()
    lists = in_own_classes(model, lists)
    videos = lists.videos
    question = Question.to(model, videos, templates, fusion)
    with_label = [row for row, of in enumerate(videos.rows) if of.label is not None]
    rounds(protocol, lists, with_label, seed=seed, **protocol_options)  # says what is wrong before any video is read
    conditions = ["model"] + (["frame_mean"] if baseline and has_gates(model) else [])
    head = question.head(model.to(compute.device)) if shared.is_first else None
    features = extract(
        model,
        videos,
        views,
        conditions,
        cache=cache,
        level=question.level,
        compute=compute,
        strict=strict,
        processes=shared,
        on_progress=on_progress,
    )
    if not shared.is_first:
        return None
    labelled = labelled_rows(features, videos)
    made = rounds(protocol, lists, labelled, seed=seed, **protocol_options)
    scored = question.scored(head, features)

    task = "classification" if question.own else "zero_shot"
    result = question.describe(task, model, source, features, compute, conditions)
    result["protocol"] |= {
        "name": protocol,
        "seed": seed,
        "rounds": [describe_round(r, question.names) for r in made],
    }
    if "frame_mean" not in conditions:
        result["protocol"]["frame_mean"] = (
            "left out" if not baseline else "this model has no gates whose closing gives the image model"
        )
    result["metrics"] = {}
    for name in conditions:
        measured = [scored[name].metrics(r, seed) for r in made]
        result["metrics"][name] = {"summary": summarise(protocol, measured), "rounds": measured}
    if "frame_mean" in conditions:
        gaps = [
            metrics.difference(
                *(scored[name].right(r) for name in ("model", "frame_mean")), scored["model"].labels(r), seed
            )
            for r in made
        ]
        spread = metrics.mean_and_std([gap["value"] for gap in gaps])
        added = gaps[0] if len(gaps) == 1 else {"value": spread["mean"], "std": spread["std"]}
        result["metrics"]["time_added"] = {"top1": added, "rounds": gaps}
    everything = Round("all", tuple(labelled))
    result["confusion"] = {
        name: metrics.confusion(s.predicted(everything), s.labels(everything), len(question.names))
        for name, s in scored.items()
    }
    if keep_predictions:
        result["predictions"] = list_predictions(scored, everything, videos, question.names)
    return result


def describe_round(r: Round, names: Sequence[str]) -> dict:
    """A round in the result file; classes are None where all compete."""
    classes = None if r.classes is None else [names[c] for c in r.classes]
    return {"name": r.name, "videos": len(r.rows), "classes": classes}


def labelled_rows(features: Features, videos: VideoList) -> list[int]:
    rows = [row for row in features.rows if videos.rows[row].label is not None]
    if not rows:
        raise EvaluationError(f"None of the readable videos of {videos.source} has a label.")
    return rows


@dataclass
class Question:
    """What a model is asked about videos: which of these names? By its text tower, or its own classifier."""

    names: list[str]
    templates: tuple[str, ...]
    template_name: str | None
    own: bool
    fusion: str
    videos: VideoList

    @classmethod
    def to(cls, model, videos: VideoList, templates, fusion: str | None) -> Question:
        """Says what would make the numbers meaningless before any video is read."""
        num_classes = getattr(model, "num_logits", None)  # which a model with text has none of
        if all(row.label is None for row in videos.rows):
            raise EvaluationError(f"{videos.source} has no labels. Classification needs a column label.")
        if len(videos.class_names or "ab") < 2 or num_classes == 1:
            raise EvaluationError(
                f"{videos.source} has one class, so every answer would be right. Give all that compete: --classes FILE."
            )
        if fusion is not None and fusion not in FUSIONS:
            raise EvaluationError(f"fusion={fusion!r}: expected one of {', '.join(FUSIONS)}.")
        if num_classes is not None:
            if fusion == "feature":
                raise EvaluationError("A classifier's views are fused as logit or probability, not as feature.")
            names = videos.class_names or [str(i) for i in range(num_classes)]
            if len(names) != num_classes:
                raise EvaluationError(
                    f"The model's classifier has {num_classes} classes, the list has {len(names)}. "
                    "Give --classes with the training list's, in their order."
                )
            return cls(list(names), (), None, True, fusion or "logit", videos)
        if not hasattr(model, "encode_text"):
            embed_texts(model, ["a"])  # says what to do
        if videos.class_names is None:
            raise EvaluationError(
                f"{videos.source} numbers its classes; give their names: --classes FILE (or ucf101, ...)."
            )
        texts, name = read_templates(templates)
        check_distinct(videos.class_names)
        return cls(list(videos.class_names), texts, name, False, fusion or "feature", videos)

    @property
    def level(self) -> str:
        return "output" if self.own else "features"

    def head(self, model) -> OwnHead | TextHead:
        """What turns features into one score for each class. Made before any video is read: texts can fail too."""
        if self.own:
            return OwnHead(len(self.names))
        return TextHead.of(model, class_embeddings(model, self.names, self.templates))

    def scored(self, head: OwnHead | TextHead, features: Features) -> dict[str, Scored]:
        """Scores under each condition of the features."""
        return {name: Scored(head, features, name, self.videos, self.fusion) for name in features.of}

    def describe(self, task: str, model, source, features: Features, compute: Compute, conditions) -> dict:
        result = describe_run(task, model, source, self.videos, features, compute, conditions)
        labelled = sum(self.videos.rows[row].label is not None for row in features.rows)
        result["data"]["unlabelled"] = len(features.rows) - labelled
        result["protocol"]["fusion"] = self.fusion
        result["protocol"]["bootstrap"] = {"resamples": metrics.RESAMPLES, "confidence": metrics.CONFIDENCE}
        if not self.own:
            result["protocol"]["templates"] = {
                "name": self.template_name,
                "texts": list(self.templates),
                "hash": template_hash(self.templates),
                "classes": {name: readable(name) for name in self.names},
            }
        return result


class Scored:
    """The scores of all videos under one condition, asked for one round at a time."""

    def __init__(self, head, features: Features, condition: str, videos, fusion: str) -> None:
        self.head, self.fusion, self.videos = head, fusion, videos
        self.features = features.of[condition]
        self.place = {row: i for i, row in enumerate(features.rows)}

    def labels(self, r: Round) -> torch.Tensor:
        labels = [self.videos.rows[row].label for row in r.rows]
        return torch.tensor(labels if r.classes is None else [r.classes.index(label) for label in labels])

    def scores(self, r: Round) -> tuple[torch.Tensor, torch.Tensor]:
        return score(self.head, self.features[[self.place[row] for row in r.rows]], self.fusion, r.classes)

    def predicted(self, r: Round) -> torch.Tensor:
        return metrics.predictions(self.scores(r)[0])

    def right(self, r: Round) -> torch.Tensor:
        return self.predicted(r) == self.labels(r)

    def metrics(self, r: Round, seed: int) -> dict:
        scores, probabilities = self.scores(r)
        return {
            "name": r.name,
            "videos": len(r.rows),
            **metrics.classification(scores, probabilities, self.labels(r), seed),
        }


def list_predictions(scored: dict[str, Scored], r: Round, videos, names: Sequence[str]) -> list[dict]:
    paths = names_of(videos)
    out = [{"video": paths[row], "label": names[videos.rows[row].label]} for row in r.rows]
    for condition, s in scored.items():
        ranked, probabilities = s.scores(r)
        for entry, predicted, p in zip(out, metrics.predictions(ranked).tolist(), probabilities, strict=True):
            entry[condition] = {"predicted": names[predicted], "probability": float(p[predicted])}
    return out
