"""Prompts against a naive re-statement of VPT, and why the exact variant has a softmax of its own."""

import pytest
import timm
import torch
from torch.nn import functional as F

import img2vid
from img2vid.certificate import certify
from img2vid.grafts import GraftError
from img2vid.grafts.grafting import num_parameters
from tests.conftest import randomize, small_clip, small_eva, small_vit
from tests.test_grafts import clips, features, push

DIM, DEPTH, K = 48, 3, 5


def with_prompts(form, make=small_vit, **settings):
    spec = {"type": "prompt", "num_tokens": K, "form": form}
    return push(img2vid.convert(make(), attention="space_only", num_frames=3, grafts=[spec], **settings))


@pytest.mark.parametrize("form", ["shallow", "deep"])
@torch.no_grad()
def test_vpt(form):
    """Equations 4 and 5 of the paper, on timm's own blocks."""
    model, plain = with_prompts(form), small_vit()
    x = plain._pos_embed(plain.patch_embed(clips().flatten(0, 1)))
    cls, patches = x[:, :1], x[:, 1:]
    for i, block in enumerate(plain.blocks):
        scion = getattr(model.tower.blocks[i][1], "graft_prompt", None)
        if form == "deep" or i == 0:
            prompts = scion.tokens.expand(len(x), -1, -1)
        x = block(torch.cat([cls, prompts, patches], dim=1))
        cls, prompts, patches = x.split([1, K, 16], dim=1)
    expected = plain.norm(cls)[:, 0].unflatten(0, (2, 3)).mean(dim=1)
    torch.testing.assert_close(features(model), expected, atol=1e-5, rtol=1e-5)
    assert num_parameters(model, "prompt") == (DEPTH if form == "deep" else 1) * K * DIM  # table 1: N x p x d, p x d


@torch.no_grad()
def test_average_pooling_is_of_patches_alone():
    """The prompts of the last block are gone before anything is pooled."""
    model = with_prompts("deep", lambda: small_vit(class_token=False, global_pool="avg"))
    tokens = []
    model.base.norm.register_forward_hook(lambda module, args, out: tokens.append(out))
    features(model)
    assert tokens[0].shape == (6, 16, DIM)


@torch.no_grad()
def test_rotary_positions_stay_those_of_the_patches():
    """A prompt that no one can see (its key far off) leaves every patch where it was."""
    model, plain = with_prompts("deep", small_eva), small_eva()
    attention = model.tower.blocks[0][1].attn
    assert attention.num_prefix_tokens == 1 + K and plain.blocks[0].attn.num_prefix_tokens == 1
    tokens, rope = torch.randn(2, 1 + 16, DIM), plain.rope.get_embed()
    prompts = torch.randn(2, K, DIM)
    mask = torch.zeros(1 + K + 16, 1 + K + 16)
    mask[:, 1 : 1 + K] = -torch.inf
    out = attention(torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1), rope=rope, attn_mask=mask)
    expected = plain.blocks[0].attn(tokens, rope=rope)
    torch.testing.assert_close(torch.cat([out[:, :1], out[:, 1 + K :]], dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("make", "dim"), [(small_vit, 48), (lambda: small_clip().visual, 64)], ids=["vit", "clip"])
@torch.no_grad()
def test_gated(make, dim):
    """attention(x) + proj(gate * softmax(q k_p) v_p), head by head, for one query at a time."""
    model, plain = with_prompts("gated", make), make()
    attention = model.tower.blocks[0][1].attn
    own = dict(plain.named_modules())[f"{model.tower.blocks[0][0]}.attn"]
    scion, x, heads = attention.graft_prompt, torch.randn(2, 7, dim), 4
    is_timm = hasattr(own, "qkv")
    weight, bias = (own.qkv.weight, own.qkv.bias) if is_timm else (own.in_proj_weight, own.in_proj_bias)
    out_proj = own.proj if is_timm else own.out_proj

    def run(module, x):
        return module(x) if is_timm else module(x, x, x, need_weights=False)[0]

    q, k, v = (
        F.linear(z, w, b)
        for z, w, b in zip((x, scion.tokens, scion.tokens), weight.chunk(3), bias.chunk(3), strict=True)
    )
    expected = run(own, x)
    width = dim // heads
    for b in range(2):
        for s in range(7):
            seen = []
            for h in range(heads):
                at = slice(h * width, (h + 1) * width)
                share = (k[:, at] @ q[b, s, at] * width**-0.5).softmax(dim=0)
                seen.append(scion.zero_gate[h, 0, 0] * share @ v[:, at])
            expected[b, s] += out_proj.weight @ torch.cat(seen)
    torch.testing.assert_close(run(attention, x), expected, atol=1e-5, rtol=1e-5)
    assert num_parameters(model, "prompt") == DEPTH * (K * dim + heads)


def test_a_prompt_that_is_masked_out_exactly_never_comes_back():
    """The reason for the gate: through a logit at -inf no gradient passes, not even to the logit."""
    q, k, v = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5, 8)
    prompt_k, prompt_v = (torch.randn(1, 8, requires_grad=True) for _ in range(2))
    mask = torch.full((1,), -torch.inf, requires_grad=True)
    logits = torch.cat([q @ k.T, q @ prompt_k.T + mask], dim=1)
    out = logits.softmax(dim=1) @ torch.cat([v, prompt_v])
    assert torch.equal(out, (q @ k.T).softmax(dim=1) @ v)  # exactly absent
    out.square().sum().backward()
    assert not prompt_k.grad.any() and not prompt_v.grad.any() and not mask.grad.any()


def test_the_certificate_says_by_how_much():
    said = {}
    for form in ("shallow", "deep", "gated"):
        model = img2vid.convert(small_vit(), num_frames=4, grafts=[{"type": "prompt", "num_tokens": K, "form": form}])
        certificate = certify(model, small_vit(), num_frames=[1, 2], at_step_0=True)
        assert certificate.ok and certificate.alive
        said[form] = max(row.feature_difference for row in certificate.comparisons)
        assert ("none: prompts take a share" in str(certificate)) == (form != "gated")
    assert said["gated"] == 0.0 < min(said["shallow"], said["deep"])


def test_where_prompts_have_no_place():
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 0}

    def make():
        torch.manual_seed(0)
        return randomize(timm.models.beit.Beit(**shape, use_rel_pos_bias=True)).eval()

    with pytest.raises(GraftError, match="relative position bias of fixed size.*Use form='gated'"):
        img2vid.convert(make(), grafts=["prompt"])
    model = img2vid.convert(make(), num_frames=4, grafts=[{"type": "prompt", "form": "gated"}])
    assert certify(model, make(), num_frames=[1, 2]).ok
    with pytest.raises(GraftError, match="per_patch"):
        img2vid.convert(small_vit(), grafts=["prompt"], time_embed="per_patch")


def test_prompts_and_adapters_on_one_attention_do_not_get_in_each_others_way():
    """Whichever was grafted first: the later one stands around it."""
    prompt, beside = {"type": "prompt", "num_tokens": K}, {"type": "adapter", "bottleneck": 8, "form": "beside"}
    for specs in ([prompt, beside], [beside, prompt], [prompt, {**prompt, "name": "more"}, "aim"]):
        model = push(img2vid.convert(small_vit(), num_frames=4, grafts=specs))
        assert features(model).shape == (2, DIM)
        assert certify(model, small_vit(), num_frames=[1, 2]).ok
