"""Averages of weights: what they are, what they leave alone, and what is refused."""

import lightning.pytorch as pl
import pytest
import torch

import img2vid
from img2vid.config import ConfigError, VideoConfig
from img2vid.objectives import Classification
from img2vid.training import Tuning, VideoTraining
from img2vid.training.averaging import EpochAverage, MovingAverage
from tests.test_grafts import in_turn
from tests.training_run import fit, training


class History(pl.Callback):
    """The weights in training after each step and each epoch, and those that were validated."""

    def __init__(self):
        self.steps, self.epochs, self.validated = [], [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.steps.append(copy(module))

    def on_train_epoch_end(self, trainer, module):
        self.epochs.append(copy(module))

    def on_validation_batch_start(self, trainer, module, *_):
        self.validated.append(copy(module))


def copy(module):
    return {name: p.detach().clone() for name, p in module.model.named_parameters()}


def train(motion_set, tmp_path, average, **options):
    history = History()
    module = training(save_to=str(tmp_path / "model"))
    fit(module, motion_set, [average, history], default_root_dir=tmp_path, **options)
    return history, dict(img2vid.load(tmp_path / "model").named_parameters())


def test_the_moving_average_is_the_sum_written_out(motion_set, tmp_path):
    history, saved = train(motion_set, tmp_path, MovingAverage(decay=0.75))
    first, second, third = history.steps
    for name, weight in saved.items():
        expected = 0.5625 * first[name] + 0.1875 * second[name] + 0.25 * third[name]
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(history.validated[-1][name], weight)  # what is validated is what is saved
    assert any(not torch.equal(weight, third[name]) for name, weight in saved.items())


@in_turn
def test_grafts_are_averaged_and_what_is_frozen_stays(spec, motion_set, tmp_path):
    history, video = History(), VideoConfig("nano_clip", num_frames=2, num_classes=8, grafts=(spec,))
    how, saved = Tuning(lr=1e-3, warmup=0, freeze="temporal_only"), str(tmp_path / "model")
    module = VideoTraining(video, Classification(), how, save_to=saved)
    before = copy(module)
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad}
    fit(module, motion_set, [MovingAverage(decay=0.75), history], default_root_dir=tmp_path)
    again, (first, second, third) = img2vid.load(saved), history.steps
    for name, weight in again.named_parameters():
        expected = 0.5625 * first[name] + 0.1875 * second[name] + 0.25 * third[name]
        if name in trained:
            torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(weight, before[name])
        assert torch.equal(history.validated[-1][name], weight)
    assert any("graft_" in name and not torch.equal(p, third[name]) for name, p in again.named_parameters())


def test_the_average_over_epochs_is_their_mean(motion_set, tmp_path):
    history, saved = train(motion_set, tmp_path, EpochAverage(first_epoch=1), max_epochs=3)
    _, second, third = history.epochs
    for name, weight in saved.items():
        torch.testing.assert_close(weight, (second[name] + third[name]) / 2, atol=1e-6, rtol=1e-5)
        assert torch.equal(history.validated[-1][name], weight)  # the epoch that has just ended takes part
    assert any(not torch.equal(weight, third[name]) for name, weight in saved.items())


def test_an_average_that_never_began_replaces_nothing(motion_set, tmp_path):
    with pytest.warns(UserWarning, match="MovingAverage never began"):
        history, saved = train(motion_set, tmp_path, MovingAverage(starting_at_step=99))
    assert all(torch.equal(weight, history.steps[-1][name]) for name, weight in saved.items())


def test_rates_and_schedule_stay_those_of_each_group(motion_set, tmp_path):
    rates = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})

    how = Tuning(lr=1e-4, warmup=0, schedule="constant", multipliers={"new": 7.0})
    module = training(how=how, save_to=str(tmp_path / "model"))
    fit(module, motion_set, [Rates(), EpochAverage(0)], default_root_dir=tmp_path, max_epochs=2)
    assert [step["new/no_decay"] for step in rates] == pytest.approx([7e-4] * 6)
    assert [step["pretrained"] for step in rates] == pytest.approx([1e-4] * 6)


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (pl.callbacks.EMAWeightAveraging(), "would move the .* frozen parameters, by rounding.*MovingAverage"),
        (pl.callbacks.StochasticWeightAveraging(1e-3), "all parameter groups one learning rate.*EpochAverage"),
        (EpochAverage(5), "first_epoch=5, but training ends after 1 epochs"),
    ],
)
def test_averages_that_would_not_be_what_they_seem_are_refused(motion_set, tmp_path, callback, words):
    with pytest.raises(ConfigError, match=words):
        fit(training(Classification("text")), motion_set, [callback], default_root_dir=tmp_path)


@pytest.mark.parametrize("make", [lambda: MovingAverage(decay=1.0), lambda: EpochAverage(-1)])
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(ConfigError, match="expected"):
        make()
