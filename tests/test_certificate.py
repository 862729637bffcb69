"""The certificate must hold for honest conversions, and must not hold for sabotaged ones."""

import copy
import json
import math

import pytest
import torch
from timm.layers import RmsNormFp32

from img2vid.certificate import certify
from img2vid.checkpoints.native import load, save
from img2vid.cli import main
from img2vid.config import VideoConfig
from img2vid.convert import convert
from img2vid.errors import Img2VidError
from img2vid.model import VideoModel
from img2vid.proof.evidence import fingerprint, image_weights
from img2vid.proof.guarantees import KINDS, Guarantee
from img2vid.two_towers import VideoTextModel
from tests.conftest import randomize, small_clip, small_vit

DESIGNS = [
    # settings, clips that must come out unchanged
    ({}, KINDS),
    ({"prefix_mode": "shared"}, ("single", "static")),
    ({"prefix_mode": "global"}, ("single",)),
    ({"attention": "joint_space_time"}, ("single", "static")),
    ({"attention": "joint_space_time", "prefix_mode": "shared"}, ("single",)),
    ({"attention": "factorised_encoder"}, KINDS),
    ({"attention": "space_only"}, KINDS),
    ({"gate": "tanh"}, KINDS),
    ({"gate": "none"}, ()),
    ({"gate": "none", "temporal_init": "zeros"}, KINDS),
    ({"temporal_init": "random"}, KINDS),
    ({"tubelet_size": 2}, KINDS),
    ({"tubelet_size": 2, "tubelet_init": "average"}, ("single", "static")),
]


def make(image_model=None, **settings):
    image_model = image_model or small_vit()
    reference = copy.deepcopy(image_model)
    cls = VideoTextModel if hasattr(image_model, "visual") else VideoModel
    return cls(image_model, VideoConfig(num_frames=4, **settings)), reference


@pytest.mark.parametrize(("settings", "kept"), DESIGNS, ids=str)
def test_guarantees_are_claimed_exactly_where_they_are_true(settings, kept):
    video, image = make(**settings)
    certificate = certify(video, image)
    assert certificate.ok
    for row in certificate.comparisons:
        assert (row.claimed is not None) == (row.kind in kept)
        if row.kind in kept:
            assert row.held
        else:  # not claimed because not true, not out of caution
            assert row.feature_difference > 1e-3
    assert certificate.guarantee == Guarantee.of(video.config, 1)


def test_without_prefix_tokens_shared_is_per_frame():
    image_model = small_vit(class_token=False, global_pool="avg")
    video, image = make(image_model, prefix_mode="shared")
    certificate = certify(video, image)
    assert certificate.ok
    assert {row.claimed for row in certificate.comparisons} == {"bitwise"}


def test_it_leaves_the_model_as_it_was():
    video, image = make()
    randomize(video, seed=3)
    before = {k: v.clone() for k, v in video.state_dict().items()}
    flags = [p.requires_grad for p in video.parameters()]
    video.train()
    certify(video, image)
    assert all(torch.equal(before[k], v) for k, v in video.state_dict().items())
    assert flags == [p.requires_grad for p in video.parameters()]
    assert video.training
    assert all(p.grad is None for p in video.parameters())


def test_a_trained_model_is_certified_with_gates_closed():
    video, image = make()
    with torch.no_grad():
        for parameter in video.zero_parameters().values():
            parameter.copy_(torch.linspace(-0.05, 0.05, parameter.numel()).view_as(parameter))
    certificate = certify(video, image)
    assert certificate.ok
    assert certificate.gates_moved == pytest.approx(0.05)
    assert certificate.reversible
    assert certificate.perturbed_difference > 1e-3


def test_gates_that_a_conversion_leaves_open_are_found():
    """A trained model's gates may be anywhere; those of a fresh conversion may not, however small they are."""
    video, image = make()
    with torch.no_grad():
        video.blocks[2].temporal_fc.bias[0] = 1e-6
    assert certify(video, image).ok
    certificate = certify(video, image, at_step_0=True)
    assert not certificate.held
    assert "although just converted" in " ".join(str(certificate).split())


@pytest.mark.parametrize("name", ["blocks.0.temporal_fc.weight", "blocks.2.temporal_fc.bias"])
def test_gates_of_nan_are_found(name):
    video, image = make()
    with torch.no_grad():
        video.get_parameter(name).view(-1)[0] = float("nan")
    certificate = certify(video, image)
    assert math.isnan(certificate.gates_moved)
    assert not certificate.reversible


def test_clips_that_know_of_each_other_are_found():
    video, image = make()
    attention = video.blocks[1].temporal_attn
    together = type(attention).forward
    attention.forward = lambda x, num_frames: together(attention, x, len(x))  # one clip of all frames of the batch
    certificate = certify(video, image)
    assert certificate.held
    assert certificate.reversible
    assert certificate.alive
    assert not certificate.ok and certificate.failures
    assert "other clips of the batch" in " ".join(str(certificate).split())


def shift(video, name):
    with torch.no_grad():
        video.get_parameter(name).view(-1)[0] += 1e-3


@pytest.mark.parametrize("name", ["blocks.1.attn.proj.weight", "pos_embed", "cls_token", "norm.bias"])
def test_changed_image_weights_are_found(name):
    video, image = make()
    shift(video, name)
    certificate = certify(video, image)
    assert not certificate.ok and certificate.failures
    assert not certificate.held
    assert certificate.image_weights_equal[0] == certificate.image_weights_equal[1] - 1


def test_an_ungated_leak_is_found():
    video, image = make()
    video.blocks[1].temporal_drop_path = torch.nn.Hardtanh(1e-4, 1.0)  # never lets the branch be exactly zero
    certificate = certify(video, image)
    assert not certificate.held
    assert certificate.comparisons[0].layer_differences[0] == 0
    assert certificate.comparisons[0].layer_differences[1] > 0


def test_nan_is_not_equal():
    video, image = make()
    with torch.no_grad():
        video.blocks[0].temporal_attn.proj.weight.fill_(float("inf"))  # 0 * inf
    certificate = certify(video, image)
    assert not certificate.held
    read = json.loads(certificate.to_json(), parse_constant=pytest.fail)  # NaN is no JSON
    assert read["comparisons"][0]["feature_difference"] == "nan"


def test_a_frozen_function_is_found():
    """A gate that nothing depends on: perturbing it must move the output, or the certificate fails."""
    video, image = make(attention="divided_space_time", temporal_layers="last:1", time_embed="none")
    video.blocks[2].temporal_residual = lambda x: torch.zeros_like(x)
    certificate = certify(video, image)
    assert certificate.held
    assert not certificate.reversible
    assert not certificate.alive
    assert not certificate.ok and certificate.failures


def test_dead_initialisations_are_reported_not_hidden():
    video, image = make(temporal_init="zeros")
    certificate = certify(video, image)
    assert certificate.held
    assert not certificate.alive
    assert not certificate.expected_alive
    assert certificate.ok
    assert "expected: temporal_init=zeros" in str(certificate)


def test_ungated_zeros_are_dead_too():
    certificate = certify(*make(temporal_init="zeros", gate="none"))
    assert certificate.held
    assert not certificate.alive
    assert "cannot learn" in str(certificate)


def test_a_branch_that_ignores_the_other_frames_is_found():
    """The output moves when its gate opens, and it learns; but it has nothing to do with time."""
    video, image = make(prefix_mode="shared")
    attention = video.blocks[1].temporal_attn
    alone = type(attention).forward
    attention.forward = lambda x, num_frames: alone(attention, x, 1)  # each frame attends to itself
    certificate = certify(video, image)
    assert certificate.held
    assert certificate.reversible
    assert [layer.coupling == 0.0 for layer in certificate.liveness[:3]] == [False, True, False]
    assert not certificate.ok and certificate.failures


def test_frames_that_never_meet_are_found():
    """Every attention looks at all frames when asked, but what it found is thrown away."""
    video, image = make()
    for block in video.blocks:

        def forgetful(x, residual=block.temporal_residual):
            with video.clip.of(1):
                alone = residual(x)
            residual(x)
            return alone

        block.temporal_residual = forgetful
    certificate = certify(video, image)
    assert certificate.held
    assert certificate.reversible
    assert all(layer.coupling > 0.0 for layer in certificate.liveness[:3])
    assert certificate.exchange == 0.0
    assert not certificate.ok and certificate.failures


def test_a_disconnected_time_embedding_is_found():
    video, image = make()
    video.blocks[0]._forward_pre_hooks.clear()
    certificate = certify(video, image)
    assert certificate.held
    assert certificate.reversible
    assert [layer.layer for layer in certificate.liveness if not layer.alive] == ["time_embed"]
    assert not certificate.ok and certificate.failures


def test_space_only_keeps_frames_apart():
    video, image = make(attention="space_only")
    assert certify(video, image).exchange == 0.0
    frame_features = video.frame_features
    video.frame_features = lambda clips: frame_features(clips) + clips.mean()
    assert not certify(video, image).alive


@pytest.mark.parametrize("num_frames", [(), (0,), (-1, 2)])
def test_numbers_of_frames_that_are_none(num_frames):
    with pytest.raises(Img2VidError, match="at least 1"):
        certify(*make(), num_frames=num_frames)


@pytest.mark.parametrize("gate", ["temporal_fc", "tanh"])
def test_liveness_by_layer(gate):
    certificate = certify(*make(gate=gate))
    *layers, time_embed = certificate.liveness
    assert [layer.layer for layer in layers] == ["blocks.0", "blocks.1", "blocks.2"]
    assert time_embed.layer == "time_embed"
    assert time_embed.gate[0] > 0
    for layer in layers:
        assert layer.gate[0] > 0
        assert layer.coupling > 1e-3
        assert layer.attention[0] == 0
        assert layer.attention[1] > 0


def test_tokens_that_lie_otherwise_in_memory_attend_no_further():
    """DeepseekVit's tokens are not contiguous, and norms written out in tensor operations round by layout."""
    image_model = small_vit(norm_layer=RmsNormFp32, class_token=False, global_pool="avg")
    image_model.norm_pre.register_forward_hook(lambda module, args, out: out.mT.contiguous().mT)
    video, image = make(image_model)
    certificate = certify(video, image)
    assert certificate.ok and [layer.stray for layer in certificate.liveness[:3]] == [0.0] * 3


def mixed_up(attention, how):
    """A temporal attention that folds its tokens wrongly, so that tokens meet those of other positions."""
    forward = attention.forward

    def wrong(x, num_frames):
        if how == "next position":
            return forward(x.roll(1, dims=1), num_frames)
        if how == "one for all":
            return forward(x, num_frames).mean(dim=1, keepdim=True).expand_as(x)
        flat = x.reshape(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1)  # as if x were (N, B*T, D)
        return forward(flat, num_frames).transpose(0, 1).reshape(x.shape)

    return wrong


@pytest.mark.parametrize("gate", ["temporal_fc", "tanh"])
@pytest.mark.parametrize("prefix_mode", ["per_frame", "shared"])
@pytest.mark.parametrize("how", ["next position", "one for all", "wrong order"])
def test_tokens_attend_along_their_own_position(how, prefix_mode, gate):
    """Behind closed gates and by gradients alone, attention between wrong positions looks as good as the right one."""
    video, image = make(prefix_mode=prefix_mode, gate=gate)
    certificate = certify(video, image)
    assert certificate.ok and [layer.stray for layer in certificate.liveness[:3]] == [0.0] * 3
    assert "at each token's own position alone" in " ".join(str(certificate).split())
    attention = video.tower.blocks[1][1].temporal_attn
    attention.forward = mixed_up(attention, how)
    certificate = certify(video, image)
    assert [layer.stray == 0.0 for layer in certificate.liveness[:3]] == [True, False, True]
    assert certificate.held and not certificate.ok
    assert "in blocks.1 tokens attend along other positions" in " ".join(str(certificate).split())


def test_text_tower_is_compared():
    model, image = make(small_clip())
    assert certify(model, image).text_difference == 0
    shift(model, "text_projection")
    certificate = certify(model, image)
    assert certificate.text_difference > 0
    assert not certificate.ok and certificate.failures


def test_machine_readable_and_pretty():
    certificate = certify(*make(), num_frames=(1, 3))
    read = json.loads(certificate.to_json())
    assert read["ok"] is True
    assert [(r["kind"], r["num_frames"], r["held"]) for r in read["comparisons"]] == [
        ("single", 1, True),
        ("static", 3, True),
        ("moving", 3, True),
        ("shuffled", 3, True),
    ]
    assert "any clip, bit for bit" in str(certificate)
    assert "3 of 3 layers learn" in str(certificate)


def test_a_wrong_reference_is_refused():
    video, _ = make()
    with pytest.raises(Img2VidError, match="made from a VisionTransformer"):
        certify(video, torch.nn.Linear(3, 3))
    with pytest.raises(Img2VidError, match="VideoModel was given"):
        certify(video, video)
    image = small_vit()
    with pytest.raises(Img2VidError, match="in place.*Build a second image model"):
        certify(convert(image, num_frames=2), image)
    with pytest.raises(Img2VidError, match="not a VisionTransformer"):
        certify(small_vit(), small_vit())
    with pytest.raises(Img2VidError, match=r"reference.to\('cpu', torch.float32\)"):
        certify(video, small_vit().half())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 2}, "blocks.2.attn.proj.bias: nothing in the reference"),
        ({"embed_dim": 64}, "blocks.0.attn.proj.bias"),
        ({"img_size": 48}, r"pos_embed: \(1, 37, 48\) in the reference"),
        ({"num_classes": 7}, "head.bias: .* nothing in the model"),
    ],
    ids=str,
)
def test_a_reference_of_another_shape_is_refused(change, message):
    video, _ = make()
    with pytest.raises(Img2VidError, match=message):
        certify(video, small_vit(**change))


def test_modes_of_all_parts_come_back():
    video, image = make()
    video.train()
    video.blocks[1].eval()  # a frozen block
    modes = [m.training for m in video.modules()]
    certify(video, image)
    assert [m.training for m in video.modules()] == modes


def test_clips_of_another_size():
    image_model = small_vit(dynamic_img_size=True)
    video, image = make(image_model)
    seen = []
    video.base.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[-2:])))
    assert certify(video, image, num_frames=(1, 2), image_size=(16, 48)).ok
    assert set(seen) == {(16, 48)}


@pytest.mark.parametrize("settings", [{}, {"tubelet_size": 2, "tubelet_init": "average"}, {"num_classes": 3}], ids=str)
def test_weights_of_before_are_compared(settings):
    video, image = make(**settings)
    before = fingerprint(image_weights(image, image, video.config))
    assert certify(video, image, weights_before=before).ok
    shift(video, "norm.bias")
    shift(image, "norm.bias")  # as when both share their parameters
    certificate = certify(video, image, weights_before=before)
    assert certificate.image_weights_equal[0] == certificate.image_weights_equal[1]
    assert not certificate.held


def test_a_saved_model_knows_whether_its_image_weights_changed(tmp_path, capsys):
    assert main(["convert", "--backbone", "nano_clip", "--out", str(tmp_path / "m")]) == 0
    assert main(["certify", str(tmp_path / "m"), "--num-frames", "1", "2"]) == 0
    assert "unchanged since the conversion" in capsys.readouterr().out
    recorded = (tmp_path / "m" / "certificate.json").read_text()
    model = load(tmp_path / "m")
    shift(model, "visual.ln_post.bias")
    save(model, tmp_path / "m")
    (tmp_path / "m" / "certificate.json").write_text(recorded)
    assert main(["certify", str(tmp_path / "m"), "--num-frames", "1", "2"]) == 0
    assert "changed since the conversion, as by training" in " ".join(capsys.readouterr().out.split())
