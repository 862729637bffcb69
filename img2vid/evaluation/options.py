"""From the options of an evaluation command to what the evaluation takes."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from img2vid.evaluation import webdataset
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.features import Compute
from img2vid.evaluation.processes import Processes
from img2vid.evaluation.protocols import Lists, gather_lists
from img2vid.evaluation.reading import Views
from img2vid.evaluation.results import device_of


def ready_to_write(out: str | Path) -> None:
    """Find out before the work, not after it, that a result cannot be written there."""
    out = Path(out)
    if out.is_dir():
        raise EvaluationError(f"--out {out} is a folder; expected the name of a file.")
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()


def templates_of(options: argparse.Namespace):
    """What was asked for, else what a webdataset folder brings along, else the set ``action``."""
    own = webdataset.templates_of(Path(options.data[0])) if len(options.data) == 1 else None
    return options.templates or own or "action"


def lists_of(options: argparse.Namespace, data: Sequence[str], protocol: str = "list", **changes) -> Lists:
    """The lists the options name, merged."""
    given = {name: getattr(options, name) for name in ("format", "root", "classes", "split", "subset")}
    return gather_lists(data, protocol, unpack_to=Path(options.cache) / "unpacked", **{**given, **changes})


def views_of(options: argparse.Namespace, model) -> Views:
    return Views(
        model.config.num_frames if options.num_frames is None else options.num_frames,
        options.frame_interval,
        options.target_fps,
        options.num_clips,
        options.num_crops,
        options.short_policy,
        options.short_side,
        options.backend,
    )


def compute_of(options: argparse.Namespace, processes: Processes) -> Compute:
    device = device_of(options.device, processes.local_rank)
    return Compute(options.batch_size, options.num_workers, device, options.precision)


def how_of(options: argparse.Namespace, shared: Processes, on_progress: Callable[[int], None]) -> dict[str, Any]:
    """The arguments that all evaluations share, by name."""
    return {
        "seed": options.seed,
        "source": options.model,
        "cache": None if options.no_cache else Path(options.cache),
        "compute": compute_of(options, shared),
        "strict": options.strict,
        "shared": shared,
        "on_progress": on_progress,
    }
