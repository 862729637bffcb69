import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import img2vid
from img2vid.cli import main as cli
from img2vid.convert import main
from img2vid.errors import BackboneError, WeightsError
from tests.conftest import randomize, small_clip, small_vit

TINY = ["--backbone", "vit_tiny", "--random-weights", "--image-size", "32", "--num-frames", "2"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder):
    return sorted(os.listdir(folder))


def test_the_command(capsys):
    assert main([*TINY, "--out", "out"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "Loaded timm:vit_tiny",
        "pretrained",
        "copied",
        "new",
        "any clip, bit for bit",
        "Result      OK",
        "Wrote out",
    ):
        assert text in printed
    assert files("out") == ["README.md", "certificate.json", "config.json", "model.safetensors"]
    assert files(".") == ["out"]
    assert json.loads(Path("out/certificate.json").read_text())["ok"]
    model = img2vid.load("out")
    assert model.config.num_frames == 2
    assert model(torch.randn(1, 2, 3, 32, 32)).shape == (1, 192)
    card = Path("out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: img2vid")
    assert "Result      OK" in card


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prefix-mode", "shared"], {"prefix_mode": "shared"}),
        (["--attention", "joint_space_time"], {"attention": "joint_space_time"}),
        (["--attention", "factorised_encoder", "--encoder-layers", "1"], {"encoder_layers": 1}),
        (["--temporal-init", "zeros"], {"temporal_init": "zeros"}),
        (["--gate", "tanh", "--time-embed", "none"], {"gate": "tanh", "time_embed": "none"}),
        (["--gate", "none"], {"gate": "none"}),
        (["--tubelet-size", "2"], {"tubelet_size": 2}),
        (["--num-classes", "5"], {"num_classes": 5}),
        (["--temporal-layers", "every:4"], {"temporal_layers": "every:4"}),
        (["--temporal-layers", "0,3"], {"temporal_layers": (0, 3)}),
        (["--image-size", "32x64"], {"image_size": (32, 64)}),
        (["--backbone-args", '{"drop_path_rate": 0.1}'], {"backbone_args": {"drop_path_rate": 0.1}}),
    ],
    ids=" ".join,
)
def test_every_option_reaches_the_model_and_the_folder(arguments, expected, capsys):
    assert main([*TINY, *arguments, "--out", "out"]) == 0
    model = img2vid.load("out")
    for name, value in expected.items():
        assert getattr(model.config, name) == value
    size = model.tower.image_size
    assert model(torch.randn(1, 2, 3, *size)).shape == (1, model.config.num_classes or 192)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(dtype, capsys):
    assert main([*TINY, "--dtype", dtype, "--out", "out"]) == 0
    assert {p.dtype for p in img2vid.load("out").parameters()} == {getattr(torch, dtype)}


def test_options_from_a_file_and_the_command_line_wins(capsys):
    with open("c.yaml", "w") as file:
        file.write("backbone: vit_tiny\nrandom_weights: true\nimage_size: [32, 32]\nnum_frames: 4\ngate: tanh\n")
    assert main(["--config", "c.yaml", "--num-frames", "2", "--out", "out"]) == 0
    config = img2vid.load("out").config
    assert (config.num_frames, config.gate) == (2, "tanh")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--backbone nano_clip"),
        (["--backbone", "vit_bse"], "Did you mean 'vit_base'"),
        (["--backbone", "vit_tiny"], "--random-weights"),
        (["--backbone", "vit_tiny", "--weights", "missing.pth"], "There is no weights file missing.pth"),
        ([*TINY, "--num-frames", "0"], "num_frames=0"),
        ([*TINY, "--image-size", "33"], "33 x 33 pixels cannot be cut into patches of 16 x 16"),
        ([*TINY, "--temporal-layers", "last:99"], "the backbone has 12 blocks"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--backbone", "timm:resnet50"], "ResNet cannot become"),
        ([*TINY, "--backbone-args", '{"depht": 3}'], "depht"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_error_and_leaves_nothing(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert files(".") == []


@pytest.mark.parametrize(
    "arguments", [["--gate", "sigmoid"], ["--image-size", "a"], ["--backbone-args", "{"], ["--nope"]]
)
def test_bad_options_exit_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*TINY, *arguments])
    assert caught.value.code == 2
    assert files(".") == []


@pytest.mark.parametrize("name", ["norm.bias", "blocks.1.temporal_fc.bias"])
def test_a_failed_certificate_is_a_failed_command(name, monkeypatch, capsys):
    """Sabotage the conversion, not the certificate: an image weight changes on the way, or a gate is not at zero."""
    import img2vid.two_towers

    build = img2vid.two_towers.build_model

    def sabotage(backbone, config):
        model = build(backbone, config)
        with torch.no_grad():
            model.get_parameter(name).add_(1e-3)  # in place, as an honest mistake would
        return model

    monkeypatch.setattr(img2vid.two_towers, "build_model", sabotage)
    assert main([*TINY, "--out", "out"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert not json.loads(Path("out/certificate.json").read_text())["ok"]


def test_a_folder_of_something_else_is_not_touched(capsys):
    os.mkdir("out")
    Path("out/thesis.tex").touch()
    assert main([*TINY, "--out", "out"]) == 2
    assert "no img2vid model" in capsys.readouterr().err
    assert files("out") == ["thesis.tex"]


def test_list(capsys):
    assert main(["--list"]) == 0
    assert "timm:vit_base_patch16_224" in capsys.readouterr().out


def test_inspect_and_certify(capsys):
    assert main([*TINY, "--out", "out"]) == 0
    capsys.readouterr()
    assert cli(["certify", "out", "--num-frames", "1", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert cli(["inspect", "out", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["image_size"] == [32, 32]
    assert cli(["inspect", "vit_base", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == {"pretrained": 85798656, "copied": 28366848, "new": 7093248}
    # TimeSformer's paper counts 0.59 T multiply-adds for 3 crops of 8 frames
    assert facts["flops_per_clip"] / 2 * 3 / 1e12 == pytest.approx(0.59, abs=0.005)
    assert cli(["inspect", "vit_bse"]) == 2
    assert cli(["certify", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert "There is no folder nowhere" in error
    assert "img2vid convert --backbone nowhere --out runs/convert/nowhere" in error  # a backbone's name, perhaps
    assert cli(["certify", "runs/nowhere"]) == 2
    assert "--backbone" not in capsys.readouterr().err  # a folder's, surely


def test_the_folder_of_a_run_says_where_its_model_is(tmp_path):
    with pytest.raises(WeightsError) as caught:
        img2vid.load(tmp_path)
    assert "The model of this run" not in str(caught.value)
    img2vid.convert("nano_clip", num_frames=2).save_pretrained(tmp_path / "model")
    with pytest.raises(WeightsError, match="The model of this run is in") as caught:
        img2vid.load(tmp_path)
    assert str(tmp_path / "model") in str(caught.value)


@pytest.mark.parametrize("texts", ["a photo", ["a photo", "a video"]])
def test_texts_are_to_be_tokens_first(texts):
    with pytest.raises(BackboneError, match="model.tokenize"):
        img2vid.convert("nano_clip", num_frames=2).encode_text(texts)


@pytest.mark.parametrize(
    "settings",
    [
        ["--tubelet-size", "2", "--tubelet-init", "average"],
        ["--tubelet-size", "2"],
        ["--dtype", "bfloat16", "--prefix-mode", "global"],
        ["--dtype", "float16", "--attention", "joint_space_time"],
    ],
    ids=" ".join,
)
def test_folders_are_certified_again(settings, capsys):
    assert main([*TINY, *settings, "--out", "out"]) == 0
    assert cli(["certify", "out"]) == 0
    assert "held" in capsys.readouterr().out


def test_places_that_cannot_be_written_are_refused_first(capsys):
    Path("file").touch()
    for out in ("file/model", "/proc/model"):
        assert main([*TINY, "--out", out]) == 2
        assert "cannot be written" in capsys.readouterr().err
    assert main([*TINY, "--out", "out"]) == 0
    assert cli(["certify", "out", "--num-frames", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_inspect_promises_only_what_convert_does(capsys):
    assert cli(["inspect", "eva02_t", "--json"]) == 0
    promised = json.loads(capsys.readouterr().out)["guarantees"]
    for mode, promise in promised.items():
        attention, prefix_mode = mode.split(" / ")
        options = {"attention": attention, "prefix_mode": prefix_mode, "random_weights": True}
        if promise.startswith("refused"):
            with pytest.raises(img2vid.Img2VidError):
                img2vid.convert("eva02_t", **options)
        else:
            img2vid.convert("eva02_t", **options)


def test_certify_finds_a_changed_folder(capsys):
    from safetensors.torch import load_file, save_file

    assert main([*TINY, "--out", "out"]) == 0
    state = load_file("out/model.safetensors")
    state["blocks.3.temporal_fc.bias"] += 0.1
    save_file(state, "out/model.safetensors")
    capsys.readouterr()
    assert cli(["certify", "out", "--json"]) == 0  # gates may move: that is training
    assert json.loads(capsys.readouterr().out)["gates_moved"] == pytest.approx(0.1)
    state.pop("norm.bias")
    save_file(state, "out/model.safetensors")
    assert cli(["certify", "out"]) == 2
    assert "norm.bias" in capsys.readouterr().err


def test_from_python_by_name_and_by_module():
    model = img2vid.convert("vit_tiny", random_weights=True, num_frames=4, image_size=32)
    assert isinstance(model, img2vid.VideoModel)
    reference = small_vit()
    model = img2vid.convert(copy.deepcopy(reference), num_frames=4)
    assert img2vid.certify(model, reference).ok
    both = img2vid.convert(small_clip())
    assert isinstance(both, img2vid.VideoTextModel)
    tower = img2vid.convert(small_clip().visual, num_classes=3)
    assert tower(torch.randn(1, 2, 3, 32, 32)).shape == (1, 3)


def test_a_timm_module_keeps_its_own_head():
    reference = randomize(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10)).eval()
    model = img2vid.convert(copy.deepcopy(reference))
    clips = torch.randn(2, 3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(clips), reference(clips.flatten(0, 1)).unflatten(0, (2, 3)).mean(1))


def test_bad_settings_from_python():
    with pytest.raises(img2vid.Img2VidError, match="Did you mean 'num_frames'"):
        img2vid.convert("vit_tiny", num_frame=4)
    with pytest.raises(img2vid.Img2VidError, match="expected one of float32"):
        img2vid.convert("vit_tiny", dtype="float8")
    with pytest.raises(img2vid.Img2VidError, match="go with a backbone's name"):
        img2vid.convert(small_vit(), random_weights=True)


def test_convert_stays_a_function_however_it_is_imported():
    code = (
        "import img2vid.convert, img2vid;"
        "m = img2vid.convert('vit_tiny', random_weights=True, image_size=32);"
        "from img2vid.convert import convert; print(type(m).__name__, callable(convert))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "VideoModel True", done.stderr
