import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.eva import EvaBlock
from torch import nn

from img2vid.backbones.reading import child, read_block
from img2vid.temporal.attention import TemporalAttention
from tests.conftest import randomize, small_clip, small_vit


def attend_naively(attention: TemporalAttention, x: torch.Tensor, num_frames: int) -> torch.Tensor:
    """The same attention written as loops over clips, positions, heads and frames."""
    out = torch.zeros_like(x)
    heads, width = attention.num_heads, attention.head_dim
    q, k, v = attention.qkv(x).split(heads * width, dim=-1)
    for clip in range(x.shape[0] // num_frames):
        rows = range(clip * num_frames, (clip + 1) * num_frames)
        for s in range(x.shape[1]):
            for t in rows:
                mixed = []
                for h in range(heads):
                    part = slice(h * width, (h + 1) * width)
                    scores = torch.stack([q[t, s, part] @ k[u, s, part] / math.sqrt(width) for u in rows])
                    weights = scores.softmax(0)
                    mixed.append(sum(w * v[u, s, part] for w, u in zip(weights, rows, strict=True)))
                out[t, s] = attention.proj(torch.cat(mixed))
    return out


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_equals_a_naive_loop(num_clips, num_frames, num_tokens, num_heads):
    torch.manual_seed(0)
    attention = TemporalAttention(12, num_heads, 4)
    for linear in (attention.qkv, attention.proj):
        nn.init.normal_(linear.weight)
        nn.init.normal_(linear.bias)
    x = torch.randn(num_clips * num_frames, num_tokens, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            attention(x, num_frames), attend_naively(attention, x, num_frames), atol=1e-4, rtol=1e-4
        )


def spatial_residual(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What an image block's attention adds, by the block's own modules."""
    norm = block.ln_1 if hasattr(block, "ln_1") else block.norm1
    if isinstance(block.attn, nn.MultiheadAttention):
        y = norm(x)
        return block.ls_1(block.attn(y, y, y, need_weights=False)[0])
    y = block.attn(norm(x))
    return block.ls1(y) if hasattr(block, "ls1") else y * (1 if block.gamma_1 is None else block.gamma_1)


def first_block(name: str, **kwargs) -> nn.Module:
    return randomize(timm.create_model(name, depth=1, **kwargs)).blocks[0]


def grouped_queries() -> nn.Module:
    return randomize(EvaBlock(64, 4, attn_type="rope", qkv_fused=False, num_kv_heads=2, qk_norm=True))


NARROW = {"embed_dim": 64, "num_heads": 4}
BLOCKS = {
    "plain": lambda: small_vit().blocks[1],
    "layer scale": lambda: small_vit(init_values=0.3).blocks[1],
    "qk norm, no bias": lambda: small_vit(qk_norm=True, qkv_bias=False).blocks[1],
    "norm inside": lambda: small_vit(scale_attn_norm=True).blocks[1],
    "eva, separate biases": lambda: first_block("eva_giant_patch14_224", img_size=28, **NARROW),
    "eva02, split": lambda: first_block("eva02_tiny_patch14_224", img_size=28),
    "grouped queries": grouped_queries,
    "beit": lambda: first_block("beit_base_patch16_224", use_rel_pos_bias=False, **NARROW),
    "open_clip": lambda: small_clip().visual.transformer.resblocks[1],
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_copy_does_along_time_what_the_block_does_along_space(kind):
    block = BLOCKS[kind]().eval()
    spatial = read_block(block)
    copy = TemporalAttention.from_spatial(spatial)
    sequence = torch.randn(2, 5, spatial.dim)  # once as 5 tokens of an image, once as 5 frames of one position
    along_time = copy(spatial.norm(sequence.flatten(0, 1).unsqueeze(1)), num_frames=5).unflatten(0, (2, 5)).squeeze(2)
    torch.testing.assert_close(along_time, spatial_residual(block, sequence), atol=1e-5, rtol=1e-4)
    # BEiT may also be given a relative position bias from outside the block
    assert spatial.left_behind == (("relative position bias (it is spatial)",) if kind == "beit" else ())


def test_the_copy_shares_no_memory_with_the_original(vit):
    block = vit.blocks[0]
    copy = TemporalAttention.from_spatial(read_block(block))
    copy.qkv.weight.data.zero_()
    assert block.attn.qkv.weight.abs().min() > 0


def test_random_and_zeros(vit):
    spatial = read_block(vit.blocks[0])
    random = TemporalAttention.from_spatial(spatial, "random")
    assert 0.015 < random.qkv.weight.std() < 0.025
    assert random.qkv.bias.abs().max() == 0
    zeros = TemporalAttention.from_spatial(spatial, "zeros")
    assert all(p.abs().max() == 0 for p in zeros.parameters())


def test_random_resets_copied_norms():
    spatial = read_block(small_vit(qk_norm=True).blocks[0])
    assert child(spatial.q_norm, "weight").std() > 0
    random = TemporalAttention.from_spatial(spatial, "random")
    assert torch.equal(random.q_norm.weight, torch.ones(12))
    assert torch.equal(random.k_norm.bias, torch.zeros(12))
