"""Retrieval: find the video of a text, and the text of a video, among all of a list.

    img2vid eval retrieval --model FOLDER --data MSRVTT_JSFUSION_test.csv --root videos/

Captions are the queries, every one of them; a video finds its captions when the best of them stands first. Equal scores
share their places: rank = 1 + number greater + number equal / 2, so a model that scores everything alike is at chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from img2vid.data.manifest import Row, VideoList
from img2vid.data.sampling import frame_range
from img2vid.evaluation import metrics
from img2vid.evaluation.conditions import has_gates
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.features import Compute, extract
from img2vid.evaluation.processes import Processes
from img2vid.evaluation.prompts import embed_texts
from img2vid.evaluation.reading import Views, identity
from img2vid.evaluation.results import describe_run, names_of


def ranks(scores: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of the right answers: (of its video for each caption (Q,), of its best caption for each video (N,)).

    Args:
        scores: (Q, N), captions by videos.
        owner: (Q,), the video each caption belongs to; every video has one.
    """
    own = scores.gather(1, owner[:, None])  # (Q, 1)
    text_to_video = rank(scores, own, torch.arange(scores.shape[1])[None] == owner[:, None])
    of_video = owner[None] == torch.arange(scores.shape[1])[:, None]  # (N, Q)
    best = scores.T.masked_fill(~of_video, -torch.inf).max(dim=1, keepdim=True).values  # (N, 1)
    return text_to_video, rank(scores.T, best, of_video)


def rank(scores: Tensor, right: Tensor, is_right: Tensor) -> Tensor:
    """1 + #greater + #equal / 2 among the wrong answers."""
    greater, equal = ((scores > right) & ~is_right).sum(1), ((scores == right) & ~is_right).sum(1)
    return 1 + greater + equal / 2


def dual_softmax(scores: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scores weighted by how much the answer prefers the query (Cheng et al. 2021, arXiv:2109.04290).

    It looks at all queries at once, which a search engine cannot: report it apart. Returns what captions and what
    videos are ranked by, both (Q, N).
    """
    return scores * (scale * scores).softmax(dim=0), scores * (scale * scores).softmax(dim=1)


def recall(found: Tensor, seed: int = 0) -> dict:
    """R@1, R@5, R@10 with intervals, and the median and mean rank."""
    out: dict = {f"r{k}": metrics.share(found <= k, seed) for k in (1, 5, 10)}
    return {**out, "median_rank": float(found.double().quantile(0.5)), "mean_rank": float(found.double().mean())}


def with_captions(videos: VideoList) -> tuple[VideoList, int]:
    """Each video once with all its captions, however many rows it had; and the number of videos without any."""
    merged: dict = {}
    for row in videos.rows:
        key = identity(row)
        merged[key] = replace(row, captions=merged[key].captions + row.captions) if key in merged else row
    rows = tuple(row for row in merged.values() if row.captions)
    if not rows:
        raise EvaluationError(
            f"{videos.source} has no captions. Retrieval needs a column caption (or captions), or an MSR-VTT list."
        )
    return VideoList(rows, None, videos.source), len(merged) - len(rows)


def retrieval(
    model,
    videos: VideoList,
    views: Views,
    *,
    template: str = "{}",
    baseline: bool = True,
    keep_predictions: bool = False,
    picture: str | Path | None = None,
    seed: int = 0,
    source: str | None = None,
    cache: str | Path | None = None,
    compute: Compute | None = None,
    strict: bool = False,
    shared: Processes | None = None,
    on_progress=lambda count: None,
) -> dict | None:
    """Text-to-video and video-to-text retrieval over the readable videos; None in all processes but the first.

    Args:
        picture: a PNG to draw: what the first captions find, and beside it, as ``-similarity.png``, the first scores.
    """
    compute, shared = compute or Compute(), shared or Processes()
    if not hasattr(model, "encode_text"):
        embed_texts(model, ["a"])  # says what to do
    if template.count("{}") != 1:
        raise EvaluationError(f"template={template!r}: expected {{}} once, where the caption goes.")
    videos, uncaptioned = with_captions(videos)
    conditions = ["model"] + (["frame_mean"] if baseline and has_gates(model) else [])
    # before any video is read, as texts can fail too; every different one once, so that equal captions have equal
    # scores to the last bit
    texts = list(dict.fromkeys(template.replace("{}", caption) for row in videos.rows for caption in row.captions))
    embedded = embed_texts(model.to(compute.device), texts).double() if shared.is_first else None
    features = extract(
        model,
        videos,
        views,
        conditions,
        cache=cache,
        compute=compute,
        strict=strict,
        processes=shared,
        on_progress=on_progress,
    )
    if not shared.is_first:
        return None
    captions = [(i, caption) for i, row in enumerate(features.rows) for caption in videos.rows[row].captions]
    owner = torch.tensor([i for i, _ in captions])
    place = {text: i for i, text in enumerate(texts)}
    text = F.normalize(embedded, dim=-1)[[place[template.replace("{}", c)] for _, c in captions]]
    result = describe_run("retrieval", model, source, videos, features, compute, conditions)
    result["data"] |= {"captions": len(captions), "uncaptioned": uncaptioned}
    result["protocol"] |= {"name": "retrieval", "fusion": "feature", "template": template, "seed": seed}
    result["metrics"], found, similarity = {}, {}, {}
    for name in conditions:
        video = F.normalize(F.normalize(features.of[name].double(), dim=-1).mean(1), dim=-1)  # (N, D)
        scores = similarity[name] = text @ video.T
        by_text, by_video = dual_softmax(scores, float(model.logit_scale.detach().exp()))
        found[name] = ranks(scores, owner)
        dual = ranks(by_text, owner)[0], ranks(by_video, owner)[1]
        result["metrics"][name] = {
            "text_to_video": recall(found[name][0], seed),
            "video_to_text": recall(found[name][1], seed),
            "dual_softmax": {"text_to_video": recall(dual[0], seed), "video_to_text": recall(dual[1], seed)},
        }
    if picture is not None:
        draw(similarity["model"], owner, [c for _, c in captions], [videos.rows[row] for row in features.rows], picture)
    if keep_predictions:
        names = names_of(videos)
        result["predictions"] = [
            {"video": names[features.rows[i]], "caption": caption}
            | {name: {"rank": float(found[name][0][q])} for name in conditions}
            for q, (i, caption) in enumerate(captions)
        ]
    return result


def draw(scores: Tensor, owner: Tensor, captions: list[str], rows: Sequence[Row], picture: str | Path) -> None:
    """The five best videos of the first eight captions, as their middle frames, and the first 40 by 40 similarities."""
    from img2vid.data.reading import read_clip
    from img2vid.plots import retrieval_figure, save, similarity_figure

    queries = []
    for text, own, scored in zip(captions[:8], owner.tolist(), scores[:8], strict=False):
        best = scored.argsort(descending=True, stable=True)[:5].tolist()
        pictures = [middle(rows[i], read_clip) for i in best]
        queries.append((text, pictures, best.index(own) if own in best else -1))
    save(retrieval_figure(queries), picture)
    some = [text[:40] for text in captions[:40]]
    matrix = similarity_figure(scores[:40, :40].numpy(), some, [Path(row.path).stem for row in rows[:40]])
    save(matrix, Path(picture).with_name(f"{Path(picture).stem}-similarity.png"))


def middle(row: Row, read_clip):
    """The middle frame of a row's part of its video, (H, W, 3)."""

    def choose(frames, fps):
        first, stop = frame_range(frames, fps, row.start_seconds, row.end_seconds)
        return [(first + stop) // 2]

    return read_clip(row.path, choose)[0].permute(1, 2, 0).numpy()
