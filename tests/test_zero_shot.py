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
    rng = np.random.default_rng(0)
    clips = []
    for image in images[:200]:
        background = random_background(rng, 1, 32)[0]
        style = {**random_style(rng, background), "scale": 20.0, "angle": 0.0}
        centres = np.stack([np.linspace(11, 21, 4), np.full(4, style["centre"][1].clip(11, 21))], axis=-1)
        clips.append(draw(image, background=background, **{**style, "centre": centres}))
    return torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3), torch.from_numpy(labels[:200])


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
