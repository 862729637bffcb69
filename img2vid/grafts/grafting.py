"""Put grafts on a model, take them off again, fold them into its own weights. All of it in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from img2vid.grafts.base import Graft, GraftError, Site, read_grafts
from img2vid.grafts.fronts import PREFIX, WeightScion, put_on, take_off
from img2vid.model import VideoModel
from img2vid.temporal.checkpointing import CheckpointedBlock
from img2vid.temporal.infront import fronts_of
from img2vid.two_towers import VideoTextModel


def insert(video: VideoModel, grafts: Iterable[Graft]) -> None:
    """Grow grafts on an image tower that has its time already.

    Raises:
        GraftError: one of them finds no place; nothing has been changed by that one then.
    """
    for graft in grafts:
        if graft.mixes_frames and video.config.causal:
            raise GraftError(
                f"{graft.name} lets a frame see later ones, which causal=True rules out: a {graft.type} looks both "
                "ways along time. Leave one of the two."
            )
        for one, other in [pair for has in video.grafts for pair in ((graft, has), (has, graft))]:
            if one.leaves_tokens and other.counts_patches:
                raise GraftError(
                    f"{one.name} leaves tokens of its own among the patches from block to block, where {other.name} "
                    "must know which token is which patch. Use prompts of form='deep': those end with their block."
                )
        sites = graft.sites(video)
        grown = [(site, graft.grow(video, site)) for site in sites]  # all of them, before any is put on
        for site, scion in grown:
            like = next(site.host.parameters())
            scion.to(device=like.device, dtype=like.dtype).train(site.host.training)
            if isinstance(scion, WeightScion):
                scion.clip = video.clip
            put_on(site, graft.name, scion)
        video.grafts = (*video.grafts, graft)
        graft.planted(video)


def plant(video: VideoModel) -> None:
    """Grow what the configuration asks for, on a model in the making."""
    insert(video, read_grafts(video.config.grafts))
    write_down(video)


def graft(model: VideoModel | VideoTextModel, grafts: Iterable[Any]) -> VideoModel | VideoTextModel:
    """Add grafts to a model that exists already, trained or not. What it computes stays the same, as each guarantees.

    Args:
        model: changed in place; its ``config`` says what was added, so it is saved and loaded as any other.
        grafts: such as ``[{"type": "lora", "rank": 8}, "adapter"]``, or instances of the classes.

    Returns:
        The same model.

    Raises:
        Img2VidError: an unknown type or option, a name that is taken, or a graft that finds no place; the model is then
            what it was.
    """
    video = tower_of(model)
    new = read_grafts(grafts)
    read_grafts([*video.grafts, *new])  # names must differ from those it has
    if isinstance(model, VideoTextModel):
        check_beside_text(new)
    try:
        with without_checkpointing(model):
            insert(video, new)
        for one in new:
            one.fetch(video)
    except BaseException:  # an interrupt, too, leaves the model that was there
        remove(model, [one.name for one in video.grafts if one in new])
        raise
    write_down(model)
    return model


def fetch(model: VideoModel | VideoTextModel) -> None:
    """Load what grafts of a new model need from elsewhere."""
    for one in tower_of(model).grafts:
        one.fetch(tower_of(model))


def check_beside_text(grafts: Iterable[Graft]) -> None:
    """Refuse what would make video features of another length than those of texts."""
    for one in grafts:
        if not one.keeps_length:
            raise GraftError(
                f"{one.name} makes features longer, and texts would have no counterpart for what is new. Convert with "
                "num_classes=N, which leaves the text tower out; or use mode='gate', which stays where texts are."
            )


def remove(model: VideoModel | VideoTextModel, names: str | Iterable[str] | None = None) -> VideoModel | VideoTextModel:
    """Take grafts off: what is left is bit for bit the model they were put on. None for all of them."""
    return take(model, names, lambda graft, site, scion: None)


def fold(model: VideoModel | VideoTextModel, names: str | Iterable[str] | None = None) -> VideoModel | VideoTextModel:
    """Write grafts into the model's own weights: the same function up to rounding, keys and cost of the model without.

    Raises:
        GraftError: one of them is no part of a weight; nothing has been changed then.
    """
    for one in chosen(tower_of(model), names):
        if type(one).fold is Graft.fold:
            raise GraftError(
                f"{one.name} cannot be folded into the model's own weights: {one.folds}. Keep it, or take it off: "
                f"img2vid.grafts.remove(model, {one.name!r})."
            )
    return take(model, names, lambda graft, site, scion: graft.fold(site, scion))


def take(
    model: VideoModel | VideoTextModel,
    names: str | Iterable[str] | None,
    before: Callable[[Graft, Site, nn.Module], None],
) -> VideoModel | VideoTextModel:
    video = tower_of(model)
    for one in chosen(video, names):
        for site in one.sites(video):
            before(one, site, getattr(site.host, PREFIX + one.name))
            take_off(site, one.name)
        one.uprooted(video)
        video.grafts = tuple(other for other in video.grafts if other is not one)
    write_down(model)
    return model


def chosen(video: VideoModel, names: str | Iterable[str] | None) -> list[Graft]:
    names = [names] if isinstance(names, str) else names
    has = {graft.name: graft for graft in video.grafts}
    for name in [] if names is None else (names := list(names)):
        if name not in has:
            raise GraftError(f"This model has no graft called {name!r}; it has {', '.join(has) or 'none'}.")
    return list(has.values()) if names is None else [has[name] for name in names]


def write_down(model: VideoModel | VideoTextModel) -> None:
    """Let ``config`` say what the model has."""
    video = tower_of(model)
    config = dataclasses.replace(video.config, grafts=tuple(graft.to_dict() for graft in video.grafts))
    video.config = config  # which also is that of a model with text


@contextmanager
def without_checkpointing(model: VideoModel | VideoTextModel) -> Iterator[None]:
    """Inside, no block is checkpointed: what is put on a block belongs into what is run twice."""
    video = tower_of(model)
    was_on = video.grad_checkpointing
    stacks = [fronts_of(block) for _, block in video.tower.blocks]
    trunk_only = any(len(fronts) > 1 and fronts[0] is CheckpointedBlock for fronts in stacks)
    video.set_grad_checkpointing(False)
    try:
        yield
    finally:
        video.set_grad_checkpointing(was_on, trunk_only)


def tower_of(model: VideoModel | VideoTextModel) -> VideoModel:
    return model.visual if isinstance(model, VideoTextModel) else model


def num_parameters(video: VideoModel, name: str) -> int:
    """Numbers in all scions of one graft."""
    own = (p for key, p in video.named_parameters() if f".{PREFIX}{name}." in f".{key}")
    return sum(parameter.numel() for parameter in own)
