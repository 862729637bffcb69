import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import img2vid
from img2vid.cli import main as cli
from img2vid.interpolation import InterpolationError, average, between, interpolate, mix
from tests.conftest import randomize, small_clip, small_vit

SETTINGS = [
    {},
    {"gate": "tanh"},
    {"temporal_init": "random"},
    {"prefix_mode": "shared"},
    {"tubelet_size": 3},
    {"tubelet_size": 3, "tubelet_init": "average"},
    {"attention": "factorised_encoder", "encoder_layers": 1},
    {"attention": "joint_space_time"},
]


def trained_vit(**kwargs):
    """A converted model and what it became: every weight has moved."""
    model = img2vid.convert(small_vit(), num_frames=3, **kwargs)
    return model, randomize(copy.deepcopy(model), seed=1)


def same_bits(a, b):
    """Bitwise, which == is not: it takes -0 for 0."""
    assert a.keys() == b.keys()
    return all(torch.equal(a[k].flatten().view(torch.uint8), b[k].flatten().view(torch.uint8)) for k in a)


@pytest.mark.parametrize("kwargs", SETTINGS, ids=str)
def test_between_video_models_both_ends_are_bitwise_theirs(kwargs):
    start, trained = trained_vit(**kwargs)
    assert same_bits(interpolate(start, trained, 0.0).state_dict(), start.state_dict())
    assert same_bits(interpolate(start, trained, 1.0).state_dict(), trained.state_dict())
    middle = interpolate(start, trained, 0.5)
    for name, value in middle.state_dict().items():
        a, b = start.state_dict()[name], trained.state_dict()[name]
        if value.is_floating_point() and not torch.equal(a, b):
            assert not torch.equal(value, a)
            assert not torch.equal(value, b)
            assert ((value >= torch.minimum(a, b)) & (value <= torch.maximum(a, b))).all(), name


@pytest.mark.parametrize("kwargs", SETTINGS, ids=str)
def test_from_an_image_model_alpha_zero_is_the_image_model_again(kwargs):
    _, trained = trained_vit(**kwargs)
    image = small_vit()
    back = interpolate(image, trained, 0.0)
    certificate = img2vid.certify(back, small_vit(), num_frames=[3])
    assert certificate.held  # bitwise wherever the configuration promises it
    assert certificate.gates_moved == 0.0
    equal, total = certificate.image_weights_equal
    assert equal == total
    assert all(torch.equal(p, q) for p, q in zip(image.parameters(), small_vit().parameters(), strict=True))
    assert same_bits(interpolate(image, trained, 1.0).state_dict(), trained.state_dict())
    clips = torch.randn(2, 3, 3, 32, 32)
    assert not torch.equal(interpolate(image, trained, 0.5)(clips), back(clips))


def test_alpha_zero_has_the_bits_of_the_image_model_on_the_folded_batch():
    _, trained = trained_vit()
    clips = torch.randn(2, 3, 3, 32, 32)
    back = interpolate(small_vit(), trained, 0.0)
    with torch.no_grad():
        assert torch.equal(back.frame_features(clips).flatten(0, 1), small_vit()(clips.flatten(0, 1)))


def test_the_image_model_and_its_conversion_are_the_same_start():
    start, trained = trained_vit()
    for alpha in (0.0, 0.3, 1.0):
        from_image = interpolate(small_vit(), trained, alpha).state_dict()
        assert same_bits(from_image, interpolate(start, trained, alpha).state_dict())


def test_what_the_image_model_does_not_know_stays_as_trained():
    _, trained = trained_vit(temporal_init="random", num_classes=4)
    model = interpolate(small_vit(), trained, 0.25)
    for name, parameter in model.named_parameters():
        own, given_ = dict(trained.named_parameters())[name], "temporal_attn" in name or "classifier" in name
        if given_ or "temporal_norm1" in name:
            assert torch.equal(parameter, own), name
        elif "temporal_fc" in name or name == "time_embed":
            torch.testing.assert_close(parameter, 0.25 * own)


def test_both_towers_of_an_image_text_model():
    model = img2vid.convert(small_clip(), num_frames=2)
    trained = randomize(copy.deepcopy(model), seed=1)
    back = interpolate(small_clip(), trained, 0.0)
    assert same_bits(back.state_dict(), model.state_dict())
    assert img2vid.certify(back, small_clip(), num_frames=[2]).held
    middle = interpolate(small_clip(), trained, 0.5)
    torch.testing.assert_close(middle.logit_scale, (model.logit_scale + trained.logit_scale) / 2)


@pytest.mark.parametrize("gate", ["temporal_fc", "tanh"])
@pytest.mark.parametrize("alpha", [0.25, 0.5])
def test_alpha_is_what_a_branch_is_scaled_by_whatever_the_gate(gate, alpha):
    model = img2vid.convert(small_vit(), num_frames=3, gate=gate)
    opened = copy.deepcopy(model)
    with torch.no_grad():
        for block in opened.blocks:
            for parameter in block.temporal_fc.parameters():
                parameter.copy_(torch.randn(parameter.shape))
    partly = interpolate(model, opened, alpha)
    x = torch.randn(3, 17, 48)
    for before, after in zip(opened.blocks, partly.blocks, strict=True):
        with opened.clip.of(3), partly.clip.of(3):
            torch.testing.assert_close(after.temporal_residual(x), alpha * before.temporal_residual(x))


def test_without_a_gate_alpha_zero_is_the_conversion_which_is_not_the_image_model():
    start, trained = trained_vit(gate="none")
    back = interpolate(small_vit(), trained, 0.0)
    assert same_bits(back.state_dict(), start.state_dict())
    clips = torch.randn(1, 3, 3, 32, 32)
    assert not torch.allclose(back.frame_features(clips).flatten(0, 1), small_vit()(clips.flatten(0, 1)))


finite = st.floats(-20, 20, width=32)


@settings(deadline=None)
@given(
    a=finite, b=finite, alpha=st.floats(0.0, 1.0), gate=st.booleans(), dtype=st.sampled_from(["float32", "bfloat16"])
)
def test_mixtures_lie_between_and_agreeing_values_stay(a, b, alpha, gate, dtype):
    a, b = (torch.tensor([value], dtype=getattr(torch, dtype)) for value in (a, b))
    value = mix([a, b], [1.0 - alpha, alpha], gate)
    assert value.dtype == a.dtype
    slack = 1e-5 + (2.0 if gate and max(a.abs(), b.abs()) > 15 else 0.0)  # tanh(15) and tanh(20) are the same number
    assert min(a, b) - slack <= value <= max(a, b) + slack
    assert torch.equal(mix([a, a], [1.0 - alpha, alpha], gate), a)
    assert torch.isfinite(value).all()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=5))
def test_averages_are_means_whatever_the_order(rows):
    states = [{"w": torch.tensor(row), "n": torch.tensor(7)} for row in rows]
    mean = average(states)
    torch.testing.assert_close(mean["w"], torch.stack([s["w"] for s in states]).double().mean(0).float())
    assert torch.equal(mean["n"], torch.tensor(7))
    torch.testing.assert_close(average(states[::-1])["w"], mean["w"])


def test_two_points_and_their_average_are_one_line():
    start, trained = (model.state_dict() for model in trained_vit(gate="tanh"))
    assert same_bits(average([start, trained]), between(start, trained, 0.5))
    assert same_bits(average([trained] * 3), trained)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "0.5", None, True])
def test_alpha_outside_the_line_is_refused(alpha):
    start, trained = trained_vit()
    with pytest.raises(InterpolationError, match="alpha="):
        interpolate(start, trained, alpha)


def test_other_configurations_and_other_image_models_are_refused():
    start, trained = trained_vit()
    other = img2vid.convert(small_vit(), num_frames=4, gate="tanh")
    with pytest.raises(InterpolationError, match=r"num_frames: 4 in the start, 3 in the trained model\n  gate: 'tanh'"):
        interpolate(other, trained, 0.5)
    with pytest.raises(InterpolationError, match="dtype: 'bfloat16'"):
        interpolate(copy.deepcopy(start).to(torch.bfloat16), trained, 0.5)
    with pytest.raises(img2vid.Img2VidError, match=r"proj.bias: \(24,\) given, \(48,\) expected"):
        interpolate(small_vit(embed_dim=24, num_heads=2), trained, 0.5)
    with pytest.raises(img2vid.Img2VidError, match="blocks.3"):
        interpolate(small_vit(depth=4), trained, 0.5)


# ---- the command


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """nano_clip as converted, and two models it might have become."""
    path = tmp_path_factory.mktemp("models")
    model = img2vid.convert("nano_clip", num_frames=2)
    model.save_pretrained(path / "start")
    for seed in (1, 2):
        randomize(copy.deepcopy(model), seed=seed).save_pretrained(path / f"trained{seed}")
    img2vid.convert("nano_clip", num_frames=4).save_pretrained(path / "longer")
    return path


def weights_of(folder):
    return img2vid.load(folder).state_dict()


@pytest.mark.parametrize("first", ["image", "start"])
def test_the_command_goes_back_to_the_image_model(folders, tmp_path, first, capsys):
    first = first if first == "image" else str(folders / first)
    for alpha, expected in (("0", "start"), ("1", "trained1")):
        out = tmp_path / alpha
        assert cli(["interpolate", first, str(folders / "trained1"), "--alpha", alpha, "--out", str(out)]) == 0
        assert same_bits(weights_of(out), weights_of(folders / expected))
    printed = capsys.readouterr().out
    assert ("function at alpha = 0: any clip, bit for bit" in printed) == (first == "image")
    assert cli(["certify", str(tmp_path / "0"), "--num-frames", "2"]) == 0


def test_the_command_takes_image_weights_from_a_file(folders, tmp_path, capsys):
    from img2vid.backbones.nano_clip import WEIGHTS_PATH

    out = tmp_path / "out"
    arguments = ["image", str(folders / "trained1"), "--alpha", "0", "--weights", str(WEIGHTS_PATH), "--out", str(out)]
    assert cli(["interpolate", *arguments]) == 0
    assert "Image weights: the file nano_clip.safetensors" in capsys.readouterr().out
    assert same_bits(weights_of(out), weights_of(folders / "start"))


def test_the_command_averages(folders, tmp_path):
    three = [folders / name for name in ("start", "trained1", "trained2")]
    assert cli(["interpolate", *map(str, three), "--average", "--out", str(tmp_path / "out")]) == 0
    assert same_bits(weights_of(tmp_path / "out"), average([weights_of(folder) for folder in three]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["start", "trained1", "--alpha", "2"], "from 0"),
        (["start", "trained1", "--alpha", "nan"], "from 0"),
        (["start", "--alpha", "0.5"], "--alpha is between two models, but 1"),
        (["start", "trained1", "trained2", "--alpha", "0.5"], "--average takes any number"),
        (["start", "--average"], "at least two"),
        (["start", "image", "--alpha", "0.5"], "the first of two"),
        (["image", "start", "--average"], "the first of two"),
        (["start", "trained1", "--alpha", "0.5", "--weights", "x.pth"], "belongs to the word image"),
        (["image", "trained1", "--alpha", "0.5", "--weights", "x.pth"], "no weights file x.pth"),
        (["start", "nowhere", "--alpha", "0.5"], "There is no folder"),
        (["longer", "trained1", "--alpha", "0.5"], "num_frames: 4 in"),
        (["start", "trained1", "longer", "--average"], "num_frames: 2 in"),
        (["start", "trained1", "--alpha", "0.5", "--out", "trained1"], "one of the models to be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_explains_what_is_wrong_and_writes_nothing(folders, monkeypatch, arguments, message, capsys):
    monkeypatch.chdir(folders)
    before = sorted(p.name for p in folders.iterdir())
    assert cli(["interpolate", *arguments, *([] if "--out" in arguments else ["--out", "out"])]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert sorted(p.name for p in folders.iterdir()) == before


def test_random_image_weights_cannot_be_had_again(tmp_path, capsys):
    model = img2vid.convert("vit_tiny", random_weights=True, num_frames=2, image_size=32, temporal_layers="last:1")
    model.save_pretrained(tmp_path / "random")
    assert cli(["interpolate", "image", str(tmp_path / "random"), "--alpha", "0.5", "--out", str(tmp_path / "x")]) == 2
    assert "converted from random weights" in capsys.readouterr().err


def test_a_model_without_a_name_says_where_its_image_weights_could_come_from(tmp_path, capsys):
    img2vid.convert(small_vit()).save_pretrained(tmp_path / "unnamed")
    assert cli(["interpolate", "image", str(tmp_path / "unnamed"), "--alpha", "0.5", "--out", str(tmp_path / "x")]) == 2
    assert "passed in by hand" in capsys.readouterr().err
