"""Transforms: alike over a clip, repeatable from a seed, and equal to the plain formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from img2vid.data.clipwide import ClipColorJitter, ClipRandAugment
from img2vid.data.transforms import InputSpec, MixClips, Normalise, TestTransform, TrainTransform

SPEC = InputSpec(size=32, mean=(0.48, 0.45, 0.40), std=(0.26, 0.25, 0.27))


def noise(frames=4, height=60, width=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    thwc = torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)
    return thwc.permute(0, 3, 1, 2)


def still(frames=5):
    return noise(1).expand(frames, -1, -1, -1)


EVERYTHING = dict(rand_augment=(2, 9), color_jitter=0.4, erase=1.0)


@pytest.mark.parametrize("options", [{}, {"rand_augment": (3, 15)}, {"color_jitter": 0.5}, {"erase": 1.0}, EVERYTHING])
def test_all_frames_of_a_clip_are_treated_alike(options):
    """A still clip stays still, whatever is drawn; and something is drawn."""
    augment, outputs = TrainTransform(SPEC, **options), []
    for seed in range(12):
        out = augment(still(), seed)
        assert out.shape == (5, 3, 32, 32) and out.dtype == torch.uint8
        assert all(torch.equal(out[0], frame) for frame in out)
        outputs.append(out[0])
    assert len({tuple(out.flatten().tolist()) for out in outputs}) == 12


def one_operation(name):
    augment = ClipRandAugment(1, 14)
    augment._AUGMENTATION_SPACE = {name: v2.RandAugment._AUGMENTATION_SPACE[name]}
    return augment


COLOURS = ["Brightness", "Contrast", "Posterize", "Solarize", "AutoContrast", "Equalize"]


@pytest.mark.parametrize("change", [*map(one_operation, COLOURS), ClipColorJitter(contrast=(0.3, 0.3))])
def test_one_mapping_of_colours_serves_all_frames(change):
    """A clip that fades to black: what was one colour of a channel in two frames is one colour afterwards."""
    fading = torch.stack([noise(1)[0] // (k + 2) + 20 for k in range(4)])  # AutoContrast has something to stretch
    torch.manual_seed(0)
    out = change(fading)
    assert out.shape == fading.shape and not torch.equal(out, fading)
    for channel in range(3):
        pairs = torch.stack([fading[:, channel].flatten(), out[:, channel].flatten()])
        assert torch.unique(pairs, dim=1).shape[1] == torch.unique(pairs[0]).numel()
    means = out.float().mean((1, 2, 3))
    assert (means.diff() * means.diff()[0]).min() > 0  # it still fades (or, turned into its negative, brightens)


@pytest.mark.parametrize("name", sorted(set(v2.RandAugment._AUGMENTATION_SPACE)))
def test_operations_on_one_frame_are_torchvisions(name):
    for seed in range(3):
        torch.manual_seed(seed)
        own = one_operation(name)(noise(1))
        theirs = v2.RandAugment(1, 14)
        theirs._AUGMENTATION_SPACE = {name: v2.RandAugment._AUGMENTATION_SPACE[name]}
        torch.manual_seed(seed)
        assert torch.equal(own, theirs(noise(1)))


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 3, 200), (2, 200, 3), (1, 31, 33), (3, 2, 2)], ids=str)
def test_clips_of_any_size(size):
    clip, before = noise(*size), noise(*size)
    assert TrainTransform(SPEC, **EVERYTHING)(clip, 3).shape == (size[0], 3, 32, 32)
    assert TestTransform(SPEC, num_crops=3)(clip).shape == (3, size[0], 3, 32, 32)
    assert torch.equal(clip, before)
    one_pixel = InputSpec(1, SPEC.mean, SPEC.std)
    assert TrainTransform(one_pixel, **EVERYTHING)(clip, 3).shape == (size[0], 3, 1, 1)


def test_the_seed_alone_decides():
    augment, clip = TrainTransform(SPEC, **EVERYTHING), noise()
    torch.manual_seed(1)
    first, state = augment(clip, 7), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(augment(clip, 7), first)
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's random numbers are left alone
    assert not torch.equal(augment(clip, 8), first)


def test_flip_can_be_switched_off():
    """Left stays left: a bright left edge is never on the right without flips, sometimes with them."""
    clip = torch.zeros(2, 3, 40, 40, dtype=torch.uint8)
    clip[..., :20] = 255
    whole = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0))

    def lefts(flip):
        return [bool(TrainTransform(SPEC, flip=flip, **whole)(clip, s)[0, 0, 5, 5] > 128) for s in range(40)]

    assert all(lefts(False)) and 5 < sum(lefts(True)) < 35


def test_interpolation_is_the_backbones():
    clip = noise(1)
    for name, mode in (("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)):
        out = TestTransform(InputSpec(32, SPEC.mean, SPEC.std, name))(clip)[0, 0]
        picture = Image.fromarray(clip[0].permute(1, 2, 0).numpy()).resize((42, 32), mode)  # an independent resizer
        expected = torch.tensor(list(picture.getdata()), dtype=torch.float).view(32, 42, 3).permute(2, 0, 1)[..., 5:37]
        assert (out.float() - expected).abs().max() <= 1


def test_three_crops_lie_along_the_longer_side():
    for clip in (noise(2, 32, 50), noise(2, 50, 32)):
        crops = TestTransform(SPEC, num_crops=3)(clip)
        assert crops.shape == (3, 2, 3, 32, 32)
        wide = clip if clip.shape[-1] == 50 else clip.transpose(-1, -2)
        crops = crops if clip.shape[-1] == 50 else crops.transpose(-1, -2)
        for crop, x in zip(crops, (0, 9, 18), strict=True):
            assert torch.equal(crop, wide[..., x : x + 32])
    assert torch.equal(TestTransform(SPEC)(noise(2, 32, 50))[0], noise(2, 32, 50)[..., 9:41])


def test_short_side_before_the_crop():
    clip = noise(2, 60, 80)
    out = TestTransform(SPEC, short_side=40)(clip)[0]
    resized = F.resize(clip, [40, 53], F.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(out, resized[..., 4:36, 10:42])


def test_normalise_is_the_formula():
    clip = noise(2)[None]
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (SPEC.mean, SPEC.std))
    expected = (clip.double() / 255 - mean) / std
    assert (Normalise(SPEC)(clip) - expected).abs().max() < 1e-5
    assert Normalise(SPEC, torch.bfloat16)(clip).dtype == torch.bfloat16
    assert not Normalise(SPEC).state_dict()
    with pytest.raises(TypeError, match="normalising twice"):
        Normalise(SPEC)(clip.float())


def test_mixup_is_a_weighted_sum_and_labels_say_the_weights():
    torch.manual_seed(0)
    clips, labels = torch.rand(4, 3, 3, 8, 8), torch.arange(4)
    mixed, soft = MixClips(6, mixup_alpha=1.0, cutmix_alpha=0)(clips, labels)
    assert type(mixed) is torch.Tensor and soft.shape == (4, 6)
    assert torch.allclose(soft.sum(1), torch.ones(4))
    expected = torch.einsum("bn,ntchw->btchw", soft[:, :4], clips)  # the weights in the labels, applied to the clips
    assert torch.allclose(mixed, expected, atol=1e-5)


def test_cutmix_cuts_one_box_through_all_frames():
    torch.manual_seed(3)
    clips = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 3, 16, 16)
    mixed, soft = MixClips(4, mixup_alpha=0, cutmix_alpha=1.0)(clips, torch.arange(4))
    foreign = mixed != clips
    assert torch.equal(foreign, foreign[:, :1, :1].expand_as(foreign)) and foreign.any()
    share = foreign[:, 0, 0].float().mean((1, 2))
    assert torch.allclose(1 - soft.diagonal(), share, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_mixed_labels_are_shares(seed, size, classes, both):
    mix = MixClips(classes, mixup_alpha=0.8, cutmix_alpha=1.0 if both else 0)
    clips, labels = torch.rand(size, 2, 3, 7, 9), torch.arange(size) % classes
    torch.manual_seed(1)
    state = torch.get_rng_state()
    mixed, soft = mix(clips, labels, seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert soft.shape == (size, classes) and (soft >= 0).all() and torch.allclose(soft.sum(1), torch.ones(size))
    assert mixed.shape == clips.shape and mixed.min() >= 0 and mixed.max() <= 1
    again = mix(clips, labels, seed)
    assert torch.equal(again[0], mixed) and torch.equal(again[1], soft)


@pytest.mark.parametrize("labels", [[-1, 0], [0, 3], [0.0, 1.0]])
def test_mixing_needs_labels(labels):
    with pytest.raises(ValueError, match="a class number from 0 to 2 for each clip"):
        MixClips(3)(torch.rand(2, 2, 3, 8, 8), torch.tensor(labels))


@pytest.mark.parametrize(
    "options",
    [
        {"scale": (1.0, 0.25)},
        {"scale": (0.0, 0.0)},
        {"scale": (0.5, 2.0)},
        {"scale": (-1.0, 1.0)},
        {"scale": 0.5},
        {"ratio": (2.0, 1.0)},
        {"ratio": (0.0, 1.0)},
        {"rand_augment": (2, 31)},
        {"rand_augment": (2, -1)},
        {"rand_augment": (0, 9)},
        {"rand_augment": (2,)},
        {"rand_augment": 9},
        {"erase": 1.5},
        {"color_jitter": -1.0},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_told_before_the_first_clip(options):
    """Not by a worker, in torch's words, or never."""
    with pytest.raises(ValueError):
        TrainTransform(SPEC, **options)


@pytest.mark.parametrize(
    "change",
    [{"mean": (123.7, 116.3, 103.5)}, {"std": (58.4, 57.1, 57.4)}, {"std": (float("nan"), 1.0, 1.0)}, {"size": 224.0}],
    ids=str,
)
def test_what_no_backbone_expects_is_refused(change):
    with pytest.raises(ValueError):
        InputSpec(**{"size": 32, "mean": SPEC.mean, "std": SPEC.std, **change})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: InputSpec(0, SPEC.mean, SPEC.std), "size=0"),
        (lambda: InputSpec(32, SPEC.mean, SPEC.std, "cubic"), "expected one of 'bilinear'"),
        (lambda: InputSpec(32, (0.5,), (0.5,)), "3 means"),
        (lambda: TestTransform(SPEC, num_crops=2), "num_crops=2"),
        (lambda: TestTransform(SPEC, short_side=16), "smaller than the crop"),
        (lambda: TestTransform(SPEC)(torch.zeros(2, 3, 40, 40)), "expected a uint8 clip"),
        (lambda: TrainTransform(SPEC)(torch.zeros(40, 40, 3, dtype=torch.uint8), 0), "expected a uint8 clip"),
        (lambda: MixClips(3, 0, 0), "does nothing"),
        (lambda: MixClips(3, -1, 0), "mixup_alpha=-1"),
        (lambda: TestTransform(SPEC)(noise(0)), "expected a uint8 clip"),
        (lambda: MixClips(3)(noise()[None], torch.zeros(1, dtype=torch.long)), "normalised clips"),
    ],
)
def test_wrong_input_is_said(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()
