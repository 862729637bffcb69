"""The labels of a list in the numbers of a model's own classifier, where the model says what those stand for."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches

from img2vid.data.manifest import VideoList
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.prompts import readable
from img2vid.evaluation.protocols import Lists


def in_own_classes(model, lists: Lists) -> Lists:
    """The lists as this model must be asked: numbers that mean what its classifier means by them.

    Names are compared as people write them (``air_drumming`` is ``air drumming``). All of the model's classes compete,
    also those of which the list has no video. A list of bare numbers is taken to number them as the model does.

    Raises:
        EvaluationError: a class of the list that the model does not have.
    """
    own = getattr(model, "class_names", None)
    if own is None or model.num_logits is None or lists.videos.class_names == own:
        return lists
    videos = lists.videos
    labels = {row.label for row in videos.rows if row.label is not None}
    if videos.class_names is None:
        unknown = sorted(label for label in labels if label >= len(own))
        number_of = {label: label for label in labels}
    else:
        place = {readable(name): number for number, name in enumerate(own)}
        if len(place) < len(own):
            raise EvaluationError(
                "Two classes of this model's classifier have the same name; number the list's labels as it does."
            )
        number_of = {label: place.get(readable(videos.class_names[label]), -1) for label in labels}
        unknown = [videos.class_names[label] for label, number in sorted(number_of.items()) if number < 0]
    if unknown:
        raise EvaluationError(unknown_classes(unknown, own, videos))
    rows = tuple(row if row.label is None else replace(row, label=number_of[row.label]) for row in videos.rows)
    return replace(lists, videos=replace(videos, rows=rows, class_names=own))


def unknown_classes(unknown: list, own: tuple[str, ...], videos: VideoList) -> str:
    several = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
    near = get_close_matches(readable(str(unknown[0])), map(readable, own), 1)
    hint = f" Did you mean {near[0]!r} by {unknown[0]!r}?" if near else ""
    return (
        f"{videos.source} has {len(unknown)} classes that this model's classifier does not have: {several}.{hint} It "
        f"tells apart {len(own)}: {', '.join(own[:8])}{', ...' if len(own) > 8 else ''}. Rename the list's, or number "
        "its labels as the classifier does."
    )
