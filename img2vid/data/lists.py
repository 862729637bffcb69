"""Lists people already have, as rows: `read_list(path)` knows the format by looking, or is told.

| format    | the list                                                      | the files, under root                 |
|-----------|---------------------------------------------------------------|---------------------------------------|
| manifest  | CSV with a column path, JSONL, Parquet (manifest.py)          | path                                  |
| list      | lines `path label` or `path,label`, no header; spaces allowed | path                                  |
| folder    | a folder with one folder per class                            | class/anything                        |
| kinetics  | CSV label,youtube_id,time_start,time_end,split                | [label/]ID_000012_000022.mp4          |
| ucf101    | trainlist01.txt or testlist01.txt, classInd.txt beside it     | Class/v_Class_g01_c01.avi             |
| hmdb51    | the folder of <class>_test_splitN.txt; split=N, subset=...    | class/name.avi                        |
| ssv2      | train.json or validation.json, labels.json beside it          | ID.webm                               |
| msrvtt    | MSRVTT_JSFUSION_test.csv, or MSRVTT_train.9k.csv with         | video123.mp4                          |
|           | MSRVTT_data.json beside it                                    |                                       |

Webdataset tars stream instead of being listed: see shards.py.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from img2vid.data.errors import ListError
from img2vid.data.manifest import (
    Row,
    VideoList,
    check_file,
    number_labels,
    numbered_records,
    open_text,
    read_manifest,
    resolve,
)
from img2vid.data.plain_list import VIDEO_SUFFIXES, read_lines


def read_list(path, format: str = "auto", root=None, classes=None, split: int = 1, subset: str = "train") -> VideoList:
    """Read a list of videos.

    path: the list (a file, or a folder for "folder" and "hmdb51").
    format: one of the table above, or "auto".
    root: folder the videos are in; by default the list's own (for "folder", the list itself).
    classes: class names in the order of their numbers, or a text file with one name per line; by default alphabetical.
        Give the training list's to the others, so that numbers agree.
    split, subset: which of HMDB51's three splits, and "train" or "test".
    Raises ListError naming the file and row of what is wrong.
    """
    path = Path(path)
    if not path.exists():
        raise ListError(f"{path}: no such file or folder (looked from {Path.cwd()})")
    if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES:
        raise ListError(f"{path}: a video, expected a list of videos. One video: img2vid.read_clip(path, num_frames=8)")
    guessed = format == "auto"
    format = guess_format(path) if guessed else format
    if format not in READERS:
        raise ListError(f"format {format!r}: expected 'auto', {', '.join(map(repr, READERS))}")
    options = {"split": split, "subset": subset} if format == "hmdb51" else {}
    try:
        rows, named = READERS[format](path, Path(root) if root is not None else None, **options)
    except UnicodeDecodeError as error:
        raise ListError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not rows:
        raise ListError(f"{path}: the list is empty (read as {format!r})")
    if guessed and format == "folder":
        check_meant(path, rows)
    classes = named if classes is None else read_classes(classes)
    return number_labels(rows, classes, str(path))


def check_meant(folder: Path, rows: list[Row]) -> None:
    """A folder of one class with lists beside it, as `data synth` writes it, stands for one of the lists."""
    lists = sorted(entry.name for entry in folder.glob("*.csv"))
    if lists and len({row.label for row in rows}) == 1:
        raise ListError(
            f"{folder}: all videos are in one folder, {rows[0].label}, which would be the only class, and there are "
            f"lists: {', '.join(lists)}. Give one of them, such as {folder / lists[-1]}, or --format folder."
        )


def read_classes(classes) -> list[str]:
    if isinstance(classes, (str, Path)):
        check_file(Path(classes))
        with open_text(Path(classes)) as file:
            return [line.strip() for line in file if line.strip()]
    return list(classes)


def guess_format(path: Path) -> str:
    if path.is_dir():
        return "hmdb51" if any(path.glob("*_test_split[123].txt")) else "folder"
    if path.suffix.lower() in (".jsonl", ".parquet"):
        return "manifest"
    if path.suffix.lower() == ".json":
        return "ssv2"
    if path.stem.startswith(("trainlist0", "testlist0")):
        return "ucf101"
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        try:
            columns = {name.strip() for name in next(csv.reader(file), ())}
        except csv.Error as error:
            raise ListError(f"{path} row 1: not text with fields ({error})") from None
    if "youtube_id" in columns:
        return "kinetics"
    if "video_id" in columns:
        return "msrvtt"
    return "manifest" if "path" in columns else "list"


def _list(path: Path, root: Path | None):
    with open_text(path) as file:
        lines = read_lines(path, file)
    return [Row(resolve(name, root or path.parent), label, where=f"{path} row {n}") for n, name, label in lines], None


def _folder(path: Path, root: Path | None):
    """One folder per class; in it video files, or folders of frames."""
    from img2vid.data.backends.frames import SUFFIXES

    root, rows = root or path, []
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for folder in folders:
        for entry in sorted(folder.iterdir()):
            is_video = entry.suffix.lower() in VIDEO_SUFFIXES and not entry.is_dir()
            if is_video or (entry.is_dir() and any(file.suffix.lower() in SUFFIXES for file in entry.iterdir())):
                rows.append(Row(resolve(entry.resolve(), root), folder.name, where=f"{path} row {len(rows) + 1}"))
    if not rows:
        loose = sum(entry.suffix.lower() in VIDEO_SUFFIXES for entry in path.iterdir() if entry.is_file())
        held = f"none of its {len(folders)} folders holds a video or a folder of frames"
        raise ListError(
            f"{path}: {held if folders else 'no folders in it'}, expected {path}/CLASS/VIDEO."
            + f" The {loose} videos side by side there have no class: list them in a CSV file, a line 'path' on top"
            " and one file name a line (a column 'label' is optional)." * (loose > 0)
        )
    return rows, [folder.name for folder in folders]


def _kinetics(path: Path, root: Path | None):
    root, rows = root or path.parent, []
    for number, record in numbered_records(path):
        where = f"{path} row {number}"
        _need(record, ("youtube_id", "time_start", "time_end"), where)
        try:
            start, end = (int(float(record[name])) for name in ("time_start", "time_end"))
        except ValueError:
            raise ListError(f"{where}: time_start and time_end must be seconds") from None
        name, label = f"{record['youtube_id']}_{start:06d}_{end:06d}.mp4", record.get("label") or None
        # Downloaders leave the files side by side or sorted into classes.
        in_class = label is not None and (root / label / name).exists()
        rows.append(Row(resolve(Path(label) / name if in_class else name, root), label, where=where))
    return rows, None


def _ucf101(path: Path, root: Path | None):
    """classInd.txt counts from 1; test lists name no label, it is the folder's name."""
    index = path.with_name("classInd.txt")
    check_file(index)
    classes = []
    with open_text(index) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                parts = line.split()
                if len(parts) != 2 or parts[0] != str(len(classes) + 1):
                    raise ListError(f"{index} row {number}: expected '{len(classes) + 1} ClassName', found {line!r}")
                classes.append(parts[1])
    rows = []
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where, parts = f"{path} row {number}", line.split()
            label = parts[0].replace("\\", "/").split("/")[0]
            if label not in classes:
                raise ListError(f"{where}: class {label!r} is not in {index}")
            if len(parts) > 1 and parts[1] != str(classes.index(label) + 1):
                raise ListError(f"{where}: says class {parts[1]}, but {label} is {classes.index(label) + 1} in {index}")
            rows.append(Row(resolve(parts[0], root or path.parent), label, where=where))
    return rows, classes


def _hmdb51(path: Path, root: Path | None, split: int, subset: str):
    """Each class has a file per split: name and 1 (train), 2 (test) or 0 (not used)."""
    if subset not in ("train", "test"):
        raise ListError(f"subset {subset!r}: HMDB51 has 'train' and 'test'")
    files = sorted(path.glob(f"*_test_split{split}.txt"))
    if not files:
        raise ListError(f"{path}: no files named <class>_test_split{split}.txt")
    rows, classes, wanted = [], [], {"train": "1", "test": "2"}[subset]
    for file_path in files:
        name = file_path.name.removesuffix(f"_test_split{split}.txt")
        classes.append(name)
        with open_text(file_path) as file:
            for number, line in enumerate(file, 1):
                parts = line.split()
                if parts and (len(parts) != 2 or parts[1] not in ("0", "1", "2")):
                    raise ListError(f"{file_path} row {number}: expected 'name.avi 0|1|2', found {line.strip()!r}")
                if parts and parts[1] == wanted:
                    video = resolve(Path(name) / parts[0], root or path.parent)
                    rows.append(Row(video, name, where=f"{file_path} row {number}"))
    return rows, classes


def _ssv2(path: Path, root: Path | None):
    """The class is the template without its square brackets; labels.json numbers the classes."""
    numbers = _json(path.with_name("labels.json"), dict)
    if not all(str(number).isdecimal() for number in numbers.values()):
        where = path.with_name("labels.json")
        raise ListError(f"{where}: expected class names and numbers, such as {{'Folding something': '3'}}")
    classes = sorted(numbers, key=lambda name: int(numbers[name]))
    rows = []
    for number, record in enumerate(_json(path, list), 1):
        where = f"{path} row {number}"
        _need(record, ("id", "template"), where)
        label = record["template"].replace("[", "").replace("]", "")
        captions = (record["label"],) if record.get("label") else ()
        rows.append(Row(resolve(f"{record['id']}.webm", root or path.parent), label, captions, where=where))
    return rows, classes


def _msrvtt(path: Path, root: Path | None):
    records = list(numbered_records(path))
    captions: dict[str, list[str]] = {}
    if records and "sentence" not in records[0][1]:
        beside = path.with_name("MSRVTT_data.json")
        for number, sentence in enumerate(_json(beside, dict).get("sentences", ()), 1):
            _need(sentence, ("video_id", "caption"), f"{beside} sentence {number}")
            captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
    rows = []
    for number, record in records:
        where = f"{path} row {number}"
        _need(record, ("video_id",), where)
        video = record["video_id"]
        texts = [record["sentence"]] if "sentence" in record else captions.get(video, [])
        if not texts:
            raise ListError(f"{where}: {video} has no caption in {path.with_name('MSRVTT_data.json')}")
        rows.append(Row(resolve(f"{video}.mp4", root or path.parent), None, tuple(texts), where=where))
    return rows, None


def _json(path: Path, kind: type):
    check_file(path)
    with open_text(path) as file:
        try:
            data = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ListError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, kind):
        raise ListError(f"{path}: expected a JSON {'list' if kind is list else 'object'}, found {type(data).__name__}")
    return data


def _need(record: dict, names: Sequence[str], where: str) -> None:
    if not isinstance(record, dict):
        raise ListError(f"{where}: expected an object with {' and '.join(names)}, found {record!r}")
    missing = [name for name in names if record.get(name) in (None, "")]
    if missing:
        raise ListError(f"{where}: {' and '.join(missing)} missing")


READERS = {
    "manifest": lambda path, root: (read_manifest(path, root), None),
    "list": _list,
    "folder": _folder,
    "kinetics": _kinetics,
    "ucf101": _ucf101,
    "hmdb51": _hmdb51,
    "ssv2": _ssv2,
    "msrvtt": _msrvtt,
}
