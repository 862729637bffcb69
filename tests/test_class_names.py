"""What the numbers of a classifier stand for: from transformers and back, into the folder, and to those asked."""

import json
import types

import pytest
import torch
import transformers
from safetensors.torch import load_file

import img2vid
from img2vid.checkpoints.card import model_card
from img2vid.class_names import checked_class_names, from_id2label
from img2vid.cli import main
from img2vid.config import ConfigError
from img2vid.data.manifest import Row, VideoList
from img2vid.errors import WeightsError
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.own_classes import in_own_classes
from img2vid.evaluation.protocols import Lists
from img2vid.evaluation.zero_shot import Question
from img2vid.export import export_program
from img2vid.interpolation import check_same
from img2vid.training.classes import name_classes, resume_names
from tests.conftest import small_vit

NAMES = ("archery", "air drumming", "zumba")
SHAPE = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
SHAPE |= {"image_size": 32, "num_frames": 4}
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}


def saved(home, kind, **labels):
    if kind == "vivit":
        config = transformers.VivitConfig(tubelet_size=[2, 8, 8], **SHAPE, **labels)
        transformers.VivitForVideoClassification(config).save_pretrained(home / kind)
    else:
        config = transformers.TimesformerConfig(patch_size=8, **SHAPE, **labels)
        transformers.TimesformerForVideoClassification(config).save_pretrained(home / kind)
    return home / kind


def named(names=NAMES):
    model = img2vid.convert(small_vit(), num_frames=4, num_classes=len(names))
    model.class_names = names
    return model


@pytest.mark.parametrize("kind", ["vivit", "hf-timesformer"])
def test_names_of_transformers_come_in_are_kept_and_go_out(kind, tmp_path, capsys):
    path = saved(tmp_path, kind, **LABELS)
    assert main(["import", str(path), "--out", str(tmp_path / "ours")]) == 0
    assert "Classes: archery, air drumming, zumba (3)." in capsys.readouterr().out
    model = img2vid.load(tmp_path / "ours")
    assert model.class_names == NAMES
    assert "print(model.class_names[model(clips).argmax()])" in (tmp_path / "ours" / "README.md").read_text()
    assert main(["inspect", str(tmp_path / "ours")]) == 0
    assert "archery, air drumming, zumba" in capsys.readouterr().out
    img2vid.export_checkpoint(model, tmp_path / "back", kind)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (path, tmp_path / "back"))
    assert after["id2label"] == before["id2label"] and after["label2id"] == before["label2id"]
    theirs = transformers.AutoModelForVideoClassification.from_pretrained(tmp_path / "back")
    assert theirs.config.id2label == LABELS["id2label"]
    assert all(
        torch.equal(tensor, load_file(tmp_path / "back" / "model.safetensors")[key])
        for key, tensor in load_file(path / "model.safetensors").items()
    )


def test_numbers_are_not_taken_for_names(tmp_path):
    path = saved(tmp_path, "hf-timesformer", num_labels=3)
    model = img2vid.import_checkpoint(path)
    assert model.class_names is None
    img2vid.export_checkpoint(model, tmp_path / "back", "hf-timesformer")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["id2label"]["2"] == "LABEL_2"
    model.save_pretrained(tmp_path / "ours")
    assert "class_names" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "class_names" not in model_card(model, None)


@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        ({"0": "a", "1": "b"}, "id2label names 2 classes, but the classifier has 3"),
        ({"0": "a", "1": "b", "7": "c"}, "numbered from 0"),
        (["a", "b", "c"], r"id2label names \['a', 'b', 'c'\]"),
    ],
)
def test_names_that_do_not_fit_the_classifier(id2label, message, tmp_path):
    path = saved(tmp_path, "hf-timesformer", **LABELS)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "id2label": id2label}))
    with pytest.raises(WeightsError, match=message):
        img2vid.import_checkpoint(path)
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "id2label"}))
    assert img2vid.import_checkpoint(path).class_names is None
    assert from_id2label({0: 5, 1: "b"}, 2) == ("5", "b")


IMAGE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def hf_classifier(**labels):
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(intermediate_size=48, **IMAGE, **labels))


def test_names_of_a_module_at_hand(tmp_path):
    """Its classifier stays the image model's own, so it is no ``num_classes`` of ours that has the names."""
    module = hf_classifier(**LABELS)
    clips = torch.randn(2, 3, 3, 32, 32)
    expected = torch.stack([module(clips[:, t]).logits for t in range(3)], dim=1).mean(dim=1)
    model = img2vid.convert(module, num_frames=3)
    assert model.class_names == NAMES and model.num_logits == 3 and model.config.num_classes is None
    torch.testing.assert_close(model(clips), expected)
    model.save_pretrained(tmp_path / "a")
    assert "model.class_names[model(clips).argmax()]" in (tmp_path / "a" / "README.md").read_text()
    for other in (hf_classifier(**LABELS), hf_classifier(num_labels=3)):  # the folder says, whatever the module does
        again = img2vid.load(tmp_path / "a", image_model=other)
        assert again.class_names == NAMES and torch.equal(again(clips), model(clips))
    asked = in_own_classes(model, lists_of([0, 1], ("air_drumming", "zumba"))).videos
    assert [row.label for row in asked.rows] == [1, 2]
    question = Question.to(model, asked, "action", None)
    assert question.own and question.names == list(NAMES)
    numbered = img2vid.convert(hf_classifier(num_labels=3), num_frames=3)
    assert numbered.class_names is None and numbered.num_logits == 3
    assert img2vid.convert(transformers.ViTModel(transformers.ViTConfig(**IMAGE))).num_logits is None
    model.class_names = NAMES[:2]
    with pytest.raises(ConfigError, match="2 class_names .* a classifier of 3 classes"):
        model.save_pretrained(tmp_path / "b")


def test_a_program_of_a_module_at_hand_says_its_names(tmp_path):
    model = img2vid.convert(hf_classifier(**LABELS), num_frames=2).eval()
    written = export_program(model, tmp_path / "a.pt2", "torch-export")
    assert json.loads(written.metadata["class_names"]) == list(NAMES) and written.metadata["output"] == "logits"


def test_names_set_by_hand_are_checked_when_saved_and_when_loaded(tmp_path):
    sizes = {"embed_dim": 48, "depth": 1, "num_heads": 4, "patch_size": 8}
    model = img2vid.convert(
        "timm:vit_tiny_patch16_224", random_weights=True, image_size=32, num_classes=3, backbone_args=sizes
    )
    for wrong in (NAMES[:2], "abc", [1, 2, 3], set(NAMES), {0: "a", 1: "b", 2: "c"}, 3):  # the numbers are places
        model.class_names = wrong
        with pytest.raises(ConfigError, match="class_names"):
            model.save_pretrained(tmp_path / "a")
        assert not (tmp_path / "a").exists()
    model.class_names = list(NAMES)
    model.save_pretrained(tmp_path / "a")
    assert img2vid.load(tmp_path / "a").class_names == NAMES
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    for wrong, message in ((["a"], "1 class_names .* a classifier of 3 classes"), ("abc", "expected a list of texts")):
        (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "class_names": wrong}))
        with pytest.raises(WeightsError, match=message):
            img2vid.load(tmp_path / "a")
    with pytest.raises(ConfigError, match="no classifier"):
        checked_class_names(("a",), None)


# ---- who is asked


def lists_of(labels, class_names):
    rows = tuple(Row(f"{i}.mp4", label) for i, label in enumerate(labels))
    return Lists(VideoList(rows, class_names, "some.csv"), {"some.csv": list(range(len(rows)))})


def test_labels_are_put_into_the_classifiers_numbers():
    lists = lists_of([0, 1, None, 0], ("air_drumming", "zumba"))
    asked = in_own_classes(named(), lists).videos
    assert [row.label for row in asked.rows] == [1, 2, None, 1]
    assert asked.class_names == NAMES  # all of them compete
    numbered = in_own_classes(named(), lists_of([2, 0], None)).videos
    assert [row.label for row in numbered.rows] == [2, 0] and numbered.class_names == NAMES
    same = lists_of([0], NAMES)
    assert in_own_classes(named(), same) is same
    unnamed = img2vid.convert(small_vit(), num_frames=4, num_classes=2)
    assert in_own_classes(unnamed, lists) is lists


def test_classes_that_the_classifier_lacks_are_named():
    with pytest.raises(EvaluationError, match="1 classes .* does not have: air_druming.*Did you mean 'air drumming'"):
        in_own_classes(named(), lists_of([0, 1], ("air_druming", "zumba")))
    with pytest.raises(EvaluationError, match="does not have: 3"):
        in_own_classes(named(), lists_of([0, 3], None))
    with pytest.raises(EvaluationError, match="have the same name"):
        in_own_classes(named(("a b", "a_b", "c")), lists_of([0], ("c",)))


def test_models_of_other_classes_are_not_averaged():
    described = {"kind": "VideoModel", "dtype": "float32", "video": {}}
    assert check_same(["a", "b"], [described, {**described, "class_names": ["x", "y"]}]) == ("x", "y")
    assert check_same(["a", "b"], [described, described]) is None
    with pytest.raises(img2vid.Img2VidError, match="class_names"):
        check_same(["a", "b"], [{**described, "class_names": ["y", "x"]}, {**described, "class_names": ["x", "y"]}])


SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 4, "patch_size": 8}


def test_names_go_into_what_is_made_of_models(tmp_path):
    """Grown, averaged, interpolated, merged: the classifier's numbers mean what they meant, if one of them knows."""
    model = img2vid.convert(
        "timm:vit_tiny_patch16_224", random_weights=True, image_size=32, num_classes=3, backbone_args=SIZES
    )
    model.save_pretrained(tmp_path / "nameless")
    model.class_names = NAMES
    model.save_pretrained(tmp_path / "named")
    for command in (
        ["interpolate", "named", "nameless", "--alpha", "0.5"],
        ["merge", "nameless", "named"],
        ["grow", "named", "--depth", "3"],
        ["graft", "named", "--graft", "lora", "rank=2"],
    ):
        out = tmp_path / command[0]
        given = [str(tmp_path / word) if word in ("named", "nameless") else word for word in command]
        assert main([*given, "--out", str(out)]) == 0
        assert img2vid.load(out).class_names == NAMES


def test_lists_of_other_classes_are_only_learned_never_asked():
    model = named()
    for other in (("boxing", "diving", "rowing"), tuple(reversed(NAMES)), NAMES[:2]):
        with pytest.raises(ConfigError, match="numbered otherwise"):
            name_classes(model, other, learns=False)
        assert model.class_names == NAMES
    name_classes(model, ("Archery", "air_drumming", "zumba"), learns=False)  # spelled otherwise, the same
    name_classes(model, ("boxing", "diving", "rowing"), learns=True)  # a new task
    assert model.class_names == ("boxing", "diving", "rowing")


def test_a_checkpoint_goes_on_with_its_own_names():
    lists = types.SimpleNamespace(class_names=NAMES)
    model = named()
    model.class_names = None
    resume_names(model, {"class_names": NAMES}, lists)
    assert model.class_names == NAMES
    resume_names(model, {"class_names": list(NAMES)}, types.SimpleNamespace(class_names=None))
    with pytest.raises(ConfigError, match="numbered otherwise"):
        resume_names(model, {"class_names": NAMES[::-1]}, lists)
    model.class_names = None
    resume_names(model, {}, lists)
    assert model.class_names is None
