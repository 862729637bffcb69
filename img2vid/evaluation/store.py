"""The cache of features on disk: parts that appear whole or not at all, and know which files they were made from."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from img2vid.data.manifest import VideoList
from img2vid.evaluation.reading import Problem, stamp

FORMAT = 2


class Store:
    """The parts on disk: condition/000000.safetensors, ... each with the rows that could be read and what could not."""

    def __init__(self, folder: Path, videos: VideoList) -> None:
        self.folder, self.videos = folder, videos
        # not fewer videos than make a batch, not more parts than a file system likes
        self.part_size = min(256, max(8, -(-len(videos) // 512)))
        self.num_parts = -(-len(videos) // self.part_size)

    def rows(self, part: int) -> range:
        return range(part * self.part_size, min(len(self.videos), (part + 1) * self.part_size))

    def path(self, part: int, name: str) -> Path:
        return self.folder / name / f"{part:06d}.safetensors"

    def has(self, part: int, name: str) -> bool:
        """Whether the part is there, whole, of the files as they are now, with nothing in it to be tried again."""
        try:
            with safe_open(self.path(part, name), "pt") as file:
                told = file.metadata()
                stamps, problems = json.loads(told["stamps"]), json.loads(told["problems"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return False
        if any(problem["try_again"] for problem in problems.values()):
            return False
        return stamps == [stamp(self.videos.rows[row].path) for row in self.rows(part)]

    def write(self, part: int, name: str, good: list[int], values: Tensor | None, problems: dict, stamps: list) -> None:
        tensors = {"rows": torch.tensor(good, dtype=torch.int64)}
        if values is not None:
            tensors["features"] = values.contiguous()
        told = {row: asdict(problem) for row, problem in problems.items()}
        path = self.path(part, name)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, metadata={"problems": json.dumps(told), "stamps": json.dumps(stamps)})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, name: str) -> tuple[Tensor, list[int], dict[int, Problem]]:
        """All parts of a condition: features (n, V, ...), the rows they belong to, and the problems of the others."""
        values, rows, problems = [], [], {}
        for part in range(self.num_parts):
            with safe_open(self.path(part, name), "pt") as file:
                rows += file.get_tensor("rows").tolist()
                told = json.loads(file.metadata()["problems"])
                if "features" in file.keys():  # noqa: SIM118 (not a dict)
                    values.append(file.get_tensor("features"))
            problems |= {int(row): Problem(**problem) for row, problem in told.items()}
        return torch.cat(values) if values else torch.empty(0), rows, problems


def short_hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is never half there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
