"""Results drawn again without a model, and compared with a warning where they do not compare."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from img2vid import plots
from img2vid.cli import main as cli
from img2vid.evaluation.honesty import honesty
from img2vid.evaluation.probe import probe
from img2vid.evaluation.protocols import gather_lists
from img2vid.evaluation.reading import Views
from img2vid.evaluation.report import differences, read_curves, report
from img2vid.evaluation.results import read_result, write_result
from img2vid.evaluation.retrieval import retrieval
from img2vid.evaluation.tables import sheet_of, show
from img2vid.evaluation.zero_shot import zero_shot
from tests.evaluation.conftest import CPU


@pytest.fixture(scope="module")
def results(nano_folder, motion, tmp_path_factory):
    """One result of every task, as files."""
    import img2vid

    model, lists, folder = img2vid.load(nano_folder), gather_lists([motion / "test.csv"]), tmp_path_factory.mktemp("r")
    videos, given = lists.videos, {"compute": CPU, "cache": folder / "cache"}
    made = {
        "zero": zero_shot(model, lists, Views(4), **given),
        "zero_half": zero_shot(model, lists, Views(2), templates="motion", **given),
        "honesty": honesty(model, lists, Views(4), **given),
        "retrieval": retrieval(model, videos, Views(4), **given),
        "probe": probe(model, videos, videos, Views(4), kinds=["knn"], **given),
    }
    return {name: write_result(result, folder / f"{name}.json") for name, result in made.items()}


def test_a_page_that_needs_nothing_beside_it(results, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert cli(["plot", *map(str, results.values()), "--out", str(out)]) == 0
    page = out.read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert not re.search(r'(src|href)="(?!data:)|<script|@import|url\(', page)
    top1 = json.loads(results["zero"].read_text())["metrics"]["model"]["summary"]["top1"]["value"]
    assert f"{100 * top1:.1f} [" in page
    assert "task differs" in capsys.readouterr().out


def test_names_are_escaped(results):
    result = read_result(results["zero"])
    result["data"]["list"] = "<script>alert(1)</script>"
    assert "<script" not in report({"<b>name</b>": result})


def test_what_does_not_compare_is_said(results):
    same = {name: read_result(results["zero"]) for name in ("a", "b")}
    assert differences(same) == []
    found = differences({name: read_result(results[name]) for name in ("zero", "zero_half")})
    assert [text.split(" differs")[0] for text in found] == ["templates", "num_frames"]
    same["b"]["data"]["used"] -= 1
    assert differences(same) == ["videos used differs: 24 (a); 23 (b)"]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("retrieval", {"protocol": {"template": "a video of {}"}}, "template"),
        ("probe", {"train": {"hash": "another"}}, "training list"),
        ("zero", {"protocol": {"input": {"interpolation": "nearest"}}}, "interpolation"),
        ("zero", {"protocol": {"rounds": [{"name": "list", "classes": ["growing"]}]}}, "rounds"),
        ("zero", {"data": {"missing": [{"video": "a.mp4", "problem": "gone"}]}}, "left out"),
    ],
)
def test_every_part_of_a_protocol_is_compared(results, name, change, said):
    def merged(old, new):
        return {**old, **{k: merged(old[k], v) if isinstance(v, dict) else v for k, v in new.items()}}

    result = read_result(results[name])
    assert [text.split(" differs")[0] for text in differences({"a": result, "b": merged(result, change)})] == [said]
    speed = merged(result, {"protocol": {"batch_size": 7, "device": "cuda:0"}})
    assert differences({"a": result, "b": speed}) == []


def test_pictures(results, tmp_path):
    for name, path in results.items():
        out = tmp_path / f"{name}.png"
        assert cli(["plot", str(path), "--out", str(out)]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")
    assert cli(["plot", str(results["zero"]), str(results["zero_half"]), "--out", str(tmp_path / "both.png")]) == 0


def test_no_model_is_needed(results, tmp_path):
    """Drawing imports neither torch's models nor a decoder: only numbers from a file."""
    code = (
        "import sys; from img2vid import plots; import json;"
        f"plots.save(plots.figure_of(json.load(open({str(results['honesty'])!r}))), {str(tmp_path / 'h.png')!r});"
        "print(sorted({'torch', 'timm', 'av'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and (tmp_path / "h.png").exists()


def test_other_figures_show_what_they_are_given():
    grid = plots.retrieval_figure(
        [("a dot", [np.zeros((8, 8, 3)), np.ones((8, 8, 3))], 1), ("a line", [np.ones((8, 8, 3))], 0)]
    )
    right = [axis.spines["top"].get_linewidth() == 3 for axis in grid.axes]
    assert right == [False, True, True, False]
    curves = plots.curves_figure({"blocks.0": [(0, 0.0), (1, 0.5)], "blocks.1": [(0, 0.0), (1, 0.2)]}, "gates")
    assert [line.get_ydata().tolist() for line in curves.axes[0].lines] == [[0.0, 0.5], [0.0, 0.2]]
    similar = plots.similarity_figure(np.eye(3), ["a", "b", "c"], ["x", "y", "z"])
    assert [t.get_text() for t in similar.axes[0].get_xticklabels()] == ["x", "y", "z"]
    assert np.array_equal(similar.axes[0].images[0].get_array(), np.eye(3))
    numbers = {"one": [("x", {"value": 0.2, "interval": [0.1, 0.4]})], "two": [("x", {"value": 0.9}), ("y", None)]}
    axes = plots.comparison_figure(numbers).axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([20.0, 90.0])
    legend = [patch.get_facecolor() for patch in axes.get_legend().get_patches()]
    assert legend == [bar.get_facecolor() for bar in axes.patches] and legend[0] != legend[1]
    for figure in (grid, curves, similar):
        assert plots.png(figure).startswith(b"\x89PNG")


def test_gates_that_are_not_there_are_said_and_not_drawn_as_zero(results):
    result = read_result(results["honesty"])

    def lower_left(layers):
        axes = plots.honesty_figure({**result, "layers": layers}).axes[2]
        return [text.get_text() for text in axes.texts], len(axes.patches), axes.get_ylim()[0]

    layer = {"layer": "blocks.0", "gate_norm": 0.5, "branch_to_residual": 0.1}
    assert lower_left([layer, layer]) == ([], 2, 0)
    assert lower_left([{**layer, "gate_norm": 0.0}]) == (["zero in every layer"], 1, 0)  # as freshly converted
    assert lower_left([{**layer, "gate_norm": None}]) == (["no gates"], 0, 0)  # gate: none
    assert lower_left([])[0] == ["no layer attends along time behind a gate"]


def test_columns_of_different_kinds_have_axes_of_their_own():
    columns = {"gate/blocks.0": [(0, 0.0)], "gate/blocks.1": [(0, 0.1)], "loss": [(0, 3.0)], "lr": [(0, 1e-4)]}
    figure = plots.curves_figure(columns)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["gate", "loss", "lr"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 1, 1]


def test_numbers_are_never_cut_short(results, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    for path in results.values():
        result = read_result(path)
        show(result, path)
        out = capsys.readouterr().out
        assert "…" not in out
        for row in sheet_of(result).rows:
            assert all(cell in out for cell in row)


def test_letters_without_a_glyph_are_said_once():
    with pytest.warns(UserWarning) as caught:
        plots.png(plots.confusion_figure([[1, 0], [0, 1]], ["\u65e5\u672c", "\u8a9e"]))
    assert len(caught) == 1 and "drawn as boxes" in str(caught[0].message)


def test_curves_of_a_training_log(tmp_path, capsys):
    log, out = tmp_path / "metrics.csv", tmp_path / "c.png"
    log.write_text("epoch,gate/0,gate/1,loss,step\n0,0.0,0.0,,0\n0,,,2.5,4\n0,0.5,0.25,2.0,9\n")
    assert read_curves(log, ["gate*"]) == {"gate/0": [(0, 0), (9, 0.5)], "gate/1": [(0, 0), (9, 0.25)]}
    assert list(read_curves(log, ["*"])) == ["gate/0", "gate/1", "loss"]
    assert cli(["plot", "curves", str(log), "--out", str(out)]) == 0 and out.exists()
    assert cli(["plot", "curves", str(log), "--columns", "acc"]) == 2
    assert "no column like acc; it has gate/0, gate/1, loss" in capsys.readouterr().err
    log.write_text("a,b\n1,2\n")
    assert cli(["plot", "curves", str(log)]) == 2


def test_files_that_are_no_results(tmp_path, capsys):
    for content, said in (("{", "cannot be read"), ("[]", "no result of img2vid eval"), ("{}", "no result of")):
        (tmp_path / "x.json").write_text(content)
        assert cli(["plot", str(tmp_path / "x.json")]) == 2
        assert said in capsys.readouterr().err
    later = {"format": 99, "task": "zero_shot", "protocol": {}}
    (tmp_path / "x.json").write_text(json.dumps(later))
    assert cli(["plot", str(tmp_path / "x.json")]) == 2
    assert "is in format 99" in capsys.readouterr().err


def test_numbers_stand_in_rows_and_read_back_alike(tmp_path):
    result = {
        "task": "x",
        "protocol": {},
        "a": [[1, -2], [3, 4.5e-7]],
        "b": ["1,\n 2", "[ 3 ]"],
        "c": [],
        "d": [None, 1],
    }
    text = write_result(result, tmp_path / "x.json").read_text()
    assert "[1, -2]" in text and "[3, 4.5e-07]" in text and json.loads(text) == result


def test_without_matplotlib_the_extra_is_named(results, monkeypatch, capsys):
    import img2vid

    for name in [name for name in sys.modules if name.startswith("img2vid.plots")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(img2vid, "plots")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli(["plot", str(results["zero"])]) == 2
    assert "pip install 'img2vid[plot]'" in capsys.readouterr().err


def test_out_must_be_a_page_or_a_picture(results, tmp_path, capsys):
    assert cli(["plot", str(results["zero"]), "--out", str(tmp_path / "x.pdf")]) == 2
    assert "ends in .html or .png" in capsys.readouterr().err
