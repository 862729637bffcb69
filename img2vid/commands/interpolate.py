"""``img2vid interpolate``: between an image model and the video model it became, or the mean of several."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2vid interpolate",
        description="Interpolate between an image model and the video model it became, or average video models.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="model folders; the first may be the word image: the pretrained weights that the second was made from",
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--alpha", type=float, help="from 0 (first model) to 1 (second model)")
    how.add_argument("--average", action="store_true", help="the mean of two or more folders")
    parser.add_argument("--weights", metavar="FILE", help="local weights file of the image model, for the word image")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where to write the model")
    return parser


def main(argv: Sequence[str]) -> int:
    given = make_parser().parse_args(argv)
    from img2vid.interpolation import check_alpha, run

    if given.alpha is not None:
        check_alpha(given.alpha)
    check_arguments(given)
    return run(given.models, Path(given.out), given.alpha, given.weights)


def check_arguments(given: argparse.Namespace) -> None:
    from img2vid.interpolation import InterpolationError

    count, is_image = len(given.models), [name == "image" for name in given.models]
    if given.alpha is not None and count != 2:
        raise InterpolationError(f"--alpha is between two models, but {count} were given. --average takes any number.")
    if given.average and count < 2:
        raise InterpolationError("--average of one model is that model; give at least two folders.")
    if any(is_image[1:]) or (given.average and any(is_image)):
        raise InterpolationError("The word image stands for the first of two models, with --alpha.")
    if given.weights is not None and not any(is_image):
        raise InterpolationError("--weights belongs to the word image; folders have their own weights.")
