import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from img2vid.temporal.embeddings import TubeletConv2d, inflate_to_tubelets, resample_pos_embed, resample_time_embed


def test_same_grid_is_the_same_object():
    embed = torch.randn(1, 1 + 12, 4)
    assert resample_pos_embed(embed, (3, 4), (3, 4), 1) is embed


def test_grids_are_rows_by_columns():
    """A pattern that varies along columns only must still do so after rows are added."""
    columns = torch.linspace(0, 1, 6).view(1, 1, 6, 1).expand(1, 2, 6, 1).reshape(1, 12, 1)
    resampled = resample_pos_embed(columns, (4, 6), (2, 6), 0).view(4, 6)
    torch.testing.assert_close(resampled, torch.linspace(0, 1, 6).expand(4, 6), atol=1e-5, rtol=0)


def test_equal_token_counts_on_different_grids_are_resampled():
    embed = torch.randn(1, 16, 3)
    transposed_shape = resample_pos_embed(embed, (2, 8), (4, 4), 0)
    assert transposed_shape.shape == embed.shape
    assert not torch.allclose(transposed_shape, embed)


def test_equals_torch_bicubic_with_antialias():
    embed = torch.randn(1, 2 + 35, 3)
    expected = F.interpolate(
        embed[:, 2:].reshape(1, 5, 7, 3).permute(0, 3, 1, 2), size=(3, 4), mode="bicubic", antialias=True
    )
    got = resample_pos_embed(embed, (3, 4), (5, 7), 2)
    assert torch.equal(got[:, :2], embed[:, :2])
    torch.testing.assert_close(got[:, 2:], expected.flatten(2).transpose(1, 2))


def test_half_precision_is_resampled_in_fp32():
    embed = torch.randn(1, 16, 8)
    half = resample_pos_embed(embed.bfloat16(), (6, 6), (4, 4), 0)
    assert half.dtype == torch.bfloat16
    exact = resample_pos_embed(embed.bfloat16().float(), (6, 6), (4, 4), 0)
    assert torch.equal(half, exact.bfloat16())


def test_wrong_grid_is_named():
    with pytest.raises(ValueError, match="3 x 5 grid make 16"):
        resample_pos_embed(torch.randn(1, 17, 4), (4, 4), (3, 5), 1)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
def test_constant_positions_stay_constant(h, w, new_h, new_w):
    resampled = resample_pos_embed(torch.full((1, h * w, 2), 3.0), (new_h, new_w), (h, w), 0)
    torch.testing.assert_close(resampled, torch.full((1, new_h * new_w, 2), 3.0))


@pytest.mark.parametrize(
    ("mode", "num_frames", "expected"),
    [
        # by hand, half-pixel centres: frame i of n looks at (i + 0.5) * 4 / n - 0.5, clamped to 0..3
        ("linear", 8, [0.0, 2.5, 7.5, 12.5, 17.5, 22.5, 27.5, 30.0]),
        ("linear", 2, [5.0, 25.0]),
        ("linear", 1, [15.0]),
        ("linear", 4, [0.0, 10.0, 20.0, 30.0]),
        # frame i of n is frame floor(i * 4 / n)
        ("nearest", 8, [0.0, 0.0, 10.0, 10.0, 20.0, 20.0, 30.0, 30.0]),
        ("nearest", 3, [0.0, 10.0, 20.0]),
        ("nearest", 1, [0.0]),
    ],
)
def test_time_by_hand(mode, num_frames, expected):
    embed = torch.tensor([0.0, 10.0, 20.0, 30.0]).view(1, 4, 1)
    torch.testing.assert_close(resample_time_embed(embed, num_frames, mode).flatten(), torch.tensor(expected))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 16), st.integers(1, 40), st.sampled_from(["linear", "nearest"]))
def test_time_stays_in_order_and_in_range(old, new, mode):
    embed = torch.arange(float(old)).view(1, old, 1)
    times = resample_time_embed(embed, new, mode).flatten()
    assert times.shape == (new,)
    assert times.min() >= 0
    assert times.max() <= old - 1
    assert (times.diff() >= -1e-6).all()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("init", ["central", "average"])
def test_tubelets_equal_a_3d_convolution(size, init):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 4, stride=4)
    image_weight = conv.weight.detach().clone()
    inflate_to_tubelets(conv, size, init)
    kernel = torch.zeros(5, 3, size, 4, 4)  # as a video library would have inflated it
    if init == "central":
        kernel[:, :, size // 2] = image_weight
    else:
        kernel[:] = image_weight.unsqueeze(2) / size
    clip = torch.randn(2, 2 * size, 3, 8, 8)
    expected = F.conv3d(clip.transpose(1, 2), kernel, conv.bias, stride=(size, 4, 4)).transpose(1, 2).flatten(0, 1)
    got = conv(clip.unflatten(1, (2, size)).flatten(2, 3).flatten(0, 1))
    assert isinstance(conv, TubeletConv2d)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_trained_tubelets_equal_a_3d_convolution():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 4, stride=4)
    inflate_to_tubelets(conv, 3)
    nn.init.normal_(conv.tubelet_weight)
    before, after = conv.tubelet_weight.detach()
    kernel = torch.stack([before, conv.weight.detach(), after], dim=2)
    clip = torch.randn(1, 3, 3, 8, 8)
    expected = F.conv3d(clip.transpose(1, 2), kernel, conv.bias, stride=(3, 4, 4))[:, :, 0]
    torch.testing.assert_close(conv(clip.flatten(1, 2)), expected, atol=1e-5, rtol=1e-5)


def test_central_tubelets_keep_the_image_convolution_bit_for_bit():
    conv = nn.Conv2d(3, 5, 4, stride=4)
    clip = torch.randn(2, 4, 3, 8, 8)
    with torch.no_grad():
        expected = conv(clip[:, 2])
        inflate_to_tubelets(conv, 4)
        assert torch.equal(conv(clip.flatten(1, 2)), expected)
