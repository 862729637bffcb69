"""Bad input, from files, shells and Python, ends in one error that says what was given, expected, and what to do."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import img2vid
from img2vid.cli import main as cli
from img2vid.command import run_command
from img2vid.config import VideoConfig
from img2vid.convert import main
from img2vid.options import GROUPS
from tests.conftest import hear_interrupts, randomize, small_clip

NANO = ["--backbone", "nano_clip", "--random-weights", "--num-frames", "2"]
TINY = ["--backbone", "vit_tiny", "--random-weights", "--image-size", "32", "--num-frames", "2"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*NANO, "--num-frames", "1000000000000"], "at most 65,536"),
        ([*NANO, "--num-classes", "1000000000000"], "at most 1,000,000"),
        ([*NANO, "--attention", "factorised_encoder", "--encoder-layers", "100000000"], "at most 128"),
        ([*NANO, "--image-size", "100000000"], "at most 16,384"),
        ([*TINY, "--backbone-args", '{"embed_dim": 7}'], "{'embed_dim': 7}: AssertionError: dim should be divisible"),
        ([*TINY, "--backbone-args", '{"patch_size": 0}'], "ZeroDivisionError"),
        ([*TINY, "--backbone-args", '{"in_chans": 0}'], "in_chans=0 is not supported"),
        ([*NANO, "--backbone-args", '{"foo": 1}'], "nano_clip cannot be built with {'foo': 1}: TypeError"),
        (["--backbone", "vit_tiny", "--weights", ""], "weights is empty"),
        ([*NANO, "--out", ""], "out is empty"),
        ([*NANO, "--config", ""], "--config is empty"),
        ([*NANO, "--out", "c" * 300], "File name too long"),
        ([*NANO, "--certify-frames", "0"], "certify_frames=0"),
        ([*NANO, "--certify-size", "33"], "patches of 4 x 4"),
        (["--backbone", "."], "It is a folder, and holds no model"),
        (["--backbone", "a" * 5000], "aaa...aaa"),
        (["--backbone", "[/red]"], "Unknown backbone '[/red]'"),
        (["--backbone", "timm:hf-hub:a/b"], "timm:NAME.TAG"),
        (["--backbone", "open_clip:local-dir:"], "a folder is expected"),
        (["--backbone", "open_clip:local-dir:nowhere"], "is no folder with an open_clip_config.json"),
        (["--backbone", "open_clip:hf-hub:a/b"], "open_clip:local-dir:FOLDER"),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, list) else "",
)
def test_commands_refuse(arguments, message, capsys, in_a_folder_of_its_own):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error) < 1000
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\xff\x00", "not text; expected YAML or JSON in UTF-8"),
        ("backbone_args: hello", "backbone_args='hello': expected arguments by name"),
        ("weights: 5", "weights=5: expected a text"),
        ("num_frames: '8'", "num_frames='8': expected a whole number"),
        ("backbone: 5", "backbone=5: expected a text"),
        ("out: [1]", "out=[1]"),
        ("random_weights: 'yes'", "expected true or false"),
        ("temporal_layers: [0, a]", "temporal_layers='a'"),
        ("image_size: true", "image_size=True"),
        ("num_frames: 1" + "0" * 5000, "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("&a [*a]", "expected options by name"),
        ("1: 2", "unknown option 1"),
        ("certify_frames: 3", "certify_frames=3"),
        ("certify_size: x", "certify_size='x'"),
        ('backbone: "nano\\0clip"', "zero byte"),
        ("", "expected options by name"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_option_files_refuse(content, message, capsys):
    Path("a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    text = str(content)
    backbone = [] if text.startswith("backbone:") else ["--backbone", "nano_clip"]
    random_weights = [] if "weights" in text else ["--random-weights"]
    assert main(["--config", "a.yaml", *backbone, *random_weights]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ([timm.models.VisionTransformer], {}, "The class VisionTransformer was given. Build it first"),
        ([None], {}, "None is of type NoneType, not a model"),
        ([Path("somewhere")], {}, "path as text"),
        ([VideoConfig()], {}, "Write img2vid.convert"),
        (["nano_clip", {"num_frames": 2}], {}, "expected a VideoConfig"),
        (["nano_clip"], {"weights": {"a": torch.zeros(1)}}, "weights is a state dict"),
        (["nano_clip"], {"weights": 5}, "expected a file's path"),
        (["nano_clip"], {"weights": ""}, "is no path"),
        (["nano_clip"], {"dtype": 5}, "dtype=5"),
        (["nano_clip"], {"num_frames": torch.tensor(4)}, "num_frames=tensor"),
        (["nano_clip"], {"backbone_args": 5}, "backbone_args=5"),
        (["vit_tiny", VideoConfig("vit_base", backbone_args={"depth": 2})], {}, "which are for vit_base"),
        ([torch.nn.DataParallel(torch.nn.Linear(1, 1))], {}, "what it wraps: model.module"),
    ],
    ids=lambda value: repr(value)[:25],
)
def test_python_refuses(arguments, settings, message):
    with pytest.raises(img2vid.Img2VidError, match=message):
        img2vid.convert(*arguments, **settings)


def test_a_config_gives_settings_and_names_override_it():
    config = VideoConfig(num_frames=np.int64(3), gate="tanh")
    for model in (
        img2vid.convert("nano_clip", config, random_weights=True),
        img2vid.convert("nano_clip", config=config, random_weights=True),
    ):
        assert (model.config.num_frames, model.config.gate) == (3, "tanh")
        assert type(model.config.num_frames) is int
    other = img2vid.convert("nano_clip", model.config, random_weights=True, num_frames=5)
    assert (other.config.num_frames, other.config.gate) == (5, "tanh")


def test_help_shows_every_setting(capsys, monkeypatch):
    import inspect
    from dataclasses import fields

    settings = {spec.name for spec in fields(VideoConfig)} - {"backbone"}
    from img2vid.convert import convert

    for named in (convert, img2vid.convert):  # the latter is the module, once that has been imported
        assert settings <= inspect.signature(named).parameters.keys()
    assert all(f"{name}: " in convert.__doc__ for name in settings)
    assert sorted(settings) == sorted(name for names in GROUPS.values() for name in names)
    monkeypatch.setenv("COLUMNS", "300")  # no line is broken
    for command in (["convert", "--help"], ["inspect", "--help"]):
        with pytest.raises(SystemExit):
            cli(command)
        shown = capsys.readouterr().out
        assert all("--" + name.replace("_", "-") in shown for name in settings - {"grafts"})
        assert "--graft TYPE" in shown
        assert all(text in shown for text in ("224x320", "every:2", '{"drop_path_rate": 0.1}', "\ntime:"))


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from img2vid.cli import main\n"
        "for words in (['--help'], ['convert', '--help'], ['inspect', '--help']):\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "sys.exit(str({'torch', 'timm', 'open_clip', 'rich'} & set(sys.modules)) if 'torch' in sys.modules else 0)"
    )
    for flags in ([], ["-OO"]):  # without docstrings too
        done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_images_of_one_channel():
    model = img2vid.convert("vit_tiny", random_weights=True, image_size=32, backbone_args={"in_chans": 1, "depth": 2})
    clips = model.normalize(torch.randint(0, 256, (1, 2, 1, 32, 32)))
    assert clips.shape == (1, 2, 1, 32, 32)
    assert model(clips).shape == (1, 192)
    assert img2vid.certify(model, num_frames=[1, 2]).ok


def test_arguments_that_change_the_architecture_do_not_fit_pretrained_weights():
    save_file(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), "w.safetensors")
    arguments = {"depth": 1, "embed_dim": 96, "pretrained_cfg_overlay": {"file": "w.safetensors"}}
    with pytest.raises(img2vid.Img2VidError, match="size mismatch.* need --random-weights"):
        img2vid.load_backbone("vit_tiny", arguments=arguments)


# ---- model folders and open_clip folders


def test_a_model_folder_is_no_backbone_but_its_settings_can_be_used_again(capsys):
    assert main([*NANO, "--gate", "tanh", "--certify-frames", "1", "2", "--certify-size", "16", "--out", "ok"]) == 0
    tried = json.loads(Path("ok/certificate.json").read_text())["comparisons"]
    assert {row["num_frames"] for row in tried} == {1, 2}
    capsys.readouterr()
    assert main(["--backbone", "ok"]) == 2
    error = capsys.readouterr().err
    assert "already is a video model: img2vid.load('ok')" in error
    assert "--config ok/config.json" in error
    assert main(["--config", "ok/config.json", "--random-weights", "--num-frames", "3", "--out", "again"]) == 0
    config = img2vid.load("again").config
    assert (config.backbone, config.gate, config.num_frames) == ("nano_clip", "tanh", 3)
    capsys.readouterr()
    assert cli(["certify", "ok", "--certify-frames", "1", "3", "--certify-size", "16", "--json"]) == 0
    assert {row["num_frames"] for row in json.loads(capsys.readouterr().out)["comparisons"]} == {1, 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--certify-size", "0"], "certify_size=(0, 0)"),
        (["--certify-frames", "0"], "certify_frames=0"),
        (["--certify-frames", "99999"], "at most 65,536"),
    ],
    ids=str,
)
def test_impossible_clips_are_refused_before_the_folder_is_read(arguments, message, capsys):
    assert cli(["certify", "nowhere", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_certify_size_is_the_size_of_the_clips(monkeypatch, capsys):
    import img2vid.proof.evidence

    seen = set()
    make_clips = img2vid.proof.evidence.make_clips
    noted = lambda *a, **k: seen.add((clips := make_clips(*a, **k)).shape[-2:]) or clips  # noqa: E731
    monkeypatch.setattr(img2vid.proof.evidence, "make_clips", noted)
    assert main([*NANO, "--certify-size", "16x24", "--certify-frames", "1", "2", "--out", "ok"]) == 0
    assert seen == {(16, 24)}


def test_inspection_follows_the_settings_of_a_folder_and_those_given():
    model = img2vid.convert("nano_clip", random_weights=True, num_frames=4, gate="none", tubelet_size=2)
    model.save_pretrained("ok")
    facts = img2vid.inspect("ok")
    assert facts.guarantees["divided_space_time / per_frame"].startswith("none: ")
    assert "central frame" in facts.guarantees["space_only / per_frame"]
    assert facts.mode == "divided_space_time / per_frame"
    assert "divided_space_time / per_frame (this one)" in str(facts)
    wide = img2vid.inspect("ok", num_frames=16)
    assert wide.num_frames == 16
    assert wide.flops_per_clip > 3 * facts.flops_per_clip
    assert img2vid.inspect("nano_clip", attention="joint_space_time").mode == "joint_space_time / per_frame"
    with pytest.raises(img2vid.Img2VidError, match="of type int"):
        img2vid.inspect(5)


def open_clip_folder(folder: str) -> torch.nn.Module:
    shape = {
        "embed_dim": 24,
        "vision_cfg": {"layers": 3, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    os.mkdir(folder)
    described = {"model_cfg": shape, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    Path(folder, "open_clip_config.json").write_text(json.dumps(described))
    donor = small_clip(text_cfg=shape["text_cfg"])
    save_file({k: v.contiguous() for k, v in donor.state_dict().items()}, f"{folder}/open_clip_model.safetensors")
    return donor


def test_an_open_clip_folder_is_a_backbone(in_a_folder_of_its_own, monkeypatch, capsys):
    donor = open_clip_folder("their model")
    assert main(["--backbone", "their model"]) == 2
    assert "--backbone open_clip:local-dir:their model" in capsys.readouterr().err
    assert main(["--backbone", "open_clip:local-dir:their model", "--num-frames", "2", "--out", "ok"]) == 0
    os.mkdir("elsewhere")
    monkeypatch.chdir("elsewhere")  # the name that was saved does not depend on where one is
    model = img2vid.load("../ok")
    assert model.visual.tower.preprocess.mean == (0.1, 0.2, 0.3)
    images, text = torch.randn(2, 3, 32, 32), model.tokenize(["a cat"])
    assert text.shape == (1, 16)
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), donor.encode_image(images))
        assert torch.equal(model.encode_text(text), donor.encode_text(text))


def test_open_clip_folders_that_lack_something():
    open_clip_folder("folder")
    os.remove("folder/open_clip_model.safetensors")
    name = "open_clip:local-dir:folder"
    with pytest.raises(img2vid.Img2VidError, match="holds no weights"):
        img2vid.load_backbone(name)
    assert img2vid.load_backbone(name, random_weights=True).has_text
    for text, message in (("{", "not valid JSON"), ("{}", "describes no model"), ("[]", "not valid JSON")):
        Path("folder/open_clip_config.json").write_text(text)
        with pytest.raises(img2vid.Img2VidError, match=message):
            img2vid.load_backbone(name, random_weights=True)


def test_what_is_missing_without_a_network_is_named_with_the_ways_that_apply():
    with pytest.raises(img2vid.Img2VidError) as caught:
        img2vid.load_backbone("open_clip:roberta-ViT-B-32", random_weights=True)
    assert "the Hugging Face config roberta-base, from which the text tower" in str(caught.value)
    with pytest.raises(img2vid.Img2VidError) as tokenizer:
        from img2vid.backbones.tokenizers import tokenizer_for

        tokenizer_for("open_clip:roberta-ViT-B-32")
    with pytest.raises(img2vid.Img2VidError) as folder:
        img2vid.VideoModel.from_pretrained("nobody/nothing")
    for error in (caught, tokenizer, folder):
        assert "run once with a network" in str(error.value)
        assert "--weights" not in str(error.value)
        assert "--random-weights" not in str(error.value)
    with pytest.raises(img2vid.Img2VidError, match="No repository can have such a name"):
        img2vid.VideoModel.from_pretrained("no such name !!")


# ---- terminals, pipes, interruptions


def test_what_is_loaded_is_said_with_its_size(capsys, caplog):
    """Once: with a root logger that prints too, as after a library has logged, no line comes twice (caplog is one)."""
    weights = randomize(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2)).state_dict()
    save_file(weights, "w.safetensors")
    arguments = ["--backbone", "vit_tiny", "--backbone-args", '{"depth": 2}', "--weights", "w.safetensors"]
    assert main([*arguments, "--num-frames", "2", "--certify-size", "32", "--certify-frames", "1", "--out", "ok"]) == 0
    printed = capsys.readouterr().out
    for text in ("(1.1 M parameters) from w.safetensors, 4 MB.", "Inserting time", "Certifying: ", "Writing ok"):
        assert text in printed
    assert caplog.messages == []
    assert logging.getLogger("img2vid").handlers == [] and logging.getLogger("img2vid").propagate


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(img2vid.__file__).parents[1]), **changes}


def test_terminals_that_know_ascii_only():
    command = [sys.executable, "-m", "img2vid", "convert", *NANO, "--out", "ünï [/b] \udcff", "--certify-frames", "1"]
    ascii_only = environment(PYTHONIOENCODING="ascii", COLUMNS="40", HOME="/nonexistent")
    done = subprocess.run(command, capture_output=True, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert b"Result" in done.stdout
    assert Path("ünï [/b] \udcff/model.safetensors").exists()


def test_an_interrupted_conversion_leaves_nothing():
    command = [sys.executable, "-m", "img2vid.convert", *NANO, "--num-frames", "32", "--out", "ok"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, env=environment(), preexec_fn=hear_interrupts)
    for line in process.stdout:
        if "Certifying" in line:
            break
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1]
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert os.listdir() == []


class Closed(io.StringIO):
    """A pipe whose reader has gone, or a disk that is full."""

    def __init__(self, error: type[OSError], *what: object) -> None:
        super().__init__()
        self.error = error(*what)

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("stream", "code", "message"),
    [
        (Closed(BrokenPipeError, 32, "Broken pipe"), 141, ""),
        (Closed(OSError, 28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (None, 0, ""),
    ],
    ids=["head", "full disk", "closed"],
)
def test_output_that_goes_nowhere(stream, code, message, monkeypatch, capsys):
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli(["inspect", "nano_clip", "--json"]) == code
    assert errors.getvalue() == message


def test_memory_that_does_not_suffice_is_an_error_and_bugs_stay_bugs(capsys):
    assert run_command(lambda: torch.empty(10**15)) == 2
    assert "does not fit into memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))
