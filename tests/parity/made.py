"""Small checkpoints of the published dialects with random weights: names and shapes as their code has them."""

import torch

DIM, DEPTH, HEADS, PATCH, HIDDEN = 48, 2, 4, 8, 96


def drawn(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) * 0.15 for name, shape in shapes.items()}
    for name in state:  # norms whose scales are near one, as trained ones are
        if state[name].ndim == 1 and name.endswith("weight"):
            state[name] += 1.0
    return state


def pair(name, rows, *columns):
    return {f"{name}.weight": (rows, *columns), f"{name}.bias": (rows,)}


def tower(root, num_frames, size, conv="patch_embed.proj", time="time_embed", conv_bias=True):
    places = (size // PATCH) ** 2
    shapes = {f"{root}cls_token": (1, 1, DIM), f"{root}pos_embed": (1, places + 1, DIM)}
    shapes |= pair(f"{root}{conv}", DIM, 3, PATCH, PATCH) | pair(f"{root}norm", DIM)
    if num_frames:
        shapes[f"{root}{time}"] = (1, num_frames, DIM)
    if not conv_bias:
        del shapes[f"{root}{conv}.bias"]
    return shapes


def attention(name):
    return pair(f"{name}.qkv", 3 * DIM, DIM) | pair(f"{name}.proj", DIM, DIM)


def timesformer(attention_type="divided_space_time", num_frames=4, size=32, classes=5):
    shapes = tower("", 0 if attention_type == "space_only" else num_frames, size) | pair("head", classes, DIM)
    for i in range(DEPTH):
        block = f"blocks.{i}."
        shapes |= pair(f"{block}norm1", DIM) | attention(f"{block}attn") | pair(f"{block}norm2", DIM)
        shapes |= pair(f"{block}mlp.fc1", HIDDEN, DIM) | pair(f"{block}mlp.fc2", DIM, HIDDEN)
        if attention_type == "divided_space_time":
            shapes |= pair(f"{block}temporal_norm1", DIM) | attention(f"{block}temporal_attn")
            shapes |= pair(f"{block}temporal_fc", DIM, DIM)
    return drawn(shapes)


def mmaction2(attention_type="divided_space_time", num_frames=4, size=32, classes=5):
    def multihead(name):
        shapes = {f"{name}.in_proj_weight": (3 * DIM, DIM), f"{name}.in_proj_bias": (3 * DIM,)}
        return shapes | pair(f"{name}.out_proj", DIM, DIM)

    frames = 0 if attention_type == "space_only" else num_frames
    shapes = tower("backbone.", frames, size, "patch_embed.projection") | pair("cls_head.fc_cls", classes, DIM)
    for i in range(DEPTH):
        layer = f"backbone.transformer_layers.layers.{i}."
        shapes |= multihead(f"{layer}attentions.0.attn") | pair(f"{layer}ffns.0.layers.0.0", HIDDEN, DIM)
        shapes |= pair(f"{layer}ffns.0.layers.1", DIM, HIDDEN)
        if attention_type == "divided_space_time":
            shapes |= pair(f"{layer}attentions.0.norm", DIM) | pair(f"{layer}attentions.0.temporal_fc", DIM, DIM)
            shapes |= multihead(f"{layer}attentions.1.attn") | pair(f"{layer}attentions.1.norm", DIM)
            shapes |= pair(f"{layer}ffns.0.norm", DIM)
        else:
            shapes |= pair(f"{layer}norms.0", DIM) | pair(f"{layer}norms.1", DIM)
    return drawn(shapes)


def space_time_transformer(root, num_frames, size, is_clip=False, gated=False):
    shapes = tower(root, num_frames, size, time="temporal_embed", conv_bias=not is_clip)
    if is_clip:
        shapes |= pair(f"{root}ln_pre", DIM)
    for i in range(DEPTH):
        block = f"{root}blocks.{i}."
        shapes |= attention(f"{block}attn") | attention(f"{block}timeattn")
        for norm in ("norm1", "norm2", "norm3"):
            shapes |= pair(block + norm, DIM)
        shapes |= pair(f"{block}mlp.fc1", HIDDEN, DIM) | pair(f"{block}mlp.fc2", DIM, HIDDEN)
        if gated:
            shapes[f"{block}alpha_timeattn"] = ()
    return shapes


def frozen_in_time(num_frames=4, size=32):
    shapes = space_time_transformer("video_model.", num_frames, size) | pair("vid_proj.0", 24, DIM)
    shapes |= pair("txt_proj.1", 24, 32) | {"text_model.embeddings.word_embeddings.weight": (50, 32)}
    return drawn(shapes)


def lavila(num_frames=4, size=32, gated=True):
    shapes = space_time_transformer("visual.", num_frames, size, is_clip=True, gated=gated)
    shapes |= {"image_projection": (DIM, 24), "text_projection": (32, 24), "logit_scale": ()}
    shapes |= {"positional_embedding": (16, 32), "token_embedding.weight": (50, 32)} | pair("ln_final", 32)
    shapes |= pair("transformer.resblocks.0.mlp.c_fc", 64, 32)
    return drawn(shapes)
