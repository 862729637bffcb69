"""The timm ViT that a checkpoint's sizes describe: the image model inside most published video models."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from img2vid.backbones.activations import HF_NAMES, name_of
from img2vid.checkpoints.dialect import Foreign
from img2vid.class_names import to_id2label
from img2vid.config import MOST, ConfigError, image_size_pair, real_number, shown, whole_number
from img2vid.errors import WeightsError

if TYPE_CHECKING:
    from img2vid.model import VideoModel

# (width, blocks, heads): timm's name, whose patches are 16 pixels, images 224, MLPs 4 times as wide
NAMED = {
    (192, 12, 3): "vit_tiny_patch16_224",
    (384, 12, 6): "vit_small_patch16_224",
    (768, 12, 12): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224",
}
EPS = 1e-6  # of timm's norms


def plain_vit(
    *,
    dim: int,
    depth: int,
    num_heads: int,
    hidden: int,
    patch_size: tuple[int, int],
    image_size: tuple[int, int],
    in_channels: int = 3,
    qkv_bias: bool = True,
    activation: str = "gelu",
    norm_eps: float | dict[str, float] = EPS,
    **others: Any,
) -> dict[str, Any]:
    """The fields ``backbone``, ``image_size`` and ``backbone_args`` of a ``VideoConfig``.

    Args:
        hidden: width of the MLPs.
        activation, norm_eps: timm's name of the one, and the other, where they are not timm's own.
        others: further arguments of timm's VisionTransformer, such as ``pre_norm=True``.
    """
    name = NAMED.get((dim, depth, num_heads))
    arguments: dict[str, Any] = dict(others)
    if name is None:
        name = NAMED[768, 12, 12]
        arguments.update(embed_dim=dim, depth=depth, num_heads=num_heads)
    if patch_size != (16, 16):
        arguments["patch_size"] = patch_size[0] if patch_size[0] == patch_size[1] else list(patch_size)
    if hidden != 4 * dim:
        ratio = hidden / dim
        arguments["mlp_ratio"] = ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim  # timm rounds down
    if in_channels != 3:
        arguments["in_chans"] = in_channels
    if not qkv_bias:
        arguments["qkv_bias"] = False
    if activation != "gelu":
        arguments["act_layer"] = activation
    if norm_eps != EPS:
        arguments["norm_eps"] = norm_eps
    return {
        "backbone": f"timm:{name}",
        "image_size": None if image_size == (224, 224) else image_size,
        "backbone_args": arguments,
    }


def heads_of(file: Foreign, dim: int, said_by: str) -> int:
    """Heads as given; else 64 wide each, as in every published ViT of these dialects, and said so."""
    if file.num_heads is not None:
        if file.num_heads < 1 or dim % file.num_heads:
            raise WeightsError(
                f"num_heads={file.num_heads}, but tokens of {dim} (by {said_by}) do not divide into so many heads."
            )
        return file.num_heads
    if dim % 64:
        raise WeightsError(
            f"{file.path} does not say how many attention heads it has, and its tokens of {dim} (by {said_by}) are no "
            "multiple of 64. Give num_heads (--num-heads)."
        )
    file.notes.append(f"{dim // 64} attention heads, 64 wide each; no state dict says how many (--num-heads).")
    return dim // 64


def square(file: Foreign, table: str, patch_size: tuple[int, int]) -> tuple[int, int]:
    """Pixels of the square image whose patches, after a class token, have their positions in ``table``."""
    num_places = file.require(table, "1 1+N D").shape[1] - 1
    side = math.isqrt(num_places)
    if side**2 != num_places or not side:
        raise WeightsError(
            f"{file.path}: {table} has positions for {num_places} patches, which are no square, as those of published "
            "models are."
        )
    return side * patch_size[0], side * patch_size[1]


def sizes_of(file: Foreign, *, block: str, conv: str, fc1: str, qkv: str) -> dict[str, Any]:
    """Sizes that state dicts show by themselves.

    Args:
        block: what names of blocks begin with, ``{i}`` for the number.
        conv, fc1, qkv: names of the patch projection, and inside a block of the MLP's first and the attention's input
            projection.
    """
    weight = file.require(f"{conv}.weight", "D C h w")
    dim = weight.shape[0]
    numbers = [re.match(re.escape(block).replace(re.escape("{i}"), r"(\d+)"), key) for key in file.state]
    depth = 1 + max((int(found[1]) for found in numbers if found), default=0)
    first = block.replace("{i}", "0")
    return {
        "dim": dim,
        "depth": depth,
        "num_heads": heads_of(file, dim, f"{conv}.weight"),
        "hidden": file.require(f"{first}{fc1}.weight", "hidden D").shape[0],
        "patch_size": tuple(weight.shape[-2:]),
        "in_channels": weight.shape[1],
        "qkv_bias": file.has(block + qkv),
    }


def from_hf(file: Foreign, config: dict[str, Any]) -> dict[str, Any]:
    """The same of a transformers ViT, from its ``config.json``."""
    act = config.get("hidden_act", "gelu")
    if not isinstance(act, str) or act not in HF_NAMES:
        raise WeightsError(
            f"{file.path}: hidden_act is {act!r}, which timm does not have. Known: {', '.join(HF_NAMES)}."
        )
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        whole_number(name, config[name])
    if config["hidden_size"] % config["num_attention_heads"]:
        raise ConfigError(
            f"num_attention_heads is {config['num_attention_heads']}, which hidden_size {config['hidden_size']} does "
            "not divide into."
        )
    size, qkv_bias = image_size_pair(config["image_size"]), config.get("qkv_bias", True)
    if not isinstance(qkv_bias, bool):
        raise ConfigError(f"qkv_bias={shown(qkv_bias)}: expected true or false.")
    return {
        "dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "hidden": config["intermediate_size"],
        "image_size": size,
        "in_channels": whole_number("num_channels", config.get("num_channels", 3), most=MOST["num_channels"]),
        "qkv_bias": qkv_bias,
        "activation": HF_NAMES[act],
        "norm_eps": real_number("layer_norm_eps", config.get("layer_norm_eps", EPS), least=0.0),
    }


def to_hf(model: VideoModel, bare: str, with_classifier: str) -> dict[str, Any]:
    """The fields of a transformers ``config.json`` that describe the ViT inside a model, read off its modules.

    Args:
        bare, with_classifier: transformers' classes for a model without and with one.
    """
    trunk, classes = model.base, model.config.num_classes
    block = trunk.blocks[0]
    act = name_of(block.mlp.act)
    if act not in HF_NAMES.values():
        raise WeightsError(f"transformers has no name for the activation {type(block.mlp.act).__name__}.")
    hidden_act = {"gelu_tanh": "gelu_pytorch_tanh"}.get(act, act)
    height, width = model.tower.image_size
    if height != width:
        raise WeightsError(f"transformers' models of this kind take square images, not {height} x {width}.")
    described: dict[str, Any] = {
        "architectures": [bare if classes is None else with_classifier],
        "hidden_size": trunk.embed_dim,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": hidden_act,
        "image_size": height,
        "num_channels": model.tower.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
        "layer_norm_eps": block.norm1.eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if classes is not None:
        described |= to_id2label(model.class_names, classes)
    return described
