"""``img2vid import``: a published video checkpoint becomes a video model of img2vid."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from img2vid.choices import DIALECTS, POS_EMBED_RESAMPLE
from img2vid.command import Progress
from img2vid.config import ConfigError
from img2vid.options import parse_size, whole


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2vid import",
        description="A published video checkpoint becomes a video model of img2vid, every key accounted for.",
        epilog="example: img2vid import TimeSformer_divST_8x32_224_K400.pyth --out runs/timesformer",
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="FILE_OR_FOLDER", help="weights file, or a folder as transformers saves it")
    parser.add_argument(
        "--from",
        dest="dialect",
        choices=["auto", *DIALECTS],
        default="auto",
        help="whose checkpoint it is (default: auto)",
    )
    parser.add_argument("--out", metavar="FOLDER", help="where to write the model (default: runs/import/NAME)")
    parser.add_argument("--num-frames", type=whole, metavar="T", help="frames, if other than the checkpoint's")
    parser.add_argument(
        "--image-size", type=parse_size, metavar="PIXELS", help="pixels, if other than the checkpoint's"
    )
    parser.add_argument("--num-heads", type=whole, metavar="H", help="attention heads (default: 64 numbers wide each)")
    parser.add_argument(
        "--pos-embed-resample",
        choices=POS_EMBED_RESAMPLE,
        default="bicubic",
        help="how positions are brought to --image-size; nearest_1d is the original TimeSformer's way, and wrong",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    options = make_parser().parse_args(argv)
    for name in ("path", "out"):
        if getattr(options, name) is not None and not getattr(options, name).strip():
            raise ConfigError(f"{name} is empty. Was it an unset shell variable?")
    from img2vid.checkpoints.importing import import_with_report
    from img2vid.checkpoints.native import check_replaceable, save

    out = Path("runs/import", Path(options.path).absolute().name) if options.out is None else Path(options.out)
    check_replaceable(out)
    progress = Progress()
    progress.say(f"Reading {options.path}")
    model, dialect, report = import_with_report(
        options.path,
        options.dialect,
        options.num_frames,
        options.image_size,
        options.num_heads,
        options.pos_embed_resample,
    )
    config = model.config
    progress.say(f"It is {dialect.title}: {config.attention}, {config.num_frames} frames, prefix {config.prefix_mode}.")
    if names := model.class_names:
        progress.say(f"Classes: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''} ({len(names)}).")
    progress.say(f"Keys: {len(report.loaded)} loaded, {len(report.dropped)} dropped on purpose, none left over.")
    for difference in report.differences:
        progress.say(difference)
    if config.quirks:
        progress.say(f"Does differently from a converted model: {', '.join(config.quirks)} (docs/checkpoints.md).")
    with progress.stage(f"Writing {out}"):
        save(model, out)
    progress.say(f"Wrote {out}. Load it with img2vid.load({str(out)!r}).")
    return 0
