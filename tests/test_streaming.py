"""Frames shown one at a time give what the whole clip gives, and no frame knows later ones."""

import copy
import threading

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import img2vid
from img2vid.config import ConfigError, VideoConfig
from img2vid.streaming import Stream, StreamError
from img2vid.temporal.attention import TemporalAttention
from img2vid.temporal.causal import CausalAttention, look_back
from img2vid.temporal.infront import take_from_front
from tests.conftest import randomize, small_clip, small_vit


def small_eva() -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 0}
    return randomize(timm.models.eva.Eva(use_rot_pos_emb=True, use_abs_pos_emb=False, **shape)).eval()


def make(image_model=None, **settings):
    settings = {"num_frames": 4, "causal": True, **settings}
    return randomize(img2vid.convert(small_vit() if image_model is None else image_model, **settings), seed=3).eval()


@pytest.fixture
def long():
    """Two videos of eleven frames: longer than the models' time embedding, and than the windows."""
    return torch.randn(2, 11, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-5)


MODELS = {
    "timm ViT": lambda: make(),
    "rotary Eva": lambda: make(small_eva()),
    "tanh gate": lambda: make(gate="tanh"),
    "always open": lambda: make(gate="none"),
    "some layers": lambda: make(temporal_layers="every:2"),
    "time for each patch": lambda: make(time_embed="per_patch"),
    "no time embedding": lambda: make(time_embed="none"),
    "zeros after the last": lambda: make(time_embed_resample="crop_or_pad"),
    "block input residual": lambda: make(quirks=("block_input_residual",)),
    "factorised encoder": lambda: make(attention="factorised_encoder", encoder_layers=2),
    "with classes": lambda: make(num_classes=5),
    "frames alone": lambda: make(causal=False, attention="space_only"),
    "fused": lambda: make().fuse(),
    "fused encoder": lambda: make(attention="factorised_encoder", encoder_layers=2).fuse(),
    "qk norm": lambda: make(small_vit(qk_norm=True)),
}


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_one_frame_at_a_time_is_the_whole_clip(kind, long):
    """Frame t's feature is that of any clip beginning with these frames; the clip's is that of the frames so far."""
    model = MODELS[kind]()
    frames, logits = model.frame_features(long), model.config.num_classes is not None
    stream = model.stream()
    for t in range(long.shape[1]):
        now = stream(long[:, t])
        assert_close(now.frame, frames[:, t])
        assert_close(now.clip, model.clip_features(long[:, : t + 1]))
        assert_close(now.logits, model(long[:, : t + 1])) if logits else None
    assert stream.num_frames == long.shape[1] and (now.logits is not None) == logits


@torch.no_grad()
def test_features_stand_where_texts_are(long):
    model = make(small_clip())
    stream = model.stream()
    for t in range(5):
        assert_close(stream(long[:, t]).clip, model.encode_video(long[:, : t + 1], normalize=False))


@torch.no_grad()
def test_no_frame_knows_later_ones(long):
    """To the bit, with gates open; the ordinary model is the control."""
    changed = long.clone()
    changed[:, 5:] = torch.randn(2, 6, 3, 32, 32)
    for causal in (True, False):
        model = make(causal=causal, time_embed_resample="hold")
        a, b = model.frame_features(long), model.frame_features(changed)
        assert torch.equal(a[:, :5], b[:, :5]) == causal
        assert not torch.isclose(a[:, 5:], b[:, 5:]).all(dim=-1).any()


def attend_in_a_band(attention: TemporalAttention, x: torch.Tensor, num_frames: int, window: int) -> torch.Tensor:
    """Written out: each frame's softmax over itself and the ``window - 1`` before."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim)).unbind(-3)
    out = torch.zeros_like(q)
    for row in range(len(x)):
        first = max(row - row % num_frames, row - window + 1)
        scores = torch.einsum("shd,tshd->tsh", q[row], k[first : row + 1]) * attention.scale
        out[row] = torch.einsum("tsh,tshd->shd", scores.softmax(0), v[first : row + 1])
    return out.flatten(-2)


@pytest.mark.parametrize("window", [1, 2, 3, 8, 30])
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_a_window_is_a_band_in_every_layer(window, fused, long, monkeypatch):
    model = make().fuse() if fused else make()
    at_once, one_by_one, some = (model.stream(window) for _ in range(3))
    whole = at_once(long)
    parts = [some(part) for part in long.split([2, 1, 5, 3], dim=1)]
    for name in ("frame", "clip"):
        assert_close(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(whole, name))
    for t in range(long.shape[1]):
        now = one_by_one(long[:, t])
        assert_close(now.frame, whole.frame[:, t])
        assert_close(now.clip, whole.frame[:, max(0, t - window + 1) : t + 1].mean(dim=1))
    banded = lambda self, x, num_frames: attend_in_a_band(self, x, num_frames, window)  # noqa: E731
    monkeypatch.setattr(CausalAttention, "before_proj", banded, raising=False)
    assert_close(whole.frame, model.frame_features(long))


def test_the_band():
    assert look_back(0, 4, 0, 4, None).tolist() == torch.ones(4, 4).tril().bool().tolist()
    band = [[True, True, False, False], [False, True, True, False], [False, False, True, True]]
    assert look_back(5, 3, 4, 4, 2).tolist() == band


@torch.no_grad()
def test_memory_stands_still_with_a_window(long):
    model = make()
    stream, endless = model.stream(4), model.stream()
    sizes = []
    for t in range(40):
        stream(long[:, t % 11]), endless(long[:, t % 11])
        sizes.append(stream.past.num_bytes())
    assert set(sizes) == {2 * 3 * 2 * 17 * 48 * 4 * 4}, "keys and values of 3 blocks, 2 videos, 17 tokens, 4 frames"
    assert endless.past.num_bytes() == sizes[0] // 4 * 64


@torch.no_grad()
def test_tubelets_are_steps(long):
    model = make(tubelet_size=2)
    frames, stream = model.frame_features(long[:, :10]), model.stream()
    for step in range(5):
        now = stream(long[:, 2 * step : 2 * step + 2])
        assert_close(now.frame[:, 0], frames[:, step])
    assert stream.num_frames == 10
    with pytest.raises(img2vid.Img2VidError, match="give 2 at a time"):
        stream(long[:, 0])


@torch.no_grad()
def test_streams_do_not_disturb_each_other_nor_the_model(long):
    model = make()
    before, state = model(long), copy.deepcopy(model.state_dict())
    a, b = model.stream(), model.stream(window=2)
    for t in range(6):
        from_a, from_b = a(long[:, t]), b(long.flip(1)[:, t])
        assert torch.equal(model(long), before)
    again_a, again_b = model.stream(), model.stream(window=2)
    for t in range(6):
        now_a = again_a(long[:, t])
    for t in range(6):
        now_b = again_b(long.flip(1)[:, t])
    assert torch.equal(now_a.frame, from_a.frame) and torch.equal(now_b.frame, from_b.frame)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    copy.deepcopy(model)(long)


@torch.no_grad()
def test_threads_take_turns(long):
    model, found = make(), {}
    expected = [model.stream()(video).frame for video in long.split(1)]

    def watch(i):
        stream = model.stream()
        found[i] = [stream(long[i : i + 1, t]).frame for t in range(11)]

    threads = [threading.Thread(target=watch, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert_close(torch.stack(found[i], dim=1), expected[i])


@torch.no_grad()
def test_reset_and_what_does_not_continue(long):
    model = make()
    stream = model.stream()
    first = stream(long[:, 0]).frame
    stream(long[:, 1])
    for other in (long[:1, 0], F.interpolate(long[:, 0], size=(32, 40))):
        with pytest.raises(StreamError, match=r"This stream is of 2 videos of \(3, 32, 32\)"):
            stream(other)
    for wrong, message in ((long[0, 0], "takes a frame"), ("video.mp4", "str was given"), (long[:, 0, :1], "channels")):
        with pytest.raises(img2vid.Img2VidError, match=message):
            stream(wrong)
    assert_close(stream(long[:, 2]).frame, model.frame_features(long[:, :3])[:, 2])
    stream.reset()
    assert stream.num_frames == 0 and torch.equal(stream(long[:, 0]).frame, first)


@torch.no_grad()
def test_an_interrupted_frame_is_not_taken_for_seen(long):
    model = make()
    stream = model.stream()
    stream(long[:, 0])

    def fail(*args):
        raise KeyboardInterrupt

    hook = model.blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        stream(long[:, 1])
    hook.remove()
    with pytest.raises(StreamError, match="interrupted"):
        stream(long[:, 1])
    assert torch.equal(model(long), make()(long)), "the model itself knows nothing of it"
    stream.reset()
    assert_close(stream(long[:, :2]).frame, model.frame_features(long[:, :2]))


def test_what_cannot_be_streamed_says_so(long):
    with pytest.raises(StreamError, match=r"Convert with causal=True \(--causal\)"):
        make(causal=False).stream()
    model = make()
    with pytest.raises(img2vid.Img2VidError, match="window=0"):
        model.stream(window=0)
    with pytest.raises(StreamError, match="training mode"):
        Stream(model.train())(long[:, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "joint_space_time"}, "sees all frames at once"),
        ({"attention": "space_only"}, "no attention along time"),
        ({"prefix_mode": "shared"}, "brings what later frames show into earlier ones"),
        ({"prefix_mode": "global"}, "brings what later frames show into earlier ones"),
        ({"time_embed_resample": "linear"}, "would depend on how many follow"),
        ({"quirks": ("mean_before_norm",)}, "mean_before_norm"),
        ({"causal": "yes"}, "causal='yes': expected true or false"),
    ],
)
def test_what_would_look_ahead_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        VideoConfig(**{"causal": True, **settings})


def test_time_embeddings_by_default():
    assert VideoConfig().time_embed_resample == "linear"
    assert VideoConfig(causal=True).time_embed_resample == "hold"
    config = VideoConfig(causal=True, num_frames=3)
    assert VideoConfig.from_dict(config.to_dict()) == config


# ---- it still is the image model, and says that it looks back only


@pytest.mark.parametrize("settings", [{}, {"attention": "factorised_encoder"}, {"tubelet_size": 2}], ids=str)
def test_the_certificate_holds(settings):
    model = img2vid.convert(small_vit(), num_frames=4, causal=True, **settings)
    certificate = img2vid.certify(model, small_vit())
    assert certificate.ok and certificate.exchange > 0.0 and certificate.later == 0.0
    assert all(c.claimed == "bitwise" and c.held for c in certificate.comparisons)
    assert "by 0 when only later ones do (causal)" in " ".join(str(certificate).split())
    assert img2vid.certify(img2vid.convert(small_vit(), num_frames=4), small_vit()).later is None


def test_the_certificate_fails_where_one_layer_looks_ahead():
    model = img2vid.convert(small_vit(), num_frames=4, causal=True)
    take_from_front(model.blocks[1].temporal_attn, CausalAttention)
    certificate = img2vid.certify(model, small_vit())
    assert certificate.later > 0.0 and certificate.held and not certificate.separate and not certificate.ok


def test_saved_and_loaded_it_still_is_causal(long, tmp_path):
    image = {"backbone": "vit_tiny", "random_weights": True, "image_size": 32, "num_frames": 3}
    model = randomize(img2vid.convert(causal=True, **image), seed=3).eval()
    model.save_pretrained(tmp_path)
    again = img2vid.load(tmp_path)
    assert again.config.causal and again.config.time_embed_resample == "hold"
    with torch.no_grad():
        assert torch.equal(again.stream()(long).frame, model.stream()(long).frame)


def test_checkpointing_and_gradients(long):
    """Training a causal model: the same gradients where blocks run twice."""
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        model.set_grad_checkpointing(checkpointing)
        model(long[:, :4]).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_other_formats_refuse_it(tmp_path):
    settings = {"prefix_mode": "per_frame", "num_frames": 4, "causal": True, "num_classes": 3}
    model = make(**settings)
    with pytest.raises(img2vid.Img2VidError, match="causal is True here, False there"):
        img2vid.export_checkpoint(model, tmp_path / "model.pyth", "timesformer")
    assert not list(tmp_path.iterdir())
