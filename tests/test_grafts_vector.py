"""A vector beside each clip: one wide head by hand, who may hand it over, and what is said where it is missing."""

import copy
import threading

import pytest
import torch
from torch.nn import functional as F

import img2vid
from img2vid.beside import BesideError
from img2vid.certificate import certify
from img2vid.cli import main as cli
from img2vid.config import VideoConfig
from img2vid.data.lists import read_list
from img2vid.data.module import VideoData
from img2vid.grafts import graft, remove
from img2vid.objectives import Classification
from img2vid.objectives.base import ObjectiveError, Step
from img2vid.training import Tuning, VideoTraining
from img2vid.tuning import freeze
from tests.conftest import randomize, small_clip, small_eva, small_vit
from tests.test_grafts import push
from tests.test_transformers import make as make_hf
from tests.training_run import fit

AUDIO = {"type": "vector", "name": "audio", "dim": 6}
MAKES = {"vit": small_vit, "eva": small_eva, "clip": lambda: small_clip().visual}
every_tower = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def clips(num_frames=3):
    return torch.randn(2, num_frames, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def audio(seed=2, num_clips=2):
    return torch.randn(num_clips, 6, generator=torch.Generator().manual_seed(seed))


@every_tower
@torch.no_grad()
def test_a_classifier_is_one_of_more_inputs(make):
    plain = img2vid.convert(make(), num_frames=4, num_classes=5)
    model = img2vid.convert(make(), num_frames=4, num_classes=5, grafts=[AUDIO])
    head = torch.randn(plain.classifier.weight.shape, generator=torch.Generator().manual_seed(4))
    for one in (plain, model):
        one.classifier.weight.copy_(head)
    assert torch.equal(model(clips(), audio=audio()), plain(clips()))
    model.classifier.graft_audio.zero_columns.normal_(generator=torch.Generator().manual_seed(5))
    wide = torch.cat([head, model.classifier.graft_audio.zero_columns], dim=1)
    expected = F.linear(torch.cat([plain.clip_features(clips()), audio()], dim=1), wide, plain.classifier.bias)
    torch.testing.assert_close(model(clips(), audio=audio()), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.clip_features(clips()), plain.clip_features(clips()))  # the head alone has grown
    assert not torch.allclose(model(clips(), audio=audio(3)), expected, atol=1e-2)
    remove(model)
    assert torch.equal(model(clips()), plain(clips())) and model.state_dict().keys() == plain.state_dict().keys()


@torch.no_grad()
def test_the_projection_to_where_texts_are_is_one_of_more_inputs():
    plain, model = (img2vid.convert(small_clip(), num_frames=4, grafts=g) for g in ([], [AUDIO]))
    for one in (plain, model):
        one.visual.transformer.resblocks[0].temporal_fc.weight.copy_(torch.eye(64))
    columns = model.visual.graft_audio.zero_columns.normal_(generator=torch.Generator().manual_seed(5))
    pooled = []
    plain.visual.ln_post.register_forward_hook(lambda m, a, out: pooled.append(out))
    plain.encode_video(clips())
    before = pooled[0] if pooled[0].ndim == 2 else pooled[0][:, 0]  # (B*T, D), in front of the projection
    wide = torch.cat([plain.visual.proj, columns.T])  # (D + E, embed_dim)
    expected = (torch.cat([before, audio().repeat_interleave(3, dim=0)], dim=1) @ wide).unflatten(0, (2, 3)).mean(dim=1)
    torch.testing.assert_close(model.encode_video(clips(), audio=audio()), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.encode_text(torch.ones(1, 16).long()), plain.encode_text(torch.ones(1, 16).long()))


@torch.no_grad()
def test_whoever_calls_the_model_finds_what_was_laid_beside():
    model = push(img2vid.convert(small_clip(), num_frames=4, grafts=[AUDIO]))
    expected = model.encode_video(clips(), audio=audio())
    text = torch.ones(2, 16, dtype=torch.long)
    with model.beside(audio=audio()):
        torch.testing.assert_close(model(clips(), text)[0], F.normalize(expected, dim=-1))
        assert torch.equal(model.visual(clips()), expected)
        assert not torch.equal(model.encode_video(clips(), audio=audio(3)), expected)  # the nearer one counts
        assert torch.equal(model.encode_video(clips()), expected)
    with pytest.raises(BesideError, match="none was given"):
        model.encode_video(clips())
    hf = push(img2vid.convert(make_hf("CLIPModel"), num_frames=4, grafts=[AUDIO]))
    one, other = (hf.encode_video(clips(), audio=audio(seed)) for seed in (2, 3))
    assert not torch.allclose(one, other, atol=1e-3)


@torch.no_grad()
def test_each_clip_has_its_own():
    model = push(img2vid.convert(small_vit(), num_frames=4, grafts=[AUDIO]))
    both, given = model(clips(), audio=audio()), audio()
    given[1] += 1
    changed = model(clips(), audio=given)
    assert torch.equal(changed[0], both[0]) and not torch.allclose(changed[1], both[1], atol=1e-3)
    seen = {}

    def run(name, seed):
        seen[name] = [model(clips(), audio=audio(seed)) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(n, n)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(3):
        assert all(torch.equal(out, model(clips(), audio=audio(n))) for out in seen[n])


@torch.no_grad()
@pytest.mark.parametrize("num_classes", [None, 5])
@pytest.mark.parametrize("mode", ["gate", "concat"])
@pytest.mark.parametrize("first", ["vector", "fusion"])
def test_beside_further_towers_and_a_second_vector(num_classes, mode, first):
    tower = {"type": "fusion", "towers": [{"backbone": "nano_clip", "random_weights": True}], "mode": mode}
    specs = [AUDIO, tower, {"type": "vector", "name": "place", "dim": 2}]
    specs = specs if first == "vector" else specs[1:] + specs[:1]
    model = img2vid.convert(small_vit(), num_frames=2, num_classes=num_classes, grafts=specs)
    assert model.takes_beside == {"audio": 6, "place": 2}
    given = {"audio": audio(), "place": torch.randn(2, 2)}
    plain = img2vid.convert(small_vit(), num_frames=2, num_classes=num_classes)
    width = plain(clips(2)).shape[1]
    assert torch.equal(model(clips(2), **given)[:, :width], plain(clips(2)))
    push(model)
    one = model(clips(2), **given)
    for name in given:
        assert not torch.allclose(model(clips(2), **{**given, name: given[name] + 1}), one, atol=1e-3)
    with model.gates_closed():
        assert torch.equal(model(clips(2), **given)[:, :width], plain(clips(2)))
    assert certify(model, small_vit(), num_frames=[1, 2]).reversible


def test_a_classifier_with_it_is_saved_loaded_and_learns(tmp_path):
    model = img2vid.convert("nano_clip", num_frames=2, num_classes=3, grafts=[AUDIO], random_weights=True)
    freeze(model, "grafts_only")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = F.cross_entropy(model(clips(2), audio=audio()), torch.tensor([0, 2]))
    loss.backward()
    assert model.classifier.graft_audio.zero_columns.grad.abs().min() > 0  # at the first step
    optimizer.step()
    assert F.cross_entropy(model(clips(2), audio=audio()), torch.tensor([0, 2])) < loss
    model.eval().save_pretrained(tmp_path)
    again = img2vid.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(clips(2), audio=audio()), model(clips(2), audio=audio()))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(clips(2), audio=audio()), model(clips(2), audio=audio()))


def test_streamed_logits_have_it_too():
    model = img2vid.convert(small_vit(), num_frames=4, causal=True, num_classes=5, grafts=[AUDIO])
    model = push(randomize(model)).eval()
    with torch.no_grad(), model.beside(audio=audio()):
        stream = model.stream()
        shown = [stream(clips()[:, t]) for t in range(3)]
        torch.testing.assert_close(shown[-1].logits, model(clips()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_chunks_and_views_keep_clips_and_vectors_together(num_classes):
    model = push(img2vid.convert(small_vit(), num_frames=4, num_classes=num_classes, grafts=[AUDIO])).train()
    x, given = torch.cat([clips(), clips() + 1]), audio(num_clips=4)

    def grads(chunk_size):
        model.zero_grad()
        step = Step(model, {"clip": x, "audio": given}, chunk_size)
        (step.features if num_classes is None else step.logits).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole, parts = grads(None), grads(1)
    assert len(whole) == len(parts)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    views = Step(model.eval(), {"clip": x, "audio": given[:2]}).vectors(4)["audio"]
    assert torch.equal(views, torch.stack([given[0], given[0], given[1], given[1]]))
    with pytest.raises(ObjectiveError, match="takes 'audio' beside clips, and batches hold clip"):
        Step(model, {"clip": x}).features  # noqa: B018


class WithSound(VideoData):
    """A vector that says the label, which the clips of this test do not."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return {**batch, "audio": F.one_hot(batch["label"] % 6, 6).float(), "clip": torch.zeros_like(batch["clip"])}


def test_training_learns_from_what_only_the_vector_says(motion_set, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.training_run.Videos", WithSound)
    classes = read_list(motion_set / "train.csv").class_names
    video = VideoConfig("nano_clip", num_frames=2, num_classes=len(classes), grafts=(AUDIO,))
    how = Tuning(lr=0.1, warmup=0, freeze="grafts_only")
    training = VideoTraining(video, Classification("linear"), how, save_to=str(tmp_path / "model"))
    trainer = fit(training, motion_set)
    assert trainer.global_step == 3 and (tmp_path / "model" / "moved.json").is_file()
    model = img2vid.load(tmp_path / "model")
    with torch.no_grad():
        given = torch.eye(6)
        scores = model(torch.zeros(6, 2, 3, 32, 32), audio=given)
    assert not torch.allclose(scores[0], scores[1], atol=1e-2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"takes audio, a vector of 6 numbers for each clip, and none was given: model\(clips, audio=\.\.\.\)"),
        ({"audi": torch.zeros(2, 6)}, r"takes no 'audi' beside clips. Did you mean 'audio'\? It takes: audio \(B, 6\)"),
        ({"audio": torch.zeros(2, 5)}, r"audio of \(2, 5\) was given, expected one vector for each clip, \(B, 6\)"),
        ({"audio": torch.zeros(6)}, r"audio of \(6,\) was given"),
        ({"audio": [0.0] * 6}, "audio of a list was given"),
        ({"audio": torch.zeros(2, 6).long()}, "of dtype torch.int64 was given, expected floats"),
        ({"audio": torch.zeros(3, 6)}, "3 vectors audio were given beside 2 clips"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_vector_is_said(given, message):
    model = img2vid.convert(small_vit(), num_frames=4, grafts=[AUDIO])
    with pytest.raises(BesideError, match=message):
        model(clips(), **given)
    with torch.no_grad():
        model(clips(), audio=audio())  # and nothing is left behind


def test_a_model_without_takes_nothing():
    with pytest.raises(BesideError, match="takes no 'audio' beside clips. It takes: nothing"):
        img2vid.convert(small_vit(), num_frames=4)(clips(), audio=audio())
    assert img2vid.convert(small_clip(), num_frames=4).takes_beside == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "dim=0: expected a whole number of at least 1"),
        ({"dim": 1.5}, "dim=1.5"),
        ({"dim": 4, "name": "normalize"}, "what forward calls another input"),
        ({"dim": 4, "name": "self"}, "what forward calls another input"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(img2vid.Img2VidError, match=message):
        img2vid.convert(small_vit(), grafts=[{"type": "vector", **options}])


@pytest.mark.parametrize("spec", [AUDIO, "control", "channels"], ids=str)
def test_evaluation_of_videos_alone_is_refused_before_one_is_read(spec, motion_set, tmp_path, capsys, monkeypatch):
    graft(img2vid.convert("nano_clip", num_frames=2), [spec]).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("img2vid.evaluation.reading.Videos.__init__", lambda *args: pytest.fail("a video was read"))
    test, model = str(motion_set / "test.csv"), str(tmp_path / "model")
    kept = ["--out", str(tmp_path / "out.json"), "--no-cache", "--num-frames", "2"]
    for command in (
        ["eval", "zero-shot", "--model", model, "--data", test, *kept],
        ["eval", "honesty", "--model", model, "--data", test, *kept, "--no-picture"],
        ["eval", "retrieval", "--model", model, "--data", test, *kept],
        ["eval", "probe", "--model", model, "--train", test, "--data", test, *kept],
    ):
        assert cli(command) == 2
        said = " ".join(capsys.readouterr().err.split())
        name = spec if isinstance(spec, str) else spec["name"]
        assert f"img2vid graft FOLDER --remove {name} --out FOLDER" in said, command
    assert not (tmp_path / "out.json").exists()


def test_commands_that_have_no_vectors_say_so(motion_set, tmp_path, capsys):
    graft(img2vid.convert("nano_clip", num_frames=2), [AUDIO]).save_pretrained(tmp_path / "model")
    given = ["eval", "retrieval", "--model", str(tmp_path / "model"), "--data", str(motion_set / "test.csv")]
    assert cli([*given, "--out", str(tmp_path / "out"), "--no-cache", "--num-frames", "2"]) != 0
    assert "takes audio, a vector of 6 numbers" in capsys.readouterr().err
