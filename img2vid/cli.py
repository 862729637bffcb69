"""The ``img2vid`` command: one sub-command a verb, each importing what it needs only when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from img2vid._version import __version__
from img2vid.errors import Img2VidError


def convert_main(argv: Sequence[str]) -> int:
    from img2vid.convert import main

    return main(argv)


def inspect_main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="img2vid inspect", description=COMMANDS["inspect"][1])
    parser.add_argument("source", help="backbone name or model folder")
    parser.add_argument("--num-frames", type=int, default=8, help="frames per clip, for a backbone (default: 8)")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args(argv)
    from img2vid.inspection import inspect

    facts = inspect(options.source, num_frames=options.num_frames)
    print(json.dumps(facts.to_dict(), indent=2) if options.json else facts)
    return 0


def certify_main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="img2vid certify", description=COMMANDS["certify"][1])
    parser.add_argument("folder", help="model folder written by img2vid.convert or save_pretrained")
    parser.add_argument("--num-frames", type=int, nargs="+", metavar="T", help="numbers of frames to try")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    options = parser.parse_args(argv)
    from img2vid.certificate import certify
    from img2vid.checkpoints.native import load, load_reference

    model = load(options.folder)
    certificate = certify(model, load_reference(model), num_frames=options.num_frames)
    print(certificate.to_json() if options.json else certificate)
    return 0 if certificate.ok else 1


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "convert": (convert_main, "turn an image transformer into a video transformer, with proof"),
    "inspect": (inspect_main, "show what is inside a backbone or a saved model, and what is guaranteed"),
    "certify": (certify_main, "compare a saved model with its image model again"),
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="img2vid",
        description="Pretrained image transformers become video transformers, provably the same function at step 0.",
        epilog="commands:\n" + "\n".join(f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"img2vid {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="see below; each has its own --help")
    options = parser.parse_args(argv[:1])
    try:
        return COMMANDS[options.command][0](argv[1:])
    except Img2VidError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
