"""Transforms: alike over a clip, repeatable from a seed, and equal to the plain formula."""

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

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
        (lambda: MixClips(3)(noise()[None], torch.zeros(1, dtype=torch.long)), "normalised clips"),
    ],
)
def test_wrong_input_is_said(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()
