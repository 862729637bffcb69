"""Features of a list of videos: every video is decoded once, shown under all conditions, and never again.

    features = extract(model, videos, views, ["model", "frame_mean"], cache="runs/features")
    features.of["model"]           # (n, V, D): n readable videos, V views
    features.rows                  # which rows of the list they are
    features.problems              # row -> Problem for all the others

The cache is a folder of parts (``img2vid.evaluation.store``), each a few videos under one condition: a run that is
killed goes on where it was, several processes write different parts, and a video that was repaired is read again with
its part. Numbers within a part depend on the list and the batch size, not on processes or workers; another batch size
changes them by rounding alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from img2vid.choices import EVALUATION_PRECISIONS
from img2vid.command import first_line
from img2vid.data.manifest import VideoList
from img2vid.evaluation.conditions import CONDITIONS, LEVELS, order_frames, represent, video_part
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.processes import Processes
from img2vid.evaluation.reading import Problem, Videos, Views, identity, input_spec, read_in_order, stamp
from img2vid.evaluation.store import FORMAT, Store, short_hash, write_whole
from img2vid.evaluation.versions import installed
from img2vid.model import VideoModel
from img2vid.proof.evidence import fingerprint, in_eval_mode
from img2vid.two_towers import VideoTextModel


@dataclass
class Features:
    """What ``extract`` found. ``of[condition]`` is float32 (n, V, D), or (n, V, S, D) at level ``frames``."""

    of: dict[str, Tensor]
    rows: list[int]
    problems: dict[int, Problem]
    model_hash: str
    views: Views


@dataclass(frozen=True)
class Compute:
    """What changes speed, and numbers by rounding at most. batch_size: clips in one forward pass."""

    batch_size: int = 16
    num_workers: int = 2
    device: str = "cpu"
    precision: str = "float32"
    timeout_seconds: float = 300.0

    def __post_init__(self) -> None:
        if self.precision not in EVALUATION_PRECISIONS:
            raise EvaluationError(f"precision={self.precision!r}: expected one of {', '.join(EVALUATION_PRECISIONS)}.")
        if self.batch_size < 1 or self.num_workers < 0:
            raise EvaluationError(f"Expected batch_size >= 1 and num_workers >= 0, given {self}.")
        check_device(self.device)


def check_device(device: str) -> None:
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        why = first_line(error).partition(". ")[0]
        raise EvaluationError(f"device={device!r} cannot be used ({why}). Use 'cpu', or leave it out.") from error


def extract(
    model: VideoModel | VideoTextModel,
    videos: VideoList,
    views: Views,
    conditions: Sequence[str] = ("model",),
    *,
    cache: str | Path | None = None,
    level: str = "features",
    compute: Compute | None = None,
    strict: bool = False,
    processes: Processes | None = None,
    on_progress=lambda count: None,
) -> Features:
    """Features of all readable videos under each condition (see ``conditions.CONDITIONS``).

    Args:
        cache: folder for parts; None for a temporary one that is removed again.
        level: ``features`` (D of the backbone), ``output`` (logits where there is a classifier), ``frames``.
        strict: a video that cannot be read is an error instead of an entry in ``problems``.
        on_progress: called with the number of videos done.

    Raises:
        EvaluationError: no video can be read, or one with ``strict``; settings that do not fit the model.
    """
    compute, processes = compute or Compute(), processes or Processes()
    unknown = [name for name in conditions if name not in CONDITIONS]
    if unknown or level not in LEVELS:
        raise EvaluationError(
            f"Expected conditions of {list(CONDITIONS)} and a level of {LEVELS}: {unknown}, {level!r}"
        )
    size = video_part(model).config.tubelet_size
    if views.num_frames % size:
        raise EvaluationError(
            f"num_frames={views.num_frames} is no multiple of this model's tubelets of {size} frames."
        )
    model_hash = hash_of_model(model)
    key = cache_key(model, model_hash, videos, views, level, compute.precision)
    temporary = tempfile.mkdtemp(prefix="img2vid-") if cache is None and processes.is_first else None
    folder = Path(processes.agree(temporary) or Path(cache) / f"{model_hash[:12]}-{short_hash(key)}")
    try:
        write_whole(folder / "key.json", json.dumps(key, indent=1).encode())
        store, reader = Store(folder, videos), Videos(videos, views, input_spec(model))
        fill(store, model, reader, conditions, level, compute, strict, processes, on_progress)
        processes.wait()  # until all parts are there
        features = gather(store, conditions, model_hash, views)
        processes.wait()  # until all have read them
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    if not features.rows:
        listed = "\n  ".join(p.text for p in list(features.problems.values())[:5])
        raise EvaluationError(f"None of the {len(videos)} videos of {videos.source} can be read:\n  {listed}")
    if strict and features.problems:
        raise strict_error(features.problems)
    return features


def gather(store: Store, conditions: Sequence[str], model_hash: str, views: Views) -> Features:
    """All parts of all conditions, for the videos that could be read under every one of them."""
    found = {name: store.read(name) for name in conditions}
    rows = sorted(set.intersection(*(set(rows) for _, rows, _ in found.values())))
    features = Features({}, rows, {}, model_hash, views)
    for name, (values, own_rows, problems) in found.items():
        place = {row: i for i, row in enumerate(own_rows)}
        features.of[name] = values[[place[row] for row in rows]] if rows else values
        features.problems |= problems
    return features


def fill(store, model, reader, conditions, level, compute, strict, processes, on_progress) -> None:
    """Make the parts that are not there yet; of the parts, every process takes each ``world_size``-th."""
    mine = range(processes.rank, store.num_parts, processes.world_size)
    todo = [(part, missing) for part in mine if (missing := [name for name in conditions if not store.has(part, name)])]
    on_progress(sum(len(store.rows(part)) for part in mine) - sum(len(store.rows(part)) for part, _ in todo))
    model.to(compute.device)
    items = read_in_order(
        reader, [row for part, _ in todo for row in store.rows(part)], compute.num_workers, compute.timeout_seconds
    )
    per_batch = max(1, compute.batch_size // reader.num_views)
    with in_eval_mode(model):
        for part, missing in todo:
            stamps = [stamp(store.videos.rows[row].path) for row in store.rows(part)]
            good, problems, values = [], {}, {name: [] for name in missing}
            for batch in batched((next(items) for _ in store.rows(part)), per_batch, problems, on_progress):
                if strict and problems:
                    raise strict_error(problems)
                rows, clips = [row for row, _ in batch], [clip for _, clip in batch]
                good += rows
                for name in missing if batch else ():
                    values[name].append(forward(model, clips, rows, name, level, compute))
            if sorted([*good, *problems]) != list(store.rows(part)):
                raise AssertionError(f"Part {part}: rows {store.rows(part)} were asked for, {good} and {problems} came")
            for name, parts in values.items():
                store.write(part, name, good, torch.cat(parts) if parts else None, problems, stamps)


def batched(items, per_batch: int, problems: dict, on_progress) -> Iterator[list[tuple[int, Tensor]]]:
    """The readable ones of ``items`` (row, clips, problem), ``per_batch`` at a time; the others go into ``problems``.

    No more than one batch of clips is held. The last batch may be empty.
    """
    batch = []
    for row, clips, problem in items:
        if problem is None:
            batch.append((row, clips))
        else:
            problems[row] = problem
        on_progress(1)
        if len(batch) == per_batch:
            yield batch
            batch = []
    yield batch


def forward(model, clips: list[Tensor], rows: list[int], name: str, level: str, compute: Compute) -> Tensor:
    """The features of a few videos, (n, V, ...), float32 on the CPU."""
    condition, views = CONDITIONS[name], clips[0].shape[0]
    batch = torch.cat(clips).to(compute.device)  # (n * V, T, C, H, W), uint8
    size = video_part(model).config.tubelet_size
    batch = order_frames(batch, condition.order, [row for row in rows for _ in range(views)], size)
    dtype = None if compute.precision == "float32" else getattr(torch, compute.precision)
    weights = next(model.parameters()).dtype
    device_type = torch.device(compute.device).type
    with torch.autocast(device_type, dtype) if dtype is not None else nullcontext():
        x = represent(model, model.normalize(batch).to(weights), condition, level)
    x = x.float().cpu()
    if not torch.isfinite(x).all():
        raise EvaluationError(f"Features under condition {name!r} are nan or infinite: the weights have diverged.")
    return x.unflatten(0, (len(clips), views))


def cache_key(model, model_hash: str, videos: VideoList, views: Views, level: str, precision: str) -> dict:
    """Everything that features depend on."""
    rows = [identity(row) for row in videos.rows]
    return {
        "format": FORMAT,
        "model": model_hash,
        "config": {k: list(v) if isinstance(v, tuple) else v for k, v in model.config.to_dict().items()},
        "rows": short_hash(rows),
        "views": asdict(views),
        "input": asdict(input_spec(model)),
        "level": level,
        "precision": precision,
        "versions": installed(),
    }


def hash_of_model(model) -> str:
    """SHA-256 over the names and bits of all weights."""
    return fingerprint(model.state_dict())


def strict_error(problems: dict[int, Problem]) -> EvaluationError:
    listed = "\n  ".join(f"{p.kind}: {p.text}" for p in problems.values())
    return EvaluationError(f"A video cannot be read, and strict was asked for:\n  {listed}")
