"""The control branch against a naive re-statement of ControlNet, and its way past checkpointing."""

import pytest
import torch

import img2vid
from img2vid.certificate import certify
from img2vid.grafts import GraftError, graft
from img2vid.grafts.grafting import num_parameters
from tests.conftest import randomize, small_eva, small_vit
from tests.test_grafts import clips, features, push

DIM, SPEC = 48, {"type": "control", "more": 2, "copies": 2}


def controlled(spec=SPEC, make=small_vit, **settings):
    return push(img2vid.convert(make(), num_frames=3, grafts=[spec], **{"attention": "space_only", **settings}))


@torch.no_grad()
def test_controlnet():
    """y = F(x) + Z2(F'(x + Z1(c))), two blocks deep, on timm's own blocks."""
    model, plain = controlled(), small_vit()
    frames = clips(3, model=model).flatten(0, 1)
    stem = model.tower.patch_conv.graft_control
    x = plain._pos_embed(plain.patch_embed(frames[:, :3]))
    hint = stem.zero_in(stem.stem(frames[:, 3:]).flatten(2).transpose(1, 2))
    control = x.clone()
    control[:, 1:] += hint
    for i, block in enumerate(plain.blocks):
        x = block(x)
        if i < 2:
            branch = model.tower.blocks[i][1].graft_control
            control = branch.copy(control)
            x = x + control @ branch.zero_out.weight.T + branch.zero_out.bias
    expected = plain.norm(x)[:, 0].unflatten(0, (2, 3)).mean(dim=1)
    torch.testing.assert_close(features(model), expected, atol=1e-5, rtol=1e-5)
    block = sum(p.numel() for p in plain.blocks[0].parameters())
    zero = DIM * DIM + DIM
    assert num_parameters(model, "control") == 2 * (block + zero) + zero + (2 * 64 + 1) * DIM


def test_copies_are_of_the_image_block_alone_and_are_called_copies():
    model = img2vid.convert(small_vit(), num_frames=3, grafts=[{"type": "lora", "targets": ["attn"]}, SPEC])
    plain = small_vit()
    for i in range(2):
        branch = model.tower.blocks[i][1].graft_control
        assert type(branch.copy) is type(plain.blocks[i])
        assert branch.copy.state_dict().keys() == plain.blocks[i].state_dict().keys()
        for key, tensor in plain.blocks[i].state_dict().items():
            assert torch.equal(branch.copy.state_dict()[key], tensor)
    assert model.origin("blocks.0.graft_control.copy.attn.qkv.weight") == "copied"
    assert model.origin("blocks.0.graft_control.zero_out.weight") == "new"
    assert certify(model, small_vit(), num_frames=[1, 2]).ok


@torch.no_grad()
def test_the_second_input_matters_only_once_both_gates_are_open():
    model = img2vid.convert(small_vit(), num_frames=3, grafts=[SPEC])
    clip = clips(3, model=model)
    other = torch.cat([clip[:, :, :3], torch.randn(2, 3, 2, 32, 32)], dim=2)
    stem, branches = model.tower.patch_conv.graft_control, [b.graft_control for _, b in model.tower.blocks[:2]]
    base = model(clip)
    for branch in branches:
        torch.nn.init.normal_(branch.zero_out.weight, std=0.1)
    assert torch.equal(model(clip), model(other)) and not torch.allclose(model(clip), base)
    torch.nn.init.normal_(stem.zero_in.weight, std=0.1)
    assert not torch.allclose(model(clip), model(other))


@pytest.mark.parametrize("make", [small_vit, small_eva], ids=["vit", "eva"])
def test_checkpointing_gives_the_same_gradients_also_of_two_forwards_at_once(make):
    """The hint is read outside of what checkpointing runs again, or the second forward's would be taken for both."""

    def gradients(checkpointed):
        model = controlled(make=make, attention="divided_space_time").train()
        model.set_grad_checkpointing(checkpointed)
        losses = [model(clips(3, seed, model)).square().sum() for seed in (1, 2)]
        sum(losses).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, atol=1e-4, rtol=1e-4)
    assert plain["patch_embed.proj.graft_control.stem.weight"].abs().sum() > 0


@torch.no_grad()
def test_a_class_token_of_the_whole_clip_stays_one():
    model = controlled(attention="divided_space_time", prefix_mode="shared")
    seen = []
    model.tower.blocks[-1][1].register_forward_hook(lambda module, args, out: seen.append(out))
    features(model)
    prefix = seen[0].unflatten(0, (2, 3))[:, :, 0]
    assert torch.equal(prefix, prefix[:, :1].expand_as(prefix))


def test_stochastic_depth_in_the_copies_is_of_clips():
    model = controlled(make=lambda: small_vit(drop_path_rate=0.5), attention="divided_space_time").train()
    torch.manual_seed(0)
    assert torch.isfinite(model(clips(3, model=model))).all()


@pytest.mark.parametrize(
    ("make", "spec", "settings", "message"),
    [
        (small_vit, {**SPEC, "copies": 7}, {}, "copies=7, but the backbone has 3 blocks"),
        (lambda: small_vit(patch_drop_rate=0.2), SPEC, {}, "drops some in training"),
        (small_vit, SPEC, {"time_embed": "per_patch"}, "none for tokens of control"),
        (small_vit, {**SPEC, "copies": 0}, {}, "copies=0"),
    ],
)
def test_where_it_cannot_be(make, spec, settings, message):
    with pytest.raises(img2vid.Img2VidError, match=message):
        img2vid.convert(make(), grafts=[spec], **settings)


def test_one_branch_a_model():
    model = img2vid.convert(small_vit(), num_frames=3, grafts=[SPEC])
    with pytest.raises(GraftError, match="has a control branch already"):
        graft(model, [{**SPEC, "name": "second"}])
    assert [one.name for one in model.grafts] == ["control"] and model.tower.in_channels == 5


def test_other_image_weights_are_copied_again_while_the_gates_are_closed():
    model, other = img2vid.convert(small_vit(), num_frames=3, grafts=[SPEC]), randomize(small_vit(), seed=7)
    report = model.load_image_weights(other.state_dict())
    assert any("copies of blocks were copied again" in note for note in report.notes)
    for i in range(2):
        copy = model.tower.blocks[i][1].graft_control.copy
        assert all(torch.equal(tensor, other.blocks[i].state_dict()[key]) for key, tensor in copy.state_dict().items())
    torch.nn.init.normal_(model.tower.blocks[0][1].graft_control.zero_out.weight)
    with pytest.raises(img2vid.Img2VidError, match="copies have been trained"):
        model.load_image_weights(small_vit().state_dict())
    model.load_image_weights(small_vit().state_dict(), refresh_copies=False)
    assert torch.equal(model.tower.blocks[0][1].graft_control.copy.attn.qkv.weight, other.blocks[0].attn.qkv.weight)
