"""READ FIRST of the grafts: something new in a trained network, which changes nothing until it is trained.

Temporal attention behind a zero gate is one instance of a larger idea: LoRA's B = 0, ControlNet's zero convolution, an
adapter with a zero up-projection. A graft is whatever answers these six questions, and everything else (certificates,
freezing, learning rates, saving, resuming, sharding) works for it without knowing it:

    where      ``sites(video)``    the modules that get it, its hosts
    new        ``grow(site)``      a scion: the new module in one host, which is its child ``graft_<name>``
    gate       ``zero_*``          what is called so in a scion starts at zero; at zero, the scion adds nothing
    identity   ``guarantee()``     what that keeps of the host's function: bit for bit, up to rounding, or nothing
    trainable  the whole scion     (``freeze: grafts_only`` freezes all the rest)
    folding    ``fold(host, ...)`` how a trained scion becomes part of its host's own weights, where it can

The host keeps its parameters, their names and its type: a class is put in front of its own, as everywhere in this
package (``img2vid.temporal.infront``), and lets scions speak before and after it (``img2vid.grafts.fronts``). For a
graft of your own, write a frozen dataclass of its options with these methods, put ``@register`` on it, and import it
before you load what has it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from img2vid.config import ConfigError, real_number, shown
from img2vid.errors import Img2VidError, nearest
from img2vid.proof.guarantees import KINDS, Guarantee
from img2vid.temporal.infront import InFront

if TYPE_CHECKING:
    from img2vid.model import VideoModel


class GraftError(Img2VidError):
    """A graft that has no place in this model, or cannot be folded."""


@dataclass(frozen=True)
class Site:
    """One place of a graft: the module that gets it, by its path below the image tower, and how it is listened to."""

    path: str
    host: nn.Module
    front: type[InFront]
    about: dict[str, Any] = field(default_factory=dict)  # what the graft wants to remember of the place


@dataclass(frozen=True)
class Graft:
    """Base of all grafts: options as fields, answers as methods. ``name`` tells two of one type apart."""

    type: ClassVar[str]
    where: ClassVar[str]  # the six answers in words, for tables
    new: ClassVar[str]
    gate: ClassVar[str]
    identity: ClassVar[str]
    folds: ClassVar[str]
    mixes_frames: ClassVar[bool] = False  # whether frames of a clip learn of each other through it
    attends: ClassVar[bool] = False  # whether tokens attend to more through it than the model's own attention says
    keeps_length: ClassVar[bool] = True  # whether features stay as long as they are, and where texts are
    leaves_tokens: ClassVar[bool] = False  # whether tokens of its own stay among the patches from block to block
    counts_patches: ClassVar[bool] = False  # whether it must know which token is which patch

    name: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.type)
        if not isinstance(self.name, str) or not re.fullmatch(r"(?!fc$)[A-Za-z]\w*", self.name):
            raise ConfigError(f"name={shown(self.name)} of a graft: expected a word, such as {self.type}_2.")

    @property
    def groups_tokens(self) -> bool:
        """Whether tokens are worked on in groups that the batch decides: how one rounds then depends on the others."""
        return False

    def sites(self, video: VideoModel) -> list[Site]:
        """Every place in the model that gets it.

        Raises:
            GraftError: there is none; with what exists.
        """
        raise NotImplementedError

    def grow(self, video: VideoModel, site: Site) -> nn.Module:
        """The scion of one place, a function of zero: its ``zero_*`` parts at zero make it add nothing."""
        raise NotImplementedError

    def guarantee(self) -> Guarantee:
        return Guarantee("any clip, bit for bit on the same folded batch", dict.fromkeys(KINDS, "bitwise"))

    def planted(self, video: VideoModel) -> None:
        """What else changes in a model once it is in; ``uprooted`` changes it back."""

    def uprooted(self, video: VideoModel) -> None:
        """Called when all of it has been taken off, while it still is among ``video.grafts``."""

    def takes_beside(self) -> dict[str, int]:
        """Vectors it wants beside clips: the name and length of each (``img2vid.beside``)."""
        return {}

    def fetch(self, video: VideoModel) -> None:
        """Load what it needs from elsewhere, such as another model's weights; not asked of a model that was saved."""

    def fold(self, site: Site, scion: nn.Module) -> None:
        """Write a scion into its host's own weights, in place; what is left of it is taken out afterwards."""
        raise GraftError(f"{self.type} cannot be folded into the model's own weights: {self.folds}.")

    def to_dict(self) -> dict[str, Any]:
        """As YAML and ``config.json`` have it: ``type``, and every option."""
        options = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        return {"type": self.type, **{k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}}


def factor(name: str, value: object) -> float:
    """``value`` as a number above 0: what is multiplied by 0 for good never learns."""
    if not (number := real_number(name, value, least=0.0)):
        raise ConfigError(f"{name}={shown(value)}: expected a number above 0, or nothing behind it would ever learn.")
    return number


GRAFTS: dict[str, type[Graft]] = {}


def register(cls: type[Graft]) -> type[Graft]:
    """Make a graft known by its ``type``, to YAML, ``config.json`` and the command line."""
    GRAFTS[cls.type] = cls
    return cls


def read_graft(given: Any) -> Graft:
    """A graft from what a user writes: itself, ``{"type": "lora", "rank": 8}``, or ``"lora"``.

    Raises:
        ConfigError: an unknown type or option, or a value it cannot have.
    """
    if isinstance(given, Graft):
        return given
    given = {"type": given} if isinstance(given, str) else given
    if not isinstance(given, Mapping) or not isinstance(given.get("type"), str):
        raise ConfigError(
            f"{shown(given)}: expected a graft as options by name, such as {{'type': 'lora', 'rank': 8}}."
        )
    kind = given["type"]
    if kind not in GRAFTS:
        raise ConfigError(
            f"There is no graft of type {kind!r}.{nearest(kind, GRAFTS)} There are: {', '.join(GRAFTS)}. One of your "
            "own is known once the module that registers it is imported."
        )
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items() if key != "type"}
    known = [spec.name for spec in dataclasses.fields(GRAFTS[kind])]
    for key in options:
        if key not in known:
            raise ConfigError(f"{kind} has no option {key!r}.{nearest(str(key), known)} It has: {', '.join(known)}.")
    return GRAFTS[kind](**options)


def read_grafts(given: Any) -> tuple[Graft, ...]:
    """Several of them, each of a name of its own.

    Raises:
        ConfigError: no list of grafts, one that cannot be read, or two of one name.
    """
    if isinstance(given, (str, Mapping, Graft)) or not isinstance(given, Iterable):
        raise ConfigError(f"{shown(given)}: expected a list of grafts, such as [{{'type': 'lora', 'rank': 8}}].")
    grafts = tuple(read_graft(one) for one in given)
    names = [graft.name for graft in grafts]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two grafts are called {name!r}; give one of them another name: name={name}_2.")
    return grafts
