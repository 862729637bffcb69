"""The embedded image-text model: its pictures, its files, its tokenizer, and what its trained weights can do."""

import builtins
import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from img2vid.backbones.nano_clip import (
    CONFIG_PATH,
    MERGES_PATH,
    NANO_CLIP_DIR,
    TEMPLATES,
    WEIGHTS_PATH,
    classify_digits,
    images_to_input,
    load_nano_clip,
    nano_clip_tokenizer,
)
from img2vid.data.digits import DIGIT_WORDS, SPLITS, draw, load_digits, random_background, random_style
from img2vid.errors import Img2VidError

SIZE = 32


@pytest.fixture(scope="module")
def model():
    return load_nano_clip()


@pytest.fixture(scope="module")
def tokenizer():
    return nano_clip_tokenizer()


def held_out_pictures(kinds, seed):
    """The test digits, each drawn three times: uint8 (n, 32, 32, 3), labels (n,)."""
    rng = np.random.default_rng(seed)
    digits, labels = load_digits("test")
    digits, labels = np.tile(digits, (3, 1, 1)), np.tile(labels, 3)
    background = random_background(rng, len(digits), SIZE, kinds)
    return draw(digits, background=background, **random_style(rng, background)), torch.from_numpy(labels)


# The trained weights


@pytest.mark.parametrize("kinds", [("plain",), ("gradient",), ("noise",)], ids="-".join)
def test_zero_shot_accuracy_on_held_out_digits(model, kinds):
    pictures, labels = held_out_pictures(kinds, seed=7)
    accuracy = (classify_digits(model, pictures) == labels).float().mean().item()
    assert accuracy >= 0.95


def test_random_weights_know_nothing():
    torch.manual_seed(0)
    pictures, labels = held_out_pictures(("plain",), seed=7)
    accuracy = (classify_digits(load_nano_clip(pretrained=False), pictures) == labels).float().mean().item()
    assert accuracy < 0.3


def test_motion_words_do_not_hide_the_digit(model, tokenizer):
    # The text tower has never seen these words; a video model will learn them. The digit must survive them.
    captions = [f"a photo of the digit {word} moving left" for word in DIGIT_WORDS]
    pictures, labels = held_out_pictures(("plain",), seed=8)
    with torch.no_grad():
        texts = model.encode_text(tokenizer(captions), normalize=True)  # (10, D)
        images = model.encode_image(images_to_input(pictures, model), normalize=True)  # (n, D)
    assert ((images @ texts.T).argmax(dim=1) == labels).float().mean() > 0.5


# The files


def test_files_are_small_and_in_half_precision():
    assert sum(path.stat().st_size for path in (CONFIG_PATH, WEIGHTS_PATH, MERGES_PATH)) <= 6e6
    with safe_open(WEIGHTS_PATH, framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118
        assert {"data", "settings", "test_accuracy"} <= weights.metadata().keys()


def test_open_clip_factory_builds_and_loads_it(model):
    open_clip.add_model_config(CONFIG_PATH)
    built, _, transform = open_clip.create_model_and_transforms("nano_clip", pretrained=str(WEIGHTS_PATH))
    assert type(built) is type(model) is open_clip.CLIP
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for (name, ours), theirs in zip(model.state_dict().items(), built.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    # images_to_input is open_clip's own transform, in a batch.
    picture = held_out_pictures(("noise",), seed=9)[0][:1]
    assert torch.allclose(images_to_input(picture, model)[0], transform(Image.fromarray(picture[0])), atol=1e-6)


def test_open_clip_never_hands_out_the_wrong_vocabulary(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=MERGES_PATH.name):
        open_clip.get_tokenizer("nano_clip")
    direct = open_clip.get_tokenizer("nano_clip", bpe_path=str(MERGES_PATH))
    assert torch.equal(direct(["seven"]), tokenizer(["seven"]))


def test_model_card_names_the_command_that_rebuilds_it():
    assert "python scripts/train_nano_clip.py" in (NANO_CLIP_DIR / "README.md").read_text()


@pytest.mark.slow
def test_script_rebuilds_the_files(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "scripts/train_nano_clip.py", "--out", str(tmp_path), "--steps", "1", "--groups", "1"]
    subprocess.run(command, check=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS_PATH.name, MERGES_PATH.name}
    assert gzip.decompress((tmp_path / MERGES_PATH.name).read_bytes()) == gzip.decompress(MERGES_PATH.read_bytes())
    assert load_nano_clip(pretrained=tmp_path / WEIGHTS_PATH.name).training is False


def test_import_is_cheap():
    code = "import sys, img2vid.backbones.nano_clip; assert not {'open_clip', 'timm', 'sklearn'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_weights_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train_nano_clip\.py"):
        load_nano_clip(pretrained=tmp_path / "absent.safetensors")


def test_pictures_of_the_wrong_kind_are_refused(model):
    with pytest.raises(ValueError, match=r"uint8 of shape \(n, 32, 32, 3\)"):
        images_to_input(np.zeros((1, 3, 32, 32), dtype=np.uint8), model)
    with pytest.raises(ValueError, match="uint8"):
        images_to_input(np.zeros((1, 32, 32, 3), dtype=np.float32), model)


# The tokenizer


def test_tokenizer_fits_the_model(model, tokenizer):
    assert tokenizer.vocab_size == model.vocab_size
    tokens = tokenizer(["a photo of the digit seven", "seven"])
    assert tokens.shape == (2, model.context_length) and tokens.dtype == torch.long
    # The model reads a text at its largest token, which must be the end of the text.
    assert (tokens.max(dim=1).values == tokenizer.eot_token_id).all()


def test_caption_words_are_single_tokens(tokenizer):
    for text in [t.format(word) for t in TEMPLATES for word in DIGIT_WORDS] + [
        "a video of the digit three moving left",
        "the digit six growing",
        "the digit nine shrinking on a textured background",
        "the digit two rotating clockwise then counterclockwise",
    ]:
        assert len(tokenizer.encode(text)) == len(text.split()), text


@pytest.mark.parametrize(
    "text", ["a zebra plays the xylophone", "数字の七", "naïve café ☕", "7 + 3 = 10!", "\x00 \x7f"]
)
def test_any_text_round_trips(model, tokenizer, text):
    ids = tokenizer.encode(text)
    kept = "".join(tokenizer.decode(ids).split())  # decoding spaces the pieces out
    assert kept == "".join(tokenizer.clean_fn(text).split())
    with torch.no_grad():
        assert model.encode_text(tokenizer([text])).isfinite().all()


def test_too_long_and_empty_texts(model, tokenizer):
    tokens = tokenizer(["seven " * 100, ""])
    assert tokens.shape == (2, model.context_length)
    assert tokens[0, -1] == tokenizer.eot_token_id
    assert tokens[1, :3].tolist() == [tokenizer.sot_token_id, tokenizer.eot_token_id, 0]
    with torch.no_grad():
        assert model.encode_text(tokens).isfinite().all()


# The digits and the drawing


def test_splits_are_disjoint_complete_and_stratified():
    parts = {split: load_digits(split) for split in SPLITS}
    assert sum(len(labels) for _, labels in parts.values()) == 1797
    pixels = {split: {image.tobytes() for image in images} for split, (images, _) in parts.items()}
    assert not pixels["train"] & pixels["test"]
    assert not pixels["train"] & pixels["val"]
    assert not pixels["val"] & pixels["test"]
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        images, labels = parts[split]
        assert images.shape == (len(labels), 8, 8) and images.dtype == np.float32
        assert images.min() == 0 and images.max() == 1
        assert np.abs(np.bincount(labels) - share * 179.7).max() <= 4
        again, _ = load_digits(split)
        assert np.array_equal(images, again)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"'training'.*'train', 'val', 'test'"):
        load_digits("training")


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def without_sklearn(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ImportError, match="scikit-learn, which is not installed. Run: pip install 'img2vid") as caught:
        load_digits("train")
    assert isinstance(caught.value, Img2VidError)  # a command prints its text alone


def white_on_black(centre, scale=16.0, angle=0.0, digit=None, size=SIZE):
    digit = load_digits("test")[0][0] if digit is None else digit
    return draw(digit, centre, scale, angle, (255, 255, 255), np.zeros((size, size, 3), dtype=np.uint8))


def centre_of_mass(canvas):
    """(..., 2), x and y in pixels, of the red channel of canvases (..., H, W, 3)."""
    mass = canvas[..., 0].astype(np.float64)
    at = np.arange(canvas.shape[-2]) + 0.5
    return np.stack([(mass * at).sum((-2, -1)), (mass * at[:, None]).sum((-2, -1))], -1) / mass.sum((-2, -1))[..., None]


def test_drawing_is_deterministic():
    pictures = []
    for _ in range(2):
        rng = np.random.default_rng(3)
        background = random_background(rng, 5, SIZE)
        pictures.append(draw(load_digits("val")[0][:5], background=background, **random_style(rng, background)))
    assert np.array_equal(*pictures)
    assert pictures[0].shape == (5, SIZE, SIZE, 3) and pictures[0].dtype == np.uint8


def test_motion_is_smooth_below_one_pixel():
    start, step = np.array([12.0, 14.0]), np.array([0.1, -0.05])
    centres = start + np.arange(41)[:, None] * step  # a clip of 41 frames
    track = centre_of_mass(white_on_black(centres))
    assert np.abs(track - track[0] - (centres - centres[0])).max() < 0.05
    assert (np.diff(track, axis=0)[:, 0] > 0).all() and (np.diff(track, axis=0)[:, 1] < 0).all()


def test_scale_and_angle_mean_what_they_say():
    block = np.zeros((8, 8), dtype=np.float32)
    block[3:5, 6:8] = 1  # at the middle of the right edge: 3 cells from the middle
    for scale, angle, offset in [
        (16, 0, (6, 0)),
        (24, 0, (9, 0)),
        (16, 90, (0, -6)),  # counter-clockwise as seen: from the right to the top
        (16, 180, (-6, 0)),
        (16, 30, (6 * np.cos(np.pi / 6), -3)),
    ]:
        canvas = white_on_black((16, 16), scale, angle, block)
        assert centre_of_mass(canvas) == pytest.approx(np.array([16, 16]) + offset, abs=0.1)
    masses = [white_on_black((16, 16), scale, 0, block)[..., 0].sum(dtype=np.int64) for scale in (12, 24)]
    assert masses[1] / masses[0] == pytest.approx(4, rel=0.05)  # area grows with the square of the scale


def test_batched_drawing_is_drawing_one_by_one():
    rng = np.random.default_rng(5)
    digits = load_digits("val")[0][:4]
    background = random_background(rng, 4, SIZE)
    style = random_style(rng, background)
    batch = draw(digits, background=background, **style)
    for i in range(4):
        one = draw(digits[i], background=background[i], **{key: value[i] for key, value in style.items()})
        assert np.array_equal(batch[i], one)
    clip = draw(digits[0], np.linspace((10, 16), (22, 16), 7), 12.0, 0.0, (255, 0, 0), background[0])
    assert clip.shape == (7, SIZE, SIZE, 3)


def test_styles_keep_digits_whole_and_readable():
    rng = np.random.default_rng(6)
    background = random_background(rng, 500, SIZE)
    style = random_style(rng, background)
    half = style["scale"][:, None] / 2
    assert (style["centre"] - half >= 0).all() and (style["centre"] + half <= SIZE).all()
    luminance = np.array([0.299, 0.587, 0.114])
    contrast = np.abs(style["colour"] @ luminance - background.mean(axis=(1, 2)) @ luminance)
    assert contrast.min() > 99.9
    assert style["colour"].min() >= 0 and style["colour"].max() <= 255


def test_background_kinds():
    rng = np.random.default_rng(0)
    plain = random_background(rng, 8, SIZE, ("plain",))
    assert (plain == plain[:, :1, :1]).all()
    for kind in ("gradient", "noise"):
        textured = random_background(rng, 8, SIZE, (kind,))
        assert (textured.std(axis=(1, 2)).max(axis=-1) > 1).all()
    with pytest.raises(ValueError, match=r"'plain', 'gradient', 'noise'.*'stripes'"):
        random_background(rng, 8, SIZE, ("stripes",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digit": np.zeros((28, 28))}, r"digit must have the shape \(\.\.\., 8, 8\), got \(28, 28\)"),
        ({"digit": np.full((8, 8), 16.0)}, "digit must be from 0 to 1, got values from 16 to 16"),
        ({"scale": 4.0}, "scale must be at least 8"),
        ({"angle": float("nan")}, "angle must be finite"),
        ({"colour": (300, 0, 0)}, "colour must be from 0 to 255"),
        ({"centre": 16.0}, r"centre must have the shape \(\.\.\., 2\)"),
        ({"background": np.zeros((32, 32, 3))}, "background must be uint8"),
        ({"centre": np.zeros((3, 2)), "angle": np.zeros(4)}, "do not broadcast"),
    ],
)
def test_bad_drawing_arguments(change, message):
    arguments = {
        "digit": np.zeros((8, 8)),
        "centre": (16, 16),
        "scale": 16.0,
        "angle": 0.0,
        "colour": (255, 255, 255),
        "background": np.zeros((32, 32, 3), dtype=np.uint8),
    }
    with pytest.raises(ValueError, match=message):
        draw(**(arguments | change))


def test_styles_need_room():
    with pytest.raises(ValueError, match="20 or more"):
        random_style(np.random.default_rng(0), np.zeros((1, 16, 16, 3), dtype=np.uint8))
