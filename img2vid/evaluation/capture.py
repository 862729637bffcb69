"""The attention a model really uses, caught while it runs.

PyTorch shows a ``TorchFunctionMode`` every call of its own functions. Whatever an attention does to its queries and
keys (rotary codes, norms), adds to their products (relative positions, masks) or looks at (one frame, all of them), it
ends in one of three calls, so nothing has to be known of the class:

    scaled_dot_product_attention    the weights are worked out once more, and must give what the call gave
    multi_head_attention_forward    nn.MultiheadAttention; it is asked for its weights
    softmax                         attention written out; its result is the weights
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from img2vid.evaluation.errors import EvaluationError
from img2vid.model import VideoModel
from img2vid.temporal.block import SpaceTimeBlock
from img2vid.temporal.kernels import spelled_out
from img2vid.temporal.pooling import first

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)


@dataclass
class Layer:
    """What one block, or one layer of the factorised encoder, did in a forward pass."""

    attention: list[Tensor] = field(default_factory=list)  # of the image block: each (B', Q, K)
    temporal: Tensor | None = None  # (B, S, T, T)
    ratio: float = 0.0  # |what the temporal branch added| / |what it was added to|


@dataclass
class Captured:
    """Weights in the order they were used, means over heads, float32 on the CPU; rows sum to 1."""

    blocks: list[Layer]
    encoder: list[Layer]
    pooling: list[Tensor] = field(default_factory=list)  # after the last block: each (B*T, Q, K)
    reads: Tensor | None = None  # (B*T, S): whether the pooling reads this token of the last block


class Recorder(TorchFunctionMode):
    """Inside, hands the weights (..., H, Q, K) of every attention to ``see``."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.see = see
        self.inside = ExitStack()

    def __enter__(self):
        self.inside.enter_context(spelled_out())  # attention along time, which may take several ways
        return super().__enter__()

    def __exit__(self, *exc):
        self.inside.close()
        return super().__exit__(*exc)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            call = inspect.signature(func).bind(*args, **kwargs)
            wanted = call.arguments.get("need_weights", True)
            call.arguments |= {"need_weights": True, "average_attn_weights": False}
            out, weights = func(*call.args, **call.kwargs)
            self.see(weights)
            return out, weights.mean(1) if wanted else None
        out = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.see(weights_of(out, *args, **kwargs))
        elif func in SOFTMAX and out.ndim in (4, 5):
            self.see(out)
        return out


def weights_of(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights (..., H, Q, K) behind a call of ``scaled_dot_product_attention`` and its result ``out``.

    Raises:
        EvaluationError: applied to the values, they do not give ``out``.
    """
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(repeats, dim=-3) for x in (key, value))
    scores = (query @ key.transpose(-2, -1)).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(out.dtype, 5e-2) * float(value.detach().abs().max())
    if not (weights.to(value.dtype) @ value - out).abs().max() <= tolerance:
        raise EvaluationError("Attention weights, worked out again, do not give what the attention gave; no map of it.")
    return weights


@contextmanager
def capturing(video: VideoModel) -> Iterator[Captured]:
    """Inside, one forward pass of ``video`` without gradients is written down."""
    blocks = [block for _, block in video.tower.blocks]
    encoder = list(video.temporal_encoder.blocks) if video.config.attention == "factorised_encoder" else []
    found = Captured([Layer() for _ in blocks], [Layer() for _ in encoder])
    places: list[Callable[[Tensor], None]] = [found.pooling.append]  # the innermost module that runs comes last
    hooks = []

    def during(module: nn.Module, see: Callable[[Tensor], None]) -> None:
        def leave(module, args, out) -> None:
            places.pop()

        hooks.append(module.register_forward_pre_hook(lambda module, args: places.append(see)))
        hooks.append(module.register_forward_hook(leave))

    def watch_branch(layer: Layer, block: nn.Module, attention: nn.Module, gate: nn.Module) -> None:
        stream = []
        during(attention, lambda weights: setattr(layer, "temporal", weights))
        hooks.append(block.register_forward_pre_hook(lambda module, args: stream.append(args[0].float().norm())))
        hooks.append(
            gate.register_forward_hook(
                lambda module, args, out: setattr(layer, "ratio", float(out.float().norm() / stream.pop()))
            )
        )

    for layer, block in zip(found.blocks, blocks, strict=True):
        during(block, layer.attention.append)
        if isinstance(block, SpaceTimeBlock):
            watch_branch(layer, block, block.temporal_attn, block.temporal_fc)
    for layer, block in zip(found.encoder, encoder, strict=True):
        watch_branch(layer, block, block.attn, block.attn_fc)

    last: list[Tensor] = []

    def cut(module, args, out):  # from here on with gradients, to ask which of these tokens the features depend on
        torch.set_grad_enabled(True)
        last.append(out.detach().requires_grad_())
        return last[0]

    def asked(module, args, out) -> None:
        out = first(out)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
        (gradient,) = torch.autograd.grad((out * direction).sum(), last)
        found.reads = (gradient != 0).any(-1).cpu()
        torch.set_grad_enabled(False)

    hooks += [blocks[-1].register_forward_hook(cut), video.base.register_forward_hook(asked)]
    try:
        with torch.no_grad(), Recorder(lambda weights: places[-1](weights.detach().float().mean(-3).cpu())):
            yield found
    finally:
        for hook in hooks:
            hook.remove()
