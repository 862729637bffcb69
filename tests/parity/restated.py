"""Published forwards restated from their papers and repositories' descriptions, slowly and plainly, as oracles.

Each works on a state dict under the dialect's own names, in the dialect's own token order, with loops where the
originals reshape; nothing here is shared with img2vid.
"""

import math

import torch
from torch.nn import functional as F


def layer_norm(state, name, x, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def attend(q, k, v, heads):
    """Softmax attention of (n, D) queries over (m, D) keys, head by head."""
    width = q.shape[-1] // heads
    outputs = []
    for h in range(heads):
        mine = slice(h * width, (h + 1) * width)
        scores = q[:, mine] @ k[:, mine].T / width**0.5
        outputs.append(scores.softmax(-1) @ v[:, mine])
    return torch.cat(outputs, dim=-1)


def self_attention(state, name, x, heads):
    """Tokens (n, D), projections fused in ``qkv``."""
    q, k, v = linear(state, f"{name}.qkv", x).chunk(3, dim=-1)
    return linear(state, f"{name}.proj", attend(q, k, v, heads))


def multihead_attention(state, name, x, heads):
    """The same by PyTorch's own function, under nn.MultiheadAttention's names."""
    return F.multi_head_attention_forward(
        x, x, x, x.shape[-1], heads, state[f"{name}.in_proj_weight"], state[f"{name}.in_proj_bias"], None, None, False,
        0.0, state[f"{name}.out_proj.weight"], state[f"{name}.out_proj.bias"], training=False, need_weights=False,
    )[0]  # fmt: skip


def mlp(state, fc1, fc2, x, act=F.gelu):
    return linear(state, fc2, act(linear(state, fc1, x)))


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def patches(state, name, frame):
    """One frame (3, H, W) -> its patches (N, D), row by row."""
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    return F.conv2d(frame[None], weight, bias, stride=weight.shape[-1])[0].flatten(1).T


ORIGINAL = {
    "conv": "patch_embed.proj",
    "block": "blocks.{}.",
    "time": ("temporal_norm1", "temporal_attn", "temporal_fc"),
    "space": ("norm1", "attn"),
    "mlp": ("norm2", "mlp.fc1", "mlp.fc2"),
    "root": "",
    "head": "head",
    "attention": self_attention,
}
MMACTION2 = {
    "conv": "backbone.patch_embed.projection",
    "block": "backbone.transformer_layers.layers.{}.",
    "time": ("attentions.0.norm", "attentions.0.attn", "attentions.0.temporal_fc"),
    "space": ("attentions.1.norm", "attentions.1.attn"),
    "mlp": ("ffns.0.norm", "ffns.0.layers.0.0", "ffns.0.layers.1"),
    "root": "backbone.",
    "head": "cls_head.fc_cls",
    "attention": multihead_attention,
}
MMACTION2_UNDIVIDED = {
    **MMACTION2,
    "space": ("norms.0", "attentions.0.attn"),
    "mlp": ("norms.1", "ffns.0.layers.0.0", "ffns.0.layers.1"),
}


def timesformer(state, clip, heads, depth, attention, names=ORIGINAL):
    """One clip (T, 3, H, W) -> logits. The clip's tokens are a class token and x[place][time]."""
    root, attends = names["root"], names["attention"]
    num_frames = len(clip)
    pos = state[f"{root}pos_embed"][0]
    frames = torch.stack([patches(state, names["conv"], frame) for frame in clip])  # (T, N, D)
    if len(pos) != 1 + frames.shape[1]:  # another image size: positions of the nearest patches, in two dimensions
        side, height = math.isqrt(len(pos) - 1), clip.shape[-2] // state[names["conv"] + ".weight"].shape[-1]
        grid = pos[1:].T.reshape(1, -1, side, side)
        grid = F.interpolate(grid, size=(height, frames.shape[1] // height), mode="nearest")
        pos = torch.cat([pos[:1], grid[0].flatten(1).T])
    cls, x = state[f"{root}cls_token"][0] + pos[:1], (frames + pos[1:]).transpose(0, 1)  # (1, D), (N, T, D)
    if attention != "space_only":
        time = state[f"{root}time_embed"]
        if time.shape[1] != num_frames:
            time = F.interpolate(time.transpose(1, 2), size=num_frames, mode="nearest").transpose(1, 2)
        x = x + time[0]
    num_places, dim = len(x), x.shape[-1]
    singles = [torch.cat([cls, x[:, t]]) for t in range(num_frames)]  # of space_only: each frame on its own
    for i in range(depth):
        block = names["block"].format(i)
        norm, attn = (block + part for part in names["space"])
        norm2, fc1, fc2 = (block + part for part in names["mlp"])

        def mlp_residual(tokens, norm2=norm2, fc1=fc1, fc2=fc2):
            return tokens + mlp(state, fc1, fc2, layer_norm(state, norm2, tokens))

        def space_residual(tokens, norm=norm, attn=attn):
            return attends(state, attn, layer_norm(state, norm, tokens), heads)

        if attention == "space_only":
            singles = [mlp_residual(tokens + space_residual(tokens)) for tokens in singles]
            continue
        if attention == "joint_space_time":
            tokens = torch.cat([cls, x.reshape(-1, dim)])
            tokens = mlp_residual(tokens + space_residual(tokens))
        else:
            norm_t, attn_t, fc = (block + part for part in names["time"])
            along = [attends(state, attn_t, layer_norm(state, norm_t, x[p]), heads) for p in range(num_places)]
            x = x + linear(state, fc, torch.stack(along))
            residuals = torch.stack([space_residual(torch.cat([cls, x[:, t]])) for t in range(num_frames)])
            cls = cls + residuals[:, :1].mean(0)
            x = x + residuals[:, 1:].transpose(0, 1)
            tokens = mlp_residual(torch.cat([cls, x.reshape(-1, dim)]))
        cls, x = tokens[:1], tokens[1:].reshape(num_places, num_frames, dim)
    if attention == "space_only":
        cls = torch.stack(singles).mean(0)[:1]  # averaged as tokens, then normalised
    return linear(state, names["head"], layer_norm(state, f"{root}norm", cls))[0]


def space_time_transformer(state, clip, heads, depth, root, is_clip=False):
    """Frozen in Time and LaViLa: one clip (T, 3, H, W) -> the class token (D) after the last norm."""
    num_frames = len(clip)
    pos, time = state[f"{root}pos_embed"][0], state[f"{root}temporal_embed"][0]
    frames = [patches(state, f"{root}patch_embed.proj", frame) for frame in clip]
    num_places = len(frames[0])
    x = torch.cat(
        [state[f"{root}cls_token"][0] + pos[:1], *[p + pos[1:] + time[t] for t, p in enumerate(frames)]]
    )  # (1 + T*N, D), frame by frame
    if is_clip:
        x = layer_norm(state, f"{root}ln_pre", x, eps=1e-5)
    act = quick_gelu if is_clip else F.gelu
    rows = torch.arange(1, 1 + num_frames * num_places).reshape(num_frames, num_places)

    def attention(name, tokens, groups):
        """The class token sees everything; a group of patches sees itself and the class token."""
        q, k, v = linear(state, f"{name}.qkv", tokens).chunk(3, dim=-1)
        out = torch.empty_like(q)
        out[:1] = attend(q[:1], k, v, heads)
        for group in groups:
            seen = torch.cat([torch.zeros(1, dtype=torch.long), group])
            out[group] = attend(q[group], k[seen], v[seen], heads)
        return linear(state, f"{name}.proj", out)

    for i in range(depth):
        block = f"{root}blocks.{i}."
        along_time = attention(f"{block}timeattn", layer_norm(state, f"{block}norm3", x), rows.T)
        if f"{block}alpha_timeattn" in state:
            along_time = torch.tanh(state[f"{block}alpha_timeattn"]) * along_time
        over_space = attention(f"{block}attn", layer_norm(state, f"{block}norm1", x + along_time), rows)
        x = x + over_space  # what attention along time added is not kept
        x = x + mlp(state, f"{block}mlp.fc1", f"{block}mlp.fc2", layer_norm(state, f"{block}norm2", x), act)
    return layer_norm(state, f"{root}norm", x[:1])[0]
