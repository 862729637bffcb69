"""Documents as programs: the blocks of a page run from top to bottom, and print what the page shows.

``python`` blocks share one namespace, each line of a ``bash`` block is a command, and a ``text`` block holds what the
block before it printed. ``sh`` and ``yaml`` blocks are for machines that tests do not have: only their words are read.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from img2vid.cli import main as cli
from img2vid.convert import main as convert

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^```([a-z]*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block, and the line of the page that it begins on."""

    language: str
    text: str
    line: int

    @property
    def commands(self) -> list[str]:
        """The lines of a bash or sh block, those that end in a backslash joined with the next; comments left out."""
        lines = [line.strip() for line in self.text.replace("\\\n", " ").splitlines()]
        return [line for line in lines if line and not line.startswith("#")]


def blocks(page: str, language: str | None = None) -> list[Block]:
    found = [Block(m[1], m[2], page[: m.start()].count("\n") + 1) for m in FENCED.finditer(page)]
    return [block for block in found if language in (None, block.language)]


def links(page: str) -> list[str]:
    """What a page links to, without the place inside it; nothing inside fenced blocks is a link."""
    return re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", FENCED.sub("", page))


def dead_links(path: Path) -> list[str]:
    return [to for to in links(path.read_text()) if not to.startswith("https://") and not (path.parent / to).exists()]


def masked(text: str) -> str:
    """What stays the same from run to run and from folder to folder: words, without numbers, tables and line breaks."""
    text = re.sub(r"(?<![\w.])/\S*?/runs/", "runs/", text)
    text = re.sub(r"[\u2500-\u257f]", " ", text)
    text = re.sub(r"(?<![A-Za-z-])[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", text)
    return re.sub(r"\s+", " ", text).strip()


def missing(shown: str, printed: str) -> str | None:
    """The first part of ``shown`` that was not printed, in order; a line of ``...`` stands for any lines."""
    rest = masked(printed)
    for part in re.split(r"^\s*\.\.\.\s*$", shown, flags=re.MULTILINE):
        words = masked(part)
        if words not in rest:
            return part
        rest = rest[rest.index(words) + len(words) :]
    return None


def run_command(line: str) -> None:
    """One line of a shell; img2vid's own commands without a process of their own."""
    words = shlex.split(line, comments=True)
    if words[:3] == ["python", "-m", "img2vid.convert"]:
        code = convert(words[3:])
    elif words[0] == "img2vid":
        code = cli(words[1:])
    else:
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True)
        print(done.stdout + done.stderr)
        code = done.returncode
    assert code == 0, f"{line}: exit code {code}"


def run_page(
    path: Path,
    read_printed: Callable[[], str],
    smaller: dict[str, str] | None = None,
    only: Callable[[Block], bool] = lambda block: True,
) -> dict:
    """Run the python and bash blocks of a page in the current folder, and compare what they print with its text blocks.

    Args:
        read_printed: gives, and forgets, what was printed since it was last called.
        smaller: sizes for a test: text of the page -> what is run instead. Each must occur.
        only: which blocks to run.

    Returns:
        The names that the python blocks have left.
    """
    page, names = path.read_text(), {"__name__": "__main__"}
    for large, small in (smaller or {}).items():
        assert large in page, f"{path.name} no longer holds {large!r}"
        page = page.replace(large, small)
    printed = ""
    for block in filter(only, blocks(page)):
        where = f"{path.name}, line {block.line}"
        if block.language == "python":
            read_printed()
            # on its own line of the page, so that a traceback leads there
            exec(compile("\n" * block.line + block.text, str(path), "exec"), names)
            printed = read_printed()
        elif block.language == "bash":
            read_printed()
            for line in block.commands:
                run_command(line)
            printed = read_printed()
        elif block.language == "text":
            lost = missing(block.text, printed)
            assert lost is None, f"{where}: not printed:\n{masked(lost)}\n--- printed:\n{masked(printed)}"
    return names


@contextmanager
def logs_to_stderr() -> Iterator[None]:
    """Handlers keep the stream that was standard error when they were made; inside, they use the one of now."""
    loggers = [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    handlers = {h for logger in loggers for h in logger.handlers if type(h) is logging.StreamHandler}
    before = [(handler, handler.stream) for handler in handlers]
    for handler in handlers:
        handler.stream = sys.stderr  # setStream would flush the one before, which an earlier test may have closed
    try:
        yield
    finally:
        for handler, stream in before:
            handler.stream = stream
