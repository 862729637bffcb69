"""``img2vid export``: a model for others: in their format, as a program without img2vid, or its image model back."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from img2vid.choices import EXPORT_FORMATS, PROGRAM_FORMATS
from img2vid.command import Progress
from img2vid.errors import Img2VidError
from img2vid.options import parse_size

PROGRAM_OPTIONS = ("text", "pixels", "fold", "image_size", "dtype")
DTYPES = ("float32", "float16", "bfloat16")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2vid export",
        description="Write a model as other libraries read it, as a program that runs without img2vid, or give back "
        "its image model.",
        epilog="examples: img2vid export runs/timesformer --format hf-timesformer --out runs/timesformer_hf;  "
        "img2vid export runs/shared --format onnx --pixels --fold --out runs/shared.onnx",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", help="model folder of img2vid")
    parser.add_argument(
        "--format",
        choices=EXPORT_FORMATS,
        required=True,
        help="image, whose dialect to write, a program with open batch and frames (onnx, torch-export, torchscript), "
        "or all weights in one file (safetensors)",
    )
    parser.add_argument("--out", metavar="FILE_OR_FOLDER", required=True, help="a folder for those of transformers")
    programs = parser.add_argument_group("programs", "onnx, torch-export, torchscript; --dtype also safetensors")
    programs.add_argument("--text", action="store_true", help="the text tower instead of the video tower")
    programs.add_argument("--pixels", action="store_true", help="take uint8 pixels and normalise them inside")
    programs.add_argument("--fold", action="store_true", help="fold temporal_fc into the projection in front of it")
    programs.add_argument("--image-size", type=parse_size, metavar="PIXELS", help="of clips (default: the model's own)")
    programs.add_argument("--dtype", choices=DTYPES, help="cast the weights first (default: as they are)")
    return parser


def main(argv: Sequence[str]) -> int:
    options = vars(make_parser().parse_args(argv))
    progress = Progress()
    if options["format"] in PROGRAM_FORMATS:
        export_as_program(progress, **options)
    else:
        export_as_checkpoint(progress, **options)
    progress.say(f"Wrote {options['out']}.")
    return 0


def export_as_checkpoint(progress: Progress, folder: str, format: str, out: str, **programs: Any) -> None:
    if given := [f"--{name.replace('_', '-')}" for name in PROGRAM_OPTIONS if programs[name]]:
        raise Img2VidError(f"{', '.join(given)}: only for --format {', '.join(PROGRAM_FORMATS)}, not for {format}.")
    from img2vid.checkpoints.exporting import check_place, export_checkpoint
    from img2vid.checkpoints.native import load

    check_place(Path(out), format)
    with progress.stage(f"Loading {folder}"):
        model = load(folder)
    with progress.stage(f"Writing {out}"):
        notes = export_checkpoint(model, out, format)
    for note in notes:
        progress.say(f"Differs, though not in this model's own answers: {note}.")


def export_as_program(progress: Progress, folder: str, format: str, out: str, dtype: str | None, **asked: Any) -> None:
    import torch

    from img2vid.checkpoints.native import load
    from img2vid.export import check_place, export_program

    check_place(Path(out), format, **asked)
    with progress.stage(f"Loading {folder}"):
        model = load(folder)
        if dtype is not None:
            model.to(getattr(torch, dtype))
    with progress.stage(f"Writing {out}, and running it beside the model"):
        written = export_program(model, out, format, **asked)
    about = {name: text for name, text in written.metadata.items() if name not in ("config", "img2vid")}
    for line in (f"{name}: {text}" for name, text in about.items()):
        progress.say(line)
    for shape, difference in written.differences.items():
        progress.say(f"{shape}: differs from the model by {difference:.3g}")
    if written.differences:
        progress.say(f"Max |difference| from eager: {written.max_difference:.3g}.")
    else:
        progress.say("Read back: the same bits.")
