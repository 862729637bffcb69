import copy
import re
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import img2vid
from img2vid.backbones import load_backbone
from img2vid.backbones.order import IMAGE_STEM, places_beside_image_tower
from img2vid.reporting import layer_table, optimizer_table, to_text
from img2vid.tuning import (
    GradualUnfreezing,
    TuningError,
    build_optimizer,
    build_schedule,
    eval_frozen,
    freeze,
    freezing,
    frozen_by,
    layer_groups,
    parameter_groups,
    penalty,
    schedules,
)
from img2vid.tuning.groups import decayed_names
from img2vid.tuning.optimizers import MULTIPLIERS
from img2vid.tuning.recipe import Tuning
from img2vid.tuning.schedules import schedule_factor
from tests.conftest import small_clip, small_vit


def video_vit(**kwargs):
    return img2vid.convert(small_vit(), num_frames=3, **kwargs)


def video_clip(**kwargs):
    return img2vid.convert(small_clip(), num_frames=3, **kwargs)


def clips():
    return torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def train_steps(model, optimizer, scheduler=None, steps=1, before_step=lambda step: None):
    """Train on anything, so that every parameter that can move does."""
    for step in range(steps):
        if hasattr(model, "encode_video"):
            text = model.encode_text(torch.arange(32).view(2, 16), normalize=True)
            out = model.logit_scale.exp() * model.encode_video(clips(), normalize=True) - 2 * text
        else:
            out = model(clips())
        optimizer.zero_grad()
        (out - 0.3).square().sum().backward()
        before_step(step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


# ---- layer groups


@pytest.mark.parametrize(
    "name",
    [
        "timm:vit_tiny_r_s16_p8_224",
        "timm:deit_tiny_distilled_patch16_224",
        "timm:beit_base_patch16_224",
        "timm:eva02_tiny_patch14_224",
        "timm:cait_xxs24_224",
        "timm:naflexvit_base_patch16_map",
        "timm:vit_relpos_small_patch16_224",
        "timm:vit_small_patch16_rope_mixed_ape_224",
        "timm:vit_pe_core_tiny_patch16_384",
        "timm:vit_base_patch14_reg4_dinov2",
        "open_clip:coca_ViT-B-32",
        "open_clip:ViT-B-16-SigLIP",
        "open_clip:EVA02-B-16",
        "nano_clip",
    ],
)
def test_what_counts_as_embeddings_is_what_reaches_the_first_block(name):
    tower = load_backbone(name, on_meta=True).tower
    entering = []
    _, first_block = tower.blocks[0]
    first_block.register_forward_pre_hook(lambda m, args, kw: entering.extend([*args, *kw.values()]), with_kwargs=True)
    tower.module.requires_grad_(True)(torch.zeros(1, 3, *tower.image_size, device="meta"))
    queue, seen = [x.grad_fn for x in entering if isinstance(x, torch.Tensor) and x.grad_fn is not None], set()
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            queue += [parent for parent, _ in node.next_functions if parent is not None]
    reaching = {id(node.variable) for node in seen if hasattr(node, "variable")}
    blocks = tuple(path + "." for path, _ in tower.blocks)
    outside = {n: p for n, p in tower.module.named_parameters() if not n.startswith(blocks)}
    by_graph = {n for n, p in outside.items() if id(p) in reaching}
    by_name = {n for n in outside if re.fullmatch(IMAGE_STEM, n)}
    if name == "timm:cait_xxs24_224":
        by_name -= {"cls_token"}  # CaiT's enters after these blocks, and counts among the embeddings all the same
    assert by_graph == by_name


@pytest.mark.parametrize(
    "model",
    [
        lambda: video_vit(num_classes=5),
        lambda: video_vit(attention="factorised_encoder", encoder_layers=1),
        lambda: video_vit(attention="space_only"),
        lambda: video_vit(temporal_init="random", gate="tanh", tubelet_size=3),
        lambda: video_clip(),
        lambda: video_clip(temporal_layers="last:1"),
        lambda: img2vid.convert("eva02_t", random_weights=True),
        lambda: img2vid.convert("nano_clip"),
    ],
)
def test_every_parameter_is_in_one_group(model):
    model = model()
    groups = layer_groups(model)
    names = [name for group in groups for name in group.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(names) == len(set(names))
    for group in groups:
        assert {model.origin(name) for name in group.parameters} == {group.origin}
    assert len({group.label for group in groups}) == len(groups)


def test_groups_run_from_input_to_output():
    expected = ["embeddings/pretrained", "embeddings/new"]
    for i in range(3):
        expected += [f"block_{i}/{origin}" for origin in ("pretrained", "copied", "new")]
    image = [*expected, "head/pretrained"]
    assert [group.label for group in layer_groups(video_vit(num_classes=2))] == [*image, "classifier/new"]
    text = [f"text_{layer}/pretrained" for layer in ("embeddings", "block_0", "block_1", "head")]
    groups = layer_groups(video_clip())
    assert [group.label for group in groups] == [*image, *text, "logit_scale/pretrained"]
    by_name = {group.name: group for group in groups}
    assert (by_name["embeddings"].depth, by_name["embeddings"].from_output) == (0, 4)
    assert (by_name["block_2"].depth, by_name["block_2"].from_output) == (3, 1)
    assert (by_name["head"].depth, by_name["head"].from_output) == (4, 0)
    assert (by_name["text_embeddings"].from_output, by_name["text_block_1"].from_output) == (3, 1)
    assert by_name["logit_scale"].from_output == 0
    assert list(by_name["text_head"].parameters) == ["text_projection", "ln_final.weight", "ln_final.bias"]


def test_text_towers_of_other_layouts():
    names = {
        "text.transformer.embeddings.word_embeddings.weight": "text_embeddings",
        "text.transformer.encoder.layer.11.attention.self.query.weight": "text_block_11",
        "text.transformer.shared.weight": "text_embeddings",
        "text.transformer.encoder.block.2.layer.0.SelfAttention.q.weight": "text_block_2",
        "text.transformer.encoder.final_layer_norm.weight": "text_head",
        "text.proj.0.weight": "text_head",
        "text_decoder.resblocks.3.ln_1.weight": "text_decoder",
        "logit_bias": "logit_scale",
    }
    places = places_beside_image_tower(names)
    assert {name: place.name for name, place in places.items()} == names
    assert places["text.transformer.encoder.layer.11.attention.self.query.weight"].from_output == 1


# ---- freezing

POLICIES = {
    "temporal_only": lambda name, model: model.origin(name) == "pretrained",
    "text": lambda name, model: not name.startswith("visual.") and name != "logit_scale",
    "image": lambda name, model: name.startswith("visual.") and model.origin(name) == "pretrained",
    "first:1": lambda name, model: (
        model.origin(name) == "pretrained"
        and name.startswith(
            tuple(f"visual.{n}" for n in ("conv1", "class_emb", "positional", "ln_pre", "transformer.resblocks.0."))
        )
    ),
    r".*temporal_fc.*": lambda name, model: "temporal_fc" in name,
}


@pytest.mark.parametrize("policy", [*POLICIES, ["text", "first:1"]], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_parameters_are_bitwise_unchanged_after_training(policy, optimizer):
    model = video_clip()
    frozen = freeze(model, policy)
    policies = [policy] if isinstance(policy, str) else policy
    expected = {n for n, _ in model.named_parameters() if any(POLICIES[one](n, model) for one in policies)}
    assert set(frozen) == expected != set()
    before = copy.deepcopy(dict(model.named_parameters()))
    model.train()
    eval_frozen(model)
    groups = parameter_groups(model, 1e-3, weight_decay=0.1)
    train_steps(model, build_optimizer(groups, optimizer), steps=2)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    # behind gates that are frozen at zero no gradient arrives
    unreached = {n for n in before if ".temporal_" in n} if policy == ".*temporal_fc.*" else set()
    assert not moved & expected
    assert moved | unreached >= set(before) - expected


def test_none_freezes_nothing_and_freezing_adds_up():
    model = video_clip()
    assert freeze(model, "none") == []
    freeze(model, "text")
    freeze(model, ["none", "image"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if model.origin(n) != "pretrained"} | {"logit_scale"}
    assert frozen_by(model, "temporal_only") - frozen_by(model, ["image", "text"]) == {"logit_scale"}


@pytest.mark.parametrize(
    ("model", "policy", "message"),
    [
        (video_vit, "temporal-only", "Did you mean 'temporal_only'"),
        (video_vit, "text", "no text tower"),
        (video_vit, "first:4", "from 0 \\(embeddings\\) to 3"),
        (video_vit, "first:", "expected first:N"),
        (video_vit, "first:-1", "expected first:N"),
        (video_vit, "(", "nor a regular expression"),
        (video_vit, "no_such_parameter", "matches no parameter"),
        (video_vit, 3, "expected one of none"),
        (video_vit, ["text", None], "or a list"),
        (video_vit, ".*", "nothing to train"),
        (lambda: video_vit(attention="space_only"), "temporal_only", "nothing to train"),
    ],
)
def test_policies_that_make_no_sense_are_refused_and_freeze_nothing(model, policy, message):
    model = model()
    with pytest.raises(TuningError, match=message):
        freeze(model, policy)
    assert all(p.requires_grad for p in model.parameters())


class StemWithBatchNorm(nn.Module):
    def __init__(self, proj):
        super().__init__()
        self.proj, self.norm, self.drop = proj, nn.BatchNorm2d(48), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.proj(x)))


def test_frozen_modules_keep_their_statistics_and_do_not_drop():
    vit = small_vit(proj_drop_rate=0.5, drop_path_rate=0.5)
    vit.patch_embed.proj = StemWithBatchNorm(vit.patch_embed.proj)
    model = img2vid.convert(vit, num_frames=3)
    model.set_grad_checkpointing()
    freeze(model, "first:2")
    model.train()
    before = copy.deepcopy(dict(model.named_buffers()))
    assert eval_frozen(model) > 0
    with torch.no_grad():
        stem = model.patch_embed(clips()[0])
        assert torch.equal(stem, model.patch_embed(clips()[0]))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert [block.training for block in model.blocks] == [True] * 3  # they still checkpoint
    assert [block.mlp.training for block in model.blocks] == [False, False, True]
    assert model.blocks[0].temporal_attn.training
    assert eval_frozen(model) == 0
    model.train()
    assert model.patch_embed.proj.norm.training  # train() undoes it, so it is called after each


def test_a_frozen_model_with_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = video_vit()
        model.set_grad_checkpointing(checkpointing)
        freeze(model, "temporal_only")
        model.train()
        eval_frozen(model)
        model(clips()).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])


def test_layers_thaw_from_the_output_down_and_waiting_ones_do_not_move():
    model = video_vit()
    unfreezing = GradualUnfreezing({1: 1, 2: 3, 3: "all"})
    assert [unfreezing.thawed(now) for now in range(5)] == [0, 1, 3, float("inf"), float("inf")]
    optimizer = build_optimizer(parameter_groups(model, 1e-2, weight_decay=0.1))
    for now, thawed in enumerate([(), ("norm.",), ("norm.", "blocks.2.", "blocks.1."), ("",)]):
        before = copy.deepcopy(dict(model.named_parameters()))
        train_steps(model, optimizer, before_step=lambda step, now=now: unfreezing.drop_gradients(model, now), steps=2)
        for name, p in model.named_parameters():
            should_move = model.origin(name) != "pretrained" or name.startswith(thawed)
            assert torch.equal(p, before[name]) != should_move, (now, name)
    assert unfreezing.drop_gradients(model, 0) > 0
    assert unfreezing.drop_gradients(model, 0) == 0


@pytest.mark.parametrize(
    "milestones", [{}, [1, 2], {0: 2, 1: 1}, {0: "all", 1: 1}, {-1: 1}, {0: -1}, {0: True}, {"0": 1}, {0: "most"}]
)
def test_milestones_that_make_no_sense_are_refused(milestones):
    with pytest.raises(TuningError, match="milestones"):
        GradualUnfreezing(milestones)


# ---- parameter groups and optimisers


@settings(max_examples=20, deadline=None)
@given(
    layer_decay=st.none() | st.floats(0.1, 1.0),
    policy=st.sampled_from(["none", "temporal_only", "text", "first:2", ["image", "logit_scale"]]),
    has_text=st.booleans(),
)
def test_every_trainable_parameter_is_in_one_parameter_group(layer_decay, policy, has_text):
    if not has_text and policy not in ("none", "temporal_only", "first:2"):
        policy = "none"
    model = video_clip() if has_text else video_vit(num_classes=3)
    freeze(model, policy)
    groups = parameter_groups(model, 1e-4, layer_decay=layer_decay)
    given_ids = [id(p) for group in groups for p in group["params"]]
    assert len(given_ids) == len(set(given_ids))
    assert set(given_ids) == {id(p) for p in model.parameters() if p.requires_grad}
    assert len({group["name"] for group in groups}) == len(groups)


def test_rates_are_the_formula():
    model = video_vit(num_classes=3)
    groups = parameter_groups(model, 1.0, multipliers={"copied": 4.0}, layer_decay=0.5)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["head/pretrained/no_decay"] == 1.0
    assert rates["block_2/pretrained"] == 0.5
    assert rates["block_0/pretrained"] == rates["block_0/pretrained/no_decay"] == 0.125
    assert rates["block_0/copied"] == 0.5
    assert rates["block_0/new/no_decay"] == 1.25
    assert rates["embeddings/new/no_decay"] == 0.625
    assert rates["classifier/new"] == 10.0
    plain = {group["name"]: group["lr"] for group in parameter_groups(model, 1.0)}
    assert plain == {
        "pretrained": 1.0,
        "pretrained/no_decay": 1.0,
        "copied": 5.0,
        "copied/no_decay": 5.0,
        "new": 10.0,
        "new/no_decay": 10.0,
    }


def test_the_text_tower_has_a_rate_of_its_own():
    model = video_clip()
    for layer_decay in (None, 0.5):
        groups = parameter_groups(model, 1.0, multipliers={"text": 0.25}, layer_decay=layer_decay)
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        assert rates[id(model.text_projection)] == 0.25
        assert rates[id(model.visual.proj)] == rates[id(model.logit_scale)] == 1.0
    assert {"text/pretrained", "pretrained"} <= {group["name"] for group in parameter_groups(model, 1.0)}


def test_the_time_embedding_has_a_rate_of_its_own():
    model = video_clip()
    for layer_decay in (None, 0.5):
        groups = parameter_groups(model, 1.0, multipliers={"new": 2.0, "time_embed": 3.0}, layer_decay=layer_decay)
        plain = parameter_groups(model, 1.0, multipliers={"new": 2.0}, layer_decay=layer_decay)
        rates, before = ({id(p): g["lr"] for g in found for p in g["params"]} for found in (groups, plain))
        changed = {key: rates[key] / before[key] for key in rates if rates[key] != before[key]}
        assert changed == {id(model.visual.time_embed): 3.0}
        assert len({group["name"] for group in groups}) == len(groups)


def test_weight_decay_pulls_matrices_only():
    names = decayed_names(video_clip(gate="tanh"))
    assert names == {
        name
        for name, p in video_clip(gate="tanh").named_parameters()
        if p.ndim >= 2
        and not name.endswith(("positional_embedding", "time_embed", "token_embedding.weight", "temporal_fc.weight"))
    }
    assert {"text_projection", "visual.proj", "visual.conv1.weight"} <= names
    names = decayed_names(video_vit(num_classes=3, tubelet_size=3))
    assert "classifier.weight" in names
    assert "blocks.0.temporal_attn.qkv.weight" in names
    for left_out in ("cls_token", "pos_embed", "time_embed", "patch_embed.proj.tubelet_weight"):
        assert left_out not in names
    assert "blocks.0.temporal_fc.weight" not in names
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 4, "num_classes": 0}
    beit = timm.models.beit.Beit(**shape, use_shared_rel_pos_bias=True, init_values=0.1)
    names = decayed_names(img2vid.convert(beit))
    assert not [name for name in names if "relative_position" in name or "gamma" in name]
    by_name = {g["name"]: g["weight_decay"] for g in parameter_groups(video_vit(), 1e-3, weight_decay=0.3)}
    assert {decay for name, decay in by_name.items() if "no_decay" in name} == {0.0}
    assert {decay for name, decay in by_name.items() if "no_decay" not in name} == {0.3}


def test_adamw_and_sgd_take_their_settings():
    groups = parameter_groups(video_vit(), 1e-3)
    adamw = build_optimizer(groups, betas=[0.8, 0.9], eps=1e-6)
    assert isinstance(adamw, torch.optim.AdamW)
    assert {(g["betas"], g["eps"]) for g in adamw.param_groups} == {((0.8, 0.9), 1e-6)}
    sgd = build_optimizer(parameter_groups(video_vit(), 1e-3), "sgd", momentum=0.5, nesterov=True)
    assert isinstance(sgd, torch.optim.SGD)
    assert {(g["momentum"], g["nesterov"]) for g in sgd.param_groups} == {(0.5, True)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": "1e-4"}, "write 1.0e-4"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"multipliers": {"old": 1.0}}, "unknown 'old'.*Known: pretrained"),
        ({"multipliers": {"new": -1.0}}, "multipliers\\['new'\\]"),
        ({"layer_decay": 0.0}, "layer_decay=0.0"),
        ({"layer_decay": 1.5}, "layer_decay=1.5"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_settings_of_groups_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(TuningError, match=message):
        parameter_groups(video_vit(), **{"lr": 1e-3, **arguments})


def test_unknown_optimisers_and_models_with_nothing_to_train_are_refused():
    model = video_vit()
    with pytest.raises(TuningError, match="Did you mean 'adamw'"):
        build_optimizer(parameter_groups(model, 1e-3), "adam")
    with pytest.raises(TuningError, match="nothing to train"):
        parameter_groups(model.requires_grad_(False), 1e-3)


def test_penalties_are_their_sums_and_reach_the_gradient():
    model = video_vit()
    freeze(model, "first:3")
    weights = [p for n, p in model.named_parameters() if n in decayed_names(model) and p.requires_grad]
    value = penalty(model, l1=0.5, l2=2.0)
    torch.testing.assert_close(value, sum(0.5 * w.abs().sum() + w.square().sum() for w in weights))
    value.backward()
    torch.testing.assert_close(weights[0].grad, 0.5 * weights[0].sign() + 2.0 * weights[0])
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(w) for w in weights}
    assert penalty(model).item() == 0.0
    with pytest.raises(TuningError, match="l1=-1"):
        penalty(model, l1=-1)


# ---- schedules

SCHEDULES = {
    "cosine": {"warmup": 2, "final": 0.1},
    "constant": {"warmup": 2},
    "step": {"warmup": 2, "milestones": [4, 0.75], "factors": [3.0, 0.1]},
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_per_group_rates_reach_the_parameters_under_each_schedule(name, optimizer):
    """Not only what the optimiser says: with SGD and equal gradients, how far each group moved."""
    model = video_vit(num_classes=2)
    groups = parameter_groups(model, 1e-3, layer_decay=0.5, weight_decay=0.0)
    rates = {group["name"]: group["lr"] for group in groups}
    optimizer = build_optimizer(groups, optimizer, **({"momentum": 0.0} if optimizer == "sgd" else {}))
    scheduler = build_schedule(optimizer, name, total_steps=8, **SCHEDULES[name])
    factor = schedule_factor(name, total_steps=8, **SCHEDULES[name])
    for step in range(8):
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(rates[group["name"]] * factor(step), rel=1e-12)
        before = {g["name"]: g["params"][0].detach().clone() for g in optimizer.param_groups}
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for group in optimizer.param_groups:
            step_size = (before[group["name"]] - group["params"][0].detach()).double().mean().item()
            # AdamW's step for a constant gradient is its rate, too
            assert step_size == pytest.approx(rates[group["name"]] * factor(step), rel=2e-2, abs=1e-8)
        scheduler.step()


def test_schedules_by_hand():
    cosine = schedule_factor("cosine", total_steps=10, warmup=2, final=0.2)
    assert [cosine(step) for step in (0, 1, 2, 6, 10, 99)] == pytest.approx([0.5, 1.0, 1.0, 0.6, 0.2, 0.2])
    constant = schedule_factor("constant", total_steps=10)
    assert [constant(step) for step in (0, 5, 99)] == [1.0, 1.0, 1.0]
    # TimeSformer's recipe: a tenth at epochs 11 and 14 of 15
    falling = schedule_factor("step", total_steps=150, milestones=[11 / 15, 14 / 15])
    assert [falling(step) for step in (0, 109, 110, 139, 140)] == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])
    rising = schedule_factor("step", total_steps=10, milestones=[2, 5], factors=[4.0, 0.5])
    assert [rising(step) for step in (0, 2, 5)] == [1.0, 4.0, 2.0]


@given(
    total=st.integers(1, 500),
    share=st.floats(0.0, 0.9),
    final=st.floats(0.0, 1.0),
    name=st.sampled_from(["cosine", "constant"]),
)
def test_factors_rise_in_warmup_then_never_again(total, share, final, name):
    factor = schedule_factor(name, total_steps=total, warmup=share, final=final)
    values, rising = [factor(step) for step in range(total + 2)], round(share * total)
    assert all(0.0 < value <= 1.0 for value in values[: max(1, rising)])
    assert values[:rising] == sorted(values[:rising])
    assert values[rising:] == sorted(values[rising:], reverse=True)
    assert max(values) == 1.0


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cosinus", {}, "Did you mean 'cosine'"),
        ("cosine", {"total_steps": 0}, "total_steps=0"),
        ("cosine", {"total_steps": 10.0}, "total_steps=10.0"),
        ("cosine", {"warmup": 11}, "within the 10 steps"),
        ("cosine", {"warmup": 1.5}, "a fraction below 1"),
        ("cosine", {"warmup": True}, "a fraction below 1"),
        ("cosine", {"warmup": -0.1}, "warmup=-0.1"),
        ("cosine", {"final": -1.0}, "final=-1.0"),
        ("cosine", {"milestones": [5]}, "belong to schedule='step'"),
        ("step", {}, "0 milestones"),
        ("step", {"milestones": [5, 3]}, "expected rising ones"),
        ("step", {"milestones": [3], "warmup": 4}, "expected rising ones after"),
        ("step", {"milestones": [3, 5], "factors": [0.1]}, "2 milestones and 1 factors"),
        ("step", {"milestones": [3], "factors": -1.0}, "factors=-1.0"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(name, arguments, message):
    with pytest.raises(TuningError, match=message):
        schedule_factor(name, **{"total_steps": 10, **arguments})


def test_a_schedule_resumes_without_overriding_the_new_settings():
    def build(final):
        optimizer = build_optimizer(parameter_groups(video_vit(), 1e-3))
        return optimizer, build_schedule(optimizer, total_steps=10, final=final)

    optimizer, scheduler = build(final=0.0)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    resumed_optimizer, resumed = build(final=1.0)  # the configuration was changed in between
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.last_epoch == 5
    resumed_optimizer.step()
    resumed.step()
    rates = {group["name"]: group["lr"] for group in resumed_optimizer.param_groups}
    assert rates["pretrained"] == pytest.approx(1e-3)
    assert rates["new/no_decay"] == pytest.approx(1e-2)


# ---- what users see


def test_tables_show_what_trains_and_how_fast():
    model = video_clip()
    freeze(model, ["text", "first:1"])
    text = to_text(layer_table(model), width=140)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trainable:,}" in text
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text
    for layer in ("embeddings", "block_0", "block_2", "head", "text_block_1", "logit_scale"):
        assert layer in text
    assert next(line for line in text.splitlines() if "text_head" in line).count("frozen") == 1
    text = to_text(optimizer_table(parameter_groups(model, 2e-5)), width=140)
    for part in ("pretrained/no_decay", "copied", "0.0002", "0.05", f"{trainable:,}"):
        assert part in text


def test_the_rates_shown_are_those_asked_for_not_those_of_the_first_step_of_a_warmup():
    groups = parameter_groups(video_clip(), 2e-5)
    asked = to_text(optimizer_table(groups), width=140)
    optimizer = build_optimizer(groups, "adamw")
    schedule = build_schedule(optimizer, "cosine", total_steps=100, warmup=10)
    assert schedule.get_last_lr()[0] == pytest.approx(2e-6)
    assert to_text(optimizer_table(optimizer.param_groups), width=140) == asked


def test_the_documentation_runs_and_names_every_policy_and_schedule():
    text = (Path(__file__).parents[1] / "docs" / "tuning.md").read_text()
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        exec(compile(code, "tuning.md", "exec"), names)
    assert names["schedule"].get_last_lr()[0] == names["groups"][0]["lr"]
    assert max(group["initial_lr"] for group in names["groups"]) == pytest.approx(1e-4 * 0.75)
    for name in (*freezing.POLICIES, *schedules.SCHEDULES, *MULTIPLIERS):
        assert f"| `{name}`" in text, name


@pytest.mark.parametrize(
    ("settings", "decay"), [({}, 0.05), ({"optimizer": "sgd"}, 1e-4), ({"weight_decay": 0.0}, 0.0)]
)
def test_each_optimiser_has_its_usual_weight_decay(settings, decay):
    groups = {group["name"]: group["weight_decay"] for group in Tuning(**settings).groups(video_vit())}
    assert groups["pretrained"] == decay and groups["pretrained/no_decay"] == 0.0
