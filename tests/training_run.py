"""Small trainings for tests: in the test's own process (`fit`), or as a process of its own (`start`, `run`), which
writes a line ``step loss`` (the loss as exact hexadecimal) for each batch to OUT/losses-RANK.txt.
"""

import faulthandler
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from img2vid.config import VideoConfig
from img2vid.data.module import VideoData
from img2vid.leaving import leave_processes
from img2vid.objectives import BalanceExperts, Classification, Contrastive, Distillation, WeightedSum
from img2vid.training import Tuning, VideoTraining
from img2vid.training.averaging import MovingAverage

ROOT = Path(__file__).parents[1]
QUIET = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)


class Videos(VideoData):
    """Where a model takes more channels than RGB, they are how much each frame differs from the one before; where it
    takes vectors, they are some of the pixels."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        clip = batch["clip"]
        more = self.trainer.lightning_module.tower.in_channels - clip.shape[-3]
        if more:
            batch = {**batch, "clip": torch.cat([clip, (clip - clip.roll(1, -4))[..., :more, :, :]], dim=-3)}
        takes = self.trainer.lightning_module.model.takes_beside
        return {**batch, **{name: clip.flatten(1)[:, :length] for name, length in takes.items()}}


class Record(pl.Callback):
    """Writes losses down; sends the process a signal before a given step, or in the validation after it."""

    def __init__(self, out, stop_before=None, how=signal.SIGKILL, stop_in_validation=False):
        self.out, self.stop_before, self.how, self.in_validation = out, stop_before, how, stop_in_validation

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.stop_before and not self.in_validation:
            os.kill(os.getpid(), self.how)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        if trainer.global_step == self.stop_before and self.in_validation:
            os.kill(os.getpid(), self.how)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        with open(Path(self.out) / f"losses-{trainer.global_rank}.txt", "a") as file:
            file.write(f"{trainer.global_step} {outputs['loss'].double().item().hex()}\n")
        with open(Path(self.out) / f"logged-{trainer.global_rank}.txt", "a") as file:
            file.write(f"{trainer.callback_metrics['loss'].item()}\n")


def run(
    data,
    out,
    batch_size=4,
    workers=0,
    stop_before=None,
    stop_in_validation=False,
    how="SIGKILL",
    ckpt_path=None,
    strategy="auto",
    devices=1,
    epochs=2,
    masked=True,
    mixed=False,
    averaged=False,
    save_every=3,
    schedule="cosine",
    val=False,
    data_options=None,
    callbacks=(),
    grafts=(),
    balance=False,
    compiled=False,
    chunk_size=None,
    **trainer_options,
):
    """masked, mixed: draw random masks, and mix clips, which a resumed run must do again just so."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # what grafts draw at random is the same in every process
    Path(out).mkdir(parents=True, exist_ok=True)
    objectives = {} if mixed else {"pairs": Contrastive()}
    if masked:
        objectives["image"] = Distillation(0.5, tokens=0.5, mask_ratio=0.5)
    if mixed:
        objectives["classes"] = Classification("text")
    if balance:
        objectives["balance"] = BalanceExperts()
    how_tuned = Tuning(lr=1e-4, warmup=2, schedule=schedule, freeze="logit_scale")  # FSDP2 cannot train a scalar
    video = VideoConfig("nano_clip", num_frames=2, grafts=tuple(grafts))
    module = VideoTraining(video, WeightedSum(objectives), how_tuned, chunk_size=chunk_size, compile=compiled)
    videos = Videos(
        f"{data}/train.csv",
        (f"{data}/val.csv" if val is True else val) or None,
        num_frames=2,
        batch_size=batch_size,
        num_workers=workers,
        flip=False,
        spec=module.input_spec(),
        **(dict(mixup_alpha=0.8, cutmix_alpha=1.0) if mixed else {}),
        **(data_options or {}),
    )
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
    keep = pl.callbacks.ModelCheckpoint(f"{out}/saved", "{step}", every_n_train_steps=save_every, save_top_k=-1)
    record = Record(out, stop_before, getattr(signal, how), stop_in_validation)
    trainer = pl.Trainer(
        **QUIET,
        devices=devices,
        strategy=strategy,
        max_epochs=epochs,
        default_root_dir=out,
        num_sanity_val_steps=0,
        callbacks=[record, keep, *([MovingAverage(0.9)] if averaged else []), *callbacks],
        **trainer_options,
    )
    trainer.fit(module, datamodule=videos, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer, module


def losses(folder, rank=0):
    lines = (Path(folder) / f"losses-{rank}.txt").read_text().split("\n")
    return [tuple(line.split()) for line in lines if line]


def command(options, processes=1):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return [*start, "-m", "tests.training_run", json.dumps(plain)]


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def start(options, processes=1):
    given = dict(cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    return subprocess.run(command(options, processes), **given)


def training(objective=None, how=None, **options):
    objective = objective or Classification("text", train_text=True)
    return VideoTraining(VideoConfig("nano_clip", num_frames=2), objective, how or Tuning(lr=1e-3, warmup=0), **options)


def fit(module, folder, callbacks=(), data=None, ckpt_path=None, **options):
    """Train in this process: an epoch of three steps on 24 videos."""
    given = dict(train_list=f"{folder}/train.csv", val_list=f"{folder}/val.csv", num_frames=2, batch_size=8)
    videos = Videos(**{**given, "num_workers": 0, "flip": False, "spec": module.input_spec(), **(data or {})})
    few = dict(devices=1, enable_checkpointing=False, num_sanity_val_steps=0, max_epochs=1, callbacks=list(callbacks))
    trainer = pl.Trainer(**{**QUIET, **few, **options})
    trainer.fit(module, datamodule=videos, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


class Losses(pl.Callback):
    """The loss of each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())


if __name__ == "__main__":
    faulthandler.dump_traceback_later(250, exit=True)  # a hang says where it is
    run(**json.loads(sys.argv[1]))
    leave_processes()
