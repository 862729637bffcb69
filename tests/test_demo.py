"""`img2vid demo`: all of its steps at a small size, and a page that holds what was measured."""

import json
import re
import subprocess
import sys

import pytest
import yaml

import img2vid
from img2vid.cli import main as cli
from img2vid.demo import story
from img2vid.demo.page import curves
from img2vid.evaluation.results import read_result

TINY = story.Size(train=24, val=8, test=16, steps=4, look_every=2, words=3)
PICTURES = {"strips", "accuracy", "losses", "gates", "attention", "before_after"}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "told"
    return folder, story.tell(folder, TINY)


def test_the_image_model_is_good_and_converting_changes_nothing(told):
    folder, facts = told
    assert facts["pictures"]["accuracy"] > 0.93  # 359 digits
    assert facts["certificate"]["largest_difference"] == 0.0
    assert facts["before"]["is_mean"] and not facts["after"]["is_mean"]
    assert json.loads((folder / "converted" / "certificate.json").read_text())["ok"]
    assert facts["before"]["shuffled"] == facts["before"]["motion"]  # the mean of frames knows no order


def test_the_facts_are_those_of_the_result_files(told):
    folder, facts = told
    assert json.loads((folder / "demo.json").read_text()) == facts
    for when in ("before", "after"):
        panel, named = (read_result(folder / f"{when}-{what}.json") for what in ("motion", "digits"))
        assert panel["metrics"]["model"]["top1"] == facts[when]["motion"]
        assert named["metrics"]["model"]["summary"]["top1"] == facts[when]["digits"]
        assert panel["data"]["used"] == named["data"]["used"] == TINY.test


def test_backwards_counts_what_becomes_its_opposite():
    names = ["moving left", "moving right", "growing"]
    reversed_ = [[1, 5, 0], [3, 1, 2], [4, 0, 4]]  # growing shrinks, which is not among these names
    panel = {"confusion": {"reversed": [row + [0] for row in reversed_] + [[0, 0, 9, 1]]}}
    panel["data"] = {"classes": [*names, "shrinking"]}
    assert story.taken_for_the_opposite(panel) == (5 + 3 + 0 + 9) / (6 + 6 + 8 + 10)


def test_the_trained_model_and_its_recipe_can_be_gone_on_with(told):
    folder, _ = told
    assert img2vid.load(folder / "trained").config.num_frames == 4
    recipe, shipped = yaml.safe_load((folder / "train.yaml").read_text()), yaml.safe_load(story.RECIPE.read_text())
    assert recipe["model"].pop("save_to") == str(folder / "trained")
    for given in (recipe, shipped):  # what is shorter in a short run
        given["model"]["how"]["warmup"] = 0
        given["model"]["objective"]["init_args"]["objectives"]["captions"]["init_args"]["spread_steps"] = 0
    assert recipe["model"] == shipped["model"] and recipe["trainer"]["max_steps"] == TINY.steps


def test_the_page_needs_nothing_beside_it(told):
    folder, facts = told
    page = (folder / "report.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)", page) and "<script" not in page
    assert page.count("data:image/png;base64,") >= len(PICTURES)
    assert {path.stem for path in folder.glob("*.png")} == PICTURES
    for when in ("before", "after"):
        assert f"{100 * facts[when]['digits']['value']:.1f} [" in page
    assert "This is a short run, 4 steps on 24 videos" in page and "None" not in re.sub(
        r"<pre>.*?</pre>", "", page, flags=re.S
    )
    assert "Result      OK" in page  # the certificate


def test_pictures_count_steps_as_the_lines_of_the_training_do(told):
    """The CSV's first step is number 0, the line's is number 1; validations come after whole steps."""
    _, facts = told
    assert [step for step, _ in curves(facts["log"], ["val/accuracy"])["val/accuracy"]] == [2, 4]
    assert [step for step, _ in curves(facts["log"], ["loss"])["loss"]] == [1, 2, 3, 4]


def test_training_in_the_demo_says_each_line_once():
    """Where a library has logged before Lightning was imported, Lightning makes other handlers."""
    code = (
        "import logging; logging.info('first'); import lightning.pytorch; "
        "from img2vid.training.fit import speak_once; speak_once(); speak_once(); "
        "logging.getLogger('lightning.pytorch.utilities.rank_zero').info('a line'); "
        "logging.getLogger('lightning.fabric.utilities.seed').info('another')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines() == ["a line", "another"]


def test_a_folder_in_use_is_left_alone(told, tmp_path, capsys):
    folder, _ = told
    assert cli(["demo", "--out", str(folder)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli(["demo", "--out", str(tmp_path / "file")]) == 2
    assert (tmp_path / "file").read_text() == ""


def test_what_is_not_installed_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli(["demo", "--quick", "--out", str(tmp_path / "demo")]) == 2
    error = capsys.readouterr().err
    assert "The demo needs matplotlib, scikit-learn. Run: pip install 'img2vid[demo]'" in " ".join(error.split())
    assert not (tmp_path / "demo").exists()
