"""img2vid's own format: a folder that says everything needed to build the model again.

model.safetensors   all weights, image keys under the image library's names
config.json         kind of model, VideoConfig, pixel statistics, versions
certificate.json    what was proven when it was converted (optional)
README.md           model card
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from img2vid._version import __version__
from img2vid.backbones import describe, load_backbone, wrap_module
from img2vid.config import VideoConfig
from img2vid.errors import WeightsError
from img2vid.model import VideoModel, VideoTextModel, build_model
from img2vid.weights import load_weights, read_state_dict

if TYPE_CHECKING:
    from img2vid.certificate import Certificate

WEIGHTS, CONFIG, CERTIFICATE, CARD = "model.safetensors", "config.json", "certificate.json", "README.md"
FORMAT = 1


def save(
    model: VideoModel | VideoTextModel,
    folder: str | Path,
    certificate: Certificate | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a model folder: files are written elsewhere and moved into place, so no file is ever half there.

    A new folder appears at once, as a whole. In a folder that exists, files are replaced one after the other.

    Args:
        state: the weights, where the model holds only its share of them (FSDP); None for the model's own.

    Raises:
        WeightsError: the folder holds something else.
    """
    from img2vid.checkpoints.card import model_card

    folder = Path(folder)
    check_replaceable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:  # file systems that say yes to os.access and no to everything else
        raise WeightsError(f"{folder} cannot be written ({error.strerror}). Choose another folder.") from error
    try:
        # safetensors refuses tensors that share memory, and wants contiguous ones
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in (state or model.state_dict()).items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(describe_model(model), indent=2) + "\n")
        (temporary / CARD).write_text(model_card(model, certificate))
        if certificate is not None:
            (temporary / CERTIFICATE).write_text(certificate.to_json())
        make_public(temporary)
        if folder.exists():
            (folder / CERTIFICATE).unlink(missing_ok=True)  # it would speak of the model before
            for name in (WEIGHTS, CARD, CERTIFICATE, CONFIG):
                if (temporary / name).exists():
                    os.replace(temporary / name, folder / name)
        else:
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def make_public(folder: Path) -> None:
    """Give a temporary folder and its files the permissions that newly made ones would have had."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)


def check_replaceable(folder: Path) -> None:
    """Whether a model may be written there, before any work is done for it."""
    if folder.is_file():
        raise WeightsError(f"{folder} is a file; a model is saved as a folder.")
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise WeightsError(f"{folder} cannot be written: {existing} is no folder that you may write to.")
    if folder.is_dir() and any(folder.iterdir()) and read_kind(folder) is None:
        raise WeightsError(
            f"{folder} is not empty and holds no img2vid model, so nothing was written. Choose another folder."
        )


def read_kind(folder: Path) -> str | None:
    """``VideoModel`` or ``VideoTextModel``; None where the folder holds no model of ours."""
    try:
        return json.loads((folder / CONFIG).read_text()).get("kind")
    except (OSError, ValueError, AttributeError):
        return None


def describe_model(model: VideoModel | VideoTextModel) -> dict[str, Any]:
    import open_clip
    import timm

    video = model.visual if isinstance(model, VideoTextModel) else model
    pixels = video.tower.preprocess
    return {
        "format": FORMAT,
        "kind": "VideoTextModel" if isinstance(model, VideoTextModel) else "VideoModel",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "video": model.config.to_dict(),
        "preprocess": {"mean": pixels.mean, "std": pixels.std, "interpolation": pixels.interpolation},
        "versions": {
            "img2vid": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "open_clip": open_clip.__version__,
        },
    }


def load(folder: str | Path, *, image_model: nn.Module | None = None) -> VideoModel | VideoTextModel:
    """Load a folder written by ``save``, in eval mode, on the CPU.

    Args:
        image_model: a freshly built image model, for a model that was made from a module without a name.

    Raises:
        WeightsError: not a folder of ours, or keys that are missing, unexpected or misshapen.
    """
    folder = Path(folder)
    described = read_description(folder)
    config = VideoConfig.from_dict(described["video"])
    if image_model is not None:
        backbone = wrap_module(image_model, config.image_size)
    elif config.backbone is None:
        raise WeightsError(
            f"{folder} was made from a module passed in by hand, whose architecture has no name. Build the same module "
            f"and give it: img2vid.load({str(folder)!r}, image_model=module)."
        )
    else:
        backbone = load_backbone(
            config.backbone, random_weights=True, image_size=config.image_size, arguments=config.backbone_args
        )
    backbone.model.to(getattr(torch, described["dtype"]))
    model = build_model(backbone, config)
    load_weights(model, read_state_dict(folder / WEIGHTS), source=str(folder / WEIGHTS))
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
    backbone = load_backbone(
        config.backbone, random_weights=True, image_size=config.image_size, arguments=config.backbone_args
    )
    image = backbone.model if isinstance(model, VideoTextModel) else backbone.tower.module
    image.to(next(model.parameters()).dtype)
    own = {key: tensor for key, tensor in model.state_dict().items() if model.origin(key) == "pretrained"}
    load_weights(image, own)
    video = model.visual if isinstance(model, VideoTextModel) else model
    if config.tubelet_size > 1 and config.tubelet_init == "average":
        # on a static clip, where averaged tubelets keep the function, all frames' weights act together
        conv, image_conv = video.tower.patch_conv, describe(getattr(image, "visual", image)).patch_conv
        image_conv.weight.data = conv.weight.detach() + conv.tubelet_weight.detach().sum(dim=0)
    return image.eval()


def read_description(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise WeightsError(f"There is no folder {folder}. Give a folder written by save_pretrained or img2vid.convert.")
    try:
        described = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError as error:
        raise WeightsError(f"{folder} holds no {CONFIG}, so it is no img2vid model.") from error
    except ValueError as error:
        raise WeightsError(f"{folder / CONFIG} is not valid JSON: {error}") from error
    missing = [key for key in ("kind", "video", "dtype") if key not in described]
    if missing:
        raise WeightsError(f"{folder / CONFIG} lacks {', '.join(missing)}; it was not written by img2vid.")
    if described.get("format", FORMAT) > FORMAT:
        raise WeightsError(
            f"{folder} is in format {described['format']}, but img2vid {__version__} reads up to {FORMAT}. "
            "Run pip install -U img2vid."
        )
    return described
