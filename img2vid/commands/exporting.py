"""``img2vid export``: a model as other libraries read it, or its image model back."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from img2vid.choices import EXPORT_FORMATS
from img2vid.command import Progress


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2vid export",
        description="Write a model as other libraries read it, or give back its image model.",
        epilog="example: img2vid export runs/timesformer --format hf-timesformer --out runs/timesformer_hf",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", help="model folder of img2vid")
    parser.add_argument("--format", choices=EXPORT_FORMATS, required=True, help="image, or whose dialect to write")
    parser.add_argument("--out", metavar="FILE_OR_FOLDER", required=True, help="a folder for those of transformers")
    return parser


def main(argv: Sequence[str]) -> int:
    options = make_parser().parse_args(argv)
    from img2vid.checkpoints.exporting import export_checkpoint
    from img2vid.checkpoints.native import load

    progress = Progress()
    with progress.stage(f"Loading {options.folder}"):
        model = load(options.folder)
    with progress.stage(f"Writing {options.out}"):
        notes = export_checkpoint(model, options.out, options.format)
    for note in notes:
        progress.say(f"Differs, though not in this model's own answers: {note}.")
    progress.say(f"Wrote {options.out}.")
    return 0
