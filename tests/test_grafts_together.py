"""Grafts beside grafts, on models that have been through something: orders, removals, copies, casts, compilers."""

import copy
import itertools

import lightning.pytorch as pl
import pytest
import timm
import torch

import img2vid
from img2vid.certificate import certify
from img2vid.checkpoints.native import load, save
from img2vid.config import ConfigError, VideoConfig
from img2vid.evaluation.features import Compute
from img2vid.evaluation.honesty import honesty
from img2vid.evaluation.protocols import gather_lists
from img2vid.evaluation.reading import Views
from img2vid.export import export_program
from img2vid.grafts import GRAFTS as TYPES
from img2vid.grafts import GraftError, fold, graft, read_graft, remove
from img2vid.grafts.base import Graft
from img2vid.grafts.grafting import tower_of
from img2vid.merging import linear, slerp, task
from img2vid.objectives import Classification
from img2vid.training import Tuning, VideoTraining
from img2vid.tuning import freeze, layer_groups
from img2vid.tuning.optimizers import parameter_groups
from tests.conftest import randomize, small_clip, small_eva, small_vit
from tests.test_grafts import (
    GRAFTS,
    clips,
    every_graft,
    features,
    in_turn,
    is_gated,
    over_space,
    planted,
    push,
    vectors,
)
from tests.training_run import fit

TOWERS = {"vit": small_vit, "eva": small_eva, "clip": small_clip}
every_tower = pytest.mark.parametrize("make", TOWERS.values(), ids=TOWERS)
NAMED = {
    "vit": ("timm:vit_tiny_patch16_224", {"embed_dim": 48, "num_heads": 4, "depth": 3}),
    "eva": ("timm:eva02_tiny_patch14_224", {"embed_dim": 48, "num_heads": 4, "depth": 3}),
    "clip": (
        "open_clip:ViT-B-32",
        {
            "vision_cfg": {"layers": 3, "width": 64, "head_width": 16, "patch_size": 8},
            "text_cfg": {"layers": 2, "width": 64, "heads": 2, "vocab_size": 200},
        },
    ),
}
EVERYTHING = [
    {"type": "lora", "rank": 4, "targets": ["attn", "temporal_attn", "mlp"]},
    {"type": "adapter", "bottleneck": 8},
    "aim",
    {"type": "st_adapter", "bottleneck": 8, "kernel": [3, 3, 3]},
    {"type": "prompt", "num_tokens": 4, "form": "gated"},
    {"type": "experts", "layers": "all", "compute": "dense"},
    {"type": "fusion", "towers": ["nano_clip"]},
    {"type": "control", "more": 2, "copies": 2},
    {"type": "channels", "more": 1},
    {"type": "lora", "rank": 2, "name": "second", "targets": ["mlp"]},
]


def name_of(spec):
    return spec if isinstance(spec, str) else spec.get("name", spec["type"])


def fewer(model):
    """Clips of the channels that are left."""
    return clips(model=model)


def close_time(model):
    for name, p in model.named_parameters():
        if "temporal_fc" in name:
            torch.nn.init.zeros_(p)
    return model


# ---- all of them at once


@every_tower
def test_everything_at_once(make, tmp_path):
    base = features(img2vid.convert(make(), num_frames=4))
    model = img2vid.convert(make(), num_frames=4, grafts=EVERYTHING)
    assert torch.equal(features(model), base)
    certificate = certify(model, make(), num_frames=[1, 2], at_step_0=True)
    assert certificate.ok and certificate.alive
    assert {layer.graft for layer in certificate.liveness} == {None, *map(name_of, EVERYTHING)}
    push(model, 0.05)
    with model.gates_closed():
        assert torch.equal(features(model), base)
    expected = features(model)
    assert torch.equal(features(copy.deepcopy(model)), expected)
    save(model, tmp_path / "model") if model.config.backbone else None
    again = img2vid.convert(make(), num_frames=4, grafts=EVERYTHING)
    again.load_state_dict(model.state_dict())
    assert torch.equal(features(again), expected)


@every_tower
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_they_leave_in_any_order(make, seed):
    """Whatever is taken off first, what is left is the model that never had it."""
    plain = img2vid.convert(make(), num_frames=4)
    model = push(img2vid.convert(make(), num_frames=4, grafts=EVERYTHING), 0.05)
    order = torch.randperm(len(EVERYTHING), generator=torch.Generator().manual_seed(seed)).tolist()
    left = list(EVERYTHING)
    for i in order:
        remove(model, name_of(EVERYTHING[i]))
        left.remove(EVERYTHING[i])
        never = img2vid.convert(make(), num_frames=4, grafts=left)
        assert model.config == never.config
        assert tower_of(model).tower.preprocess == tower_of(never).tower.preprocess
        never.load_state_dict(model.state_dict())
        torch.testing.assert_close(features(model), features(never), atol=1e-5, rtol=1e-5)
    assert torch.equal(features(close_time(model)), features(plain))
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize(
    ("one", "other"),
    list(
        itertools.combinations(
            [
                {"type": "control", "more": 2, "copies": 2},
                {"type": "st_adapter", "bottleneck": 8, "kernel": [3, 3, 3]},
                {"type": "prompt", "num_tokens": 4, "form": "deep"},
                {"type": "prompt", "num_tokens": 3, "form": "deep", "name": "odd"},
                "aim",
                {"type": "channels", "more": 1},
            ],
            2,
        )
    ),
    ids=lambda spec: name_of(spec),
)
@pytest.mark.parametrize("make", [small_vit, small_eva], ids=["vit", "eva"])
def test_what_tokens_mean_does_not_depend_on_the_order(make, one, other):
    """A control branch brings tokens of its own, prompts do: patches stay where they are for whoever counts them."""
    models = [push(img2vid.convert(make(), num_frames=4, grafts=specs)) for specs in ([one, other], [other, one])]
    if "channels" in (name_of(one), name_of(other)) and "control" in (name_of(one), name_of(other)):
        return_channels = tower_of(models[0]).tower.in_channels
        assert return_channels == 3 + 2 + 1
        return
    models[1].load_state_dict(models[0].state_dict())
    if name_of(one).startswith(("st_adapter",)) and name_of(other) == "aim":
        return  # both go in front of the block, the later one first
    shown = [features(model) for model in models]
    if {name_of(one), name_of(other)} == {"prompt", "odd"}:
        return  # two sets of prompts, in the one order or the other
    torch.testing.assert_close(*shown, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["control", "st_adapter"])
def test_prompts_that_stay_among_the_patches_are_refused_beside_who_counts_those(kind):
    shallow = {"type": "prompt", "form": "shallow"}
    for specs in ([kind, shallow], [shallow, kind]):
        with pytest.raises(GraftError, match="leaves tokens of its own among the patches.*form='deep'"):
            img2vid.convert(small_vit(), num_frames=4, grafts=specs)


# ---- nothing half done


def test_of_several_grafts_all_are_put_on_or_none():
    model = img2vid.convert(small_vit(), num_frames=4)
    keys, kinds, shown = list(model.state_dict()), [type(m) for m in model.modules()], features(model)
    for bad in ({"type": "lora", "targets": ["blocks.9.*"]}, {"type": "control", "copies": 9}):
        with pytest.raises(GraftError):
            graft(model, ["adapter", {"type": "channels", "more": 2}, bad])
        assert model.grafts == () and model.config.grafts == () and model.tower.in_channels == 3
        assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == kinds
    assert torch.equal(features(model), shown)


def test_a_tower_whose_weights_cannot_be_had_leaves_the_model_as_it_was(monkeypatch):
    model = img2vid.convert(small_vit(), num_frames=4)

    def fail(self, video):
        raise img2vid.Img2VidError("no network")

    monkeypatch.setattr("img2vid.grafts.fusion.Fusion.fetch", fail)
    with pytest.raises(img2vid.Img2VidError, match="no network"):
        graft(model, [{"type": "fusion", "towers": ["nano_clip"]}])
    assert model.grafts == () and model.config.grafts == () and not planted(model)


def test_grafts_on_the_tower_are_grafts_of_the_model_with_text(tmp_path):
    model = img2vid.convert("nano_clip", num_frames=4)
    graft(model.visual, ["lora"])
    assert model.config.grafts == model.visual.config.grafts != ()
    push(model).save_pretrained(tmp_path / "model")
    assert torch.equal(features(img2vid.load(tmp_path / "model")), features(model))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "adapter", "at": []}, "at=.*expected attn, mlp or both"),
        ({"type": "adapter", "at": 3}, "expected attn, mlp or both"),
        ({"type": "adapter", "at": ["atn"]}, "Did you mean 'attn'"),
        ({"type": "adapter", "scale": 0.0}, "scale=0.0: expected a number above 0"),
        ({"type": "adapter", "init": "near", "near": 0}, "near=0: expected a number above 0"),
        ({"type": "lora", "alpha": 0}, "alpha=0: expected a number above 0"),
        ({"type": "aim", "scale": 0}, "scale=0: expected a number above 0"),
        ({"type": "aim", "ratio": 0}, "ratio=0: expected a number above 0"),
        ({"type": "lora", "name": 5}, "name=5 of a graft"),
        ({"type": "lora", "layers": []}, "layers="),
        ({"type": "channels", "mean": float("nan")}, "mean=nan"),
        ({"type": "channels", "std": float("inf")}, "std=inf"),
    ],
    ids=str,
)
def test_what_could_never_learn_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        img2vid.convert(small_vit(), num_frames=4, grafts=[spec])


# ---- on models that have been through something


@every_graft
@torch.no_grad()
def test_in_inference_mode(spec):
    for make in TOWERS.values():
        model = push(img2vid.convert(make(), num_frames=4, grafts=[spec]))
        run = model.encode_video if hasattr(model, "encode_video") else model
        expected = run(clips(model=model), **vectors(model))
        with torch.inference_mode():
            torch.testing.assert_close(run(clips(model=model), **vectors(model)), expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(run(clips(model=model), **vectors(model)), expected)


@every_graft
def test_on_a_frozen_half_precision_checkpointed_fused_model(spec):
    model = img2vid.convert(small_vit(), num_frames=4).to(torch.bfloat16)
    freeze(model, "temporal_only")
    for p in model.parameters():
        p.requires_grad_(False)
    model.set_grad_checkpointing()
    model.fuse()
    shown = clips(model=model).bfloat16()
    before = model(shown)
    graft(model, [spec])
    assert all(p.requires_grad for n, p in planted(model).items()) or spec["type"] == "fusion"
    assert {p.dtype for p in planted(model).values()} == {torch.bfloat16}
    if strength(spec) == "bitwise":
        assert torch.equal(model(clips(model=model).bfloat16(), **vectors(model)), before)
    push(model)
    model.train()
    model(clips(model=model).bfloat16(), **vectors(model)).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in planted(model).values())
    assert torch.equal(close_time(remove(model)).eval()(shown), before)


def strength(spec):
    """bitwise, close, or None."""
    return read_graft(spec).guarantee().strength.get("moving")


@pytest.mark.slow
@every_graft
def test_compiled(spec):
    """By torch.compile, whole and block by block, in training and without gradients."""
    for make in TOWERS.values():
        torch._dynamo.reset()
        model = tower_of(push(img2vid.convert(make(), num_frames=4, grafts=[spec])))
        shown = clips(model=model)
        beside = vectors(model)
        eager = model(shown, **beside)
        eager.square().sum().backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        compiled = torch.compile(model, backend="aot_eager")
        out = compiled(shown, **beside)
        torch.testing.assert_close(out, eager, atol=1e-4, rtol=1e-4)
        out.square().sum().backward()
        for name, grad in expected.items():
            found = dict(model.named_parameters())[name].grad
            torch.testing.assert_close(found, grad, atol=2e-3, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}")
        with torch.no_grad():
            torch.testing.assert_close(compiled(shown, **beside), eager, atol=1e-4, rtol=1e-4)
        for _, block in model.tower.blocks:
            block.compile(backend="aot_eager")
        torch.testing.assert_close(model(shown, **beside), eager, atol=1e-4, rtol=1e-4)


def test_a_compiled_model_sees_what_is_grafted_and_taken_off():
    torch._dynamo.reset()
    model = img2vid.convert(small_vit(), num_frames=4)
    compiled = torch.compile(model, backend="eager")
    base = compiled(clips())
    graft(model, [{"type": "lora", "targets": ["attn", "mlp"]}, {"type": "adapter", "bottleneck": 8}])
    torch.testing.assert_close(compiled(clips()), base, atol=1e-5, rtol=1e-5)
    push(model)
    torch.testing.assert_close(compiled(clips()), model(clips()), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(compiled(clips()), base, atol=1e-2)
    close_time(remove(model))
    torch.testing.assert_close(compiled(clips()), base, atol=1e-5, rtol=1e-5)


@every_graft
def test_files_that_lack_keys_or_have_too_many_are_refused_by_name(spec, tmp_path):
    from safetensors.torch import load_file, save_file

    model = push(img2vid.convert("nano_clip", num_frames=4, grafts=[spec], random_weights=True))
    model.save_pretrained(tmp_path / "model")
    path, key = tmp_path / "model" / "model.safetensors", next(iter(planted(model)))
    state = load_file(path)
    for changed, message in (
        ({k: t for k, t in state.items() if k != key}, "1 missing"),
        ({**state, "visual.graft_other.A": torch.zeros(2)}, "1 unexpected"),
        ({**state, key: torch.zeros(7, 5)}, "of another shape"),
    ):
        save_file(changed, path)
        with pytest.raises(img2vid.Img2VidError, match=message):
            load(tmp_path / "model")
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        img2vid.convert("nano_clip", num_frames=4).load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", NAMED)
@every_graft
def test_saved_and_loaded_on_every_library(spec, name, tmp_path):
    backbone, arguments = NAMED[name]
    size = 28 if name == "eva" else 32
    settings = dict(image_size=size, backbone_args=arguments, random_weights=True, num_frames=4)
    model = push(img2vid.convert(backbone, grafts=[spec], **settings), 0.05)
    model.save_pretrained(tmp_path / "model")
    again = img2vid.load(tmp_path / "model")
    assert again.config == model.config and again.state_dict().keys() == model.state_dict().keys()
    shown = clips(model=model)[..., :size, :size]
    with torch.no_grad():
        run, rerun = (m.encode_video if hasattr(m, "encode_video") else m for m in (model.eval(), again))
        assert torch.equal(rerun(shown, **vectors(model)), run(shown, **vectors(model)))
    assert certify(again, num_frames=[1, 2]).held
    if TYPES[spec["type"]].fold is not Graft.fold:
        fold(again)
        again.save_pretrained(tmp_path / "folded")
        plain = img2vid.load(tmp_path / "folded")
        assert plain.config.grafts == () and not planted(plain)
        assert "graft" not in (tmp_path / "folded" / "config.json").read_text().replace('"grafts": []', "")
        with torch.no_grad():
            rerun = plain.encode_video if hasattr(plain, "encode_video") else plain
            torch.testing.assert_close(rerun(shown), run(shown), atol=1e-4, rtol=1e-4)


# ---- tuning, and weight space


@every_graft
def test_rates_go_by_where_a_graft_is(spec):
    model = img2vid.convert(small_vit(), num_frames=4, grafts=[spec])
    for decay in (None, 0.5):
        groups = parameter_groups(model, 1.0, layer_decay=decay)
        counted = [p for group in groups for p in group["params"]]
        trainable = [p for p in model.parameters() if p.requires_grad]
        assert len(counted) == len({id(p) for p in counted}) == len(trainable)
    layers = {name: group for group in layer_groups(model) for name in group.parameters}
    for name in planted(model):
        if name.startswith("blocks."):
            assert layers[name].name == f"block_{name.split('.')[1]}"
    decayed = {id(p) for group in parameter_groups(model, 1.0) if group["weight_decay"] for p in group["params"]}
    assert not [name for name, p in model.zero_parameters().items() if id(p) in decayed]


@every_graft
@torch.no_grad()
def test_merged_in_weight_space(spec):
    start, one, two = (img2vid.convert(small_vit(), num_frames=4, grafts=[spec]) for _ in range(3))
    one.load_state_dict(start.state_dict()), two.load_state_dict(start.state_dict())
    push(one), push(two, 0.05)
    a, b, base = (model.state_dict() for model in (one, two, start))
    merged = copy.deepcopy(start)
    for state, model in (
        (linear([a, b], [0, 1]), two),
        (slerp(a, b, 0.0), one),
        (task(base, [a, b], [0.0, 1.0]), two),
        (task(base, [a], [0.0]), start),
    ):
        merged.load_state_dict(state)
        assert torch.equal(features(merged), features(model))
    for state in (linear([a, b], [1, 1]), slerp(a, b, 0.5), task(base, [a, b], [0.5, 0.5])):
        merged.load_state_dict(state)
        assert features(merged).isfinite().all()
        with merged.gates_closed():
            if is_gated(spec) and strength(spec) == "bitwise":
                assert torch.equal(features(merged), features(img2vid.convert(small_vit(), num_frames=4)))


def test_every_graft_is_in_the_table():
    assert {spec["type"] for spec in GRAFTS.values()} >= {name_of(s) for s in EVERYTHING if name_of(s) != "second"}


# ---- evaluation and programs


@in_turn
def test_the_honesty_panel_needs_to_know_nothing_of_grafts(spec, motion_set):
    model = push(img2vid.convert("nano_clip", num_frames=4, grafts=[spec]), 0.05).eval()
    given = gather_lists([motion_set / "test.csv"]), Views(4)
    compute = Compute(batch_size=4, num_workers=0, device="cpu")
    if model.visual.tower.in_channels > 3 or model.takes_beside:  # videos alone have none to give
        with pytest.raises(img2vid.Img2VidError, match="takes 5 channels, and videos hold 3|takes audio"):
            honesty(model, *given, compute=compute)
        return
    found = honesty(model, *given, compute=compute)["metrics"]
    assert ("frame_mean" in found) == is_gated(spec)  # the image model, which prompts have left for good
    if not is_gated(spec):
        return
    plain = honesty(img2vid.convert("nano_clip", num_frames=4), *given, compute=compute)["metrics"]
    assert found["frame_mean"]["top1"] == plain["frame_mean"]["top1"]


@pytest.mark.slow
@every_graft
def test_as_onnx_it_is_checked_against_the_model(spec, tmp_path):
    for name, make in TOWERS.items():
        model = push(img2vid.convert(make(), num_frames=4, grafts=[spec])).eval()
        path = tmp_path / f"{name}.onnx"
        if tower_of(model).takes_beside:
            with pytest.raises(img2vid.Img2VidError, match="a program has one input"):
                export_program(model, path, "onnx")
            continue
        assert export_program(model, path, "onnx").max_difference < 1e-3 and path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
@every_graft
def test_resumed_on_every_library(spec, name, motion_set, tmp_path):
    """Stopped and gone on with, a training of a classifier and grafts ends with the weights of the unbroken one."""
    backbone, arguments = NAMED[name]

    def start():
        torch.manual_seed(0)
        size, given = 28 if name == "eva" else 32, (over_space(spec),)
        video = VideoConfig(backbone, 2, size, backbone_args=arguments, num_classes=8, grafts=given)
        how = Tuning(lr=1e-3, warmup=0, freeze="grafts_only")
        return VideoTraining(video, Classification(), how, random_weights=True, save_to=str(tmp_path / "model"))

    keep = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    unbroken = start()
    before = {name: p.clone() for name, p in unbroken.model.named_parameters()}
    fit(unbroken, motion_set, [keep], enable_checkpointing=True)
    moved = {name for name, p in unbroken.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved - {"classifier.weight", "classifier.bias"} <= planted(unbroken.model).keys()
    assert moved & planted(unbroken.model).keys()
    resumed = start()
    fit(resumed, motion_set, ckpt_path=tmp_path / "step=2.ckpt")
    for name, p in unbroken.model.named_parameters():
        assert torch.equal(p, dict(resumed.model.named_parameters())[name]), name


def test_the_mlp_of_a_relative_position_bias_is_no_sublayer():
    """timm's RelPosMlp lies inside an attention and sees coordinates, not tokens."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 0}

    def make():
        torch.manual_seed(0)
        return randomize(timm.models.vision_transformer_relpos.VisionTransformerRelPos(**shape)).eval()

    specs = [{"type": "adapter", "bottleneck": 8}, {"type": "lora", "rank": 4, "targets": ["attn", "mlp"]}, "aim"]
    model = img2vid.convert(make(), num_frames=4, grafts=[*specs, {"type": "experts", "compute": "dense"}])
    assert not [name for name in planted(model) if "rel_pos" in name]
    certificate = certify(model, make(), num_frames=[1, 2], at_step_0=True)
    assert certificate.ok and certificate.alive
