"""docs/backbones.md: written from the rows of the census, and read back by the tests as the list of what to expect."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tests.census.survey import Row, by_stratum

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"
TITLES = {"timm": "timm entrypoints", "open_clip": "open_clip configs"}
OUTCOMES = ("converted", "refused", "failed")
STRATUM = ("tower", "block", "attention", "pool", "positions", "prefix tokens")
FOUND = (
    "architectures",
    "bitwise",
    "left behind in the copy",
    "prefix modes",
    "joint attention",
    "parameters",
    "smallest",
)
REFUSAL = ("what is said", "architectures", "for example")

INTRO = """# Supported backbones

Every vision-transformer entrypoint of timm and every image tower of open_clip is either converted or refused by name.
This page is written by `python -m tests.census --write docs/backbones.md`, not by hand, and was made with
{versions}.

{counts}
For each architecture the census checks, with random weights that are moved away from the libraries' initial values:

- at full size, without numbers (torch's meta device): it converts, the image model's keys survive, every new key is
  about time, and shapes are the image model's;
- with two blocks and a few patches, at the architecture's own width, on the CPU: the video model gives the *same bits*
  as the image model on the same folded batch, for T = 1, 2 and 3, static, moving and shuffled clips, after every block
  and at the end, and the clip feature is the mean over frames; opened gates change the output and closed gates bring it
  back bit for bit; gradient reaches every layer's gate at the first step and its attention at the second;
- the copied attention along time is `layer_scale * attention(norm(x))` of the image block's own modules (without rotary
  codes), wherever nothing but rotary codes is left behind. The largest relative difference was {copy_error:.1e}.

"Left behind" are parts of an image block's attention that have no counterpart along time; everything else is copied.
Prefix modes and joint attention were certified on the smallest architecture of each row, one block deep, and what a
backbone cannot do is refused with the reason. `img2vid inspect timm:vit_base_patch16_224` says the same for one
backbone. The tower "TimmModel: Eva" is timm's Eva inside an open_clip model.
"""

REFUSED = """## Refused

Tokens must stay in fixed columns from block to block, so that "the same position in the next frame" has a meaning. What
follows does not do so, or keeps its attention where img2vid does not know to look. It is said before anything is
downloaded.
"""


def write_page(rows: list[Row], modes: dict[str, dict[str, bool | str]], path: Path) -> None:
    """Write the page; ``modes`` are the other ways of inserting time, by the name of each stratum's smallest member."""
    libraries = [library for library in TITLES if any(row.library == library for row in rows)]
    counts = [(TITLES[library], *(str(count(rows, library, o)) for o in OUTCOMES)) for library in libraries]
    copy_error = max((row.copy_error or 0.0 for row in rows), default=0.0)
    parts = [INTRO.format(versions=installed(), counts=table(("", *OUTCOMES), counts), copy_error=copy_error)]
    for library in libraries:
        strata = {stratum[1:]: members for stratum, members in by_stratum(rows).items() if stratum[0] == library}
        lines = [(*stratum, *describe(members, modes[members[0].name])) for stratum, members in strata.items()]
        parts.append(f"## {TITLES[library]}\n\n{table((*STRATUM, *FOUND), lines)}")
        for tower in dict.fromkeys(stratum[0] for stratum in strata):
            names = [row.name for stratum, members in strata.items() if stratum[0] == tower for row in members]
            parts.append(folded(f"{tower}: {len(names)}", names))
    refused: dict[str, list[str]] = {}
    for row in rows:
        if row.outcome == "refused":
            refused.setdefault(row.text, []).append(row.name)
    lines = [(text, str(len(names)), f"`{names[0]}`") for text, names in sorted(refused.items())]
    parts.append(f"{REFUSED}\n{table(REFUSAL, lines)}")
    parts += [folded(text, names) for text, names in sorted(refused.items()) if len(names) > 1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts))


def installed() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "open_clip_torch"))


def count(rows: Iterable[Row], library: str, outcome: str) -> int:
    return sum(row.library == library and row.outcome == outcome for row in rows)


def describe(members: list[Row], modes: dict[str, bool | str]) -> tuple[str, ...]:
    """What was found about a stratum, in the order of ``FOUND``."""
    smallest = members[0]
    equal = sum(row.checks["bitwise"] for row in members)
    left_behind = sorted({what for row in members for what in row.left_behind})
    if "rotary" in smallest.position:
        left_behind.append("rotary position code")
    prefix = ["per_frame", *(mode for mode in ("shared", "global") if modes[mode] is True)]
    joint = [name for mode, name in (("joint", "per_frame"), ("joint, shared", "shared")) if modes[mode] is True]
    if not smallest.num_prefix_tokens:
        prefix, joint = ["no prefix"], ["yes"] if joint else []
    return (
        str(len(members)),
        f"{equal} of {len(members)}",
        "; ".join(left_behind) or "nothing",
        ", ".join(prefix),
        ", ".join(joint) or "no",
        f"{smallest.parameters / 1e6:.1f} M",
        f"`{smallest.name}`",
    )


def table(header: tuple[str, ...], lines: Iterable[Iterable[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *lines))


def folded(summary: str, names: list[str]) -> str:
    names = [f"`{name}`" for name in sorted(names)]
    return f"<details><summary>{summary}</summary>\n\n{', '.join(names)}\n\n</details>\n"


@dataclass
class Page:
    """What docs/backbones.md says."""

    versions: str
    strata: dict[str, tuple[str, ...]]  # smallest architecture: what it stands for
    architectures: dict[str, int]  # how many each of those stands for
    parameters: dict[str, float]  # of those, in millions
    converted: list[str]
    refusals: dict[str, str]  # one architecture of each kind: what is said

    def sample(self) -> list[str]:
        """The smallest architecture of each (block, attention, pool, positions, prefix tokens), and of each tower."""
        chosen, seen = [], set()
        for name in sorted(self.strata, key=lambda name: (self.parameters[name], name)):
            _, tower, *kind = self.strata[name]
            if {tower, tuple(kind)} - seen:
                chosen.append(name)
                seen |= {tower, tuple(kind)}
        return chosen


def summary(page: Page) -> str:
    """The table that README.md shows: what each tower class of the libraries stands for."""
    towers: dict[tuple[str, str], list[str]] = {}
    for name, (library, tower, *_) in page.strata.items():
        towers.setdefault((library, tower), []).append(name)

    def several(names: list[str], column: str) -> str:
        at = 1 + STRATUM.index(column)
        return "; ".join(dict.fromkeys(page.strata[name][at].removesuffix(", per block") for name in names))

    lines = [
        (
            library,
            tower,
            *(several(names, column) for column in ("attention", "positions", "pool")),
            str(sum(page.architectures[name] for name in names)),
        )
        for (library, tower), names in towers.items()
    ]
    return table(("library", "image model", "attention", "positions", "pool", "architectures"), lines)


def read_page(path: Path = PAGE) -> Page:
    text = path.read_text()
    lines = [
        [cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"
    ]
    lines = [line for line in lines if ":" in line[-1] and not line[-1].startswith("---")]
    strata = [line for line in lines if len(line) == len(STRATUM) + len(FOUND)]
    supported = text.partition("## Refused\n")[0].splitlines()
    return Page(
        versions=re.search(r"was made with\n(.*)\.\n", text)[1],
        strata={line[-1]: (line[-1].partition(":")[0], *line[: len(STRATUM)]) for line in strata},
        architectures={line[-1]: int(line[len(STRATUM)]) for line in strata},
        parameters={line[-1]: float(line[-2].removesuffix(" M")) for line in strata},
        converted=[name for line in supported if line[:1] == "`" for name in re.findall(r"`(.+?)`", line)],
        refusals={line[-1]: line[0] for line in lines if len(line) == len(REFUSAL)},
    )
