"""Names, templates, the rule of the ensemble, and the lists of classes."""

import pytest
import torch
from torch.nn import functional as F

from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.prompts import (
    CLASS_LISTS,
    TEMPLATE_SETS,
    class_embeddings,
    class_list,
    embed_texts,
    prompts,
    read_templates,
    readable,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HandstandPushups", "handstand pushups"),
        ("YoYo", "yo yo"),
        ("TaiChi", "tai chi"),
        ("brush_hair", "brush hair"),
        ("Shotput", "shotput"),
        ("Pushing something from left to right", "pushing something from left to right"),
        ("playing TV", "playing TV"),
        ("TVShow", "TV show"),
        ("air drumming", "air drumming"),
        ("massaging person's head", "massaging person's head"),
        ("A", "a"),
    ],
)
def test_readable(name, expected):
    assert readable(name) == expected


def test_ensemble_is_the_mean_of_normalised_templates(nano):
    names, templates = ["TaiChi", "brush_hair", "run"], TEMPLATE_SETS["action"]
    got = class_embeddings(nano, names, templates)
    for row, name in zip(got, ["tai chi", "brush hair", "run"], strict=True):
        with torch.no_grad():
            each = [nano.encode_text(nano.tokenize(t.format(name)))[0] for t in templates]
        mean = sum(F.normalize(x, dim=0) for x in each) / len(each)
        torch.testing.assert_close(row, F.normalize(mean, dim=0), atol=1e-5, rtol=1e-4)
    assert prompts(["YoYo"], ["a {}!", "{}"]) == [["a yo yo!", "yo yo"]]


def test_templates_of_sets_files_and_lists(tmp_path):
    assert all(read_templates(name) == (templates, name) for name, templates in TEMPLATE_SETS.items())
    file = tmp_path / "mine.txt"
    file.write_text("a {} here\n\n{}\n")
    assert read_templates(file) == (("a {} here", "{}"), "mine.txt")
    assert read_templates(["x {}"]) == (("x {}",), "given")
    with pytest.raises(EvaluationError, match="neither a file nor one of name, video"):
        read_templates("acton")
    for wrong in (["none"], ["{} and {}"], ["{0}"], ["{name} {}"], []):
        with pytest.raises(EvaluationError, match=r"\{\} once"):
            read_templates(wrong)


def test_class_lists():
    sizes = {"kinetics400": 400, "ucf101": 101, "hmdb51": 51, "ssv2": 174}
    assert {name: len(class_list(name)) for name in CLASS_LISTS} == sizes
    for name in CLASS_LISTS:
        classes = class_list(name)
        assert len(set(classes)) == len(classes) and all(c == c.strip() for c in classes)
        if name != "ucf101":  # whose order ignores case
            assert classes == sorted(classes)
        else:
            assert classes == sorted(classes, key=str.lower)


def test_kinetics_is_torchvisions():
    from torchvision.models.video import MViT_V2_S_Weights

    assert class_list("kinetics400") == MViT_V2_S_Weights.KINETICS400_V1.meta["categories"]


def test_unknown_class_list():
    with pytest.raises(EvaluationError, match="Did you mean 'ucf101'"):
        class_list("ucf-101")


def test_texts_do_not_depend_on_the_mode_the_model_is_in(nano):
    """Dropout of a model that is being trained takes no part, and is on again afterwards."""
    nano.transformer.resblocks[0].mlp.add_module("drop", torch.nn.Dropout(0.5))
    expected = embed_texts(nano.eval(), ["a dog", "a cat"])
    assert torch.equal(embed_texts(nano.train(), ["a dog", "a cat"]), expected) and nano.training
