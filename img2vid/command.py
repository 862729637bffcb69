"""What all commands share: how they say what they are doing, and how they end, whatever they were given."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from img2vid.config import shown
from img2vid.errors import Img2VidError, nearest
from img2vid.weights.bytecount import Watcher, watching

if TYPE_CHECKING:
    from rich.console import RenderableType

INTERRUPTED, READER_GONE = 130, 141  # 128 + SIGINT and 128 + SIGPIPE, as shells count
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "storage size calculation overflowed")


def run_command(command: Callable[[], int]) -> int:
    """Run a command to its exit code: its own, or 2 and one message where the user can mend what is wrong.

    Errors that are not the user's to mend are bugs, and keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path may hold what the terminal's encoding does not
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            code = command()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # a full disk or a closed pipe is told here, not while Python shuts down
        return code
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stdout = None
        return READER_GONE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Img2VidError as error:
        message = str(error)
    except OSError as error:  # files that cannot be read or written are the user's to mend too
        message = f"{error.strerror}: {shown(error.filename)}" if error.strerror and error.filename else str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = (
            f"This does not fit into memory ({first_line(error)}). Smaller are: --num-frames, --image-size, "
            "--dtype bfloat16, and, where the certificate is what runs out, --certify-frames 1 2 or --certify-size."
        )
    print(f"error: {message}", file=sys.stderr)
    if not writable(sys.stdout):
        sys.stdout = None
    return 2


class Parser(argparse.ArgumentParser):
    """Says which option may have been meant by one that does not exist."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (?:[^-]\S* )*(-[^\s=]+)", message)
        super().error(message + (f".{nearest(unknown[1], self._option_string_actions, 3)}" if unknown else ""))


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in NO_MEMORY)


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def writable(stream: Any) -> bool:
    try:
        stream.flush()
    except (OSError, AttributeError):
        return False
    return True


def megabytes(done: int, total: int) -> str:
    return f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"


def with_bar(text: str, done: int, total: int) -> RenderableType:
    """What is being done, and how much of a file has been read for it; without a bar once that is all."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    if done >= total:
        return Text(text)
    row = Table.grid(padding=(0, 1))
    row.add_row(Text(text), ProgressBar(total, done, width=30), megabytes(done, total))
    return row


class Progress(logging.Handler):
    """Says what a command is doing: a line with the seconds so far; on a terminal a spinner for what takes long.

    Inside ``stage`` the package's own log speaks too: what is loaded, from where, how large; and how much of it has
    been read, as a bar on a terminal, elsewhere as a line now and then.
    """

    seconds_between_lines = 5.0

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        from rich.console import Console

        self.console = Console()
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def say(self, text: str) -> None:
        from rich.text import Text  # not markup: brackets in a path are brackets

        self.console.print(Text.assemble((f"{self.seconds:6.1f} s  ", "dim"), text), soft_wrap=True)

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())

    def say_sometimes(self) -> Watcher:
        last: float | None = None

        def say(done: int, total: int) -> None:
            nonlocal last
            last = time.perf_counter() if last is None else last  # of the first bytes, not of what came before
            if time.perf_counter() - last > self.seconds_between_lines:
                last = time.perf_counter()
                self.say(f"Read {megabytes(done, total)}")

        return say

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        from rich.text import Text

        logger = logging.getLogger("img2vid")
        before = logger.level, logger.propagate
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        logger.propagate = (
            False  # libraries give the root logger a handler by merely logging: each line would come twice
        )
        try:
            if self.console.is_terminal:
                status = self.console.status(Text(text))
                with status, watching(lambda done, total: status.update(with_bar(text, done, total))):
                    yield
            else:  # a log file should show where the time goes, and where it ended
                self.say(text)
                with watching(self.say_sometimes()):
                    yield
        finally:
            logger.setLevel(before[0])
            logger.propagate = before[1]
            logger.removeHandler(self)


@contextmanager
def progress_bar(title: str, total: int, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar with the time that is left, on standard error; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    hidden = not shown or not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
