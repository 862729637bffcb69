"""Frames shown one at a time give what the whole clip gives, and no frame knows later ones."""

import copy
import pickle
import threading

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import img2vid
import img2vid.grafts
from img2vid.config import ConfigError, VideoConfig
from img2vid.streaming import Stream, StreamError
from img2vid.temporal.attention import TemporalAttention
from img2vid.temporal.causal import CausalAttention, look_back
from img2vid.temporal.eager import uncompiled
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


# ---- what may happen to a model while a stream of it is open


@pytest.mark.parametrize("number", [1, 3, 100])
@torch.no_grad()
def test_some_frames_at_a_time(number, long):
    """Blocks that work on some frames and places at a time leave a stream's memory, which is of all places, whole."""
    model = make()
    wanted = model.frame_features(long)
    model.set_frames_at_a_time(number)
    one_by_one, some = model.stream(), model.stream()
    assert_close(torch.stack([one_by_one(frame).frame for frame in long.unbind(1)], dim=1), wanted)
    assert_close(torch.cat([some(part).frame for part in long.split([2, 5, 4], dim=1)], dim=1), wanted)


@torch.no_grad()
def test_a_model_that_is_cast_goes_on(long):
    model = make()
    wanted = model.frame_features(long[:, :6])
    for window in (None, 8):
        stream = make().stream(window)
        for t in range(3):
            stream(long[:, t])
        stream.video.double()
        for t in range(3, 6):
            now = stream(long[:, t].double())
            assert now.frame.dtype == now.clip.dtype == torch.float64
            assert_close(now.frame.float(), wanted[:, t])
        assert_close(now.clip.float(), wanted.mean(dim=1))


@torch.no_grad()
def test_autocast_may_come_and_go(long):
    model = make()
    stream, wanted = model.stream(), model.frame_features(long)
    for t in range(6):
        with torch.autocast("cpu", torch.bfloat16, enabled=t % 2 == 0):
            torch.testing.assert_close(stream(long[:, t]).frame.float(), wanted[:, t], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("window", [None, 3])
def test_a_stream_of_inference_mode_goes_on_outside(window, long):
    model = make()
    stream, wanted = model.stream(window), model.stream(window)
    for t in range(11):
        with torch.inference_mode(t < 5):
            now = stream(long[:, t])
        assert torch.equal(now.frame, wanted(long[:, t]).frame)


@torch.no_grad()
def test_the_mean_of_many_frames_in_half_precision():
    """Added up in bfloat16, the mean of thousands of frames stands still a hundred frames before it is there."""
    stream = make().bfloat16().stream()
    features = torch.randn(3000, 1, 48, generator=torch.Generator().manual_seed(0)).bfloat16() + 1
    means = torch.stack([stream.running_mean(feature) for feature in features])
    assert means.dtype == torch.bfloat16
    exact = features.double().cumsum(0) / torch.arange(1, 3001).view(-1, 1, 1)
    torch.testing.assert_close(means.double(), exact, atol=5e-3, rtol=5e-3)


@torch.no_grad()
def test_a_layer_that_was_left_out_for_a_while_remembers_nothing_of_it(long):
    """Frozen at zero a branch is not computed, and keeps no keys; watched it is, and must not recall what never was."""
    model = img2vid.convert(small_vit(), num_frames=4, causal=True).requires_grad_(False)
    plain = model.frame_features(long)
    for at in ((3, 4, 5), (0, 1, 5, 6)):  # frames in which somebody watches
        stream = model.stream()
        for t in range(8):
            hook = model.blocks[1].temporal_fc.register_forward_hook(lambda *call: None)
            if t not in at:
                hook.remove()
            assert_close(stream(long[:, t]).frame, plain[:, t])
            hook.remove()
        (memory,) = stream.past.layers.values()
        assert (memory.first, memory.next) == ((3, 6) if at[0] else (5, 7))


def test_a_graft_that_looks_ahead_is_noticed_in_an_open_stream(long):
    model = make(causal=False, attention="space_only")
    stream = model.stream()
    stream(long[:, 0])
    img2vid.grafts.graft(model, [{"type": "st_adapter", "bottleneck": 8}])
    with pytest.raises(StreamError, match="st_adapter"):
        stream(long[:, 1])


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_copies_of_an_open_stream_go_their_own_way(fused, long):
    model = make().fuse() if fused else make()
    stream, wanted = model.stream(), model.frame_features(long)
    for t in range(4):
        stream(long[:, t])
    for twin in (copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))):
        assert twin.model is not model
        for t in range(4, 8):
            assert_close(twin(long[:, t]).frame, wanted[:, t])
    assert_close(stream(long[:, 4]).frame, wanted[:, 4])


@torch.no_grad()
def test_fused_and_unfused_in_between(long):
    model = make()
    stream, wanted = model.stream(), model.frame_features(long)
    for t in range(9):
        (model.unfuse, model.fuse, model.fuse)[t % 3]()
        assert_close(stream(long[:, t]).frame, wanted[:, t])


@torch.no_grad()
def test_compiled_blocks_run_as_they_were_written(long):
    """A program that was compiled knows no past; elsewhere, and afterwards, it runs compiled."""
    model, ran = make(), []
    wanted = model.frame_features(long)
    for block in model.blocks:
        block.compile(backend=lambda graph, inputs: ran.append(1) or graph.forward)
    stream = model.stream()
    for t in range(5):
        assert_close(stream(long[:, t]).frame, wanted[:, t])
    assert not ran
    assert_close(model.frame_features(long), wanted)
    assert ran


def test_threads_with_models_of_their_own_leave_the_compiler_as_it_was():
    import torch._dynamo

    before, inside = torch._dynamo.eval_frame._stance, threading.Barrier(2)
    first_out = threading.Event()

    def run(is_first):
        with uncompiled():
            inside.wait(10)
            if not is_first:
                first_out.wait(10)  # the one that came first is gone
            assert torch._dynamo.eval_frame._stance.stance == "force_eager"
        first_out.set()

    threads = [threading.Thread(target=run, args=(is_first,)) for is_first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch._dynamo.eval_frame._stance == before


def test_windows_no_memory_could_hold():
    with pytest.raises(img2vid.Img2VidError, match="at most 2,147,483,647"):
        make().stream(window=2**70)
    assert make().stream(window=2**31 - 1)(torch.zeros(1, 3, 32, 32)).frame.shape == (1, 48)
