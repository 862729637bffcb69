"""One model of several alike, in weight space: linear, spherical (SLERP), and task arithmetic (arXiv:2212.04089).

Models must differ in their weights alone. What comes out computes what none of them does, but at the ends, which are
exact: all of the weight on one model is bitwise that model, and task vectors scaled by 0 are bitwise their base.
Integers and masks are the first model's. Gates of a tanh are merged as what they let through, tanh(g).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from img2vid.checkpoints.native import WEIGHTS, check_replaceable, load, read_description, save
from img2vid.errors import Img2VidError
from img2vid.grafts.base import Graft
from img2vid.interpolation import check_same, is_tanh_gate, mix
from img2vid.tuning.groups import image_tower_of
from img2vid.weights.accounting import load_weights, read_state_dict

METHODS = ("linear", "slerp", "task")
State = Mapping[str, Tensor]


class MergeError(Img2VidError):
    """Shares that make no sense, or models that cannot be merged so."""


def linear(states: Sequence[State], shares: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean; shares are divided by their sum."""
    total = sum(shares)
    if len(shares) != len(states) or not 0 < total < math.inf or min(shares) < 0:  # also where one is no number
        raise MergeError(
            f"shares={list(shares)} of {len(states)} models: expected as many numbers, not negative, not all zero."
        )
    parts = [share / total for share in shares]
    flipped = list(reversed(states))  # mix takes what has no mean from the last
    return {key: mix([s[key] for s in flipped], parts[::-1], is_tanh_gate(key)) for key in states[0]}


def slerp(start: State, end: State, alpha: float) -> dict[str, Tensor]:
    """From ``start`` (0) to ``end`` (1) along the arc between each two tensors, taken as vectors; lengths go along.

    Where two point the same way, or opposite ways, there is no one arc, and the straight line is taken.
    """
    if not 0.0 <= alpha <= 1.0:
        raise MergeError(f"{alpha} of the arc (--shares): expected 0 (the first model) to 1 (the second), or between.")
    return {key: on_arc(start[key], end[key], alpha, is_tanh_gate(key)) for key in start}


def on_arc(start: Tensor, end: Tensor, alpha: float, is_gate: bool) -> Tensor:
    straight = mix([end, start], [alpha, 1.0 - alpha], is_gate)
    if alpha in (0.0, 1.0) or is_gate or not start.is_floating_point():
        return straight
    a, b = start.detach().double(), end.detach().to(start.device).double()
    lengths = a.norm() * b.norm()
    cosine = float((a * b).sum() / lengths) if lengths > 0 else 1.0
    if abs(cosine) > 1 - 1e-9:
        return straight
    angle = torch.tensor(cosine, dtype=torch.float64).acos()
    mixed = (((1 - alpha) * angle).sin() * a + (alpha * angle).sin() * b) / angle.sin()
    return mixed.to(start.dtype)


def task(base: State, states: Sequence[State], scales: Sequence[float]) -> dict[str, Tensor]:
    """``base + sum of scale_i (state_i - base)``: what each model learned beyond the base, added or taken away."""
    if len(scales) != len(states) or not all(map(math.isfinite, scales)):
        raise MergeError(f"scales={list(scales)} of {len(states)} models: expected as many numbers.")
    return {key: added(base[key], [s[key] for s in states], scales, is_tanh_gate(key)) for key in base}


def added(base: Tensor, tensors: Sequence[Tensor], scales: Sequence[float], is_gate: bool) -> Tensor:
    learned = [(t, scale) for t, scale in zip(tensors, scales, strict=True) if scale != 0.0]
    if not base.is_floating_point() or not learned:
        return base.detach().clone()
    if len(learned) == 1 and learned[0][1] == 1.0:
        return learned[0][0].detach().clone()
    values = [base.detach().double(), *(t.detach().to(base.device).double() for t, _ in learned)]
    if is_gate:
        values = [value.tanh() for value in values]
    total = values[0] + sum(scale * (v - values[0]) for v, (_, scale) in zip(values[1:], learned, strict=True))
    if is_gate:
        total = total.clamp(-1 + 2**-53, 1 - 2**-53).atanh()
    return total.to(base.dtype)


# ---- the command line


def run(models: list[str], out: Path, method: str, shares: list[float] | None, base: str | None) -> int:
    """Merge folders, and save; says what it does. Returns the exit code."""
    folders = [Path(name) for name in ([base] if base is not None else []) + models]
    class_names = check_same([str(folder) for folder in folders], [read_description(folder) for folder in folders])
    if any(folder.resolve() == out.resolve() for folder in folders):
        raise MergeError(f"--out {out} is one of the models to be read. Choose another folder.")
    check_replaceable(out)
    model = load(folders[0])
    states = []
    for folder in folders:
        states.append(read_state_dict(folder / WEIGHTS))
        load_weights(model, states[-1], source=str(folder / WEIGHTS))  # for its account of every key
    if method == "task":
        scales = shares if shares is not None else [1.0] * len(models)
        state = task(states[0], states[1:], scales)
        said = f"{base} + " + " + ".join(f"{s:g} x ({m} - {base})" for s, m in zip(scales, models, strict=True))
    elif method == "slerp":
        alpha = 0.5 if shares is None else shares[0]
        state, said = slerp(*states, alpha), f"{alpha:g} of the arc from {models[0]} to {models[1]}"
    else:
        parts = shares if shares is not None else [1.0] * len(models)
        state = linear(states, parts)
        said = " + ".join(f"{p / sum(parts):g} x {m}" for p, m in zip(parts, models, strict=True))
    load_weights(model, state, source="the merged weights")
    video = image_tower_of(model)
    video.class_names = class_names
    video.image_weights = f"a merger ({method}): {said}"
    save(model, out)
    print(f"{said}.")
    for one in video.grafts:
        if type(one).fold is not Graft.fold:  # a product, of which each factor was merged by itself
            print(
                f"{one.name}: its parts were merged one by one, which is not what they add to a weight. For that, fold"
            )
            print("it into each model first: img2vid graft FOLDER --fold --out FOLDER.")
    print("Kept of any model's function: nothing is promised, as none of them is there alone. Measure it.")
    print(f"Wrote {out}. Load it with img2vid.load({str(out)!r}).")
    return 0
