"""The data module under a real trainer: what a run sees, interrupted or not, on one process or two."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from img2vid.data import read_clip
from img2vid.data.check import named_rows
from img2vid.data.module import VideoData
from img2vid.data.shards import write_shards
from img2vid.data.transforms import Normalise, TestTransform
from tests.data.conftest import SPEC


class Recorder(pl.LightningModule):
    """Learns nothing much and writes down what it saw; can be made to fail at one batch."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight, self.seen, self.fail_at = nn.Parameter(torch.ones(1)), [], fail_at

    def training_step(self, batch, step):
        if self.fail_at is not None and len(self.seen) == self.fail_at:
            raise KeyboardInterrupt
        sums = batch["clip"].flatten(1).sum(1)
        self.seen.append([batch["epoch"].tolist(), batch["index"].tolist(), [round(v, 2) for v in sums.tolist()]])
        return (self.weight * sums.mean()).square() * 1e-9

    def validation_step(self, batch, step):
        self.seen.append(["val", batch["index"].tolist()])

    def test_step(self, batch, step):
        self.seen.append(["test", batch["index"].tolist(), tuple(batch["clip"].shape)])
        self.last = batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def data(folder, **options):
    given = dict(num_frames=2, batch_size=2, num_workers=2, timeout_seconds=100, spec=SPEC)
    return VideoData(str(folder), **{**given, **options})


def trainer(folder, **options):
    quiet = dict(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    return pl.Trainer(**quiet, default_root_dir=folder, **{"enable_checkpointing": False, **options})


@pytest.mark.parametrize("options", [{}, {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}], ids=["plain", "mixed"])
def test_a_run_stopped_in_an_epoch_sees_what_an_unbroken_run_sees(video_folder, tmp_path, options):
    unbroken = Recorder()
    trainer(tmp_path, max_epochs=3).fit(unbroken, datamodule=data(video_folder, **options))
    assert [batch[0] for batch in unbroken.seen] == [[epoch] * 2 for epoch in range(3) for _ in range(5)]
    for steps in (2, 5, 8):  # within epoch 0, at its end, within epoch 1
        first = Recorder()
        saver = pl.callbacks.ModelCheckpoint(tmp_path / str(steps), every_n_train_steps=steps, save_top_k=-1)
        run = trainer(tmp_path, max_steps=steps, callbacks=[saver], enable_checkpointing=True)
        run.fit(first, datamodule=data(video_folder, **options))
        checkpoint = next((tmp_path / str(steps)).glob("*.ckpt"))
        rest = Recorder()
        run = trainer(tmp_path, max_epochs=3)
        torch.manual_seed(steps)  # whatever was drawn before
        run.fit(rest, datamodule=data(video_folder, **options), ckpt_path=str(checkpoint), weights_only=True)
        assert first.seen + rest.seen == unbroken.seen, steps


def test_evaluation_batches(video_folder, tmp_path):
    module = Recorder()
    views = data(video_folder, val_list=str(video_folder), test_list=str(video_folder), num_clips=2, num_crops=3)
    trainer(tmp_path).test(module, datamodule=views)
    assert [batch[1] for batch in module.seen] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert all(batch[2] == (2, 6, 2, 3, 32, 32) for batch in module.seen)
    row = views.lists["test"].rows[9]
    frames = 26
    indices = [(2 * k + 1) * frames // 8 for k in range(4)]  # 2 frames x 2 clips: quarters, taken alternately
    clip = Normalise(SPEC)(TestTransform(SPEC, 3)(read_clip(row.path, indices[1::2])))
    assert torch.equal(module.last["clip"][1, 3:], clip)
    assert views.class_names == ("jump", "run") and module.last["label"].tolist() == [1, 1]


def test_mixing_happens_on_training_batches_only(video_folder, tmp_path):
    seen = []

    class Look(Recorder):
        def training_step(self, batch, step):
            seen.append(batch["soft_label"])
            return super().training_step(batch, step)

        def validation_step(self, batch, step):
            assert "soft_label" not in batch

    mixed = data(video_folder, val_list=str(video_folder), mixup_alpha=1.0)
    trainer(tmp_path, max_epochs=1).fit(Look(), datamodule=mixed)
    assert torch.cat(seen).shape == (10, 2) and torch.allclose(torch.cat(seen).sum(1), torch.ones(10))


def test_shards_feed_a_trainer(videos, tmp_path):
    write_shards(named_rows(videos, videos.rows), tmp_path / "s", 4)
    streamed = VideoData(
        train_shards=[f"{tmp_path}/s/*.tar"],
        samples_per_epoch=12,
        classes=["jump", "run"],
        spec=SPEC,
        num_frames=2,
        batch_size=2,
        num_workers=2,
    )

    class Count(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight, self.sums = nn.Parameter(torch.ones(1)), []

        def training_step(self, batch, step):
            self.sums.append(round(float(batch["clip"].sum()), 1))
            return self.weight.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    module = Count()
    trainer(tmp_path, max_epochs=2).fit(module, datamodule=streamed)
    assert len(module.sums) == 12 and module.sums[:6] != module.sums[6:]


def test_skipped_videos_are_reported(video_folder, tmp_path):
    lines = [f"{video_folder}/jump/v{i}.mp4 0" for i in (0, 2, 4, 6)] + [f"{tmp_path}/gone.mp4 1"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    skipping = data(tmp_path / "list.txt", on_bad_video="skip", max_bad_videos=0.2)
    trainer(tmp_path, max_epochs=2).fit(Recorder(), datamodule=skipping)
    assert [row.where for row in skipping.bad_rows()] == [f"{tmp_path}/list.txt row 5"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(train_shards=["a.tar"]), "not both"),
        (dict(batch_size=11), "do not fill one batch of 11"),
        (dict(spec=None), "does not know the input size"),
    ],
)
def test_wrong_arguments_teach(video_folder, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        given = {"spec": SPEC, "num_workers": 0, **options}
        trainer(tmp_path, max_epochs=1).fit(Recorder(), datamodule=VideoData(str(video_folder), **given))


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run_on_two_processes(folder, body: str) -> list:
    """Run `body` in two processes with `run(**options)`, a trainer; what each rank left in `seen`."""
    script = folder / "run.py"
    script.write_text(
        "def main():\n"  # workers import this file, and should not have to import all of Lightning
        "    import faulthandler, json\n"
        "    import lightning.pytorch as pl\n"
        "    from tests.data.test_module import Recorder, data\n"
        "    faulthandler.dump_traceback_later(200, exit=True)  # a hang says where it is\n"
        "    def run(**options):\n"
        "        quiet = dict(enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)\n"
        "        quiet |= dict(accelerator='cpu', devices=2, strategy='ddp', logger=False)\n"
        "        return pl.Trainer(**quiet, **options)\n"
        + indent(body, "    ")
        + f"\n    json.dump(module.seen, open({str(folder)!r} + '/rank%d.json' % trainer.global_rank, 'w'))\n"
        "    from img2vid.leaving import leave_processes\n"
        "    leave_processes()\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*TORCHRUN, str(script)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-9000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.multiprocess
def test_two_processes_stopped_in_an_epoch_see_what_an_unbroken_run_sees(video_folder, tmp_path):
    """10 videos, batches of 2, 2 processes: 2 steps make an epoch; stopped in the first, and in the second."""
    ranks = run_on_two_processes(
        tmp_path,
        f"folder, out = {str(video_folder)!r}, {str(tmp_path)!r}\n"
        "trainer = None\n"
        "def fit(path=None, **options):\n"
        "    nonlocal trainer\n"
        "    trainer, module = run(default_root_dir=out, **options), Recorder()\n"
        "    videos, plain = data(folder, num_workers=1), path is not None or None\n"
        "    trainer.fit(module, datamodule=videos, ckpt_path=path, weights_only=plain)\n"
        "    return module.seen\n"
        "module = Recorder()\n"
        "module.seen = {'unbroken': fit(max_epochs=2, enable_checkpointing=False)}\n"
        "for steps in (1, 3):\n"
        "    saver = pl.callbacks.ModelCheckpoint(f'{out}/{steps}', filename='last', every_n_train_steps=steps)\n"
        "    module.seen[steps] = fit(max_steps=steps, callbacks=[saver])\n"
        "    module.seen[steps] += fit(f'{out}/{steps}/last.ckpt', max_epochs=2, enable_checkpointing=False)\n",
    )
    for seen in ranks:
        assert len(seen["unbroken"]) == 4
        assert seen["1"] == seen["unbroken"] and seen["3"] == seen["unbroken"]
    assert ranks[0]["unbroken"] != ranks[1]["unbroken"]


@pytest.mark.multiprocess
def test_two_processes_share_epochs_and_evaluation(video_folder, tmp_path):
    ranks = run_on_two_processes(
        tmp_path,
        "trainer, module = run(max_epochs=2, enable_checkpointing=False), Recorder()\n"
        f"trainer.fit(module, datamodule=data({str(video_folder)!r}, num_workers=1, val_list={str(video_folder)!r}))",
    )
    for epoch in range(2):
        shares = [[i for b in rank if b[0] == [epoch] * 2 for i in b[1]] for rank in ranks]
        assert len(shares[0]) == len(shares[1]) == 4 and not set(shares[0]) & set(shares[1])
    validated = [[i for b in rank if b[0] == "val" for i in b[1]] for rank in ranks]
    assert sorted(validated[0] + validated[1]) == sorted(list(range(10)) * 2)


def test_the_command_line_and_yaml_can_build_it(tmp_path):
    """Every argument has a type a parser understands, and a checkpointed module holds plain values only."""
    from jsonargparse import ArgumentParser

    config = tmp_path / "data.yaml"
    config.write_text(
        "data:\n  train_list: t.csv\n  num_frames: 4\n  rand_augment: [2, 9]\n  scale: [0.5, 1.0]\n"
        "  spec: {size: 32, mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2], interpolation: bilinear}\n"
    )
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(VideoData, "data")
    module = parser.instantiate_classes(parser.parse_args(["--config", str(config)])).data
    assert (module.hparams.num_frames, module.spec.size, module.spec.interpolation) == (4, 32, "bilinear")
    torch.save(dict(module.hparams), tmp_path / "h.pt")
    assert torch.load(tmp_path / "h.pt", weights_only=True)["spec"]["size"] == 32
