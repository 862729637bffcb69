"""Merging in weight space: exact ends, what the formulas say, and the command."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import img2vid
from img2vid.cli import main as cli
from img2vid.interpolation import average, between
from img2vid.merging import MergeError, linear, slerp, task
from tests.conftest import randomize

NUMBERS = st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4)


def states(count=3, gate="tanh"):
    made = []
    for seed in range(count):
        model = img2vid.convert("nano_clip", num_frames=2, gate=gate)
        made.append(randomize(model, seed=seed).state_dict())
    return made


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_ends_are_bitwise_the_models():
    a, b, c = states()
    assert same_bits(linear([a, b, c], [0, 1, 0]), b)
    assert same_bits(slerp(a, b, 0.0), a) and same_bits(slerp(a, b, 1.0), b)
    assert same_bits(task(a, [b, c], [0, 0]), a) and same_bits(task(a, [b, c], [0, 1]), c)
    assert not same_bits(linear([a, b], [1, 1]), a)


def test_linear_is_interpolation_and_the_average():
    a, b, c = states()
    for merged, known in (
        (linear([a, b], [3, 1]), between(a, b, 0.25)),
        (linear([a, b, c], [2, 2, 2]), average([a, b, c])),
    ):
        assert merged.keys() == known.keys()
        for key, value in known.items():
            torch.testing.assert_close(merged[key], value)


@settings(deadline=None, max_examples=50)
@given(NUMBERS, NUMBERS, st.floats(0, 1))
def test_slerp_turns_by_its_share_of_the_angle(x, y, alpha):
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (x, y))
    if min(a.norm(), b.norm()) < 1e-3:
        return
    a, b = a / a.norm(), b / b.norm()
    angle = math.acos(max(-1.0, min(1.0, float(a @ b))))
    if not 1e-2 < angle < math.pi - 1e-2:
        return
    merged = slerp({"w": a}, {"w": b}, alpha)["w"]
    assert float(merged.norm()) == pytest.approx(1.0, abs=1e-9)
    assert math.acos(max(-1.0, min(1.0, float(a @ merged)))) == pytest.approx(alpha * angle, abs=1e-6)


def test_slerp_goes_straight_where_there_is_no_arc():
    one = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(slerp({"w": one}, {"w": 3 * one}, 0.5)["w"], 2 * one)
    torch.testing.assert_close(slerp({"w": one}, {"w": -one}, 0.25)["w"], 0.5 * one)
    assert torch.equal(slerp({"w": 0 * one}, {"w": one}, 0.5)["w"], 0.5 * one)
    count = torch.tensor([3])
    assert torch.equal(slerp({"w": count}, {"w": count + 2}, 0.5)["w"], count)


def test_task_vectors_are_added_and_taken_away():
    base, a, b = states(gate="temporal_fc")
    merged = task(base, [a, b], [0.5, -0.25])
    for key, value in base.items():
        if value.is_floating_point():
            expected = value + 0.5 * (a[key] - value) - 0.25 * (b[key] - value)
            torch.testing.assert_close(merged[key], expected, atol=1e-5, rtol=1e-5)
    base, a, _ = states()
    key = next(key for key in base if key.endswith("temporal_fc.alpha"))
    assert task(base, [a], [0.5])[key] == pytest.approx(
        math.atanh((math.tanh(base[key]) + math.tanh(a[key])) / 2), abs=1e-6
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda a: linear([a, a], [1]),
        lambda a: linear([a, a], [-1, 2]),
        lambda a: linear([a, a], [0, 0]),
        lambda a: linear([a, a], [math.nan, 1]),
        lambda a: linear([a, a], [math.inf, 1]),
        lambda a: slerp(a, a, math.nan),
        lambda a: task(a, [a], [math.nan]),
        lambda a: task(a, [a], [math.inf]),
        lambda a: slerp(a, a, 1.5),
        lambda a: task(a, [a], [1, 1]),
    ],
)
def test_shares_that_make_no_sense_are_refused(call):
    with pytest.raises(MergeError, match="expected"):
        call({"w": torch.ones(2)})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("merge")
    for name, seed in (("base", None), ("a", 1), ("b", 2)):
        model = img2vid.convert("nano_clip", num_frames=2)
        (model if seed is None else randomize(model, seed, 0.01)).save_pretrained(home / name)
    img2vid.convert("nano_clip", num_frames=2, gate="tanh").save_pretrained(home / "other")
    return home


@pytest.mark.parametrize(
    "words",
    [["--method", "linear", "--shares", "1", "3"], ["--method", "slerp"], ["--method", "task", "--base", "base"]],
    ids=lambda words: words[1],
)
def test_the_command_merges_and_says_what_is_kept(words, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    assert cli(["merge", "a", "b", *words, "--out", str(tmp_path / "out")]) == 0
    assert "nothing is promised" in capsys.readouterr().out
    merged = img2vid.load(tmp_path / "out")
    a, b, base = (img2vid.load(folders / name).state_dict() for name in ("a", "b", "base"))
    expected = {
        "linear": lambda: linear([a, b], [1, 3]),
        "slerp": lambda: slerp(a, b, 0.5),
        "task": lambda: task(base, [a, b], [1, 1]),
    }[words[1]]()
    assert same_bits(merged.state_dict(), expected)
    assert f"a merger ({words[1]})" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "other"], "gate: 'temporal_fc' in a, 'tanh' in other"),
        (["a"], "at least two folders"),
        (["a", "b", "--method", "task"], "--base goes with --method task"),
        (["a", "b", "--base", "base"], "--base goes with --method task"),
        (["a", "b", "base", "--method", "slerp"], "3 were given"),
        (["a", "b", "--shares", "1"], "1 given, 2 expected"),
        (["a", "b", "--shares", "-1", "1"], "not negative"),
        (["a", "nowhere"], "no folder nowhere"),
    ],
)
def test_the_command_says_what_is_wrong(words, message, folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    assert cli(["merge", *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_model_is_written_over(folders, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    assert cli(["merge", "a", "b", "--out", "a"]) == 2
    assert "is one of the models" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["linear", "slerp", "task"])
def test_models_with_grafts_are_merged_and_told_what_folding_first_would_do(method, tmp_path, capsys):
    specs = [{"type": "lora", "rank": 2}, {"type": "adapter", "bottleneck": 4}]
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        model = img2vid.convert("nano_clip", num_frames=2, grafts=specs)
        randomize(model, seed, 0.01).save_pretrained(tmp_path / name)
    base = ["--base", str(tmp_path / "base")] if method == "task" else []
    given = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--method", method, *base]
    assert cli([*given, "--out", str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "lora: its parts were merged one by one" in shown and "adapter: its parts" not in shown
    merged = img2vid.load(tmp_path / "out")
    assert [one["type"] for one in merged.config.grafts] == ["lora", "adapter"]
    img2vid.convert("nano_clip", num_frames=2).save_pretrained(tmp_path / "bare")
    assert cli(["merge", str(tmp_path / "a"), str(tmp_path / "bare"), "--out", str(tmp_path / "no")]) == 2
    assert "grafts: " in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_what_classes_are_called_is_known_if_one_of_the_models_knows_it(tmp_path):
    for name, classes in (("a", None), ("b", ("yes", "no"))):
        model = randomize(img2vid.convert("nano_clip", num_frames=2, num_classes=2), 1, 0.01)
        model.class_names = classes
        model.save_pretrained(tmp_path / name)
    assert cli(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 0
    assert img2vid.load(tmp_path / "out").class_names == ("yes", "no")


@pytest.mark.parametrize("other", [{"num_frames": 4}, {"dtype": "bfloat16"}, {"num_classes": 2}, {"causal": True}])
def test_models_that_are_not_alike_are_told_apart_by_the_setting(other, folders, tmp_path, capsys):
    img2vid.convert("nano_clip", **{"num_frames": 2, **other}).save_pretrained(tmp_path / "other")
    assert cli(["merge", str(folders / "a"), str(tmp_path / "other"), "--out", str(tmp_path / "out")]) == 2
    assert "differ in more than their weights" in (shown := capsys.readouterr().err)
    assert f"  {next(iter(other))}: " in shown and not (tmp_path / "out").exists()
