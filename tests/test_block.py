import copy
import pickle

import pytest
import timm
import torch
from torch.nn import functional as F

from img2vid.backbones.reading import read_block
from img2vid.temporal.block import SpaceTimeBlock
from img2vid.temporal.checkpointing import CheckpointedBlock
from img2vid.temporal.clip import ClipContext
from img2vid.temporal.infront import put_in_front, take_from_front
from img2vid.temporal.insertion import insert_temporal_attention
from tests.conftest import randomize, small_vit


@pytest.fixture
def block_and_clip():
    block, clip = small_vit().blocks[0], ClipContext()
    insert_temporal_attention(block, read_block(block), clip)
    return block, clip


def test_the_formula(block_and_clip):
    block, clip = block_and_clip
    randomize(block, seed=5)
    image_block = timm.models.vision_transformer.Block(48, 4, qkv_bias=True).eval()
    image_block.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("temporal")})
    x = torch.randn(6, 17, 48)
    with torch.no_grad(), clip.of(3):
        branch = F.linear(
            block.temporal_attn(block.temporal_norm1(x), 3), block.temporal_fc.weight, block.temporal_fc.bias
        )
        assert torch.equal(block(x), image_block(x + branch))


def test_type_and_keys_survive(block_and_clip):
    block, _ = block_and_clip
    assert isinstance(block, timm.models.vision_transformer.Block)
    new = {k for k in block.state_dict() if k.startswith("temporal_")}
    assert set(block.state_dict()) - new == set(small_vit().blocks[0].state_dict())
    assert {k.split(".")[0] for k in new} == {"temporal_norm1", "temporal_attn", "temporal_fc"}


def test_outside_a_video_model_it_refuses_to_guess(block_and_clip):
    block, _ = block_and_clip
    with pytest.raises(RuntimeError, match="does not know how many"):
        block(torch.randn(6, 17, 48))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_copies_are_space_time_blocks_of_their_own(block_and_clip, duplicate):
    block, _ = block_and_clip
    put_in_front(block, CheckpointedBlock)
    twin = duplicate(block)
    assert type(twin) is type(block)
    assert isinstance(twin, SpaceTimeBlock)
    assert twin.temporal_attn.qkv.weight is not block.temporal_attn.qkv.weight
    assert torch.equal(twin.temporal_attn.qkv.weight, block.temporal_attn.qkv.weight)
    take_from_front(twin, SpaceTimeBlock)
    assert type(twin) is not type(block)


def test_gradient_argument(block_and_clip):
    """Gate at zero: gradient reaches the gate at once, what is behind it only after the gate has moved."""
    block, clip = block_and_clip
    x, direction = torch.randn(6, 17, 48), torch.randn(6, 17, 48)

    def gradients():
        block.zero_grad()
        with clip.of(3):
            (block(x) * direction).sum().backward()
        return block.temporal_fc.weight.grad.norm(), block.temporal_attn.qkv.weight.grad.norm()

    gate, behind = gradients()
    assert gate > 0
    assert behind == 0
    with torch.no_grad():
        block.temporal_fc.weight -= 0.1 * block.temporal_fc.weight.grad / gate
    gate, behind = gradients()
    assert gate > 0
    assert behind > 0


def test_checkpointing_changes_no_gradient(block_and_clip):
    block, clip = block_and_clip
    randomize(block, seed=5).train()
    x = torch.randn(6, 17, 48)

    def gradient():
        block.zero_grad()
        with clip.of(3):
            y = block(x)
        y.square().sum().backward()  # T is no longer known here, when a checkpointed block runs again
        return {name: p.grad.clone() for name, p in block.named_parameters()}

    expected = gradient()
    put_in_front(block, CheckpointedBlock)
    got = gradient()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
