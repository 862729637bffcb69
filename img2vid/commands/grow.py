"""``img2vid grow``: a deeper or wider model of the same function."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from img2vid.command import Progress
from img2vid.config import ConfigError
from img2vid.options import add_certificate_options, check_options, whole


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2vid grow",
        description="Make a saved model of timm or open_clip deeper or wider; it stays the same function (Net2Net).",
        epilog="example: img2vid grow runs/vit_base --depth 16 --mlp-ratio 6 --heads 16 --out runs/vit_larger",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", help="model folder")
    parser.add_argument("--depth", type=whole, metavar="N", help="blocks, at least as many as it has")
    parser.add_argument("--mlp-ratio", type=float, metavar="R", help="hidden width of MLPs by the width of tokens")
    parser.add_argument("--heads", type=whole, metavar="N", help="attention heads, each as wide as those it has")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of which units and heads are repeated")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where to write the model")
    add_certificate_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    given = make_parser().parse_args(argv)
    check_options(vars(given))
    if given.depth is None and given.mlp_ratio is None and given.heads is None:
        raise ConfigError("Nothing to grow: give --depth, --mlp-ratio, --heads, or several of them.")
    from img2vid.certificate import certify
    from img2vid.checkpoints.native import check_replaceable, load, save
    from img2vid.growing import grow
    from img2vid.reporting import certificate_table

    check_replaceable(Path(given.out))
    progress = Progress()
    with progress.stage(f"Growing {given.folder}"):
        grown, growth = grow(load(given.folder), given.depth, given.mlp_ratio, given.heads, given.seed)
    progress.say(f"{growth}.")
    with progress.stage("Certifying"):
        certificate = certify(grown, num_frames=given.certify_frames, image_size=given.certify_size)
    progress.console.print(certificate_table(certificate))
    with progress.stage(f"Writing {given.out}"):
        save(grown, given.out, certificate)
    if not (growth.held and certificate.ok):
        progress.say(f"It is NOT the same function. It was written to {given.out} to be looked at.")
        return 1
    progress.say(f"Wrote {given.out}. Load it with img2vid.load({given.out!r}).")
    return 0
