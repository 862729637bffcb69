"""A saved model as mteb's encoder, for its video and text tasks.

    import mteb
    from img2vid.evaluation.mteb import MTEBEncoder

    mteb.evaluate(MTEBEncoder("runs/my_model"), mteb.get_tasks(["HMDB51ZeroShot"]))   # pip install 'img2vid[mteb]'

Frames are chosen by mteb's own collator, so that numbers stand beside those of other models there.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from img2vid.checkpoints.native import load
from img2vid.data.transforms import TestTransform
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.features import hash_of_model
from img2vid.evaluation.reading import input_spec
from img2vid.two_towers import VideoTextModel


class MTEBEncoder:
    """What mteb's ``EncoderProtocol`` asks for; embeddings are normalised, similarity is the cosine.

    Args:
        model: a VideoTextModel, or the folder it was saved to.
        revision: for mteb's records; by default the first digits of the weights' hash.
        num_frames: frames of each video; by default the model's own.
    """

    def __init__(
        self,
        model: VideoTextModel | str | Path,
        revision: str | None = None,
        *,
        device: str | None = None,
        num_frames: int | None = None,
        **kwargs: Any,
    ) -> None:
        folder = None if isinstance(model, torch.nn.Module) else Path(model)
        self.model = (model if folder is None else load(folder)).eval()
        if not isinstance(self.model, VideoTextModel):
            raise EvaluationError(f"mteb's tasks need a text tower, and a {type(self.model).__name__} has none.")
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.name = f"img2vid/{folder.resolve().name if folder else 'model'}"
        self.revision = revision or hash_of_model(self.model)[:12]
        self.num_frames = num_frames or self.model.config.num_frames
        self.cut = TestTransform(input_spec(self.model))

    @cached_property
    def mteb_model_meta(self):
        from mteb.models.model_meta import ModelMeta

        known = {"name": self.name, "revision": self.revision, "modalities": ["text", "video"]}
        return ModelMeta.create_empty(known)

    @torch.no_grad()
    def encode(
        self, inputs, *, task_metadata=None, hf_split=None, hf_subset=None, prompt_type=None, **kwargs
    ) -> Tensor:
        """A DataLoader of texts, videos, or both (added up) -> embeddings (n, D)."""
        columns = inputs.dataset.features
        if "video" in columns:
            from mteb.models.modality_collators import FramesCollator

            inputs.collate_fn = FramesCollator(num_frames=self.num_frames)
        elif "text" not in columns:
            raise EvaluationError(f"mteb asks for {', '.join(columns)}; this encoder knows text and video.")
        return torch.cat([self.embed(batch) for batch in inputs])

    def embed(self, batch: dict[str, Any]) -> Tensor:
        parts = []
        if "text" in batch:
            parts.append(
                self.model.encode_text(self.model.tokenize(list(batch["text"])).to(self.device), normalize=True)
            )
        if "video" in batch:
            clips = torch.cat([self.cut(torch.as_tensor(clip)) for clip in batch["video"]])  # (B, T, C, size, size)
            parts.append(self.model.encode_video(self.model.normalize(clips.to(self.device)), normalize=True))
        return sum(parts).float().cpu()

    def similarity(self, embeddings1, embeddings2) -> Tensor:
        """Cosines of all pairs, (n, m)."""
        return unit(embeddings1) @ unit(embeddings2).T

    def similarity_pairwise(self, embeddings1, embeddings2) -> Tensor:
        """Cosines of pairs, (n,)."""
        return (unit(embeddings1) * unit(embeddings2)).sum(-1)


def unit(embeddings) -> Tensor:
    return torch.nn.functional.normalize(torch.atleast_2d(torch.as_tensor(embeddings)).float(), dim=-1)
