"""Several processes train as one does, wait for each other no longer than they must, and say no where they cannot."""

import csv
import math
import socket
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

import img2vid
from img2vid.config import ConfigError
from img2vid.consolidate import consolidate
from img2vid.training.averaging import MovingAverage, check_averaging
from tests.training_run import ROOT, command, environment, losses, run, start


def change_list(source: Path, target: Path, change) -> Path:
    """A copy of a list with absolute paths, its rows (dicts) changed."""
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["path"] = str(source.parent / row["path"])
    rows = change(rows)
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return target


def mean_losses(folder):
    ranks = [[float.fromhex(loss) for _, loss in losses(folder, rank)] for rank in (0, 1)]
    return [sum(pair) / 2 for pair in zip(*ranks, strict=True)]


GRAFTS = [
    {"type": "lora", "rank": 4, "targets": ["attn", "temporal_attn", "mlp"]},
    {"type": "adapter", "bottleneck": 8},
    "aim",
    {"type": "st_adapter", "bottleneck": 8},
    {"type": "prompt", "form": "gated"},
    {"type": "prompt", "name": "vpt", "num_tokens": 4},
]
# what brings towers, experts and inputs of its own
IN_TIME = {"backbone": "nano_clip", "attention": "divided_space_time"}
LARGER = [
    {"type": "fusion", "towers": ["nano_clip", IN_TIME], "train": True},
    {"type": "experts"},
    {"type": "control", "more": 1, "copies": 2},
    {"type": "channels", "more": 1},
]


@pytest.mark.multiprocess
@pytest.mark.parametrize("grafts", [[], GRAFTS, LARGER], ids=["plain", "grafted", "grafted larger"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_have_the_losses_of_one(motion_set, tmp_path, strategy, grafts):
    # 13 videos to validate on: one process has a batch more than the other
    uneven = change_list(motion_set / "val.csv", tmp_path / "val.csv", lambda rows: rows[:13])
    given = dict(
        data=motion_set, epochs=1, masked=False, save_every=100, val=uneven, gradient_clip_val=0.5, grafts=grafts
    )
    run(out=tmp_path / "one", batch_size=4, **given)
    two = start(given | dict(out=tmp_path / "two", batch_size=2, devices=2, strategy=strategy), 2)
    assert two.returncode == 0, two.stderr
    alone = [float.fromhex(loss) for _, loss in losses(tmp_path / "one")]
    together = mean_losses(tmp_path / "two")
    for rank in (0, 1):  # what is logged is the mean over processes, not the first one's own
        logged = [float(line) for line in (tmp_path / "two" / f"logged-{rank}.txt").read_text().split()]
        assert logged == pytest.approx(together, rel=1e-6)
    assert together[0] == pytest.approx(alone[0], abs=1e-5)
    assert together == pytest.approx(alone, abs=1e-4)
    model, twin = (img2vid.load(tmp_path / name / "model") for name in ("two", "one"))
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if ours.ndim > 1:  # biases of keys have no gradient but rounding, which AdamW makes steps of
            assert torch.allclose(ours, theirs, atol=2e-4), name


@pytest.mark.multiprocess
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_compiled_experts_and_towers_in_two_processes(motion_set, tmp_path, strategy):
    """Blocks by torch.compile, balance among experts, clips in chunks."""
    given = dict(data=motion_set, batch_size=4, epochs=1, masked=False, save_every=100, grafts=LARGER, balance=True)
    two = start(given | dict(out=tmp_path, devices=2, strategy=strategy, compiled=True, chunk_size=2), 2)
    assert two.returncode == 0, two.stderr
    together = mean_losses(tmp_path)
    assert len(together) == 3 and all(map(math.isfinite, together))
    torch.manual_seed(0)  # as in training_run
    fixed = img2vid.convert("nano_clip", num_frames=2, grafts=LARGER).state_dict()
    model = img2vid.load(tmp_path / "model")
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, fixed[name])}
    assert {name for name in moved if "router" in name} == {name for name in fixed if "router" in name}


@pytest.mark.multiprocess
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_corrupt_video_on_one_process_does_not_stall_the_others(motion_set, tmp_path, policy):
    def break_one(rows):
        broken = tmp_path / "broken.mp4"
        broken.write_bytes(Path(rows[5]["path"]).read_bytes()[:200])
        rows[5]["path"] = str(broken)
        return rows

    videos = change_list(motion_set / "train.csv", tmp_path / "train.csv", break_one)
    options = dict(on_bad_video=policy, max_bad_videos=0.1)
    given = dict(data=tmp_path, out=tmp_path / "out", batch_size=2, workers=1, devices=2, strategy="ddp", epochs=1)
    ended = start(given | dict(masked=False, data_options=options), 2)  # within its time, or it raises
    assert videos.exists() and "broken.mp4" in ended.stderr
    if policy == "skip":
        assert ended.returncode == 0, ended.stderr
        assert len(losses(tmp_path / "out", 0)) == len(losses(tmp_path / "out", 1)) == 6
    else:
        assert ended.returncode != 0 and "train.csv" in ended.stderr


def test_averages_of_sharded_models_are_refused():
    module = torch.nn.Linear(2, 2)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    quiet = dict(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer = pl.Trainer(strategy=strategy, callbacks=[MovingAverage()], **quiet)
    with pytest.raises(ConfigError, match=r"MovingAverage keeps a whole copy .*FSDP2.* interpolate --average"):
        check_averaging(trainer, module)


@pytest.mark.multiprocess
def test_sharded_training_refuses_what_it_cannot_do(motion_set, tmp_path):
    given = dict(data=motion_set, out=tmp_path, batch_size=2, devices=2, strategy="fsdp2", epochs=1)
    averaged = start(given | dict(averaged=True), 2)
    assert averaged.returncode != 0 and "keeps a whole copy of the model" in averaged.stderr
    scaled = start(given | dict(precision="16-mixed"), 2)
    assert scaled.returncode != 0 and "does not support" in scaled.stderr and "bf16-mixed" in scaled.stderr


@pytest.mark.multiprocess
def test_sharded_training_in_bf16_saves_whole_weights(motion_set, tmp_path):
    given = dict(data=motion_set, out=tmp_path, batch_size=2, devices=2, strategy="fsdp2", epochs=1)
    ended = start(given | dict(precision="bf16-true", save_every=6), 2)
    assert ended.returncode == 0, ended.stderr
    model = img2vid.load(tmp_path / "model")
    sharded = tmp_path / "saved" / "step=6.ckpt"
    assert sharded.is_dir()
    for name, weight in consolidate(sharded).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    assert next(model.parameters()).dtype == torch.bfloat16
    assert all(p.isfinite().all() for p in model.parameters())


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.multiprocess
def test_slurm_gives_the_same_run_as_torchrun(motion_set, tmp_path):
    """One task for each process, as srun starts them; no launcher."""
    given = dict(data=motion_set, batch_size=2, devices=2, strategy="ddp", epochs=1, masked=False)
    assert start(given | dict(out=tmp_path / "torchrun"), 2).returncode == 0
    of_job = dict(SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2", SLURM_JOB_ID="7", SLURM_JOB_NAME="train")
    of_job |= dict(SLURM_NODELIST="127.0.0.1", SLURM_NODEID="0", SLURM_NNODES="1", MASTER_ADDR="127.0.0.1")
    of_job["MASTER_PORT"] = str(free_port())
    tasks = [
        subprocess.Popen(
            command(given | dict(out=tmp_path / "slurm")),
            cwd=ROOT,
            env=environment(**of_job, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    for rank in (0, 1):
        assert losses(tmp_path / "slurm", rank) == losses(tmp_path / "torchrun", rank)


@pytest.mark.multiprocess
def test_plain_python_starts_the_other_processes_itself(motion_set, tmp_path):
    given = [f"--data.{split}_list={motion_set}/{split}.csv" for split in ("train", "val", "test")]
    ended = subprocess.run(
        [sys.executable, "train/fit.py", "fit", "--config=configs/train/smoke.yaml", *given]
        + [f"--trainer.default_root_dir={tmp_path}", "--trainer.devices=2", "--trainer.strategy=ddp"],
        cwd=ROOT,
        env={k: v for k, v in environment().items() if k not in ("MASTER_ADDR", "WORLD_SIZE")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert "All distributed processes registered. Starting with 2 processes" in ended.stderr
    assert img2vid.load(tmp_path / "version_0" / "model")
