"""Learning rates over steps. All groups are scaled by one factor, so the ratios between them stay as they were set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.optim.lr_scheduler import LambdaLR

from img2vid.errors import nearest
from img2vid.tuning.groups import TuningError
from img2vid.tuning.optimizers import number

SCHEDULES = ("cosine", "constant", "step")


def build_schedule(
    optimizer: torch.optim.Optimizer,
    name: str = "cosine",
    *,
    total_steps: int,
    warmup: int | float = 0,
    final: float = 0.0,
    milestones: Sequence[int | float] = (),
    factors: float | Sequence[float] = 0.1,
) -> LambdaLR:
    """A scheduler to be stepped after every optimiser step.

    A time is a number of steps where it is whole, and a share of ``total_steps`` where it is a fraction below 1.

    Args:
        name: ``cosine`` falls along half a cosine | ``constant`` | ``step`` jumps at milestones.
        total_steps: optimiser steps of the whole training; the last factor holds beyond.
        warmup: time over which the rate first rises in equal steps, under any schedule.
        final: what cosine ends at, as a factor.
        milestones: times of ``step``.
        factors: what a milestone multiplies the rate by, one for all or one each; above 1 the rate rises.

    Raises:
        TuningError: an unknown name, or times that are not in order within training.
    """
    factor = schedule_factor(
        name, total_steps=total_steps, warmup=warmup, final=final, milestones=milestones, factors=factors
    )
    # a plain function, not an object: LambdaLR would save an object's attributes and, on resuming, put them back over
    # what the configuration says
    return LambdaLR(optimizer, factor)


def schedule_factor(
    name: str,
    *,
    total_steps: int,
    warmup: int | float = 0,
    final: float = 0.0,
    milestones: Sequence[int | float] = (),
    factors: float | Sequence[float] = 0.1,
) -> Callable[[int], float]:
    """step -> factor on every group's rate, as described at ``build_schedule``."""
    if name not in SCHEDULES:
        raise TuningError(f"schedule={name!r}: expected one of {', '.join(SCHEDULES)}.{nearest(str(name), SCHEDULES)}")
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise TuningError(f"total_steps={total_steps!r}: expected a whole number of at least 1.")
    number("final", final, least=0.0)
    rising = to_steps("warmup", warmup, total_steps)
    times = [to_steps("milestones", time, total_steps) for time in milestones]
    jumps = [factors] * len(times) if isinstance(factors, (int, float)) else list(factors)
    if name == "step":
        check_steps(times, jumps, rising)
    elif times:
        raise TuningError(f"milestones={list(milestones)} belong to schedule='step', not to {name!r}.")

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising  # the first step is not wasted on a rate of zero
        if name == "cosine":
            progress = min(1.0, (step - rising) / max(1, total_steps - rising))
            return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
        return math.prod(jump for time, jump in zip(times, jumps, strict=True) if step >= time)

    return factor


def check_steps(times: list[int], jumps: list[float], rising: int) -> None:
    for jump in jumps:
        number("factors", jump, least=0.0)
    if not times or len(times) != len(jumps):
        raise TuningError(
            f"schedule='step' was given {len(times)} milestones and {len(jumps)} factors; expected at least one "
            "milestone, and one factor for all or one for each."
        )
    if times != sorted(set(times)) or times[0] < rising:
        raise TuningError(f"milestones at steps {times} (warm-up ends at {rising}): expected rising ones after it.")


def to_steps(name: str, time: int | float, total_steps: int) -> int:
    """A whole number of steps, or a fraction below 1 of all steps, in steps."""
    if isinstance(time, float) and time < 1.0:
        steps = round(number(name, time, least=0.0) * total_steps)
    elif isinstance(time, int) and not isinstance(time, bool):
        steps = time
    else:
        raise TuningError(f"{name}={time!r}: expected a whole number of steps, or a fraction below 1 of training.")
    if not 0 <= steps <= total_steps:
        raise TuningError(f"{name}={time!r}: expected within the {total_steps} steps of training.")
    return steps
