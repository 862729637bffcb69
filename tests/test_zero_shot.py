"""The main job end to end on real trained weights: nano_clip converted, saved, loaded, naming digits in clips."""

import numpy as np
import pytest
import torch

import img2vid
from img2vid.backbones.nano_clip import TEMPLATES, load_nano_clip
from img2vid.data.digits import DIGIT_WORDS, draw, load_digits, random_background, random_style


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano") / "model"
    img2vid.convert("nano_clip", num_frames=4).save_pretrained(folder)
    return img2vid.load(folder)


@pytest.fixture(scope="module")
def moving_digits():
    """Held-out digits crossing the canvas, as uint8 clips (B, T, 3, 32, 32), and their labels."""
    images, labels = load_digits("test")
    digits, labels = images[:200, None], torch.from_numpy(labels[:200])  # one for all four frames
    rng = np.random.default_rng(0)
    background = random_background(rng, 200, 32)
    colour = random_style(rng, background)["colour"]
    centre = np.stack([np.linspace(11, 21, 4), np.full(4, 16.0)], axis=-1)  # (T, 2): from left to right
    clips = draw(digits, centre, 20.0, 0.0, colour[:, None], background[:, None])  # (B, T, H, W, 3)
    return torch.from_numpy(clips).permute(0, 1, 4, 2, 3), labels


def classifier(model):
    """Class embeddings (10, D): each template's normalised, their mean normalised again."""
    texts = [template.format(word) for word in DIGIT_WORDS for template in TEMPLATES]
    with torch.no_grad():
        embedded = model.encode_text(model.tokenize(texts), normalize=True).unflatten(0, (10, len(TEMPLATES)))
    return torch.nn.functional.normalize(embedded.mean(1), dim=-1)


def test_clips_of_digits_are_named(model, moving_digits):
    clips, labels = moving_digits
    with torch.no_grad():
        video = model.encode_video(model.normalize(clips), normalize=True)
    accuracy = (video @ classifier(model).T).argmax(-1).eq(labels).float().mean()
    assert accuracy >= 0.95


def test_scores_are_those_of_frame_averaged_clip(model, moving_digits):
    clips = moving_digits[0][:16]
    image_model = load_nano_clip()
    with torch.no_grad():
        frames = image_model.encode_image(model.normalize(clips).flatten(0, 1)).unflatten(0, (16, 4))
        expected = torch.nn.functional.normalize(frames.mean(1), dim=-1) @ classifier(model).T
        got = model.encode_video(model.normalize(clips), normalize=True) @ classifier(model).T
    assert torch.equal(got, expected)


def test_the_order_of_frames_does_not_matter_yet(model, moving_digits):
    clips = model.normalize(moving_digits[0][:16])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_video(clips), model.encode_video(clips.flip(1)), atol=1e-5, rtol=1e-5)
