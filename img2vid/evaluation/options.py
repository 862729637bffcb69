"""What the evaluation commands have in common: their options, the model, the progress bar."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from img2vid.data.lists import READERS
from img2vid.data.sampling import SHORT_POLICIES
from img2vid.evaluation import webdataset
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.features import PRECISIONS, Compute
from img2vid.evaluation.processes import Processes
from img2vid.evaluation.protocols import Lists, gather_lists
from img2vid.evaluation.reading import Views
from img2vid.evaluation.results import device_of


def add_model(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="written by img2vid.convert or save_pretrained"
    )
    parser.add_argument("--out", default=out, help=f"result file, JSON (default: {out})")


def ready_to_write(out: str | Path) -> None:
    """Find out before the work, not after it, that a result cannot be written there."""
    out = Path(out)
    if out.is_dir():
        raise EvaluationError(f"--out {out} is a folder; expected the name of a file.")
    out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out.parent).close()


def add_data(parser: argparse.ArgumentParser, several: bool = True) -> None:
    group = parser.add_argument_group("videos")
    group.add_argument("--data", required=True, nargs="+" if several else None, metavar="LIST", help="list or folder")
    group.add_argument("--format", default="auto", choices=["auto", *READERS], help="of the list (docs/data.md)")
    group.add_argument("--root", help="folder the paths of the list start at (default: the list's folder)")
    group.add_argument("--classes", help="kinetics400, ucf101, hmdb51, ssv2, or a text file with one class a line")
    group.add_argument("--split", type=int, default=1, help="UCF101, HMDB51: which split (default: 1)")
    group.add_argument("--subset", default="test", help="HMDB51: train or test (default: test)")


def add_views(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("clips")
    group.add_argument("--num-frames", type=int, help="per clip (default: the model's own)")
    group.add_argument("--frame-interval", type=int, help="frames between two (default: one from each equal part)")
    group.add_argument("--target-fps", type=float, help="frames per second, instead of an interval")
    group.add_argument("--num-clips", type=int, default=1, help="clips per video (default: 1)")
    group.add_argument("--num-crops", type=int, default=1, choices=(1, 3), help="squares per clip (default: 1)")
    group.add_argument("--short-policy", default="repeat_last", choices=SHORT_POLICIES)
    group.add_argument("--short-side", type=int, help="pixels to resize to before the cut (default: the model's size)")
    group.add_argument("--backend", default="auto", help="of the reader (default: auto)")


def add_compute(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument("--batch-size", type=int, default=16, help="clips in one forward pass (default: 16)")
    group.add_argument("--num-workers", type=int, default=2, help="processes that decode (default: 2)")
    group.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    group.add_argument("--precision", default="float32", choices=list(PRECISIONS))
    group.add_argument(
        "--cache", default="runs/features", metavar="FOLDER", help="of features (default: runs/features)"
    )
    group.add_argument("--no-cache", action="store_true", help="keep no features")
    group.add_argument("--strict", action="store_true", help="a video that cannot be read is an error")
    group.add_argument("--seed", type=int, default=0, help="of bootstrap and random classes (default: 0)")


def add_templates(parser) -> None:
    parser.add_argument(
        "--templates", help="name of a set, or text file with one template a line (default: the data's own, or action)"
    )


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


def running(options: argparse.Namespace, shared: Processes, on_progress: Callable[[int], None]) -> dict[str, Any]:
    """The arguments that all evaluations take, beside the model, the videos and their views."""
    return {
        "seed": options.seed,
        "source": options.model,
        "cache": None if options.no_cache else Path(options.cache),
        "compute": compute_of(options, shared),
        "strict": options.strict,
        "shared": shared,
        "on_progress": on_progress,
    }


@contextmanager
def progress_bar(title: str, total: int, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar with the time that is left, on standard error; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    hidden = not shown or not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
