"""Stitched backbones: assembled, fitted, measured, saved, and made video models."""

import json

import pytest
import torch
import yaml
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image

import img2vid
from img2vid.backbones import load_backbone
from img2vid.backbones.stitched import assemble, load_parts, read_parts
from img2vid.certificate import certify
from img2vid.cli import main as cli
from img2vid.junctions import accuracy, halves, rank_by_accuracy, search
from img2vid.stitching import StitchError, fit_linear, linear_cka, prepared, stitch, tokens_at
from tests.test_nano_clip import held_out_pictures

TINY = {"backbone": "timm:vit_tiny_patch16_224", "arguments": {"img_size": 32, "patch_size": 4, "depth": 4}}
EVA = {"backbone": "timm:eva02_tiny_patch14_224", "arguments": {"img_size": 28, "patch_size": 14, "depth": 3}}
REGISTERS = {"backbone": "timm:vit_small_patch14_reg4_dinov2", "arguments": {"img_size": 28, "depth": 3}}


def recipe(*layers, **options):
    kinds = [{"backbone": "nano_clip"}, TINY, {"backbone": "nano_clip"}]
    return [{**kind, "layers": two, **options} for kind, two in zip(kinds, layers, strict=False)]


def loaded(*layers, **options):
    parts = read_parts(recipe(*layers, **options))
    torch.manual_seed(0)
    return parts, load_parts(parts, None, random_weights=True)


@pytest.fixture
def images():
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def image_features(backbone, images):
    with torch.no_grad():
        return backbone.tower.call(backbone.tower.module, prepared(backbone.tower, images))


def naive_cka(x, y):
    """HSIC of centred Gram matrices, as in the paper's equations (2) and (4)."""
    n = len(x)
    centre = torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1 / n, dtype=torch.float64)

    def hsic(a, b):
        return torch.trace(a @ a.T @ centre @ (b @ b.T) @ centre) / (n - 1) ** 2

    return float(hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt())


def test_cka_is_that_of_gram_matrices_and_sees_no_rotation():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, d, generator=generator, dtype=torch.float64) + 3 for d in (5, 9))
    assert linear_cka(x, y) == pytest.approx(naive_cka(x, y), abs=1e-12)
    mixed = y + x @ torch.randn(5, 9, generator=generator, dtype=torch.float64)
    assert linear_cka(x, mixed) == pytest.approx(naive_cka(x, mixed), abs=1e-12)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    assert linear_cka(x, 7 * x @ rotation + 1) == pytest.approx(1.0)
    assert linear_cka(x, y) < 0.5 < linear_cka(x, mixed)


def test_all_parts_of_one_model_are_that_model(images):
    whole = load_backbone("nano_clip")
    parts = read_parts([{"backbone": "nano_clip", "layers": two} for two in ([0, 1], [1, 3], [3, 4])])
    stitched, junctions = stitch(parts, load_parts(parts, None), images)
    assert torch.equal(image_features(stitched, images), image_features(whole, images))
    assert [(j.at, j.bridge, round(j.bridged, 6), j.error) for j in junctions] == [(1, "none", 1, 0), (3, "none", 1, 0)]
    assert stitched.model.state_dict().keys() == whole.model.state_dict().keys()


def test_parts_of_another_class_and_width_are_run_one_after_the_other(images):
    parts, natives = loaded([0, 2], [1, 3], [2, 4])
    stitched = assemble(parts, natives)
    nano, tiny = natives[0].tower, natives[1].tower
    for _, block in stitched.tower.blocks:
        if hasattr(block, "bridge"):
            torch.nn.init.normal_(block.bridge.weight, std=0.05)
    bridges = [block.bridge for _, block in stitched.tower.blocks if hasattr(block, "bridge")]
    x = tokens_at(nano, 0, images).float().unflatten(0, (8, -1))
    with torch.no_grad():
        for block in (nano.blocks[0][1], nano.blocks[1][1]):
            x = block(x)
        x = F.linear(x, bridges[0].weight, bridges[0].bias)
        for block in (tiny.blocks[1][1], tiny.blocks[2][1]):
            x = block(x)
        x = F.linear(x, bridges[1].weight, bridges[1].bias)
        for block in (nano.blocks[2][1], nano.blocks[3][1]):
            x = block(x)
    torch.testing.assert_close(tokens_at(stitched.tower, 6, images).float(), x.flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert stitched.model.encode_text(torch.ones(1, 32, dtype=torch.long)).shape == (1, 64)


def test_bridges_are_the_least_squares_fit_and_never_hurt(images):
    parts, natives = loaded([0, 2], [1, 3])
    untrained, unmeasured = stitch(parts, natives, None)
    assert [j.bridge for j in unmeasured] == ["untrained", "untrained"] and unmeasured[0].arriving is None
    fitted, junctions = stitch(parts, natives, images)
    assert [j.bridge for j in junctions] == ["fitted", "fitted"]
    assert all(j.bridged >= j.arriving - 0.05 and 0 <= j.error < 1 for j in junctions)
    x, y = tokens_at(natives[0].tower, 2, images), tokens_at(natives[1].tower, 1, images)
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.pinv(ones) @ y
    bridge = fitted.tower.blocks[1][1].bridge
    torch.testing.assert_close(bridge.weight.T.double(), expected[:-1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(bridge.bias.double(), expected[-1], atol=1e-5, rtol=1e-4)
    assert not torch.equal(untrained.tower.blocks[1][1].bridge.weight, bridge.weight)
    with pytest.raises(StitchError, match="too few to fit a bridge of 96"):
        fit_linear(bridge, x[:96], y[:96])


def test_a_linear_bridge_can_be_asked_for(images):
    parts = read_parts([{"backbone": "nano_clip", "layers": [0, 2]},
                        {"backbone": "nano_clip", "layers": [3, 4], "bridge": "linear"}])  # fmt: skip
    stitched, (junction,) = stitch(parts, load_parts(parts, None), images)
    assert junction.bridge == "fitted" and junction.bridged > junction.arriving and junction.error < 0.5
    assert stitched.tower.blocks[1][1].bridge.weight.shape == (96, 96)


def open_parts(*kinds):
    parts = read_parts([{**kind, "layers": [0, 1]} for kind in kinds])
    return parts, load_parts(parts, None)


NANO = {"backbone": "nano_clip"}
OPEN = [(0, "auto"), ("auto", 4)]


def test_the_search_finds_a_model_in_itself_and_ranks(images):
    parts, nanos = open_parts(NANO, NANO)
    same = search(parts, nanos, OPEN, images, depth=4)
    assert len(same) == 3 and all(one.layers[0][1] == one.layers[1][0] for one in same)
    assert same[0].cka == pytest.approx(1.0) and same[0].accuracy is None
    every = search(parts, nanos, OPEN, images)
    assert len(every) == 9 and all(one.layers[0][1] == one.layers[1][0] for one in every[:3])
    assert [c.cka for c in every] == sorted((c.cka for c in every), reverse=True)
    by_hand = linear_cka(tokens_at(nanos[0].tower, 1, images), tokens_at(nanos[1].tower, 3, images))
    assert next(c for c in every if c.layers == ((0, 1), (3, 4))).cka == pytest.approx(by_hand, abs=1e-6)
    with pytest.raises(StitchError, match="depth=9: models of 4, 4 blocks have no such parts"):
        search(parts, nanos, OPEN, images, depth=9)


def test_several_junctions_are_searched_together_by_the_weakest(images):
    parts, nanos = open_parts(NANO, NANO, NANO)
    every = search(parts, nanos, [(0, "auto"), ("auto", "auto"), ("auto", 4)], images)
    assert len(every) == 27 and all(len(one.ckas) == 2 and one.cka == min(one.ckas) for one in every)
    assert all(first < end for one in every for first, end in one.layers)
    assert every[0].layers in {((0, 1), (1, 2), (2, 4)), ((0, 1), (1, 3), (3, 4)), ((0, 2), (2, 3), (3, 4))}
    assert [one.cka for one in every] == sorted((one.cka for one in every), reverse=True)
    half = search(parts, nanos, [(0, 2), ("auto", 3), (3, 4)], images)  # some places given
    assert {one.layers for one in half} == {((0, 2), (1, 3), (3, 4)), ((0, 2), (2, 3), (3, 4))}
    with pytest.raises(StitchError, match="have no such parts"):
        search(parts, nanos, [(0, 2), ("auto", 9), (3, 4)], images)


def classes_of_digits(per_class=4):
    """Pictures of five digits: (V, 1, 3, H, W) from 0 to 1, and what they are."""
    pictures, drawn = held_out_pictures(("plain",), seed=3)
    rows = [row for label in range(5) for row in (drawn == label).nonzero().flatten()[:per_class].tolist()]
    clips = torch.from_numpy(pictures[rows]).movedim(-1, 1).float().unsqueeze(1) / 255
    return clips, drawn[rows].tolist()


def test_accuracy_is_that_of_the_nearest_class_mean_of_held_out_videos():
    clips, labels = classes_of_digits()
    fitted, held_out = halves(labels)
    assert not set(fitted) & set(held_out) and sorted(fitted + held_out) == list(range(20))
    assert [labels[row] for row in fitted] == [labels[row] for row in held_out] == [n for n in range(5) for _ in "ab"]
    nano = load_backbone("nano_clip")
    features = image_features(nano, clips.flatten(0, 1)).double()
    features = F.normalize(features - features[fitted].mean(0), dim=-1)
    right = 0
    for row in held_out:
        cosines = {}
        for label in range(5):
            mean = sum(features[other] for other in fitted if labels[other] == label)
            cosines[label] = float(features[row] @ mean / mean.norm())
        right += max(cosines, key=cosines.get) == labels[row]
    assert accuracy(nano, clips, labels, fitted, held_out) == pytest.approx(right / 10)
    assert right >= 8  # nano_clip knows digits
    torch.nn.init.zeros_(nano.model.visual.proj)
    assert accuracy(nano, clips, labels, fitted, held_out) == pytest.approx(0.2)  # all alike: one class of five


def test_ranked_by_accuracy_a_whole_model_beats_one_with_blocks_left_out():
    clips, labels = classes_of_digits()
    parts, nanos = open_parts(NANO, NANO)
    every = search(parts, nanos, OPEN, clips.flatten(0, 1))
    ranked = rank_by_accuracy([*every[:1], *every[-2:]], parts, nanos, clips, labels)
    assert [one.accuracy for one in ranked] == sorted((one.accuracy for one in ranked), reverse=True)
    assert ranked[0].layers == every[0].layers and ranked[0].accuracy >= 0.8 > ranked[-1].accuracy
    fitted, held_out = halves(labels)
    assert ranked[0].accuracy == accuracy(nanos[0], clips, labels, fitted, held_out)  # it is nano_clip itself


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 0, 1], "class 1 has one"), ([0, 0, 0, 0], "all are of one class")]
)
def test_too_few_videos_to_rank_by_accuracy(labels, message):
    with pytest.raises(StitchError, match=message):
        halves(labels)


COARSE = {**TINY, "arguments": {"img_size": 32, "patch_size": 8, "depth": 4}}  # 4 x 4 patches beside 8 x 8


def test_parts_of_another_grid_run_on_the_first_ones(images):
    parts = read_parts([{**NANO, "layers": [0, 2]}, {**COARSE, "layers": [1, 3]}, {**NANO, "layers": [2, 4]}])
    torch.manual_seed(0)
    natives = load_parts(parts, None, random_weights=True)
    stitched, junctions = stitch(parts, natives, images)
    assert tokens_at(stitched.tower, 3, images).shape == (8 * 65, 192)  # on the first part's grid, between bridges
    assert [one.bridge for one in junctions] == ["fitted", "fitted"] and all(0 <= one.error < 1 for one in junctions)
    # what the coarse model knows there, by hand: its class token, and its 4 x 4 patches drawn on 8 x 8
    known = tokens_at(natives[1].tower, 1, images).unflatten(0, (8, 17))
    grid = F.interpolate(known[:, 1:].transpose(1, 2).reshape(8, 192, 4, 4), size=(8, 8), mode="bilinear")
    expected = torch.cat([known[:, :1], grid.flatten(2).transpose(1, 2)], dim=1).flatten(0, 1)
    found = tokens_at(natives[1].tower, 1, images, like=natives[0].tower)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    x = tokens_at(natives[0].tower, 2, images)
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    bridge = stitched.tower.blocks[1][1].bridge
    torch.testing.assert_close(
        bridge.weight.T.double(), (torch.linalg.pinv(ones) @ expected)[:-1], atol=1e-4, rtol=1e-3
    )
    ranked = search(parts[:2], natives[:2], OPEN, images)
    assert len(ranked) == 9 and all(0 <= one.cka <= 1 for one in ranked)
    video = img2vid.convert(
        "stitched", random_weights=True, num_frames=2, backbone_args={"parts": [part.to_dict() for part in parts]}
    )
    assert certify(video, num_frames=[1, 2]).ok


@pytest.mark.parametrize("parts", [
    recipe([0, 2], [1, 3]),
    [{**TINY, "layers": [0, 2]}, {"backbone": "nano_clip", "layers": [1, 4]}],
    [{**EVA, "layers": [0, 2]}, {**EVA, "layers": [1, 3], "bridge": "linear"}],
], ids=["clip", "vit", "eva"])  # fmt: skip
@pytest.mark.parametrize("settings", [{}, {"prefix_mode": "shared"},
                                      {"attention": "joint_space_time", "prefix_mode": "shared"},
                                      {"grafts": ["lora", "adapter"]}], ids=str)  # fmt: skip
def test_time_is_inserted_as_in_any_backbone(parts, settings, tmp_path):
    arguments = {"parts": parts}
    model = img2vid.convert("stitched", random_weights=True, backbone_args=arguments, num_frames=4, **settings)
    assert certify(model, num_frames=[1, 2]).ok
    model.save_pretrained(tmp_path / "model")
    again = img2vid.load(tmp_path / "model")
    size = getattr(model, "visual", model).tower.image_size
    clips = torch.randn(1, 2, 3, *size, generator=torch.Generator().manual_seed(0))
    run = [m.encode_video if hasattr(m, "encode_video") else m for m in (model, again)]
    assert torch.equal(run[0](clips), run[1](clips))
    features = run[0](clips)
    (features * torch.randn(features.shape)).sum().backward()
    bridges = [p for name, p in model.named_parameters() if ".bridge.weight" in name]
    assert bridges and all(p.grad.abs().sum() > 0 for p in bridges) and features.isfinite().all()


def write(path, **given):
    path.write_text(yaml.safe_dump(given))
    return str(path)


def test_the_command_fits_chooses_saves_and_the_folder_is_a_backbone(motion_set, tmp_path, capsys):
    given = write(tmp_path / "auto.yaml", depth=4, parts=[
        {"backbone": "nano_clip", "layers": [0, "auto"]}, {"backbone": "nano_clip", "layers": ["auto", 4]}
    ])  # fmt: skip
    folder = tmp_path / "stitched"
    calibrate = ["--calibrate", str(motion_set / "train.csv"), "--max-videos", "4", "--out", str(folder)]
    assert cli(["stitch", given, *calibrate]) == 0
    shown = capsys.readouterr().out
    assert (
        "Of 3 ways to go over" in shown
        and "is the most alike" in shown
        and "Junctions" in shown
        and "none of the models it is made of" in shown
    )
    recipe = json.loads((folder / "stitched.json").read_text())
    assert recipe["guarantee"].startswith("none") and len(recipe["candidates"]) == 3
    assert recipe["junctions"][0]["arriving"] == pytest.approx(1.0)
    options = ["--num-frames", "2", "--certify-frames", "1", "2", "--out", str(tmp_path / "video")]
    assert cli(["convert", "--backbone", f"stitched:{folder}", *options]) == 0
    video, plain = img2vid.load(tmp_path / "video"), img2vid.convert("nano_clip", num_frames=2)
    clips = torch.randn(1, 2, 3, 32, 32)
    assert torch.equal(video.encode_video(clips), plain.encode_video(clips))  # the search found nano_clip itself
    assert torch.equal(video.tokenize("a photo of the digit two"), plain.tokenize("a photo of the digit two"))
    assert "nano_clip [0:" in (tmp_path / "video" / "README.md").read_text()


def test_untrained_is_said_and_cannot_be_taken_for_fitted(tmp_path, capsys):
    parts = [
        {"backbone": "nano_clip", "layers": [0, 2]},
        {"backbone": "nano_clip", "layers": [1, 4], "bridge": "linear"},
    ]
    given = write(tmp_path / "r.yaml", parts=parts)
    assert cli(["stitch", given, "--untrained", "--out", str(tmp_path / "out")]) == 0
    assert "untrained" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "stitched.json").read_text())["junctions"][0]["bridge"] == "untrained"
    with pytest.raises(img2vid.Img2VidError, match="bridges of this recipe have no weights"):
        img2vid.convert("stitched", backbone_args={"parts": parts})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "expected a list of parts"),
        ([{"backbone": "nano_clip"}], "needs a backbone and layers"),
        ([{"backbone": "nano_clip", "layers": [2, 2]}], "expected .first, end."),
        ([{"backbone": "nano_clip", "layers": [0, 2], "brige": "linear"}], "Did you mean 'bridge'"),
        ([{"backbone": "nano_clip", "layers": [0, 7]}], "it has 4 blocks, 0 to 3"),
        ([{"backbone": "nano_clip", "layers": [0, 2]}, {**REGISTERS, "layers": [0, 2]}], "has 5 prefix tokens"),
        ([{**EVA, "layers": [0, 2]}, {**EVA, "arguments": {**EVA["arguments"], "img_size": 56}, "layers": [0, 2]}],
         "4 x 4 patches, the first part's 2 x 2: blocks that are told positions"),
        ([{**TINY, "arguments": {"img_size": 28, "patch_size": 14}, "layers": [0, 2]}, {**EVA, "layers": [0, 2]}],
         "go with their own kind only"),
    ],
)  # fmt: skip
def test_bad_recipes_are_explained(parts, message):
    with pytest.raises(img2vid.Img2VidError, match=message):
        img2vid.convert("stitched", random_weights=True, backbone_args={"parts": parts})


@pytest.mark.parametrize(
    ("given", "words", "message"),
    [
        ({"parts": [{"backbone": "nano_clip", "layers": [0, 4]}]}, [], "Nothing to fit and measure on"),
        ({"parts": [{"backbone": "nano_clip", "layers": [0, 4]}], "image_size": "big"}, ["--untrained"],
         "image_size='big'"),
        ({"party": []}, ["--untrained"], "expected a recipe of parts, image_size, depth"),
        ({"parts": [{"backbone": "nano_clip", "layers": [0, "auto"]}]}, ["--untrained"], "is chosen between parts"),
        ({"parts": [{"backbone": "nano_clip", "layers": two} for two in ([0, "auto"], ["auto", 4])]}, ["--untrained"],
         "compares the models on videos"),
        ({"parts": [{"backbone": "nano_clip", "layers": [0, 4]}]}, ["--calibrate", "nowhere.csv"], "no such file"),
    ],
)  # fmt: skip
def test_the_command_says_what_is_wrong(given, words, message, tmp_path, capsys):
    assert cli(["stitch", write(tmp_path / "r.yaml", **given), *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_ranks_by_what_held_out_pictures_are_taken_for(tmp_path, capsys):
    clips, labels = classes_of_digits()
    (tmp_path / "pictures").mkdir()
    rows = ["path,label"]
    for i, (clip, label) in enumerate(zip(clips, labels, strict=True)):
        to_pil_image(clip[0]).save(tmp_path / "pictures" / f"{i}.png")
        rows.append(f"pictures/{i}.png,digit {label}")
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    places = [[0, "auto"], ["auto", "auto"], ["auto", 4]]
    given = write(tmp_path / "r.yaml", depth=4, parts=[{"backbone": "nano_clip", "layers": two} for two in places])
    words = ["--calibrate", str(tmp_path / "list.csv"), "--num-frames", "1", "--rank", "accuracy", "--top", "2"]
    assert cli(["stitch", given, *words, "--out", str(tmp_path / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "tells most apart: it names" in shown and "named right" in shown
    recipe = json.loads((tmp_path / "out" / "stitched.json").read_text())
    assert len(recipe["parts"]) == 3 and len(recipe["candidates"]) == 2
    best, other = recipe["candidates"]
    assert best["accuracy"] >= max(other["accuracy"], 0.8)
    assert [part["layers"] for part in recipe["parts"]] == best["layers"]


@pytest.mark.parametrize(
    ("layers", "words", "message"),
    [
        ([[0, 2], [2, 4]], ["--rank", "accuracy"], "this recipe leaves none"),
        ([[0, "auto"], ["auto", 4]], ["--top", "0"], "--top 0: expected at least 1"),
        ([[0, "auto"], ["auto", "auto"]], [], "where the first begins and the last ends is a number"),
        ([[0, "auto"], ["outo", 4]], [], "a junction is chosen between parts"),
    ],
)
def test_the_command_says_what_is_wrong_with_a_choice(layers, words, message, tmp_path, capsys):
    given = write(tmp_path / "r.yaml", parts=[{"backbone": "nano_clip", "layers": two} for two in layers])
    words = ["--calibrate", "nowhere.csv", *words, "--out", str(tmp_path / "out")]
    assert cli(["stitch", given, *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()


def test_videos_without_labels_cannot_rank_by_accuracy(tmp_path, capsys):
    clips, _ = classes_of_digits(2)
    for i, clip in enumerate(clips):
        to_pil_image(clip[0]).save(tmp_path / f"{i}.png")
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"{i}.png\n" for i in range(len(clips))))
    parts = [{"backbone": "nano_clip", "layers": two} for two in ([0, "auto"], ["auto", 4])]
    words = ["--calibrate", str(tmp_path / "list.csv"), "--rank", "accuracy", "--out", str(tmp_path / "out")]
    assert cli(["stitch", write(tmp_path / "r.yaml", parts=parts), *words]) == 2
    assert "needs a label for each video" in capsys.readouterr().err
