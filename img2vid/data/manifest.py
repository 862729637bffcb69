"""The manifest: one list of videos, as CSV, JSONL or Parquet, and the rows everything else works with.

Columns (only `path` is needed; others are kept out of the way):
    path            of the video or folder of frames; relative paths start at `root`, by default the list's folder
    label           a class number or a class name
    caption         a sentence; or `captions`, several of them (a list; in CSV a JSON list)
    start_seconds, end_seconds      use only this part
    frames          the number of frames in the file, counted (written by `img2vid data check`)
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from img2vid.data.errors import ListError, MissingExtraError

COLUMNS = ("path", "label", "caption", "captions", "start_seconds", "end_seconds", "frames")
FORMATS = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Row:
    """One video of a list. `where` is the file and row it came from, for errors."""

    path: str
    label: int | str | None = None
    captions: tuple[str, ...] = ()
    start_seconds: float | None = None
    end_seconds: float | None = None
    frames: int | None = None
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class VideoList:
    """Rows with labels as numbers, and the class names those numbers stand for (None if only numbers are known)."""

    rows: tuple[Row, ...]
    class_names: tuple[str, ...] | None
    source: str

    def __len__(self) -> int:
        return len(self.rows)


def read_manifest(path, root=None) -> list[Row]:
    """Rows of a manifest file, labels as they stand there. ListError names the file and row of what is wrong."""
    path, rows = Path(path), []
    root = Path(root) if root is not None else path.parent
    for number, record in numbered_records(path):
        where = f"{path} row {number}"
        if not record.get("path"):
            known = ", ".join(sorted(map(str, record))) or "nothing"
            raise ListError(f"{where}: no path (a manifest has a column 'path'; this row has: {known})")
        if not isinstance(record["path"], str) or re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", record["path"]):
            raise ListError(f"{where}: path must be that of a file or folder here, as text: {record['path']!r}")
        rows.append(row_from(record, root, where))
    return rows


def row_from(record: dict, root: Path, where: str) -> Row:
    captions = record.get("captions")
    if isinstance(captions, str) and captions:
        try:
            captions = json.loads(captions)
        except (ValueError, RecursionError):
            raise ListError(f'{where}: captions must be a JSON list such as ["a dog", "a cat"]: {captions!r}') from None
    if captions is not None and captions != "" and not _is_list_of_text(captions):
        raise ListError(f"{where}: captions must be a list of sentences: {captions!r}")
    if not captions and record.get("caption"):
        captions = [str(record["caption"])]
    start, end = (_number(record, name, where, float) for name in ("start_seconds", "end_seconds"))
    if (start is not None and start < 0) or (end is not None and end <= (start or 0)):
        raise ListError(f"{where}: the time range from {start} to {end} seconds is empty or starts before 0")
    frames = _number(record, "frames", where, _whole)
    if frames is not None and frames < 1:
        raise ListError(f"{where}: frames={frames}, expected 1 or more (leave it empty if unknown)")
    label = record.get("label")
    label = None if label is None or label == "" else label
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, (int, str, type(None))) or isinstance(label, bool):
        raise ListError(f"{where}: label must be a class number or name: {label!r}")
    return Row(resolve(record["path"], root), label, tuple(captions or ()), start, end, frames, where)


def resolve(path, root: Path) -> str:
    return os.path.normpath(os.path.join(root, os.path.expanduser(str(path))))


def numbered_records(path: Path) -> Iterator[tuple[int, dict]]:
    """(row number, record) of a CSV with header, JSONL or Parquet file. Numbers are the file's lines, from 1."""
    check_file(path)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        with open_text(path) as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            try:
                reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
                if twice := sorted({name for name in reader.fieldnames if reader.fieldnames.count(name) > 1}):
                    raise ListError(f"{path} row 1: there are several columns named {', '.join(map(repr, twice))}")
                for record in reader:
                    if None in record or None in record.values():
                        problem = f"expected {len(reader.fieldnames)} fields ({', '.join(reader.fieldnames)})"
                        raise ListError(f"{path} row {reader.line_num}: {problem}. Put quotes around text with commas")
                    yield reader.line_num, {name: value.strip() for name, value in record.items()}
            except csv.Error as error:
                raise ListError(f"{path} row {reader.line_num}: not CSV ({error})") from None
    elif suffix == ".jsonl":
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        record = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise ListError(f"{path} row {number}: not JSON ({error})") from None
                    if not isinstance(record, dict):
                        raise ListError(f"{path} row {number}: expected an object with a path, found {line.strip()!r}")
                    yield number, record
    elif suffix == ".parquet":
        yield from enumerate(_parquet_records(path), 1)
    else:
        raise ListError(f"{path}: a manifest is a {', '.join(FORMATS)} file")


def write_manifest(rows: Iterable[Row], path) -> None:
    """Write rows as a manifest, whole or not at all. The suffix chooses CSV, JSONL or Parquet; paths stay absolute."""
    path = Path(path)
    records = [{name: value for name, value in _record(row).items() if value is not None} for row in rows]
    used = [name for name in COLUMNS if name == "path" or any(name in record for record in records)]
    if path.suffix.lower() not in FORMATS:
        raise ListError(f"{path}: a manifest is a {', '.join(FORMATS)} file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix.lower() == ".parquet":
            pyarrow, parquet = _pyarrow()
            labels = {type(record.get("label")) for record in records} - {type(None)}
            if len(labels) > 1:  # a Parquet column has one type
                records = [{**r, "label": str(r["label"])} if "label" in r else r for r in records]
            columns = {name: [record.get(name) for record in records] for name in used}
            parquet.write_table(pyarrow.table(columns), temporary)
        else:
            with open(temporary, "w", encoding="utf-8", newline="") as file:
                if path.suffix.lower() == ".csv":
                    writer = csv.DictWriter(file, used, lineterminator="\n")
                    writer.writeheader()
                    for record in records:
                        if "captions" in record:
                            record = {**record, "captions": json.dumps(record["captions"], ensure_ascii=False)}
                        writer.writerow(record)
                else:
                    file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def number_labels(rows: Sequence[Row], classes: Sequence[str] | None, source: str) -> VideoList:
    """Turn class names into numbers: by `classes` if given, otherwise names in alphabetical order.

    Labels that are numbers already stay as they are. A list must not mix the two.
    """
    if classes is None:
        labelled = [row for row in rows if row.label is not None]
        named = [row for row in labelled if _class_number(row) is None]
        if len(named) == 0:
            return VideoList(tuple(_numbered(row) for row in rows), None, source)
        if len(named) < len(labelled):
            other = next(row for row in labelled if _class_number(row) is not None)
            raise ListError(
                f"{named[0].where}: label {named[0].label!r} is a name, but {other.label!r} ({other.where}) is a "
                "number; a list has one kind. If both are names, give `classes`"
            )
        classes = sorted({row.label for row in named})
    number_of = {name: number for number, name in enumerate(classes)}
    if len(number_of) != len(classes):
        raise ListError(f"{source}: the class names hold duplicates")
    out = []
    for row in rows:
        if row.label is not None and str(row.label) in number_of:
            row = replace(row, label=number_of[str(row.label)])
        elif row.label is not None:
            row = _numbered(row)
            if not isinstance(row.label, int) or row.label >= len(classes):
                known = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
                raise ListError(f"{row.where}: label {row.label!r} is none of the {len(classes)} classes ({known})")
        out.append(row)
    return VideoList(tuple(out), tuple(classes), source)


def check_file(path: Path) -> None:
    if not path.is_file():
        raise ListError(f"{path}: no such file (looked from {os.getcwd()})")


def open_text(path: Path):
    """UTF-8 with or without a byte order mark, as spreadsheets write it."""
    return open(path, encoding="utf-8-sig", newline="" if path.suffix.lower() == ".csv" else None)


def looks_like_number(label) -> bool:
    return re.fullmatch(r"[+-]?\d+(\.\d*)?", str(label), re.ASCII) is not None


def _record(row: Row) -> dict:
    several = len(row.captions) > 1
    return {
        "path": row.path,
        "label": row.label,
        "caption": row.captions[0] if len(row.captions) == 1 else None,
        "captions": list(row.captions) if several else None,
        "start_seconds": row.start_seconds,
        "end_seconds": row.end_seconds,
        "frames": row.frames,
    }


def _numbered(row: Row) -> Row:
    number = None if row.label is None else _class_number(row)
    return row if number is None else replace(row, label=number)


def _class_number(row: Row) -> int | None:
    """The label as a number, None if it is a name. "3.0" is 3: tables with gaps turn whole numbers into floats."""
    if not looks_like_number(row.label):
        return None
    number = float(row.label)
    if not (number.is_integer() and 0 <= number < 2**53):
        raise ListError(
            f"{row.where}: label {row.label!r}: class numbers are 0, 1, 2, ...; leave the label out if there is none"
        )
    return int(number)


def _whole(value) -> int:
    """12, "12" and "12.0": tables with gaps turn whole numbers into floats."""
    number = float(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _is_list_of_text(value) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _number(record: dict, name: str, where: str, kind):
    value = record.get(name)
    if value is None or value == "":
        return None
    try:
        number = kind(value)
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError
        return number
    except (TypeError, ValueError):
        raise ListError(f"{where}: {name} must be a number: {value!r}") from None


def _parquet_records(path: Path) -> list[dict]:
    pyarrow, parquet = _pyarrow()
    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ListError(f"{path}: not readable as Parquet ({str(error).splitlines()[0]})") from None


def _pyarrow():
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError(
            "Parquet manifests need pyarrow. Run: pip install pyarrow, or use .csv or .jsonl"
        ) from None
    return pyarrow, parquet
