"""LaViLa's video towers (Zhao et al. 2022, arXiv:2212.04501; github.com/facebookresearch/LaViLa).

Frozen in Time's space-time block inside OpenAI's CLIP tower: a norm before the blocks (to which the time embedding is
added), quick-GELU, and where it was trained so, a tanh gate on attention along time. In LaViLa's code ``ln_pre`` and
quick-GELU always come together, so the one in a file says the other. ``image_projection`` becomes the tower's head; the
text tower, or the narrator's decoder, is dropped.
"""

from __future__ import annotations

import torch

from img2vid.backbones.tower import Preprocess
from img2vid.checkpoints.dialect import Dialect, Foreign
from img2vid.checkpoints.frozen_in_time import FROZEN_IN_TIME, SETTINGS, TOWER, described_tower
from img2vid.checkpoints.plain_vit import EPS
from img2vid.config import VideoConfig
from img2vid.errors import WeightsError
from img2vid.weights.keytable import State

PREFIX = "visual."
TABLE = (
    *((PREFIX + theirs, ours) for theirs, ours in TOWER),
    # LaViLa                             img2vid
    ("visual.ln_pre", "norm_pre"),
    ("visual.blocks.{i}.alpha_timeattn", "blocks.{i}.temporal_fc.alpha"),
    ("image_projection.0", "head"),
    ("fc_cls", "classifier"),
)
PROJECTION = "image_projection"  # (D, E), without bias, in models with OpenAI's text tower


def unpack(state: State, config: VideoConfig | None = None) -> State:
    """A gate is one number, of shape (1) with us; a projection is a Linear, whose bias is zero where they have none."""
    state = {key: t.reshape(1) if key.endswith(".alpha_timeattn") and t.ndim == 0 else t for key, t in state.items()}
    if PROJECTION in state and state[PROJECTION].ndim == 2:
        weight = state.pop(PROJECTION).T.contiguous()
        bias = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
        state |= {f"{PROJECTION}.0.weight": weight, f"{PROJECTION}.0.bias": bias}
    return state


def pack(state: State, config: VideoConfig) -> State:
    state = {key: tensor.reshape(()) if key.endswith(".alpha_timeattn") else tensor for key, tensor in state.items()}
    if f"{PROJECTION}.0.weight" in state and "visual.ln_pre.weight" in state:
        bias = state.pop(f"{PROJECTION}.0.bias")
        if not bias.is_meta and bool(bias.any()):
            raise WeightsError("LaViLa's image_projection has no bias, but this model's head has one that is not zero.")
        state[PROJECTION] = state.pop(f"{PROJECTION}.0.weight").T.contiguous()
    return state


def describe(file: Foreign) -> VideoConfig:
    state = unpack(LAVILA.with_prefix(file.state))
    named = Foreign(file.path, state)
    is_clip = f"{PREFIX}ln_pre.weight" in state
    if file.pixels is None and not is_clip:  # its towers without CLIP's weights saw ImageNet's statistics
        file.pixels = FROZEN_IN_TIME.pixels
    clip = {"pre_norm": True, "activation": "quick_gelu", "norm_eps": {"norm_pre": 1e-5, "": EPS}} if is_clip else {}
    return described_tower(
        file,
        state,
        PREFIX,
        head=f"{PROJECTION}.0",
        arguments=clip,
        gate="tanh" if named.has(f"{PREFIX}blocks.{{i}}.alpha_timeattn") else "none",
        num_classes=named.num_outputs("fc_cls"),
        **{**SETTINGS, "quirks": (*SETTINGS["quirks"], *(["time_before_norm_pre"] if is_clip else []))},
    )


def recognise(file: Foreign) -> bool:
    return any(key.startswith(f"{PREFIX}blocks.0.timeattn.") for key in file.state)


LAVILA = Dialect(
    name="lavila",
    title="LaViLa's video tower",
    table=TABLE,
    describe=describe,
    recognise=recognise,
    prefix=PREFIX,
    dropped=(
        r"(transformer|token_embedding|ln_final|textual|text_decoder)\..*",
        r"(positional_embedding|logit_scale)",
        r"text_projection(\..*)?",
        r"img_(queries|attn_pool(_norm)?)(\..*)?",
    ),
    unpack=unpack,
    pack=pack,
    wrapper=("state_dict", "module."),
    pixels=Preprocess((0.424813, 0.457827, 0.408211), (0.268629, 0.261303, 0.275777), "bicubic"),
)
