"""A foreign dialect is a table of two columns, their names and ours; this engine reads it in both directions.

A row names a parameter, or a module whose ``weight`` and ``bias`` are meant; ``{i}`` is the number of a block. Where
one of our tensors is several of theirs, our name says which part a row is: ``attn.qkv[q]``, ``[k]`` and ``[v]`` are
thirds of the rows of ``attn.qkv``. Whatever a table cannot say (a reshaped or divided tensor) is done by a dialect's
``unpack`` after reading and undone by its ``pack`` before writing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from img2vid.backbones.tower import Preprocess
from img2vid.config import VideoConfig
from img2vid.errors import WeightsError
from img2vid.weights import LoadReport, listed, matches

if TYPE_CHECKING:
    from img2vid.model import VideoModel

State = dict[str, Tensor]
Table = tuple[tuple[str, str], ...]
LEAVES = ("", ".weight", ".bias")
PARTS = ("[q]", "[k]", "[v]")


@dataclass
class Foreign:
    """A checkpoint as it was found: tensors under its own names, and the ``config.json`` beside them, if any."""

    path: Path
    state: State
    config: dict[str, Any] | None = None
    pixels: Preprocess | None = None  # from the preprocessor_config.json beside them
    notes: list[str] = field(default_factory=list)
    num_heads: int | None = None  # given by the user: no state dict knows it

    def require(self, key: str) -> Tensor:
        if key not in self.state:
            raise WeightsError(f"{self.path} lacks {key}, from which the size of the model is read.")
        return self.state[key]


@dataclass(frozen=True)
class Dialect:
    """One way in which video models of a kind are stored.

    Args:
        name: as ``--from`` takes it.
        title: what it is, for people.
        table: their names and ours.
        describe: what model a file holds.
        recognise: whether a state dict, or the configuration beside it, is of this dialect and no other.
        prefix: what names of the video tower begin with in files of a whole model; files of a tower alone lack it.
        dropped: regular expressions of their keys that have no place in a video tower.
        unpack, pack: between what a file holds and what the table names, for a model of that configuration.
        wrapper: the key under which its own files keep the state dict, and what they put before every name.
        configuration: the ``config.json`` that belongs to a model's weights, where they are kept in a folder.
        pixels: the pixel statistics that its models were trained with, where no file says.
    """

    name: str
    title: str
    table: Table
    describe: Callable[[Foreign], VideoConfig]
    recognise: Callable[[Foreign], bool]
    prefix: str = ""
    dropped: tuple[str, ...] = ()
    unpack: Callable[[State, VideoConfig], State] = lambda state, config: state
    pack: Callable[[State, VideoConfig], State] = lambda state, config: state
    configuration: Callable[[VideoModel], dict[str, Any]] | None = None
    wrapper: tuple[str, str] = ("state_dict", "")
    pixels: Preprocess = field(default_factory=Preprocess)

    def with_prefix(self, state: Mapping[str, Tensor]) -> State:
        """Names as in the file of a whole model, also of a tower's that was saved alone."""
        has_prefix = any(key.startswith(self.prefix) for key in state)
        return {key if has_prefix else self.prefix + key: tensor for key, tensor in state.items()}

    def to_ours(self, state: Mapping[str, Tensor], config: VideoConfig) -> State:
        """Their state dict, complete and accounted for, under our names."""
        return to_ours(self.unpack(self.with_prefix(state), config), self.table)

    def to_theirs(self, state: Mapping[str, Tensor], config: VideoConfig) -> State:
        """Our state dict under their names.

        Raises:
            WeightsError: it holds tensors for which the dialect has no name.
        """
        return self.pack(to_theirs(state, self.table, self.title), config)


def to_ours(state: Mapping[str, Tensor], table: Table) -> State:
    ours: State = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name = renamed(key, table)
        if name is None:
            continue
        whole, part = split_part(name)
        if part:
            parts.setdefault(whole, {})[part] = tensor
        else:
            ours[name] = tensor
    for whole, found in parts.items():
        if found.keys() == set(PARTS):  # else accounting has said so
            ours[whole] = torch.cat([found[part] for part in PARTS])
    return ours


def to_theirs(state: Mapping[str, Tensor], table: Table, title: str) -> State:
    back = tuple((ours, theirs) for theirs, ours in table)
    theirs: State = {}
    nameless = []
    for key, tensor in state.items():
        name = renamed(key, back)
        if name is not None:
            theirs[name] = tensor
            continue
        names = [renamed(with_part(key, part), back) for part in PARTS]
        if None in names:
            nameless.append(key)
        else:
            theirs.update(zip(names, tensor.chunk(len(PARTS)), strict=True))
    if nameless:
        raise WeightsError(
            f"{title} has no place for {len(nameless)} tensors of this model:\n{listed(sorted(nameless))}\n"
            "It is another architecture, or was converted with other settings."
        )
    return theirs


def renamed(key: str, table: Table) -> str | None:
    """``key`` of the first column as the second column has it; None where no row is about it."""
    for theirs, ours in table:
        found = pattern(theirs).fullmatch(key)
        if found:
            whole, part = split_part(ours)
            number = found.groupdict().get("i", "")
            return whole.replace("{i}", number) + found["leaf"] + part
    return None


@functools.cache
def pattern(row: str) -> re.Pattern[str]:
    """What a row of a table matches: the name itself, or its weight and bias."""
    whole, part = split_part(row)
    name = re.escape(whole).replace(re.escape("{i}"), r"(?P<i>\d+)")
    return re.compile(f"{name}(?P<leaf>|\\.weight|\\.bias){re.escape(part)}")


def split_part(name: str) -> tuple[str, str]:
    return (name[:-3], name[-3:]) if name.endswith(PARTS) else (name, "")


def with_part(key: str, part: str) -> str:
    return key + part


def account(dialect: Dialect, file: Foreign, expected: Mapping[str, Tensor]) -> LoadReport:
    """Where every key of a file goes, in the file's own names.

    Args:
        expected: what a model of that kind and size has, under their names, on any device.

    Raises:
        WeightsError: keys missing, unexpected or misshapen, as sorted lists.
    """
    given = dialect.with_prefix(file.state)
    report = LoadReport()
    for key in sorted(given.keys() | expected.keys()):
        if key not in given:
            report.missing.append(key)
        elif key not in expected:
            (report.dropped if matches(key, dialect.dropped) else report.unexpected).append(key)
        elif given[key].shape != expected[key].shape:
            shapes = f"{tuple(given[key].shape)} given, {tuple(expected[key].shape)} expected"
            report.misshapen.append(f"{key}: {shapes}")
        elif not given[key].is_floating_point():
            report.misshapen.append(f"{key}: {given[key].dtype} given, numbers with a fraction expected")
        else:
            report.loaded.append(key)
    if not report.ok:
        raise WeightsError(
            f"{file.path} is no complete checkpoint of {dialect.title}, nothing was imported: {report}\n"
            "Another --from may be meant (img2vid import --help lists them)."
        )
    return report
