"""Result files: the numbers, and everything one needs to get or to doubt them. JSON, readable without a model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from img2vid._version import __version__
from img2vid.checkpoints.native import describe_model
from img2vid.data.manifest import VideoList
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.features import Compute, Features
from img2vid.evaluation.reading import identity, input_spec
from img2vid.evaluation.store import short_hash, write_whole
from img2vid.evaluation.versions import versions

FORMAT = 1


def describe_run(
    task: str,
    model,
    source: str | None,
    videos: VideoList,
    features: Features,
    compute: Compute,
    conditions: Sequence[str],
) -> dict[str, Any]:
    """The part of a result that all tasks share."""
    return {
        "format": FORMAT,
        "task": task,
        "model": {"folder": source, "hash": features.model_hash, **described(model)},
        "data": describe_data(videos, features),
        "protocol": {
            "views": {**asdict(features.views), "number": features.views.number},
            "input": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(input_spec(model)).items()},
            "precision": compute.precision,
            "batch_size": compute.batch_size,
            "device": str(compute.device),
            "conditions": list(conditions),
        },
        "versions": versions(),
    }


def described(model) -> dict[str, Any]:
    facts = describe_model(model)
    return {key: facts[key] for key in ("kind", "dtype", "video")}


def describe_data(videos: VideoList, features: Features) -> dict[str, Any]:
    """The list, its hash, and every video that is not in the numbers."""
    names = names_of(videos)
    problems = {kind: [] for kind in ("missing", "undecodable")}
    for row, problem in sorted(features.problems.items()):
        problems[problem.kind].append({"video": names[row], "problem": problem.text})
    return {
        "list": videos.source,
        "hash": hash_of_list(videos),
        "videos": len(videos),
        "used": len(features.rows),
        "repeated": len(videos) - len({identity(row) for row in videos.rows}),
        **problems,
        "classes": None if videos.class_names is None else list(videos.class_names),
    }


def names_of(videos: VideoList) -> list[str]:
    """Paths below the folder that all videos share, so that lists agree on machines that keep them elsewhere."""
    paths = [os.path.abspath(row.path) for row in videos.rows]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    if common == os.path.dirname(common):  # the root of everything: without it a path would look like a relative one
        return paths
    return [os.path.relpath(path, common) for path in paths]


def hash_of_list(videos: VideoList) -> str:
    """Over names, labels, captions and time ranges, in order; not over where the folder is."""
    classes = videos.class_names
    rows = [
        [
            name,
            row.label if classes is None or row.label is None else classes[row.label],
            list(row.captions),
            row.start_seconds,
            row.end_seconds,
        ]
        for name, row in zip(names_of(videos), videos.rows, strict=True)
    ]
    return short_hash([rows, None if classes is None else list(classes)])


def write_result(result: dict, path: str | Path) -> Path:
    """Write a result, whole or not at all."""
    path = Path(path)
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    # lists of numbers on one line: a confusion matrix is read by rows (a text has no line breaks in JSON)
    text = re.sub(r"\[\n\s*(-?\d[-+.,\deE\s]*?)\n\s*\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    write_whole(path, (text + "\n").encode())
    return path


def read_result(path: str | Path) -> dict:
    """Read a result file.

    Raises:
        EvaluationError: it is not one, or from a later version.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read as a result file: {error}") from error
    if not isinstance(result, dict) or "task" not in result or "protocol" not in result:
        raise EvaluationError(f"{path} is JSON, but no result of img2vid eval.")
    if result.get("format", 0) > FORMAT:
        raise EvaluationError(
            f"{path} is in format {result['format']}; this img2vid {__version__} reads up to {FORMAT}."
        )
    return result


def device_of(wanted: str, local_rank: int = 0) -> str:
    """``auto`` is this process's GPU where there is one, otherwise the CPU."""
    if wanted != "auto":
        return wanted
    return f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
