"""Rows of the census: one architecture, and all of them."""

from __future__ import annotations

import dataclasses
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timm.layers import weight_init as timm_init
from torch import nn

from img2vid.backbones import BackboneError, describe
from img2vid.backbones.from_timm import image_class
from img2vid.backbones.reading import block_kind, child, read_block
from img2vid.backbones.tower import ImageTower
from tests.census.checks import MODES, check_full_size, check_modes, check_small, kinds_of_attention
from tests.census.models import DEPTH, load_full_size, load_small

RESULTS = Path("runs/census")


@dataclass
class Row:
    """One architecture: ``converted``, ``refused`` (text: the reason) or ``failed`` (text: the traceback)."""

    name: str  # "timm:vit_base_patch16_224"
    outcome: str = "converted"
    tower: str = ""
    block: str = ""
    attention: str = ""
    pool: str = ""
    position: str = ""
    num_prefix_tokens: int = 0
    left_behind: tuple[str, ...] = ()
    parameters: int = 0
    checks: dict[str, bool] = field(default_factory=dict)
    copy_error: float | None = None
    text: str = ""

    def __post_init__(self) -> None:
        self.left_behind = tuple(self.left_behind)  # JSON has lists only

    @property
    def library(self) -> str:
        return self.name.partition(":")[0]

    @property
    def stratum(self) -> tuple[str, ...]:
        prefix = "yes" if self.num_prefix_tokens else "no"
        return (self.library, self.tower, self.block, self.attention, self.pool, self.position, prefix)


def examine(name: str, num_frames: Sequence[int] = (1, 2, 3), depth: int = DEPTH) -> Row:
    """Convert and run one architecture. Whatever goes wrong is in the row."""
    row = Row(name)
    with exact_arithmetic():
        try:
            full = load_full_size(name).tower
        except BackboneError as refusal:
            row.outcome, row.text = "refused", str(refusal)
            return row
        except Exception:
            row.outcome, row.text = "failed", traceback.format_exc()
            return row
        try:
            describe_row(row, full)
            kinds = kinds_of_attention(full)
            row.checks |= check_full_size(full)
            image = load_small(name, full, depth)
            row.checks["small has every kind of block"] = kinds_of_attention(describe(image)) == kinds
            checks, row.copy_error = check_small(image, num_frames)
            row.checks |= checks
        except Exception:
            row.outcome, row.text = "failed", traceback.format_exc()
            return row
    failed = [check for check, held in row.checks.items() if not held]
    if failed:
        row.outcome, row.text = "failed", f"not so: {', '.join(failed)}"
    return row


def describe_row(row: Row, tower: ImageTower) -> None:
    block = tower.blocks[0][1]
    attention = child(block, block_kind(block).attn)
    trunk = getattr(tower.module, "trunk", tower.module)
    outer = "TimmModel: " if trunk is not tower.module else ""
    row.tower = outer + type(trunk).__name__.removeprefix("AnySize")
    row.block, row.position = image_class(block).__name__, tower.position
    row.attention = "inside the block" if attention is block else type(attention).__name__
    row.pool = pool_of(trunk)
    row.num_prefix_tokens = tower.num_prefix_tokens
    row.left_behind = tuple(sorted({what for _, b in tower.blocks for what in read_block(b).left_behind}))
    row.parameters = sum(p.numel() for p in tower.module.parameters())


def pool_of(trunk: nn.Module) -> str:
    """How tokens become a feature, in timm's words."""
    if getattr(trunk, "attn_pool", None) is not None:
        return "map"
    pool = getattr(trunk, "global_pool", None) or getattr(trunk, "pool_type", None) or "none"
    return {"tok": "token"}.get(pool, pool)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Results that do not depend on how work is split. Warnings about weights are not news here, and initial values,
    which take timm a quarter of the time, are all replaced."""
    threads, fastpath = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), mock.patch.object(timm_init, "_trunc_normal_", lambda tensor, *_: tensor):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.mha.set_fastpath_enabled(fastpath)


# ---- all of them


def survey(names: Iterable[str], kept_in: Path, workers: int = 1) -> list[Row]:
    """Rows of ``names``, in order."""
    return [Row(**found) for found in run_all(examine_as_dict, names, kept_in, workers).values()]


def survey_modes(rows: Iterable[Row], kept_in: Path, workers: int = 1) -> dict[str, dict[str, bool | str]]:
    """Other ways of inserting time, by the name of the smallest architecture of each stratum."""
    names = [members[0].name for members in by_stratum(rows).values()]
    found = run_all(examine_modes, names, kept_in, workers)
    return {name: {mode: found[name][mode] for mode in MODES} for name in names}


def by_stratum(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Converted rows, the smallest architecture of each stratum first."""
    strata: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.parameters, row.name)):
        if row.outcome == "converted":
            strata.setdefault(row.stratum, []).append(row)
    return dict(sorted(strata.items()))


def examine_as_dict(name: str) -> dict[str, Any]:
    return dataclasses.asdict(examine(name))


def examine_modes(name: str) -> dict[str, bool | str]:
    with exact_arithmetic():
        return check_modes(load_small(name, load_full_size(name).tower, depth=1))


def run_all(function: Callable[[str], dict], names: Iterable[str], kept_in: Path, workers: int) -> dict[str, dict]:
    """``function`` of each name. Results are kept as they come, and what is kept already is not made again."""
    names = list(names)
    kept_in.parent.mkdir(parents=True, exist_ok=True)
    lines = kept_in.read_text().splitlines() if kept_in.exists() else []
    known = {found["name"]: found for found in map(json.loads, lines)}
    missing = [name for name in names if name not in known]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, kept_in.open("a") as file:
        started = time.perf_counter()
        for i, (name, found) in enumerate(zip(missing, pool.map(function, missing), strict=True), 1):
            known[name] = {"name": name, **found}
            file.write(json.dumps(known[name]) + "\n")
            file.flush()
            print(f"{i}/{len(missing)}  {time.perf_counter() - started:.0f} s  {name}", flush=True)
    return {name: known[name] for name in names}
