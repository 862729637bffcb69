"""Random dropping that treats a clip as one sample.

With frames folded into the batch, the libraries' own layers would draw for every frame: stochastic depth would remove a
block from some frames of a clip, and patch dropout would keep different patches in each frame, so that attention along
time would compare different places. Here one draw is made per clip and all its T frames share it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from img2vid.temporal.clip import ClipContext


class ClipDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016) on (B*T, ...), one coin per clip."""

    def __init__(self, drop_prob: float, clip: ClipContext, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.clip, self.scale_by_keep = drop_prob, clip, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1.0 - self.drop_prob
        mask = x.new_empty(x.shape[0] // self.clip.num_frames, *[1] * (x.ndim - 1)).bernoulli_(keep_prob)
        if self.scale_by_keep and keep_prob > 0.0:
            mask /= keep_prob
        return x * mask.repeat_interleave(self.clip.num_frames, dim=0)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class ClipPatchDropout(nn.Module):
    """Patch dropout (Liu et al. 2022, arXiv:2208.07220) on (B*T, P + N, D): the same patches stay in every frame.

    With ``return_indices`` the kept positions (B*T, K) come back too (None where nothing was dropped), as the rotary
    position code of the image libraries needs them.
    """

    def __init__(
        self,
        prob: float,
        num_prefix_tokens: int,
        clip: ClipContext,
        ordered: bool = False,
        return_indices: bool = False,
    ) -> None:
        super().__init__()
        self.prob, self.num_prefix_tokens, self.clip = prob, num_prefix_tokens, clip
        self.ordered, self.return_indices = ordered, return_indices

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        kept = None
        if self.training and self.prob > 0.0:
            prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
            num_clips, num_patches = x.shape[0] // self.clip.num_frames, patches.shape[1]
            num_kept = max(1, int(num_patches * (1.0 - self.prob)))
            kept = torch.rand(num_clips, num_patches, device=x.device).argsort(dim=-1)[:, :num_kept]
            if self.ordered:
                kept = kept.sort(dim=-1).values
            kept = kept.repeat_interleave(self.clip.num_frames, dim=0)  # (B*T, K)
            patches = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            x = torch.cat([prefix, patches], dim=1)
        return (x, kept) if self.return_indices else x

    def extra_repr(self) -> str:
        return f"prob={self.prob}, num_prefix_tokens={self.num_prefix_tokens}"
