"""A run that is stopped and resumed is the run that was not: the same losses to the last bit, the same final model."""

import os
import signal
import subprocess
import time

import lightning.pytorch as pl
import pytest
import torch

import img2vid
from img2vid.training.stopping import Terminated
from tests.training_run import ROOT, command, environment, losses, run, start

KINDS = {
    "mixed and averaged": dict(batch_size=4, mixed=True, averaged=True),
    "accumulated": dict(batch_size=2, accumulate_grad_batches=2),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return dict(epochs=2, save_every=2) | KINDS[request.param]


@pytest.fixture(scope="module")
def whole(kind, motion_set, tmp_path_factory):
    """A run without a break."""
    out = tmp_path_factory.mktemp("whole")
    run(motion_set, out, **kind)
    return out


def same_model(folder, other):
    states = [img2vid.load(one / "model").state_dict() for one in (folder, other)]
    return all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def per_step(kind):
    return kind.get("accumulate_grad_batches", 1)


@pytest.mark.parametrize("step", [2, 8], ids=["first epoch", "second epoch"])
def test_resumed_in_an_epoch(kind, whole, motion_set, tmp_path, step):
    run(motion_set, tmp_path, ckpt_path=whole / "saved" / f"step={step}.ckpt", **kind)
    assert losses(tmp_path) == losses(whole)[step * per_step(kind) :]
    assert same_model(tmp_path, whole)


class Fail(pl.Callback):
    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == 3:
            raise RuntimeError("out of memory")


def test_an_error_leaves_a_checkpoint_that_loses_no_batch(kind, whole, motion_set, tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        run(motion_set, tmp_path / "first", callbacks=[Fail()], **kind)
    run(motion_set, tmp_path / "rest", ckpt_path=tmp_path / "first" / "on_exception.ckpt", **kind)
    assert losses(tmp_path / "rest") == losses(whole)[3 * per_step(kind) :]
    assert same_model(tmp_path / "rest", whole)


def test_sigterm_is_obeyed_between_two_steps(kind, whole, motion_set, tmp_path):
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated):
        run(motion_set, tmp_path / "first", stop_before=3, how="SIGTERM", **kind)
    assert signal.getsignal(signal.SIGTERM) is former
    done = len(losses(tmp_path / "first"))
    assert done % per_step(kind) == 0 and 3 * per_step(kind) <= done <= 4 * per_step(kind)
    run(motion_set, tmp_path / "rest", ckpt_path=tmp_path / "first" / "on_exception.ckpt", **kind)
    assert losses(tmp_path / "rest") == losses(whole)[done:]
    assert same_model(tmp_path / "rest", whole)


@pytest.mark.parametrize("averaged", [False, True])
def test_sigterm_in_validation_loses_nothing(motion_set, tmp_path, averaged):
    given = dict(epochs=2, batch_size=8, val=True, averaged=averaged)  # three steps, then two batches of validation
    run(motion_set, tmp_path / "whole", **given)
    with pytest.raises(Terminated):
        run(motion_set, tmp_path / "first", stop_before=3, stop_in_validation=True, how="SIGTERM", **given)
    run(motion_set, tmp_path / "rest", ckpt_path=tmp_path / "first" / "on_exception.ckpt", **given)
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")[3:]
    assert same_model(tmp_path / "rest", tmp_path / "whole")


def test_ctrl_c_leaves_a_checkpoint_too(motion_set, tmp_path, capsys):
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit):  # Lightning's end of a KeyboardInterrupt
            run(motion_set, tmp_path / "first", epochs=1, stop_before=2, how="SIGINT")
    finally:
        signal.signal(signal.SIGINT, former)
    assert "Ctrl-C again to stop at once" in capsys.readouterr().err
    done = len(losses(tmp_path / "first"))
    run(motion_set, tmp_path / "rest", epochs=1, ckpt_path=tmp_path / "first" / "on_exception.ckpt")
    assert done in (2, 3) and len(losses(tmp_path / "rest")) == 6 - done


def test_slurm_asks_for_its_job_to_be_queued_again(motion_set, tmp_path, monkeypatch):
    """SIGUSR1 comes some time before the job's end; the job that is queued again goes on by itself."""
    whole, first, rest = (tmp_path / name for name in ("whole", "first", "rest"))
    run(motion_set, whole, epochs=1)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked.txt\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    job = dict(NTASKS="1", NTASKS_PER_NODE="1", JOB_ID="7", JOB_NAME="train", PROCID="0", LOCALID="0", NODEID="0")
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    run(motion_set, first, epochs=1, stop_before=2, how="SIGUSR1")
    assert (tmp_path / "asked.txt").read_text() == "requeue 7\n"
    assert losses(first) == losses(whole)  # nothing ends the run but the scheduler
    rest.mkdir()
    (first / "hpc_ckpt_1.ckpt").rename(rest / "hpc_ckpt_1.ckpt")
    run(motion_set, rest, epochs=1)
    assert losses(rest) in (losses(whole)[2:], losses(whole)[3:])
    assert same_model(rest, whole)


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_in_an_epoch_and_resumed(motion_set, tmp_path, processes):
    given = dict(data=motion_set, batch_size=4 // processes, workers=2, devices=processes, mixed=True, averaged=True)
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
        assert same_model(tmp_path / f"rest-{step}", tmp_path / "whole")


@pytest.mark.multiprocess
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_sigterm_to_all_processes_ends_them_after_the_same_step(motion_set, tmp_path, strategy):
    """As torchrun and schedulers send it: to every process, data workers included, whatever each is doing."""
    given = dict(data=motion_set, batch_size=2, workers=1, devices=2, strategy=strategy, masked=False, save_every=1000)
    given["schedule"] = "constant"  # the same rates, however many epochs are planned
    out = tmp_path / "first"
    process = subprocess.Popen(
        command(given | dict(out=out, epochs=1000), 2),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (out / "losses-0.txt").exists() or len(losses(out)) < 5:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert "Stopped by Terminated" in said and (out / "on_exception.ckpt").exists(), said
    done = len(losses(out))
    assert len(losses(out, rank=1)) == done
    epochs = (done + 3) // 6 + 1
    for name, more in (("whole", {}), ("rest", dict(ckpt_path=out / "on_exception.ckpt"))):
        ended = start(given | dict(out=tmp_path / name, epochs=epochs) | more, 2)
        assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")[done:]
