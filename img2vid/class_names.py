"""What the numbers of a classifier stand for: names in their order, ours and transformers' ``id2label``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from img2vid.config import ConfigError, shown


def checked_class_names(names: Any, num_classes: int | None) -> tuple[str, ...] | None:
    """Names in the order of a classifier's numbers; None where they are not known.

    Raises:
        ConfigError: they are no texts, or not as many as the classifier has classes.
    """
    if names is None:
        return None
    is_list = isinstance(names, Sequence) and not isinstance(names, str)  # a set has no order
    if not is_list or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"class_names={shown(names)}: expected a list of texts, in the order of the classifier.")
    if len(names) != num_classes:
        has = "no classifier" if num_classes is None else f"a classifier of {num_classes} classes"
        raise ConfigError(f"{len(names)} class_names ({shown(list(names))}), but the model has {has}.")
    return tuple(names)


def from_id2label(id2label: Any, num_classes: int) -> tuple[str, ...] | None:
    """The names in a ``config.json`` of transformers; None where it only numbers them (``LABEL_0``, ...).

    Raises:
        ConfigError: it does not name each of the classifier's classes.
    """
    if id2label is None:
        return None
    numbers = {str(i) for i in range(num_classes)}
    if not isinstance(id2label, Mapping) or {str(key) for key in id2label} != numbers:
        what = f"{len(id2label)} classes" if isinstance(id2label, Mapping) else shown(id2label)
        raise ConfigError(
            f"id2label names {what}, but the classifier has {num_classes}, numbered from 0. Mend id2label, or take it "
            "out of config.json to import without names."
        )
    names = {str(key): str(name) for key, name in id2label.items()}
    in_order = tuple(names[str(i)] for i in range(num_classes))
    return None if in_order == numbered(num_classes) else in_order


def to_id2label(names: tuple[str, ...] | None, num_classes: int) -> dict[str, Any]:
    """``id2label`` and ``label2id`` as transformers writes them."""
    names = numbered(num_classes) if names is None else names
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def numbered(num_classes: int) -> tuple[str, ...]:
    """transformers' own, where nobody has named the classes."""
    return tuple(f"LABEL_{i}" for i in range(num_classes))
