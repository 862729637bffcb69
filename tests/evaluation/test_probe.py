"""Probes on features whose answer is known, and the whole way on real files."""

import json
import math
from dataclasses import replace

import pytest
import torch

from img2vid.cli import main as cli
from img2vid.data.lists import read_list
from img2vid.data.manifest import VideoList
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.features import extract
from img2vid.evaluation.probe import NEIGHBOURS, TEMPERATURE, attentive, knn, linear, probe
from img2vid.evaluation.reading import Views
from tests.evaluation.conftest import CPU


def test_knn_votes():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(30, 5, generator=generator), torch.randn(4, 5, generator=generator)
    labels = torch.randint(0, 3, (30,), generator=generator)
    got = knn(train, labels, test, 4)
    for x, p in zip(test.tolist(), got, strict=True):
        near = []
        for y, label in zip(train.tolist(), labels.tolist(), strict=True):
            dot, lengths = sum(a * b for a, b in zip(x, y, strict=True)), math.hypot(*x) * math.hypot(*y)
            near.append((dot / lengths, label))
        votes = [0.0] * 4
        for cosine, label in sorted(near, reverse=True)[:NEIGHBOURS]:
            votes[label] += math.exp(cosine / TEMPERATURE)
        assert p.tolist() == pytest.approx([v / sum(votes) for v in votes], rel=1e-5)
    assert knn(train[:3], labels[:3], test, 4).sum(1).tolist() == pytest.approx([1.0] * 4)  # fewer than neighbours


def blobs(count, seed, missing=()):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([i % 4 for i in range(count) if i % 4 not in missing])
    centres = torch.eye(4, 6) * 3 + 1
    return centres[labels] + 0.3 * torch.randn(len(labels), 6, generator=generator), labels


def test_linear_separates_and_never_answers_a_class_it_has_not_seen():
    (train, labels), (test, truth) = blobs(80, 0), blobs(40, 1)
    probabilities, penalty = linear(train, labels, test, 4, seed=0)
    assert (probabilities.argmax(1) == truth).all() and penalty in (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    assert probabilities.sum(1).tolist() == pytest.approx([1.0] * 40)
    train, labels = blobs(80, 0, missing=(2,))
    assert (linear(train, labels, test, 4, seed=0)[0][:, 2] == 0).all()
    assert linear(train[:9], labels[:9], test, 4, seed=0)[1] == 1.0  # too few to choose


def test_attentive_probe_sees_order_where_the_mean_cannot():
    """Class 0 rises along a direction, class 1 falls: the mean over frames is the same."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    slope = torch.linspace(-1, 1, 4)[None, :, None] * (1 - 2 * labels)[:, None, None].float()
    features = slope * torch.ones(1, 1, 8) * torch.tensor([1.0, -1.0] * 4) + 0.1 * torch.randn(
        64, 4, 8, generator=generator
    )
    train, test = features[:32], features[32:]
    state = torch.random.get_rng_state()
    found = attentive(train, labels[:32], test, 2, seed=0)
    assert (found.argmax(1) == labels[32:]).all()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(found, attentive(train, labels[:32], test, 2, seed=0))
    mean = knn(train.mean(1), labels[:32], test.mean(1), 2).argmax(1)
    assert (mean == labels[32:]).float().mean() < 0.8


def test_end_to_end(timely, motion, monkeypatch):
    monkeypatch.setattr("img2vid.evaluation.probe.MIN_STEPS", 20)
    train, test = read_list(motion / "train.csv"), read_list(motion / "test.csv")
    result = probe(timely, train, test, Views(4, 1, num_clips=2), kinds=["knn", "attentive"], compute=CPU)
    x, seen = (extract(timely, videos, views, compute=CPU).of["model"] for videos, views in (
        (train, Views(4, 1)), (test, Views(4, 1, num_clips=2)))
    )  # fmt: skip
    labels, truth = (torch.tensor([row.label for row in videos.rows]) for videos in (train, test))
    votes = (knn(x[:, 0], labels, seen[:, 0], 8) + knn(x[:, 0], labels, seen[:, 1], 8)) / 2
    expected = float((votes.argmax(1) == truth).double().mean())
    assert result["metrics"]["knn"]["model"]["top1"]["value"] == pytest.approx(expected)
    assert set(result["metrics"]["attentive"]) == {"model", "frame_mean"}
    assert result["train"]["used"] == 16 and result["data"]["also_in_train"] == 0
    assert probe(timely, test, test, Views(4), kinds=["knn"], compute=CPU)["data"]["also_in_train"] == 24


def test_all_probes_share_one_pass_and_the_features_of_their_own(timely, motion, monkeypatch):
    monkeypatch.setattr("img2vid.evaluation.probe.MIN_STEPS", 1)
    train, test = read_list(motion / "train.csv"), read_list(motion / "test.csv")
    done = []
    together = probe(timely, train, test, Views(4), kinds=["knn", "attentive"], compute=CPU, on_progress=done.append)
    assert sum(done) == len(train) + len(test)
    alone = probe(timely, train, test, Views(4), kinds=["knn"], compute=CPU)
    for name in ("model", "frame_mean"):
        assert together["metrics"]["knn"][name]["top1"] == alone["metrics"]["knn"][name]["top1"]


def test_what_cannot_be_meant(timely, motion):
    test = read_list(motion / "test.csv")
    with pytest.raises(EvaluationError, match="expected some of linear, knn, attentive"):
        probe(timely, test, test, Views(4), kinds=["mlp"])
    other = VideoList(test.rows, test.class_names[::-1], "other.csv")
    with pytest.raises(EvaluationError, match="name other classes"):
        probe(timely, test, other, Views(4))
    one = VideoList(tuple(row for row in test.rows if row.label == 0), test.class_names, "one.csv")
    with pytest.raises(EvaluationError, match="one.csv holds videos of 1 classes"):
        probe(timely, one, test, Views(4))
    none = VideoList(tuple(replace(row, label=None) for row in test.rows), None, "none.csv")
    with pytest.raises(EvaluationError, match="none.csv has no labels"):
        probe(timely, test, none, Views(4))
    gone = VideoList(
        tuple(row if row.label == 0 else replace(row, path="gone.mp4") for row in test.rows), test.class_names, "x.csv"
    )
    with pytest.raises(EvaluationError, match="can be read of x.csv holds videos of 1 classes"):
        probe(timely, gone, test, Views(4), kinds=["knn"], compute=CPU)


def test_a_missing_package_is_said_before_any_video_is_read(timely, motion, monkeypatch):
    monkeypatch.setattr("img2vid.evaluation.probe.find_spec", lambda name: None)
    monkeypatch.setattr("img2vid.evaluation.probe.extract", lambda *args, **kwargs: pytest.fail("read videos first"))
    test = read_list(motion / "test.csv")
    with pytest.raises(EvaluationError, match="needs scikit-learn"):
        probe(timely, test, test, Views(4))


def test_command(nano_folder, motion, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("img2vid.evaluation.probe.MIN_STEPS", 20)
    lists = ["--train", str(motion / "train.csv"), "--data", str(motion / "test.csv"), "--cache", str(tmp_path / "c")]
    given = ["--model", str(nano_folder), *lists, "--num-workers", "0", "--out", str(tmp_path / "p.json")]
    assert cli(["eval", "probe", *given]) == 0
    assert "learned from 16 of 16 videos" in capsys.readouterr().out
    result = json.loads((tmp_path / "p.json").read_text())
    assert set(result["metrics"]) == {"linear", "knn", "attentive"}
