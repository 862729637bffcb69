import pytest
import timm.layers
import torch

from img2vid.temporal.clip import ClipContext
from img2vid.temporal.dropping import ClipDropPath, ClipPatchDropout


def test_drop_path_tosses_one_coin_per_clip():
    clip = ClipContext()
    layer = ClipDropPath(0.4, clip).train()
    torch.manual_seed(0)
    with clip.of(4):
        kept = layer(torch.ones(4 * 5000, 2)).unflatten(0, (5000, 4))
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    values = kept[:, 0, 0]
    torch.testing.assert_close(values.unique(), torch.tensor([0.0, 1 / 0.6]))
    assert abs((values > 0).float().mean() - 0.6) < 0.03  # four standard errors
    assert torch.equal(layer.eval()(torch.ones(3)), torch.ones(3))


def test_drop_path_of_one_frame_clips_has_timms_distribution():
    clip = ClipContext()
    x = torch.ones(20000, 1)
    torch.manual_seed(0)
    with clip.of(1):
        ours = ClipDropPath(0.25, clip).train()(x)
    theirs = timm.layers.DropPath(0.25).train()(x)
    assert set(ours.unique().tolist()) == set(theirs.unique().tolist())
    assert abs(ours.mean() - theirs.mean()) < 0.03


@pytest.mark.parametrize("ordered", [False, True])
def test_patch_dropout(ordered):
    clip = ClipContext()
    layer = ClipPatchDropout(0.5, 2, clip, ordered=ordered, return_indices=True).train()
    x = torch.arange(2.0 + 10).view(1, 12, 1).expand(6, 12, 1)  # every token carries its position
    torch.manual_seed(0)
    with clip.of(3):
        kept, indices = layer(x)
    assert kept.shape == (6, 2 + 5, 1)
    assert torch.equal(kept[:, :2], x[:, :2])  # prefix tokens stay
    assert torch.equal(kept[:, 2:, 0], indices + 2.0)
    by_clip = indices.unflatten(0, (2, 3))
    assert torch.equal(by_clip, by_clip[:, :1].expand_as(by_clip))
    assert not torch.equal(by_clip[0], by_clip[1])
    assert all(len(set(row.tolist())) == 5 for row in indices)
    if ordered:
        assert (indices.diff(dim=1) > 0).all()
    assert torch.equal(layer.eval()(x)[0], x)
    assert layer(x)[1] is None
