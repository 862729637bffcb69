"""What stands between a new branch and the residual stream. A gate at zero keeps the pretrained function."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TanhGate(nn.Module):
    """One learned scalar through tanh, starting at tanh(0) = 0 (Flamingo, arXiv:2204.14198; LaViLa's temporal gate)."""

    def __init__(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha.tanh()


def zero_linear(
    in_features: int, out_features: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> nn.Linear:
    """A Linear whose weight and bias are zero: TimeSformer's ``temporal_fc``, ControlNet's zero convolution."""
    device = torch.get_default_device() if device is None else device  # skip_init would take None for meta
    linear = nn.utils.skip_init(nn.Linear, in_features, out_features, device=device, dtype=dtype)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def make_gate(kind: str, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The gate of a temporal branch of width ``dim``: ``temporal_fc`` | ``tanh`` | ``none`` (ablation: always open)."""
    if kind == "temporal_fc":
        return zero_linear(dim, dim, device, dtype)
    if kind == "tanh":
        return TanhGate(device, dtype)
    return nn.Identity()
