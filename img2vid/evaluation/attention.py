"""What a model looks at in a video: attention maps drawn on its frames.

    img2vid plot attention --model FOLDER --video video.mp4 --out attention.png

spatial      the last block: how much the class token (without one: the average patch) attends to each patch
temporal     the last block with a branch along time: how much the other frames attend to each place of a frame
rollout      both, followed from the clip feature back through all blocks (Abnar and Zuidema 2020, arXiv:2005.00928)

differs from the paper: a temporal branch counts as much as it adds to the stream (branch-to-residual ratio), not one
half. Behind a gate at zero it counts nothing, and the rollout is the image model's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import img2vid
from img2vid.backbones.reading import block_kind, read_block
from img2vid.checkpoints.native import load
from img2vid.data.transforms import TestTransform
from img2vid.evaluation.conditions import video_part
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.layers import branch_ratios
from img2vid.evaluation.reading import input_spec
from img2vid.evidence import in_eval_mode
from img2vid.temporal.block import SpaceTimeBlock


@dataclass
class Attention:
    """Maps of one clip, (T, h, w) over its patches. ``temporal`` is None where no block attends along time."""

    spatial: Tensor
    temporal: Tensor | None
    rollout: Tensor
    frame_to_frame: Tensor | None  # (T, T): mean over places of the temporal attention, rows sum to 1

    def rows(self) -> dict[str, Tensor]:
        maps = {"spatial": self.spatial, "temporal": self.temporal, "rollout": self.rollout}
        return {name: m.numpy() for name, m in maps.items() if m is not None}


@torch.no_grad()
def attention_maps(model, clip: Tensor) -> Attention:
    """Attention of one normalised clip (1, T, C, H, W).

    Raises:
        EvaluationError: attention that softmax(scale q k) alone does not describe (rotary codes, biases, all frames at
            once), so that a recomputed map would be another one than the model's.
    """
    video = video_part(model)
    refuse_other_attention(video)
    blocks = [block for _, block in video.tower.blocks]
    with in_eval_mode(model), seen(blocks) as inputs:
        video.frame_features(clip)
    ratios = {entry["layer"]: entry["branch_to_residual"] for entry in branch_ratios(model, [clip])}
    num_steps = clip.shape[1] // video.config.tubelet_size
    num_prefix = video.tower.num_prefix_tokens
    height, width = (n // p for n, p in zip(clip.shape[-2:], video.tower.patch_size, strict=True))

    spatial, temporal = [], []
    for block, (x, y) in zip(blocks, inputs, strict=True):
        spatial.append(softmax_attention(read_block(block), x))  # (T, S, S)
        branch = block.temporal_attn if y is not None else None
        temporal.append(None if y is None else softmax_attention(branch, y.transpose(0, 1)))  # (S', T, T)

    # from the clip feature back: how much of it comes from each token, (T, S)
    share = torch.zeros(spatial[0].shape[:2])
    query = slice(0, 1) if num_prefix else slice(None)
    share[:, query] = 1.0
    share /= share.sum()
    for (name, _), across, along in reversed(list(zip(video.tower.blocks, spatial, temporal, strict=True))):
        share = 0.5 * share + 0.5 * torch.einsum("ti,tij->tj", share, across)
        if along is not None:
            first = share.shape[1] - along.shape[0]  # tokens of the whole clip do not attend along time
            moved = torch.einsum("ts,stu->us", share[:, first:], along)
            share[:, first:] = (share[:, first:] + ratios[name] * moved) / (1 + ratios[name])

    def grid(values: Tensor) -> Tensor:  # (T, P + N) -> (T, h, w)
        return values[:, -height * width :].unflatten(1, (height, width))

    last = next((a for a in reversed(temporal) if a is not None), None)
    return Attention(
        spatial=grid(spatial[-1][:, query].mean(1)),
        temporal=None if last is None or num_steps == 1 else grid(received(last)),
        rollout=grid(share),
        frame_to_frame=None if last is None else last[-height * width :].mean(0),
    )


def received(attention: Tensor) -> Tensor:
    """Attention along time (S, T, T) -> what each frame gets from the other frames at each place, (T, S)."""
    others = 1 - torch.eye(attention.shape[1])
    return (attention * others).sum(1).T / others.sum(0).clamp(min=1)[:, None]


def softmax_attention(attention, x: Tensor) -> Tensor:
    """Tokens (B, S, D) as attention sees them -> its map (B, S, S), mean over heads; rows sum to 1.

    Args:
        attention: a SpatialAttention, or a TemporalAttention of ours.
    """
    if isinstance(attention, nn.Module):
        weight, bias = attention.qkv.weight, attention.qkv.bias
    else:
        weight, bias = attention.qkv_weight, attention.qkv_bias
    heads = (3, attention.num_heads, attention.head_dim)
    q, k, _ = nn.functional.linear(x, weight, bias).unflatten(-1, heads).permute(2, 0, 3, 1, 4)  # (B, H, S, head_dim)
    q = q if attention.q_norm is None else attention.q_norm(q)
    k = k if attention.k_norm is None else attention.k_norm(k)
    return (attention.scale * q @ k.transpose(-2, -1)).float().softmax(-1).mean(1).cpu()


@contextmanager
def seen(blocks: Sequence[nn.Module]) -> Iterator[list[list[Tensor | None]]]:
    """Inside, forward passes note what each block's attentions get: [spatial (B*T, S, D), temporal or None]."""
    inputs: list[list[Tensor | None]] = [[None, None] for _ in blocks]

    def note(place: list, index: int):
        return lambda module, args, out: place.__setitem__(index, out)

    hooks = []
    for block, place in zip(blocks, inputs, strict=True):
        hooks.append(read_block(block).norm.register_forward_hook(note(place, 0)))
        if isinstance(block, SpaceTimeBlock):
            hooks.append(block.temporal_norm1.register_forward_hook(note(place, 1)))
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def refuse_other_attention(video) -> None:
    block = video.tower.blocks[0][1]
    kind, left_behind = block_kind(block), read_block(block).left_behind
    why = None
    if video.config.attention == "joint_space_time" or video.config.prefix_mode == "global":
        why = f"attention={video.config.attention!r} with prefix_mode={video.config.prefix_mode!r} looks at all frames"
    elif kind.rotary or "rotary" in video.tower.position or kind.relative or kind.post_norm or not kind.attn:
        why = f"{type(block).__name__} has positions or an order of its own in its attention"
    elif left_behind:
        why = f"{type(block).__name__} has {', '.join(left_behind)}"
    if why is not None:
        raise EvaluationError(f"Attention maps are recomputed from queries and keys, which is not this model's: {why}.")


def dot_seeker(num_frames: int) -> tuple[nn.Module, Tensor, list[tuple[int, int]]]:
    """For the self-test: a model made to attend to what is bright, a clip with a moving dot, and where the dot is.

    The model sees 8 x 8 patches of 4 pixels. Its first channel is brightness, every query asks for it, and nothing is
    added to the stream.
    """
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=1, num_classes=0
    )
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
        vit.patch_embed.proj.weight[0] = 1.0
        vit.patch_embed.proj.bias[1] = vit.cls_token[..., 1] = 1.0
        for block in vit.blocks:
            block.norm1.weight.fill_(1.0)
            block.attn.qkv.bias[0] = 8.0  # the query
            block.attn.qkv.weight[16, 0] = 1.0  # the key
        vit.norm.weight.fill_(1.0)
    places = [(1 + t % 6, (2 * t + 4) % 8) for t in range(num_frames)]  # (row, column), off the diagonal
    clip = torch.zeros(1, num_frames, 3, 32, 32)
    for t, (row, column) in enumerate(places):
        clip[0, t, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1.0
    return img2vid.convert(vit, num_frames=num_frames), clip, places


def self_test(num_frames: int = 5) -> bool:
    """Whether a planted moving dot lights up where and when it is, in the spatial map and in the rollout."""
    model, clip, places = dot_seeker(num_frames)
    maps = attention_maps(model, clip)
    return all(brightest(m) == places for m in (maps.spatial, maps.rollout))


def brightest(maps: Tensor) -> list[tuple[int, int]]:
    """(row, column) of the largest value of each frame's map."""
    return [divmod(int(m.argmax()), m.shape[-1]) for m in maps]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("img2vid plot attention", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", metavar="FOLDER", help="written by img2vid.convert or save_pretrained")
    parser.add_argument("--video", metavar="FILE")
    parser.add_argument("--num-frames", type=int, help="default: the model's own")
    parser.add_argument("--out", default="runs/attention.png", help="default: runs/attention.png")
    parser.add_argument("--self-test", action="store_true", help="plant a moving dot and see that it lights up")
    options = parser.parse_args(argv)
    if options.self_test:
        lit = self_test()
        print("a planted moving dot lights up where it is" if lit else "FAILED: the planted dot does not light up")
        return 0 if lit else 1
    if options.model is None or options.video is None:
        parser.error("give --model and --video, or --self-test")
    from img2vid.plots import attention_figure, save

    model = load(options.model)
    pixels = img2vid.read_clip(options.video, num_frames=options.num_frames or model.config.num_frames)
    pixels = TestTransform(input_spec(model))(pixels)[0]  # (T, C, size, size)
    maps = attention_maps(model, model.normalize(pixels[None]).to(next(model.parameters()).dtype))
    size = video_part(model).config.tubelet_size
    frames = pixels[size // 2 :: size].permute(0, 2, 3, 1).numpy()
    print(f"wrote {save(attention_figure(frames, maps.rows(), Path(options.video).name), options.out)}")
    return 0
