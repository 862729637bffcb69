"""``img2vid demo``: the whole idea in a few minutes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "img2vid demo",
        description="An image model learns which way things move: all steps, offline.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="new folder (default: runs/demo)")
    parser.add_argument("--quick", action="store_true", help="all the steps, too short to learn much")
    parser.add_argument("--seed", type=int, default=0, help="of videos and training (default: 0)")
    return parser


def main(argv: Sequence[str]) -> int:
    options = make_parser().parse_args(argv)
    from img2vid.demo.story import FULL, QUICK, tell

    tell(options.out, QUICK if options.quick else FULL, options.seed)
    return 0
