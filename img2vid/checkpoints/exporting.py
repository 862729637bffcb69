"""``img2vid.export_checkpoint``: a model of ours in a foreign dialect, or its image model back.

An export is read back before it is written: what an import of it would build must be this very model, in everything
that decides its function. So a model that a dialect cannot express is refused, never written as another one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from img2vid.backbones.activations import name_of
from img2vid.backbones.hf_folder import CONFIG, FILES, PIXELS, RESAMPLING
from img2vid.backbones.tower import Preprocess
from img2vid.checkpoints.description import activation_modules, structure
from img2vid.checkpoints.dialect import Dialect, Foreign, account
from img2vid.checkpoints.folders import replacing
from img2vid.checkpoints.importing import DIALECTS, described
from img2vid.checkpoints.native import separate
from img2vid.config import one_of
from img2vid.errors import WeightsError
from img2vid.model import VideoModel
from img2vid.two_towers import VideoTextModel
from img2vid.weights.accounting import in_a_row
from img2vid.weights.keytable import State

FORMATS = ("image", *DIALECTS)
# settings that decide a model's function at its own size, in eval mode
DECISIVE = (
    "attention",
    "prefix_mode",
    "temporal_layers",
    "gate",
    "causal",
    "time_embed",
    "num_frames",
    "tubelet_size",
    "num_classes",
)
# what does not show in a model's answers to clips of its own size
IN_TRAINING_OR_OTHER_SIZES = ("drop_path_before_gate", "no_temporal_drop_path", "nearest_positions")


def export_checkpoint(model: VideoModel | VideoTextModel, path: str | Path, format: str) -> list[str]:
    """Write a model as another library reads it.

    Args:
        path: a file for ``image`` and most dialects (``.safetensors``, or a pickle as the dialect's own code writes
            it); a folder for those of transformers.
        format: ``image`` for the image model under its library's names; or a dialect, such as ``timesformer``.

    Returns:
        What a reader should know: differences that only show in training, or with other numbers of frames.

    Raises:
        WeightsError: the dialect has no such model; or, for ``image``, its gates are open, so that the image model is
            not what the video model computes.
    """
    one_of("format", format, FORMATS)
    check_place(Path(path), format)
    if format == "image":
        return export_image(model, Path(path))
    if isinstance(model, VideoTextModel):
        raise WeightsError(f"{DIALECTS[format].title} has no text tower. Export model.visual, or --format image.")
    return export_dialect(model, Path(path), DIALECTS[format])


def check_place(path: Path, format: str) -> None:
    """Whether an export of that format may be written there, before any work is done for it."""
    if format != "image" and DIALECTS[format].configuration is not None:
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise WeightsError(f"{path} is not an empty folder, so nothing was written. Choose another one.")
    elif path.is_dir():
        raise WeightsError(f"{path} is a folder; --format {format} writes one file. Give its name.")


def export_image(model: VideoModel | VideoTextModel, path: Path) -> list[str]:
    video = model.visual if isinstance(model, VideoTextModel) else model
    if video.config.tubelet_size > 1 and video.config.tubelet_init == "average":
        raise WeightsError("Averaged tubelets have divided the image model's patch projection; it is gone.")
    open_gates = sorted(name for name, parameter in model.zero_parameters().items() if bool(parameter.any()))
    if open_gates:
        raise WeightsError(
            f"Gates of this model are open, so its image model is another function: {in_a_row(open_gates, most=5)}. To "
            "go back first: img2vid interpolate image FOLDER --alpha 0."
        )
    if video.config.attention == "divided_space_time" and video.config.gate == "none":
        raise WeightsError("This model has no gates, so the image model inside it is another function.")
    if video.config.backbone_args.get("heads"):
        raise WeightsError(
            "This model has heads that were added to what its library builds (heads="
            f"{video.config.backbone_args['heads']}), so nothing there could load such a file. Share the model folder, "
            "or export a program: --format onnx, torch-export or torchscript."
        )
    state = {key: tensor for key, tensor in model.state_dict().items() if model.origin(key) == "pretrained"}
    write_file(path, lambda file: save_file(separate(state), file, metadata={"format": "pt"}))
    return []


def export_dialect(model: VideoModel, path: Path, dialect: Dialect) -> list[str]:
    state = dialect.to_theirs(separate(model.state_dict()), model.config)
    configuration = None if dialect.configuration is None else dialect.configuration(model)
    notes = compare(model, dialect, Foreign(path, state, configuration))
    if configuration is not None:
        write_folder(path, state, configuration, model.tower.preprocess)
    elif path.suffix == ".safetensors":
        write_file(path, lambda file: save_file(separate(state), file, metadata={"format": "pt"}))
    else:
        key, prefix = dialect.wrapper
        content = {key: {prefix + name: tensor for name, tensor in state.items()}}
        write_file(path, lambda file: torch.save(content, file))
    return notes


def compare(model: VideoModel, dialect: Dialect, file: Foreign) -> list[str]:
    """What an import of ``file`` would be, against ``model``.

    Raises:
        WeightsError: it would be another function.
    """
    file.num_heads = model.tower.blocks[0][1].attn.num_heads
    config, again = described(dialect, file)
    own, wrong, notes = model.config, [], []
    for name in DECISIVE:
        unknown = name == "num_frames" and own.attention == "space_only"  # which no file needs
        if getattr(own, name) != getattr(config, name) and not unknown:
            wrong.append(f"{name} is {getattr(own, name)!r} here, {getattr(config, name)!r} there")
    for quirk in sorted(set(own.quirks) ^ set(config.quirks)):
        has = "this model has it, the dialect not" if quirk in own.quirks else "the dialect has it, this model not"
        (notes if quirk in IN_TRAINING_OR_OTHER_SIZES else wrong).append(f"quirk {quirk}: {has}")
    for name, value in function_of(again).items():
        if (here := function_of(model)[name]) != value:
            wrong.append(f"{name} are {here} here, {value} there")
    if again.tower.image_size != model.tower.image_size:
        wrong.append(f"image size is {model.tower.image_size} here, {again.tower.image_size} there")
    if wrong:
        raise WeightsError(
            f"{dialect.title} is another function than this model, nothing was written: {'; '.join(wrong)}. Convert or "
            "import with the settings of the dialect to train a model that can be exported."
        )
    report = account(dialect, file, dialect.to_theirs(again.state_dict(), config))
    if not report.ok:
        raise WeightsError(
            f"{dialect.title} has other weights than this model, nothing was written. In its names (missing: what it "
            f"has and this model lacks): {report}"
        )
    rate = own.backbone_args.get("drop_path_rate", 0.0)
    there = config.backbone_args.get("drop_path_rate", 0.0)
    if rate != there:
        notes.append(f"stochastic depth in training: {rate} here, {there} there")
    if own.time_embed_resample != config.time_embed_resample and own.has_time_embed:
        notes.append(f"other numbers of frames: {own.time_embed_resample} here, {config.time_embed_resample} there")
    return notes


def function_of(model: VideoModel) -> dict[str, list]:
    """``structure``, with activations by what they compute: torch and the libraries have classes for the same one."""
    facts = structure(model)
    del facts["approximations"]  # of GELU, and part of the names below
    return {**facts, "activations": sorted({name_of(m) or type(m).__name__ for m in activation_modules(model)})}


# ---- files


def write_folder(folder: Path, state: State, configuration: dict, pixels: Preprocess) -> None:
    resample = {name: number for number, name in RESAMPLING.items()}
    described_pixels = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "offset": False,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "resample": resample.get(pixels.interpolation, 2),
    }
    with replacing(folder, (FILES[0], CONFIG, PIXELS)) as temporary:
        save_file(separate(dict(state)), temporary / FILES[0], metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(configuration, indent=2) + "\n", encoding="utf-8")
        (temporary / PIXELS).write_text(json.dumps(described_pixels, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, write: Callable[[str], None]) -> None:
    """All of a file or nothing: under another name first, then renamed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".img2vid-export-") as home:
            temporary = os.path.join(home, "weights")
            write(temporary)
            os.chmod(temporary, 0o666 & ~umask_of(home))
            os.replace(temporary, path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be written: {error.strerror or error}.") from error


def umask_of(folder: str) -> int:
    """Permissions that new files lack, told from one: asking for the umask would mean setting it."""
    probe = Path(folder, "usual")
    probe.touch()
    return 0o666 & ~probe.stat().st_mode
