"""The arithmetic limit: the matrix products of a space-time ViT, and nothing else.

Every product of the model runs once, in order, in its own size, with weights of its own, as one call of ``torch.mm`` or
``torch.bmm`` that writes into memory which is already there. Left out is everything that is no product: biases, norms,
softmax, GELU, residual sums, gates' additions, copies of any kind, position and time embeddings, Python's modules.

    patches       (B*T*N, 3*16*16) x (D)
    along time    (B*T*S, D) x (3D);  S*B*H times (T, d) x (T, d)^T and (T, T) x (T, d);  (D) x (D), twice
    along space   (B*T*S, D) x (3D);  B*T*H times (S, d) x (S, d)^T and (S, S) x (S, d);  (D) x (D)
    MLP           (B*T*S, D) x (4D), (4D) x (D)

S = N + 1 tokens a frame. ``folded`` leaves out one of the two (D) x (D) products along time. A training step adds the
two products of each product's backward: for the gradient of what came in, and of the weights (or the other operand).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """A plain ViT on square frames."""

    dim: int
    heads: int
    depth: int = 12
    patch: int = 16
    image: int = 224

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def tokens(self) -> int:
        return self.patches + 1


VIT = {"ViT-S/16": Sizes(384, 6), "ViT-B/16": Sizes(768, 12)}


class Limit:
    """Call it: one forward's products; with ``train`` a training step's.

    Args:
        frames: B*T.
        num_frames: T; None for the image model, without the products along time.
    """

    def __init__(
        self,
        sizes: Sizes,
        frames: int,
        num_frames: int | None,
        folded: bool = False,
        train: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.where, self.train, self.scratch = {"dtype": dtype, "device": device}, train, {}
        d, rows = sizes.dim, frames * sizes.tokens
        head = d // sizes.heads
        self.products: list[tuple[Tensor, Tensor]] = []
        self.linear(frames * sizes.patches, 3 * sizes.patch**2, d)
        for _ in range(sizes.depth):
            if num_frames is not None:
                self.linear(rows, d, 3 * d)
                self.attention(rows // num_frames * sizes.heads, num_frames, head)
                for _ in range(1 if folded else 2):
                    self.linear(rows, d, d)
            self.linear(rows, d, 3 * d)
            self.attention(frames * sizes.heads, sizes.tokens, head)
            self.linear(rows, d, d)
            self.linear(rows, d, 4 * d)
            self.linear(rows, 4 * d, d)

    def linear(self, rows: int, wide: int, out: int) -> None:
        weight = torch.randn(out, wide, **self.where)  # as nn.Linear keeps it; one for each product
        self.products.append((self.buffer("a", rows, wide), weight.T))

    def attention(self, batch: int, length: int, head: int) -> None:
        q, k = self.buffer("q", batch, length, head), self.buffer("k", batch, length, head)
        self.products += [(q, k.transpose(1, 2)), (self.buffer("weights", batch, length, length), k)]

    def buffer(self, role: str, *shape: int) -> Tensor:
        """Memory that products of the same shape share."""
        key = (role, *shape)
        if key not in self.scratch:
            self.scratch[key] = torch.randn(shape, **self.where)
        return self.scratch[key]

    @torch.no_grad()
    def __call__(self) -> None:
        for a, b in self.products:
            self.multiply(a, b)
        if not self.train:
            return
        for a, b in reversed(self.products):
            dy = self.buffer("dy", *a.shape[:-1], b.shape[-1])
            self.multiply(dy, b.mT)  # the gradient of a
            self.multiply(a.mT, dy)  # the gradient of b

    def multiply(self, a: Tensor, b: Tensor) -> None:
        out = self.buffer("out", *a.shape[:-1], b.shape[-1])
        (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out=out)

    def flops(self) -> int:
        """Of the forward; a multiply-add counts two."""
        return sum(2 * a.numel() * b.shape[-1] for a, b in self.products)
