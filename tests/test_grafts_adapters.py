"""Adapters against naive re-statements of the papers' equations, and their formulas for how many numbers they take."""

import pytest
import timm
import torch
from torch.nn import functional as F

import img2vid
from img2vid.certificate import certify
from img2vid.grafts import GraftError, graft
from img2vid.grafts.grafting import num_parameters
from tests.conftest import small_clip, small_eva, small_vit
from tests.test_grafts import clips, features, planted, push

DIM, DEPTH = 48, 3


def frames(num_frames=3):
    return clips(num_frames).flatten(0, 1)


def adapter(bottleneck, x, act=F.gelu):
    up = getattr(bottleneck, "zero_up", None) or bottleneck.up
    return act(x @ bottleneck.down.weight.T + bottleneck.down.bias) @ up.weight.T + up.bias


@torch.no_grad()
def by_hand(vit, run_block):
    """The features of a plain ViT on frames (B*T, 3, H, W), each block run by a function of our own."""
    x = vit._pos_embed(vit.patch_embed(frames()))
    for block in vit.blocks:
        x = run_block(block, x)
    return vit.norm(x)[:, 0].unflatten(0, (2, 3)).mean(dim=1)


def space_only(spec, make=small_vit):
    return push(img2vid.convert(make(), attention="space_only", num_frames=3, grafts=[spec]))


def test_houlsby():
    model = space_only({"type": "adapter", "bottleneck": 8, "init": "near", "near": 0.1})

    def run(block, x):
        y = type(block.attn).behind.forward(block.attn, block.norm1(x))
        x = x + y + adapter(block.attn.graft_adapter.adapter, y)
        y = type(block.mlp).behind.forward(block.mlp, block.norm2(x))
        return x + y + adapter(block.mlp.graft_adapter.adapter, y)

    torch.testing.assert_close(features(model), by_hand(model.base, run), atol=1e-5, rtol=1e-5)
    # section 2.1: 2 m d + d + m in each adapter, two adapters a layer
    assert num_parameters(model, "adapter") == DEPTH * 2 * (2 * 8 * DIM + DIM + 8)


def test_adaptformer():
    """Equation 3: ReLU(LN(x) W_down) W_up, times s, beside the MLP of the same input."""
    spec = {"type": "adapter", "bottleneck": 8, "at": "mlp", "form": "beside", "scale": 0.1, "activation": "relu"}
    model = space_only(spec)

    def run(block, x):
        x = x + block.attn(block.norm1(x))
        y = block.norm2(x)
        return (
            x + type(block.mlp).behind.forward(block.mlp, y) + 0.1 * adapter(block.mlp.graft_adapter.adapter, y, F.relu)
        )

    torch.testing.assert_close(features(model), by_hand(model.base, run), atol=1e-5, rtol=1e-5)
    assert num_parameters(model, "adapter") == DEPTH * (2 * 8 * DIM + DIM + 8)


@torch.no_grad()
def test_aim():
    """Section 3.4 with PyTorch's own attention, along time (T, B*N, D) and along space, as its code has it."""
    model = space_only({"type": "aim", "scale": 0.5}, lambda: small_clip().visual)
    plain, dim = small_clip().visual, 64
    blocks = [(block, own) for (_, block), own in zip(model.tower.blocks, plain.transformer.resblocks, strict=True)]

    x = plain._embeds(frames())  # (B*T, 1 + N, D)
    x = x + blocks[0][0].graft_aim.zero_time[0].repeat(2, 1)[:, None]
    for block, own in blocks:
        time = own.ln_1(x).unflatten(0, (2, 3)).transpose(0, 1).flatten(1, 2)  # (T, B*(1 + N), D)
        time = own.attn(*[time.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1)
        time = time.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 1)
        x = x + adapter(block.graft_aim.adapter, time)
        y = own.attn(*[own.ln_1(x)] * 3, need_weights=False)[0]
        x = x + y + adapter(block.attn.graft_aim.adapter, y)
        y = own.ln_2(x)
        x = x + own.mlp(y) + 0.5 * adapter(block.mlp.graft_aim.adapter, y)
    pooled = plain.ln_post(x)[:, 0] @ plain.proj
    torch.testing.assert_close(features(model), pooled.unflatten(0, (2, 3)).mean(dim=1), atol=1e-4, rtol=1e-4)
    # three adapters of ratio 0.25 a block, and the vectors of T frames
    assert num_parameters(model, "aim") == 3 * 3 * (2 * dim * dim // 4 + dim + dim // 4) + 3 * dim


def test_aim_adds_no_attention_and_knows_the_order_of_frames_by_its_vectors_alone():
    model = space_only({"type": "aim"})
    assert model.state_dict().keys() - planted(model).keys() == small_vit().state_dict().keys()
    with torch.no_grad():
        forwards, backwards = model(clips()), model(clips().flip(1))
        assert not torch.allclose(forwards, backwards, atol=1e-4)
        model.tower.blocks[0][1].graft_aim.zero_time.zero_()
        torch.testing.assert_close(model(clips()), model(clips().flip(1)), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(model(clips()), model(clips()[:, :1]), atol=1e-3)  # but frames do see each other


@pytest.mark.parametrize("make", [small_vit, small_eva], ids=["vit", "eva"])
@torch.no_grad()
def test_a_reused_attention_is_the_blocks_own(make):
    """Along time, three frames of one place are what three places of one frame are along space (without rotation)."""
    model = space_only({"type": "aim"}, make)
    _, block = model.tower.blocks[1]
    tokens = torch.randn(3, 1, DIM)
    with model.clip.of(3):
        along_time = block.graft_aim.along_time(tokens, block)
    attention = block.attn
    along_space = type(attention).behind.forward(attention, block.norm1(tokens.transpose(0, 1)))
    torch.testing.assert_close(along_time, along_space.transpose(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [(3, 1, 1), (1, 3, 3), (3, 3, 5)], ids=str)
@pytest.mark.parametrize("init", ["conv", "up"])
@torch.no_grad()
def test_st_adapter(kernel, init):
    """x + up(dwconv3d(down(x))) at every patch, the convolution written as a sum over neighbours."""
    channels, grid = 8, 4
    model = space_only({"type": "st_adapter", "bottleneck": channels, "kernel": list(kernel), "init": init})
    scion = model.tower.blocks[1][1].graft_st_adapter
    conv, up = (getattr(scion, name) for name in scion.names)
    tokens = torch.randn(2 * 3, 1 + grid * grid, DIM)
    y = scion.down(tokens[:, 1:]).unflatten(0, (2, 3)).unflatten(2, (grid, grid))  # (B, T, H, W, C)
    expected = torch.zeros_like(y) + conv.bias
    for t in range(3):
        for i in range(grid):
            for j in range(grid):
                for a in range(kernel[0]):
                    for b in range(kernel[1]):
                        for c in range(kernel[2]):
                            at = (t + a - kernel[0] // 2, i + b - kernel[1] // 2, j + c - kernel[2] // 2)
                            if 0 <= at[0] < 3 and 0 <= at[1] < grid and 0 <= at[2] < grid:
                                expected[:, t, i, j] += conv.weight[:, 0, a, b, c] * y[:, at[0], at[1], at[2]]
    expected = tokens[:, 1:] + up(expected.flatten(2, 3).flatten(0, 1)) + scion.zero_bias
    with model.clip.of(3):
        out = scion.before(tokens, model.tower.blocks[1][1])
    assert torch.equal(out[:, 0], tokens[:, 0])  # the class token has no place
    torch.testing.assert_close(out[:, 1:], expected, atol=1e-5, rtol=1e-5)
    size = kernel[0] * kernel[1] * kernel[2]
    assert num_parameters(model, "st_adapter") == DEPTH * (2 * DIM * channels + channels + DIM + channels * (size + 1))


def test_st_adapters_take_other_sizes_of_the_same_shape_and_refuse_what_is_no_grid():
    model = push(
        img2vid.convert(
            small_vit(dynamic_img_size=True),
            attention="space_only",
            grafts=[{"type": "st_adapter", "bottleneck": 8, "kernel": [3, 3, 3]}],
        )
    )
    assert model(torch.randn(1, 2, 3, 64, 64)).shape == (1, DIM)
    with pytest.raises(GraftError, match="no grid of the shape 4 x 4"):
        model(torch.randn(1, 2, 3, 32, 48))
    with pytest.raises(img2vid.Img2VidError, match="expected odd numbers"):
        graft(model, [{"type": "st_adapter", "kernel": [2, 1, 1], "name": "even"}])


def test_published_sizes():
    """AIM: 11 M tunable of ViT-B/16 (table 1); ST-Adapter: 7.2 M (table 3)."""
    for spec, millions in (({"type": "aim"}, 10.7), ({"type": "st_adapter"}, 7.1)):
        with torch.device("meta"):
            vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        model = img2vid.convert(vit, attention="space_only", num_frames=8, grafts=[spec])
        assert sum(p.numel() for p in planted(model).values()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_near_the_identity_is_not_at_it_and_the_certificate_says_by_how_much():
    moved = []
    for near in (1e-2, 1e-3):
        spec = {"type": "adapter", "bottleneck": 8, "init": "near", "near": near}
        model = img2vid.convert(small_vit(), num_frames=4, grafts=[spec])
        certificate = certify(model, small_vit(), num_frames=[1, 2], at_step_0=True)
        assert certificate.ok and {row.claimed for row in certificate.comparisons} == {None}
        assert "near the identity, not at it" in str(certificate)
        moved.append(max(row.feature_difference for row in certificate.comparisons))
    assert 0 < moved[1] < moved[0] / 30 < 0.1


def test_parallel_blocks_have_no_sublayer_to_stand_behind():
    block = timm.models.vision_transformer.ParallelScalingBlock
    for spec in ("adapter", "aim"):
        with pytest.raises(GraftError, match="parallel blocks compute attention and MLP as one"):
            img2vid.convert(small_vit(block_fn=block), grafts=[spec])
    model = img2vid.convert(small_vit(block_fn=block), num_frames=4, grafts=["st_adapter", "lora"])
    assert certify(model, small_vit(block_fn=block), num_frames=[1, 2]).ok
    two = timm.models.vision_transformer.ParallelThingsBlock
    model = img2vid.convert(small_vit(block_fn=two), num_frames=4, grafts=[{"type": "adapter", "bottleneck": 8}])
    assert len([name for name in planted(model) if name.endswith("down.weight")]) == DEPTH * 4
    assert certify(model, small_vit(block_fn=two), num_frames=[1, 2]).ok


def test_grafts_compose():
    """LoRA in the attention that AIM reuses along time, an adapter behind it, a convolution in front of the block."""
    specs = [
        {"type": "lora", "rank": 4, "targets": ["attn", "mlp"]},
        "aim",
        {"type": "adapter", "bottleneck": 8},
        {"type": "st_adapter", "bottleneck": 8},
    ]
    model = img2vid.convert(small_eva(), num_frames=4, grafts=specs)
    certificate = certify(model, small_eva(), num_frames=[1, 2], at_step_0=True)
    assert certificate.ok and certificate.alive
    assert {layer.graft for layer in certificate.liveness} == {None, "lora", "aim", "adapter", "st_adapter"}
    push(model)
    expected = features(model)
    img2vid.grafts.fold(model, "lora")
    torch.testing.assert_close(features(model), expected, atol=1e-5, rtol=1e-5)
    img2vid.grafts.remove(model)
    assert model.state_dict().keys() == img2vid.convert(small_eva(), num_frames=4).state_dict().keys()
