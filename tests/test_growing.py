"""Deeper and wider models compute what the smaller one does, and their new parts learn."""

import pytest
import torch

import img2vid
from img2vid.certificate import certify
from img2vid.cli import main as cli
from img2vid.growing import GrowthError, Widening, grow, spread
from tests.conftest import randomize, small_vit

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
TOWERS = {
    "vit": ("timm:vit_tiny_patch16_224", {}),
    "layer scale, registers": ("timm:vit_small_patch14_reg4_dinov2", {}),
    "eva": ("timm:eva02_tiny_patch14_224", {"mlp_ratio": 2.0}),
    "beit": ("timm:beit_base_patch16_224", {}),
    "swiglu": ("timm:vit_giant_patch14_dinov2", {}),
}


def make(name="vit", **settings):
    backbone, more = TOWERS[name]
    given = {"num_frames": 3, "random_weights": True, "backbone_args": {**SHAPE, **more}}
    model = randomize(img2vid.convert(backbone, **{**given, **settings}), std=0.1)
    return model.eval()


def clips(num_frames=3):
    return torch.randn(2, num_frames, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_deeper_is_bitwise_the_same(name):
    model = make(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    grown, growth = grow(model, depth=5)
    assert growth.held and growth.difference == 0.0 and len(grown.tower.blocks) == 5
    assert torch.equal(grown(clips()), model(clips()))
    assert torch.equal(grown(clips(1)), model(clips(1)))
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", ["vit", "layer scale, registers", "eva", "beit", "swiglu"])
@torch.no_grad()
def test_wider_is_the_same_up_to_rounding(name):
    model = make(name)
    ratio = 6 if name != "eva" else 4
    grown, growth = grow(model, mlp_ratio=ratio)
    assert growth.hidden[1] > growth.hidden[0]
    expected = model(clips())
    assert growth.held and (grown(clips()) - expected).abs().max() < 1e-5 * expected.abs().max()
    # and no accident: with shares that do not sum to one it is another function
    for block in (block for _, block in grown.tower.blocks):
        block.mlp.fc2.weight[:, growth.hidden[0] :] *= 0.5
    assert (grown(clips()) - expected).abs().max() > 1e-2 * expected.abs().max()


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
    assert "3 blocks and 1 identities behind them, MLPs of 192 -> 288" in capsys.readouterr().out.replace("\n", " ")
    assert len(img2vid.load(tmp_path / "large").tower.blocks) == 4
    assert cli(given) == 2
    assert "Nothing to grow" in capsys.readouterr().err
    assert cli([*given, "--depth", "2"]) == 2
    assert "depth=2: expected a whole number of at least 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "asked", "message"),
    [
        (lambda: img2vid.convert(small_vit()), {"depth": 4}, "passed in by hand cannot be grown"),
        (lambda: img2vid.convert("nano_clip"), {"depth": 5}, "which timm's factories take"),
        (lambda: make(grafts=["lora"]), {"depth": 4}, "with grafts cannot be grown"),
        (lambda: make(), {"mlp_ratio": 2}, "MLPs are 192 wide already"),
        (lambda: make(backbone_args={**SHAPE, "scale_mlp_norm": True}), {"mlp_ratio": 6}, "norm over hidden units"),
    ],
)
def test_what_cannot_be_grown_is_refused(model, asked, message):
    with pytest.raises(GrowthError, match=message):
        grow(model(), **asked)
