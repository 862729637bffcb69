"""Whichever way attention along time is computed, it is the same attention."""

import pytest
import torch
from torch.nn import functional as F

import img2vid
from img2vid.temporal import kernels
from img2vid.temporal.causal import look_back
from tests.conftest import randomize, small_vit


def tokens(num_clips=2, positions=5, heads=3, num_frames=4, head_dim=8, **kwargs):
    """Views of one product, as the module has them: (B, S, H, T, head_dim) each."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(num_clips, num_frames, positions, 3, heads, head_dim, generator=generator).to(**kwargs)
    return qkv.permute(3, 0, 2, 4, 1, 5).unbind(0)


WAYS = {"products": kernels.products, "fused": kernels.fused, "chosen": kernels.attend}
LOOKS = {"all": (None, False), "causal": (None, True), "a band": (look_back(0, 4, 0, 4, 2), False)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_ways_are_torchs_attention(way, look, dtype):
    (q, k, v), (mask, causal) = tokens(dtype=dtype), LOOKS[look]
    exact = [x.double() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact, mask, is_causal=causal, scale=0.3)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(WAYS[way](q, k, v, 0.3, mask, causal).double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_gradients(way):
    def gradients(run):
        leaves = [x.detach().clone().requires_grad_() for x in tokens(dtype=torch.float64)]
        run(*leaves).square().sum().backward()
        return [x.grad for x in leaves]

    expected = gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3))
    for got, wanted in zip(gradients(lambda q, k, v: WAYS[way](q, k, v, 0.3, None, True)), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)


def test_what_is_chosen_depends_on_precision_length_and_training():
    q, k, _ = tokens()
    assert not kernels.as_products(q, k, training=False)
    assert kernels.as_products(q.bfloat16(), k.bfloat16(), training=False)
    assert kernels.as_products(q, k, training=True)
    assert kernels.as_products(q[..., :1, :], k, training=False), "the one query of a stream"
    long = tokens(positions=1, num_frames=kernels.SHORT + 1, dtype=torch.bfloat16)
    assert not kernels.as_products(*long[:2], training=True), "weights would be larger than what is weighed"
    with kernels.spelled_out():
        assert kernels.as_products(*long[:2], training=False)
    meta = [x.to("meta") for x in (q, k)]
    assert not kernels.as_products(*meta, training=True), "on other devices, the kernels made for them"


@pytest.mark.parametrize("most", [1, 6, 7, 10**6])
def test_in_parts_no_kernel_finds_too_many(most, monkeypatch):
    """As on a GPU, whose kernels take so many sequences at a time; the device is pretended, the numbers are not."""
    calls = []

    class Elsewhere:
        type = "cuda"

    class Pretending(torch.Tensor):
        device = Elsewhere()

    def counted(q, *args, **kwargs):
        calls.append(q.shape[0] * q.shape[1])
        return F.scaled_dot_product_attention(q.as_subclass(torch.Tensor), *args, **kwargs)

    q, k, v = tokens()
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    monkeypatch.setattr(kernels, "MOST_SEQUENCES", most)
    monkeypatch.setattr(kernels, "attend", lambda q, k, v, scale, mask, causal: counted(q, k, v, mask, scale=scale))
    got = kernels.fused(q.as_subclass(Pretending), k, v, 0.3, None, False)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), expected)
    assert max(calls) <= max(most, 3) and sum(calls) == 2 * 5 * 3


@pytest.mark.parametrize("settings", [{}, {"causal": True}, {"prefix_mode": "shared"}], ids=str)
def test_in_eval_mode_the_bits_do_not_depend_on_gradients(settings, clips):
    model = randomize(img2vid.convert(small_vit(), num_frames=3, **settings), seed=3).eval()
    with_gradients = model(clips)
    with torch.no_grad():
        assert with_gradients.requires_grad and torch.equal(with_gradients, model(clips))
