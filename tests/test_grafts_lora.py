"""LoRA against peft, which knows nothing of us; and the weights that libraries read without calling their module."""

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file

import img2vid
from img2vid.backbones.parts import linear_maps
from img2vid.grafts import GraftError, fold, graft
from img2vid.grafts.peft import load_adapter, save_adapter
from tests.conftest import randomize, small_clip, small_eva, small_vit
from tests.test_grafts import features, push

images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def still(**settings):
    """Frames apart, so that a clip of one frame is an image."""
    return {"attention": "space_only", "num_frames": 1, **settings}


def small_beit():
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 0}
    return randomize(timm.models.beit.Beit(**shape, use_rel_pos_bias=True)).eval()


def what_peft_does():
    """How often the installed peft adds B A to the output projection of PyTorch's attention, seen on one alone."""
    model = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(8, 2)})
    before = model["attn"].out_proj.weight.detach().clone()
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["attn"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config)
    delta = theirs.base_model.model["attn"].base_layer.out_proj.get_delta_weight("default").detach()
    merged = theirs.merge_and_unload()["attn"].out_proj.weight
    assert torch.allclose(merged, before + delta) or torch.allclose(merged, before + 2 * delta)
    return "once" if torch.allclose(merged, before + delta) else "twice"


def to_peft(model, folder, plain, out_proj=None):
    """The adapter of ``model`` as peft applies it to a plain image model."""
    save_adapter(model, folder, out_proj=out_proj)
    return peft.PeftModel.from_pretrained(plain, folder).eval()


@pytest.mark.parametrize("options", [{}, {"alpha": 16, "rslora": True}, {"targets": ["attn.proj", "mlp"]}], ids=str)
def test_peft_computes_the_same_on_the_plain_image_model(options, tmp_path):
    spec = {"type": "lora", "rank": 4, "alpha": 2, "targets": ["attn", "mlp"], **options}
    model = push(img2vid.convert(small_vit(), **still(grafts=[spec])))
    theirs = to_peft(model, tmp_path / "adapter", small_vit())
    with torch.no_grad():
        expected, plain = theirs(images), small_vit()(images)
        torch.testing.assert_close(model(images[:, None]), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(expected, plain, atol=1e-2)
        merged = theirs.merge_and_unload()
    folded = fold(model)
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(folded.state_dict()[key], tensor, atol=1e-6, rtol=1e-5)


def test_peft_computes_the_same_on_both_towers_of_open_clip(tmp_path):
    """Its attention is PyTorch's, of which peft takes both projections or none."""
    for targets in (["attn", "mlp"], ["attn.qkv"], ["attn.proj"]):
        spec = {"type": "lora", "rank": 4, "alpha": 8, "targets": targets}
        model = push(img2vid.convert(small_clip(), **still(grafts=[spec])))
        if targets != ["attn.qkv"]:
            with pytest.raises(GraftError, match="adds its B A twice"):
                save_adapter(model, tmp_path / targets[0])
        theirs = to_peft(model, tmp_path / targets[0], small_clip(), what_peft_does())
        with torch.no_grad():
            expected = theirs.encode_image(images)
            torch.testing.assert_close(model.encode_video(images[:, None]), expected, atol=1e-5, rtol=1e-5)
            assert not torch.allclose(expected, small_clip().encode_image(images), atol=1e-2)


@pytest.mark.parametrize(
    ("make", "modules"),
    [(small_vit, ["attn.qkv", "attn.proj", "fc1"]), (small_clip, r"visual\..*(attn|c_fc)")],
    ids=["vit", "clip"],
)
def test_what_peft_has_trained_loads_here(make, modules, tmp_path):
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=modules, lora_dropout=0.1)
    theirs = peft.get_peft_model(make(), config)
    run = theirs.encode_image if hasattr(theirs, "encode_image") else theirs
    randomized = [p for name, p in theirs.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for p in randomized:
            p.add_(torch.randn(p.shape) * 0.1)
    theirs.save_pretrained(tmp_path)
    theirs.eval()
    model = load_adapter(img2vid.convert(make(), **still()), tmp_path, out_proj=what_peft_does())
    with torch.no_grad():
        ours = model.encode_video(images[:, None]) if hasattr(model, "encode_video") else model(images[:, None])
        torch.testing.assert_close(ours, run(images), atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for n, p in model.named_parameters() if "graft_" in n) == sum(p.numel() for p in randomized)


def test_an_adapter_along_time_loads_into_the_video_model(tmp_path):
    spec = {"type": "lora", "rank": 4, "targets": ["temporal_attn", "attn.qkv"]}
    plain = img2vid.convert(small_vit(), num_frames=4)
    torch.nn.init.normal_(plain.tower.blocks[1][1].temporal_fc.weight, std=0.1)
    model = graft(img2vid.convert(small_vit(), num_frames=4), [spec])
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all("graft_" in key for key in missing)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "graft_" in name:
                p.add_(torch.randn(p.shape) * 0.1)
    save_adapter(model, tmp_path)
    assert torch.equal(features(load_adapter(plain, tmp_path)), features(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True; only plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"rank_pattern": {"qkv": 8}}, "rank_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"r": 3}, "expected .3, 48.; nothing was changed"),
        ({"r": None}, "has no rank r"),
    ],
    ids=str,
)
def test_adapters_that_are_more_than_lora_are_refused(change, message, tmp_path):
    import json

    save_adapter(img2vid.convert(small_vit(), grafts=["lora"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model = img2vid.convert(small_vit())
    with pytest.raises(img2vid.Img2VidError, match=message):
        load_adapter(model, tmp_path)
    assert model.config.grafts == () and not any("graft_" in key for key in model.state_dict())


def test_adapters_of_other_models_are_refused(tmp_path):
    save_adapter(img2vid.convert(small_vit(), grafts=["lora"]), tmp_path)
    with pytest.raises(img2vid.Img2VidError, match="not in the image tower"):
        load_adapter(img2vid.convert(small_clip()), tmp_path)
    with pytest.raises(img2vid.Img2VidError, match="nothing here is called"):
        load_adapter(img2vid.convert(small_vit(depth=2)), tmp_path)
    with pytest.raises(img2vid.Img2VidError, match="Expected one LoRA"):
        save_adapter(img2vid.convert(small_vit()), tmp_path)


# ---- weights that are read, not called


READING = {"eva": small_eva, "beit": lambda: small_beit(), "clip": lambda: small_clip().visual}


@pytest.mark.parametrize("make", READING.values(), ids=READING)
def test_it_takes_part_where_a_weight_is_read_and_its_module_never_called(make):
    plain = img2vid.convert(make(), **still())
    model = push(img2vid.convert(make(), **still(grafts=[{"type": "lora", "rank": 4, "targets": ["attn.qkv"]}])))
    maps = [found for block in linear_maps(model.tower) for found in block if "attn.qkv" in found.roles]
    assert not any(found.is_called for found in maps)
    with torch.no_grad():
        expected = make()
        for found in maps:  # W + B A, written into the image model's own weight by hand
            scion = found.host.graft_lora
            weight = expected.get_submodule(found.path)._parameters[found.weight]
            weight.add_(model.grafts[0].scale * scion.zero_B @ scion.A)
        torch.testing.assert_close(model(images[:, None]), expected(images), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(features(model), features(plain), atol=1e-2)


@pytest.mark.parametrize("make", [small_eva, small_beit], ids=["eva", "beit"])
def test_what_peft_would_silently_leave_out_is_not_given_to_it(make, tmp_path):
    model = push(img2vid.convert(make(), **still(grafts=[{"type": "lora", "targets": ["attn.qkv"]}])))
    with pytest.raises(GraftError, match="the adapter would be loaded and do nothing"):
        save_adapter(model, tmp_path / "adapter")
    # it would, indeed
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False)).eval()
    with torch.no_grad():
        assert torch.equal(theirs(images), make()(images))
    to_proj = push(img2vid.convert(make(), **still(grafts=[{"type": "lora", "targets": ["attn.proj", "mlp"]}])))
    theirs = to_peft(to_proj, tmp_path / "adapter", make())
    with torch.no_grad():
        torch.testing.assert_close(to_proj(images[:, None]), theirs(images), atol=1e-5, rtol=1e-5)


def test_dropout_is_of_the_input_and_refused_where_there_is_none():
    with pytest.raises(GraftError, match="never see an input of their own"):
        img2vid.convert(small_eva(), grafts=[{"type": "lora", "dropout": 0.1}])
    model = push(img2vid.convert(small_vit(), num_frames=4, grafts=[{"type": "lora", "dropout": 0.5}]))
    assert torch.equal(features(model), features(model))
    model.train()
    assert not torch.equal(features(model), features(model))


def every_map(make):
    model = img2vid.convert(make(), num_frames=2)
    tower = getattr(model, "visual", model).tower if hasattr(model, "encode_video") else model.tower
    return model, [found for block in linear_maps(tower) for found in block]


BLOCKS = {
    "vit": small_vit,
    "eva": small_eva,
    "beit": small_beit,
    "clip": small_clip,
    "parallel": lambda: small_vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock),
    "two of each": lambda: small_vit(block_fn=timm.models.vision_transformer.ParallelThingsBlock),
    "gated": lambda: small_eva(attn_type="rope", qkv_fused=False),
    "cait": lambda: timm.models.cait.Cait(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=0),
}


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_maps_are_called_exactly_where_they_are_said_to_be(make):
    model, maps = every_map(make)
    called = set()
    for found in maps:
        if found.weight == "weight":
            found.host.register_forward_hook(lambda module, args, out: called.add(module))
    features(model.eval())
    assert {found.path for found in maps if found.host in called} == {f.path for f in maps if f.is_called}
    roles = {role for found in maps for role in found.roles}
    assert {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "temporal_attn.qkv", "temporal_attn.proj"} <= roles


def test_the_parameters_are_counted_as_in_the_paper(tmp_path):
    """2 x L x D x r for two square D x D matrices a layer (section 4.2 and 5); qkv here is one 3 D x D matrix."""
    spec = {"type": "lora", "rank": 4, "targets": ["attn"]}
    model = img2vid.convert(small_vit(), grafts=[spec])
    dim, rank, layers = 48, 4, 3
    planted = sum(p.numel() for name, p in model.named_parameters() if "graft_" in name)
    assert planted == layers * rank * ((dim + 3 * dim) + (dim + dim))
    save_adapter(model, tmp_path)
    assert sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values()) == planted
