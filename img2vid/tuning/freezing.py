"""What stays as it is: freeze policies by name, frozen modules that behave, and thawing from the output down."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from img2vid.errors import nearest
from img2vid.model import VideoModel
from img2vid.origins import scion_of
from img2vid.tuning.groups import LayerGroup, TuningError, image_tower_of, layer_groups
from img2vid.two_towers import VideoTextModel

POLICIES = ("none", "temporal_only", "grafts_only", "image", "text", "first:N")


def freeze(model: VideoModel | VideoTextModel, policy: str | Iterable[str]) -> list[str]:
    """Stop parameters from being trained. It only ever freezes: what is frozen already stays so.

    Args:
        policy: one of the following, or a list of them.

            ``none``           nothing
            ``temporal_only``  every pretrained parameter of both towers, so that only what is copied or new learns
            ``grafts_only``    all but what ``img2vid.grafts`` has put in, and a classifier of ours
            ``image``          pretrained parameters of the image tower
            ``text``           the text tower
            ``first:N``        pretrained parameters of the image embeddings and the first N blocks
            anything else      a regular expression, matched against whole parameter names

    Other named policies freeze pretrained parameters only: a frozen gate is a branch that costs and never acts, unless
    grafts are all that is to learn.

    Returns:
        Names of all parameters the policy covers.

    Raises:
        TuningError: no such policy, no parameter that it means, or nothing left to train.
    """
    names = frozen_by(model, policy)
    parameters = dict(model.named_parameters())
    if not any(p.requires_grad for name, p in parameters.items() if name not in names):
        raise TuningError(f"freeze_policy={policy!r} leaves nothing to train in this {type(model).__name__}.")
    for name in names:
        parameters[name].requires_grad_(False)
    return sorted(names)


def frozen_by(model: VideoModel | VideoTextModel, policy: str | Iterable[str]) -> set[str]:
    """Names of the parameters that a policy means, without freezing them."""
    groups = layer_groups(model)
    return {name for one in as_list(policy) for name in meant_by(one, groups)}


def as_list(policy: str | Iterable[str]) -> list[str]:
    policies = [policy] if isinstance(policy, str) else list(policy) if isinstance(policy, Iterable) else [policy]
    for one in policies:
        if not isinstance(one, str):
            raise TuningError(
                f"freeze_policy={policy!r}: expected one of {', '.join(POLICIES)}, a regular expression, or a list."
            )
    return policies


def meant_by(policy: str, groups: list[LayerGroup]) -> set[str]:
    if policy == "none":
        return set()
    if policy == "temporal_only":
        return names_of(group for group in groups if group.origin == "pretrained")
    if policy == "grafts_only":
        return all_but_grafts(groups)
    if policy in ("image", "text"):
        found = names_of(group for group in groups if group.tower == policy and group.origin == "pretrained")
        if not found:
            raise TuningError(f"freeze_policy={policy!r}, but this model has no {policy} tower.")
        return found
    if re.fullmatch(r"first:.*", policy):
        return first_layers(policy, groups)
    try:
        found = {name for name in names_of(groups) if re.fullmatch(policy, name)}
    except re.error as error:
        raise TuningError(
            f"freeze_policy={policy!r} is neither {', '.join(POLICIES)} nor a regular expression ({error})."
        ) from error
    if not found:
        raise TuningError(
            f"freeze_policy={policy!r}, read as a regular expression, matches no parameter name as a whole."
            f"{nearest(policy, POLICIES)} Policies: {', '.join(POLICIES)}; a name: {next(iter(names_of(groups)))}."
        )
    return found


def all_but_grafts(groups: list[LayerGroup]) -> set[str]:
    names = names_of(groups)
    kept = {name for name in names if scion_of(name) is not None}
    if not kept:
        raise TuningError(
            "freeze_policy='grafts_only', but this model has no grafts: give it some, grafts=[{'type': 'lora'}]."
        )
    parameters = {name: p for group in groups for name, p in group.parameters.items()}
    for name in kept:  # two zeros in a row, one of them frozen: nothing would ever reach what is behind
        gate = f"{name.rpartition('.temporal_attn.')[0]}.temporal_fc."
        shut = [p for other, p in parameters.items() if other.startswith(gate)] if ".temporal_attn." in name else []
        if shut and not any(p.is_meta or bool(p.detach().any()) for p in shut):
            raise TuningError(
                f"freeze_policy='grafts_only' would freeze {gate}* at zero, and {name} stands behind it: it would "
                "never learn. Use temporal_only, or graft attention over space and MLPs only."
            )
    return names - kept - names_of(group for group in groups if group.name == "classifier")


def first_layers(policy: str, groups: list[LayerGroup]) -> set[str]:
    number = policy.removeprefix("first:")
    num_blocks = sum(group.name.startswith("block_") and group.origin == "pretrained" for group in groups)
    if not number.isdecimal() or int(number) > num_blocks:
        raise TuningError(f"freeze_policy={policy!r}: expected first:N with N from 0 (embeddings) to {num_blocks}.")
    return names_of(
        group
        for group in groups
        if group.tower == "image" and group.origin == "pretrained" and group.depth <= int(number)
    )


def names_of(groups: Iterable[LayerGroup]) -> set[str]:
    return {name for group in groups for name in group.parameters}


def eval_frozen(model: VideoModel | VideoTextModel) -> int:
    """Put modules that hold frozen parameters only in eval mode; call it after each ``model.train()``.

    Without it, batch statistics of a frozen stem would keep moving, and dropout would blur features that nothing can
    adapt to the blur. Blocks themselves keep their mode, which decides about activation checkpointing: gradients still
    pass through frozen blocks.

    Returns:
        How many modules it changed.
    """
    blocks = {id(block) for _, block in image_tower_of(model).tower.blocks}
    changed = set()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            changed |= {part for part in module.modules() if part.training and id(part) not in blocks}
    for module in changed:
        module.training = False
    return len(changed)


@dataclass
class GradualUnfreezing:
    """Pretrained layers join the training one after the other, from the output down.

    A pure function of the time: nothing to save, and a resumed run continues as the uninterrupted one.
    ``requires_grad`` is left alone, as DistributedDataParallel never synchronises a parameter that was frozen when it
    was wrapped. Instead ``drop_gradients`` runs between backward and the optimiser's step (and before clipping): an
    optimiser leaves a parameter without gradient, its moments and its weight decay untouched.

    Args:
        milestones: time -> how many layers, counted from each tower's output (1: heads, 2: heads and last blocks, ...),
            train from then on, or ``all``; epochs or steps, whichever ``now`` is given in. 0 before the first one.

    Raises:
        TuningError: times or numbers that are negative, or layers that would freeze again.
    """

    milestones: Mapping[int, int | str]

    def __post_init__(self) -> None:
        if not isinstance(self.milestones, Mapping) or not self.milestones:
            raise TuningError(f"milestones={self.milestones!r}: expected times with layers, such as {{0: 1, 5: all}}.")
        thawed: float = -1
        for time, number in sorted(self.milestones.items()):
            valid = number == "all" or (is_count(number) and layers(number) >= thawed and thawed != float("inf"))
            if not is_count(time) or not valid:
                raise TuningError(
                    f"milestones={dict(self.milestones)!r}: at {time!r}, {number!r} layers. Expected whole numbers "
                    "of layers that never fall, or 'all', at whole numbers of epochs or steps."
                )
            thawed = layers(number)

    def thawed(self, now: int) -> float:
        """Layers, from the output, that train at this time; infinity for all."""
        reached = [number for time, number in sorted(self.milestones.items()) if time <= now]
        return layers(reached[-1]) if reached else 0

    def waiting(self, model: VideoModel | VideoTextModel, now: int) -> dict[str, nn.Parameter]:
        """Pretrained parameters that must not move yet."""
        thawed = self.thawed(now)
        if thawed == float("inf"):
            return {}
        groups = [g for g in layer_groups(model) if g.origin == "pretrained" and g.from_output >= thawed]
        return {name: parameter for group in groups for name, parameter in group.parameters.items()}

    def drop_gradients(self, model: VideoModel | VideoTextModel, now: int) -> int:
        """Forget the gradients of waiting parameters; returns of how many."""
        held = [p for p in self.waiting(model, now).values() if p.grad is not None]
        for parameter in held:
            parameter.grad = None
        return len(held)


def layers(number: int | str) -> float:
    """How many layers a milestone thaws; infinity for ``all``."""
    return float("inf") if number == "all" else int(number)


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
