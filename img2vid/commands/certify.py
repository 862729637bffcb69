"""``img2vid certify``: a saved model compared with its image model again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from img2vid.options import add_certificate_options, check_options


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2vid certify", description="Compare a saved model with its image model again.", allow_abbrev=False
    )
    parser.add_argument("folder", help="model folder written by img2vid.convert or save_pretrained")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    add_certificate_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    options = make_parser().parse_args(argv)
    check_options(vars(options))
    from img2vid.certificate import certify
    from img2vid.checkpoints.native import load, load_reference, recorded_fingerprint

    model = load(options.folder)
    certificate = certify(
        model, load_reference(model), num_frames=options.certify_frames, image_size=options.certify_size
    )
    certificate.weights_at_conversion = recorded_fingerprint(options.folder)
    print(certificate.to_json() if options.json else certificate)
    return 0 if certificate.ok else 1
