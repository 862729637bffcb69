"""Several towers on one clip: what each of them sees, how it is joined, and what is kept of the first."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pixels

import img2vid
from img2vid.certificate import certify
from img2vid.cli import main as cli
from img2vid.convert import convert
from img2vid.data.lists import read_list
from img2vid.evaluation.features import Compute, Views, extract
from img2vid.grafts import GraftError, graft, remove
from img2vid.grafts.fusion import seen_by
from img2vid.grafts.grafting import num_parameters
from img2vid.tuning import freeze, layer_groups
from tests.conftest import randomize, small_clip, small_eva, small_vit

IN_TIME = {"backbone": "nano_clip", "attention": "divided_space_time", "num_frames": 4}


def clips(size=32, num_frames=4):
    return torch.randn(2, num_frames, 3, size, size, generator=torch.Generator().manual_seed(1))


def fused(make=small_vit, mode="gate", towers=("nano_clip",), **settings):
    grafts = [{"type": "fusion", "towers": list(towers), "mode": mode}]
    return convert(make(), num_frames=4, grafts=grafts, **settings)


@torch.no_grad()
def alone(tower, clips, host):
    """What another tower makes of a clip, by a copy that was never grafted."""
    again = convert("nano_clip", attention="space_only").visual
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (host.tower.preprocess.mean, host.tower.preprocess.std))
    raw = (clips * std + mean) * 255
    size = tower.tower.image_size
    raw = torch.stack([pixels.resize(clip, size, InterpolationMode.BICUBIC, antialias=True) for clip in raw])
    return again.frame_features(again.normalize(raw))


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("mode", ["gate", "concat"])
def test_each_tower_sees_the_clip_as_if_it_were_alone(mode, size):
    model, x = fused(mode=mode, make=lambda: small_vit(img_size=size)), clips(size)
    scion = model.graft_fusion
    assert model.tower.preprocess.mean != scion.towers[0].tower.preprocess.mean
    expected = alone(scion.towers[0], x, model)
    with torch.no_grad():
        first = convert(small_vit(img_size=size), num_frames=4).frame_features(x)
        if mode == "gate":
            assert torch.equal(model.frame_features(x), first)
            torch.nn.init.normal_(scion.zero_gate.weight, std=0.1, generator=torch.Generator().manual_seed(1))
            centred = expected - expected.mean(-1, keepdim=True)
            y = centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt()
            joined = first + y @ scion.zero_gate.weight.T
        else:
            assert torch.equal(model.frame_features(x)[..., :48], first)
            joined = torch.cat([first, expected], dim=-1)
        torch.testing.assert_close(model.frame_features(x), joined, atol=2e-3, rtol=1e-3)
        assert not torch.allclose(model.frame_features(x)[..., :48] + 1, joined[..., :48])


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_mean_and_max_are_that_and_keep_nothing(mode):
    model = fused(lambda: small_vit(embed_dim=64), mode)
    x = clips()
    with torch.no_grad():
        both = [convert(small_vit(embed_dim=64), num_frames=4).frame_features(x)]
        both.append(model.graft_fusion.towers[0].frame_features(seen_by(model.graft_fusion.towers[0], x, model)))
        expected = sum(both) / 2 if mode == "mean" else torch.maximum(*both)
        torch.testing.assert_close(model.frame_features(x), expected)
    certificate = certify(model, small_vit(embed_dim=64), num_frames=[1, 2])
    assert certificate.ok and not certificate.guarantee.strength and f"the {mode} of" in certificate.guarantee.summary
    assert max(c.feature_difference for c in certificate.comparisons) > 0.01
    with pytest.raises(GraftError, match="features of one length, but they have 48, 64"):
        fused(mode=mode)


def test_concat_is_labelled_and_leaves_logits_alone():
    certificate = certify(fused(mode="concat"), small_vit(), num_frames=[1, 2])
    assert certificate.ok and "in the first tower's columns" in str(certificate).replace("\n", " ")
    model, plain = fused(mode="concat", num_classes=5), convert(small_vit(), num_frames=4, num_classes=5)
    randomize(plain.classifier)
    model.classifier.load_state_dict(plain.classifier.state_dict(), strict=False)
    x = clips()
    assert model.clip_features(x).shape == (2, 48 + 64)
    assert torch.equal(model(x), plain(x))
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    assert model.classifier.graft_fusion.zero_columns.grad.abs().sum() > 0
    assert certify(model, small_vit(), num_frames=[1, 2]).ok
    with torch.no_grad():
        model.classifier.graft_fusion.zero_columns.add_(1.0)
    assert not torch.allclose(model(x), plain(x))
    assert torch.equal(remove(model)(x), plain(x))
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_texts_stay_where_features_are():
    model, plain = fused(small_clip), convert(small_clip(), num_frames=4)
    tokens = torch.randint(1, 200, (2, 16))
    assert torch.equal(model.encode_text(tokens), plain.encode_text(tokens))
    assert torch.equal(model.encode_video(clips()), plain.encode_video(clips()))
    with pytest.raises(GraftError, match="texts would have no counterpart"):
        fused(small_clip, "concat")
    with pytest.raises(GraftError, match="texts would have no counterpart"):
        graft(plain, [{"type": "fusion", "towers": ["nano_clip"], "mode": "concat"}])
    assert not plain.config.grafts
    assert fused(small_clip, "concat", num_classes=3)(clips()).shape == (2, 3)


@pytest.mark.parametrize("make", [small_vit, small_eva, small_clip])
@pytest.mark.parametrize("train", [False, True])
def test_what_another_tower_has_along_time_learns_in_its_turn(make, train):
    model = convert(make(), num_frames=4, grafts=[{"type": "fusion", "towers": [IN_TIME], "train": train}])
    certificate = certify(model, make(), num_frames=[1, 2])
    assert certificate.ok and certificate.alive
    depths = {layer.layer.split("towers.0.")[-1]: layer.depth for layer in certificate.liveness if layer.graft}
    assert depths["graft_fusion"] == 0 and depths["time_embed"] == 1
    assert {depth for name, depth in depths.items() if "blocks" in name} == {1}


def test_frozen_towers_stay_frozen_and_in_eval_mode():
    model = fused().train()
    scion = model.graft_fusion
    assert not any(p.requires_grad for p in scion.towers.parameters()) and not scion.towers[0].training
    freeze(model, "grafts_only")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "graft_fusion.zero_gate.weight",
        "graft_fusion.zero_gate.bias",
    }


def test_towers_that_learn_do_so_as_pretrained_weights():
    model = convert(small_vit(), num_frames=4, grafts=[{"type": "fusion", "towers": [IN_TIME], "train": True}])
    origins = {name: group.origin for group in layer_groups(model) for name in group.parameters}
    assert origins["graft_fusion.towers.0.conv1.weight"] == "pretrained"
    assert origins["graft_fusion.zero_gate.weight"] == "new"
    time = {origin for name, origin in origins.items() if ".towers." in name and "temporal_" in name}
    assert time == {"new"} and model.origin("graft_fusion.towers.0.conv1.weight") == "new"
    freeze(model, "temporal_only")
    learning = {name for name, p in model.named_parameters() if p.requires_grad and ".towers." in name}
    assert learning and all("temporal_" in name or "time_embed" in name for name in learning)


def test_two_of_them_come_and_go_by_themselves():
    one, two = ({"type": "fusion", "name": name, "towers": ["nano_clip"]} for name in ("one", "two"))
    model = convert(small_vit(), num_frames=4, grafts=[one, two])
    with torch.no_grad():
        for scion in (model.graft_one, model.graft_two):
            scion.zero_gate.weight.normal_(generator=torch.Generator().manual_seed(1))
    both = model(clips())
    remove(model, "one")
    left = model(clips())
    assert not torch.allclose(left, both)
    assert not torch.allclose(left, convert(small_vit(), num_frames=4)(clips()))


def test_streams_go_on_where_the_other_tower_sees_frame_by_frame():
    model, x = fused(causal=True).eval(), clips()
    torch.nn.init.normal_(model.graft_fusion.zero_gate.weight)
    stream = model.stream()
    for t in range(4):
        moment = stream(x[:, t])
    torch.testing.assert_close(moment.clip, model(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(GraftError, match="looks both ways"):
        fused(causal=True, towers=[IN_TIME])


@pytest.mark.parametrize("order", [1, -1])
def test_channels_that_the_first_tower_got_are_its_own(order):
    model = convert(small_vit(), num_frames=4)
    specs = [{"type": "channels", "more": 2}, {"type": "fusion", "towers": ["nano_clip"], "mode": "concat"}]
    graft(model, specs[::order])
    x = clips()
    more = torch.cat([x, torch.randn(2, 4, 2, 32, 32)], dim=2)
    assert torch.equal(model(more), fused(mode="concat")(x))


def test_two_others_tubelets_and_half_precision():
    model = fused(towers=["nano_clip", IN_TIME], tubelet_size=2)
    assert model.graft_fusion.zero_gate.in_features == 128
    assert torch.equal(model(clips()), convert(small_vit(), num_frames=4, tubelet_size=2)(clips()))
    torch.nn.init.normal_(model.graft_fusion.zero_gate.weight)
    assert model.to(torch.bfloat16)(clips().bfloat16()).isfinite().all()


def test_one_folder_holds_all_and_a_folder_can_be_a_tower(tmp_path):
    other = convert("nano_clip", num_frames=4)
    randomize(other)
    other.save_pretrained(tmp_path / "other")
    model = fused(towers=[str(tmp_path / "other")])
    own, theirs = model.graft_fusion.towers[0].state_dict(), other.visual.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    torch.nn.init.normal_(model.graft_fusion.zero_gate.weight)
    folder = tmp_path / "fused"
    named = convert("nano_clip", num_frames=4)
    graft(named, [{"type": "fusion", "towers": [str(tmp_path / "other")]}])
    torch.nn.init.normal_(named.visual.graft_fusion.zero_gate.weight)
    named.save_pretrained(folder)
    (tmp_path / "other" / "model.safetensors").unlink()  # it is not asked again
    again = img2vid.load(folder)
    assert torch.equal(again.encode_video(clips()), named.encode_video(clips()))
    assert again.config == named.config and certify(again, num_frames=[1, 2]).held


def test_given_random_weights_or_the_named_ones():
    named, random = fused(), fused(towers=[{"backbone": "nano_clip", "random_weights": True}])
    original = convert("nano_clip").visual.state_dict()
    key = "transformer.resblocks.0.attn.in_proj_weight"
    assert torch.equal(named.graft_fusion.towers[0].state_dict()[key], original[key])
    assert not torch.equal(random.graft_fusion.towers[0].state_dict()[key], original[key])


def test_features_of_both_are_extracted_and_asked(motion_set, tmp_path):
    folder = str(tmp_path / "plain")
    convert("nano_clip", num_frames=4, num_classes=4).save_pretrained(folder)
    given = ["graft", folder, "--graft", "fusion", "towers=[nano_clip]", "mode=concat", "--certify-frames", "1"]
    assert cli([*given, "--out", str(tmp_path / "both")]) == 0
    model, plain = img2vid.load(tmp_path / "both"), img2vid.load(folder)
    videos = read_list(motion_set / "test.csv")
    found = [extract(m, videos, Views(4), compute=Compute(num_workers=0)).of["model"] for m in (model, plain)]
    assert found[0].shape[-1] == 128 and torch.equal(found[0][..., :64], found[1])
    lists = ["--train", str(motion_set / "train.csv"), "--data", str(motion_set / "test.csv"), "--num-workers", "0"]
    out = tmp_path / "probe.json"
    assert cli(["eval", "probe", "--model", str(tmp_path / "both"), *lists, "--probes", "knn", "--out", str(out)]) == 0
    assert out.is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "names of backbones, or model folders"),
        ({"towers": [7]}, "neither the name of a backbone"),
        ({"towers": [{"attention": "space_only"}]}, "with a backbone among them"),
        ({"towers": [{"backbone": "nano_clip", "num_fames": 2}]}, "num_fames"),
        ({"towers": ["nano_clap"]}, "nano_clip"),
        ({"towers": ["nano_clip"], "mode": "sum"}, "mode='sum'"),
        ({"towers": [{**IN_TIME, "num_classes": 3}]}, "leave out num_classes=3"),
        ({"towers": [{**IN_TIME, "tubelet_size": 2}]}, "expected a divisor"),
        ({"towers": [{"backbone": "nano_clip", "preprocess": {"mean": [0.5] * 3, "std": [0.5] * 3,
          "interpolation": "lanczos"}}]}, "only bilinear and bicubic"),
    ],
)  # fmt: skip
def test_bad_towers_are_explained(options, message):
    model = convert(small_vit(), num_frames=4)
    with pytest.raises(img2vid.Img2VidError, match=message):
        graft(model, [{"type": "fusion", **options}])
    assert not model.config.grafts and not any("graft_" in key for key in model.state_dict())


def test_the_parameters_are_those_of_the_towers_and_a_gate():
    model, other = fused(towers=("nano_clip", "nano_clip")), convert("nano_clip", attention="space_only").visual
    whole = sum(p.numel() for p in other.parameters())
    assert num_parameters(model, "fusion") == 2 * whole + 48 * (2 * 64) + 48
