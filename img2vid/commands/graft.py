"""``img2vid graft``: put further insertions (LoRA, adapters, ...) on a saved model, or fold them into its weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from img2vid.command import Progress
from img2vid.config import ConfigError
from img2vid.options import add_certificate_options, add_graft_option, check_options

if TYPE_CHECKING:
    from img2vid.model import VideoModel
    from img2vid.two_towers import VideoTextModel


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2vid graft",
        description="Put grafts (LoRA, adapters, ...) on a saved model, take them off, or fold them into its weights.",
        epilog="example: img2vid graft runs/digits --graft lora rank=8 targets=[attn,mlp] --out runs/digits_lora",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="model folder; not needed with --list")
    parser.add_argument("--list", action="store_true", help="show the types there are, and exit")
    add_graft_option(parser)
    parser.add_argument("--adapter", metavar="FOLDER", help="a LoRA in peft's format to put on")
    parser.add_argument(
        "--fold",
        nargs="*",
        metavar="NAME",
        help="write grafts into the model's own weights, also what --adapter has put on (all)",
    )
    parser.add_argument("--remove", nargs="*", metavar="NAME", help="take grafts off (all)")
    parser.add_argument("--out", metavar="FOLDER", help="where to write the model")
    parser.add_argument("--adapter-out", metavar="FOLDER", help="write its LoRA in peft's format, alone")
    parser.add_argument("--adapter-name", metavar="NAME", help="of the LoRA put on (lora), or written, of several")
    parser.add_argument(
        "--adapter-out-proj",
        choices=("once", "twice"),
        help="how often the peft at the other end adds to the output projection of PyTorch's attention; up to 0.21.2, "
        "twice. Needed for adapters of such a projection",
    )
    add_certificate_options(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    given = make_parser().parse_args(argv)
    if given.list:
        from img2vid.reporting import print_grafts

        print_grafts()
        return 0
    grafts = getattr(given, "grafts", [])
    check(given, bool(grafts))
    from img2vid.certificate import certify
    from img2vid.checkpoints.native import check_replaceable, load, recorded_fingerprint, save
    from img2vid.grafts import fold, graft, read_grafts, remove
    from img2vid.grafts.grafting import num_parameters, tower_of
    from img2vid.grafts.peft import load_adapter, save_adapter
    from img2vid.reporting import certificate_table

    progress = Progress()
    read_grafts(grafts)  # what is wrong with them is told before anything is loaded
    if given.out is not None:
        check_replaceable(Path(given.out))
    with progress.stage(f"Loading {given.folder}"):
        model = load(given.folder)
    if given.remove is not None:
        remove(need_grafts(model), given.remove or None)
    if given.adapter is not None:
        load_adapter(model, given.adapter, given.adapter_name or "lora", given.adapter_out_proj)
    if given.fold is not None:  # an adapter just read, too
        fold(need_grafts(model), given.fold or None)
    if grafts:
        graft(model, grafts)
    for one in tower_of(model).grafts:
        count = num_parameters(tower_of(model), one.name)
        progress.say(f"{one.name}: {count:,} parameters. Kept of the function at the start: {one.guarantee().summary}.")
    if given.adapter_out is not None:
        save_adapter(model, given.adapter_out, given.adapter_name, given.adapter_out_proj)
        progress.say(
            f"Wrote {given.adapter_out}. Read it with PeftModel.from_pretrained(model, {given.adapter_out!r})."
        )
    if given.out is None:
        return 0
    with progress.stage("Certifying"):
        certificate = certify(model, num_frames=given.certify_frames, image_size=given.certify_size)
    certificate.weights_at_conversion = recorded_fingerprint(given.folder)
    progress.console.print(certificate_table(certificate))
    with progress.stage(f"Writing {given.out}"):
        save(model, given.out, certificate)
    progress.say(f"Wrote {given.out}. Load it with img2vid.load({given.out!r}).")
    return 0 if certificate.ok else 1


def need_grafts(model: VideoModel | VideoTextModel) -> VideoModel | VideoTextModel:
    from img2vid.grafts import GraftError
    from img2vid.grafts.grafting import tower_of

    if not tower_of(model).grafts:
        raise GraftError("This model has no grafts to fold or to take off.")
    return model


def check(given: argparse.Namespace, has_grafts: bool) -> None:
    check_options(vars(given))
    if given.folder is None:
        raise ConfigError("No model folder was given. What there is to graft: img2vid graft --list.")
    if given.out is None and given.adapter_out is None:
        raise ConfigError("Nowhere to write to: give --out FOLDER, or --adapter-out FOLDER for a LoRA alone.")
    changes = has_grafts or given.adapter is not None or given.fold is not None or given.remove is not None
    if given.out is not None and not changes:
        raise ConfigError(
            "Nothing to do: give --graft TYPE [OPTION=VALUE ...], --adapter FOLDER, --fold or --remove. The types: "
            "img2vid graft --list."
        )
