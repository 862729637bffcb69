"""Classes as texts: names made readable, templates, and one embedding for each class.

    texts = prompts(["HandstandPushups"], TEMPLATE_SETS["action"])   # [["a video of handstand pushups", ...]]
    weights = class_embeddings(model, class_names, templates)        # (C, D), each of length 1

The rule of the ensemble: embed every template, normalise each, take the mean, normalise again (Radford et al. 2021,
arXiv:2103.00020).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from img2vid.backbones.nano_clip import TEMPLATES as NANO_TEMPLATES
from img2vid.data.lists import read_classes
from img2vid.errors import nearest
from img2vid.evaluation.errors import EvaluationError
from img2vid.proof.evidence import in_eval_mode

CLASS_LISTS = {path.stem: path for path in sorted((Path(__file__).parent / "classes").glob("*.txt"))}

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "video": ("a video of {}",),
    "photo": ("a photo of {}",),
    # ours: people doing things, seen by different cameras, at different distances, in different words
    "action": (
        "{}",
        "a video of {}",
        "a clip that shows {}",
        "a person is {}",
        "someone {} in a video",
        "people {}, filmed from afar",
        "a close-up of {}",
        "a home video of {}",
        "sports footage: {}",
        "a frame from a video of {}",
        "a blurry video of {}",
        "the action of {}",
        "how {} looks",
        "an example of {}",
        "this is {}",
        "watch: {}",
    ),
    # ours: sentences that describe a motion already ("pushing something from left to right")
    "motion": (
        "{}",
        "a video of {}",
        "a hand is {}",
        "a clip of somebody {}",
        "in this video: {}",
        "what happens here is {}",
        "a recording of {}",
        "over time, {}",
    ),
    "nano_clip": NANO_TEMPLATES,  # the captions that model was trained with
}


def readable(name: str) -> str:
    """A class name as people would write it.

    ``HandstandPushups`` -> handstand pushups; ``brush_hair`` -> brush hair; ``Pushing something`` -> pushing something;
    ``TVShow`` -> TV show. Words in capitals are taken for abbreviations and stay.
    """
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name.replace("_", " "))
    words = name.split()
    return " ".join(word if len(word) > 1 and word.isupper() else word.lower() for word in words)


def read_templates(given: str | Path | Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Templates and what they are called: a set's name, a text file with one template per line, or a list of them.

    Raises:
        EvaluationError: no such set or file, or a template without exactly one ``{}``.
    """
    if not isinstance(given, (str, Path)):
        templates, name = tuple(given), "given"
    elif str(given) in TEMPLATE_SETS:
        templates, name = TEMPLATE_SETS[str(given)], str(given)
    elif Path(given).is_file():
        templates, name = tuple(read_classes(given)), Path(given).name
    else:
        raise EvaluationError(
            f"Templates {str(given)!r} are neither a file nor one of {', '.join(TEMPLATE_SETS)}."
            + nearest(str(given), TEMPLATE_SETS)
        )
    wrong = [t for t in templates if t.count("{}") != 1 or t.replace("{}", "").count("{")]
    if wrong or not templates:
        raise EvaluationError(
            f"Templates {name!r}: each must hold {{}} once, where the class goes; "
            + (f"{wrong[0]!r} does not." if wrong else "there are none.")
        )
    return templates, name


def template_hash(templates: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(templates).encode()).hexdigest()


def class_list(given: str | Path | Sequence[str]) -> list[str]:
    """The classes of a data set by its name, of a text file with one name per line, or as given."""
    if not isinstance(given, (str, Path)):
        return list(given)
    if str(given) in CLASS_LISTS:
        return read_classes(CLASS_LISTS[str(given)])
    if Path(given).is_file():
        return read_classes(given)
    raise EvaluationError(
        f"Classes {str(given)!r} are neither a file nor one of {', '.join(CLASS_LISTS)}."
        + nearest(str(given), CLASS_LISTS)
    )


def check_distinct(names: Sequence[str]) -> None:
    """Classes that read alike have the same texts, so no model could tell them apart.

    Raises:
        EvaluationError: there are such classes.
    """
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(readable(name), name)
        if other is not name:
            raise EvaluationError(
                f"Classes {other!r} and {name!r} both read {readable(name)!r}, so no text tells them apart. "
                "Rename one of them in the list, or give --classes."
            )


def prompts(names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """For each name, made readable, the text of every template."""
    return [[template.replace("{}", readable(name)) for template in templates] for name in names]


@torch.no_grad()
def embed_texts(model, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Normalised text features (n, D), float32 on the CPU."""
    if not hasattr(model, "encode_text"):
        raise EvaluationError(
            f"A {type(model).__name__} has no text tower, so it cannot be asked by words. Convert an open_clip "
            "backbone (img2vid.convert --list), or measure its features: img2vid eval probe."
        )
    device = next(model.parameters()).device
    parts = []
    with in_eval_mode(model):
        for start in range(0, len(texts), batch_size):
            tokens = model.tokenize(list(texts[start : start + batch_size])).to(device)
            parts.append(model.encode_text(tokens, normalize=True).float().cpu())
    return torch.cat(parts)


def class_embeddings(model, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """One normalised embedding for each class, (C, D)."""
    texts = prompts(names, templates)
    embedded = embed_texts(model, [text for of_class in texts for text in of_class])  # (C * templates, D)
    return F.normalize(embedded.unflatten(0, (len(names), -1)).mean(dim=1), dim=-1)
