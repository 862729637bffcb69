"""``img2vid completion``: a script that completes commands and options, made from the parsers themselves."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

SHELLS = ("bash", "zsh", "tcsh")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "img2vid completion",
        description="Print a script that completes img2vid's commands and options.",
        epilog='bash: eval "$(img2vid completion bash)" in ~/.bashrc. '
        "zsh: img2vid completion zsh > a file _img2vid in a folder of $fpath.",
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(argv: Sequence[str]) -> int:
    options = make_parser().parse_args(argv)
    import shtab

    print(shtab.complete(whole_parser(), shell=options.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """All commands in one parser, as the script must know them at once."""
    from img2vid.cli import COMMANDS, DESCRIPTION

    parser = argparse.ArgumentParser("img2vid", description=DESCRIPTION)
    add_commands(parser, COMMANDS)
    return parser


def add_commands(parser: argparse.ArgumentParser, commands: dict[str, tuple]) -> None:
    words = parser.add_subparsers(dest="command")
    for name, (module, what) in commands.items():
        if isinstance(module, dict):
            add_commands(words.add_parser(name, help=what), module)
        else:
            of_command = importlib.import_module(module).make_parser()
            complete_files(of_command)
            words.add_parser(name, help=what, parents=[of_command], add_help=False)


def complete_files(parser: argparse.ArgumentParser) -> None:
    """Where any word goes, the name of a file does."""
    import shtab

    for action in parser._actions:
        if action.type in (None, Path) and action.choices is None and action.nargs != 0:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
