"""What a tower's blocks are made of, whatever its library calls it: attentions, MLPs, and the linear maps in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from img2vid.backbones.reading import ATTENTIONS, read_block, row
from img2vid.backbones.tower import ImageTower

# what a map is for, by its place: attention over space, attention along time, the MLP
ROLES = ("attn.qkv", "attn.proj", "attn.gate", "temporal_attn.qkv", "temporal_attn.proj", "mlp.fc1", "mlp.fc2")

OUTPUTS = ("proj", "out_proj", "o_proj", "projection", "attn_out_proj")  # an attention's output projection


@dataclass(frozen=True)
class LinearMap:
    """A weight (out, in) inside a block.

    Args:
        path: of the module that holds it, below the image tower.
        host: that module; an attention, where its input projection is a bare parameter (``in_proj_weight``).
        weight: the parameter's name in it.
        roles: of ``ROLES``; two where attention and MLP share one matrix.
        is_called: whether the library calls the module; otherwise it reads the weight and multiplies by itself.
        attention: the attention it is in, if any.
    """

    path: str
    host: nn.Module
    weight: str
    roles: tuple[str, ...]
    is_called: bool = True
    attention: nn.Module | None = None


def sublayers(block: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """The attentions over space and the MLPs of a block, as (``attn`` | ``mlp``, path below the block, module).

    Empty where both are one module with the block itself.
    """
    found: list[tuple[str, str, nn.Module]] = []
    for name, module in block.named_modules():
        if not name or is_ours(name) or is_of_position(name):
            continue
        if row(ATTENTIONS, module) is not None:
            found.append(("attn", name, module))
        elif name.rpartition(".")[2] == "mlp":
            found.append(("mlp", name, module))
    return found


def is_ours(name: str) -> bool:
    """Whether a path below a block leads to what img2vid has put there."""
    return name.startswith("temporal_") or "graft_" in f".{name}"


def is_of_position(name: str) -> bool:
    """Whether it makes a relative position bias, of which some attentions have a small MLP of their own."""
    return ".rel_pos." in name


def linear_maps(tower: ImageTower) -> list[list[LinearMap]]:
    """Those of each block, in order."""
    return [list(maps_of_block(path, block)) for path, block in tower.blocks]


def maps_of_block(path: str, block: nn.Module) -> Iterator[LinearMap]:
    attentions = {
        name: module
        for name, module in block.named_modules()
        if row(ATTENTIONS, module) is not None and "graft_" not in name
    }
    dim = read_block(block).dim
    for name, module in block.named_modules():
        if "graft_" in f".{name}" or is_of_position(name):
            continue
        inside = [a for a in attentions if name == a or name.startswith(f"{a}." if a else "")]
        holder = attentions[max(inside, key=len)] if inside else None
        full = f"{path}.{name}" if name else path
        if "in_proj_weight" in module._parameters and module._parameters["in_proj_weight"] is not None:
            yield LinearMap(full, module, "in_proj_weight", ("attn.qkv",), False, module)
        elif isinstance(module, nn.Linear):
            roles = roles_of(name, module, block, holder, dim)
            if roles:
                yield LinearMap(full, module, "weight", roles, is_called(name, holder), holder)


def roles_of(name: str, module: nn.Linear, block: nn.Module, holder: nn.Module | None, dim: int) -> tuple[str, ...]:
    """What a Linear at ``name`` below its block is for; nothing where it is a gate of ours."""
    leaf = name.rpartition(".")[2]
    if leaf == "bridge":  # to the next part of a stitched model
        return ()
    is_output = leaf in OUTPUTS
    if name.startswith("temporal_attn."):
        return ("temporal_attn.proj" if is_output else "temporal_attn.qkv",)
    if name.startswith("temporal_"):
        return ()
    if holder is block:  # attention and MLP side by side, in one matrix or in two
        if leaf == "in_proj":
            return "attn.qkv", "mlp.fc1"
        return {"out_proj": ("attn.proj", "mlp.fc2"), "attn_out_proj": ("attn.proj",)}.get(leaf, ("mlp.fc2",))
    if holder is not None:
        return ("attn.proj" if is_output else "attn.gate" if leaf == "gate" else "attn.qkv",)
    return ("mlp.fc1" if module.in_features == dim and leaf not in ("fc2", "w3", "c_proj") else "mlp.fc2",)


def is_called(name: str, holder: nn.Module | None) -> bool:
    """EVA and BEiT read the weight of ``qkv`` where its bias is in pieces; PyTorch's attention that of ``out_proj``."""
    leaf = name.rpartition(".")[2]
    if isinstance(holder, nn.MultiheadAttention):
        return False
    in_pieces = getattr(holder, "q_bias", None) is not None and not getattr(holder, "qkv_bias_separate", True)
    return not (leaf == "qkv" and in_pieces)
