"""Programs that run without img2vid compute what the model computes, for any batch and any number of frames."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open

import img2vid
from img2vid import export, programs
from img2vid.cli import main
from img2vid.export import ExportError, export_program
from tests.conftest import randomize, small_clip, small_vit

JOINT = {"attention": "joint_space_time", "prefix_mode": "shared"}
SHAPES = [(1, 1), (3, 1), (1, 4), (2, 7)]  # not those that are checked when it is written


def make(image_model=None, **settings):
    image_model = small_vit(depth=1) if image_model is None else image_model
    return randomize(img2vid.convert(image_model, **{"num_frames": 4, **settings}), seed=3).eval()


def agrees(run, model, tubelet_size=1, shapes=SHAPES):
    with torch.no_grad():
        for batch, steps in shapes:
            clips = torch.randn(batch, steps * tubelet_size, 3, 32, 32)
            torch.testing.assert_close(run(clips), model(clips), atol=1e-5, rtol=1e-4)


def onnx_run(path):
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefix_mode": "shared"},
        {"prefix_mode": "global"},
        {"causal": True},
        pytest.param(JOINT, marks=pytest.mark.slow),
        pytest.param({"attention": "factorised_encoder"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_onnx(settings, tmp_path):
    model = make(**settings)
    written = export_program(model, tmp_path / "model.onnx", "onnx")
    assert written.max_difference < 1e-5 and (1, 1, 3, 32, 32) in written.differences
    agrees(onnx_run(tmp_path / "model.onnx"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("format", ["torch-export", "torchscript"])
@pytest.mark.parametrize("settings", [{}, {"prefix_mode": "global"}, {"causal": True, "num_frames": 3}, JOINT], ids=str)
def test_programs_of_torch(format, settings, tmp_path):
    model, path = make(**settings), tmp_path / "model.pt2"
    export_program(model, path, format)
    files = {programs.METADATA: ""}
    if format == "torch-export":
        run = torch.export.load(path, extra_files=files).module()
    else:
        run = torch.jit.load(path, _extra_files=files)
    agrees(run, model)
    assert json.loads(files[programs.METADATA])["dynamic"] == "batch, frames (T >= 1)"


def test_onnx_from_pixels_folded_in_tubelets(tmp_path):
    model = make(tubelet_size=2, num_classes=5)
    written = export_program(model, tmp_path / "model.onnx", "onnx", pixels=True, fold=True)
    assert written.max_difference > 0 and written.metadata["folded"] == "true"
    pixels = torch.randint(0, 256, (3, 2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(model.normalize(pixels))  # unfused again
    assert all(getattr(block, "fused", None) is None for block in model.blocks)
    torch.testing.assert_close(onnx_run(tmp_path / "model.onnx")(pixels), expected, atol=1e-5, rtol=1e-4)
    file = onnx.load(tmp_path / "model.onnx")
    about = {entry.key: entry.value for entry in file.metadata_props}
    assert about["opset"] == str(file.opset_import[0].version)
    assert about["version.onnxruntime"] == onnxruntime.__version__ and about["version.torch"] == torch.__version__
    assert json.loads(about["config"])["tubelet_size"] == 2 and json.loads(about["mean"])
    given, answer = (
        onnxruntime.InferenceSession(tmp_path / "model.onnx").get_inputs()[0],
        file.graph.output[0],
    )
    assert (given.name, given.type, given.shape[2:]) == ("pixels", "tensor(uint8)", [3, 32, 32])
    assert given.shape[0] == "batch" and isinstance(given.shape[1], str)
    assert answer.name == "logits" and answer.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_torch_export_of_tubelets_says_what_it_cannot(tmp_path):
    model = make(tubelet_size=2)
    written = export_program(model, tmp_path / "model.pt2", "torch-export")
    assert written.metadata["dynamic"] == "batch, frames (T >= 4)"
    agrees(torch.export.load(tmp_path / "model.pt2").module(), model, 2, [(1, 2), (3, 5)])


def test_both_towers_of_a_video_text_model(tmp_path):
    model = make(small_clip())
    export_program(model, tmp_path / "video.onnx", "onnx", fold=True)
    agrees(onnx_run(tmp_path / "video.onnx"), model.encode_video)
    written = export_program(model, tmp_path / "text.onnx", "onnx", text=True)
    assert float(written.metadata["logit_scale"]) == pytest.approx(model.logit_scale.exp().item())
    tokens = torch.randint(1, 200, (5, 16))
    with torch.no_grad():
        expected = model.encode_text(tokens)
    torch.testing.assert_close(onnx_run(tmp_path / "text.onnx")(tokens), expected, atol=1e-5, rtol=1e-4)


def test_half_precision(tmp_path):
    export_program(make().half(), tmp_path / "half.ts", "torchscript", pixels=True)
    assert export_program(make().bfloat16(), tmp_path / "b.pt2", "torch-export").metadata["dtype"] == "bfloat16"
    with pytest.raises(ExportError, match=r"no bfloat16 on the CPU.*--dtype float32"):
        export_program(make().bfloat16(), tmp_path / "b.onnx", "onnx")


def test_all_weights_in_one_file(tmp_path):
    model = make()
    export_program(model.fuse(), tmp_path / "all.safetensors", "safetensors")
    with safe_open(tmp_path / "all.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in model.state_dict().items())
        assert json.loads(file.metadata()["img2vid"])["video"]["num_frames"] == 4


# ---- a wrong program never arrives


@pytest.mark.parametrize("format", ["torchscript", "torch-export"])
def test_a_program_that_computes_something_else_is_not_kept(format, tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_text("what was there before")
    writer = programs.WRITERS[format]
    monkeypatch.setitem(programs.WRITERS, format, lambda *args: lambda x: writer(*args)(x) * 1.01)
    with pytest.raises(ExportError, match=r"differs from the model by .* is allowed\. Nothing was written"):
        export_program(make(), path, format)
    assert path.read_text() == "what was there before" and list(tmp_path.iterdir()) == [path]


def test_a_program_that_is_fixed_to_its_frames_is_found_out(tmp_path, monkeypatch):
    model = make()

    class Fixed(programs.Program):
        def forward(self, x):
            frames = int(x.shape[1]) if not torch.jit.is_tracing() else 3
            return super().forward(x[:, :frames])

    monkeypatch.setattr(export, "Program", Fixed)
    with pytest.raises(ExportError, match=r"on \(1, 5, 3, 32, 32\) as clips.*Use --format onnx or torch-export"):
        export_program(model, tmp_path / "model.ts", "torchscript")
    assert list(tmp_path.iterdir()) == []


def test_not_a_number_is_a_difference(tmp_path, monkeypatch):
    monkeypatch.setitem(programs.WRITERS, "torchscript", lambda *args: lambda x: torch.full((len(x), 48), torch.nan))
    with pytest.raises(ExportError, match="differs from the model by nan"):
        export_program(make(), tmp_path / "model.ts", "torchscript")


@pytest.mark.parametrize(
    ("format", "arguments", "message"),
    [
        ("onxn", {}, "Did you mean 'onnx'"),
        ("onnx", {"text": True}, "has no text tower"),
        ("safetensors", {"fold": True}, "weights, under the names the model has"),
        ("torch-export", {}, r"end in \.pt2; name it .*model\.pt2"),
    ],
)
def test_what_is_asked_for_wrongly(format, arguments, message, tmp_path):
    with pytest.raises(img2vid.Img2VidError, match=message):
        export_program(make(), tmp_path / "model.x", format, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_models_and_places_that_do_not_fit(tmp_path, monkeypatch, capsys):
    with pytest.raises(ExportError, match="is in training mode"):
        export_program(make().train(), tmp_path / "model.onnx", "onnx")
    with pytest.raises(img2vid.Img2VidError, match="Nothing can be folded"):
        export_program(make(**JOINT), tmp_path / "model.ts", "torchscript", fold=True)
    with pytest.raises(ExportError, match="are about the video tower"):
        export_program(make(small_clip()), tmp_path / "model.ts", "torchscript", fold=True, text=True)
    with pytest.raises(ExportError, match="is a folder"):
        export_program(make(), tmp_path, "onnx")
    (tmp_path / "file").touch()
    # what can be said without the model is said before it is looked for
    assert main(["export", str(tmp_path / "gone"), "--format", "onnx", "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "gone"), "--format", "vivit", "--out", str(tmp_path)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    with pytest.raises(ExportError, match="cannot be written"):
        export_program(make(), tmp_path / "file" / "model.ts", "torchscript")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"needs onnxscript\. Run: pip install 'img2vid\[export\]'"):
        export_program(make(), tmp_path / "model.onnx", "onnx")
    assert main(["export", str(tmp_path / "gone"), "--format", "onnx", "--out", str(tmp_path / "model.onnx")]) == 2
    assert "needs onnxscript" in capsys.readouterr().err


# ---- as commands


def test_on_the_command_line_and_on_a_video(tmp_path, motion_set, capsys):
    img2vid.convert("nano_clip", num_frames=4).save_pretrained(tmp_path / "ours")
    folder, out = str(tmp_path / "ours"), tmp_path / "model.onnx"
    assert main(["export", folder, "--format", "onnx", "--pixels", "--fold", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"opset: \d+", said) and f"version.onnxruntime: {onnxruntime.__version__}" in said
    assert re.search(r"Max \|difference\| from eager: [0-9.e-]+\.", said)

    video = next(Path(motion_set).rglob("*.mp4"))
    script = Path(__file__).parents[1] / "scripts" / "run_onnx.py"
    ran = subprocess.run([sys.executable, script, out, video, "6"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    model = img2vid.load(folder)
    with torch.no_grad():
        clip = img2vid.read_clip(video, num_frames=6, short_side=32)
        expected = model.encode_video(model.normalize(clip[None]))[0].numpy()
    shown = np.array([float(number) for number in re.findall(r"-?\d+\.\d*(?:e-?\d+)?", ran.stdout)])
    np.testing.assert_allclose(shown, expected, atol=1e-4)
    code = [line for line in script.read_text().split('"""')[2].splitlines() if line.strip()]
    assert len(code) == 10

    assert main(["export", folder, "--format", "image", "--fold", "--out", str(tmp_path / "i.safetensors")]) == 2
    assert "--fold: only for --format onnx" in capsys.readouterr().err
    arguments = ["export", folder, "--format", "torchscript", "--dtype", "bfloat16", "--text"]
    assert main([*arguments, "--out", str(tmp_path / "text.ts")]) == 0
    said = capsys.readouterr()
    assert "dtype: bfloat16" in said.out and "Warning" not in said.err


@pytest.mark.parametrize(
    ("format", "quirks"), [("onnx", ()), ("torch-export", ("nearest_positions",)), ("torchscript", ())]
)
def test_another_size_than_the_models_own(quirks, format, tmp_path):
    """Positions are resampled inside the program, by the model's own rule, and batch and frames stay open."""
    model = make(quirks=quirks, prefix_mode="shared")
    path = tmp_path / "model.pt2"
    written = export_program(model, path, format, image_size=(48, 24))
    assert {shape[3:] for shape in written.differences} == {(48, 24)} and written.max_difference < 1e-4
    assert written.metadata["image_size"] == "[48, 24]"
    clips = torch.randn(1, 7, 3, 48, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(clips)
    if format == "onnx":
        got = torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"clips": clips.numpy()})[0])
    else:
        got = (torch.export.load(path).module() if format == "torch-export" else torch.jit.load(path))(clips)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (36, 36), (48, 48)])
def test_no_program_computes_something_at_a_size_it_was_not_made_for(shape, tmp_path):
    """A bare trace would: of as many patches it takes positions that are not theirs, and crops odd sizes."""
    model = make(tubelet_size=2)
    export_program(model, tmp_path / "model.ts", "torchscript")
    program = torch.jit.load(tmp_path / "model.ts")
    with torch.no_grad():
        assert program(torch.zeros(1, 2, 3, 32, 32)).shape == (1, 48)
        message = (
            r"takes clips \(B, T, C, H, W\) of \[3, 32, 32\](.|\n)*--image-size HEIGHTxWIDTH; \[1, 4, 3, {}, {}\] given"
        )
        with pytest.raises(Exception, match=message.format(*shape)):
            program(torch.zeros(1, 4, 3, *shape))
        with pytest.raises(Exception, match="T a multiple of 2"):
            program(torch.zeros(1, 3, 3, 32, 32))
    export_program(make(small_clip()), tmp_path / "text.ts", "torchscript", text=True)
    with pytest.raises(Exception, match=r"takes token ids \(B, L\) of \[\d+\]"):
        torch.jit.load(tmp_path / "text.ts")(torch.ones(1, 5, dtype=torch.long))


def test_sizes_that_cannot_be(tmp_path):
    with pytest.raises(img2vid.Img2VidError, match="30 x 30|30"):
        export_program(make(), tmp_path / "a.onnx", "onnx", image_size=30)
    with pytest.raises(ExportError, match="--image-size are about the video tower"):
        export_program(make(small_clip()), tmp_path / "a.onnx", "onnx", image_size=48, text=True)
    with pytest.raises(ExportError, match="--fold and --image-size are for"):
        export_program(make(), tmp_path / "a.safetensors", "safetensors", image_size=48)
    assert not any(tmp_path.iterdir())
