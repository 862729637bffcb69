"""Training as a whole: command line, configurations, what is left behind, and what is frozen."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml

import img2vid
from img2vid.cli import main
from img2vid.config import ConfigError, VideoConfig
from img2vid.consolidate import consolidate
from img2vid.data.errors import ListError
from img2vid.data.lists import read_list
from img2vid.data.module import VideoData
from img2vid.objectives import Classification, Contrastive
from img2vid.training import TrainingError, Tuning, VideoTraining
from img2vid.training.averaging import MovingAverage
from img2vid.training.fit import TrainingCLI
from tests.training_run import fit, training

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs" / "train").glob("*.yaml"))


# The command line and its configurations


class ParseOnly(TrainingCLI):
    def instantiate_classes(self):
        pass

    before_instantiate_classes = after_instantiate_classes = instantiate_classes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_parses_and_opens_with_its_promise(path):
    from lightning.pytorch.cli import LightningArgumentParser

    text = path.read_text()
    assert text.startswith("# Promise: ") and "# Run: " in text
    assert isinstance(yaml.safe_load(text), dict)
    cli = ParseOnly(VideoTraining, VideoData, args=["--config", str(path)], run=False)
    assert isinstance(cli.parser, LightningArgumentParser)
    assert cli.config.model.video.backbone is not None


class CountOnly(ParseOnly):
    def before_instantiate_classes(self):
        TrainingCLI.before_instantiate_classes(self)


def test_a_linear_head_counts_the_classes_of_the_list_and_no_other_head_does(motion_set, tmp_path, capsys):
    def classes(*options, config="folder"):
        given = [f"--config={ROOT}/configs/train/{config}.yaml", f"--data.train_list={motion_set}/train.csv", *options]
        return CountOnly(VideoTraining, VideoData, args=given, run=False).config.model.video.num_classes

    assert classes() == 8
    assert classes("--model.video.num_classes=9") == 9
    assert classes("--model.video.backbone=null", f"--model.start_from={tmp_path}") is None  # it has its own
    assert classes(config="smoke") is None
    (tmp_path / "names.txt").write_text("\n".join(["waiting", *read_list(motion_set / "train.csv").class_names]))
    assert classes(f"--data.classes={tmp_path}/names.txt") == 9
    folder = ["train", f"--config={ROOT}/configs/train/folder.yaml", f"--data.train_list={tmp_path}/gone"]
    assert main(folder) == 2 and f"{tmp_path}/gone: no such file or folder" in capsys.readouterr().err


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
    assert main(["consolidate", str(checkpoint), "--out", str(tmp_path / "whole")]) == 0
    whole = img2vid.load(tmp_path / "whole")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters(), strict=True))
    assert "image weights came from" in (tmp_path / "whole" / "README.md").read_text()
    for wrong, words in ((tmp_path / "none.ckpt", "no checkpoint"), (ROOT / "README.md", "cannot be read as")):
        assert main(["consolidate", str(wrong), "--out", str(tmp_path / "other")]) == 2
        assert words in capsys.readouterr().err
    capsys.readouterr()
    assert main(["train", "test", smoke, *options, f"--ckpt_path={checkpoint}"]) == 0
    assert "test/accuracy" in capsys.readouterr().out


def test_the_command_line_leaves_the_group_of_processes(motion_set, tmp_path):
    """gloo's threads abort some of the processes that end while they run, and torchrun calls the whole run failed."""
    given = [f"--data.{split}_list={motion_set}/{split}.csv" for split in ("train", "val", "test")]
    options = [*given, f"--trainer.default_root_dir={tmp_path}", "--trainer.strategy=ddp"]
    before = set(Path("/proc/self/task").iterdir())  # meshes of other tests keep groups of theirs
    assert main(["train", f"--config={ROOT}/configs/train/smoke.yaml", *options, f"--model.save_to={tmp_path}/m"]) == 0
    assert not torch.distributed.is_initialized()
    left = [(task / "comm").read_text() for task in set(Path("/proc/self/task").iterdir()) - before]
    assert not [name for name in left if "gloo" in name]


def test_a_checkpoint_overrides_neither_yaml_nor_command_line(motion_set, tmp_path, capsys):
    given = [f"--data.{split}_list={motion_set}/{split}.csv" for split in ("train", "val", "test")]
    smoke = [f"--config={ROOT}/configs/train/smoke.yaml", f"--trainer.default_root_dir={tmp_path}", *given]
    assert main(["train", *smoke, "--model.how.lr=1.0e-3", "--data.batch_size=4", "--data.seed=1"]) == 0
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["datamodule_hyper_parameters"]["batch_size"] == 4  # there is something that could override
    changed = ["--model.how.lr=2.0e-5", "--model.how.weight_decay=0.3", "--model.how.schedule=constant"]
    changed += ["--data.batch_size=12", "--data.seed=2", "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}"]
    module = cli_module(["fit", *smoke, *changed])
    assert module.trainer.global_step == 6 + 2 and module.trainer.datamodule.hparams.batch_size == 12
    groups = {group["name"]: group for group in module.trainer.optimizers[0].param_groups}
    assert groups["pretrained"]["lr"] == pytest.approx(2e-5) and groups["copied"]["lr"] == pytest.approx(1e-4)
    assert groups["pretrained"]["weight_decay"] == 0.3
    assert main(["train", *smoke, *changed, "--model.how.optimizer=sgd"]) == 2
    assert "The checkpoint was made by adamw" in capsys.readouterr().err


def cli_module(arguments):
    options = dict(seed_everything_default=0, load_from_checkpoint_support=False)
    options["save_config_kwargs"] = {"overwrite": True}
    return TrainingCLI(VideoTraining, VideoData, args=arguments, **options).model


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.video.numframes=4"], "Did you mean 'model.video.num_frames'"),
        (["--config=typo.yaml"], "does not accept option 'data.batchsize'. Did you mean 'data.batch_size'"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        ([], "Give a recipe: --config configs/train/smoke.yaml"),
    ],
    ids=["option", "key", "file", "nothing"],
)
def test_options_that_do_not_exist_are_answered_in_one_line(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    Path("typo.yaml").write_text("data: {batchsize: 4}\n")
    with pytest.raises(SystemExit) as left:
        main(["train", *options])
    assert left.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and words in said[0]


def test_start_from_and_backbone_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="start_from has its own weights"):
        VideoTraining(VideoConfig("nano_clip"), Contrastive(), start_from=str(tmp_path))
    with pytest.raises(ConfigError, match="No backbone was given"):
        VideoTraining(VideoConfig(), Contrastive())


# What is trained, and what is not


@pytest.mark.parametrize("averaged", [False, True], ids=["plain", "EMA"])
@pytest.mark.parametrize("policy", ["temporal_only", ["first:2", "text"]], ids=str)
def test_frozen_parameters_are_bitwise_unchanged(motion_set, tmp_path, policy, averaged):
    how = Tuning(lr=1e-2, warmup=0, freeze=policy, weight_decay=0.5)
    module = training(Classification("text"), how, save_to=str(tmp_path / "model"))
    frozen = {name for name, p in module.model.named_parameters() if not p.requires_grad}
    callbacks = [MovingAverage(decay=0.999)] if averaged else []
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


def test_testing_what_was_trained_does_not_begin_anew(motion_set, tmp_path):
    """Among what an objective does first is training the text tower for some steps."""
    objective = Classification("text", spread=0.5, spread_steps=2)
    module = training(objective, save_to=str(tmp_path / "model"))
    trainer = fit(module, motion_set, default_root_dir=tmp_path, data=dict(test_list=f"{motion_set}/test.csv"))
    trained = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    assert not torch.equal(trained["text_projection"], module.beginning["text_projection"])
    trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in module.model.state_dict().items())
    fresh = training(Classification("text", spread=0.5, spread_steps=2))
    trainer.validate(fresh, datamodule=trainer.datamodule, verbose=False)
    assert torch.equal(fresh.model.text_projection, fresh.beginning["text_projection"])


def test_a_test_of_another_checkpoint_asks_its_own_text_tower(motion_set, tmp_path):
    """Class embeddings of the last validation are not those of the checkpoint that is tested."""
    data = dict(test_list=f"{motion_set}/test.csv")
    scores = {}

    class Keep(pl.Callback):
        def on_test_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
            with torch.no_grad():
                scores[id(module)] = module.objective.predict(module.step_of(batch, batch["clip"].flatten(0, 1)))

    module = training(how=Tuning(lr=1e-2, warmup=0), save_to=str(tmp_path / "model"))
    trainer = fit(module, motion_set, [Keep()], default_root_dir=tmp_path, data=data)
    other = training()
    torch.save({"state_dict": other.state_dict(), "pytorch-lightning_version": pl.__version__}, tmp_path / "other.ckpt")
    for one in (module, other):
        trainer.test(one, datamodule=trainer.datamodule, ckpt_path=str(tmp_path / "other.ckpt"), verbose=False)
    assert torch.equal(scores[id(module)], scores[id(other)])


@pytest.mark.parametrize("rank", [0, 1])
def test_fewer_videos_to_validate_than_processes_is_said_by_all(motion_set, tmp_path, rank):
    few = tmp_path / "one.csv"
    few.write_text("".join((motion_set / "val.csv").read_text().splitlines(True)[:2]))
    data = VideoData(val_list=str(few), root=str(motion_set), num_frames=2, num_workers=0, spec=training().input_spec())
    data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
    data.setup()
    with pytest.raises(ListError, match="1 videos cannot be shared among 2 processes"):
        data.val_dataloader()


def test_the_temperature_stays_within_clips_bound(motion_set, tmp_path):
    module = training(how=Tuning(lr=1.0, warmup=0, freeze=r"(?!logit_scale).*"), save_to=str(tmp_path / "model"))
    with torch.no_grad():
        module.model.logit_scale.fill_(4.6)
    # the smaller the loss, the hotter: a step of 1.0 would go to 5.6
    module.objective.forward = lambda step: {"x_loss": -step.model.logit_scale.exp() * step.video.norm() ** 2}
    fit(module, motion_set, default_root_dir=tmp_path)
    assert module.model.logit_scale.item() == pytest.approx(math.log(100))


def test_losses_that_are_not_finite_stop_the_run_by_name(motion_set, tmp_path):
    module = training(save_to=str(tmp_path / "model"))

    class Break(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 1:
                batch["clip"][0] = float("nan")

    with pytest.raises(TrainingError, match=r"classification_loss is not finite at step 1 .*Rows of the training list"):
        fit(module, motion_set, [Break()], default_root_dir=tmp_path)
    assert (tmp_path / "on_exception.ckpt").exists() and not (tmp_path / "model").exists()


def test_a_classifier_is_saved_with_the_names_of_its_classes(motion_set, tmp_path, capsys):
    names = read_list(motion_set / "train.csv").class_names
    module = VideoTraining(
        VideoConfig("nano_clip", num_frames=2, num_classes=8), Classification(), save_to=tmp_path / "a"
    )
    fit(module, motion_set, default_root_dir=tmp_path, enable_checkpointing=True)
    assert img2vid.load(tmp_path / "a").class_names == names
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert consolidate(checkpoint).class_names == names
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert f"8 classes: {names[0]}" in capsys.readouterr().out
    again = VideoTraining(VideoConfig(), Classification(), start_from=str(tmp_path / "a"), save_to=tmp_path / "b")
    for other in (list(reversed(names)), ["waiting", *names]):  # numbers would mean other classes
        with pytest.raises(ConfigError, match="numbered otherwise"):
            fit(again, motion_set, data={"classes": other}, default_root_dir=tmp_path)
    fit(again, motion_set, data={"classes": list(names)}, default_root_dir=tmp_path)
    assert img2vid.load(tmp_path / "b").class_names == names
