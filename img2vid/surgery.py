"""Carry out a ``VideoConfig`` on an image tower: which block gets what, and what cannot be combined."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import nn

from img2vid.backbones.any_size import can_take_nearest
from img2vid.backbones.dropping import PATCH_DROPOUTS, drop_path_rate
from img2vid.backbones.reading import block_kind, child, read_block, residual_modules
from img2vid.backbones.steps import attention_steps, has_steps
from img2vid.backbones.tower import ImageTower
from img2vid.config import ConfigError, VideoConfig
from img2vid.temporal.causal import make_causal
from img2vid.temporal.clip import ClipContext
from img2vid.temporal.embeddings import inflate_to_tubelets
from img2vid.temporal.infront import own_class
from img2vid.temporal.insertion import insert_temporal_attention
from img2vid.temporal.joint import make_joint
from img2vid.temporal.prefix import AttendToAllFrames, AveragePrefix, DrawPrefixOnce
from img2vid.temporal.quirks import add_quirks


class Entrance(NamedTuple):
    """The first module that sees time, mostly a block, where ``time_embed`` of width ``dim`` is added to its tokens."""

    block: nn.Module
    dim: int


def insert_time(tower: ImageTower, config: VideoConfig, clip: ClipContext) -> Entrance | None:
    """Change ``tower`` in place; None where no block sees time.

    Raises:
        ConfigError: the tower cannot do what ``config`` asks for; nothing has been changed then.
    """
    refuse_impossible(tower, config)
    blocks = [block for _, block in tower.blocks]
    if "mean_before_norm" in config.quirks:
        blocks[-1].register_forward_hook(AveragePrefix(clip, sys.maxsize))  # all tokens
    if config.tubelet_size > 1:
        inflate_to_tubelets(tower.patch_conv, config.tubelet_size, config.tubelet_init)
        for parent in tower.module.modules():  # transformers counts channels before its convolution does
            if hasattr(parent, "num_channels") and any(child is tower.patch_conv for child in parent.children()):
                parent.num_channels *= config.tubelet_size
    if config.attention == "joint_space_time":
        for block in blocks:
            make_joint(block, clip, num_shared_tokens(tower, config))
        return Entrance(entrance(tower, config, blocks[0]), read_block(blocks[0]).dim)
    if config.attention != "divided_space_time":
        return None
    layers = config.layers(len(blocks))
    for i in layers:
        insert_temporal_attention(
            blocks[i],
            read_block(blocks[i]),
            clip,
            init=config.temporal_init,
            gate=config.gate,
            num_shared_tokens=0 if "prefix_in_time" in config.quirks else num_shared_tokens(tower, config),
            drop_path=0.0 if "no_temporal_drop_path" in config.quirks else drop_path_rate(blocks[i]),
        )
        if config.causal:
            make_causal(blocks[i].temporal_attn, clip)
        if config.quirks:
            add_quirks(blocks[i], **quirks_of_block(tower, config, blocks[i]))
    share_prefix_tokens(tower, config, clip)
    return Entrance(entrance(tower, config, blocks[layers[0]]), read_block(blocks[layers[0]]).dim)


def quirks_of_block(tower: ImageTower, config: VideoConfig, block: nn.Module) -> dict[str, Any]:
    return {
        "num_clip_keys": num_shared_tokens(tower, config) if "prefix_in_time" in config.quirks else 0,
        "drop_before_gate": "drop_path_before_gate" in config.quirks,
        "seen_by": child(block, block_kind(block).norm) if "block_input_residual" in config.quirks else None,
    }


def entrance(tower: ImageTower, config: VideoConfig, block: nn.Module) -> nn.Module:
    """Where ``time_embed`` is added: at ``block``, or before the norm in front of all blocks."""
    return norm_pre(tower) if "time_before_norm_pre" in config.quirks else block


def norm_pre(tower: ImageTower) -> nn.Module | None:
    """The norm between patches and blocks, where there is one: timm's ``norm_pre``, open_clip's ``ln_pre``."""
    trunk = getattr(tower.module, "trunk", tower.module)
    found = getattr(trunk, "norm_pre", None) or getattr(trunk, "ln_pre", None)
    return None if isinstance(found, nn.Identity) else found


def num_shared_tokens(tower: ImageTower, config: VideoConfig) -> int:
    return 0 if config.prefix_mode == "per_frame" else tower.num_prefix_tokens


def share_prefix_tokens(tower: ImageTower, config: VideoConfig, clip: ClipContext) -> None:
    """Keep the prefix tokens of all frames of a clip equal, in every block, whether or not it attends along time."""
    num_shared = num_shared_tokens(tower, config)
    if not num_shared:
        return
    once = DrawPrefixOnce(clip, num_shared)
    tower.blocks[0][1].register_forward_pre_hook(once.before_block)
    for _, block in tower.blocks:
        if config.prefix_mode == "global":
            attention = child(block, block_kind(block).attn)
            attend = AttendToAllFrames(clip, num_shared, attention_steps)
            attention.register_forward_hook(attend, with_kwargs=True)
        else:
            for module in residual_modules(block):
                module.register_forward_hook(AveragePrefix(clip, num_shared))
        block.register_forward_hook(once.after_block)


def refuse_impossible(tower: ImageTower, config: VideoConfig) -> None:
    block = tower.blocks[0][1]
    kind = block_kind(block)
    name, is_rotary = own_class(block).__name__, "rotary" in tower.position
    if config.tubelet_size > 1 and tower.patch_conv is None:
        raise ConfigError(
            f"tubelet_size={config.tubelet_size}, but this backbone's patches do not come from one plain convolution, "
            "which is what can be inflated to several frames. Use tubelet_size=1."
        )
    is_plain = not is_rotary and not read_block(block).left_behind and has_steps(child(block, kind.attn))
    if config.prefix_mode == "global" and not is_plain:
        raise ConfigError(
            f"prefix_mode='global' needs to recompute attention over all frames and supports plain attention only, not "
            f"the {tower.position} positions and attention of {name}. Use per_frame or shared."
        )
    drops_patches = any(isinstance(m, PATCH_DROPOUTS) and m.prob > 0.0 for m in tower.module.modules())
    if config.time_embed == "per_patch" and (drops_patches or tower.patch_conv is None):
        raise ConfigError("time_embed='per_patch' needs all patches of a plain grid; use time_embed='zeros'.")
    if "nearest_positions" in config.quirks and not can_take_nearest(tower):
        raise ConfigError(
            f"quirk 'nearest_positions' is about a plain ViT's table of positions with one class token, which "
            f"{type(tower.module).__name__} here has not."
        )
    if "time_before_norm_pre" in config.quirks and norm_pre(tower) is None:
        raise ConfigError(f"quirk 'time_before_norm_pre': {type(tower.module).__name__} has no norm before its blocks.")
    if "block_input_residual" in config.quirks and (kind.post_norm or kind.attn == "" or "attns" in kind.residuals):
        raise ConfigError(
            f"quirk 'block_input_residual' needs a norm that only attention over space reads; in {name} it is not "
            "alone in that. Leave it out."
        )
    if config.attention == "joint_space_time":
        if "talking-heads mixing" in read_block(block).left_behind:
            raise ConfigError(
                f"joint_space_time would not keep the function of {name} on static clips: its heads are mixed after "
                "the softmax with a bias per key, which counts T times. Use divided_space_time."
            )
        if kind.relative:
            raise ConfigError(
                f"joint_space_time cannot stretch the relative position bias of {name} over several frames. "
                "Use divided_space_time."
            )
        if is_rotary and tower.num_prefix_tokens and config.prefix_mode == "per_frame":
            raise ConfigError(
                "joint_space_time with rotary positions expects prefix tokens at the front of the sequence only. "
                "Use prefix_mode='shared'."
            )
    config.layers(len(tower.blocks))
