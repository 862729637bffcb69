"""`img2vid train` and `python train/fit.py`: Lightning's command line over img2vid.training and img2vid.data."""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from img2vid.data.lists import read_list
from img2vid.data.module import VideoData
from img2vid.errors import Img2VidError, nearest
from img2vid.leaving import leave_processes
from img2vid.training import TrainingError, VideoTraining
from img2vid.training.callbacks import Bar, Lines


class Parser(LightningArgumentParser):
    """A mistake is one sentence, with the option that may have been meant; the usage of 300 options would hide it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # part of a parser of several: the whole will say it
            super().error(message, ex)
        unknown = re.search(r"does not accept option '([^']+)'|unrecognized arguments: -*([^\s=]+)", message)
        if unknown:
            message = f"{message}.{nearest(unknown[1] or unknown[2], option_names(self), 3)}"
            message += " img2vid train fit --help lists all options."
        elif "required" in message and "model.objective" in message:
            message += ". Give a recipe: --config configs/train/smoke.yaml takes seconds, train/README.md lists others."
        print(f"error: {message}", file=sys.stderr)
        self.exit(2)


def option_names(parser: argparse.ArgumentParser) -> set[str]:
    """All options of a parser and of its subcommands, without dashes."""
    names = {option.lstrip("-") for option in parser._option_string_actions}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            names |= set().union(*map(option_names, action._name_parser_map.values()))
    return names


class TrainingCLI(LightningCLI):
    """The model tells the data what its clips must look like; checkpoints change nothing that was asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, parser_class=Parser, **kwargs)

    def before_instantiate_classes(self) -> None:
        """A linear head without ``num_classes`` gets as many as the training list has."""
        model, data = self._get(self.config, "model"), self._get(self.config, "data")
        objective = self._get(self.config, "model.objective")
        is_linear = objective.class_path.endswith(".Classification") and objective.init_args.get("head") == "linear"
        if is_linear and model.video.num_classes is None and model.start_from is None and data.train_list is not None:
            videos = read_list(data.train_list, data.format, data.root, data.classes, subset="train")
            model.video.num_classes = len(videos.class_names or ()) or None

    def after_instantiate_classes(self) -> None:
        self.datamodule.spec = self.datamodule.spec or self.model.input_spec()
        given = self.config if self.subcommand is None else self.config[self.subcommand]
        self.model.settings = self._parser(self.subcommand).dump(given, skip_none=False)

    def instantiate_trainer(self, **given: Any) -> pl.Trainer:
        asked = self._get(self.config_init, "trainer", default={})
        if asked.get("logger") in (None, True):  # the CSV for you, TensorBoard for its curves
            folder = asked.get("default_root_dir") or "runs/train"
            csv = CSVLogger(folder, name=None)
            given["logger"] = [csv, TensorBoardLogger(folder, name=None, version=f"version_{csv.version}")]
        callbacks = asked.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if asked.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            given["callbacks"] = [*callbacks, Bar() if sys.stdout.isatty() else Lines()]
        trainer = super().instantiate_trainer(**given)
        check_precision(trainer, asked)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Lightning would let a checkpoint's hyper-parameters win over YAML and command line, without a word."""


def check_precision(trainer: pl.Trainer, asked: Mapping[str, Any]) -> None:
    """Lightning would train in bf16 instead, and the saved settings would say fp16."""
    if str(asked.get("precision")) in ("16", "16-mixed") and isinstance(trainer.accelerator, CPUAccelerator):
        raise TrainingError(
            f"trainer.precision={asked['precision']} needs a GPU: gradients of half precision cannot be scaled on a "
            "CPU. Use bf16-mixed, or 32-true."
        )


QUIET = (
    "LightningCLI's args parameter",  # ours are the command line's
    "Found .* in eval mode at the start of training",  # frozen parts are, on purpose (img2vid.tuning.eval_frozen)
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # between lightning and torch
    "The dirpath has changed",  # each run has a folder of its own
    "Total length of `list` across ranks is zero",  # no list to validate on
    "Checkpoint directory .* exists and is not empty",  # a run that goes on in its folder
)


def speak_once() -> None:
    """One handler for what Lightning logs, and the message alone.

    Libraries give the root logger a handler by merely logging, and by whether one has done so when Lightning is first
    imported, Lightning makes one handler or two: each line would come twice.
    """
    loggers = {name: logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")}
    for name, logger in loggers.items():
        for handler in [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]:
            logger.removeHandler(handler)
        logger.propagate = name != "lightning"
    loggers["lightning"].addHandler(logging.StreamHandler())


def main(argv: Sequence[str]) -> int:
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    advertised = "lightning.pytorch.utilities.rank_zero"
    logging.getLogger(advertised).addFilter(lambda record: not record.getMessage().startswith("💡 Tip:"))
    speak_once()
    overwrite = {"overwrite": True}  # the configuration of the last run in this folder, as its logs and checkpoints
    try:
        TrainingCLI(
            VideoTraining,
            VideoData,
            args=list(argv),
            seed_everything_default=0,
            save_config_kwargs=overwrite,
            trainer_defaults={"enable_model_summary": False},  # ParameterSummary says more
            load_from_checkpoint_support=False,
        )
    except SIGTERMException:  # Lightning's would leave with 0, as if training were over
        return 128 + signal.SIGTERM
    except (Img2VidError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    leave_processes()
    return 0
