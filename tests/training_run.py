"""One small training run as a process of its own: ``python -m tests.training_run '{"data": ..., "out": ...}'``.

Writes a line ``step loss`` (the loss as exact hexadecimal) for each step to OUT/losses-RANK.txt.
"""

import json
import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from img2vid.config import VideoConfig
from img2vid.data.module import VideoData
from img2vid.objectives import Contrastive, Distillation, WeightedSum
from img2vid.training import Tuning, VideoTraining


class Record(pl.Callback):
    """Writes losses down; ends the process by a signal before a given step."""

    def __init__(self, out, stop_before=None, how=signal.SIGKILL):
        self.out, self.stop_before, self.how = out, stop_before, how

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.stop_before:
            os.kill(os.getpid(), self.how)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        with open(Path(self.out) / f"losses-{trainer.global_rank}.txt", "a") as file:
            file.write(f"{trainer.global_step} {outputs['loss'].double().item().hex()}\n")


def run(
    data,
    out,
    batch_size=4,
    workers=0,
    stop_before=None,
    how="SIGKILL",
    ckpt_path=None,
    strategy="auto",
    devices=1,
    epochs=2,
    masked=True,
    save_every=3,
    val=False,
):
    torch.set_num_threads(1)
    Path(out).mkdir(parents=True, exist_ok=True)
    objectives = {"pairs": Contrastive()}
    if masked:  # draws random masks, so a resumed run must draw the same ones
        objectives["image"] = Distillation(0.5, tokens=0.5, mask_ratio=0.5)
    how_tuned = Tuning(lr=1e-4, warmup=2, freeze="logit_scale")  # FSDP2 cannot train a scalar
    module = VideoTraining(VideoConfig("nano_clip", num_frames=2), WeightedSum(objectives), how_tuned)
    videos = VideoData(
        f"{data}/train.csv",
        f"{data}/val.csv" if val else None,
        num_frames=2,
        batch_size=batch_size,
        num_workers=workers,
        flip=False,
        spec=module.input_spec(),
    )
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=epochs,
        default_root_dir=out,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[
            Record(out, stop_before, getattr(signal, how)),
            pl.callbacks.ModelCheckpoint(f"{out}/saved", "{step}", every_n_train_steps=save_every, save_top_k=-1),
        ],
    )
    trainer.fit(module, datamodule=videos, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer, module


if __name__ == "__main__":
    run(**json.loads(sys.argv[1]))
