"""Training as a whole: command line, configurations, what is left behind, what is frozen, and exact resumption."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

import img2vid
from img2vid.cli import main
from img2vid.config import ConfigError, VideoConfig
from img2vid.data.module import VideoData
from img2vid.data.synthetic import MotionSettings, make_motion_set
from img2vid.fit import TrainingCLI
from img2vid.objectives import Classification, Contrastive
from img2vid.training import TrainingError, Tuning, VideoTraining
from tests.training_run import run

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs" / "train").glob("*.yaml"))


@pytest.fixture(scope="module")
def motion_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("motion") / "set"
    return make_motion_set(folder, MotionSettings(train=24, val=16, test=8, size=32, num_frames=4))


def losses(folder, rank=0):
    lines = (Path(folder) / f"losses-{rank}.txt").read_text().split("\n")
    return [tuple(line.split()) for line in lines if line]


# The command line and its configurations


class ParseOnly(TrainingCLI):
    def instantiate_classes(self):
        pass

    def after_instantiate_classes(self):
        pass


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_parses_and_opens_with_its_promise(path):
    from lightning.pytorch.cli import LightningArgumentParser

    text = path.read_text()
    assert text.startswith("# Promise: ") and "# Run: " in text
    assert isinstance(yaml.safe_load(text), dict)
    cli = ParseOnly(VideoTraining, VideoData, args=["--config", str(path)], run=False)
    assert isinstance(cli.parser, LightningArgumentParser)
    assert cli.config.model.video.backbone is not None


def test_training_from_the_command_line(motion_set, tmp_path, capsys):
    out = tmp_path / "run"
    given = [f"--data.{split}_list={motion_set}/{split}.csv" for split in ("train", "val", "test")]
    smoke = f"--config={ROOT}/configs/train/smoke.yaml"
    options = [*given, f"--trainer.default_root_dir={out}", f"--model.save_to={tmp_path}/model"]
    assert main(["train", smoke, *options]) == 0
    model = img2vid.load(tmp_path / "model")
    gates = [p for name, p in model.named_parameters() if "temporal_fc.weight" in name]
    assert len(gates) == 4 and all(gate.abs().sum() > 0 for gate in gates)
    moved = json.loads((tmp_path / "model" / "moved.json").read_text())
    assert moved["steps"] == 3 and 0 < moved["layers"]["block_0/pretrained"]["relative"] < 0.1
    assert moved["features"]["order_before"] == 0.0 < moved["features"]["order_now"]
    assert 0.5 < moved["features"]["clips"] < 1.0
    assert moved["layers"]["block_0/new"]["relative"] is None and moved["layers"]["block_0/new"]["distance"] > 0
    logs = next(out.rglob("metrics.csv"))
    rows = list(csv.DictReader(logs.open()))
    logged = {name for row in rows for name, value in row.items() if value}
    assert {"loss", "lr", "clips_per_second", "data_wait", "val/accuracy"} <= logged
    assert {"gate/transformer.resblocks.0", "branch/transformer.resblocks.3"} <= logged, logged
    branch = [float(row["branch/transformer.resblocks.3"]) for row in rows if row["branch/transformer.resblocks.3"]]
    assert 0 < branch[-1] < 0.5
    checkpoint = next(out.rglob("*.ckpt"))
    capsys.readouterr()
    assert main(["train", "test", smoke, *options, f"--ckpt_path={checkpoint}"]) == 0
    assert "test/accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.train_list=/nowhere.csv"], "/nowhere.csv"),
        (["--model.how.freeze=everything"], "freeze_policy='everything'"),
        (["--model.video.backbone=vit_nano"], "vit_nano"),
        (["--model.video.num_classes=8"], "num_classes"),
    ],
)
def test_mistakes_end_with_one_sentence_and_exit_code_2(motion_set, tmp_path, capsys, options, words):
    given = [f"--data.{split}_list={motion_set}/{split}.csv" for split in ("train", "val", "test")]
    smoke = f"--config={ROOT}/configs/train/smoke.yaml"
    assert main(["train", smoke, *given, f"--trainer.default_root_dir={tmp_path}", *options]) == 2
    assert words in capsys.readouterr().err


def test_start_from_and_backbone_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="start_from has its own weights"):
        VideoTraining(VideoConfig("nano_clip"), Contrastive(), start_from=str(tmp_path))
    with pytest.raises(ConfigError, match="No backbone was given"):
        VideoTraining(VideoConfig(), Contrastive())


# What is trained, and what is not


def fit(module, folder, callbacks=(), **options):
    data = VideoData(
        f"{folder}/train.csv",
        f"{folder}/val.csv",
        num_frames=2,
        batch_size=8,
        num_workers=0,
        flip=False,
        spec=module.input_spec(),
    )
    quiet = dict(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    quiet |= dict(enable_checkpointing=False, num_sanity_val_steps=0, max_epochs=1, callbacks=list(callbacks))
    trainer = pl.Trainer(**{**quiet, **options})
    trainer.fit(module, datamodule=data)
    return trainer


def training(objective=None, how=None, **options):
    objective = objective or Classification("text", train_text=True)
    return VideoTraining(VideoConfig("nano_clip", num_frames=2), objective, how or Tuning(lr=1e-3, warmup=0), **options)


@pytest.mark.parametrize("averaged", [False, True], ids=["plain", "EMA"])
@pytest.mark.parametrize("policy", ["temporal_only", ["first:2", "text"]], ids=str)
def test_frozen_parameters_are_bitwise_unchanged(motion_set, tmp_path, policy, averaged):
    how = Tuning(lr=1e-2, warmup=0, freeze=policy, weight_decay=0.5)
    module = training(Classification("text"), how, save_to=str(tmp_path / "model"))
    frozen = {name for name, p in module.model.named_parameters() if not p.requires_grad}
    callbacks = [pl.callbacks.EMAWeightAveraging(decay=0.5)] if averaged else []
    fit(module, motion_set, callbacks, default_root_dir=tmp_path)
    saved = img2vid.load(tmp_path / "model").state_dict()
    changed = {name for name, start in module.beginning.items() if not torch.equal(start, saved[name])}
    assert frozen and not changed & frozen
    assert any("temporal_fc" in name for name in changed)


def test_each_group_has_its_rate_at_every_step(motion_set, tmp_path):
    seen = []

    class Rates(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})

    how = Tuning(lr=1e-4, multipliers={"copied": 3.0, "new": 7.0, "text": 2.0}, warmup=2, schedule="constant")
    fit(training(how=how, save_to=str(tmp_path / "m")), motion_set, [Rates()], default_root_dir=tmp_path)
    # after a step the scheduler has set the rate of the next one
    for rates, factor in zip(seen, (1.0, 1.0, 1.0), strict=True):
        assert rates["pretrained"] == pytest.approx(1e-4 * factor)
        assert rates["copied"] == pytest.approx(3e-4 * factor)
        assert rates["new/no_decay"] == pytest.approx(7e-4 * factor)
        assert rates["text/pretrained"] == pytest.approx(2e-4 * factor)


def test_gradual_unfreezing_holds_layers_back(motion_set, tmp_path):
    module = training(how=Tuning(lr=1e-3, warmup=0, unfreeze={5: "all"}), save_to=str(tmp_path / "model"))
    fit(module, motion_set, default_root_dir=tmp_path)
    state = module.model.state_dict()
    changed = {module.model.origin(n) for n, start in module.beginning.items() if not torch.equal(start, state[n])}
    assert changed == {"copied", "new"}


def test_losses_that_are_not_finite_stop_the_run_by_name(motion_set, tmp_path):
    module = training(save_to=str(tmp_path / "model"))

    class Break(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 1:
                batch["clip"][0] = float("nan")

    with pytest.raises(TrainingError, match=r"classification_loss is not finite at step 1 .*Rows of the training list"):
        fit(module, motion_set, [Break()], default_root_dir=tmp_path)
    assert (tmp_path / "on_exception.ckpt").exists() and not (tmp_path / "model").exists()


# Resumption


def test_a_run_resumed_in_an_epoch_has_the_losses_of_an_unbroken_one(motion_set, tmp_path):
    run(str(motion_set), str(tmp_path / "whole"), epochs=1, save_every=2)
    checkpoint = str(tmp_path / "whole" / "saved" / "step=2.ckpt")
    run(str(motion_set), str(tmp_path / "rest"), epochs=1, ckpt_path=checkpoint)
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")[2:]


def test_an_exception_leaves_a_checkpoint_that_loses_no_batch(motion_set, tmp_path):
    run(str(motion_set), str(tmp_path / "whole"), epochs=1)

    class Fail(pl.Callback):
        def on_before_optimizer_step(self, trainer, *_):
            if trainer.global_step == 3:
                raise RuntimeError("out of memory")

    import tests.training_run as script

    record = script.Record
    try:
        script.Record = lambda *given: WithFailure(record(*given), Fail())
        with pytest.raises(RuntimeError, match="out of memory"):
            run(str(motion_set), str(tmp_path / "first"), epochs=1)
    finally:
        script.Record = record
    run(str(motion_set), str(tmp_path / "rest"), epochs=1, ckpt_path=str(tmp_path / "first" / "on_exception.ckpt"))
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")[3:]


class WithFailure(pl.Callback):
    """Two callbacks as one."""

    def __init__(self, record, fail):
        self.on_train_batch_end, self.on_before_optimizer_step = (
            record.on_train_batch_end,
            fail.on_before_optimizer_step,
        )


def start(options, processes=1):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += [
        "-m",
        "tests.training_run",
        json.dumps({key: str(v) if isinstance(v, Path) else v for key, v in options.items()}),
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_in_an_epoch_and_resumed(motion_set, tmp_path, processes):
    given = dict(data=motion_set, batch_size=4 // processes, workers=2, devices=processes)
    given |= dict(strategy="ddp") if processes > 1 else {}
    whole = start(given | dict(out=tmp_path / "whole"), processes)
    assert whole.returncode == 0, whole.stderr
    killed = start(given | dict(out=tmp_path / "first", stop_before=10), processes)
    assert killed.returncode != 0
    for step in (3, 9):  # within the first epoch of six steps, and within the second
        checkpoint = tmp_path / "first" / "saved" / f"step={step}.ckpt"
        rest = start(given | dict(out=tmp_path / f"rest-{step}", ckpt_path=checkpoint), processes)
        assert rest.returncode == 0, rest.stderr
        for rank in range(processes):
            assert losses(tmp_path / f"rest-{step}", rank) == losses(tmp_path / "whole", rank)[step:]


@pytest.mark.multiprocess
def test_sigterm_leaves_a_checkpoint(motion_set, tmp_path):
    given = dict(data=motion_set, workers=1, epochs=1)
    assert start(given | dict(out=tmp_path / "whole")).returncode == 0
    stopped = start(given | dict(out=tmp_path / "first", stop_before=2, how="SIGTERM"))
    assert 0 < len(losses(tmp_path / "first")) < len(losses(tmp_path / "whole"))
    checkpoint = tmp_path / "first" / "on_exception.ckpt"
    assert checkpoint.exists(), stopped.stderr
    assert start(given | dict(out=tmp_path / "rest", ckpt_path=checkpoint)).returncode == 0
    done = len(losses(tmp_path / "first"))
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")[done:]


@pytest.mark.multiprocess
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_have_the_losses_of_one(motion_set, tmp_path, strategy):
    given = dict(data=motion_set, epochs=1, masked=False, save_every=100, val=True)
    one = start(given | dict(out=tmp_path / "one", batch_size=4))
    assert one.returncode == 0, one.stderr
    two = start(given | dict(out=tmp_path / "two", batch_size=2, devices=2, strategy=strategy), 2)
    assert two.returncode == 0, two.stderr
    alone = [float.fromhex(loss) for _, loss in losses(tmp_path / "one")]
    ranks = [[float.fromhex(loss) for _, loss in losses(tmp_path / "two", rank)] for rank in (0, 1)]
    together = [sum(pair) / 2 for pair in zip(*ranks, strict=True)]
    assert together == pytest.approx(alone, abs=1e-4)
    model = img2vid.load(tmp_path / "two" / "model")
    twin = img2vid.load(tmp_path / "one" / "model")
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if ours.ndim > 1:  # biases of keys have no gradient but rounding, which AdamW makes steps of
            assert torch.allclose(ours, theirs, atol=2e-4), name
