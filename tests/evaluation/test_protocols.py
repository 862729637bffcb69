"""Which videos and which classes a protocol asks about."""

import json

import pytest

from img2vid.data.manifest import Row, VideoList, write_manifest
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.protocols import Lists, gather_lists, rounds, summarise
from img2vid.evaluation.reading import Views
from img2vid.evaluation.results import names_of
from img2vid.evaluation.zero_shot import zero_shot
from tests.evaluation.conftest import CPU

NAMES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture
def lists():
    """Ten videos, class i % 5; the second list given holds the later half and one of the first."""
    rows = tuple(Row(f"/v/{i}.mp4", i % 5) for i in range(10))
    return Lists(VideoList(rows, NAMES, "some.csv"), {"a": [0, 1, 2, 3, 4], "b": [4, 5, 6, 7, 8, 9]})


def test_lists_and_splits(lists):
    readable = [0, 1, 2, 4, 5, 9]
    (only,) = rounds("list", lists, readable)
    assert only.rows == tuple(readable) and only.classes is None
    first, second = rounds("splits", lists, readable)
    assert (first.rows, second.rows) == ((0, 1, 2, 4), (4, 5, 9))
    with pytest.raises(EvaluationError, match="no readable video belongs to b"):
        rounds("splits", lists, [0, 1])


def test_halves_are_random_and_reproducible(lists):
    made = rounds("halves", lists, range(10), num_rounds=20, seed=1)
    assert len(made) == 20 and len({r.classes for r in made}) > 5
    for r in made:
        assert len(set(r.classes)) == 2
        assert r.rows == tuple(row for row in range(10) if row % 5 in r.classes)
    assert rounds("halves", lists, range(10), num_rounds=20, seed=1) == made
    assert rounds("halves", lists, range(10), num_rounds=20, seed=2) != made


def test_class_splits_from_files(lists, tmp_path):
    text, many = tmp_path / "one.txt", tmp_path / "many.json"
    text.write_text("dog\nant\n")
    many.write_text(json.dumps({"x": ["bee", "cat"], "y": ["eel", "cat"]}))
    made = rounds("class-splits", lists, range(10), class_splits=[text, many])
    assert [(r.name, r.classes, r.rows) for r in made] == [
        ("one", (3, 0), (0, 3, 5, 8)),
        ("x", (1, 2), (1, 2, 6, 7)),
        ("y", (4, 2), (2, 4, 7, 9)),
    ]
    text.write_text("dogs\n")
    with pytest.raises(EvaluationError, match="one.txt, one: 1 of its classes.*Did you mean 'dog'"):
        rounds("class-splits", lists, range(10), class_splits=[text])
    text.write_text("dog\nant\ndog\n")
    with pytest.raises(EvaluationError, match="1 classes are there more than once, the first 'dog'"):
        rounds("class-splits", lists, range(10), class_splits=[text])
    text.write_text("dog\n")
    with pytest.raises(EvaluationError, match="fewer than two classes compete in one"):
        rounds("class-splits", lists, range(10), class_splits=[text])
    many.write_text("[1]")
    with pytest.raises(EvaluationError, match="expected JSON such as"):
        rounds("class-splits", lists, range(10), class_splits=[many])
    with pytest.raises(EvaluationError, match="needs --class-splits"):
        rounds("class-splits", lists, range(10))


def test_base_to_novel(lists, tmp_path):
    base, novel = rounds("base-to-novel", lists, range(10))
    assert (base.classes, novel.classes) == ((0, 1, 2), (3, 4))  # the larger half is the base
    file = tmp_path / "base.txt"
    file.write_text("eel\nbee\n")
    base, novel = rounds("base-to-novel", lists, range(10), base_classes=file)
    assert (base.classes, base.rows, novel.classes) == ((4, 1), (1, 4, 6, 9), (0, 2, 3))


def test_rounds_in_which_every_answer_is_right_are_refused(lists):
    few = Lists(VideoList(lists.videos.rows, NAMES[:3], "few.csv"), {})
    with pytest.raises(EvaluationError, match="compete in novel: all answers"):
        rounds("base-to-novel", few, range(3))
    with pytest.raises(EvaluationError, match="Half of 3 classes is no choice"):
        rounds("halves", few, range(3))
    with pytest.raises(EvaluationError, match="num_rounds=0"):
        rounds("halves", lists, range(10), num_rounds=0)


def measured(top1, ece=0.1):
    return {"top1": {"value": top1}, "top5": None, "mean_class": {"value": top1}, "calibration_error": {"value": ece}}


def test_summaries():
    assert summarise("list", [measured(0.5)]) == measured(0.5)
    three = summarise("splits", [measured(v) for v in (0.2, 0.4, 0.9)])
    assert three["top1"] == {"value": pytest.approx(0.5), "std": pytest.approx(0.3605551275)} and three["top5"] is None
    two = summarise("base-to-novel", [measured(0.9), measured(0.6)])
    assert two["top1"] == {"value": pytest.approx(0.72), "base": 0.9, "novel": 0.6}


@pytest.mark.parametrize(("option", "takes"), [("class_splits", "class-splits"), ("base_classes", "base-to-novel")])
def test_files_of_another_protocol_are_not_passed_over(lists, tmp_path, option, takes):
    """Without it `--class-splits FILE` alone would give the number over all classes under the name asked for."""
    file = tmp_path / "some.txt"
    file.write_text("ant\nbee\n")
    given = {option: [file] if option == "class_splits" else file}
    assert rounds(takes, lists, range(10), **given)
    for protocol in {"list", "splits", "all", "halves", "class-splits", "base-to-novel"} - {takes}:
        with pytest.raises(EvaluationError, match=f"--{option.replace('_', '-')} .*'{takes}'"):
            rounds(protocol, lists, range(10), **given)


def test_unknown_protocol(lists):
    with pytest.raises(EvaluationError, match="Did you mean 'halves'"):
        rounds("half", lists, range(10))


def test_rounds_compete_among_their_classes_only(timely, motion, tmp_path):
    """Base-to-novel end to end against predictions over restricted lists."""
    everything = gather_lists([motion / "test.csv"])
    found = zero_shot(timely, everything, Views(4), protocol="base-to-novel", templates="motion", compute=CPU)
    names, values = everything.videos.class_names, []
    for group in (names[:4], names[4:]):
        rows = [row for row in everything.videos.rows if names[row.label] in group]
        part = tmp_path / "part.csv"
        write_manifest([Row(row.path, names[row.label]) for row in rows], part)
        alone = zero_shot(timely, gather_lists([part]), Views(4), templates="motion", compute=CPU)
        values.append(alone["metrics"]["model"]["summary"]["top1"]["value"])
    summary = found["metrics"]["model"]["summary"]["top1"]
    assert (summary["base"], summary["novel"]) == pytest.approx(values)
    assert found["protocol"]["rounds"][1]["classes"] == list(names[4:])


def ucf(folder):
    (folder / "classInd.txt").write_text("1 Bike\n2 Run\n")
    for split in (1, 2, 3):
        (folder / f"testlist0{split}.txt").write_text(f"Bike/t{split}.avi\nRun/t{split}.avi\n")
        (folder / f"trainlist0{split}.txt").write_text(f"Bike/r{split}.avi 1\nBike/t{split % 3 + 1}.avi 1\n")


def test_ucf_folder(tmp_path):
    ucf(tmp_path)
    lists = gather_lists([tmp_path], "splits")
    assert list(lists.members) == ["testlist01", "testlist02", "testlist03"] and len(lists.videos) == 6
    assert lists.videos.class_names == ("Bike", "Run")
    assert [row.label for row in lists.videos.rows] == [0, 1] * 3
    assert len(gather_lists([tmp_path], "all").videos) == 4  # trainlist01 and testlist01
    assert gather_lists([tmp_path], split=2).videos.rows[0].path.endswith("Bike/t2.avi")


def test_hmdb_folder(tmp_path):
    for split in (1, 2, 3):
        for name in ("wave", "run"):
            lines = [f"{name}{i}.avi {1 if i == split else 2 if i == 0 else 0}" for i in range(4)]
            (tmp_path / f"{name}_test_split{split}.txt").write_text("\n".join(lines))
    lists = gather_lists([tmp_path], "splits")
    assert [len(rows) for rows in lists.members.values()] == [2, 2, 2] and len(lists.videos) == 2
    assert len(gather_lists([tmp_path], "all").videos) == 8


def test_merged_lists_number_alike(tmp_path):
    write_manifest([Row("/v/1.mp4", "dog"), Row("/v/2.mp4", "bee")], tmp_path / "a.csv")
    write_manifest([Row("/v/3.mp4", "ant"), Row("/v/2.mp4", "bee")], tmp_path / "b.csv")
    lists = gather_lists([tmp_path / "a.csv", tmp_path / "b.csv"], "all")
    assert lists.videos.class_names == ("ant", "bee", "dog")
    assert [(row.path[-5], row.label) for row in lists.videos.rows] == [("1", 2), ("2", 1), ("3", 0)]
    assert lists.members == {"a.csv": [0, 1], "b.csv": [2, 1]}
    write_manifest([Row("/v/2.mp4", "dog")], tmp_path / "c.csv")
    with pytest.raises(EvaluationError, match="another label"):
        gather_lists([tmp_path / "a.csv", tmp_path / "c.csv"])
    write_manifest([Row("/v/2.mp4", 1)], tmp_path / "d.csv")
    with pytest.raises(EvaluationError, match="give --classes"):
        gather_lists([tmp_path / "a.csv", tmp_path / "d.csv"])


def test_one_video_by_two_paths_is_one_video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_manifest([Row("1.mp4", "dog"), Row("2.mp4", "bee")], tmp_path / "a.csv")
    write_manifest([Row("2.mp4", "bee"), Row("3.mp4", "bee")], tmp_path / "b.csv")
    lists = gather_lists(["a.csv", tmp_path / "b.csv"])  # one relative, one absolute
    assert len(lists.videos) == 3 and names_of(lists.videos) == ["1.mp4", "2.mp4", "3.mp4"]


def test_known_class_list_by_name(tmp_path):
    write_manifest([Row("/v/1.mp4", "YoYo"), Row("/v/2.mp4", "Archery")], tmp_path / "a.csv")
    videos = gather_lists([tmp_path / "a.csv"], classes="ucf101").videos
    assert [row.label for row in videos.rows] == [100, 2] and len(videos.class_names) == 101
