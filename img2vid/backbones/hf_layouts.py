"""Image checkpoints of transformers, in the layouts that the image libraries' own readers take.

transformers keeps queries, keys and values apart and has names of its own for ViT, DINOv2, CLIP and SigLIP. Here they
get the names of the models' first publications (timm's ViT, DINOv2's and OpenAI's repositories), or open_clip's for
SigLIP, from where timm and open_clip read on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from img2vid.weights.accounting import matches
from img2vid.weights.keytable import State, Table, renamed, to_ours


def block_rows(theirs: str, ours: str, rows: Table) -> Table:
    return tuple((f"{theirs}.{{i}}.{a}", f"{ours}.{{i}}.{b}") for a, b in rows)


VIT: Table = (
    # transformers                             timm
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("encoder.layer.{i}.layernorm_before", "blocks.{i}.norm1"),
    ("encoder.layer.{i}.attention.attention.query", "blocks.{i}.attn.qkv[q]"),
    ("encoder.layer.{i}.attention.attention.key", "blocks.{i}.attn.qkv[k]"),
    ("encoder.layer.{i}.attention.attention.value", "blocks.{i}.attn.qkv[v]"),
    ("encoder.layer.{i}.attention.output.dense", "blocks.{i}.attn.proj"),
    ("encoder.layer.{i}.layernorm_after", "blocks.{i}.norm2"),
    ("encoder.layer.{i}.intermediate.dense", "blocks.{i}.mlp.fc1"),
    ("encoder.layer.{i}.output.dense", "blocks.{i}.mlp.fc2"),
    ("layernorm", "norm"),
    ("classifier", "head"),
)
DINOV2: Table = (
    # transformers                             facebookresearch/dinov2
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.register_tokens", "register_tokens"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("encoder.layer.{i}.norm1", "blocks.{i}.norm1"),
    ("encoder.layer.{i}.attention.attention.query", "blocks.{i}.attn.qkv[q]"),
    ("encoder.layer.{i}.attention.attention.key", "blocks.{i}.attn.qkv[k]"),
    ("encoder.layer.{i}.attention.attention.value", "blocks.{i}.attn.qkv[v]"),
    ("encoder.layer.{i}.attention.output.dense", "blocks.{i}.attn.proj"),
    ("encoder.layer.{i}.layer_scale1.lambda1", "blocks.{i}.ls1.gamma"),
    ("encoder.layer.{i}.norm2", "blocks.{i}.norm2"),
    ("encoder.layer.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
    ("encoder.layer.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
    ("encoder.layer.{i}.mlp.weights_in", "blocks.{i}.mlp.w12"),
    ("encoder.layer.{i}.mlp.weights_out", "blocks.{i}.mlp.w3"),
    ("encoder.layer.{i}.layer_scale2.lambda1", "blocks.{i}.ls2.gamma"),
    ("layernorm", "norm"),
)
CLIP_BLOCK: Table = (
    # transformers                             openai/CLIP
    ("self_attn.q_proj.weight", "attn.in_proj_weight[q]"),
    ("self_attn.k_proj.weight", "attn.in_proj_weight[k]"),
    ("self_attn.v_proj.weight", "attn.in_proj_weight[v]"),
    ("self_attn.q_proj.bias", "attn.in_proj_bias[q]"),
    ("self_attn.k_proj.bias", "attn.in_proj_bias[k]"),
    ("self_attn.v_proj.bias", "attn.in_proj_bias[v]"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)
CLIP: Table = (
    # transformers                             openai/CLIP
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("visual_projection.weight", "visual.proj"),  # transposed
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_projection.weight", "text_projection"),  # transposed
    ("logit_scale", "logit_scale"),
    *block_rows("vision_model.encoder.layers", "visual.transformer.resblocks", CLIP_BLOCK),
    *block_rows("text_model.encoder.layers", "transformer.resblocks", CLIP_BLOCK),
)
SIGLIP_BLOCK: Table = (
    # transformers                             timm
    ("self_attn.q_proj", "attn.qkv[q]"),
    ("self_attn.k_proj", "attn.qkv[k]"),
    ("self_attn.v_proj", "attn.qkv[v]"),
    ("self_attn.out_proj", "attn.proj"),
    ("layer_norm1", "norm1"),
    ("layer_norm2", "norm2"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
)
SIGLIP: Table = (
    # transformers                             open_clip
    ("vision_model.embeddings.patch_embedding", "visual.trunk.patch_embed.proj"),
    ("vision_model.embeddings.position_embedding.weight", "visual.trunk.pos_embed"),  # one axis more
    ("vision_model.post_layernorm", "visual.trunk.norm"),
    ("vision_model.head.probe", "visual.trunk.attn_pool.latent"),
    ("vision_model.head.attention.query", "visual.trunk.attn_pool.q"),
    ("vision_model.head.attention.key_value", "visual.trunk.attn_pool.kv"),
    ("vision_model.head.attention.out_proj", "visual.trunk.attn_pool.proj"),
    ("vision_model.head.layernorm", "visual.trunk.attn_pool.norm"),
    ("vision_model.head.mlp.fc1", "visual.trunk.attn_pool.mlp.fc1"),
    ("vision_model.head.mlp.fc2", "visual.trunk.attn_pool.mlp.fc2"),
    ("text_model.embeddings.token_embedding", "text.token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "text.positional_embedding"),
    ("text_model.final_layer_norm", "text.ln_final"),
    ("text_model.head", "text.text_projection"),
    ("logit_scale", "logit_scale"),
    ("logit_bias", "logit_bias"),
    *block_rows("vision_model.encoder.layers", "visual.trunk.blocks", SIGLIP_BLOCK),
    *block_rows("text_model.encoder.layers", "text.transformer.resblocks", CLIP_BLOCK),
)
TRANSPOSED = ("visual_projection.weight", "text_projection.weight")
POOL = "vision_model.head.attention.in_proj_"


def transposed(state: State) -> State:
    return {key: tensor.T.contiguous() if key in TRANSPOSED else tensor for key, tensor in state.items()}


def siglip_pieces(state: State) -> State:
    """The pooling attention's queries apart from its keys and values, and positions with a batch axis."""
    state = dict(state)
    for leaf in ("weight", "bias"):
        if POOL + leaf in state:
            q, kv = state.pop(POOL + leaf).tensor_split([len(state["vision_model.post_layernorm.weight"])])
            state |= {f"{POOL[:-8]}query.{leaf}": q, f"{POOL[:-8]}key_value.{leaf}": kv}
    positions = "vision_model.embeddings.position_embedding.weight"
    if positions in state:
        state[positions] = state[positions].unsqueeze(0)
    return state


@dataclass(frozen=True)
class HFLayout:
    """Args:
    mark: a key that only checkpoints of this layout have, without ``prefix``.
    prefixes: what names may begin with in files of a whole model.
    dropped: keys without a place in an image tower.
    """

    title: str
    mark: str
    table: Table
    prefixes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    prepare: Callable[[State], State] = dict


LAYOUTS = (
    HFLayout(
        "transformers' DINOv2", "encoder.layer.0.layer_scale1.lambda1", DINOV2, ("dinov2_with_registers.", "dinov2.")
    ),
    HFLayout(
        "transformers' ViT",
        "encoder.layer.0.layernorm_before.weight",
        VIT,
        ("vit.", "deit."),
        (r"pooler\.dense\..*", r"embeddings\.mask_token"),
    ),
    HFLayout("transformers' SigLIP", "vision_model.head.probe", SIGLIP, (), (r".*\.position_ids",), siglip_pieces),
    HFLayout("transformers' CLIP", "vision_model.pre_layrnorm.weight", CLIP, (), (r".*\.position_ids",), transposed),
)


def layout_of(state: State) -> HFLayout | None:
    """Whose layout a state dict has; None where it is none of transformers'."""
    for layout in LAYOUTS:
        if any(prefix + layout.mark in state for prefix in ("", *layout.prefixes)):
            return layout
    return None


def from_hf_layout(state: State, layout: HFLayout) -> tuple[State, list[str]]:
    """Under the names that image libraries read, and the keys that were dropped on purpose.

    Keys that the table does not know stay as they are, for strict loading to name them.
    """
    plain = {}
    for key, tensor in state.items():
        prefix = next((p for p in layout.prefixes if key.startswith(p)), "")
        plain[key.removeprefix(prefix)] = tensor
    plain = layout.prepare(plain)
    dropped = sorted(key for key in plain if matches(key, layout.dropped))
    unknown = {k: t for k, t in plain.items() if k not in dropped and renamed(k, layout.table) is None}
    return to_ours(plain, layout.table) | unknown, dropped
