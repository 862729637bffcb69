"""Local weights files into open_clip models, both towers, every key accounted for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from img2vid.backbones.activations import activations_of, set_activation
from img2vid.backbones.image_files import ImageFile, read_image_file
from img2vid.backbones.timm_weights import to_timm_layout
from img2vid.backbones.tower import ImageTower
from img2vid.errors import WeightsError
from img2vid.temporal.embeddings import resample_pos_embed
from img2vid.weights.accounting import LoadReport, load_weights, short

# sizes that OpenAI kept among the weights, and a table that transformers once saved
DROPPED = [
    r"input_resolution|context_length|vocab_size",
    r"text\.transformer\.embeddings\.position_ids",
    r"(.*\.)?attn_mask",  # a table that archives keep and models make themselves
]


def load_file(model: nn.Module, tower: ImageTower, path: str | Path) -> tuple[LoadReport, dict[str, Any]]:
    """Load a local weights file or a folder of transformers; MobileCLIP's layout and CLIP's older one are made the
    model's.

    Returns:
        Where every key went; and arguments that a model for these weights is built with, beyond what it was.

    Raises:
        WeightsError: it cannot be read, is of another architecture or patch size, or its keys do not fit.
    """
    file = read_image_file(path)
    try:
        state = convert_state_dict(model, dict(file.state))
        if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
    except (KeyError, RuntimeError, ValueError, AttributeError, IndexError) as error:
        raise WeightsError(f"{path} is in no layout that open_clip knows ({short(error)}).") from error
    notes, own = file.notes, model.state_dict()
    for key in ("logit_scale", "logit_bias"):  # a number, or a list of one
        if key in state and key in own and state[key].numel() == own[key].numel() == 1:
            state[key] = state[key].reshape(own[key].shape)
    if "logit_bias" in own and "logit_bias" not in state:  # of a SigLIP model from CLIP weights, which have none
        state["logit_bias"] = torch.zeros_like(own["logit_bias"])
        notes.append("logit_bias is not in the file and was set to zero, which changes nothing.")
    resampled = fit_positions(model.visual, tower, state, str(path))
    report = load_weights(model, state, allow_dropped=DROPPED, source=str(path))
    check_function(model, tower, file, path)  # of weights that fit
    if file.pixels is not None:
        model.visual.preprocess_cfg = {**(getattr(model.visual, "preprocess_cfg", None) or {}), **vars(file.pixels)}
    report.resampled, report.notes = resampled, notes
    changed = take_activation(model, file, notes)
    return report, {"activation": changed} if changed else {}


def take_activation(model: nn.Module, file: ImageFile, notes: list[str]) -> dict[str, str]:
    """Give the towers the activations that the file says its weights were trained with; which ones that changed."""
    text = "text" if hasattr(model, "text") else "transformer"
    changed = {}
    for path, wanted in (("visual", file.activation), (text, file.text.get("activation"))):
        own = activations_of(model.get_submodule(path))
        if wanted is not None and own and own != [wanted]:
            changed[path] = wanted
            notes.append(f"The activation of {path} is {wanted} now, as in the file, instead of {', '.join(own)}.")
    set_activation(model, changed)
    return changed


def check_function(model: nn.Module, tower: ImageTower, file: ImageFile, path: str | Path) -> None:
    """Refuse weights whose file says that they were trained in another function than the model's.

    Raises:
        WeightsError: another number of heads, or another ``eps`` in the norms.
    """
    blocks = [block for _, block in tower.blocks]
    text = getattr(model, "text", model)
    text_blocks = list(getattr(getattr(text, "transformer", None), "resblocks", ()))
    for which, own, heads, eps in (
        ("image tower", blocks, file.num_heads, file.norm_eps),
        ("text tower", text_blocks, file.text.get("num_heads"), file.text.get("norm_eps")),
    ):
        if not own:
            continue
        found = {"attention heads": own[0].attn.num_heads, "as eps of its norms": norm_of(own[0]).eps}
        for what, expected in (("attention heads", heads), ("as eps of its norms", eps)):
            if expected is not None and found[what] != expected:
                raise WeightsError(
                    f"{path}: the {which} has {expected} {what}, the model built here {found[what]}: its weights would "
                    "fit and be another function. Choose the architecture that has it."
                )


def norm_of(block: nn.Module) -> nn.Module:
    return block.norm1 if hasattr(block, "norm1") else block.ln_1


def fit_positions(visual: nn.Module, tower: ImageTower, state: dict[str, Tensor], source: str) -> list[str]:
    """Bring the image tower's position embedding to the model's grid, in place; says what was resampled."""
    if isinstance(visual, TimmModel):
        prefix, key = "visual.trunk.", "visual.trunk.pos_embed"
        own = getattr(visual.trunk, "pos_embed", None)
        if own is None or key not in state or state[key].shape == own.shape:
            return []
        trunk = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        converted, resampled, _ = to_timm_layout(visual.trunk, trunk, source)
        state.update({prefix + name: tensor for name, tensor in converted.items()})
        return [prefix + text for text in resampled]
    key, grid = "visual.positional_embedding", tuple(visual.grid_size)
    num_prefix = tower.num_prefix_tokens
    given = state.get(key)  # (P + h*w, D)
    if given is None or given.shape[0] == num_prefix + math.prod(grid):
        return []
    side = math.isqrt(max(given.shape[0] - num_prefix, 0))
    if side**2 + num_prefix != given.shape[0]:
        raise WeightsError(
            f"{source}: {key} has {given.shape[0]} entries, no square grid beside {num_prefix} class token, so they "
            f"cannot be resampled to {grid[0]} x {grid[1]}. Load them at their own image_size."
        )
    state[key] = resample_pos_embed(given.unsqueeze(0), grid, (side, side), num_prefix).squeeze(0)
    return [f"{key} (grid {side} x {side} to {grid[0]} x {grid[1]})"]
