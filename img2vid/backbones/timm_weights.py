"""Local weights files into timm models, through timm's own readers of foreign layouts.

Those readers (``checkpoint_filter_fn``, one an architecture) rename, merge, leave out and resample without a word.
Here what they resample is watched: position tables for another image size are wanted and reported, patch projections
for another patch size are another model and refused.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import _builder, vision_transformer
from torch import Tensor, nn

from img2vid.backbones.activations import activations_of, set_activation
from img2vid.backbones.building import set_norm_eps
from img2vid.backbones.image_files import ImageFile, read_image_file
from img2vid.errors import WeightsError
from img2vid.weights.accounting import LoadReport, in_a_row, listed, load_weights, short

DECODER_KEYS = [r"decoder_(embed|pred|norm)\.(weight|bias)", r"decoder_pos_embed", r"decoder_blocks\..*", r"mask_token"]
CLASSIFIER_KEYS = [r"(head|head_dist|fc|head\.fc)\.(weight|bias)"]


def load_file(model: nn.Module, path: str | Path) -> tuple[LoadReport, dict[str, Any]]:
    """Load a local weights file, or a folder of transformers; a classifier in it is dropped, for which a feature
    extractor has no place, and so is the decoder of a masked autoencoder.

    Returns:
        Where every key went; and arguments that a model for these weights is built with, beyond what it was.

    Raises:
        WeightsError: it cannot be read, is of another architecture or patch size, or its keys do not fit.
    """
    file = read_image_file(path)
    try:
        state, resampled, left_out = to_timm_layout(model, file.state, str(path))
        report = load_weights(model, state, allow_dropped=[*CLASSIFIER_KEYS, *DECODER_KEYS], source=str(path))
    except WeightsError as error:
        if not (hint := grid_hint(model, file.state)):
            raise
        raise WeightsError(f"{error} {hint}") from error
    check_heads(model, file, path)  # of weights that fit
    report.resampled, report.notes = resampled, file.notes
    if left_out:
        report.notes.append(f"Merged into others or left out by timm's reader: {in_a_row(left_out)}.")
    rows, columns = grid_of(model) or (0, 0)
    if rows != columns and "pos_embed" in report.loaded and not resampled:
        report.notes.append(
            f"pos_embed was taken for a grid of {rows} rows x {columns} columns, which a file does not say: one of "
            f"{columns} x {rows} would have fitted too."
        )
    return report, take_function(model, file, report)


@contextmanager
def accounted(name: str) -> Iterator[LoadReport]:
    """Inside, pretrained weights that timm itself loads fill all parameters; the report has what they hold beyond.

    Without a classifier timm loads with ``strict=False``: what arguments have added would stay as it was drawn.

    Raises:
        WeightsError: parameters that the weights do not hold.
    """
    report, load = LoadReport(), _builder.load_pretrained

    def note(model: nn.Module, keys: Any) -> None:
        learned = {key for key, _ in model.named_parameters()}  # tables are computed
        report.missing += sorted(learned.intersection(keys.missing_keys))
        report.dropped += sorted(keys.unexpected_keys)

    def noting(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        hook = model.register_load_state_dict_post_hook(note)
        try:
            load(model, *args, **kwargs)
        finally:
            hook.remove()

    with WATCHING:
        _builder.load_pretrained = noting
        try:
            yield report
        finally:
            _builder.load_pretrained = load
    if report.missing:
        raise WeightsError(
            f"The pretrained weights of {name} do not fill this model, timm would leave these at random:\n"
            f"{listed(report.missing)}\nArguments that change the architecture need --random-weights, or --weights "
            "FILE with weights of that architecture."
        )


def check_heads(model: nn.Module, file: ImageFile, path: str | Path) -> None:
    blocks = list(getattr(model, "blocks", ()))
    heads = next((block.attn.num_heads for block in blocks if hasattr(getattr(block, "attn", None), "num_heads")), None)
    if file.num_heads is not None and heads not in (None, file.num_heads):
        raise WeightsError(f"{path} has {file.num_heads} attention heads, the model built here {heads}.")


def take_function(model: nn.Module, file: ImageFile, report: LoadReport) -> dict[str, Any]:
    """Give the model what the file says beyond weights: pixels, activation, norms. What was changed is in ``report``.

    Returns:
        The arguments that build such a model.
    """
    if file.pixels is not None:
        model.pretrained_cfg = {**(getattr(model, "pretrained_cfg", None) or {}), **vars(file.pixels)}
    learned: dict[str, Any] = {}
    own = activations_of(model)
    if file.activation is not None and own and own != [file.activation]:
        set_activation(model, file.activation)
        learned["activation"] = file.activation
        report.notes.append(
            f"Its activation is {file.activation}, and so is the model's now, instead of {in_a_row(own)}."
        )
    if file.norm_eps is not None and any(eps != file.norm_eps for eps in norm_eps_of(model)):
        set_norm_eps(model, file.norm_eps)
        learned["norm_eps"] = file.norm_eps
        report.notes.append(f"Its norms add {file.norm_eps} to a variance, and so does the model now.")
    return learned


def norm_eps_of(model: nn.Module) -> set[float]:
    return {module.eps for module in model.modules() if isinstance(getattr(module, "eps", None), float)}


def grid_of(model: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of patches that a learned position table of the model stands for."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return tuple(grid) if grid is not None and isinstance(getattr(model, "pos_embed", None), Tensor) else None


def grid_hint(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """What to do where a table is no square, for which timm takes every one of another size."""
    given, grid = state.get("pos_embed"), grid_of(model)
    if given is None or grid is None or given.ndim != 3:
        return ""
    entries = given.shape[1] - (model.pos_embed.shape[1] - math.prod(grid))
    if math.isqrt(max(entries, 0)) ** 2 == entries:
        return ""
    return (
        f"Its pos_embed is a table of {entries} patches, no square, and the model's grid {grid[0]} x {grid[1]}. Say "
        "at which size (height, width) it was trained, backbone_args={'img_size': (256, 128)} or --backbone-args "
        "'{\"img_size\": [256, 128]}'; image_size stays the size you want."
    )


def to_timm_layout(
    model: nn.Module, state: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """``state`` under timm's names and at the model's sizes; what was resampled; and what did not arrive as it was."""
    to_timm = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if to_timm is None:
        return dict(state), [], []
    try:
        with watched(sys.modules[to_timm.__module__], vision_transformer) as seen:
            converted = to_timm(dict(state), model)
    except (KeyError, RuntimeError, ValueError, AttributeError, IndexError, AssertionError) as error:
        raise WeightsError(
            f"{source} is in no layout that timm knows for {type(model).__name__} ({short(error)})."
        ) from error
    names = {id(tensor): name for name, tensor in converted.items()}
    changed = [(event, names[id(event.after)]) for event in seen if id(event.after) in names]
    for event, name in changed:
        if event.resampler == "resample_patch_embed":
            given, expected = (" x ".join(map(str, tensor.shape[-2:])) for tensor in (event.before, event.after))
            raise WeightsError(
                f"{source} was trained on patches of {given} pixels, but {type(model).__name__} here cuts patches of "
                f"{expected}: {name} is {tuple(event.before.shape)}, {tuple(event.after.shape)} expected. Nothing was "
                f"loaded. Choose an architecture with patches of {given}."
            )
    arrived = {tensor.data_ptr() for tensor in converted.values()} | {event.before.data_ptr() for event, _ in changed}
    left_out = sorted(name for name, tensor in state.items() if tensor.data_ptr() not in arrived)
    lost = [name for name in left_out if name.endswith("attn.qkv.bias") and has_bias(state[name])]
    if lost:
        raise WeightsError(
            f"{source} has biases in attention, for which {type(model).__name__} here has no place: {in_a_row(lost)}. "
            "Choose the architecture that has them (timm's DINOv3: ..._qkvb)."
        )
    return converted, [f"{name} ({event.grids})" for event, name in changed], left_out


def has_bias(bias: Tensor) -> bool:
    """Whether a fused bias does anything: DINOv3's files hold one of zeros, whose part for keys is masked."""
    q, _, v = bias.chunk(3)
    return bool(q.any() or v.any())


WATCHING = threading.Lock()  # of two threads, one must not take the other's watch for timm's function


class Resampling(NamedTuple):
    resampler: str
    before: Tensor
    after: Tensor
    grids: str


@contextmanager
def watched(*modules: object) -> Iterator[list[Resampling]]:
    """Everything that timm's resampling functions change meanwhile, where they are called from ``modules``."""
    seen: list[Resampling] = []

    def watch(resample):
        @functools.wraps(resample)
        def watching(before: Tensor, *args, **kwargs) -> Tensor:
            after = resample(before, *args, **kwargs)
            if after.shape != before.shape or not torch.equal(after, before):
                seen.append(Resampling(resample.__name__, before, after, grids(before, after, kwargs)))
            return after

        return watching

    names = ("resample_patch_embed", "resample_abs_pos_embed", "resize_rel_pos_bias_table")
    with WATCHING:
        pairs = [(module, name) for module in modules for name in names if hasattr(module, name)]
        originals = {(module, name): getattr(module, name) for module, name in pairs}
        try:
            for (module, name), resample in originals.items():
                setattr(module, name, watch(resample))
            yield seen
        finally:
            for (module, name), resample in originals.items():
                setattr(module, name, resample)


def grids(before: Tensor, after: Tensor, arguments: Mapping) -> str:
    if "new_size" not in arguments or "num_prefix_tokens" not in arguments:
        return f"{tuple(before.shape)} to {tuple(after.shape)}"
    side = math.isqrt(before.shape[1] - arguments["num_prefix_tokens"])  # timm takes it as a square where not told
    old, new = arguments.get("old_size") or (side, side), arguments["new_size"]
    return f"grid {old[0]} x {old[1]} to {new[0]} x {new[1]}"
