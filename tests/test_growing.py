"""Deeper and wider models compute what the smaller one does, and their new parts learn."""

import pytest
import torch

import img2vid
from img2vid.backbones.parts import linear_maps
from img2vid.backbones.reading import read_block
from img2vid.backbones.widening import WiderThanTokens
from img2vid.certificate import certify
from img2vid.checkpoints.rebuilding import tower_of
from img2vid.cli import main as cli
from img2vid.evaluation.attention import attention_maps
from img2vid.export import export_program
from img2vid.growing import GrowthError, Widening, grow, spread
from tests.conftest import randomize, small_vit
from tests.test_transformers import make as make_hf

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
TOWERS = {
    "vit": ("timm:vit_tiny_patch16_224", {}),
    "layer scale, registers": ("timm:vit_small_patch14_reg4_dinov2", {}),
    "eva": ("timm:eva02_tiny_patch14_224", {"mlp_ratio": 2.0}),
    "eva, norms inside": ("timm:eva02_base_patch16_clip_224", {"mlp_ratio": 2.0}),
    "dinov3": ("timm:vit_small_patch16_dinov3", {}),
    "rope": ("timm:vit_small_patch16_dinov3", {"attn_type": "rope"}),
    "beit": ("timm:beit_base_patch16_224", {}),
    "swiglu": ("timm:vit_giant_patch14_dinov2", {}),
    "relative": ("timm:vit_relpos_small_patch16_224", {}),
    "post norm": ("timm:vit_base_patch16_rpn_224", {}),
}
# image towers of open_clip, with their text towers: its own ViT, and one that it builds as timm's
CLIPS = {"clip": "nano_clip", "coca": "open_clip:coca_base", "siglip": "open_clip:ViT-B-16-SigLIP"}
WITH_HEADS = [name for name in TOWERS if name not in ("beit", "relative")]
WITH_DEPTH = [name for name in TOWERS if name != "post norm"]


def make(name="vit", **settings):
    torch.manual_seed(0)
    if name == "clip":
        model = img2vid.convert("nano_clip", **{"num_frames": 3, "random_weights": True, **settings})
        return randomize(model, std=0.1).eval()
    backbone, more = TOWERS[name]
    given = {"num_frames": 3, "random_weights": True, "backbone_args": {**SHAPE, **more}}
    model = randomize(img2vid.convert(backbone, **{**given, **settings}), std=0.1)
    return model.eval()


def clips(num_frames=3):
    return torch.randn(2, num_frames, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def features(model, num_frames=3):
    return getattr(model, "encode_video", model)(clips(num_frames))


@pytest.mark.parametrize("name", [*WITH_DEPTH, "clip"])
@torch.no_grad()
def test_deeper_is_bitwise_the_same(name):
    model = make(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    grown, growth = grow(model, depth=5)
    assert growth.held and growth.difference == 0.0 and len(tower_of(grown).tower.blocks) == 5
    assert torch.equal(features(grown), features(model))
    assert torch.equal(features(grown, 1), features(model, 1))
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", [*TOWERS, "clip"])
@torch.no_grad()
def test_wider_is_the_same_up_to_rounding(name):
    model = make(name)
    ratio = 4 if "eva" in name else 6  # with norms over hidden units, a multiple of what there is
    grown, growth = grow(model, mlp_ratio=ratio)
    assert growth.hidden[1] > growth.hidden[0]
    expected = features(model)
    assert growth.held and (features(grown) - expected).abs().max() < 1e-5 * expected.abs().max()
    # and no accident: with shares that do not sum to one it is another function
    for maps in linear_maps(tower_of(grown).tower):
        (fc2,) = (m.host for m in maps if "mlp.fc2" in m.roles)
        fc2.weight[:, growth.hidden[0] :] *= 0.5
    assert (features(grown) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize(
    "settings", [{}, {"prefix_mode": "shared"}, {"temporal_layers": "last:2"}, {"gate": "tanh"}], ids=str
)
def test_grown_models_are_saved_certified_and_learn_everywhere(settings, tmp_path):
    model = make(**settings)
    grown, growth = grow(model, depth=4, mlp_ratio=5)
    assert growth.held and certify(grown, num_frames=[1, 2]).ok
    grown.save_pretrained(tmp_path)
    again = img2vid.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(clips()), grown(clips()))
    assert again.config.backbone_args["depth"] == 4 and again.config.backbone_args["mlp_ratio"] == 5
    optimizer = torch.optim.SGD(grown.train().parameters(), lr=1e-3)
    objective = torch.randn(48, generator=torch.Generator().manual_seed(2))
    for _ in range(3):  # an identity's gate, then what is behind it, then attention along time behind a gate of its own
        optimizer.zero_grad()
        (grown(clips()) * objective).sum().backward()
        optimizer.step()
    dead = [n for n, p in grown.named_parameters() if not p.grad.any() and not n.endswith("alpha")]
    assert dead == []


@pytest.mark.parametrize("name", [*WITH_HEADS, "clip"])
@torch.no_grad()
def test_more_heads_are_the_same_up_to_rounding(name):
    model = make(name)
    before = read_block(tower_of(model).tower.blocks[0][1])
    heads = {"eva, norms inside": 8, "clip": 3}.get(name, 7)
    grown, growth = grow(model, heads=heads)
    block = tower_of(grown).tower.blocks[0][1]
    read = read_block(block)
    assert growth.heads == (before.num_heads, heads) and (read.num_heads, read.head_dim) == (heads, before.head_dim)
    assert read.scale == before.scale and block.temporal_attn.num_heads == heads
    expected = features(model)
    assert growth.held and (features(grown) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert certify(grown, num_frames=[1, 2]).ok
    inner = before.num_heads * before.head_dim
    for block in (block for _, block in tower_of(grown).tower.blocks):  # and no accident
        read_block(block).proj_weight[:, inner:] *= 0.5
    assert (features(grown) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", ["vit", "eva", "dinov3", "rope", "clip"])
@torch.no_grad()
def test_a_block_of_more_heads_is_the_block_of_its_library(name):
    model = make(name, attention="space_only")
    grown, _ = grow(model, heads=7)
    read = read_block(tower_of(grown).tower.blocks[0][1])
    blocks = [tower_of(one).tower.blocks[0][1] for one in (model, grown)]
    entering = []
    hook = blocks[0].register_forward_pre_hook(lambda m, *given: entering.append(given), with_kwargs=True)
    features(model)
    hook.remove()
    (args, kwargs), (one, other) = entering[0], blocks
    torch.testing.assert_close(other(*args, **kwargs), one(*args, **kwargs), atol=1e-5, rtol=1e-5)
    assert read.qkv_weight.shape == (3 * 7 * read.head_dim, read.dim) and read.proj_weight.shape[1] == 7 * read.head_dim
    is_front = isinstance(getattr(other, "attn", None), WiderThanTokens)
    assert is_front == (name in ("eva", "dinov3", "clip"))


@pytest.mark.parametrize("name", ["vit", "eva", "clip"])
@pytest.mark.parametrize("settings", [{"prefix_mode": "shared"}, {"prefix_mode": "global"},
                                      {"attention": "joint_space_time", "prefix_mode": "shared"}, {"causal": True}],
                         ids=str)  # fmt: skip
@torch.no_grad()
def test_more_heads_under_every_attention_along_time(name, settings):
    if name == "eva" and settings.get("prefix_mode") == "global":  # which refuses rotary positions
        settings = {"prefix_mode": "per_frame", "temporal_layers": "last:2"}
    model = make(name, **settings)
    grown, growth = grow(model, heads=7, depth=len(tower_of(model).tower.blocks) + 1)
    expected = features(model)
    assert growth.held and (features(grown) - expected).abs().max() < 2e-5 * expected.abs().max()
    assert certify(grown, num_frames=[1, 2]).ok


@pytest.mark.parametrize("name", ["vit", "eva", "clip"])
def test_more_heads_are_saved_grafted_drawn_and_learn_apart(name, tmp_path):
    grown, _ = grow(make(name), heads=6, mlp_ratio=6 if name != "eva" else 4)
    grown.save_pretrained(tmp_path / "wide")
    again = img2vid.load(tmp_path / "wide")
    with torch.no_grad():
        assert torch.equal(features(again), features(grown))
        _, growth = grow(again, heads=8)
        assert growth.held and growth.heads == (6, 8)
        assert attention_maps(again, clips()[:1]).spatial is not None
    assert again.config.backbone_args["heads"] == 6
    expected = features(again).detach()
    img2vid.graft(again, [{"type": "lora", "targets": ["attn", "mlp"]}])
    assert torch.equal(features(again), expected) and certify(again, num_frames=[1, 2]).ok
    before = read_block(tower_of(make(name)).tower.blocks[0][1]).num_heads
    (features(grown.train()) * torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    attn = next(m for m in tower_of(grown).tower.blocks[0][1].modules() if getattr(m, "num_heads", 0) == 6)
    weight = attn.in_proj_weight if hasattr(attn, "in_proj_weight") else attn.qkv.weight
    of_heads = [x.unflatten(0, (3, 6, -1)) for x in (weight.detach(), weight.grad)]
    twin = next(i for i in range(before) if torch.equal(of_heads[0][:, i], of_heads[0][:, before]))
    assert not torch.allclose(of_heads[1][:, twin], of_heads[1][:, before])


@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_towers_of_open_clip_grow_as_far_as_it_can_build_them(name, monkeypatch):
    text_tower = {"context_length": 16, "vocab_size": 200, "width": 32, "heads": 2, "layers": 1}
    made = {"embed_dim": 32, "text_cfg": text_tower}
    vision = {"layers": 2, "width": 48, "head_width": 24, "patch_size": 8, "image_size": 32, "mlp_ratio": 3.0}
    if name == "coca":
        decoder = {**made["text_cfg"], "mlp_ratio": 4, "dim_head": 16, "n_queries": 9}
        made |= {"multimodal_cfg": decoder, "custom_text": True}
        made["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
        vision |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    if name == "siglip":
        vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
        made["custom_text"] = True
    import open_clip.factory as factory

    monkeypatch.setitem(factory._MODEL_CONFIGS, "small", {**made, "vision_cfg": vision})
    model = img2vid.convert("open_clip:small", random_weights=True, num_frames=2)
    model = randomize(model.eval(), std=0.1)
    tokens = torch.ones(1, 16).long()
    expected, text = features(model, 2), model.encode_text(tokens)
    if name == "siglip":
        with pytest.raises(GrowthError, match="as timm's vit_tiny_patch16_224, by its name alone"):
            grow(model, depth=13)
        grown, growth = grow(model, heads=4)
    else:
        grown, growth = grow(model, depth=3, mlp_ratio=4, heads=3)
        assert growth.hidden == (144, 192) and len(tower_of(grown).tower.blocks) == 3
    assert growth.held and (features(grown, 2) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(grown.encode_text(tokens), text)
    assert certify(grown, num_frames=[1, 2]).ok


@torch.no_grad()
def test_a_pretrained_backbone_is_converted_with_more_heads():
    plain = img2vid.convert("nano_clip", num_frames=2)
    wide = img2vid.convert("nano_clip", num_frames=2, backbone_args={"heads": 5})
    assert read_block(wide.visual.tower.blocks[0][1]).num_heads == 5
    expected = features(plain, 2)
    torch.testing.assert_close(features(wide, 2), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_copies_of_a_unit_do_not_stay_copies():
    grown, growth = grow(make(), mlp_ratio=6)
    mlp = grown.tower.blocks[0][1].mlp
    (grown.train()(clips()) * torch.randn(48, generator=torch.Generator().manual_seed(2))).sum().backward()
    rows, units = mlp.fc1.weight.detach(), growth.hidden[0]
    twin = next(i for i in range(units) if torch.equal(rows[i], rows[units]))
    assert not torch.allclose(mlp.fc1.weight.grad[twin], mlp.fc1.weight.grad[units])


@pytest.mark.parametrize(("before", "depth"), [(12, 12), (12, 16), (3, 7), (2, 9), (12, 13)])
def test_identities_are_spread_evenly_behind_each_block(before, depth):
    blocks = spread(before, depth)
    assert [i for i, is_new in blocks if not is_new] == list(range(before)) and len(blocks) == depth
    runs = [sum(i == block for i, _ in blocks) for block in range(before)]
    assert max(runs) - min(runs) <= 1


def test_shares_sum_to_one_and_are_unequal():
    pick = Widening.draw(8, 20, torch.Generator().manual_seed(0))
    totals = torch.zeros(8, dtype=torch.float64).index_add_(0, pick.units, pick.shares)
    torch.testing.assert_close(totals, torch.ones(8, dtype=torch.float64))
    repeated = [pick.shares[pick.units == i] for i in range(8) if (pick.units == i).sum() > 1]
    assert repeated and all(len(shares.unique()) == len(shares) for shares in repeated)


def test_the_command(tmp_path, capsys):
    make().save_pretrained(tmp_path / "small")
    base = ["--certify-frames", "1", "2"]
    given = ["grow", str(tmp_path / "small"), "--out", str(tmp_path / "large"), *base]
    assert cli([*given, "--depth", "4", "--mlp-ratio", "6"]) == 0
    shown = capsys.readouterr().out.replace("\n", " ")
    assert "3 blocks and 1 identities behind them, MLPs of 192 -> 288, 4 -> 4 heads" in shown
    assert len(img2vid.load(tmp_path / "large").tower.blocks) == 4
    assert cli([*given, "--heads", "6"]) == 0
    assert "4 -> 6 heads" in capsys.readouterr().out.replace("\n", " ")
    assert img2vid.load(tmp_path / "large").config.backbone_args["heads"] == 6
    assert cli(given) == 2
    assert "Nothing to grow" in capsys.readouterr().err
    assert cli([*given, "--depth", "2"]) == 2
    assert "depth=2: expected a whole number of at least 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "asked", "message"),
    [
        (lambda: img2vid.convert(small_vit()), {"depth": 4}, "passed in by hand cannot be grown"),
        (lambda: make(), {"heads": 3}, "heads=3: there are 4 already"),
        (lambda: make(backbone_args={**SHAPE, "heads": 7}), {"heads": 6}, "heads=6: there are 7 already"),
        (lambda: make("beit"), {"heads": 6}, "relative position bias is a table of a column for each head"),
        (lambda: make("eva, norms inside"), {"heads": 6}, r"norm over all heads together \(norm\), .* Give a multiple"),
        (lambda: make("eva, norms inside"), {"mlp_ratio": 3}, "Give an mlp_ratio that makes a multiple of 96"),
        (lambda: make("post norm"), {"depth": 4}, "no depth to add. They can be wider: mlp_ratio, heads"),
        (
            lambda: make("relative"),
            {"heads": 6},
            "table of a column for each head. Depth and mlp_ratio do not touch it",
        ),
        (lambda: make(grafts=["lora"]), {"depth": 4}, "with grafts cannot be grown"),
        (lambda: make(), {"mlp_ratio": 2}, "MLPs are 192 wide already"),
        (lambda: make(backbone_args={**SHAPE, "scale_mlp_norm": True}), {"mlp_ratio": 6}, "norm over hidden units"),
    ],
)
def test_what_cannot_be_grown_is_refused(model, asked, message):
    with pytest.raises(GrowthError, match=message):
        grow(model(), **asked)


def test_transformers_models_are_refused_by_name(tmp_path):
    make_hf("Dinov2Model").save_pretrained(tmp_path)
    model = img2vid.convert(f"hf:{tmp_path}", num_frames=2)
    with pytest.raises(GrowthError, match="transformers reads sizes from the model's config"):
        grow(model, depth=5)


@pytest.mark.parametrize("name", ["vit", "eva", "clip"])
def test_programs_of_more_heads_run_by_themselves_and_image_files_of_them_do_not_exist(name, tmp_path):
    given = {"heads": 6} if name == "clip" else {**SHAPE, **TOWERS[name][1], "heads": 6}
    model = make(name, backbone_args=given)
    assert export_program(model, tmp_path / "model.pt2", "torch-export").max_difference < 1e-4
    for parameter in model.zero_parameters().values():
        torch.nn.init.zeros_(parameter)
    with pytest.raises(img2vid.Img2VidError, match=r"heads that were added to what its library builds \(heads=6\)"):
        img2vid.export_checkpoint(model, tmp_path / "image.safetensors", "image")
