"""Joint space-time attention: the untouched image block runs on the tokens of all frames at once.

No weight is new. With T = 1 it is the image block; beyond that every token sees T times as many keys, so the function
is kept only where that changes nothing: static clips whose frames each carry their own prefix tokens. The step costs
quadratically in T. (TimeSformer's ``joint_space_time``, arXiv:2102.05095; ViViT's model 1, arXiv:2103.15691.)
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from img2vid.temporal.clip import ClipContext
from img2vid.temporal.infront import InFront, put_in_front


class JointBlock(InFront):
    title = "Joint"
    clip: ClipContext
    num_shared_tokens: int  # P where one prefix serves the clip, 0 where each frame keeps its own

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:  # (B*T, P + N, D)
        num_frames, num_shared = self.clip.num_frames, self.num_shared_tokens
        frames = rearrange(x, "(b t) n d -> b t n d", t=num_frames)
        shared, own = frames[:, 0, :num_shared], frames[:, :, num_shared:]
        tokens = torch.cat([shared, rearrange(own, "b t n d -> b (t n) d")], dim=1)
        if kwargs.get("rope") is not None:
            kwargs["rope"] = self.rope_of_clip(kwargs["rope"])
        with self.clip.of(1):  # inside, a clip is one sequence: one row of the batch
            tokens = super().forward(tokens, *args, **kwargs)
        shared = repeat(tokens[:, :num_shared], "b s d -> (b t) s d", t=num_frames)
        own = rearrange(tokens[:, num_shared:], "b (t n) d -> (b t) n d", t=num_frames)
        return torch.cat([shared, own], dim=1)

    def rope_of_clip(self, rope: Tensor) -> Tensor:
        """Angles (..., N, D) of one frame's N patches -> (..., T*N, D), the same in every frame."""
        num_frames = self.clip.num_frames
        if rope.ndim == 4:  # (B*T, H, N, D): patch dropout has left each clip its own patches, the same in all frames
            rope = rope[::num_frames]
        return rope.repeat(*[1] * (rope.ndim - 2), num_frames, 1)


def make_joint(block: nn.Module, clip: ClipContext, num_shared_tokens: int) -> None:
    """Turn an image block into a joint space-time block, in place."""
    put_in_front(block, JointBlock)
    block.clip, block.num_shared_tokens = clip, num_shared_tokens
