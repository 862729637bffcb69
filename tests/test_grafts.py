"""What every graft must hold, on every kind of tower, beside every kind of attention along time.

A new graft gets all of it by one line in ``GRAFTS``; what only one type has is tested in test_grafts_<type>.py.
"""

import collections
import copy
import io
import json
import pickle
import re

import lightning.pytorch as pl
import pytest
import torch

import img2vid
from img2vid.certificate import certify
from img2vid.cli import main as cli
from img2vid.config import ConfigError, VideoConfig
from img2vid.evaluation.attention import attention_maps
from img2vid.export import export_program
from img2vid.footprint import measure_on_nothing
from img2vid.grafts import GRAFTS as TYPES
from img2vid.grafts import GraftError, fold, graft, read_graft, remove
from img2vid.grafts.base import Graft
from img2vid.grafts.grafting import num_parameters, tower_of
from img2vid.interpolation import interpolate
from img2vid.objectives import Classification
from img2vid.programs import ExportError
from img2vid.streaming import StreamError
from img2vid.temporal.pooling import first
from img2vid.training import Tuning, VideoTraining
from img2vid.tuning import TuningError, freeze, layer_groups
from tests.conftest import randomize, small_clip, small_eva, small_vit
from tests.test_transformers import make as make_hf
from tests.training_run import fit

ALL = ["attn", "temporal_attn", "mlp"]
GRAFTS = {
    "lora": {"type": "lora", "rank": 4, "targets": ALL},
    "houlsby": {"type": "adapter", "bottleneck": 8},
    "houlsby near": {"type": "adapter", "bottleneck": 8, "init": "near"},
    "parallel": {"type": "adapter", "bottleneck": 8, "at": ["mlp"], "form": "beside", "scale": 0.1},
    "aim": {"type": "aim"},
    "st_adapter": {"type": "st_adapter", "bottleneck": 8},
    "vpt shallow": {"type": "prompt", "num_tokens": 4, "form": "shallow"},
    "vpt deep": {"type": "prompt", "num_tokens": 4, "form": "deep"},
    "channels": {"type": "channels", "more": 2},
    "control": {"type": "control", "more": 2, "copies": 2},
    "prompts gated": {"type": "prompt", "num_tokens": 4, "form": "gated"},
    "st_adapter in space": {"type": "st_adapter", "bottleneck": 8, "kernel": [3, 3, 3], "init": "up"},
    "experts": {"type": "experts", "layers": "all"},
    "experts dense": {"type": "experts", "num_experts": 3, "compute": "dense"},
    "fusion": {"type": "fusion", "towers": ["nano_clip"], "train": True},
    "vector": {"type": "vector", "name": "audio", "dim": 6},
}
TOWERS = {
    "vit": small_vit,
    "eva": small_eva,
    "clip": small_clip,
    "hf clip": lambda: make_hf("CLIPModel"),
    "hf dinov2 with registers": lambda: make_hf("Dinov2WithRegistersModel"),
}
every_graft = pytest.mark.parametrize("spec", GRAFTS.values(), ids=GRAFTS)
# the first in the default suite, the others beside what else takes long
in_turn = pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, id=name, marks=[pytest.mark.slow] if i else [])
        for i, (name, spec) in enumerate(GRAFTS.items())
    ],
)
every_tower = pytest.mark.parametrize("make", TOWERS.values(), ids=TOWERS)


def clips(num_frames=3, seed=1, model=None):
    """Two clips, with as many channels as the model takes; the first three are always the same."""
    channels = 3 if model is None else tower_of(model).tower.in_channels
    return torch.randn(2, num_frames, 8, 32, 32, generator=torch.Generator().manual_seed(seed))[:, :, :channels]


def vectors(model, num_clips=2):
    """What it takes beside clips."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(num_clips, n, generator=generator) for name, n in model.takes_beside.items()}


@torch.no_grad()
def features(model, num_frames=3):
    run = model.encode_video if hasattr(model, "encode_video") else model
    return run(clips(num_frames, model=model), **vectors(model))


def planted(model):
    return {name: p for name, p in model.named_parameters() if "graft_" in name}


@torch.no_grad()
def push(model, std=0.1):
    """Move what grafts have put in, and the gates along time, off where they began."""
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "graft_" in name or "temporal_fc" in name:
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return model


def over_space(spec):
    """Without what stands behind the gates along time."""
    return {**spec, "targets": ["attn", "mlp"]} if "targets" in spec else spec


def is_gated(spec):
    return bool(read_graft(spec).guarantee().strength)


def keeps(spec, found, expected, atol=1e-4):
    """Whether they are the same, as far as the graft promises it."""
    if read_graft(spec).guarantee().strength.get("moving") == "close":
        return torch.allclose(found, expected, atol=atol)
    return torch.equal(found, expected)


@every_tower
@every_graft
def test_three_acts(spec, make):
    base = features(img2vid.convert(make(), num_frames=4))
    model = img2vid.convert(make(), num_frames=4, grafts=[spec])
    assert planted(model)
    assert keeps(spec, features(model), base) == is_gated(spec)
    push(model)
    assert not torch.allclose(features(model), base, atol=1e-3)
    with model.gates_closed():
        assert keeps(spec, features(model), base) == is_gated(spec)
    for name, p in model.named_parameters():
        if "temporal_fc" in name:
            torch.nn.init.zeros_(p)
    assert torch.equal(features(remove(model)), base)
    assert not planted(model) and model.config.grafts == ()
    assert model.state_dict().keys() == img2vid.convert(make(), num_frames=4).state_dict().keys()


@every_tower
@every_graft
def test_the_certificate_proves_it_and_everything_learns(spec, make):
    model = img2vid.convert(make(), num_frames=4, grafts=[spec])
    certificate = certify(model, make(), num_frames=[1, 2], at_step_0=True)
    assert certificate.ok and certificate.alive
    assert bool(certificate.guarantee.strength) == is_gated(spec)
    places = [layer for layer in certificate.liveness if layer.graft == read_graft(spec).name]
    assert places and all(layer.alive for layer in places)
    assert f"places of {read_graft(spec).name} learn" in str(certificate)


@every_tower
@every_graft
def test_folded_is_the_same_without_a_trace(spec, make):
    model = push(img2vid.convert(make(), num_frames=4, grafts=[spec]))
    before, cls = features(model), TYPES[spec["type"]]
    if cls.fold is Graft.fold:
        with pytest.raises(GraftError, match="cannot be folded"):
            fold(model)
        assert torch.equal(features(model), before)
        return
    fold(model)
    torch.testing.assert_close(features(model), before, atol=1e-5, rtol=1e-5)
    assert model.state_dict().keys() == img2vid.convert(make(), num_frames=4).state_dict().keys()
    assert all("Grafted" not in type(module).__name__ for module in model.modules())
    plain = img2vid.convert(make(), num_frames=4)
    assert type(tower_of(model).tower.blocks[0][1]) is type(tower_of(plain).tower.blocks[0][1])


@every_graft
def test_saved_and_loaded(spec, tmp_path):
    model = push(img2vid.convert("nano_clip", num_frames=4, grafts=[spec], random_weights=True))
    model.save_pretrained(tmp_path / "model")
    again = img2vid.load(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(features(again), features(model))
    assert certify(again, num_frames=[1, 2]).held


@every_graft
def test_copied_pickled_and_put_on_afterwards(spec):
    built = push(img2vid.convert(small_vit(), num_frames=4, grafts=[spec]))
    later = img2vid.convert(small_vit(), num_frames=4)
    assert graft(later, [spec]) is later
    assert later.config.grafts == built.config.grafts
    later.load_state_dict(built.state_dict())
    expected, buffer = features(built), io.BytesIO()
    assert torch.equal(features(later), expected)
    twin = copy.deepcopy(built)
    assert torch.equal(features(twin), expected)
    push(twin)
    assert torch.equal(features(built), expected)  # they share nothing
    torch.save(built, buffer)
    buffer.seek(0)
    assert torch.equal(features(torch.load(buffer, weights_only=False)), expected)
    assert torch.equal(features(pickle.loads(pickle.dumps(built))), expected)


@every_graft
def test_names_origins_and_freezing(spec):
    model = img2vid.convert(small_vit(), num_frames=4, grafts=[spec])
    image_keys = small_vit().state_dict().keys()
    assert image_keys <= model.state_dict().keys()
    assert {model.origin(name) for name in planted(model)} <= {"new", "copied"}
    grouped = {name for group in layer_groups(model) for name in group.parameters}
    assert planted(model).keys() <= grouped
    name = read_graft(spec).name
    assert num_parameters(model, name) == sum(p.numel() for p in planted(model).values())
    freeze(img2vid.convert(small_vit(), num_frames=4, grafts=[spec]), "temporal_only")
    if "targets" in spec:
        with pytest.raises(TuningError, match="stands behind it: it would never learn"):
            freeze(model, "grafts_only")
    model = img2vid.convert(small_vit(), num_frames=4, grafts=[over_space(spec)])
    freeze(model, "grafts_only")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == planted(model).keys()


@every_graft
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_reach_all_of_it(spec, checkpointed):
    model = push(img2vid.convert(small_vit(), num_frames=4, grafts=[spec]), 0.02).train()
    freeze(model, "grafts_only")
    if checkpointed:
        model.set_grad_checkpointing()
    objective = torch.randn(48, generator=torch.Generator().manual_seed(2))
    (model(clips(model=model), **vectors(model)) * objective).sum().backward()
    arrived = collections.Counter()
    for name, p in planted(model).items():  # which experts are asked is a matter of the clip
        arrived[re.sub(r"zero_experts\.\d+", "zero_experts", name)] += float(p.grad.abs().sum())
    assert min(arrived.values()) > 0


DESIGNS = {
    "shared": {"prefix_mode": "shared"},
    "global": {"prefix_mode": "global"},
    "joint": {"attention": "joint_space_time"},
    "encoder": {"attention": "factorised_encoder"},
    "space": {"attention": "space_only"},
    "tubelets": {"tubelet_size": 2},
    "tanh": {"gate": "tanh", "temporal_layers": "last:2"},
    "frozen in time": {"prefix_mode": "global", "quirks": ["block_input_residual", "prefix_in_time"]},
    "timesformer": {"prefix_mode": "shared", "quirks": ["drop_path_before_gate"]},
    "mean before norm": {"attention": "space_only", "quirks": ["mean_before_norm"]},
}


def is_refused(spec, settings):
    """Tokens in the stream, where the clip's class token is computed by itself."""
    return settings.get("prefix_mode") == "global" and spec.get("form") in ("shallow", "deep")


@every_graft
@pytest.mark.parametrize("settings", DESIGNS.values(), ids=DESIGNS)
def test_beside_every_way_of_inserting_time(spec, settings):
    if is_refused(spec, settings):
        with pytest.raises(GraftError, match="cannot be put in here: prefix_mode='global'"):
            img2vid.convert(small_vit(), num_frames=4, grafts=[spec], **settings)
        return
    with_time = settings.get("attention", "divided_space_time") == "divided_space_time"
    spec = spec if with_time else over_space(spec)
    plain = img2vid.convert(small_vit(), num_frames=4, **settings)
    model = img2vid.convert(small_vit(), num_frames=4, grafts=[spec], **settings)
    if is_gated(spec):
        assert keeps(spec, features(model, 4), features(plain, 4))
    certificate = certify(model, small_vit(), num_frames=[1, 2])
    assert certificate.ok
    push(model)
    if settings.get("prefix_mode", "per_frame") != "per_frame":  # one class token a clip, whatever was grafted
        seen = []
        model.tower.blocks[-1][1].register_forward_hook(lambda m, a, out: seen.append(out))
        features(model, 4)
        prefix = seen[0].unflatten(0, (2, 4))[:, :, 0]
        assert torch.equal(prefix, prefix[:, :1].expand_as(prefix))


@every_graft
def test_fused_and_skipped(spec):
    model = push(
        img2vid.convert(
            small_vit(), num_frames=4, grafts=[{**spec, **({"targets": "attn"} if "targets" in spec else {})}]
        )
    )
    expected = features(model)
    torch.testing.assert_close(features(model.fuse()), expected, atol=1e-5, rtol=1e-5)
    model.unfuse()
    assert torch.equal(features(model), expected)
    # frozen at zero, attention along time is left out; what was grafted is not
    for name, p in model.named_parameters():
        if "temporal" in name:
            p.requires_grad_(False)
        if "temporal_fc" in name or "time_embed" in name:
            torch.nn.init.zeros_(p)
    skipped = features(model)
    for block in (block for _, block in model.tower.blocks):
        block.temporal_attn.register_forward_hook(lambda *_: None)  # watched, so computed
    assert torch.equal(features(model), skipped)


@every_graft
def test_half_precision(spec):
    plain = img2vid.convert(small_vit(), num_frames=4, dtype="bfloat16")
    model = img2vid.convert(small_vit(), num_frames=4, grafts=[spec], dtype="bfloat16")
    assert {p.dtype for p in planted(model).values()} == {torch.bfloat16}
    with torch.no_grad():
        found, expected = model(clips(model=model).bfloat16(), **vectors(model)), plain(clips().bfloat16())
        assert keeps(spec, found, expected, 5e-2) == is_gated(spec)


@every_graft
def test_other_image_weights_load_beside_it(spec):
    model = img2vid.convert(small_vit(), num_frames=4, grafts=[spec])
    other = randomize(small_vit(), seed=7)
    # copies of blocks are made anew, as those of attention are
    before = {name: p.clone() for name, p in planted(model).items() if model.origin(name) == "new"}
    model.load_image_weights(other.state_dict())
    assert all(torch.equal(planted(model)[name], p) for name, p in before.items())
    if is_gated(spec):
        assert torch.equal(features(model), features(img2vid.convert(other, num_frames=4)))


@every_graft
def test_it_can_be_gone_back_on(spec):
    """Interpolation scales what starts at zero along: at alpha 0 gated grafts add nothing, whatever is behind them."""
    trained = push(img2vid.convert(small_vit(), num_frames=4, grafts=[spec]))
    there, half, back = (interpolate(small_vit(), trained, alpha) for alpha in (1.0, 0.5, 0.0))
    assert torch.equal(features(there), features(trained))
    assert not torch.allclose(features(half), features(trained), atol=1e-3)
    assert torch.equal(features(back), features(img2vid.convert(small_vit(), num_frames=4))) == is_gated(spec)


@every_graft
def test_its_cost_is_estimated_without_numbers(spec):
    with torch.device("meta"):
        plain, model = (img2vid.convert(small_vit(), num_frames=4, grafts=grafts) for grafts in ([], [spec]))
    with_it, without = measure_on_nothing(model, 2), measure_on_nothing(plain, 2)
    assert with_it.forward_flops > without.forward_flops and with_it.gradient_bytes > without.gradient_bytes


@every_graft
def test_attention_is_drawn_or_refused_with_the_reason(spec):
    model = push(img2vid.convert(small_vit(), num_frames=3, grafts=[spec]))
    if TYPES[spec["type"]].attends:
        with pytest.raises(img2vid.Img2VidError, match="attend to more"):
            attention_maps(model, clips()[:1])
        return
    with model.beside(**vectors(model, 1)):
        maps = attention_maps(model, clips(model=model)[:1])
    assert {m.shape for m in maps.rows().values()} == {(3, 4, 4)}


@in_turn
def test_it_is_part_of_an_exported_program(spec, tmp_path):
    model = push(img2vid.convert(small_vit(), num_frames=4, grafts=[spec]))
    if model.takes_beside:
        with pytest.raises(ExportError, match="takes audio beside clips, and a program has one input"):
            export_program(model, tmp_path / "model.pt2", "torch-export")
        assert export_program(model, tmp_path / "model.safetensors", "safetensors").max_difference == 0.0
        return
    assert export_program(model, tmp_path / "model.pt2", "torch-export").max_difference < 1e-4
    again = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(again(clips(5, model=model)), features(model, 5), atol=1e-4, rtol=1e-4)


@every_graft
def test_exports_refuse_what_they_cannot_say(spec, tmp_path):
    model = push(img2vid.convert(small_vit(), num_frames=4, grafts=[spec], prefix_mode="shared"))
    for format in ("image", "timesformer"):
        with pytest.raises(img2vid.Img2VidError):
            img2vid.export_checkpoint(model, tmp_path / "out.pth", format)
    assert not (tmp_path / "out.pth").exists()


# ---- the contract itself


@pytest.mark.parametrize("trunk_only", [False, True])
def test_what_is_run_twice_stays_what_was_asked_for(trunk_only):
    model = img2vid.convert(small_vit(), num_frames=4)
    model.set_grad_checkpointing(trunk_only=trunk_only)
    before = [type(block) for block in model.blocks]
    graft(model, ["adapter", "st_adapter"])
    remove(model)
    assert [type(block) for block in model.blocks] == before and model.grad_checkpointing


def test_two_of_one_type_need_two_names():
    with pytest.raises(ConfigError, match="Two grafts are called 'lora'"):
        img2vid.convert(small_vit(), grafts=["lora", "lora"])
    model = img2vid.convert(small_vit(), num_frames=4, grafts=["lora", {"type": "lora", "name": "second", "rank": 2}])
    push(model)
    both = features(model)
    remove(model, "lora")
    assert [one.name for one in model.grafts] == ["second"] and not torch.allclose(features(model), both)
    with pytest.raises(ConfigError, match="Two grafts are called 'second'"):
        graft(model, [{"type": "lora", "name": "second"}])
    with pytest.raises(GraftError, match="no graft called 'lora'; it has second"):
        fold(model, "lora")


@pytest.mark.parametrize("given", ["lora", {"type": "lora"}, read_graft("lora"), None, 3], ids=str)
def test_one_graft_is_no_list_of_grafts(given):
    model = img2vid.convert(small_vit())
    with pytest.raises(ConfigError, match="expected a list of grafts, such as"):
        graft(model, given)
    assert not model.grafts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "lra"}, "no graft of type 'lra'. Did you mean 'lora'"),
        ({"rank": 8}, "options by name, such as"),
        ({"type": "lora", "rnk": 8}, "no option 'rnk'. Did you mean 'rank'"),
        ({"type": "lora", "rank": 0}, "rank=0: expected a whole number of at least 1"),
        ({"type": "lora", "dropout": 1.0}, "dropout=1.0: expected a number of at least 0 and below 1"),
        ({"type": "lora", "name": "fc"}, "name='fc' of a graft"),
        ({"type": "lora", "targets": ["atn"]}, "nothing here is called 'atn'. Did you mean 'attn'"),
        ({"type": "lora", "targets": ["blocks.9.*"]}, "by path, blocks.0.attn.qkv"),
        ({"type": "lora", "layers": [7]}, "layers=.7.: expected block numbers from 0 to 2"),
        ({"type": "lora", "rank": 100}, "rank=100: blocks.0.attn.qkv is 144 x 48"),
        (7, "options by name, such as"),
    ],
)
def test_bad_grafts_are_explained(given, message):
    with pytest.raises(img2vid.Img2VidError, match=message):
        img2vid.convert(small_vit(), grafts=[given])
    model = img2vid.convert(small_vit())
    with pytest.raises(img2vid.Img2VidError, match=message):
        graft(model, [given])
    assert not planted(model) and model.config.grafts == ()


@pytest.mark.parametrize("kind", ["aim", "st_adapter"])
def test_no_graft_looks_ahead_of_a_causal_model(kind):
    with pytest.raises(GraftError, match="looks both ways"):
        img2vid.convert(small_vit(), causal=True, grafts=[kind])
    model = img2vid.convert(small_vit(), attention="space_only", grafts=[kind])
    with pytest.raises(StreamError, match="through " + kind):
        model.eval().stream()
    remove(model)
    assert model.stream()(torch.zeros(1, 3, 32, 32)).clip.shape == (1, 48)


def test_every_type_answers_the_six_questions():
    for kind, cls in TYPES.items():
        assert kind == cls.type
        assert all(isinstance(getattr(cls, answer), str) for answer in ("where", "new", "gate", "identity", "folds"))
        assert kind in {spec["type"] for spec in GRAFTS.values()}, f"{kind} is not in GRAFTS above"


def test_wrong_grafts_are_told_before_a_backbone_is_loaded(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a backbone was loaded")

    monkeypatch.setattr("img2vid.backbones.load_backbone", never)
    with pytest.raises(ConfigError, match="no graft of type"):
        img2vid.convert("vit_base", grafts=[{"type": "nothing"}])


# ---- the command line, and training


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "nano"
    img2vid.convert("nano_clip", num_frames=4).save_pretrained(folder)
    return folder


@every_graft
def test_the_command_grafts_certifies_and_takes_off(spec, saved, tmp_path, capsys):
    words = [f"{key}={json.dumps(value)}" for key, value in spec.items() if key != "type"]
    given = ["graft", str(saved), "--graft", spec["type"], *words, "--certify-frames", "1", "2"]
    assert cli([*given, "--out", str(tmp_path / "grafted")]) == 0
    shown = capsys.readouterr().out
    assert f"{read_graft(spec).name}: " in shown and "Result" in shown
    assert read_graft(img2vid.load(tmp_path / "grafted").config.grafts[0]) == read_graft(spec)
    given = ["graft", str(tmp_path / "grafted"), "--remove", "--certify-frames", "1"]
    assert cli([*given, "--out", str(tmp_path / "bare")]) == 0
    assert torch.equal(features(img2vid.load(tmp_path / "bare")), features(img2vid.load(saved)))


def test_the_command_folds_and_speaks_peft(saved, tmp_path, capsys):
    base, folder = ["--certify-frames", "1"], str(tmp_path / "lora")
    model = push(graft(img2vid.load(saved), [{"type": "lora", "targets": ["attn.qkv"]}]))
    model.save_pretrained(folder)
    assert cli(["graft", folder, "--adapter-out", str(tmp_path / "adapter")]) == 0
    assert (
        cli(["graft", str(saved), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "again"), *base]) == 0
    )
    again = img2vid.load(tmp_path / "again")
    for key, p in planted(model).items():
        assert torch.equal(again.state_dict()[key], p)
    assert cli(["graft", folder, "--fold", "--out", str(tmp_path / "folded"), *base]) == 0
    folded = img2vid.load(tmp_path / "folded")
    assert not planted(folded)
    torch.testing.assert_close(features(folded), features(model), atol=1e-5, rtol=1e-5)
    given = ["graft", str(saved), "--adapter", str(tmp_path / "adapter"), "--adapter-name", "theirs", "--fold"]
    assert cli([*given, "--out", str(tmp_path / "merged"), *base]) == 0  # read, and folded at once
    merged = img2vid.load(tmp_path / "merged")
    assert not planted(merged) and merged.config.grafts == ()
    torch.testing.assert_close(features(merged), features(again), atol=1e-5, rtol=1e-5)
    for what in ("--fold", "--remove"):
        assert cli(["graft", str(saved), what, "--out", str(tmp_path / "no")]) == 2
        assert "no grafts to fold or to take off" in capsys.readouterr().err
    assert cli(["graft", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(kind in shown for kind in TYPES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "No model folder was given"),
        (["nowhere", "--graft", "lora"], "Nowhere to write to"),
        (["nowhere", "--out", "x"], "Nothing to do"),
        (["nowhere", "--out", "x", "--graft", "lra"], "Did you mean 'lora'"),
        (["nowhere", "--out", "x", "--graft", "lora", "rank=x"], "rank='x'"),
    ],
    ids=str,
)
def test_the_command_says_what_is_wrong(words, message, capsys):
    assert cli(["graft", *words]) == 2
    assert message in capsys.readouterr().err


def test_options_of_a_graft_are_given_by_name(capsys):
    with pytest.raises(SystemExit):
        cli(["graft", "folder", "--graft", "lora", "8"])
    assert "expected OPTION=VALUE, such as rank=8" in capsys.readouterr().err


@in_turn
def test_resumed_training_is_the_unbroken_one(spec, motion_set, tmp_path):
    def start(**options):
        video = VideoConfig("nano_clip", num_frames=2, grafts=(over_space(spec),))
        how = Tuning(lr=1e-2, warmup=0, freeze="grafts_only")
        return VideoTraining(video, Classification("text"), how, save_to=str(tmp_path / "model"), **options)

    keep = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    unbroken = start()
    before = {name: p.clone() for name, p in unbroken.model.named_parameters()}
    fit(unbroken, motion_set, [keep], enable_checkpointing=True)
    moved = {name for name, p in unbroken.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == planted(unbroken.model).keys()
    resumed = start()
    fit(resumed, motion_set, ckpt_path=tmp_path / "step=2.ckpt")
    for name, p in unbroken.model.named_parameters():
        assert torch.equal(p, dict(resumed.model.named_parameters())[name])
    assert torch.equal(features(img2vid.load(tmp_path / "model"), 2), features(unbroken.model.eval(), 2))


def test_yaml_names_grafts(motion_set):
    import yaml

    text = "backbone: nano_clip\nnum_frames: 2\ngrafts:\n  - {type: lora, rank: 2, targets: [attn, mlp]}\n"
    model = img2vid.convert(**yaml.safe_load(text))
    assert read_graft(model.config.grafts[0]).targets == ("attn", "mlp")


@pytest.mark.parametrize("name", [name for name, spec in GRAFTS.items() if not TYPES[spec["type"]].mixes_frames])
@torch.no_grad()
def test_frames_shown_one_at_a_time_are_those_of_the_clip(name):
    """On a tower whose attention reads its weights. What mixes frames is refused, as tested above."""
    model = push(img2vid.convert(small_clip(), num_frames=4, causal=True, grafts=[GRAFTS[name]]))
    video = tower_of(model)
    shown = clips(3, model=model)
    with video.beside(**vectors(video)):
        whole, stream = first(video.frame_features(shown)), video.stream()
        for t in range(3):
            torch.testing.assert_close(stream(shown[:, t]).frame, whole[:, t], atol=1e-4, rtol=1e-4)
