"""What the numbers of a classifier in training stand for: what the training list says, and is saved with the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from img2vid.config import ConfigError
from img2vid.evaluation.prompts import readable
from img2vid.model import VideoModel


def name_classes(video: VideoModel, names: Sequence[str], learns: bool) -> None:
    """Give the model's classifier the names of a list's classes, or find that its numbers mean other classes.

    As many classes of other names are a new task, where the classifier learns; where it is only asked, or goes on from
    a checkpoint, they are a mistake.

    Raises:
        ConfigError: the classifier's classes are known, and are the list's in another order, others, or not as many.
    """
    if video.config.num_classes is None:
        return
    own, given = ([readable(name) for name in known] for known in (video.class_names or (), names))
    is_new_task = learns and len(own) == len(given) and sorted(own) != sorted(given)
    if own and own != given and not is_new_task:
        raise ConfigError(
            f"The list's classes ({shortened(names)}) are numbered otherwise than the classifier's "
            f"({shortened(video.class_names or ())}), so that numbers would mean other classes. Give data.classes: a "
            "text file with all of the model's (class_names in its config.json) in their order, one a line, spelled as "
            "in the list."
        )
    if learns and own != given and video.config.num_classes == len(names):
        video.class_names = tuple(names)


def resume_names(video: VideoModel, noted: Mapping[str, Any], data: Any) -> None:
    """Take the names that a checkpoint notes, which training on, or testing, must go on with.

    Raises:
        ConfigError: the lists of ``data`` name other classes, or in another order.
    """
    names = noted.get("class_names")
    if names is not None and video.config.num_classes is not None:
        video.class_names = tuple(names)
        name_classes(video, getattr(data, "class_names", None) or names, learns=False)


def shortened(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 6 else f"{', '.join(names[:5])}, ... {len(names)} in all"
