"""Ranks by sorting, ties by drawing lots, and the whole way against open_clip's features."""

import itertools
import json

import pytest
import torch
from torch.nn import functional as F

import img2vid
from img2vid.cli import main as cli
from img2vid.data.lists import read_list
from img2vid.data.manifest import Row, VideoList, write_manifest
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.reading import Views
from img2vid.evaluation.retrieval import draw, dual_softmax, ranks, recall, retrieval, with_captions
from tests.conftest import small_vit
from tests.evaluation.conftest import CPU


def expected_place(right, wrong):
    """Mean place of the right answer over all orders in which equal scores may stand, counted by trying them all."""
    places = []
    for order in itertools.permutations(range(len(wrong) + 1)):
        scored = [(right, 0, order[0])] + [(w, 1, o) for w, o in zip(wrong, order[1:], strict=True)]
        scored.sort(key=lambda item: (-item[0], item[2]))
        places.append(1 + [kind for _, kind, _ in scored].index(0))
    return sum(places) / len(places)


def test_ranks_with_ties_and_several_captions():
    owner = torch.tensor([0, 0, 1, 2, 2, 3])
    scores = torch.randint(0, 4, (6, 4), generator=torch.Generator().manual_seed(0)).double()  # full of ties
    text_to_video, video_to_text = ranks(scores, owner)
    for q in range(6):
        wrong = [scores[q, v].item() for v in range(4) if v != owner[q]]
        assert text_to_video[q] == expected_place(scores[q, owner[q]].item(), wrong)
    for v in range(4):
        best = max(scores[q, v].item() for q in range(6) if owner[q] == v)
        wrong = [scores[q, v].item() for q in range(6) if owner[q] != v]
        assert video_to_text[v] == expected_place(best, wrong)


def test_scores_that_say_nothing_are_at_chance():
    text_to_video, video_to_text = ranks(torch.zeros(5, 5), torch.arange(5))
    assert text_to_video.tolist() == video_to_text.tolist() == [3.0] * 5
    found = recall(text_to_video)
    assert found["r1"]["value"] == 0.0 and found["r5"]["value"] == 1.0
    assert found["median_rank"] == found["mean_rank"] == 3.0


def test_recall_by_hand():
    found = recall(torch.tensor([1.0, 1.5, 4.0, 6.0, 30.0]))
    assert [found[f"r{k}"]["value"] for k in (1, 5, 10)] == pytest.approx([0.2, 0.6, 0.8])
    assert (found["median_rank"], found["mean_rank"]) == (4.0, pytest.approx(8.5))


def test_dual_softmax():
    scores = torch.tensor([[0.9, 0.8], [0.8, 0.1]]).double()  # greedily, both captions want the first video
    by_text, by_video = dual_softmax(scores, 10.0)
    for q, v in itertools.product(range(2), range(2)):
        over_texts = torch.tensor([10 * scores[i, v] for i in range(2)]).softmax(0)[q]
        over_videos = torch.tensor([10 * scores[q, i] for i in range(2)]).softmax(0)[v]
        assert by_text[q, v] == pytest.approx(float(scores[q, v] * over_texts))
        assert by_video[q, v] == pytest.approx(float(scores[q, v] * over_videos))
    hub = torch.tensor([[0.50, 0.49], [0.90, 0.10]]).double()  # the first video is near everything
    owner = torch.tensor([1, 0])
    assert ranks(hub, owner)[0].tolist() == [2.0, 1.0]
    assert ranks(dual_softmax(hub, 10.0)[0], owner)[0].tolist() == [1.0, 1.0]


def test_rows_of_one_video_are_one_video():
    rows = (Row("/a", None, ("x",)), Row("/b"), Row("/a", None, ("y", "z")), Row("/a", None, ("w",), 1.0, 2.0))
    videos, uncaptioned = with_captions(VideoList(rows, None, "list"))
    assert [(row.path, row.captions) for row in videos.rows] == [("/a", ("x", "y", "z")), ("/a", ("w",))]
    assert uncaptioned == 1
    with pytest.raises(EvaluationError, match="has no captions"):
        with_captions(VideoList((Row("/a"),), None, "list"))


@pytest.fixture
def captioned(motion, tmp_path):
    rows = [Row(row.path, None, row.captions) for row in read_list(motion / "test.csv").rows]
    rows[4] = Row(rows[4].path, None, (*rows[4].captions, *rows[5].captions))
    rows.insert(9, Row(str(tmp_path / "gone.mp4"), None, ("the digit two moving up",)))
    write_manifest(rows, tmp_path / "captioned.jsonl")
    return tmp_path / "captioned.jsonl"


def test_end_to_end(timely, captioned):
    result = retrieval(timely, read_list(captioned), Views(4), compute=CPU, keep_predictions=True)
    video, text, owner = [], [], []
    with torch.no_grad():
        for row in read_list(captioned).rows:
            if "gone" not in row.path:
                clip = img2vid.read_clip(row.path, num_frames=4)
                video.append(timely.encode_video(timely.normalize(clip[None]))[0])
                for caption in row.captions:
                    text.append(timely.encode_text(timely.tokenize(caption))[0])
                    owner.append(len(video) - 1)
    scores = F.normalize(torch.stack(text), dim=-1) @ F.normalize(torch.stack(video), dim=-1).T
    assert result["data"]["captions"] == 25 and [e["video"] for e in result["data"]["missing"]] != []
    texts = [entry["caption"] for entry in result["predictions"]]
    for q, entry in enumerate(result["predictions"]):
        # equal captions tie exactly; other scores are separated by more than rounding or not compared
        own, row = scores[q, owner[q]], scores[q]
        surely = int((row > own + 1e-5).sum())
        maybe = int(((row - own).abs() <= 1e-5).sum()) - 1
        assert 1 + surely <= entry["model"]["rank"] <= 1 + surely + maybe
    assert len(set(texts)) < len(texts)  # the list does hold equal captions
    mean = sum(entry["model"]["rank"] for entry in result["predictions"]) / 25
    assert result["metrics"]["model"]["text_to_video"]["mean_rank"] == pytest.approx(mean)
    assert set(result["metrics"]) == {"model", "frame_mean"}


def test_msrvtt_and_command(nano_folder, motion, tmp_path, capsys):
    lines = ["key,vid_key,video_id,sentence"]
    for i, row in enumerate(read_list(motion / "test.csv").rows[:10]):
        (tmp_path / f"video{i}.mp4").symlink_to(row.path)
        lines.append(f"ret{i},msr{i},video{i},{row.captions[0]}")
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text("\n".join(lines) + "\n")
    given = ["--model", str(nano_folder), "--data", str(tmp_path / "MSRVTT_JSFUSION_test.csv"), "--no-cache"]
    given += ["--picture", str(tmp_path / "grid.png")]
    assert cli(["eval", "retrieval", *given, "--num-workers", "0", "--out", str(tmp_path / "r.json")]) == 0
    assert "text to video, dual softmax" in capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["data"]["used"] == 10 and result["data"]["captions"] == 10
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("grid.png", "grid-similarity.png"))


def test_the_grid_shows_the_best_first(motion, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("img2vid.plots.retrieval_figure", lambda queries: seen.update(queries=queries))
    monkeypatch.setattr("img2vid.plots.save", lambda figure, path: path)
    rows = read_list(motion / "test.csv").rows[:7]
    scores, owner = torch.tensor([[0.1, 0.9, 0.5, 0.3, 0.2, 0.4, 0.6]]).double(), torch.tensor([2])
    draw(scores, owner, ["a caption"], rows, tmp_path / "x.png")
    ((text, pictures, right),) = seen["queries"]
    assert (text, len(pictures), right) == ("a caption", 5, 2)  # places: 1, 6, 2, 5, 3
    for picture, row in zip(pictures, (1, 6, 2, 5, 3), strict=True):
        middle_frame = img2vid.read_clip(rows[row].path, [4])[0].permute(1, 2, 0)
        assert (picture == middle_frame.numpy()).all()
    draw(scores, torch.tensor([0]), ["a caption"], rows, tmp_path / "x.png")
    assert seen["queries"][0][2] == -1  # the right one is not among the five


def test_what_cannot_be_meant(nano, captioned):
    videos = read_list(captioned)
    with pytest.raises(EvaluationError, match="no text tower"):
        retrieval(img2vid.convert(small_vit(), num_frames=4), videos, Views(4))
    with pytest.raises(EvaluationError, match="where the caption goes"):
        retrieval(nano, videos, Views(4), template="a video")
