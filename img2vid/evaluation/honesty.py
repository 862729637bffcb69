"""Was time learned at all? The same videos as they are, and with their order of frames damaged.

    img2vid eval honesty --model FOLDER --data test.csv        honesty.json and honesty.png

A model that names a video as well from shuffled frames, or from one frame shown T times, does not use time, whatever
its accuracy. Reversal is the sharpest question where classes are each other's reversal, as in `img2vid data synth`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from img2vid.evaluation import metrics
from img2vid.evaluation.conditions import has_gates
from img2vid.evaluation.features import Compute, extract
from img2vid.evaluation.layers import branch_ratios
from img2vid.evaluation.own_classes import in_own_classes
from img2vid.evaluation.processes import Processes
from img2vid.evaluation.protocols import Lists, Round
from img2vid.evaluation.reading import Videos, Views, input_spec
from img2vid.evaluation.zero_shot import Question, labelled_rows

PANEL = ("model", "shuffled", "reversed", "static", "half", "frame_mean")
LAYER_CLIPS = 16  # videos that the ratios of the layers are measured on


def honesty(
    model,
    lists: Lists,
    views: Views,
    *,
    templates="action",
    fusion: str | None = None,
    seed: int = 0,
    source: str | None = None,
    cache: str | Path | None = None,
    compute: Compute | None = None,
    strict: bool = False,
    shared: Processes | None = None,
    on_progress=lambda count: None,
) -> dict | None:
    """Accuracy under each condition, the share of predictions that change, and what each temporal layer adds.

    Returns:
        The result, in the first process; None in the others.
    """
    compute, shared = compute or Compute(), shared or Processes()
    lists = in_own_classes(model, lists)
    videos = lists.videos
    question = Question.to(model, videos, templates, fusion)
    conditions = [name for name in PANEL if name != "frame_mean" or has_gates(model)]
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
    everything = Round("all", tuple(labelled_rows(features, videos)))
    scored = question.scored(head, features)
    result = question.describe("honesty", model, source, features, compute, conditions)
    result["protocol"] |= {"name": "honesty", "seed": seed}
    result["metrics"], result["confusion"] = {}, {}  # confusion: what each class is taken for under each condition
    as_is = scored["model"].predicted(everything)
    labels, right = scored["model"].labels(everything), scored["model"].right(everything)
    for name, s in scored.items():
        changed = s.predicted(everything) != as_is
        result["metrics"][name] = {
            **s.metrics(everything, seed),
            "lost": metrics.difference(right, s.right(everything), labels, seed),
            "changed": metrics.share(changed, seed),
        }
        result["confusion"][name] = metrics.confusion(s.predicted(everything), labels, len(question.names))
    result["layers"] = measure_layers(model, videos, views, features.rows[:LAYER_CLIPS], compute)
    return result


def measure_layers(model, videos, views: Views, rows: Sequence[int], compute: Compute) -> list[dict]:
    reader, weight = Videos(videos, views, input_spec(model)), next(model.parameters())
    found = (clip for _, clip, problem in map(reader.__getitem__, rows) if problem is None)
    return branch_ratios(model, [model.normalize(clip[:1].to(weight.device)).to(weight.dtype) for clip in found])
