"""Attention along time that looks back only, so that frames can be shown one at a time, as they come.

Queries of a frame need the keys and values of the frames before it and nothing else of them. A stream keeps those, as
language models do, and each new frame costs one query at each position.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from img2vid.temporal.attention import TemporalAttention
from img2vid.temporal.clip import ClipContext
from img2vid.temporal.infront import InFront, put_in_front
from img2vid.temporal.kernels import attend


class CausalAttention(InFront):
    """In front of TemporalAttention: a frame attends to itself and to earlier frames."""

    title = "Causal"
    clip: ClipContext  # knows the past of a stream

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B, S, H, T, head_dim)
        past = self.clip.past
        if past is None:
            return attend(q, k, v, self.scale, causal=True, training=self.training)
        k, v, mask = past.of(self).recall(k, v, past.num_steps)
        return attend(q, k, v, self.scale, mask)


def make_causal(attention: TemporalAttention, clip: ClipContext) -> None:
    """Let an attention along time look back only, in place."""
    put_in_front(attention, CausalAttention)
    attention.clip = clip


def look_back(first_query: int, num_queries: int, first_key: int, num_keys: int, window: int | None) -> Tensor:
    """Which keys each query may look at, (num_queries, num_keys): itself and earlier ones, ``window`` in all."""
    query = torch.arange(first_query, first_query + num_queries).unsqueeze(1)
    key = torch.arange(first_key, first_key + num_keys)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


class Past:
    """What a stream remembers of the frames before, layer by layer.

    Args:
        window: frames that a frame sees in each layer, itself included; None for all there have been.
    """

    def __init__(self, window: int | None) -> None:
        self.window, self.num_steps = window, 0
        self.layers: dict[nn.Module, Memory] = {}

    def of(self, attention: nn.Module) -> Memory:
        return self.layers.setdefault(attention, Memory(self.window))

    def num_bytes(self) -> int:
        kept = [x for memory in self.layers.values() for x in (memory.keys, memory.values) if x is not None]
        return sum(x.numel() * x.element_size() for x in kept)


class Memory:
    """Keys and values (B, S, H, slots, head_dim) of one attention. Frame number n of a stream lies in slot n % slots.

    Slots double when they are full. With a window there are as many at most, which are written around and around.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.first = self.next = 0  # frames of the stream: the first that is remembered, the one to come

    def recall(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values that frames ``start``, ``start + 1``, ... may look at, themselves included, and a mask.

        The new ones are kept. To one frame all is visible, in whatever order, so it needs no mask and no copy.
        """
        num_new = k.shape[3]
        if start != self.next:  # shut, this layer was left out for some frames, of which it knows nothing
            self.first = start
        self.next = start + num_new
        start -= self.first
        self.make_room(k, start + num_new)
        if num_new == 1:
            slots = self.write(k, v, start)
            known = min(start + 1, slots)
            return self.keys[..., :known, :], self.values[..., :known, :], None
        before = start if self.window is None else min(start, self.window - 1)
        slots = self.slots_of(start - before, before)
        keys, values = (torch.cat([x[..., slots, :], new], dim=3) for x, new in ((self.keys, k), (self.values, v)))
        self.write(k, v, start)
        mask = look_back(start, num_new, start - before, before + num_new, self.window)
        return keys, values, mask.to(k.device)

    @torch.inference_mode(False)  # what is made in that mode cannot be written to outside of it
    @torch.no_grad()
    def make_room(self, like: Tensor, num_frames: int) -> None:
        """Slots for ``num_frames``, or for the window, where the model is and in its precision now."""
        if self.keys is not None:
            self.keys, self.values = self.keys.to(like), self.values.to(like)
        slots = 0 if self.keys is None else self.keys.shape[3]
        wanted = max(8, 1 << (num_frames - 1).bit_length())
        if self.window is not None:
            wanted = min(wanted, self.window)
        if slots >= wanted:
            return
        for name in ("keys", "values"):
            larger = like.new_empty(*like.shape[:3], wanted, like.shape[4])
            if slots:
                larger[..., :slots, :] = getattr(self, name)
            setattr(self, name, larger)

    def write(self, k: Tensor, v: Tensor, start: int) -> int:
        kept = min(k.shape[3], self.keys.shape[3])  # of many frames at once, a window keeps the last
        slots = self.slots_of(start + k.shape[3] - kept, kept)
        self.keys[..., slots, :], self.values[..., slots, :] = k[..., -kept:, :], v[..., -kept:, :]
        return self.keys.shape[3]

    def slots_of(self, first: int, count: int) -> list[int] | slice:
        """Where frames ``first``, ``first + 1``, ... lie: a slice, which copies nothing, unless they go around."""
        slots = self.keys.shape[3]
        if first % slots + count <= slots:
            return slice(first % slots, first % slots + count)
        return [frame % slots for frame in range(first, first + count)]
