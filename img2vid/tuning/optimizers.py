"""Per-group learning rates, what decays, and the two optimisers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from img2vid.errors import nearest
from img2vid.model import VideoModel
from img2vid.tuning.groups import TuningError, decayed_names, layer_groups
from img2vid.two_towers import VideoTextModel

MULTIPLIERS = {"pretrained": 1.0, "copied": 5.0, "new": 10.0, "text": 1.0, "time_embed": 1.0}
OPTIMIZERS = ("adamw", "sgd")


def parameter_groups(
    model: VideoModel | VideoTextModel,
    lr: float,
    *,
    multipliers: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
    weight_decay: float = 0.05,
) -> list[dict[str, Any]]:
    """Groups for a torch optimiser: every parameter that is not frozen, exactly once.

        rate of a group = lr * multipliers[origin] * layer_decay ** (layers between it and its tower's output)

    Args:
        lr: of pretrained parameters in the last layer.
        multipliers: by origin, beyond the default of 1 for ``pretrained``, 5 for ``copied``, 10 for ``new``; and
            ``text``, 1, which the text tower's rates are multiplied by as well, and ``time_embed``, 1, which that of
            the time embedding is: it has as far to go as tokens are large, gates only as far as weights are.
        layer_decay: in (0, 1], as in BEiT (arXiv:2106.08254); None for the same rate in all layers.
        weight_decay: of matrices that multiply; norms, biases, gates, embeddings and temperatures have none.

    Returns:
        Dicts with ``params``, ``lr``, ``weight_decay`` and a unique ``name``: the origin, behind ``text`` for the text
        tower, or behind the layer's name where layers differ; with ``/time_embed`` and ``/no_decay`` where so.

    Raises:
        TuningError: numbers out of range, an unknown origin, or nothing to train.
    """
    multipliers = {**MULTIPLIERS, **(multipliers or {})}
    for origin, multiplier in multipliers.items():
        if origin not in MULTIPLIERS:
            raise TuningError(
                f"multipliers: unknown {origin!r}.{nearest(str(origin), MULTIPLIERS)} Known: {', '.join(MULTIPLIERS)}."
            )
        number(f"multipliers[{origin!r}]", multiplier, least=0.0)
    number("lr", lr, least=0.0)
    number("weight_decay", weight_decay, least=0.0)
    if layer_decay is not None and not 0.0 < number("layer_decay", layer_decay, least=0.0) <= 1.0:
        raise TuningError(f"layer_decay={layer_decay!r}: expected a number above 0 and at most 1, or none.")
    decayed, found = decayed_names(model), dict[str, dict[str, Any]]()
    for layer in layer_groups(model):
        rate = lr * multipliers[layer.origin] * (multipliers["text"] if layer.tower == "text" else 1.0)
        tower = "text/" if layer.tower == "text" else ""
        if layer_decay is not None:
            rate *= layer_decay**layer.from_output
        for name, parameter in layer.parameters.items():
            if not parameter.requires_grad:
                continue
            label = tower + layer.origin if layer_decay is None else layer.label
            own_rate = rate
            if name.endswith("time_embed") and multipliers["time_embed"] != 1.0:
                own_rate, label = rate * multipliers["time_embed"], f"{label}/time_embed"
            label += "" if name in decayed else "/no_decay"
            decay = weight_decay if name in decayed else 0.0
            group = found.setdefault(label, {"params": [], "lr": own_rate, "weight_decay": decay, "name": label})
            group["params"].append(parameter)
    if not found:
        raise TuningError(f"Every parameter of this {type(model).__name__} is frozen; there is nothing to train.")
    return list(found.values())


def build_optimizer(
    groups: list[dict[str, Any]],
    name: str = "adamw",
    *,
    betas: Sequence[float] = (0.9, 0.98),
    eps: float = 1e-8,
    momentum: float = 0.9,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """AdamW or SGD over ``parameter_groups``, which carry rates and weight decay.

    Args:
        name: ``adamw`` (betas, eps) | ``sgd`` (momentum, nesterov; its weight decay is an L2 penalty).
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=(betas[0], betas[1]), eps=eps)
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov)
    raise TuningError(f"optimizer={name!r}: expected one of {', '.join(OPTIMIZERS)}.{nearest(str(name), OPTIMIZERS)}")


def penalty(model: VideoModel | VideoTextModel, *, l1: float = 0.0, l2: float = 0.0) -> Tensor:
    """``l1 * sum |w| + l2 / 2 * sum w^2`` over the trainable parameters that weight decay applies to; a scalar.

    To add to the loss. AdamW decouples weight decay from the gradient; this does not.
    """
    number("l1", l1, least=0.0)
    number("l2", l2, least=0.0)
    decayed = decayed_names(model)
    weights = [p for name, p in model.named_parameters() if name in decayed and p.requires_grad]
    total = torch.zeros((), device=next(model.parameters()).device)
    for weight in weights if l1 or l2 else ():
        if l1:
            total = total + l1 * weight.abs().sum(dtype=torch.float32)
        if l2:
            total = total + l2 / 2 * weight.square().sum(dtype=torch.float32)
    return total


@torch.no_grad()
def bound_temperature(model: VideoModel | VideoTextModel, beginning: Mapping[str, Tensor]) -> None:
    """Keep a learned ``logit_scale`` at log(100) at most, as CLIP does (arXiv:2103.00020, section 2.5).

    Pretrained models end there, and small batches push on. One that began higher (``beginning``, its state dict then)
    stays where it began at most; with a ``logit_bias`` (SigLIP) there is no bound.
    """
    scale = getattr(model, "logit_scale", None)
    if scale is not None and scale.requires_grad and getattr(model, "logit_bias", None) is None:
        scale.clamp_(max=max(math.log(100), float(beginning["logit_scale"])))


def number(name: str, value: object, least: float) -> float:
    """A finite number, or an error that names it; YAML reads 1e-4 as a text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        hint = " (YAML reads numbers like 1e-4 as text: write 1.0e-4)" if isinstance(value, str) else ""
        raise TuningError(f"{name}={value!r}: expected a number of at least {least:g}{hint}.")
    return float(value)
