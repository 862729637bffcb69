"""Models of strangers: what describes a model cannot have code run, or weights read that nobody accounts for."""

import builtins
import json
import os

import pytest
import timm
import torch
from safetensors.torch import save_file

import img2vid
from img2vid.backbones import load_backbone
from img2vid.backbones.from_transformers import load_tokenizer
from img2vid.backbones.names import parse_name
from img2vid.errors import BackboneError, WeightsError
from tests.test_transformers import make

CODE = "import os\nos.mkdir(os.environ['IMG2VID_TEST_VICTIM'])\nclass Evil:\n    pass\n"


class RunsCode:
    def __reduce__(self):
        return os.mkdir, (os.environ["IMG2VID_TEST_VICTIM"],)


@pytest.fixture
def victim(tmp_path, monkeypatch):
    """A folder that code of the files would make; and a user who says yes to whatever is asked."""
    monkeypatch.setenv("IMG2VID_TEST_VICTIM", str(tmp_path / "it_ran"))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    return tmp_path / "it_ran"


def with_code(folder, **settings):
    """Code beside a model, and a description that names it."""
    folder.mkdir(exist_ok=True)
    (folder / "evil.py").write_text(CODE)
    if not (folder / "config.json").exists():  # of a type that transformers has no tokenizer of its own for
        (folder / "config.json").write_text(json.dumps({"model_type": "custom"}))
    described = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def described_clip(folder, **text):
    """A folder of open_clip with small towers."""
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 200, "width": 32, "heads": 2, "layers": 1, **text}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder


def test_tokenizers_of_transformers_run_no_code_and_ask_nobody(tmp_path, victim):
    make("CLIPModel").save_pretrained(tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    (with_code(tmp_path / "clip") / "config.json").write_text(json.dumps(config))
    model = img2vid.convert(f"hf:{tmp_path / 'clip'}", num_frames=2)
    with pytest.raises(BackboneError, match="holds no tokenizer"):
        model.tokenize(["a text"])
    given = parse_name(f"hf:{with_code(tmp_path / 'tokenizer')}")  # as img2vid caption --tokenizer FOLDER
    with pytest.raises(BackboneError, match="holds no tokenizer that transformers can load .*contains custom code"):
        load_tokenizer(given)
    assert not victim.exists()


def test_a_description_of_open_clip_cannot_ask_for_trust(tmp_path, victim):
    """Its ``tokenizer_kwargs`` go to transformers as they are."""
    trust = {"trust_remote_code": True}
    folder = described_clip(tmp_path / "clip", hf_tokenizer_name="evil/tokenizer", tokenizer_kwargs=trust)
    model = img2vid.convert(f"open_clip:local-dir:{with_code(folder)}", num_frames=2, random_weights=True)
    with pytest.raises(BackboneError, match="The tokenizer that open_clip:.* describes cannot be built"):
        model.tokenize(["a text"])
    assert not victim.exists()


def test_text_towers_run_no_code_and_ask_nobody(tmp_path, victim):
    described = {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}
    (with_code(tmp_path / "text") / "config.json").write_text(json.dumps(described))
    folder = described_clip(tmp_path / "clip", hf_model_name=str(tmp_path / "text"))
    with pytest.raises(BackboneError, match="cannot be built: ValueError: The repository .* contains custom code"):
        load_backbone(f"open_clip:local-dir:{folder}", random_weights=True)
    assert not victim.exists()


# ---- arguments of factories


def saved_model(tmp_path, backbone, **arguments):
    """A model folder whose description was changed by somebody."""
    model = img2vid.convert(backbone, random_weights=True, image_size=32, num_frames=2)
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["video"]["backbone_args"] = {**config["video"].get("backbone_args", {}), **arguments}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return tmp_path / "model"


def test_a_description_of_ours_cannot_have_other_files_read(tmp_path, victim):
    torch.save(RunsCode(), tmp_path / "evil.pth")
    described_clip(tmp_path / "clip")
    arguments = {"pretrained_image_path": str(tmp_path / "evil.pth"), "weights_only": False}
    folder = saved_model(tmp_path, f"open_clip:local-dir:{tmp_path / 'clip'}", **arguments)
    with pytest.raises(WeightsError, match="pretrained_image_path, weights_only: .* takes no weights by its arguments"):
        img2vid.load(folder)
    assert not victim.exists()


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained"])
def test_a_factory_loads_nothing_by_its_arguments(argument, tmp_path):
    """timm would read the file, and say nothing of what it has left out."""
    with pytest.raises(BackboneError, match=f"{argument}: timm:.* takes no weights by its arguments.*--weights FILE"):
        load_backbone("vit_tiny", random_weights=True, arguments={argument: str(tmp_path / "a.pth")})


# ---- pretrained weights that fill a part


def published(tmp_path, **shape):
    """A file in the place of timm's download."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=1000, **shape)
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    return {"pretrained_cfg_overlay": {"file": str(tmp_path / "timm.safetensors")}}


def test_what_pretrained_weights_lack_is_not_left_at_random(tmp_path):
    arguments = {"depth": 2, **published(tmp_path, depth=1)}
    with pytest.raises(WeightsError, match=r"do not fill this model(.|\n)*blocks\.1\.attn\.proj\.bias(.|\n)*--weights"):
        load_backbone("vit_tiny", arguments=arguments)
    with pytest.raises(WeightsError, match=r"blocks\.0\.ls1\.gamma"):
        load_backbone("vit_tiny", arguments={**arguments, "depth": 1, "init_values": 1e-5})


def test_what_pretrained_weights_have_too_much_is_said(tmp_path):
    arguments = {"depth": 1, **published(tmp_path, depth=2)}
    backbone = load_backbone("vit_tiny", arguments=arguments)
    assert "blocks.1.norm1.bias" in backbone.report.dropped and not backbone.report.missing
    whole = load_backbone("vit_tiny", arguments={**arguments, "depth": 2})
    assert whole.report.dropped == []  # its classifier, which no backbone has, is timm's to leave out
    assert torch.equal(whole.model.blocks[0].norm1.bias, backbone.model.blocks[0].norm1.bias)
