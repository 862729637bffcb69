"""A table of two columns, their names of weights and ours, read in both directions.

A row names a parameter, or a module whose ``weight`` and ``bias`` are meant; ``{i}`` is the number of a block. Where
one of our tensors is several of theirs, our name says which part a row is: ``attn.qkv[q]``, ``[k]`` and ``[v]`` are
thirds of the rows of ``attn.qkv``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from img2vid.errors import WeightsError

State = dict[str, Tensor]
Table = tuple[tuple[str, str], ...]
PARTS = ("[q]", "[k]", "[v]")


def to_ours(state: Mapping[str, Tensor], table: Table) -> State:
    """Their tensors that the table knows, under our names.

    Raises:
        WeightsError: of several that are one of ours, some are missing.
    """
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
        lacking = [part for part in PARTS if part not in found]
        if lacking:
            back = tuple((ours, theirs) for theirs, ours in table)
            names = [str(renamed(whole + part, back)) for part in lacking]
            raise WeightsError(f"Queries, keys and values belong together, but there is no {' and no '.join(names)}.")
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
        names = [renamed(key + part, back) for part in PARTS]
        if None in names:
            nameless.append(key)
        else:
            theirs.update(zip(names, tensor.chunk(len(PARTS)), strict=True))
    if nameless:
        lines = "\n".join(f"    {key}" for key in sorted(nameless)[:20])
        more = f"\n    ... and {len(nameless) - 20} more" if len(nameless) > 20 else ""
        raise WeightsError(
            f"{title} has no place for {len(nameless)} tensors of this model:\n{lines}{more}\n"
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
