"""Folders in CLIP_benchmark's webdataset layout, read as lists of videos.

    FOLDER/classnames.txt                         one class a line
    FOLDER/zeroshot_classification_templates.txt  one template a line, the class at {c}
    FOLDER/test/nshards.txt, 0.tar, 1.tar, ...    members of one key: a video, and .cls (a number) or .txt (captions)

Videos are unpacked once beside the features, because a tar cannot be read out of order; a run that is killed goes on
with the next tar.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import tempfile
from pathlib import Path

from img2vid.data.lists import VIDEO_SUFFIXES, read_classes
from img2vid.data.manifest import Row, VideoList
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.reading import stamp
from img2vid.evaluation.store import write_whole

FORMAT = 2  # of what is unpacked
CLASSES, TEMPLATES, SHARDS = "classnames.txt", "zeroshot_classification_templates.txt", "nshards.txt"


def is_webdataset(folder: Path, subset: str) -> bool:
    return (folder / subset / SHARDS).is_file()


def templates_of(folder: Path) -> list[str] | None:
    """The folder's own templates, with ``{}`` where the class goes; None where it has none."""
    path = folder / TEMPLATES
    return [line.replace("{c}", "{}") for line in read_classes(path)] if path.is_file() else None


def read_webdataset(folder: Path, subset: str, unpack_to: Path) -> VideoList:
    """The videos of one split, in the order of the shards.

    Raises:
        EvaluationError: shards are missing, or members do not fit the layout.
    """
    try:
        count = int((folder / subset / SHARDS).read_text())
    except ValueError as error:
        raise EvaluationError(f"{folder / subset / SHARDS} must hold one number ({error}).") from error
    names = tuple(read_classes(folder / CLASSES)) if (folder / CLASSES).is_file() else None
    rows = []
    for number in range(count):
        shard = folder / subset / f"{number}.tar"
        if not shard.is_file():
            raise EvaluationError(f"{shard} is missing; {SHARDS} says there are {count}.")
        rows += read_shard(shard, unpack_to)
    if all(not Path(row.path).is_file() for row in rows):
        raise EvaluationError(
            f"{folder / subset}: its {count} shards hold no video ({', '.join(sorted(VIDEO_SUFFIXES))})."
        )
    wrong = [row for row in rows if names is not None and row.label is not None and not 0 <= row.label < len(names)]
    if wrong:
        raise EvaluationError(f"{wrong[0].where}: class {wrong[0].label}, but {CLASSES} has {len(names)} (from 0).")
    return VideoList(tuple(rows), names, str(folder / subset))


def read_shard(shard: Path, unpack_to: Path) -> list[Row]:
    """The rows of one tar; its videos are unpacked unless that was done before."""
    key = hashlib.sha256(json.dumps([FORMAT, str(shard.resolve()), stamp(str(shard))]).encode()).hexdigest()[:16]
    target = unpack_to / key
    if not (target / "rows.json").is_file():
        unpack(shard, target)
    rows = json.loads((target / "rows.json").read_text())
    # a sample without a video is a row whose file is not there: it is counted and named
    return [
        Row(
            str(target / (row["video"] or f"no-video-{number}")),
            row["label"],
            tuple(row["captions"]),
            where=f"{shard}: {row['key']}",
        )
        for number, row in enumerate(rows)
    ]


def unpack(shard: Path, target: Path) -> None:
    """Write the videos and rows.json into a folder that appears whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        samples: dict[str, dict] = {}
        try:
            with tarfile.open(shard) as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, _, name = member.name.rpartition("/")  # "./7.mp4" is 7, and folders may hold dots
                    key, _, suffix = name.partition(".")
                    key = f"{folder}/{key}".removeprefix("./").lstrip("/")
                    new = {"key": key, "number": len(samples), "video": None, "label": None, "captions": []}
                    sample = samples.setdefault(key, new)
                    suffix = suffix.lower()
                    if f".{suffix}" in VIDEO_SUFFIXES:
                        # a name of our own: members may be called anything, "../x.mp4" included
                        sample["video"] = f"{sample['number']:06d}.{suffix}"
                        with open(unfinished / sample["video"], "wb") as file:
                            shutil.copyfileobj(tar.extractfile(member), file)
                    elif suffix == "cls":
                        sample["label"] = int(tar.extractfile(member).read())
                    elif suffix == "txt":
                        text = tar.extractfile(member).read().decode()
                        sample["captions"] = [line.strip() for line in text.splitlines() if line.strip()]
        except (tarfile.TarError, ValueError) as error:
            raise EvaluationError(f"{shard} is no shard of this layout: {error}") from error
        rows = [s for s in samples.values() if s["video"] is not None or s["label"] is not None or s["captions"]]
        write_whole(unfinished / "rows.json", json.dumps(rows).encode())
        try:
            unfinished.rename(target)
        except OSError:  # another process was faster: folders only ever appear whole
            if not (target / "rows.json").is_file():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
