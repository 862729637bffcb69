"""An image checkpoint as a user has it (a weights file, a TorchScript archive, a folder of transformers), read for timm
and open_clip; and what it says of itself beyond weights: activation and norms, which must be the model's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from img2vid.backbones.activations import ACTIVATIONS, HF_NAMES
from img2vid.backbones.hf_folder import read_config, read_folder, read_pixels
from img2vid.backbones.hf_layouts import from_hf_layout, layout_of
from img2vid.backbones.tower import Preprocess
from img2vid.errors import WeightsError
from img2vid.weights.accounting import in_a_row, read_weights
from img2vid.weights.keytable import State

OPENAI = {"input_resolution", "context_length", "vocab_size"}  # among the weights of OpenAI's CLIPs, and no other's
DEFAULTS = {  # hidden_act, layer_norm_eps, num_attention_heads that transformers' classes have
    "clip": ("quick_gelu", 1e-5, 12),
    "siglip": ("gelu_pytorch_tanh", 1e-6, 12),
    "vit": ("gelu", 1e-12, 12),
    "deit": ("gelu", 1e-12, 12),
    "dinov2": ("gelu", 1e-6, 12),
}


@dataclass
class ImageFile:
    """Args:
    state: tensors under names that the image libraries read.
    activation, norm_eps: of the image tower, None where nothing says.
    num_heads: of its attention, None where nothing says.
    pixels: how they were prepared, None where nothing says.
    text: activation, norms and heads of the text tower.
    """

    state: State
    notes: list[str] = field(default_factory=list)
    activation: str | None = None
    norm_eps: float | None = None
    num_heads: int | None = None
    pixels: Preprocess | None = None
    text: dict[str, Any] = field(default_factory=dict)


def read_image_file(path: str | Path) -> ImageFile:
    """
    Raises:
        WeightsError: it cannot be read, or is no checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        config = read_config(path)
        kind = str(config.get("model_type", ""))
        tower, text = config.get("vision_config", config), config.get("text_config")
        file = ImageFile(read_folder(path), **facts(tower, kind), text={} if text is None else facts(text, kind))
        file.pixels = read_pixels(path)
        if kind.startswith("clip"):  # whose text towers have half the heads by default
            file.text["num_heads"] = text.get("num_attention_heads", 8) if text else None
    else:
        found = read_weights(path)
        quick = "quick_gelu" if found.state.keys() >= OPENAI else None
        file = ImageFile(found.state, found.notes, activation=found.activation or quick)
        file.text = {} if file.activation is None else {"activation": file.activation}
    for act in (file.activation, file.text.get("activation")):
        if act is not None and act not in ACTIVATIONS:
            raise WeightsError(f"{path}: hidden_act is {act!r}; known are {', '.join(ACTIVATIONS)}.")
    layout = layout_of(file.state)
    if layout is not None:
        file.state, dropped = from_hf_layout(file.state, layout)
        if file.activation is None:
            file.notes.append("The activation is not in the weights; give the folder, whose config.json says it.")
        if dropped:
            file.notes.append(f"Dropped on purpose: {in_a_row(dropped)}.")
    return file


def facts(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """What a ``config.json`` says; a value it leaves out is its class's own, as transformers reads it."""
    act, eps, heads = next((own for name, own in DEFAULTS.items() if kind.startswith(name)), (None, None, None))
    act = "silu" if config.get("use_swiglu_ffn") else config.get("hidden_act", act)
    return {
        "activation": HF_NAMES.get(act, act),
        "norm_eps": config.get("layer_norm_eps", eps),
        "num_heads": config.get("num_attention_heads", heads),
    }
