"""The model inside a training checkpoint, whole or sharded.

The end of a training writes a model folder itself. This is for runs that were stopped, and for the best of several
checkpoints. Where weights are averaged in training, the average is taken.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from img2vid.checkpoints.native import build_backbone
from img2vid.class_names import checked_class_names
from img2vid.config import VideoConfig
from img2vid.errors import WeightsError
from img2vid.model import VideoModel
from img2vid.two_towers import VideoTextModel, build_model
from img2vid.weights.accounting import load_weights

ENTRY = "img2vid"  # what training notes in its checkpoints, besides lightning's own entries


def consolidate(checkpoint: str | Path) -> VideoModel | VideoTextModel:
    """The model of a checkpoint of ``img2vid train``, on the CPU, in eval mode.

    Raises:
        WeightsError: there is none, it is damaged, or it is not of this training.
    """
    path = Path(checkpoint)
    saved = read_checkpoint(path)
    noted = saved.get(ENTRY)
    if not isinstance(noted, dict) or "state_dict" not in saved:
        raise WeightsError(f"{path} is no checkpoint of img2vid train: it does not say which model it is of.")
    config = VideoConfig.from_dict(noted["video"])
    model = build_model(build_backbone(config), config)
    state = {key.removeprefix("model."): t for key, t in saved["state_dict"].items() if key.startswith("model.")}
    load_weights(model, state, source=str(path), keep_dtypes=True)
    video = model.visual if isinstance(model, VideoTextModel) else model
    video.image_weights = noted["image_weights"]
    video.class_names = checked_class_names(noted.get("class_names"), video.num_logits)
    return model.eval()


def read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise WeightsError(f"There is no checkpoint {path}.")
    try:
        if path.is_dir():
            from lightning.fabric.utilities.load import _load_distributed_checkpoint

            return _load_distributed_checkpoint(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
