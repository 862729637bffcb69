"""Probes: what frozen features know, asked with a list to learn from and a list to be tested on.

    img2vid eval probe --model FOLDER --train train.csv --data test.csv

linear       logistic regression on standardised features; its penalty is chosen on a fifth of the training videos
knn          the 20 nearest training videos by cosine vote, weighted by exp(cosine / 0.07) (Wu et al. 2018)
attentive    one learned query attends to the features of the frames, with a learned place in time for each
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from img2vid.choices import PROBES
from img2vid.data.manifest import VideoList
from img2vid.evaluation import metrics
from img2vid.evaluation.conditions import has_gates
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.features import Compute, Features, extract
from img2vid.evaluation.processes import Processes
from img2vid.evaluation.reading import Views, identity
from img2vid.evaluation.results import describe_data, describe_run

NEIGHBOURS, TEMPERATURE = 20, 0.07
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # inverse strength, C
EPOCHS, MIN_STEPS, LEARNING_RATE, WEIGHT_DECAY = 20, 1000, 1e-3, 1e-2


def knn(train: Tensor, labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """Training features (N, D) with labels, test features (n, D) -> probabilities (n, C)."""
    similarity = F.normalize(test.double(), dim=-1) @ F.normalize(train.double(), dim=-1).T
    nearest, index = similarity.topk(min(NEIGHBOURS, len(train)), dim=1)
    votes = (nearest / TEMPERATURE).softmax(dim=1)  # the same weights up to a factor, and no overflow
    return torch.zeros(len(test), num_classes, dtype=torch.float64).scatter_add_(1, labels[index], votes)


def linear(train: Tensor, labels: Tensor, test: Tensor, num_classes: int, seed: int) -> tuple[Tensor, float]:
    """Logistic regression: probabilities (n, C) of the test features, and the penalty chosen."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    x, y, probe = ((train - mean) / std).numpy(), labels.numpy(), ((test - mean) / std).numpy()

    def fit(penalty: float, x, y):
        return LogisticRegression(C=penalty, max_iter=2000).fit(x, y)

    chosen = 1.0
    if labels.bincount()[labels.unique()].min() >= 5:  # with fewer, a fifth would miss classes
        x_fit, x_held, y_fit, y_held = train_test_split(x, y, test_size=0.2, random_state=seed, stratify=y)
        chosen = max(PENALTIES, key=lambda penalty: fit(penalty, x_fit, y_fit).score(x_held, y_held))
    classifier = fit(chosen, x, y)
    out = torch.zeros(len(test), num_classes, dtype=torch.float64)
    out[:, torch.from_numpy(classifier.classes_)] = torch.from_numpy(classifier.predict_proba(probe)).double()
    return out, chosen


class AttentiveProbe(nn.Module):
    """Frame features (B, S, D) -> logits (B, C): where to look is learned, what is seen is frozen."""

    def __init__(self, dim: int, num_steps: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.time_embed = nn.Parameter(torch.zeros(1, num_steps, dim))
        self.query = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        num_heads = max(heads for heads in range(1, max(1, dim // 64) + 1) if dim % heads == 0)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) + self.time_embed
        pooled, _ = self.attention(self.query.expand(len(x), -1, -1), x, x, need_weights=False)  # (B, 1, D)
        return self.head(pooled.squeeze(1))


def attentive(train: Tensor, labels: Tensor, test: Tensor, num_classes: int, seed: int) -> Tensor:
    """Frame features (N, S, D) with labels, (n, S, D) -> probabilities (n, C); AdamW, cosine, no choices left open."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scale = train.std().clamp(min=1e-6)
        train, test = train / scale, test / scale
        probe = AttentiveProbe(train.shape[-1], train.shape[1], num_classes)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        batches = -(-len(train) // 256)
        epochs = max(EPOCHS, -(-MIN_STEPS // batches))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
        with torch.enable_grad():
            for _ in range(epochs):
                for batch in torch.randperm(len(train)).split(256):
                    loss = F.cross_entropy(probe(train[batch]), labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
        with torch.no_grad():
            return torch.cat([probe.eval()(part).double().softmax(-1) for part in test.split(1024)])


def probe(
    model,
    train: VideoList,
    test: VideoList,
    views: Views,
    *,
    kinds: Sequence[str] = PROBES,
    baseline: bool = True,
    seed: int = 0,
    source: str | None = None,
    cache: str | Path | None = None,
    compute: Compute | None = None,
    strict: bool = False,
    shared: Processes | None = None,
    on_progress=lambda count: None,
) -> dict | None:
    """Train probes on one list (one view each) and test them on another (all views, probabilities averaged).

    Returns:
        The result, in the first process; None in the others.
    """
    compute, shared = compute or Compute(), shared or Processes()
    unknown = [kind for kind in kinds if kind not in PROBES]
    if unknown or not kinds:
        raise EvaluationError(f"Probes {unknown}: expected some of {', '.join(PROBES)}.")
    if "linear" in kinds and find_spec("sklearn") is None:
        raise EvaluationError("A linear probe needs scikit-learn. Run: pip install 'img2vid[eval]'")
    for videos in (train, test):
        if all(row.label is None for row in videos.rows):
            raise EvaluationError(f"{videos.source} has no labels. A probe needs a column label.")
    if train.class_names != test.class_names:
        raise EvaluationError(f"{train.source} and {test.source} name other classes; give --classes to both.")
    check_several([row.label for row in train.rows], train.source)
    conditions = ["model"] + (["frame_mean"] if baseline and has_gates(model) else [])
    one_view = replace(views, num_clips=1, num_crops=1)
    # frames hold features, which are their mean: one pass over the videos for all kinds of probe
    level = "frames" if "attentive" in kinds else "features"
    given = {
        "cache": cache,
        "level": level,
        "compute": compute,
        "strict": strict,
        "processes": shared,
        "on_progress": on_progress,
    }
    learned, tested = (extract(model, *of, conditions, **given) for of in ((train, one_view), (test, views)))
    if not shared.is_first:
        return None
    num_classes = (
        len(train.class_names)
        if train.class_names
        else 1 + max(row.label for row in (*train.rows, *test.rows) if row.label is not None)
    )
    result = describe_run("probe", model, source, test, tested, compute, conditions)
    result["train"] = describe_data(train, learned)
    learned_from = {identity(row) for row in train.rows}
    result["data"]["also_in_train"] = sum(identity(row) in learned_from for row in test.rows)
    result["protocol"] |= {
        "name": "probe",
        "fusion": "probability",
        "seed": seed,
        "probes": list(kinds),
        "knn": {"neighbours": NEIGHBOURS, "temperature": TEMPERATURE},
        "linear": {"penalties": list(PENALTIES)},
        "attentive": {"epochs": EPOCHS, "min_steps": MIN_STEPS, "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
    }
    result["metrics"] = {}
    for kind in kinds:
        for name in conditions:
            x, y = labelled(train, learned, name)
            check_several(y.tolist(), f"What can be read of {train.source}")
            seen, labels = labelled(test, tested, name)  # (n, V, ...)
            if level == "frames" and kind != "attentive":
                x, seen = x.mean(2), seen.mean(2)  # (n, V, S, D) -> (n, V, D)
            arguments = x[:, 0], y, seen.flatten(0, 1), num_classes
            chosen = {}
            if kind == "linear":
                probabilities, penalty = linear(*arguments, seed)
                chosen = {"penalty": penalty}
            else:
                probabilities = knn(*arguments) if kind == "knn" else attentive(*arguments, seed)
            probabilities = probabilities.unflatten(0, seen.shape[:2]).mean(1)
            scores = metrics.classification(probabilities, probabilities, labels, seed)
            result["metrics"].setdefault(kind, {})[name] = {**scores, **chosen}
    return result


def check_several(labels: Sequence[int | None], source: str) -> None:
    found = {label for label in labels if label is not None}
    if len(found) < 2:
        raise EvaluationError(f"{source} holds videos of {len(found)} classes; a probe learns from two or more.")


def labelled(videos: VideoList, features: Features, condition: str) -> tuple[Tensor, Tensor]:
    """Features (n, V, ...) and labels (n,) of the videos that have one."""
    labels = [(i, videos.rows[row].label) for i, row in enumerate(features.rows) if videos.rows[row].label is not None]
    if not labels:
        raise EvaluationError(f"None of the readable videos of {videos.source} has a label.")
    return features.of[condition][[i for i, _ in labels]], torch.tensor([label for _, label in labels])
