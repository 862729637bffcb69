"""The options that the evaluation commands share."""

from __future__ import annotations

import argparse

from img2vid.choices import EVALUATION_PRECISIONS
from img2vid.command import Parser
from img2vid.data.lists import READERS
from img2vid.data.sampling import SHORT_POLICIES


def evaluation_parser(name: str, description: str) -> argparse.ArgumentParser:
    """``img2vid eval NAME`` with the model, and where the result goes."""
    parser = Parser(f"img2vid eval {name}", description=description, allow_abbrev=False)
    out = f"runs/eval/{name.replace('-', '_')}.json"
    parser.add_argument(
        "--model", required=True, metavar="FOLDER", help="written by img2vid.convert or save_pretrained"
    )
    parser.add_argument("--out", default=out, help=f"result file, JSON (default: {out})")
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("videos")
    group.add_argument("--data", required=True, nargs="+", metavar="LIST", help="list or folder")
    group.add_argument("--format", default="auto", choices=["auto", *READERS], help="of the list (docs/data.md)")
    group.add_argument("--root", help="folder the paths of the list start at (default: the list's folder)")
    group.add_argument("--classes", help="kinetics400, ucf101, hmdb51, ssv2, or a text file with one class a line")
    group.add_argument("--split", type=int, default=1, help="UCF101, HMDB51: which split (default: 1)")
    group.add_argument("--subset", default="test", help="HMDB51: train or test (default: test)")


def add_views(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("clips")
    group.add_argument("--num-frames", type=int, help="per clip (default: the model's own)")
    group.add_argument("--frame-interval", type=int, help="frames between two (default: one from each equal part)")
    group.add_argument("--target-fps", type=float, help="frames per second, instead of an interval")
    group.add_argument("--num-clips", type=int, default=1, help="clips per video (default: 1)")
    group.add_argument("--num-crops", type=int, default=1, choices=(1, 3), help="squares per clip (default: 1)")
    group.add_argument("--short-policy", default="repeat_last", choices=SHORT_POLICIES)
    group.add_argument("--short-side", type=int, help="pixels to resize to before the cut (default: the model's size)")
    group.add_argument("--backend", default="auto", help="of the reader (default: auto)")


def add_compute(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument("--batch-size", type=int, default=16, help="clips in one forward pass (default: 16)")
    group.add_argument("--num-workers", type=int, default=2, help="processes that decode (default: 2)")
    group.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    group.add_argument("--precision", default="float32", choices=EVALUATION_PRECISIONS)
    group.add_argument(
        "--cache", default="runs/features", metavar="FOLDER", help="of features (default: runs/features)"
    )
    group.add_argument("--no-cache", action="store_true", help="keep no features")
    group.add_argument("--strict", action="store_true", help="a video that cannot be read is an error")
    group.add_argument("--seed", type=int, default=0, help="of bootstrap and random classes (default: 0)")


def add_templates(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--templates", help="name of a set, or text file with one template a line (default: the data's own, or action)"
    )
