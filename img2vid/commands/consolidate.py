"""``img2vid consolidate``: the model inside a training checkpoint, as a folder that ``img2vid.load`` reads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2vid consolidate",
        description="Write the model inside a training checkpoint, whole or sharded, as a model folder.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="a .ckpt of img2vid train: a file, or a folder of shards")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where to write the model")
    return parser


def main(argv: Sequence[str]) -> int:
    given = make_parser().parse_args(argv)
    from img2vid.checkpoints.native import check_replaceable, save
    from img2vid.consolidate import consolidate

    check_replaceable(Path(given.out))  # before the work, not after it
    save(consolidate(given.checkpoint), given.out)
    print(f"Wrote {given.out}. Load it with img2vid.load({given.out!r}).")
    return 0
