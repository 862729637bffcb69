"""Captions: at step 0, a static clip has the image's, token by token, as the libraries themselves write it."""

import copy
import json

import open_clip.coca_model
import pytest
import torch
import transformers
from torchvision.io import write_png

import img2vid
from img2vid.captioning import CaptionError, Decoding, Special, blip_tokens, caption, coca_tokens, frames_of
from img2vid.cli import main as cli
from tests.conftest import randomize, small_clip
from tests.test_transformers import make

FRAMES = (1, 2, 3, 5, 8)
COCA = {
    "embed_dim": 32,
    "vision_cfg": {
        "layers": 2,
        "width": 32,
        "head_width": 8,
        "patch_size": 8,
        "image_size": 32,
        "attentional_pool": True,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 2,
        "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 2,
        "attn_pooler_heads": 4,
    },
}
SPECIAL = Special(begin=49406, end=49407, fill=0)


def small_coca() -> torch.nn.Module:
    torch.manual_seed(0)
    model = open_clip.coca_model.CoCa(**COCA)
    torch.nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # open_clip leaves it as the memory it was given
    return randomize(model, std=0.1).eval()


@pytest.fixture(scope="module")
def coca():
    return small_coca()


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def static(images: torch.Tensor, num_frames: int) -> torch.Tensor:
    return images.unsqueeze(1).expand(-1, num_frames, -1, -1, -1)


def opened(model, std=0.3):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.zero_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def test_coca_writes_what_open_clip_writes_of_the_image(coca, images, monkeypatch):
    # open_clip refuses to generate because one class is gone from transformers, which its greedy search does not need
    monkeypatch.setattr(open_clip.coca_model, "_has_transformers", True)
    monkeypatch.setattr(open_clip.coca_model, "GENERATION_TYPES", {"top_k": transformers.TopKLogitsWarper})
    expected = coca.generate(images, seq_len=12, generation_type="top_k", top_k=1)
    assert len({tuple(row) for row in expected.tolist()}) == 3  # three images, three captions
    model = img2vid.convert(copy.deepcopy(coca), num_frames=4)
    for num_frames in FRAMES:
        assert torch.equal(coca_tokens(model, static(images, num_frames), SPECIAL, Decoding(1, 12)), expected)


@torch.no_grad()
def naive_beams(coca, image: torch.Tensor, num_beams: int, max_tokens: int, min_tokens: int) -> list[int]:
    """One text at a time, in lists: the running texts of highest mean log-probability."""
    running = [([SPECIAL.begin], 0.0)]
    while any(text[-1] != SPECIAL.end for text, _ in running):
        longer = []
        for text, score in running:
            if text[-1] == SPECIAL.end:
                longer.append((text, score))
                continue
            logits = coca(image[None], torch.tensor([text]), output_labels=False)["logits"][0, -1]
            log_probs = logits.log_softmax(-1)
            if len(text) < min_tokens:
                log_probs[SPECIAL.end] = -torch.inf
            best = [SPECIAL.end] if len(text) == max_tokens - 1 else log_probs.topk(num_beams).indices.tolist()
            longer += [([*text, token], score + float(log_probs[token])) for token in best]
        running = sorted(longer, key=lambda t: t[1] / len(t[0]), reverse=True)[:num_beams]
    return running[0][0]


@pytest.mark.parametrize("num_beams", [2, 4])
def test_beam_search_against_a_naive_one(coca, images, num_beams):
    model = img2vid.convert(copy.deepcopy(coca))
    greedy = coca_tokens(model, static(images, 3), SPECIAL, Decoding(1, 9, 3))
    found = coca_tokens(model, static(images, 3), SPECIAL, Decoding(num_beams, 9, 3))
    assert not torch.equal(found, greedy)
    for image, row in zip(images, found.tolist(), strict=True):
        text = row[: row.index(SPECIAL.end) + 1]
        assert text == naive_beams(coca, image, num_beams, 9, 3)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_blip_writes_what_transformers_writes_of_the_image(images, num_beams):
    blip = make("BlipForConditionalGeneration")
    how = {"num_beams": num_beams, "max_length": 12, "min_length": 5, "do_sample": False}
    prompt = torch.tensor([[95, 7, 8, 97]]).repeat(3, 1)
    expected = blip.generate(pixel_values=images, **how)
    prompted = blip.generate(pixel_values=images, input_ids=prompt.clone(), **how)
    assert not torch.equal(expected, prompted)
    model = img2vid.convert(copy.deepcopy(blip), num_frames=4)
    for num_frames in FRAMES:
        clips = static(images, num_frames)
        assert torch.equal(blip_tokens(model, clips, Decoding(num_beams, 12)), expected)
        assert torch.equal(blip_tokens(model, clips, Decoding(num_beams, 12), prompt.clone()), prompted)


@pytest.mark.parametrize("name", ["coca", "blip"])
@torch.no_grad()
def test_the_decoder_sees_the_tokens_of_the_image_bit_for_bit(name, coca, images):
    """And with gates opened, or frames that differ, it does not."""
    base = coca if name == "coca" else make("BlipForConditionalGeneration")
    model = img2vid.convert(copy.deepcopy(base), num_frames=4)
    for num_frames in FRAMES:
        folded = static(images, num_frames).flatten(0, 1)
        if name == "coca":
            expected = base.visual(folded)[1]
            tokens = model.visual(static(images, num_frames))[1]
        else:
            expected = base.vision_model(pixel_values=folded).last_hidden_state
            tokens = model.visual(pixel_values=static(images, num_frames)).last_hidden_state
        assert torch.equal(tokens, expected.unflatten(0, (3, num_frames))[:, 0])
    clips = torch.randn(2, 3, 3, 32, 32)
    closed = model.visual(clips)[1]
    folded = base.visual(clips.flatten(0, 1))[1] if name == "coca" else None
    if folded is not None:
        torch.testing.assert_close(closed, folded.unflatten(0, (2, 3)).mean(dim=1))
    assert (opened(model).visual(clips)[1] - closed).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["coca", "blip"])
def test_the_text_decoder_is_untouched(name, coca):
    base = coca if name == "coca" else make("BlipForConditionalGeneration")
    model = img2vid.convert(copy.deepcopy(base))
    ours, theirs = model.text_decoder.state_dict(), base.text_decoder.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert img2vid.certify(model, base, num_frames=[1, 2]).ok


# ---- the command


def write_frames(folder, num_frames: int = 5, moving: bool = False):
    """A folder of equal pictures, or of different ones."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    picture = torch.randint(0, 256, (3, 40, 60), generator=generator, dtype=torch.uint8)
    for i in range(num_frames):
        write_png(picture.roll(9 * i, dims=-1) if moving else picture, str(folder / f"{i:03}.png"))
    return folder


@pytest.fixture(scope="module")
def coca_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coca")
    source = folder / "source"
    source.mkdir()
    (source / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {**COCA, "custom_text": True}, "preprocess_cfg": {}})
    )
    torch.save(small_coca().state_dict(), source / "open_clip_pytorch_model.bin")
    img2vid.convert(f"open_clip:local-dir:{source}", num_frames=4).save_pretrained(folder / "video")
    write_frames(folder / "still")
    return folder


WORDS = ["[PAD]", *(f"word{i}" for i in range(1, 95)), "[DEC]", "[SEP]", "[CLS]", "[UNK]"]


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    make("BlipForConditionalGeneration").save_pretrained(folder / "source")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt"), bos_token="[DEC]").save_pretrained(folder / "source")
    img2vid.convert(f"hf:{folder / 'source'}", num_frames=4).save_pretrained(folder / "video")
    write_frames(folder / "still")
    return folder


def test_the_command_with_coca(coca_folder, coca, capsys):
    still = str(coca_folder / "still")
    model = img2vid.load(coca_folder / "video")
    picture = frames_of(still, model, 1)
    assert picture.shape == (1, 3, 32, 32)
    expected = naive_beams(coca, picture[0], 1, 12, 5)
    said = {}
    for num_frames in ("1", "3", "4"):
        arguments = ["--model", str(coca_folder / "video"), "--video", still, "--max-tokens", "12", "--json"]
        assert cli(["caption", *arguments, "--num-frames", num_frames]) == 0
        said[num_frames] = json.loads(capsys.readouterr().out)[still]
    assert set(said.values()) == {open_clip.decode(torch.tensor(expected[1:-1])).strip()}
    how = ["--num-beams", "2", "--prompt", "a video of", "--max-tokens", "12"]
    assert cli(["caption", "--model", str(coca_folder / "video"), "--video", still, *how]) == 0
    assert capsys.readouterr().out.startswith(f"{still}: a video of ")


def test_the_command_with_blip(blip_folder, capsys):
    still, folder = str(blip_folder / "still"), str(blip_folder / "video")
    picture = frames_of(still, img2vid.load(folder), 1)
    blip = make("BlipForConditionalGeneration")
    tokens = blip.generate(pixel_values=picture, max_length=12, min_length=5, do_sample=False)[0].tolist()
    expected = " ".join(WORDS[token] for token in tokens if not WORDS[token].startswith("["))
    assert expected
    ask = ["caption", "--model", folder, "--video", still, "--max-tokens", "12"]
    assert cli([*ask]) == 0
    assert capsys.readouterr().out == f"{still}: {expected}\n"
    assert cli([*ask, "--prompt", "word7 word8"]) == 0
    assert capsys.readouterr().out.startswith(f"{still}: word7 word8")
    source = blip_folder / "source"
    assert cli([*ask, "--tokenizer", str(source)]) == 0
    capsys.readouterr()


def test_bad_input_is_one_clear_error(coca_folder, blip_folder, tmp_path, capsys):
    still, video = str(coca_folder / "still"), str(coca_folder / "video")
    img2vid.convert(small_clip()).save_pretrained(tmp_path / "clip")
    img2vid.convert("vit_tiny", random_weights=True, image_size=32).save_pretrained(tmp_path / "vit")
    img2vid.convert("nano_clip", random_weights=True).save_pretrained(tmp_path / "nano")
    (tmp_path / "noise.mp4").write_bytes(b"no video at all")
    blip = str(blip_folder / "video")
    for arguments, message in (
        (["--model", "nowhere", "--video", still], "There is no folder nowhere"),
        (["--model", str(tmp_path / "vit"), "--video", still], "VisionTransformer has no text decoder"),
        (["--model", str(tmp_path / "nano"), "--video", still], "has no text decoder"),
        (["--model", video, "--video", "missing.mp4"], "missing.mp4"),
        (["--model", video, "--video", str(tmp_path / "noise.mp4")], "noise.mp4"),
        (["--model", video, "--video", still, "--num-frames", "0"], "--num-frames 0"),
        (["--model", video, "--video", still, "--num-beams", "0"], "num_beams=0"),
        (["--model", video, "--video", still, "--max-tokens", "3"], "must be larger than min_tokens=5"),
        (["--model", video, "--video", still, "--max-tokens", "99"], "up to 16 tokens"),
        (["--model", video, "--video", still, "--max-tokens", "8", "--prompt", "a b c d e f g h"], "leaves no room"),
        (["--model", video, "--video", still, "--tokenizer", "x", "--max-tokens", "9"], "none can be given"),
        (["--model", blip, "--video", still, "--tokenizer", str(tmp_path / "vit")], "tokenizer"),
        (["--model", blip, "--video", still, "--tokenizer", "./nowhere"], "nowhere"),
        (["--model", blip, "--video", still], "max_tokens=30: this decoder takes texts of up to 16 tokens"),
    ):
        assert cli(["caption", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error, (arguments, error)


def test_captions_from_python(coca):
    model = img2vid.convert(copy.deepcopy(coca))
    texts = caption(model, torch.randn(2, 3, 3, 32, 32), open_clip.get_tokenizer("ViT-B-32"), Decoding(2, 10))
    assert len(texts) == 2 and all(isinstance(text, str) and text for text in texts)
    with pytest.raises(CaptionError, match="CLIP has no text decoder"):
        caption(img2vid.convert(small_clip()), torch.randn(1, 2, 3, 32, 32), None)
