"""Each way of training that configurations may ask for, end to end through the trainer."""

import lightning.pytorch as pl
import pytest
import torch

import img2vid
from img2vid.cli import main
from img2vid.data.lists import read_list
from img2vid.data.shards import write_shards
from img2vid.objectives import (
    Classification,
    Contrastive,
    Distillation,
    InterpolatedWeights,
    KeepAnswers,
    WeightedSum,
)
from img2vid.temporal.block import SpaceTimeBlock
from img2vid.training import Tuning
from tests.training_run import ROOT, Losses, fit, training


def train(motion_set, tmp_path, objective=None, how=None, data=None, callbacks=(), model=None, **trainer):
    """The losses, the module, and the model that was saved."""
    seen = Losses()
    module = training(objective, how, save_to=str(tmp_path / "model"), **(model or {}))
    fit(module, motion_set, [seen, *callbacks], data, default_root_dir=tmp_path, **trainer)
    return seen.seen, module, img2vid.load(tmp_path / "model")


def moved(module, model):
    state = model.state_dict()
    return {name for name, start in module.beginning.items() if not torch.equal(start, state[name])}


def test_sgd_with_steps_moves_each_group_by_its_rate(motion_set, tmp_path):
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})

    how = Tuning(optimizer="sgd", momentum=0.0, lr=1e-3, warmup=0, schedule="step", milestones=[1, 2], factors=[0.1, 5])
    how.weight_decay = 0.0
    _, module, model = train(motion_set, tmp_path, how=how, callbacks=[Rates()])
    assert isinstance(module.trainer.optimizers[0], torch.optim.SGD)
    for name, factor in (("pretrained", 1), ("copied", 5), ("new/no_decay", 10), ("text/pretrained", 1)):
        assert [step[name] for step in rates] == pytest.approx([1e-3 * factor * f for f in (1, 0.1, 0.5)])
    assert any("temporal_fc" in name for name in moved(module, model))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lower_precision_trains_with_every_objective(motion_set, tmp_path, precision):
    parts = {
        "classes": Classification("text", train_text=True),
        "pairs": Contrastive(),
        "image": Distillation(1.0, tokens=1.0, mask_ratio=0.5),
        "answers": KeepAnswers(["zero", "one"]),
    }
    losses, module, model = train(motion_set, tmp_path, InterpolatedWeights(WeightedSum(parts)), precision=precision)
    full, _, _ = train(motion_set, tmp_path, InterpolatedWeights(WeightedSum(parts)))
    assert losses != full and losses == pytest.approx(full, rel=0.05)
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in model.parameters()} == {expected}
    assert any("temporal_fc" in name for name in moved(module, model))


def test_fp16_on_a_cpu_is_refused_rather_than_exchanged(motion_set, tmp_path, capsys):
    given = [f"--data.{split}_list={motion_set}/{split}.csv" for split in ("train", "val", "test")]
    smoke = [f"--config={ROOT}/configs/train/smoke.yaml", f"--trainer.default_root_dir={tmp_path}"]
    assert main(["train", *smoke, *given, "--trainer.precision=16-mixed"]) == 2
    assert "16-mixed needs a GPU" in capsys.readouterr().err


def test_checkpointing_runs_temporal_branches_twice_and_changes_nothing(motion_set, tmp_path):
    plain, _, expected = train(motion_set, tmp_path / "plain")
    calls = []
    module = training(save_to=str(tmp_path / "model"), grad_checkpointing=True)
    for part in module.modules():
        if isinstance(part, SpaceTimeBlock):  # its norm: hooks of what is folded would have it run unfolded
            part.temporal_norm1.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    seen = Losses()
    fit(module, motion_set, [seen], default_root_dir=tmp_path, limit_val_batches=0)
    assert len(calls) == 3 * 4 * 2  # steps, layers, and again in backward
    assert seen.seen == plain
    state = img2vid.load(tmp_path / "model").state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.state_dict().items())


@pytest.mark.slow
def test_compiled_blocks_train_as_plain_ones(motion_set, tmp_path):
    plain, _, expected = train(motion_set, tmp_path / "plain")
    options = dict(model=dict(compile=True), log_every_n_steps=3)  # time is watched in the last step
    compiled, module, model = train(motion_set, tmp_path / "compiled", **options)
    ratios = [value for name, value in module.trainer.callback_metrics.items() if name.startswith("branch/")]
    assert len(ratios) == 4 and min(ratios) > 0
    assert all(block._compiled_call_impl is not None for _, block in module.tower.blocks)
    assert compiled == pytest.approx(plain, abs=1e-4)
    assert model.state_dict().keys() == expected.state_dict().keys()


def test_early_stopping_ends_training_and_still_saves(motion_set, tmp_path):
    stop = pl.callbacks.EarlyStopping("val/accuracy", mode="max", patience=1, min_delta=1.0)
    losses, module, model = train(motion_set, tmp_path, callbacks=[stop], max_epochs=9)
    assert len(losses) == 2 * 3 and module.trainer.current_epoch < 9
    assert moved(module, model)


def test_gradual_unfreezing_lets_layers_join(motion_set, tmp_path):
    class Moved(pl.Callback):
        def __init__(self):
            self.after = []

        def on_train_epoch_end(self, trainer, module):
            names = moved(module, module.model)
            self.after.append({name for name in names if module.model.origin(name) == "pretrained"})

    watch = Moved()
    how = Tuning(lr=1e-3, warmup=0, unfreeze={1: 2, 2: "all"})
    train(motion_set, tmp_path, Classification("text"), how, callbacks=[watch], max_epochs=3)
    first, second, third = watch.after
    assert first == set()
    assert any("resblocks.3." in name for name in second) and not any("resblocks.2." in name for name in second)
    assert any("resblocks.0." in name for name in third)


def test_penalties_and_gradient_clipping(motion_set, tmp_path):
    norms = []

    class Norms(pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            grads = [p.grad.norm() for p in module.parameters() if p.grad is not None]
            norms.extend([torch.stack(grads).norm().item()] if grads else [])

    how = Tuning(lr=1e-3, warmup=0, l1=1e-4, l2=1e-3)
    plain, _, _ = train(motion_set, tmp_path)
    with_penalty, _, _ = train(motion_set, tmp_path, how=how, callbacks=[Norms()], gradient_clip_val=0.01)
    assert with_penalty[0] > plain[0]
    assert norms and max(norms) == pytest.approx(0.01, rel=1e-3)


def test_a_linear_head_learns_mixed_clips_with_layer_decay(motion_set, tmp_path):
    from img2vid.config import VideoConfig
    from img2vid.training import VideoTraining

    objective = Classification("linear", label_smoothing=0.1)
    how = Tuning(lr=1e-3, warmup=0, layer_decay=0.75, freeze="first:2")
    video = VideoConfig("nano_clip", num_frames=2, num_classes=8)
    module = VideoTraining(video, objective, how, save_to=str(tmp_path / "model"))
    data = dict(mixup_alpha=0.8, cutmix_alpha=1.0, erase=0.25, rand_augment=(1, 5))
    fit(module, motion_set, data=data, default_root_dir=tmp_path)
    changed = moved(module, img2vid.load(tmp_path / "model"))
    assert "classifier.weight" in changed and not any(".resblocks.1.mlp" in name for name in changed)


@pytest.fixture(scope="module")
def shards(motion_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(read_list(motion_set / "train.csv").rows, folder, videos_per_shard=6)
    return folder


def test_shards_feed_training_and_resume_exactly(motion_set, shards, tmp_path):
    options = dict(train_list=None, train_shards=[f"{shards}/*.tar"], samples_per_epoch=24, val_list=None)
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    objective = lambda: WeightedSum({"pairs": Contrastive(), "image": Distillation(0.5, mask_ratio=0.5)})  # noqa: E731
    given = dict(data=options, max_epochs=2, enable_checkpointing=True)
    whole, _, expected = train(motion_set, tmp_path, objective(), callbacks=[keep], **given)
    assert len(whole) == 6 and whole[0] != whole[3]
    for step in (2, 4):
        saved = tmp_path / "saved" / f"step={step}.ckpt"
        rest, _, model = train(motion_set, tmp_path, objective(), callbacks=[keep], ckpt_path=saved, **given)
        assert rest == whole[step:]
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
