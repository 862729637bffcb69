"""transformers' TimesformerModel as an independent oracle: the same weights must give the same tokens."""

import pytest
import torch
from transformers import TimesformerConfig, TimesformerModel

from img2vid.config import VideoConfig
from img2vid.model import VideoModel
from tests.conftest import randomize, small_vit

# img2vid (image key) -> transformers, for one block
BLOCK = {
    "norm1": "layernorm_before",
    "attn.qkv": "attention.attention.qkv",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "temporal_norm1": "temporal_layernorm",
    "temporal_attn.qkv": "temporal_attention.attention.qkv",
    "temporal_attn.proj": "temporal_attention.output.dense",
    "temporal_fc": "temporal_dense",
}
WHOLE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "time_embed": "embeddings.time_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}


def oracle_and_ours(attention: str, num_frames: int):
    config = TimesformerConfig(
        image_size=32,
        patch_size=8,
        num_frames=num_frames,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        attention_type=attention,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    oracle = randomize(TimesformerModel(config), seed=3, std=0.1).eval()
    prefix_mode = "per_frame" if attention == "space_only" else "shared"
    video = VideoModel(small_vit(), VideoConfig(num_frames=num_frames, attention=attention, prefix_mode=prefix_mode))
    theirs, state = oracle.state_dict(), {}
    for key in video.state_dict():
        if key.startswith("blocks."):
            _, i, rest = key.split(".", 2)
            part, kind = rest.rsplit(".", 1)
            state[key] = theirs[f"encoder.layer.{i}.{BLOCK[part]}.{kind}"]
        else:
            state[key] = theirs[WHOLE[key]]
    video.load_state_dict(state)
    return oracle, video


@pytest.mark.parametrize("num_frames", [1, 2, 5, 8])
@pytest.mark.parametrize("attention", ["divided_space_time", "joint_space_time"])
def test_class_token_equals_timesformer(attention, num_frames):
    oracle, video = oracle_and_ours(attention, num_frames)
    clips = torch.randn(2, num_frames, 3, 32, 32)
    with torch.no_grad():
        expected = oracle(clips).last_hidden_state[:, 0]
        torch.testing.assert_close(video(clips), expected, atol=1e-5, rtol=1e-5)


def test_every_token_equals_timesformer():
    """Not the class token alone: patch tokens in transformers are ordered (patch, frame)."""
    oracle, video = oracle_and_ours("divided_space_time", 4)
    clips = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad(), video.clip.of(4):
        expected = oracle(clips).last_hidden_state[:, 1:].unflatten(1, (16, 4)).transpose(1, 2)  # (B, T, N, D)
        tokens = video.base.forward_features(clips.flatten(0, 1))[:, 1:].unflatten(0, (2, 4))
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_space_only_is_the_mean_over_frames():
    oracle, video = oracle_and_ours("space_only", 4)
    clips = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        expected = oracle(clips).last_hidden_state[:, 0].unflatten(0, (2, 4)).mean(1)
        torch.testing.assert_close(video(clips), expected, atol=1e-5, rtol=1e-5)
