"""Where to go over from one model to another: every place a recipe leaves open, ranked by how alike both sides are, and
the best of those by what the stitched model then still tells apart.

Similarity is cheap, as no model is stitched for it, and only a hint: tokens can be alike in all but what matters. With
labels, bridges are fitted on half of the videos of each class, and the other half is named by the nearest of the class
means of the first: a classifier with nothing to tune.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from img2vid.backbones import Backbone
from img2vid.backbones.stitched import Part, check_part
from img2vid.stitching import StitchError, linear_cka, prepared, stitch, tokens_of
from img2vid.temporal.pooling import first

MOST_TOKENS = 10_000  # to compare all layers of two models by
MOST_CANDIDATES = 200_000
AUTO = "auto"

Place = int | str  # a block's number, or AUTO


@dataclass(frozen=True)
class Candidate:
    """One way to fill a recipe's open places.

    Args:
        layers: [first, end) of each part.
        ckas: of each junction, linear CKA of what meets there.
        accuracy: share of held-out videos named right by the stitched model; None where that was not asked.
    """

    layers: tuple[tuple[int, int], ...]
    ckas: tuple[float, ...]
    accuracy: float | None = None

    @property
    def cka(self) -> float:
        """Of the weakest junction: what is lost there is not found again."""
        return min(self.ckas)


def search(
    parts: Sequence[Part],
    loaded: Sequence[Backbone],
    places: Sequence[tuple[Place, Place]],
    images: Tensor,
    depth: int | None = None,
    batch_size: int = 16,
) -> list[Candidate]:
    """All ways to fill the open places, the most alike first.

    Args:
        parts: of the recipe, whatever their layers.
        loaded: the backbone of each.
        places: of each part [first, end), where ``auto`` is any block but the first.
        images: (N, C, H, W) from 0 to 1.
        depth: how many blocks the stitched model is to have; None for any number, which near the ends means that most
            of it is one of the parts.

    Raises:
        BackboneError: parts that do not fit together, wherever they meet.
        StitchError: nothing fills the places; or too much does.
    """
    for part, backbone in zip(parts, loaded, strict=True):
        check_part(part, backbone.tower, loaded[0].tower)
    ways = list(itertools.islice(fillings(loaded, places, depth), MOST_CANDIDATES + 1))
    if not ways:
        depths = ", ".join(str(depth_of(backbone)) for backbone in loaded)
        raise StitchError(f"depth={depth}: models of {depths} blocks have no such parts, of at least a block each.")
    if len(ways) > MOST_CANDIDATES:
        raise StitchError(
            f"There are more than {MOST_CANDIDATES:,} ways to fill these places. Give depth, or numbers for some."
        )
    towers = [backbone.tower for backbone in loaded]
    frame = towers[0]
    rows, columns = frame.grid
    stride = -(-len(images) * rows * columns // MOST_TOKENS)
    similarity: list[dict[tuple[int, int], float]] = []
    for i in range(len(towers) - 1):
        pairs = {(way[i][1], way[i + 1][0]) for way in ways}
        ends, begins = ({pair[side] for pair in pairs} for side in (0, 1))
        ours, theirs = (
            tokens_of(tower, sorted(numbers), images, batch_size, stride=stride, like=frame)
            for tower, numbers in ((towers[i], ends), (towers[i + 1], begins))
        )
        similarity.append({(end, begin): linear_cka(ours[end], theirs[begin]) for end, begin in pairs})
    found = [Candidate(way, tuple(of[way[i][1], way[i + 1][0]] for i, of in enumerate(similarity))) for way in ways]
    return sorted(found, key=lambda one: (-one.cka, -sum(one.ckas)))


def fillings(
    loaded: Sequence[Backbone], places: Sequence[tuple[Place, Place]], depth: int | None
) -> Iterator[tuple[tuple[int, int], ...]]:
    """Every [first, end) of every part, where each has at least a block."""
    of_parts = []
    for backbone, two in zip(loaded, places, strict=True):
        anywhere = range(1, depth_of(backbone))
        begins, ends = ([place] if isinstance(place, int) else list(anywhere) for place in two)
        of_parts.append([(begin, end) for begin in begins for end in ends if begin < end <= depth_of(backbone)])
    for way in itertools.product(*of_parts):
        if depth in (None, sum(end - begin for begin, end in way)):
            yield way


def depth_of(backbone: Backbone) -> int:
    return len(backbone.tower.blocks)


def rank_by_accuracy(
    candidates: Sequence[Candidate],
    parts: Sequence[Part],
    loaded: Sequence[Backbone],
    clips: Tensor,
    labels: Sequence[int],
    batch_size: int = 16,
) -> list[Candidate]:
    """Stitch each of them, fit its bridges, and see how many videos it names right; the best first.

    Args:
        parts: of the recipe; their layers are the candidates'.
        clips: (V, T, C, H, W) from 0 to 1.
        labels: of the V videos.
    """
    fitted, held_out = halves(labels)
    found = []
    for one in candidates:
        filled = [replace(part, layers=layers) for part, layers in zip(parts, one.layers, strict=True)]
        stitched, _ = stitch(filled, loaded, clips[fitted].flatten(0, 1), batch_size)
        found.append(replace(one, accuracy=accuracy(stitched, clips, labels, fitted, held_out, batch_size)))
    return sorted(found, key=lambda one: (-(one.accuracy or 0.0), -one.cka))


def halves(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Rows to fit on and rows to hold out: of each class every other one.

    Raises:
        StitchError: a class of a single video, or none but one class.
    """
    by_class: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        by_class.setdefault(label, []).append(row)
    alone = [label for label, rows in by_class.items() if len(rows) < 2]
    if alone or len(by_class) < 2:
        what = f"class {', '.join(map(str, alone))} has one" if alone else "all are of one class"
        raise StitchError(
            f"To rank by accuracy, at least two classes of at least two videos each are needed, and {what}. Calibrate "
            "on more (--max-videos), or rank by cka."
        )
    fitted, held_out = ([row for rows in by_class.values() for row in rows[side::2]] for side in (0, 1))
    return fitted, held_out


@torch.no_grad()
def accuracy(
    backbone: Backbone,
    clips: Tensor,
    labels: Sequence[int],
    fitted: Sequence[int],
    held_out: Sequence[int],
    batch_size: int = 16,
) -> float:
    """Share of held-out videos that are nearest, by the cosine from the mean of all, to the mean of their class.

    Args:
        clips: (V, T, C, H, W) from 0 to 1; a video's feature is the mean over its frames.
    """
    tower = backbone.tower
    frames = [first(tower.call(tower.module, prepared(tower, part))) for part in clips.flatten(0, 1).split(batch_size)]
    features = torch.cat(frames).double().unflatten(0, clips.shape[:2]).mean(dim=1)  # (V, D)
    features = F.normalize(features - features[fitted].mean(dim=0), dim=-1)
    given, classes = torch.tensor(labels), sorted(set(labels))
    of_class = [features[[row for row in fitted if labels[row] == label]].mean(dim=0) for label in classes]
    nearest = (features[held_out] @ F.normalize(torch.stack(of_class), dim=-1).T).argmax(dim=1)
    return float((torch.tensor(classes)[nearest] == given[held_out]).double().mean())
