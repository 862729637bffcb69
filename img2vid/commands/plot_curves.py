"""``img2vid plot curves``: columns of a training log over its steps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "img2vid plot curves", description="Draw columns of a training log over its steps.", allow_abbrev=False
    )
    parser.add_argument("log", metavar="metrics.csv", help="with a column step, as Lightning's CSVLogger writes it")
    parser.add_argument("--columns", nargs="+", default=["*"], help="names or patterns, such as 'gate*' (default: all)")
    parser.add_argument("--log-scale", action="store_true", help="values on a logarithmic axis")
    parser.add_argument("--out", default="runs/curves.png", help="default: runs/curves.png")
    return parser


def main(argv: Sequence[str]) -> int:
    options = make_parser().parse_args(argv)
    from img2vid.evaluation.report import read_curves
    from img2vid.plots import curves_figure, save

    figure = curves_figure(read_curves(options.log, options.columns), Path(options.log).name, options.log_scale)
    print(f"wrote {save(figure, options.out)}")
    return 0
