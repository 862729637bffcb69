"""The ``img2vid`` command: one sub-command a verb, each importing what it needs only when it runs."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence

from img2vid._version import __version__
from img2vid.command import run_command
from img2vid.errors import Img2VidError


def convert_main(argv: Sequence[str]) -> int:
    from img2vid.convert import convert_command

    return convert_command(argv)


def inspect_main(argv: Sequence[str]) -> int:
    from img2vid.options import add_settings, option_groups

    parser = argparse.ArgumentParser(
        prog="img2vid inspect",
        usage="%(prog)s SOURCE [options]",
        description=COMMANDS["inspect"][1],
        epilog="With a folder, the options show what its model would be with other settings.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="backbone name or model folder")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    add_settings(option_groups(parser))
    settings = vars(parser.parse_args(argv))
    source, as_json = settings.pop("source"), settings.pop("json")
    from img2vid.inspection import inspect

    facts = inspect(source, **settings)
    print(json.dumps(facts.to_dict(), indent=2) if as_json else facts)
    return 0


def certify_main(argv: Sequence[str]) -> int:
    from img2vid.options import add_certificate_options, check_options

    parser = argparse.ArgumentParser(prog="img2vid certify", description=COMMANDS["certify"][1], allow_abbrev=False)
    parser.add_argument("folder", help="model folder written by img2vid.convert or save_pretrained")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    add_certificate_options(parser)
    options = parser.parse_args(argv)
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


def import_main(argv: Sequence[str]) -> int:
    from img2vid.checkpoints.importing import main

    return main(argv)


def export_main(argv: Sequence[str]) -> int:
    from img2vid.checkpoints.exporting import main

    return main(argv)


def interpolate_main(argv: Sequence[str]) -> int:
    from img2vid.interpolation import main

    return main(argv)


def estimate_main(argv: Sequence[str]) -> int:
    from img2vid.estimate import main

    return main(argv)


DATA = {
    "check": ("img2vid.data.check", "find what is wrong with a list of videos, and name it"),
    "prepare": ("img2vid.data.prepare", "re-encode a list so that reading it is several times faster"),
    "synth": ("img2vid.data.synthetic", "write a set of moving digits as real video files"),
}


def data_main(argv: Sequence[str]) -> int:
    parser = command_parser("img2vid data", COMMANDS["data"][1], {name: what for name, (_, what) in DATA.items()})
    options = parser.parse_args(argv[:1])
    return importlib.import_module(DATA[options.command][0]).main(list(argv[1:]))


EVAL = {
    "zero-shot": ("img2vid.evaluation.zero_shot", "name what happens in videos by words, and say what time added"),
    "retrieval": ("img2vid.evaluation.retrieval", "find videos by captions, and captions by videos"),
    "probe": ("img2vid.evaluation.probe", "ask frozen features with linear, k-NN and attentive probes"),
    "honesty": ("img2vid.evaluation.honesty", "find out whether the order of frames matters to a model at all"),
}


def eval_main(argv: Sequence[str]) -> int:
    parser = command_parser("img2vid eval", COMMANDS["eval"][1], {name: what for name, (_, what) in EVAL.items()})
    options = parser.parse_args(argv[:1])
    return importlib.import_module(EVAL[options.command][0]).main(list(argv[1:]))


def plot_main(argv: Sequence[str]) -> int:
    from img2vid.evaluation.report import main

    return main(argv)


def command_parser(prog: str, description: str, commands: dict[str, str]) -> argparse.ArgumentParser:
    """A parser of one word, whose help lists what the word can be."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="commands:\n" + "\n".join(f"  {name:<11} {what}" for name, what in commands.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, metavar="command", help="see below; each has its own --help")
    return parser


def train_main(argv: Sequence[str]) -> int:
    try:
        from img2vid.fit import main
    except ModuleNotFoundError as error:
        if error.name not in ("lightning", "torchmetrics"):
            raise
        raise Img2VidError(f"Training needs {error.name}: pip install 'img2vid[train]'.") from error
    subcommand = [] if argv and not argv[0].startswith("-") else ["fit"]
    return main([*subcommand, *argv])


def demo_main(argv: Sequence[str]) -> int:
    from img2vid.demo.story import main

    return main(argv)


def doctor_main(argv: Sequence[str]) -> int:
    from img2vid.doctor import main

    return main(argv)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "demo": (demo_main, "see the whole idea: convert, prove, train on moving digits, evaluate, a page of pictures"),
    "convert": (convert_main, "turn an image transformer into a video transformer, with proof"),
    "inspect": (inspect_main, "show what is inside a backbone or a saved model, and what is guaranteed"),
    "certify": (certify_main, "compare a saved model with its image model again"),
    "import": (import_main, "take in a published video checkpoint: TimeSformer, Frozen in Time, LaViLa, ViViT"),
    "export": (export_main, "write a model as other libraries read it, or give back its image model"),
    "interpolate": (interpolate_main, "go back towards the image model, or average models, in weight space"),
    "train": (train_main, "continue pretraining on video (fit, validate or test; fit if none is named)"),
    "estimate": (estimate_main, "what training will cost: parameters, FLOPs, memory, GPU-hours"),
    "data": (data_main, "check and prepare lists of videos, write synthetic ones"),
    "eval": (eval_main, "measure a model on videos, and what time added to it"),
    "doctor": (doctor_main, "what is installed, whether it works here, and what installs the rest"),
    "plot": (plot_main, "draw and compare results, and what a model looks at"),
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: dispatch(argv))


def dispatch(argv: list[str]) -> int:
    description = "Pretrained image transformers become video transformers, provably the same function at step 0."
    parser = command_parser("img2vid", description, {name: what for name, (_, what) in COMMANDS.items()})
    parser.add_argument("--version", action="version", version=f"img2vid {__version__}")
    options = parser.parse_args(argv[:1])
    return COMMANDS[options.command][0](argv[1:])


if __name__ == "__main__":
    sys.exit(main())
