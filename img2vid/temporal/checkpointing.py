"""Activation checkpointing of whole blocks, the temporal branch included."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from img2vid.temporal.clip import ClipContext
from img2vid.temporal.infront import InFront


class CheckpointedBlock(InFront):
    """Keeps a block's input only and runs the block once more during backward.

    Behind all others it is the image block alone that runs again, and what the branch in front needs is kept: less
    arithmetic than running both again, and where the trunk is frozen, most of what is kept is the trunk's.

    The image libraries' own checkpointing would rerun blocks when the video model's forward is over and T is no longer
    known; here T is remembered with the input.
    """

    title = "Checkpointed"
    clip: ClipContext

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if not self.training or not torch.is_grad_enabled():
            return super().forward(x, *args, **kwargs)  # where T need not be known (img2vid.temporal.long)
        block, num_frames = super().forward, self.clip.num_frames

        def run(x: Tensor, *args, **kwargs) -> Tensor:
            with self.clip.of(num_frames):
                return block(x, *args, **kwargs)

        return checkpoint(run, x, *args, use_reentrant=False, **kwargs)
