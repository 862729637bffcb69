"""``img2vid doctor``: what is installed, whether it works here, and the command that installs the rest."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from img2vid._version import __version__


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "img2vid doctor",
        description="What is installed, whether it works here, and the command that installs the rest.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    return parser


def main(argv: Sequence[str]) -> int:
    options = make_parser().parse_args(argv)
    from img2vid.doctor import diagnose, print_diagnosis

    found = diagnose()
    if options.json:
        print(json.dumps({"ok": found.ok, "version": __version__, **asdict(found)}, indent=2))
    else:
        print_diagnosis(found)
    return 0 if found.ok else 1
