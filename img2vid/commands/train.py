"""``img2vid train``: Lightning's command line, whose full help takes as long to load as Lightning does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def make_parser() -> argparse.ArgumentParser:
    """The most used options; every argument of model, data and trainer is one too."""
    parser = argparse.ArgumentParser(
        "img2vid train",
        description="Continue pretraining on video.",
        epilog="Every argument of the model, the data and Lightning's trainer is an option and a key of the YAML file: "
        "img2vid train fit --help lists all of them (some seconds), train/README.md explains.",
        allow_abbrev=False,
    )
    parser.add_argument("subcommand", nargs="?", default="fit", choices=SUBCOMMANDS, help="default: fit")
    parser.add_argument("--config", metavar="FILE", help="YAML, such as configs/train/smoke.yaml; several are merged")
    parser.add_argument("--ckpt_path", metavar="FILE", help="continue from this checkpoint, bit for bit")
    for option, what in OFTEN.items():
        parser.add_argument(f"--{option}", metavar=option.rpartition(".")[2].upper(), help=what)
    parser.add_argument("--print_config", action="store_true", help="show the whole configuration and stop")
    return parser


SUBCOMMANDS = ("fit", "validate", "test", "predict")
OFTEN = {
    "seed_everything": "of order, augmentation and dropout (default: 0)",
    "model.video.backbone": "alias, timm:NAME, open_clip:ARCH or nano_clip",
    "model.video.num_frames": "frames T of a clip",
    "model.start_from": "model folder to go on from, instead of a backbone",
    "model.how.lr": "learning rate of pretrained parameters",
    "model.save_to": "folder for the trained model",
    "data.train_list": "list of videos (docs/data.md)",
    "data.val_list": "list for validation",
    "data.batch_size": "clips on each process",
    "data.num_workers": "processes that read videos, for each process that trains",
    "trainer.max_epochs": "how long",
    "trainer.max_steps": "or so long",
    "trainer.devices": "GPUs or processes",
    "trainer.strategy": "ddp, or ModelParallelStrategy for FSDP2",
    "trainer.precision": "32-true, bf16-mixed, 16-mixed",
    "trainer.default_root_dir": "where logs and checkpoints go",
}


def main(argv: Sequence[str]) -> int:
    if list(argv) in (["--help"], ["-h"]):
        make_parser().parse_args(argv)  # prints and leaves
    from img2vid.training.fit import main

    subcommand = [] if argv and not argv[0].startswith("-") else ["fit"]
    return main([*subcommand, *argv])
