"""The whole way from files to a result, against the way written out by hand."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import img2vid
from img2vid.backbones.nano_clip import TEMPLATES, load_nano_clip, nano_clip_tokenizer
from img2vid.cli import main as cli
from img2vid.data.lists import read_list
from img2vid.data.manifest import Row, VideoList, write_manifest
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.prompts import template_hash
from img2vid.evaluation.protocols import gather_lists
from img2vid.evaluation.reading import Views
from img2vid.evaluation.results import names_of
from img2vid.evaluation.tables import counted
from img2vid.evaluation.zero_shot import zero_shot
from tests.conftest import small_vit
from tests.evaluation.conftest import CPU

ROOT = Path(img2vid.__file__).parents[1]


@pytest.fixture
def digits(motion, tmp_path):
    """The test videos labelled by their digit, which nano_clip knows: a list with a missing and a broken one."""
    rows = [Row(row.path, row.captions[0].split()[2]) for row in read_list(motion / "test.csv").rows]
    (tmp_path / "noise.mp4").write_bytes(b"noise")
    rows.insert(2, Row(str(tmp_path / "gone.mp4"), "six"))
    rows.append(Row(str(tmp_path / "noise.mp4"), "two"))
    rows.append(Row(rows[0].path, None, start_seconds=0.1))
    path = tmp_path / "digits.csv"
    write_manifest(rows, path)
    return path


def by_open_clip(path, names):
    """Frame-averaged CLIP with nothing but open_clip: scores of the readable, labelled videos."""
    model, tokenizer = load_nano_clip(), nano_clip_tokenizer()
    normalize = img2vid.convert("nano_clip").normalize
    with torch.no_grad():
        weights = []
        for name in names:
            each = F.normalize(model.encode_text(tokenizer([t.format(name) for t in TEMPLATES])), dim=-1)
            weights.append(F.normalize(each.mean(0), dim=-1))
        features, labels = [], []
        for row in read_list(path).rows:
            if row.label is not None and Path(row.path).is_file() and "noise" not in row.path:
                clip = img2vid.read_clip(row.path, num_frames=4)
                features.append(model.encode_image(normalize(clip)).mean(0))
                labels.append(row.label)
    return F.normalize(torch.stack(features), dim=-1) @ torch.stack(weights).T, torch.tensor(labels)


def run(nano, digits, **options):
    options = {"templates": TEMPLATES, "compute": CPU, **options}
    return zero_shot(nano, gather_lists([digits]), Views(4), **options)


def test_a_fresh_model_is_frame_averaged_clip(nano, digits):
    result = run(nano, digits, keep_predictions=True)
    names = result["data"]["classes"]
    scores, labels = by_open_clip(digits, names)
    predicted = scores.argmax(-1)
    assert [entry["model"]["predicted"] for entry in result["predictions"]] == [names[p] for p in predicted]
    assert [entry["label"] for entry in result["predictions"]] == [names[label] for label in labels]
    top1 = float((predicted == labels).double().mean())
    assert top1 > 0.8  # it does know digits
    for condition in ("model", "frame_mean"):
        assert result["metrics"][condition]["summary"]["top1"]["value"] == pytest.approx(top1)
    assert result["metrics"]["time_added"]["top1"] == {"value": 0.0, "interval": [0.0, 0.0]}
    probability = (scores.double() * nano.logit_scale.exp().item()).softmax(-1).max(-1).values
    assert [e["model"]["probability"] for e in result["predictions"]] == pytest.approx(probability.tolist(), rel=1e-4)
    diagonal = sum(row[i] for i, row in enumerate(result["confusion"]["model"]))
    assert diagonal == int((predicted == labels).sum()) and sum(map(sum, result["confusion"]["model"])) == 24


def test_the_result_says_how_it_was_got(nano, digits):
    result = run(nano, digits)
    data, protocol = result["data"], result["protocol"]
    assert (data["videos"], data["used"], data["unlabelled"]) == (27, 25, 1)
    assert [entry["video"].endswith("gone.mp4") for entry in data["missing"]] == [True]
    assert [entry["video"].endswith("noise.mp4") for entry in data["undecodable"]] == [True]
    assert protocol["templates"]["texts"] == list(TEMPLATES)
    assert protocol["templates"]["hash"] == template_hash(TEMPLATES) and len(protocol["templates"]["hash"]) == 64
    assert protocol["views"]["num_frames"] == 4 and protocol["fusion"] == "feature"
    assert result["model"]["video"]["backbone"] == "nano_clip" and len(result["model"]["hash"]) == 64
    assert {"img2vid", "torch", "timm", "open_clip_torch", "av", "python"} <= set(result["versions"])
    assert "predictions" not in result
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_list_hash_knows_content_not_place(nano, digits, tmp_path, motion):
    def hash_with(rows):
        write_manifest(rows, tmp_path / "other.csv")
        return run(nano, tmp_path / "other.csv")["data"]["hash"]

    named = read_list(motion / "test.csv")
    rows = [Row(row.path, named.class_names[row.label]) for row in named.rows[:8]]
    before = hash_with(rows)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for row in rows:
        (moved / Path(row.path).name).symlink_to(row.path)
    assert hash_with([Row(str(moved / Path(row.path).name), row.label) for row in rows]) == before
    assert hash_with([Row(rows[0].path, rows[1].label), *rows[1:]]) != before
    assert hash_with(rows[:7]) != before


def test_videos_that_share_only_the_root_keep_their_whole_paths():
    """ "/a/one.mp4" called "a/one.mp4" would be looked for in the wrong place."""

    def names(*paths):
        return names_of(VideoList(tuple(Row(path, 0) for path in paths), None, "list.csv"))

    assert names("/a/one.mp4", "/b/c/two.mp4") == ["/a/one.mp4", "/b/c/two.mp4"]
    assert names("/a/one.mp4", "/a/c/two.mp4") == ["one.mp4", "c/two.mp4"]


def test_time_that_was_learned_shows(timely, motion):
    lists = gather_lists([motion / "test.csv"])
    result = zero_shot(timely, lists, Views(4), templates="motion", compute=CPU, keep_predictions=True)
    found = {
        name: [e[name]["predicted"] == e["label"] for e in result["predictions"]] for name in ("model", "frame_mean")
    }
    assert found["model"] != found["frame_mean"]
    gap = (sum(found["model"]) - sum(found["frame_mean"])) / 24
    assert result["metrics"]["time_added"]["top1"]["value"] == pytest.approx(gap)


def test_without_gates_there_is_no_baseline(motion):
    model = img2vid.convert("nano_clip", num_frames=4, gate="none")
    result = zero_shot(model, gather_lists([motion / "test.csv"]), Views(4), compute=CPU)
    assert list(result["metrics"]) == ["model"] and "no gates" in result["protocol"]["frame_mean"]


def test_a_classifier_is_asked_for_its_logits(motion):
    lists = gather_lists([motion / "test.csv"])
    model = img2vid.convert(small_vit(), num_frames=4, num_classes=8).eval()
    with torch.no_grad():
        model.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
    result = zero_shot(model, lists, Views(4), compute=CPU, keep_predictions=True)
    assert result["task"] == "classification" and result["protocol"]["fusion"] == "logit"
    clip = img2vid.read_clip(lists.videos.rows[9].path, num_frames=4)
    with torch.no_grad():
        predicted = int(model(model.normalize(clip[None])).argmax())
    assert result["predictions"][9]["model"]["predicted"] == lists.videos.class_names[predicted]
    few = img2vid.convert(small_vit(), num_frames=4, num_classes=3)
    with pytest.raises(EvaluationError, match="classifier has 3 classes, the list has 8"):
        zero_shot(few, lists, Views(4), compute=CPU)


def test_what_cannot_be_meant(nano, vit, digits, tmp_path):
    with pytest.raises(EvaluationError, match="no text tower"):
        run(img2vid.convert(vit, num_frames=4), digits)
    numbered = tmp_path / "numbered.csv"
    write_manifest([Row(row.path, row.label) for row in read_list(digits).rows], numbered)
    with pytest.raises(EvaluationError, match="numbers its classes"):
        run(nano, numbered)
    unlabelled = tmp_path / "unlabelled.csv"
    rows = read_list(digits).rows
    write_manifest([Row(rows[0].path), Row(str(tmp_path / "gone.mp4"), "six")], unlabelled)
    with pytest.raises(EvaluationError, match="has one class"):
        run(nano, unlabelled)
    write_manifest([Row(rows[0].path), *(Row(str(tmp_path / "gone.mp4"), name) for name in ("six", "two"))], unlabelled)
    with pytest.raises(EvaluationError, match="has a label"):
        run(nano, unlabelled)
    write_manifest([Row(rows[0].path), Row(rows[1].path)], unlabelled)
    with pytest.raises(EvaluationError, match="has no labels"):
        run(nano, unlabelled)
    alike = tmp_path / "alike.csv"
    write_manifest([Row(rows[0].path, "brush_hair"), Row(rows[1].path, "BrushHair")], alike)
    with pytest.raises(EvaluationError, match="both read 'brush hair'"):
        run(nano, alike)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"protocol": "half"}, "Did you mean 'halves'"),
        ({"protocol": "class-splits"}, "needs --class-splits"),
        ({"protocol": "class-splits", "class_splits": ["gone.txt"]}, "gone.txt"),
        ({"fusion": "mean"}, "expected one of feature"),
        ({"templates": ["no place"]}, "must hold {} once"),
    ],
)
def test_what_is_wrong_is_said_before_any_video_is_read(nano, digits, monkeypatch, wrong, said):
    monkeypatch.setattr(
        "img2vid.evaluation.zero_shot.extract", lambda *args, **kwargs: pytest.fail("read videos first")
    )
    with pytest.raises(ValueError, match=said):
        run(nano, digits, **wrong)


@pytest.mark.parametrize("task", ["zero_shot", "honesty", "retrieval"])
def test_texts_that_fail_do_so_before_any_video_is_read(nano, motion, monkeypatch, task):
    """A tokenizer that would have to be downloaded, say."""
    import importlib

    module = importlib.import_module(f"img2vid.evaluation.{task}")
    monkeypatch.setattr(module, "extract", lambda *_, **__: pytest.fail("read videos first"))
    nano.__dict__["tokenize"] = lambda texts: 1 / 0
    lists = gather_lists([motion / "test.csv"])
    with pytest.raises(ZeroDivisionError):
        getattr(module, task)(nano, lists.videos if task == "retrieval" else lists, Views(4), compute=CPU)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--num-frames", "0"], "above 0: ClipSampler(num_frames=0"),
        (["--backend", "av"], "backend='av': expected one of auto, pyav"),
        (["--device", "cuda:63"], "device='cuda:63' cannot be used"),
        (["--device", "gpu"], "device='gpu' cannot be used"),
        (["--out", "."], "--out . is a folder"),
    ],
)
def test_options_that_cannot_be_meant(nano_folder, digits, tmp_path, capsys, option, said):
    assert cli(["eval", "zero-shot", *arguments(nano_folder, digits, tmp_path, *option)]) == 2
    assert said in capsys.readouterr().err


def test_a_result_that_could_not_be_written_is_said_first(nano_folder, digits, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("img2vid.checkpoints.native.load", lambda folder: pytest.fail("loaded a model first"))
    out = ["--out", str(tmp_path / "file" / "result.json")]
    assert cli(["eval", "zero-shot", *arguments(nano_folder, digits, tmp_path, *out)]) == 2
    assert "file" in capsys.readouterr().err


def test_rows_that_repeat_a_video_are_counted(nano, digits, tmp_path):
    twice = tmp_path / "twice.csv"
    rows = [row for row in read_list(digits).rows if row.label is not None]
    names = read_list(digits).class_names
    write_manifest([Row(row.path, names[row.label]) for row in [*rows[:4], rows[0]]], twice)
    data = run(nano, twice)["data"]
    assert data["repeated"] == 1 and "1 rows repeat a video" in counted(data)


def test_docs_example_runs(nano_folder, motion, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "convert").mkdir(parents=True)
    (tmp_path / "runs" / "convert" / "nano_clip").symlink_to(nano_folder)
    (tmp_path / "motion").symlink_to(motion)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), re.S)
    exec(compile(example, "docs/evaluation.md", "exec"), {})
    assert "'interval'" in capsys.readouterr().out


def arguments(nano_folder, digits, tmp_path, *more):
    given = ["--model", str(nano_folder), "--data", str(digits), "--cache", str(tmp_path / "cache")]
    return [*given, "--num-workers", "0", "--out", str(tmp_path / "result.json"), *more]


def test_command(nano_folder, nano, digits, tmp_path, capsys):
    given = arguments(nano_folder, digits, tmp_path, "--templates", "nano_clip", "--batch-size", "4", "--predictions")
    assert cli(["eval", "zero-shot", *given]) == 0
    printed = capsys.readouterr().out
    assert "25 of 27 videos; 1 missing: " in printed and "1 undecodable: " in printed and "time added" in printed
    result = json.loads((tmp_path / "result.json").read_text())
    expected = run(nano, digits, keep_predictions=True)
    assert result["metrics"] == expected["metrics"] and result["predictions"] == expected["predictions"]
    assert result["data"] == expected["data"]
    assert cli(["eval", "zero-shot", *given, "--strict"]) == 2
    assert "strict was asked for" in capsys.readouterr().err


def test_script_without_a_usable_video(nano_folder, tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone.csv"
    write_manifest([Row(str(tmp_path / f"{i}.mp4"), ("six", "two")[i % 2]) for i in range(3)], gone)
    monkeypatch.setattr(sys, "argv", ["zero_shot.py", *arguments(nano_folder, gone, tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "eval" / "zero_shot.py"), run_name="__main__")
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: None of the 3 videos")
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("script", sorted((ROOT / "eval").glob("*.py")), ids=lambda path: path.name)
def test_scripts_are_thin(script):
    assert len(script.read_text().splitlines()) <= 40


@pytest.mark.multiprocess
def test_two_processes_give_the_same_result(nano_folder, digits, tmp_path):
    """27 rows in four parts for two processes, each with its own bad videos."""
    results = []
    for number, starter in enumerate(
        ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])
    ):
        folder = tmp_path / str(number)
        given = arguments(nano_folder, digits, folder, "--predictions", "--templates", "nano_clip")
        if number:
            given.append("--no-cache")
        done = subprocess.run(
            [*starter, str(ROOT / "eval" / "zero_shot.py"), *given],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote ") == 1
        results.append(json.loads((folder / "result.json").read_text()))
    for key in ("metrics", "predictions", "confusion", "data"):
        assert results[0][key] == results[1][key], key
