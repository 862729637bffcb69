"""Lists of lines `path label`, `path<tab>label` or `path,label`, as (row number, path, label).

Nothing says which of the three a file is, and paths and class names may hold spaces and commas, so the whole file is
looked at first. A line that could be read in two ways is an error rather than a guess: a wrong label trains silently.
"""

from __future__ import annotations

import csv
import re

from img2vid.data.errors import ListError

VIDEO_SUFFIXES = {".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp"}
HEADER_WORDS = {"path", "video", "video_path", "file", "filename", "file_name", "clip", "name", "id", "video_id"}
LABEL_WORDS = {"label", "labels", "class", "class_name", "class_id", "caption"}
_SUFFIX = "(?:" + "|".join(sorted(re.escape(suffix) for suffix in VIDEO_SUFFIXES)) + ")"
_PATH_THEN_LABEL = re.compile(rf"(.*{_SUFFIX})\s+(\S.*)", re.IGNORECASE)


def read_lines(path, file) -> list[tuple[int, str, str]]:
    """The rows of an open list; `path` is its name for errors (ListError)."""
    lines = [(number, line.strip()) for number, line in enumerate(file, 1) if line.strip()]
    separator = _separator([line for _, line in lines])
    rows = []
    for number, line in lines:
        parts = _split(line, separator)
        if parts is None or not all(parts):
            raise ListError(f"{path} row {number}: expected 'path label' or 'path,label', found {line!r}")
        if number == lines[0][0] and _is_header(*parts):
            raise ListError(
                f"{path} row {number}: {line!r} is a header. A list has none: delete the line, or make the list a "
                "manifest: a .csv file with the columns path and label"
            )
        if re.fullmatch(r"\d+\s[\d\s]+", parts[1]):
            raise ListError(f"{path} row {number}: {line!r} has more than one number after the path; keep the label")
        rows.append((number, *parts))
    return rows


def _is_header(path: str, label: str) -> bool:
    """By either word, so that a slip in one (`pth,label`) does not make the header a video and its words a class."""
    no_path = "/" not in path and "." not in path
    return path.lower() in HEADER_WORDS or (no_path and label.lower() in LABEL_WORDS)


def _separator(lines: list[str]) -> str | None:
    """Tab or comma, if every line has one; None for spaces."""
    if all("\t" in line for line in lines):
        return "\t"
    # `some,thing.mp4 3`: a comma in every path, and a video's name behind it
    if all("," in line and not _PATH_THEN_LABEL.fullmatch(line.rsplit(",", 1)[1]) for line in lines):
        return ","
    return None


def _split(line: str, separator: str | None) -> tuple[str, str] | None:
    if separator is not None and '"' in line:
        fields = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
        return (separator.join(fields[:-1]).strip(), fields[-1].strip()) if len(fields) > 1 else None
    named = _PATH_THEN_LABEL.fullmatch(line) if separator is None else None
    parts = named.groups() if named else line.rsplit(separator, 1)
    return tuple(part.strip().strip('"') for part in parts) if len(parts) == 2 else None
