"""``img2vid merge``: one model of several that differ in their weights alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2vid merge",
        description="Merge models of one architecture in weight space. It preserves the function of none of them.",
        epilog="example: img2vid merge runs/a runs/b --method task --base runs/start --shares 0.6 0.4 --out runs/ab",
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model folders")
    parser.add_argument(
        "--method",
        choices=("linear", "slerp", "task"),
        default="linear",
        help="weighted mean; along the arc between two; or what each has learned since --base, added to it (default: "
        "linear)",
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="of each model (linear; default: equal); how far to go from the first to the second, from 0 to 1 (slerp; "
        "0.5); factor of what each has learned, also negative (task; 1)",
    )
    parser.add_argument("--base", metavar="MODEL", help="task: the folder that all of them were trained from")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where to write the model")
    return parser


def main(argv: Sequence[str]) -> int:
    given = make_parser().parse_args(argv)
    from img2vid.merging import MergeError, run

    count, shares = len(given.models), given.shares
    if (given.method == "task") != (given.base is not None):
        raise MergeError("--base goes with --method task, which needs it: the model that the others were trained from.")
    if given.method == "slerp" and count != 2:
        raise MergeError(f"slerp goes from one model to another, but {count} were given. linear takes any number.")
    if given.method == "linear" and count < 2:
        raise MergeError("One model alone is merged with nothing; give at least two folders.")
    expected = 1 if given.method == "slerp" else count
    if shares is not None and len(shares) != expected:
        raise MergeError(f"--shares: {len(shares)} given, {expected} expected for {given.method} of {count} models.")
    return run(given.models, Path(given.out), given.method, shares, given.base)
