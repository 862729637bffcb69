"""The one list: a model's parameters by layer and origin, from input to output."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn

from img2vid.backbones.order import TABLES, Place, place_in_image_tower, places_beside_image_tower
from img2vid.errors import Img2VidError
from img2vid.model import VideoModel
from img2vid.origins import is_other_towers
from img2vid.two_towers import VideoTextModel

ORIGINS = ("pretrained", "copied", "new")
TOWERS = ("image", "text", "both")


class TuningError(Img2VidError):
    """A freeze policy, optimiser or schedule that makes no sense, or none for this model."""


@dataclass
class LayerGroup:
    """Parameters of one layer that come from one place.

    Args:
        name: ``embeddings``, ``block_0`` ..., ``head``, ``temporal_encoder``, ``text_embeddings``, ``text_block_0``
            ..., ``text_head``, ``text_decoder``, ``logit_scale``, ``classifier``.
        origin: ``pretrained`` | ``copied`` | ``new``, as ``model.origin`` says.
        tower: ``image`` | ``text`` | ``both``.
        depth: layers passed before this one, from the tower's input: 0 for embeddings, i + 1 for block i.
        from_output: layers behind this one, up to the tower's output: 0 for head, classifier and logit_scale.
        parameters: by their names in the model, frozen ones included.
    """

    name: str
    origin: str
    tower: str
    depth: int
    from_output: int
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.name}/{self.origin}"

    def numel(self, trainable_only: bool = False) -> int:
        """Numbers in it."""
        return sum(p.numel() for p in self.parameters.values() if p.requires_grad or not trainable_only)


def layer_groups(model: VideoModel | VideoTextModel) -> list[LayerGroup]:
    """All parameters of a video model, each in exactly one group, ordered from input to output.

    The image tower comes first, then the text tower, then the classifier; within a layer pretrained, copied, new.
    """
    groups: dict[tuple[Place, str], LayerGroup] = {}
    parameters = dict(model.named_parameters())
    for name, place in places(model, list(parameters)).items():
        # learned once already, whoever has put it here
        origin = "pretrained" if is_other_towers(name) else model.origin(name)
        group = groups.setdefault((place, origin), LayerGroup(place.name, origin, *order(place)))
        group.parameters[name] = parameters[name]
    return sorted(groups.values(), key=lambda g: (TOWERS.index(g.tower), g.depth, g.name, ORIGINS.index(g.origin)))


def order(place: Place) -> tuple[str, int, int]:
    return place.tower, place.depth, place.from_output


def places(model: VideoModel | VideoTextModel, names: list[str]) -> dict[str, Place]:
    """The layer of each parameter."""
    has_text = isinstance(model, VideoTextModel)
    tower = image_tower_of(model).tower
    prefix = model.tower_prefix if has_text else ""
    head = place_in_image_tower(tower, "head")
    late = {
        "temporal_encoder": Place("image", "temporal_encoder", head.depth + 1, 0),
        "classifier": Place("both", "classifier", head.depth + 2, 0),
    }
    if model.config.attention == "factorised_encoder":  # there time enters behind the head
        late["time_embed"] = late["temporal_encoder"]
    beside = places_beside_image_tower((name for name in names if not name.startswith(prefix)), len(tower.blocks))
    found = {}
    for name in names:
        own = name.removeprefix(prefix)
        found[name] = (
            beside[name] if name in beside else late.get(own.split(".")[0]) or place_in_image_tower(tower, own)
        )
    return found


def image_tower_of(model: VideoModel | VideoTextModel) -> VideoModel:
    return model.visual if isinstance(model, VideoTextModel) else model


def decayed_names(model: VideoModel | VideoTextModel) -> set[str]:
    """Parameters that weight decay should pull to zero: matrices that multiply.

    Left out: norms, biases, layer scales and temperatures (all of at most one dimension), embeddings and tokens, and
    gates with everything else that starts at zero: where it goes is what training is about.
    """
    gates = {id(p) for p in image_tower_of(model).zero_parameters().values()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name
        for name, p in model.named_parameters()
        if p.ndim >= 2 and id(p) not in gates | tables and not re.fullmatch(TABLES, name)
    }
