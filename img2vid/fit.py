"""`img2vid train` and `python train/fit.py`: Lightning's command line over img2vid.training and img2vid.data."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from img2vid.data.module import VideoData
from img2vid.errors import Img2VidError
from img2vid.training import VideoTraining


class TrainingCLI(LightningCLI):
    """The model tells the data what its clips must look like; checkpoints change nothing that was asked for."""

    def after_instantiate_classes(self) -> None:
        self.datamodule.spec = self.datamodule.spec or self.model.input_spec()

    def instantiate_trainer(self, **given: Any) -> pl.Trainer:
        trainer = self._get(self.config_init, "trainer", default={})
        if trainer.get("logger") in (None, True):  # the CSV for you, TensorBoard for its curves
            folder = trainer.get("default_root_dir") or "runs/train"
            csv = CSVLogger(folder, name=None)
            given["logger"] = [csv, TensorBoardLogger(folder, name=None, version=f"version_{csv.version}")]
        return super().instantiate_trainer(**given)

    def _parse_ckpt_path(self) -> None:
        """Lightning would let a checkpoint's hyper-parameters win over YAML and command line, without a word."""


def main(argv: Sequence[str]) -> int:
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # ours are the command line's
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
    return 0
