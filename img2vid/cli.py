"""The ``img2vid`` command: one word a verb, each a module of ``img2vid.commands`` that is imported when it is said."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from img2vid._version import __version__
from img2vid.command import run_command
from img2vid.errors import Img2VidError, nearest

# word -> (its module, what it does), or (words of its own, what they are for)
COMMANDS: dict[str, tuple] = {
    "demo": ("img2vid.commands.demo", "see the whole idea: convert, prove, train on moving digits, evaluate, a page"),
    "convert": ("img2vid.convert", "turn an image transformer into a video transformer, with proof"),
    "graft": ("img2vid.commands.graft", "add LoRA, adapters and other insertions to a model, or fold them in"),
    "grow": ("img2vid.commands.grow", "make a model deeper or wider; it stays the same function"),
    "inspect": ("img2vid.commands.inspect", "show what is inside a backbone or a saved model, and what is guaranteed"),
    "certify": ("img2vid.commands.certify", "compare a saved model with its image model again"),
    "import": (
        "img2vid.commands.importing",
        "take in a published video checkpoint: TimeSformer, LaViLa, ViViT, ...",
    ),
    "export": (
        "img2vid.commands.exporting",
        "write a model as other libraries read it, or give back its image model",
    ),
    "interpolate": ("img2vid.commands.interpolate", "go back towards the image model, or average models"),
    "stitch": ("img2vid.commands.stitch", "one image model of layers of several, with bridges fitted on videos"),
    "merge": ("img2vid.commands.merge", "one model of several alike, in weight space: linear, SLERP, task arithmetic"),
    "train": ("img2vid.commands.train", "continue pretraining on video (fit, validate or test; fit if none is named)"),
    "consolidate": ("img2vid.commands.consolidate", "write the model inside a training checkpoint as a folder"),
    "estimate": ("img2vid.commands.estimate", "what training will cost: parameters, FLOPs, memory, GPU-hours"),
    "data": (
        {
            "check": ("img2vid.data.check", "find what is wrong with a list of videos, and name it"),
            "prepare": ("img2vid.data.prepare", "re-encode a list so that reading it is several times faster"),
            "synth": ("img2vid.data.synthetic", "write a set of moving digits as real video files"),
        },
        "check and prepare lists of videos, write synthetic ones",
    ),
    "eval": (
        {
            "zero-shot": ("img2vid.commands.zero_shot", "name what happens in videos by words, and what time added"),
            "retrieval": ("img2vid.commands.retrieval", "find videos by captions, and captions by videos"),
            "probe": ("img2vid.commands.probe", "ask frozen features with linear, k-NN and attentive probes"),
            "honesty": ("img2vid.commands.honesty", "find out whether the order of frames matters to a model at all"),
        },
        "measure a model on videos, and what time added to it",
    ),
    "caption": ("img2vid.commands.caption", "say in words what happens in videos, with a converted CoCa or BLIP"),
    "stream": ("img2vid.commands.stream", "watch a video or a camera with a causal model, and print running scores"),
    "plot": ("img2vid.commands.plot", "draw and compare results, and what a model looks at"),
    "doctor": ("img2vid.commands.doctor", "what is installed, whether it works here, and what installs the rest"),
    "completion": ("img2vid.commands.completion", "completion of commands and options, for your shell"),
}
DESCRIPTION = "Pretrained image transformers become video transformers, provably the same function at step 0."


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: dispatch(argv))


def dispatch(argv: list[str], prog: str = "img2vid", commands: dict = COMMANDS, about: str = DESCRIPTION) -> int:
    """Find the module that the first words name, and give it the others."""
    parser = word_parser(prog, about, commands)
    if prog == "img2vid":
        parser.add_argument("--version", action="version", version=f"img2vid {__version__}")
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    if not argv[0].startswith("-") and argv[0] not in commands:
        meant = nearest(argv[0], commands)
        raise Img2VidError(f"There is no command {prog} {argv[0]}.{meant} {prog} --help lists all of them.")
    word = parser.parse_args(argv[:1]).command
    module, about = commands[word]
    if isinstance(module, dict):
        return dispatch(argv[1:], f"{prog} {word}", module, about)
    return importlib.import_module(module).main(argv[1:])


def word_parser(prog: str, description: str, commands: dict[str, tuple]) -> argparse.ArgumentParser:
    """A parser of one word, whose help lists what the word can be."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="commands:\n" + "\n".join(f"  {name:<11} {what}" for name, (_, what) in commands.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, metavar="command", help="see below; each has its own --help")
    return parser


if __name__ == "__main__":
    sys.exit(main())
