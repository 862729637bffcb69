"""`img2vid data check LIST`: is every video of a list there, whole and long enough? Counts frames, names what is not.

Writes two files beside the list: LIST.checked.csv, the good rows with their frame counts, and LIST.quarantine.csv, the
others with the reason. Exit code 0: all good; 1: some rows are quarantined; 2: the list itself is wrong.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from img2vid.data import sampling
from img2vid.data.errors import ListError, VideoError
from img2vid.data.lists import READERS, read_list
from img2vid.data.manifest import FORMATS, Row, VideoList, looks_like_number, write_manifest
from img2vid.data.reading import open_video


@dataclass(frozen=True)
class Finding:
    """What was found out about one row: its frame count, or the problem (a kind and a sentence)."""

    row: Row
    frames: int | None = None
    kind: str | None = None  # missing, undecodable, damaged, too short
    problem: str = ""
    digest: str = ""


@dataclass(frozen=True)
class CheckReport:
    good: tuple[Row, ...]
    quarantined: tuple[Finding, ...]
    duplicates: tuple[tuple[Row, Row], ...]  # (row, the earlier row with the same content and time range)
    class_counts: dict[str, int]


def check_row(row: Row, min_frames: int = 1, decode: bool = True) -> Finding:
    """Check one row. decode: every frame; otherwise the packets and the first frame."""
    if not os.path.exists(row.path):
        return Finding(row, kind="missing", problem=f"{row.path}: no such file")
    try:
        with open_video(row.path, on_error="conceal") as reader:
            frames = reader.decode_everything() if decode and hasattr(reader, "decode_everything") else reader.frames
            damaged = reader.damaged
            reader.read([0])
            first, stop = sampling.frame_range(frames, reader.fps, row.start_seconds, row.end_seconds)
    except (VideoError, IndexError) as error:
        return Finding(row, kind="undecodable", problem=str(error))
    except ValueError as error:
        return Finding(row, kind="too short", problem=f"{row.path}: {error}")
    if damaged:
        return Finding(row, frames, "damaged", f"{row.path}: {damaged} damaged or missing packets")
    if stop - first < min_frames:
        return Finding(row, frames, "too short", f"{row.path}: {stop - first} frames, fewer than {min_frames}")
    return Finding(row, frames, digest=_digest(row.path))


def check_list(
    videos: VideoList,
    min_frames: int = 1,
    decode: bool = True,
    num_workers: int | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> CheckReport:
    """Check all rows in `num_workers` processes (default: one per core). A file that kills its process is bad too."""
    findings = sorted(
        in_processes(check_row, videos.rows, (min_frames, decode), num_workers, on_progress),
        key=lambda pair: pair[0],
    )
    findings = [
        found if isinstance(found, Finding) else Finding(videos.rows[i], kind="undecodable", problem=str(found))
        for i, found in findings
    ]
    seen, duplicates, good, counts = {}, [], [], Counter()
    for found in findings:
        if found.kind:
            continue
        row = replace(found.row, frames=found.frames)
        key = (found.digest, row.start_seconds, row.end_seconds)
        if key in seen:
            duplicates.append((row, seen[key]))
        seen.setdefault(key, row)
        good.append(row)
        if row.label is not None:
            counts[_name(videos, row.label)] += 1
    if videos.class_names:
        counts.update(dict.fromkeys(videos.class_names, 0))
    return CheckReport(
        tuple(good), tuple(f for f in findings if f.kind), tuple(duplicates), dict(sorted(counts.items()))
    )


def in_processes(work: Callable, items: Iterable, arguments: tuple, num_workers: int | None, on_progress: Callable):
    """Yield (item number, work(item, *arguments)) as they finish; for an item that kills its process, a VideoError.

    A killed process breaks the whole pool, whoever did it; what was unfinished is then done one item at a time.
    """
    left, spawn = dict(enumerate(items)), get_context("spawn")  # a forked child of a threaded process can deadlock
    pool = ProcessPoolExecutor(min(num_workers or os.cpu_count() or 1, len(left)), spawn, finish_what_was_begun)
    try:
        with interrupts_later():
            futures = {pool.submit(work, item, *arguments): number for number, item in left.items()}
        for future in as_completed(futures):
            result = future.result()
            del left[futures[future]]
            on_progress()
            yield futures[future], result
    except BrokenProcessPool:
        pass
    finally:  # nothing new after Ctrl-C
        pool.shutdown(cancel_futures=True)
    while left:
        with ProcessPoolExecutor(1, spawn, finish_what_was_begun) as pool:
            for number in list(left):
                item = left.pop(number)
                try:
                    with interrupts_later():
                        future = pool.submit(work, item, *arguments)
                    result = future.result()
                except BrokenProcessPool:
                    result = VideoError.about(str(getattr(item, "path", item)), "reading it killed the process")
                on_progress()
                yield number, result
                if isinstance(result, VideoError):
                    break  # this pool is gone


def finish_what_was_begun() -> None:
    """Ctrl-C reaches every process of a command; only the one that was started by hand should act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def interrupts_later() -> Iterator[None]:
    """A Ctrl-C that comes inside takes effect at the end: a pool that is half started cannot be shut down.

    Processes started inside have SIGINT blocked, so that it does not end them before they can say that they ignore it.
    """
    if threading.current_thread() is not threading.main_thread():  # no other gets to handle signals
        yield
        return
    came = []
    handler = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    can_block = hasattr(signal, "pthread_sigmask")  # not on Windows
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if can_block else None
    try:
        yield
    finally:
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)


def write_quarantine(findings: Iterable[Finding], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "kind", "problem", "where"])
            writer.writerows([f.row.path, f.kind, f.problem, f.row.where] for f in findings)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def named_rows(videos: VideoList, rows: Iterable[Row]) -> list[Row]:
    """Rows with class names for labels again, so that a written list does not depend on the numbering.

    Unless a name looks like a number, as folders named 1, 2, 10 do: it would be read as one, and not as the same.
    """
    if any(map(looks_like_number, videos.class_names or ())):
        return list(rows)
    return [row if row.label is None else replace(row, label=_name(videos, row.label)) for row in rows]


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("list", help="the list of videos: a file, or a folder with one folder per class")
    parser.add_argument("--format", default="auto", choices=["auto", *READERS], help="of the list (docs/data.md)")
    parser.add_argument("--root", help="folder the paths of the list start at (default: the list's folder)")
    parser.add_argument("--classes", help="text file with one class name per line, in the order of their numbers")
    parser.add_argument("--split", type=int, default=1, help="HMDB51: which split")
    parser.add_argument("--subset", default="train", help="HMDB51: train or test")
    parser.add_argument("--num-workers", type=at_least_one, default=None, help="processes (default: one per core)")


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number, 1 or more, given {text!r}")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("img2vid data check", description=__doc__.split("\n\n")[0])
    add_list_arguments(parser)
    parser.add_argument("--min-frames", type=int, default=1, help="shorter videos are quarantined")
    parser.add_argument("--fast", action="store_true", help="look at packets and the first frame, do not decode all")
    parser.add_argument("--output", help=f"where good rows go ({', '.join(FORMATS)}; default: LIST.checked.csv)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        videos = read_list(args.list, args.format, args.root, args.classes, args.split, args.subset)
        return _check_and_print(videos, args)
    except (ListError, OSError) as error:  # OSError: the disk is full, the folder cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


def _check_and_print(videos: VideoList, args) -> int:
    from img2vid.command import progress_bar

    source = Path(args.list)
    output = Path(args.output) if args.output else source.with_name(f"{source.stem}.checked.csv")
    if output.suffix.lower() not in FORMATS:
        raise ListError(f"{output}: a manifest is a {', '.join(FORMATS)} file")
    quarantine = output.with_name(output.stem.removesuffix(".checked") + ".quarantine.csv")
    with progress_bar("checking", len(videos)) as advance:
        report = check_list(videos, args.min_frames, not args.fast, args.num_workers, lambda: advance(1))
    for name, count in report.class_counts.items():
        print(f"class {name}: {count}" + ("" if count else "   <- no good video"))
    labels = {row.label for row in videos.rows if row.label is not None}
    if videos.class_names is None and labels and min(labels) > 0:
        first, last = min(labels), max(labels)
        print(f"labels begin at {first}: class numbers count from 0, so {last} needs {last + 1} classes")
    for row, earlier in report.duplicates:
        print(f"duplicate: {row.where}: {row.path} has the content of {earlier.path} ({earlier.where})")
    for found in report.quarantined:
        print(f"{found.kind}: {found.row.where}: {found.problem}")
    write_manifest(named_rows(videos, report.good), output)
    write_quarantine(report.quarantined, quarantine)
    kinds = Counter(found.kind for found in report.quarantined)
    summary = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "nothing quarantined"
    print(f"{len(report.good)} of {len(videos)} good, {len(report.duplicates)} duplicates; {summary}")
    print(f"wrote {output} and {quarantine}")
    return 1 if report.quarantined else 0


def _name(videos: VideoList, label) -> str | int:
    return videos.class_names[label] if videos.class_names else label


def _digest(path: str) -> str:
    """Equal for equal content: of the file's bytes, or of a folder's files in order."""
    digest = hashlib.blake2b(digest_size=16)
    files = [Path(path)] if os.path.isfile(path) else sorted(file for file in Path(path).iterdir() if file.is_file())
    for file_path in files:
        with open(file_path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
