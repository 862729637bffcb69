"""Protocols of zero-shot classification by name. All are questions to the same features: which videos, which classes.

list            the videos given, all classes
splits          each list given (three official test splits) is one round; mean and std
all             the lists given are merged, every video once
halves          random halves of the classes, ``num_rounds`` times; mean and std
class-splits    each group of classes in a file (three times 160 classes of Kinetics-600) is one round; mean and std
base-to-novel   base classes among themselves, the others among themselves, and the harmonic mean

A round keeps the videos of its classes, and only its classes compete.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from img2vid.choices import PROTOCOLS
from img2vid.data.lists import guess_format, read_classes, read_list
from img2vid.data.manifest import Row, VideoList, number_labels
from img2vid.errors import nearest
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.metrics import harmonic_mean, mean_and_std
from img2vid.evaluation.prompts import class_list
from img2vid.evaluation.reading import identity
from img2vid.evaluation.webdataset import is_webdataset, read_webdataset

MERGED = ("top1", "top5", "mean_class", "calibration_error")


@dataclass(frozen=True)
class Round:
    """One measurement: these rows of the list, these classes (None: all)."""

    name: str
    rows: tuple[int, ...]
    classes: tuple[int, ...] | None = None


@dataclass
class Lists:
    """The lists given, merged into one in which no video occurs twice, and the rows of each of them."""

    videos: VideoList
    members: dict[str, list[int]]


def gather_lists(
    paths: Sequence[str | Path],
    protocol: str = "list",
    *,
    format: str = "auto",
    root: str | None = None,
    classes: str | Path | Sequence[str] | None = None,
    split: int = 1,
    subset: str = "test",
    unpack_to: str | Path = "runs/features/unpacked",
) -> Lists:
    """Read and merge lists. A folder of UCF101's or HMDB51's splits stands for all lists that the protocol needs.

    Args:
        unpack_to: where the videos of webdataset folders go.
    """
    names = None if classes is None else class_list(classes)
    lists = []
    for path in map(Path, paths):
        if is_webdataset(path, subset):
            lists.append((path.name, read_webdataset(path, subset, Path(unpack_to))))
            continue
        for name, given in expand(path, protocol, format, split, subset):
            lists.append((name, read_list(given.pop("path"), root=root, classes=names, **given)))
    if len(lists) == 1:
        name, videos = lists[0]
        return Lists(videos, {name: list(range(len(videos)))})
    return merge(lists, names)


def expand(path: Path, protocol: str, format: str, split: int, subset: str) -> list[tuple[str, dict]]:
    """The lists a path stands for, each with the arguments of ``read_list``."""
    several = protocol in ("splits", "all")
    if path.is_dir() and format in ("auto", "ucf101") and (path / "testlist01.txt").is_file():
        wanted = {"splits": ["testlist01", "testlist02", "testlist03"], "all": ["trainlist01", "testlist01"]}
        names = wanted.get(protocol, [f"testlist{split:02d}"])
        return [(name, {"path": path / f"{name}.txt", "format": "ucf101"}) for name in names]
    found = guess_format(path) if format == "auto" and path.exists() else format
    given = {"path": path, "format": format}
    if found == "hmdb51" and several:
        subsets = ["test"] if protocol == "splits" else ["train", "test"]
        return [(f"split {s} {name}", {**given, "split": s, "subset": name}) for s in (1, 2, 3) for name in subsets]
    return [(path.name, {**given, "split": split, "subset": subset})]


def merge(lists: list[tuple[str, VideoList]], names: list[str] | None) -> Lists:
    """One list out of several, labels numbered alike."""
    known = [videos.class_names for _, videos in lists]
    if names is None and all(known):
        same = len(set(known)) == 1
        names = list(known[0]) if same else sorted({name for of_list in known for name in of_list})
    elif names is None and any(known):
        raise EvaluationError("Some of the lists name their classes and some number them; give --classes.")
    rows, row_of, members = [], {}, {}
    for (name, videos), own in zip(lists, known, strict=True):
        if name in members:
            raise EvaluationError(f"Two lists are called {name!r}; give each its own file name.")
        members[name] = []
        named = number_labels([row_named(row, own) for row in videos.rows], names, videos.source)
        for row in named.rows:
            key = identity(row)
            if key not in row_of:
                row_of[key] = len(rows)
                rows.append(row)
            elif rows[row_of[key]].label != row.label:
                raise EvaluationError(f"{row.where}: {row.path} has another label in {rows[row_of[key]].where}.")
            members[name].append(row_of[key])
    source = ", ".join(videos.source for _, videos in lists)
    return Lists(VideoList(tuple(rows), None if names is None else tuple(names), source), members)


def row_named(row: Row, class_names: Sequence[str] | None) -> Row:
    return row if row.label is None or class_names is None else replace(row, label=class_names[row.label])


def rounds(
    protocol: str,
    lists: Lists,
    rows: Sequence[int],
    *,
    num_rounds: int = 10,
    seed: int = 0,
    class_splits: Sequence[str | Path] = (),
    base_classes: str | Path | None = None,
) -> list[Round]:
    """The rounds of a protocol over the readable, labelled ``rows``.

    Raises:
        EvaluationError: an unknown protocol, files not given or of another one, or a round without videos.
    """
    if protocol not in PROTOCOLS:
        raise EvaluationError(
            f"protocol={protocol!r}: expected one of {', '.join(PROTOCOLS)}.{nearest(protocol, PROTOCOLS)}"
        )
    for option, given, takes in (
        ("--class-splits", class_splits, "class-splits"),
        ("--base-classes", base_classes, "base-to-novel"),
    ):
        if given and protocol != takes:
            raise EvaluationError(f"{option} is read by protocol {takes!r} alone; given with protocol {protocol!r}.")
    readable, names = set(rows), lists.videos.class_names
    if protocol in ("list", "all"):
        made = [Round("all" if protocol == "all" else "list", tuple(rows))]
    elif protocol == "splits":
        made = [Round(name, tuple(r for r in own if r in readable)) for name, own in lists.members.items()]
    else:
        groups = class_groups(protocol, names, num_rounds, seed, class_splits, base_classes)
        made = [
            Round(name, tuple(r for r in rows if lists.videos.rows[r].label in set(group)), tuple(group))
            for name, group in groups
        ]
    single = [r.name for r in made if r.classes is not None and len(r.classes) < 2]
    if single:
        raise EvaluationError(
            f"Protocol {protocol!r}: fewer than two classes compete in {', '.join(single)}: all answers would be right."
        )
    empty = [r.name for r in made if not r.rows]
    if empty:
        raise EvaluationError(f"Protocol {protocol!r}: no readable video belongs to {', '.join(empty)}.")
    return made


def class_groups(protocol, names, num_rounds, seed, class_splits, base_classes) -> list[tuple[str, list[int]]]:
    if names is None:
        raise EvaluationError(f"Protocol {protocol!r} needs class names: give --classes.")
    if protocol == "halves":
        if num_rounds < 1:
            raise EvaluationError(f"num_rounds={num_rounds}: expected 1 or more.")
        if len(names) < 4:
            raise EvaluationError(f"Half of {len(names)} classes is no choice; halves need four classes or more.")
        draw = Random(seed)
        return [(f"half {i + 1}", sorted(draw.sample(range(len(names)), len(names) // 2))) for i in range(num_rounds)]
    if protocol == "class-splits":
        if not class_splits:
            raise EvaluationError("Protocol 'class-splits' needs --class-splits FILE ...")
        return [
            (name, numbers(group, names, f"{file}, {name}"))
            for file in class_splits
            for name, group in groups_in(Path(file))
        ]
    first_half = list(range(-(-len(names) // 2)))  # base classes are the first half by number, unless named
    base = first_half if base_classes is None else numbers(read_classes(base_classes), names, str(base_classes))
    return [("base", base), ("novel", [c for c in range(len(names)) if c not in set(base)])]


def groups_in(file: Path) -> list[tuple[str, list[str]]]:
    """A text file is one group, one class a line; JSON is {name: [classes]}."""
    if file.suffix.lower() != ".json":
        return [(file.stem, read_classes(file))]
    try:
        groups = json.loads(file.read_text(encoding="utf-8"))
        return [(str(name), [str(c) for c in group]) for name, group in groups.items()]
    except (ValueError, AttributeError, TypeError) as error:
        raise EvaluationError(f'{file}: expected JSON such as {{"split 1": ["class", ...], ...}} ({error}).') from error


def numbers(group: Sequence[str], names: Sequence[str], source: str) -> list[int]:
    number_of = {name: i for i, name in enumerate(names)}
    unknown = [name for name in group if name not in number_of]
    if unknown:
        raise EvaluationError(
            f"{source}: {len(unknown)} of its classes are not among the {len(names)} of the list, the first "
            f"{unknown[0]!r}.{nearest(unknown[0], names)}"
        )
    twice = [name for name, count in Counter(group).items() if count > 1]
    if twice:
        raise EvaluationError(f"{source}: {len(twice)} classes are there more than once, the first {twice[0]!r}.")
    return [number_of[name] for name in group]


def summarise(protocol: str, measured: Sequence[dict]) -> dict:
    """One number for each metric: the round's own, the mean over rounds, or the harmonic mean of base and novel."""
    if len(measured) == 1:
        return {name: measured[0][name] for name in MERGED}
    out: dict = {}
    for name in MERGED:
        values = [m[name]["value"] for m in measured if m[name] is not None]
        if len(values) < len(measured):
            out[name] = None
        elif protocol == "base-to-novel" and name != "calibration_error":
            out[name] = {"value": harmonic_mean(*values), "base": values[0], "novel": values[1]}
        else:
            found = mean_and_std(values)
            out[name] = {"value": found["mean"], "std": found["std"]}
    return out
