"""``img2vid inspect``: what is inside a backbone or a saved model, and what is guaranteed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from img2vid.options import add_settings, option_groups


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2vid inspect",
        usage="%(prog)s SOURCE [options]",
        description="What is inside a backbone or a saved model, and what is guaranteed.",
        epilog="With a folder, the options show what its model would be with other settings.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="backbone name or model folder")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    add_settings(option_groups(parser))
    return parser


def main(argv: Sequence[str]) -> int:
    settings = vars(make_parser().parse_args(argv))
    source, as_json = settings.pop("source"), settings.pop("json")
    from img2vid.inspection import inspect

    facts = inspect(source, **settings)
    print(json.dumps(facts.to_dict(), indent=2) if as_json else facts)
    return 0
