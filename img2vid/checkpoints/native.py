"""img2vid's own format: a folder that says everything needed to build the model again.

model.safetensors   all weights, image keys under the image library's names; its header repeats config.json
config.json         kind of model, VideoConfig, pixel statistics, versions
certificate.json    what was proven when it was converted (optional)
moved.json          how far training moved it from where it began (optional)
training.yaml       what it was trained with (optional)
README.md           model card
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from img2vid._version import __version__
from img2vid.backbones import describe, wrap_module
from img2vid.backbones.building import to_be_loaded
from img2vid.backbones.tower import Preprocess
from img2vid.checkpoints.description import check_description, check_structure, structure
from img2vid.checkpoints.folders import LEFTOVER, replacing
from img2vid.checkpoints.rebuilding import build_backbone, check_rebuildable
from img2vid.class_names import checked_class_names
from img2vid.config import ConfigError, VideoConfig
from img2vid.errors import BackboneError, WeightsError
from img2vid.model import VideoModel
from img2vid.two_towers import VideoTextModel, build_model
from img2vid.weights.accounting import load_weights
from img2vid.weights.files import read_safetensors, short

if TYPE_CHECKING:
    from img2vid.certificate import Certificate
    from img2vid.training.movement import Movement

WEIGHTS, CONFIG, CERTIFICATE, CARD = "model.safetensors", "config.json", "certificate.json", "README.md"
MOVED, SETTINGS = "moved.json", "training.yaml"
HEADER = "img2vid"  # the entry of the safetensors header that repeats config.json
FORMAT = 1
UNKNOWN = "a source that was not noted"


def save(
    model: VideoModel | VideoTextModel,
    folder: str | Path,
    certificate: Certificate | None = None,
    state: Mapping[str, Tensor] | None = None,
    movement: Movement | None = None,
    settings: str | None = None,
) -> Path:
    """Write a model folder. Killed at any moment, it leaves the model that was there or the new one, whole.

    Other files in the folder stay. Of several writers at once, the last one wins.

    Args:
        state: the weights, where the model holds only its share of them (FSDP); None for the model's own.
        movement: how far training moved it, for ``moved.json`` and the card.
        settings: what it was trained with, as YAML, for ``training.yaml``.

    Raises:
        WeightsError: the folder holds something else, or cannot be written; or the model was changed so that it could
            not be loaded again. The message says why.
    """
    from img2vid.checkpoints.card import model_card

    folder = Path(folder)
    check_replaceable(folder)
    state = model.state_dict() if state is None else state
    check_rebuildable(model, state)
    described = json.dumps(describe_model(model), indent=2)
    try:
        about = (CERTIFICATE, MOVED, SETTINGS)
        with replacing(folder, (WEIGHTS, CONFIG, CARD, *about), outdated=about) as temporary:
            # one entry only: safetensors writes several in random order, and equal models should be equal files
            save_file(separate(state), temporary / WEIGHTS, metadata={HEADER: described})
            (temporary / CONFIG).write_text(described + "\n", encoding="utf-8")
            (temporary / CARD).write_text(model_card(model, certificate, state, movement), encoding="utf-8")
            if certificate is not None:
                (temporary / CERTIFICATE).write_text(certificate.to_json(), encoding="utf-8")
            if movement is not None:
                (temporary / MOVED).write_text(movement.to_json(), encoding="utf-8")
            if settings is not None:
                (temporary / SETTINGS).write_text(settings, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else short(error)
        raise WeightsError(f"The model cannot be written to {folder}: {reason}.") from error
    return folder


def separate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU of which no two share memory, as safetensors wants them."""
    seen: set[int] = set()
    for key, tensor in state.items():
        if tensor.is_meta:
            raise WeightsError(f"{key} has no numbers (it is on torch's meta device), so there is nothing to save.")
        tensor = tensor.detach().cpu().contiguous()
        state[key] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    return state


def check_replaceable(folder: Path) -> None:
    """Whether a model may be written there, before any work is done for it."""
    if folder.is_file():
        raise WeightsError(f"{folder} is a file; a model is saved as a folder.")
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise WeightsError(f"{folder} cannot be written: {existing} is no folder that you may write to.")
    holds_something = folder.is_dir() and any(not path.name.startswith(LEFTOVER) for path in folder.iterdir())
    if holds_something and read_kind(folder) is None:
        raise WeightsError(
            f"{folder} is not empty and holds no img2vid model, so nothing was written. Choose another folder."
        )


def read_kind(folder: Path) -> str | None:
    """``VideoModel`` or ``VideoTextModel``; None where the folder holds no model of ours."""
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        return (read_header(folder) or {}).get("kind")  # all there is where the very first save was cut off


def describe_model(model: VideoModel | VideoTextModel) -> dict[str, Any]:
    import open_clip
    import timm

    video = model.visual if isinstance(model, VideoTextModel) else model
    pixels = video.tower.preprocess
    names = checked_class_names(video.class_names, video.num_logits)
    described = {
        "format": FORMAT,
        "kind": "VideoTextModel" if isinstance(model, VideoTextModel) else "VideoModel",
        "dtype": str(main_dtype(model)).removeprefix("torch."),
        "image_weights": video.image_weights,
        **({} if names is None else {"class_names": list(names)}),
        "video": model.config.to_dict(),
        "structure": structure(model),
        "preprocess": {"mean": pixels.mean, "std": pixels.std, "interpolation": pixels.interpolation},
        "versions": {
            "img2vid": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "open_clip": open_clip.__version__,
        },
    }
    try:
        text = json.dumps(described)
    except TypeError as error:
        raise WeightsError(
            f"This model cannot be described in {CONFIG}: {error}. Its backbone_args are {model.config.backbone_args}; "
            "only numbers, texts, lists and the like can be saved."
        ) from error
    return {**described, "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}


def main_dtype(model: nn.Module) -> torch.dtype:
    """The precision of most numbers, which tables that are not saved have too; each saved tensor has its own."""
    numbers: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        numbers[parameter.dtype] += parameter.numel()
    return max(numbers, key=numbers.__getitem__)


def load(folder: str | Path, *, image_model: nn.Module | None = None) -> VideoModel | VideoTextModel:
    """Load a folder written by ``save``, in eval mode, on the CPU, every tensor in the precision it was saved in.

    Args:
        image_model: a freshly built image model, for a model that was made from a module without a name.

    Raises:
        WeightsError: not a folder of ours, or keys that are missing, unexpected or misshapen.
    """
    model = load_built(Path(folder), image_model, to_be_loaded)
    if image_model is None and any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return load_built(Path(folder), image_model, nullcontext)  # some of it is in no file
    return model


def load_built(
    folder: Path, image_model: nn.Module | None, building: Callable[[], AbstractContextManager[None]]
) -> VideoModel | VideoTextModel:
    described = read_description(folder)
    config = VideoConfig.from_dict(described["video"])
    if image_model is None and config.backbone is None:
        raise WeightsError(
            f"{folder} was made from a module passed in by hand, whose architecture has no name. Build the same module "
            f"and give it: img2vid.load({str(folder)!r}, image_model=module)."
        )
    try:
        if image_model is not None:
            backbone = wrap_module(image_model, config.image_size)
        else:
            with building():
                backbone = build_backbone(config)
        backbone.model.to(getattr(torch, described["dtype"]))
        model = build_model(backbone, config)
        video = model.visual if isinstance(model, VideoTextModel) else model
        names = checked_class_names(described.get("class_names"), video.num_logits)
    except (BackboneError, ConfigError) as error:
        raise WeightsError(f"What {folder / CONFIG} describes cannot be built here: {error}") from error
    if type(model).__name__ != described["kind"]:
        raise WeightsError(
            f"{folder} holds a {described['kind']}, but what a {type(backbone.model).__name__} makes is a "
            f"{type(model).__name__}. Give the whole image model, with its text tower if there is one."
        )
    if not (folder / WEIGHTS).is_file():
        raise WeightsError(f"{folder} has no weights file {WEIGHTS}; copy or download the folder again.")
    check_structure(described, model, folder)
    load_weights(model, read_safetensors(folder / WEIGHTS), source=str(folder / WEIGHTS), keep_dtypes=True)
    pixels = described["preprocess"]
    video.tower.preprocess = Preprocess(tuple(pixels["mean"]), tuple(pixels["std"]), pixels["interpolation"])
    video.image_weights = described.get("image_weights") or UNKNOWN
    video.class_names = video.class_names if names is None else names
    return model.eval()


def load_reference(model: VideoModel | VideoTextModel) -> nn.Module:
    """The image model of a loaded model, built afresh by its own library, with the image weights the model now has.

    Certified against it, the model is proven to compute, with closed gates, what the image library computes.
    """
    config = model.config
    if config.backbone is None:
        raise WeightsError(
            "This model was made from a module passed in by hand, so there is no name to build its image model from. "
            "Build it and use img2vid.certify(model, image_model)."
        )
    backbone = build_backbone(config)
    image = backbone.model if isinstance(model, VideoTextModel) else backbone.tower.module
    image.to(main_dtype(model))
    own = {key: tensor for key, tensor in model.state_dict().items() if model.origin(key) == "pretrained"}
    load_weights(image, own, keep_dtypes=True)
    video = model.visual if isinstance(model, VideoTextModel) else model
    if config.tubelet_size > 1 and config.tubelet_init == "average":
        # on a static clip, where averaged tubelets keep the function, all frames' weights act together
        conv, image_conv = video.tower.patch_conv, describe(getattr(image, "visual", image)).patch_conv
        image_conv.weight.data = conv.weight.detach() + conv.tubelet_weight.detach().sum(dim=0)
    return image.eval()


def recorded_fingerprint(folder: str | Path) -> str | None:
    """SHA-256 of the image weights when a saved model was converted, or its training began; None if not noted."""
    for name, keys in ((CERTIFICATE, ["weights_now"]), (MOVED, ["image_weights", "before"])):
        path = Path(folder) / name
        try:
            noted = json.loads(path.read_text())
            for key in keys:
                noted = noted[key]
            return noted
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{path} is not a certificate of img2vid: {error}") from error
    return None


def read_description(folder: Path) -> dict[str, Any]:
    """``config.json``, or what the weights say of themselves where it was left by another save.

    Raises:
        WeightsError: it is missing, damaged, or of a later version; with the field, its value, and what was expected.
    """
    if not folder.is_dir():
        what = f"{folder} is a file, not a folder" if folder.is_file() else f"There is no folder {folder}"
        hint = ""
        if len(folder.parts) == 1 and not folder.exists():  # as a backbone's name looks
            hint = f" A backbone becomes one first: img2vid convert --backbone {folder} --out runs/convert/{folder}."
        raise WeightsError(
            f"{what}. Give a folder written by save_pretrained or img2vid.convert.{hint} Weights of an image model: "
            "img2vid.convert(NAME, weights=FILE); a video model's own state dict: model.load_state_dict(...)."
        )
    path = folder / CONFIG
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        inside = folder / "model"  # where a training run puts it
        hint = f" The model of this run is in {inside}." if (inside / CONFIG).is_file() else ""
        raise WeightsError(f"{folder} holds no {CONFIG}, so it is no img2vid model.{hint}") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from error
    header = read_header(folder)
    # an edited config.json keeps its digest and counts; one of another model has another digest, and does not
    if header and isinstance(described, dict) and described.get("digest", header["digest"]) != header["digest"]:
        described = header
    check_description(described, path, newest=FORMAT)
    return described


def read_header(folder: Path) -> dict[str, Any] | None:
    """What the weights say of themselves; None where they say nothing, or cannot be read."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "null"))
    except (OSError, ValueError, SafetensorError):  # loading them says what is wrong with the file
        return None
    return header if isinstance(header, dict) and "digest" in header else None
