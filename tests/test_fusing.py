"""Less arithmetic along time for inference: the same function, and nothing of the model has changed."""

import copy
import pickle

import pytest
import torch
from torch import nn

import img2vid
from img2vid.temporal.fusing import FusedProjection
from img2vid.tuning import freeze
from tests.conftest import randomize, small_clip, small_vit

FUSIBLE = [
    {},
    {"gate": "tanh"},
    {"prefix_mode": "shared"},
    {"prefix_mode": "global"},
    {"attention": "factorised_encoder"},
    {"temporal_layers": "last:2"},
]


def make(image_model=None, **settings):
    model = img2vid.convert(small_vit() if image_model is None else image_model, num_frames=4, **settings)
    return randomize(model, seed=3).eval()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fused_layers(model):
    return sum(isinstance(module, FusedProjection) for module in model.modules())


@pytest.mark.parametrize("settings", FUSIBLE, ids=str)
@torch.no_grad()
def test_fused_and_back(settings, clips):
    model = make(**settings)
    before, state = model(clips), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.fuse() is model and fused_layers(model) > 1
    after = model(clips)
    assert not torch.equal(after, before), "it is another computation"
    torch.testing.assert_close(after, before, atol=2e-6, rtol=1e-5)
    assert same(model.state_dict(), state), "names and weights stay"
    model.unfuse()
    assert fused_layers(model) == 0
    assert same(model.state_dict(), state) and torch.equal(model(clips), before)


@torch.no_grad()
def test_the_algebra(clips):
    """Against W_fc W_proj and W_fc b_proj + b_fc, written out."""
    block = make().fuse().blocks[0]
    proj, gate = block.temporal_attn.proj, block.temporal_fc
    torch.testing.assert_close(block.fused.weight, gate.weight @ proj.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(block.fused.bias, gate.weight @ proj.bias + gate.bias, atol=1e-6, rtol=1e-5)
    tanh = make(gate="tanh").fuse().blocks[0]
    scale = tanh.temporal_fc.alpha.tanh()
    torch.testing.assert_close(tanh.fused.weight, scale * tanh.temporal_attn.proj.weight)
    torch.testing.assert_close(tanh.fused.bias, scale * tanh.temporal_attn.proj.bias)


@torch.no_grad()
def test_a_norm_in_front_of_the_projection_stays_in_front(clips):
    model = make(small_vit(scale_attn_norm=True, qkv_bias=False, proj_bias=False))
    assert isinstance(model.blocks[0].temporal_attn.inner_norm, nn.LayerNorm)
    assert model.blocks[0].temporal_attn.proj.bias is None
    before = model(clips)
    torch.testing.assert_close(model.fuse()(clips), before, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_changed_weights_are_folded_anew(clips):
    model, plain = make().fuse(), make()
    for each in (model, plain):
        randomize(each, seed=4)
    torch.testing.assert_close(model(clips), plain(clips), atol=2e-6, rtol=1e-5)
    model.load_state_dict(make().state_dict())
    torch.testing.assert_close(model(clips), make()(clips), atol=2e-6, rtol=1e-5)
    plain = make()
    with model.gates_closed(), plain.gates_closed():
        assert torch.equal(model(clips), plain(clips))
    torch.testing.assert_close(model(clips), make()(clips), atol=2e-6, rtol=1e-5)
    moved = make().fuse().to(torch.float64)
    torch.testing.assert_close(moved(clips.double()), make().double()(clips.double()), atol=1e-12, rtol=1e-12)


def test_training_and_gradients_go_through_the_weights_themselves(clips):
    gradients = []
    for fuse in (False, True):
        model = make()
        if fuse:
            model.fuse()
        model(clips).sum().backward()  # in eval mode, too
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    model = make()
    with pytest.raises(img2vid.Img2VidError, match=r"model\.eval\(\)\.fuse\(\)"):
        model.train().fuse()
    model.eval().fuse().train()
    assert torch.equal(model(clips), make().train()(clips))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(clips).sum().backward()
    optimizer.step()
    with torch.no_grad():
        fused = model.eval()(clips)
        torch.testing.assert_close(fused, model.unfuse()(clips), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_fused_model_is_saved_copied_and_watched_as_any_other(clips, tmp_path):
    image = {"backbone": "vit_tiny", "random_weights": True, "image_size": 32, "num_frames": 3}
    model = randomize(img2vid.convert(**image), seed=3).eval()
    model.save_pretrained(tmp_path / "plain")
    model.fuse().save_pretrained(tmp_path / "fused")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "fused")]
    assert files[0] == files[1]
    model = make().fuse()
    assert torch.equal(copy.deepcopy(model)(clips), model(clips))
    seen = []
    model.blocks[0].temporal_fc.register_forward_hook(lambda *call: seen.append(call))
    model(clips)
    assert len(seen) == 1, "who watches a gate sees it work"


@torch.no_grad()
def test_what_cannot_be_fused_says_so(clips):
    for settings in ({"gate": "none"}, {"attention": "joint_space_time", "prefix_mode": "shared"}):
        with pytest.raises(img2vid.Img2VidError, match="Nothing can be folded"):
            make(**settings).fuse()
    clip = make(small_clip())
    before = clip.encode_video(clips)
    torch.testing.assert_close(clip.fuse().encode_video(clips), before, atol=2e-6, rtol=1e-5)
    clip.unfuse()
    assert torch.equal(clip.encode_video(clips), before)


# ---- branches behind a gate that is zero and frozen


def frozen_at_zero(**settings):
    model = make(**settings)
    with torch.no_grad():
        for parameter in model.zero_parameters().values():
            parameter.zero_()
    for block in model.blocks:
        block.temporal_fc.requires_grad_(False)
    return model


def calls_along_time(model, run):
    """How many of its layers attend along time; a patch and no hook, for which the branch would not be left out."""
    counted = []
    for block in model.blocks:
        attention = block.temporal_attn
        attention.before_proj = lambda *args, own=attention.before_proj: counted.append(1) or own(*args)
    run()
    for block in model.blocks:
        del block.temporal_attn.before_proj
    return len(counted)


@pytest.mark.parametrize("settings", [{}, {"gate": "tanh"}, {"prefix_mode": "shared"}], ids=str)
@torch.no_grad()
def test_a_branch_frozen_at_zero_is_left_out(settings, clips):
    model, plain = frozen_at_zero(**settings), frozen_at_zero(**settings)
    for block in plain.blocks:
        block.temporal_fc.requires_grad_(True)
    assert calls_along_time(plain, lambda: plain(clips)) == 3, "only what is frozen, too"
    assert calls_along_time(model, lambda: model(clips)) == 0
    assert torch.equal(model(clips).view(torch.int32), plain(clips).view(torch.int32)), "the same bits"
    next(iter(model.blocks[1].temporal_fc.parameters())).fill_(0.1)
    assert calls_along_time(model, lambda: model(clips)) == 1, "and as long as it is zero"


def test_it_is_not_left_out_where_gradients_or_random_numbers_depend_on_it(clips):
    model = frozen_at_zero()
    assert calls_along_time(model, lambda: model(clips)) == 3
    for block in model.blocks:
        block.temporal_attn.requires_grad_(False)
        block.temporal_norm1.requires_grad_(False)
    assert calls_along_time(model.train(), lambda: model(clips)) == 0
    dropping = img2vid.convert(small_vit(drop_path_rate=0.5), num_frames=4).train()
    dropping.requires_grad_(False)
    assert calls_along_time(dropping, lambda: dropping(clips)) == 2, "the first layer of three never drops"


@torch.no_grad()
def test_signs_of_zeros_and_what_is_not_finite():
    """Left out, tokens keep their own bits; computed, -0.0 + 0.0 is 0.0 and a token that is nan spreads along time."""
    block = frozen_at_zero().blocks[0]
    x = torch.randn(3, 17, 48)
    x[:, 2] = -0.0
    with block.clip.of(3):
        assert block.adds_nothing()
        added = x + block.temporal_residual(x)
        assert torch.equal(added, x) and not torch.equal(added.view(torch.int32), x.view(torch.int32))
        x[0, 5] = float("nan")
        assert (x + block.temporal_residual(x))[1, 5].isnan().all()


# ---- what is remembered of weights must be of the weights that are there


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_an_exported_program_has_the_weights_of_now(fused, clips):
    model = (make() if fused else frozen_at_zero()).requires_grad_(False)
    if fused:
        model.fuse()
    before = model(clips)
    randomize(model, seed=4).requires_grad_(False)
    program = torch.export.export(model, (clips,), strict=False).module()
    assert not torch.allclose(model(clips), before, atol=1e-2)
    torch.testing.assert_close(program(clips), model(clips))


@torch.no_grad()
def test_what_is_put_in_the_place_of_a_gate_after_fusing_runs(clips):
    model = make().fuse()
    before = model(clips)
    for block in model.blocks:
        block.temporal_fc = nn.Sequential(block.temporal_fc, nn.Tanh())
    wrapped = model(clips)
    assert not torch.allclose(wrapped, before, atol=1e-3)
    assert torch.equal(wrapped, model.unfuse()(clips))


@torch.no_grad()
def test_a_reparametrised_gate_is_not_taken_for_zero(clips):
    class Shifted(nn.Module):
        def forward(self, weight):
            return weight + torch.eye(len(weight))

    model = frozen_at_zero().requires_grad_(False)
    for block in model.blocks:
        nn.utils.parametrize.register_parametrization(block.temporal_fc, "weight", Shifted())
    assert calls_along_time(model, lambda: model(clips)) == 3


def test_folded_in_inference_mode_it_still_takes_gradients(clips):
    model = make().requires_grad_(False).fuse()
    model.load_state_dict(model.state_dict())
    with torch.inference_mode():
        model(clips)
    model(clips.requires_grad_()).sum().backward()
    assert bool(clips.grad.any())


# ---- folded in training


def training_gradients(model, clips, prepare=lambda model: None):
    model.train()
    prepare(model)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        features = model(clips)
    features.square().sum().backward()
    return features.detach(), {name: p.grad for name, p in model.named_parameters()}, sum(kept)


def one_after_the_other(model):
    """A hook that does nothing: who watches a gate sees it work."""
    for block in model.blocks:
        block.temporal_fc.register_forward_hook(lambda *call: None)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gate": "tanh"}, {"prefix_mode": "shared"}, {"quirks": ("no_temporal_drop_path",)}, {"causal": True}],
    ids=str,
)
def test_in_training_gates_are_folded_and_gradients_reach_both_weights(settings, clips):
    folded, plain = (make(**settings).double() for _ in range(2))
    clips = clips.repeat(4, 1, 1, 1, 1)  # what is saved grows with the tokens, what the product takes does not
    features, gradients, kept = training_gradients(folded, clips.double())
    expected, wanted, kept_before = training_gradients(plain, clips.double(), one_after_the_other)
    assert not torch.equal(features, expected), "it is another computation"
    assert kept < kept_before
    torch.testing.assert_close(features, expected, atol=1e-12, rtol=1e-12)
    for name in wanted:
        torch.testing.assert_close(gradients[name], wanted[name], atol=1e-10, rtol=1e-9, msg=name)


def test_folding_keeps_what_zero_gates_promise(clips):
    """At step 0 the frames' features are the image model's, and gradient reaches the gate and nothing behind it."""
    model = img2vid.convert(small_vit(), num_frames=3)
    frames = model.train().frame_features(clips)
    assert torch.equal(frames.flatten(0, 1), small_vit().train()(clips.flatten(0, 1)))
    frames.square().sum().backward()
    block = model.blocks[1]
    assert block.is_worth_folding(num_tokens=102)
    assert block.temporal_fc.weight.grad.abs().max() > 0
    assert block.temporal_attn.proj.weight.grad.abs().max() == 0


def test_what_is_wrapped_watched_or_too_small_is_not_folded():
    block = make().train().blocks[0]
    assert block.is_worth_folding(num_tokens=49) and not block.is_worth_folding(num_tokens=48)
    with torch.no_grad():
        assert not block.is_worth_folding(num_tokens=49)
    handle = block.temporal_attn.proj.register_forward_hook(lambda *call: None)
    assert not block.is_worth_folding(num_tokens=49)
    handle.remove()
    assert block.is_worth_folding(num_tokens=49)
    block.temporal_attn.proj = nn.Sequential(block.temporal_attn.proj)
    assert not block.is_worth_folding(num_tokens=49)
    assert not make(quirks=("drop_path_before_gate",)).eval().blocks[0].is_worth_folding(num_tokens=49)


def test_dropped_before_the_gate_the_gates_bias_stays(clips):
    model = img2vid.convert(small_vit(drop_path_rate=1.0), num_frames=3, quirks=("drop_path_before_gate",)).train()
    with torch.no_grad():
        model.blocks[2].temporal_fc.bias.fill_(1.0)
    with model.clip.of(3):
        added = model.blocks[2].branch(torch.randn(6, 17, 48))
    assert torch.equal(added, torch.ones_like(added)), "every branch is dropped, the bias is not"


def test_below_the_first_layer_that_sees_time_a_frozen_trunk_keeps_nothing(clips):
    """Autograd keeps what a gradient will need, and none goes there."""
    model = make(temporal_layers="last:1").train()
    freeze(model, "temporal_only")
    kept, at_block = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *call: at_block.append(len(kept)))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(clips).sum().backward()
    assert at_block[:3] == [0, 0, 0] and len(kept) > 5
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if "temporal" in name or "time_embed" in name
    }


@pytest.mark.parametrize("settings", [{}, {"prefix_mode": "shared"}, {"causal": True}, {"temporal_layers": "last:1"}])
def test_a_frozen_trunk_that_runs_twice_keeps_nothing(settings, clips):
    """The same gradients, less kept: of the image blocks only their inputs."""

    def run(prepare):
        model = make(**settings)
        freeze(model, "temporal_only")
        return training_gradients(model, clips, prepare)

    plain = run(lambda model: None)
    trunk = run(lambda model: model.set_grad_checkpointing(trunk_only=True))
    whole = run(lambda model: model.set_grad_checkpointing())
    assert torch.equal(plain[0], trunk[0])
    for name, gradient in plain[1].items():
        assert (gradient is None and trunk[1][name] is None) or torch.equal(gradient, trunk[1][name])
    assert whole[2] < trunk[2] < 0.75 * plain[2]
    model = make(**settings)
    classes = [type(block) for block in model.blocks]
    model.set_grad_checkpointing(trunk_only=True)
    model.set_grad_checkpointing()
    model.grad_checkpointing = False
    assert [type(block) for block in model.blocks] == classes


@pytest.mark.parametrize("settings", [{}, {"attention": "factorised_encoder"}], ids=str)
def test_weights_made_in_inference_mode_are_looked_at_again(settings, clips):
    """Torch does not count how often those are written to."""
    with torch.inference_mode():
        model, plain = make(**settings), make(**settings)
        assert next(model.parameters()).is_inference()
        model.fuse()
        assert not torch.equal(model(clips), plain(clips)), "it is another computation"
        for each in (model, plain):
            randomize(each, seed=4)
        torch.testing.assert_close(model(clips), plain(clips), atol=3e-6, rtol=1e-5)
        with model.gates_closed(), plain.gates_closed():
            torch.testing.assert_close(model(clips), plain(clips), atol=3e-6, rtol=1e-5)


def test_a_gate_made_in_inference_mode_is_looked_at_again(clips):
    with torch.inference_mode():
        model = frozen_at_zero()
        assert calls_along_time(model, lambda: model(clips)) == 0
        for block in model.blocks:
            block.temporal_fc.weight.fill_(0.1)
        assert calls_along_time(model, lambda: model(clips)) == 3


@torch.no_grad()
def test_fused_twice_pickled_and_trained(clips):
    model = make().fuse().fuse()
    assert fused_layers(model) == 3 and torch.equal(model(clips), make().fuse()(clips))
    again = pickle.loads(pickle.dumps(model))
    assert fused_layers(again) == 3 and torch.equal(again(clips), model(clips))
    for each in (model, again):
        randomize(each, seed=5)
    assert torch.equal(again(clips), model(clips))
    assert fused_layers(again.unfuse()) == 0


def test_weights_made_in_inference_mode_are_looked_at_again_when_only_their_order_changes(clips):
    """The sum of their numbers stays what it was."""
    with torch.inference_mode():
        model = make().fuse()
        before = model(clips)
        for name, parameter in model.named_parameters():
            if name.endswith("temporal_fc.weight"):
                parameter.copy_(parameter.flip(0))
        fused = model(clips)
        unfused = model.unfuse()(clips)
    assert not torch.allclose(before, unfused, atol=1e-4)
    torch.testing.assert_close(fused, unfused, atol=1e-5, rtol=1e-5)
