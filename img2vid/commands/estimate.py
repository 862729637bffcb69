"""``img2vid estimate``: what training will cost, before renting anything."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from img2vid.choices import OPTIMIZER_STATES, TRAINING_PRECISIONS
from img2vid.options import add_settings, option_groups


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2vid estimate",
        description="Parameters, FLOPs, memory and GPU-hours of a training, without weights or a GPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--backbone", required=True, help="alias, timm:NAME, open_clip:ARCH or nano_clip")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="B", help="clips for each GPU and step (default: 8)"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs in all nodes together (default: 1)")
    parser.add_argument(
        "--clips", type=int, default=1_000_000, help="clips seen in the whole training (default: 1,000,000)"
    )
    parser.add_argument(
        "--precision",
        choices=TRAINING_PRECISIONS,
        default="bf16-mixed",
        help="Lightning's name (default: bf16-mixed)",
    )
    parser.add_argument("--checkpointing", action="store_true", help="run blocks again in backward")
    parser.add_argument(
        "--freeze-policy", nargs="+", default="none", help="none, temporal_only, image, text, first:N (default: none)"
    )
    parser.add_argument(
        "--optimizer", choices=list(OPTIMIZER_STATES), default="adamw", help="what keeps states (default: adamw)"
    )
    parser.add_argument("--device-tflops", type=float, metavar="TFLOPS", help="the GPU's peak; an A100's if not given")
    parser.add_argument(
        "--mfu", type=float, default=0.35, help="share of the peak that is reached; measure yours (default: 0.35)"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    add_settings(option_groups(parser))
    return parser


def main(argv: Sequence[str]) -> int:
    given = vars(make_parser().parse_args(argv))
    from img2vid.estimate import estimate

    as_json = given.pop("json")
    result = estimate(given.pop("backbone"), **given)
    print(json.dumps(result.to_dict(), indent=2) if as_json else result)
    return 0
