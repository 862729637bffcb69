"""The benchmarks' own arithmetic: what the limit counts, how ratios are taken, how results are kept and shown."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import img2vid
from benchmarks import page
from benchmarks.__main__ import main
from benchmarks.limit import Limit, Sizes
from benchmarks.suite import GROUPS
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
