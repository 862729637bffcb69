"""``img2vid.import_checkpoint``: a published video checkpoint in, a video model of ours out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from img2vid.backbones.from_transformers import MODEL_TYPES
from img2vid.checkpoints.dialect import Dialect, Foreign, account
from img2vid.checkpoints.frozen_in_time import FROZEN_IN_TIME
from img2vid.checkpoints.hf_timesformer import HF_TIMESFORMER
from img2vid.checkpoints.lavila import LAVILA
from img2vid.checkpoints.mmaction2 import MMACTION2
from img2vid.checkpoints.rebuilding import build_backbone
from img2vid.checkpoints.timesformer import TIMESFORMER
from img2vid.checkpoints.vivit import VIVIT
from img2vid.choices import POS_EMBED_RESAMPLE
from img2vid.class_names import from_id2label
from img2vid.config import ConfigError, VideoConfig, image_size_pair, one_of, whole_number
from img2vid.errors import BackboneError, WeightsError
from img2vid.model import VideoModel
from img2vid.temporal.embeddings import resample_patch_times, resample_pos_embed, resample_time_embed
from img2vid.two_towers import build_model
from img2vid.weights.accounting import LoadReport, load_weights
from img2vid.weights.keytable import State

if TYPE_CHECKING:
    from img2vid.backbones.tower import ImageTower

DIALECTS = {d.name: d for d in (TIMESFORMER, HF_TIMESFORMER, MMACTION2, FROZEN_IN_TIME, LAVILA, VIVIT)}


def import_checkpoint(
    path: str | Path,
    dialect: str = "auto",
    *,
    num_frames: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    pos_embed_resample: str = "bicubic",
) -> VideoModel:
    """A video model that computes what the checkpoint's own code computes.

    Args:
        path: a weights file, or a folder as transformers saves it.
        dialect: one of ``DIALECTS``, or ``auto`` to tell by the names in it.
        num_frames, image_size: of the model, where other than the checkpoint's; its embeddings are resampled.
        num_heads: attention heads, where no ``config.json`` says; 64 numbers wide by default.
        pos_embed_resample: ``bicubic``, in two dimensions; or ``nearest_1d``, over the flattened patches as the
            original TimeSformer loads a checkpoint of another size, which puts most of them in the wrong place.

    Returns:
        The model in eval mode; ``model.config.quirks`` names what it does differently from a converted one.

    Raises:
        WeightsError: not a checkpoint of that dialect, or keys missing, unexpected or misshapen.
    """
    return import_with_report(path, dialect, num_frames, image_size, num_heads, pos_embed_resample)[0]


def import_with_report(
    path: str | Path,
    dialect: str = "auto",
    num_frames: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    pos_embed_resample: str = "bicubic",
) -> tuple[VideoModel, Dialect, LoadReport]:
    """``import_checkpoint``, with the dialect it was and where every key went."""
    one_of("pos_embed_resample", pos_embed_resample, POS_EMBED_RESAMPLE)
    one_of("dialect", dialect, ("auto", *DIALECTS))
    file = Foreign.read(path, None if num_heads is None else whole_number("num_heads", num_heads))
    spoken = detect(file) if dialect == "auto" else DIALECTS[dialect]
    native, skeleton = read_as(spoken, file)
    report = account(spoken, file, spoken.to_theirs(skeleton.state_dict(), native))
    if not report.ok:
        raise WeightsError(
            f"{file.path} is no complete checkpoint of {spoken.title}, nothing was imported: {report}"
            f"{other_than(spoken, file)}"
        )
    wanted = {} if num_frames is None else {"num_frames": num_frames}
    if image_size is not None:
        wanted["image_size"] = image_size_pair(image_size)
    config = dataclasses.replace(native, **wanted)
    given = spoken.with_prefix(file.state)
    ours = spoken.to_ours({key: given[key] for key in report.loaded}, native)
    model = fresh(config)
    report.resampled = fit(ours, skeleton.tower, model, pos_embed_resample)
    load_weights(model, ours, source=str(file.path), keep_dtypes=True)
    model.class_names = names_in(file, config.num_classes)
    model.tower.preprocess = file.pixels or spoken.pixels
    how = f" ({'; '.join(report.resampled)})" if report.resampled else ""
    model.image_weights = f"{spoken.title}: {Path(path).name}{how}"
    report.notes = file.notes
    return model.eval(), spoken, report


def detect(file: Foreign) -> Dialect:
    """The one dialect that knows the file's names.

    Raises:
        WeightsError: none does.
    """
    found = recognised(file)
    if len(found) == 1:
        return found[0]
    model_type = (file.config or {}).get("model_type")
    if isinstance(model_type, str) and model_type in MODEL_TYPES:
        raise WeightsError(
            f"{file.path} is transformers' {model_type!r}, an image model. It is not imported but converted: img2vid "
            f"convert --backbone hf:{file.path}"
        )
    names = ", ".join(sorted(file.state)[:6])
    raise WeightsError(
        f"{file.path} is of no video dialect known here (its keys: {names}, ...). Say which is meant, with --from "
        f"({', '.join(DIALECTS)}). An image checkpoint is not imported but converted: img2vid convert --backbone NAME "
        "--weights FILE. A space-only TimeSformer has the keys of an image model: give --from timesformer."
    )


def recognised(file: Foreign) -> list[Dialect]:
    return [dialect for dialect in DIALECTS.values() if dialect.recognise(file)]


def other_than(dialect: Dialect, file: Foreign) -> str:
    """A line on what else the file may be, after one on why it is not what it was taken for."""
    others = [other for other in recognised(file) if other is not dialect]
    if not others:
        return ""
    return f"\nBy its names it is {others[0].title}: --from {others[0].name}."


def read_as(dialect: Dialect, file: Foreign) -> tuple[VideoConfig, VideoModel]:
    """``described``; what is wrong is said with what else the file may be."""
    try:
        return described(dialect, file)
    except WeightsError as error:
        raise WeightsError(f"{error}{other_than(dialect, file)}") from error


def described(dialect: Dialect, file: Foreign) -> tuple[VideoConfig, VideoModel]:
    """What model a file holds, and that model without numbers."""
    what = "weights are not those" if file.config is None else "config.json is not that"
    try:
        config = dialect.describe(file)
        return config, fresh(config, on_meta=True)
    except (ConfigError, BackboneError) as error:
        raise WeightsError(f"{file.path}: its {what} of {dialect.title}: {error}") from error
    except KeyError as error:
        raise WeightsError(f"{file.path}: its {what} of {dialect.title}: it lacks {error}.") from error
    except (IndexError, TypeError, ZeroDivisionError) as error:
        raise WeightsError(f"{file.path}: its {what} of {dialect.title}: {type(error).__name__} {error}.") from error


def names_in(file: Foreign, num_classes: int | None) -> tuple[str, ...] | None:
    """What a classifier's classes are called, where the folder says."""
    if num_classes is None or file.config is None:
        return None
    try:
        return from_id2label(file.config.get("id2label"), num_classes)
    except ConfigError as error:
        raise WeightsError(f"{file.path}: {error}") from error


def fresh(config: VideoConfig, on_meta: bool = False) -> VideoModel:
    return build_model(build_backbone(config, on_meta=on_meta), config)


def fit(ours: State, native: ImageTower, model: VideoModel, pos_embed_resample: str) -> list[str]:
    """Bring positions and times to the model's numbers of patches and frames, in place; says what was resampled."""
    done, own, new_grid, mode = [], model.state_dict(), model.tower.grid, model.config.time_embed_resample
    if ours["pos_embed"].shape != own["pos_embed"].shape:
        prefix = native.num_prefix_tokens
        if pos_embed_resample == "bicubic":
            ours["pos_embed"] = resample_pos_embed(ours["pos_embed"], new_grid, native.grid, prefix)
        else:
            ours["pos_embed"] = nearest_1d(ours["pos_embed"], own["pos_embed"].shape[1], prefix)
        grids = f"{native.grid[0]} x {native.grid[1]} to {new_grid[0]} x {new_grid[1]}"
        done.append(f"pos_embed (grid {grids}, {pos_embed_resample})")
    if "time_embed" in ours and ours["time_embed"].shape != own["time_embed"].shape:
        before, num_steps = ours["time_embed"].shape[1], own["time_embed"].shape[1]
        if ours["time_embed"].ndim == 4:
            ours["time_embed"] = resample_patch_times(ours["time_embed"], num_steps, new_grid, native.grid, mode)
        else:
            ours["time_embed"] = resample_time_embed(ours["time_embed"], num_steps, mode)
        done.append(f"time_embed ({before} to {num_steps} steps, {mode})")
    return done


def nearest_1d(pos_embed: torch.Tensor, num_entries: int, num_prefix: int) -> torch.Tensor:
    """Positions as one row of patches, stretched to another length: (1, P + N, D) -> (1, P + N', D)."""
    row = pos_embed[:, num_prefix:].transpose(1, 2)
    row = F.interpolate(row, size=num_entries - num_prefix, mode="nearest").transpose(1, 2)
    return torch.cat([pos_embed[:, :num_prefix], row], dim=1)
