"""Weights into models, every key accounted for.

Loading with ``strict=False`` and ignoring what it returns is how a model ends up partly random without anyone noticing.
Here each key ends in one of five columns (loaded, new, dropped on purpose, missing, unexpected), a difference is only
accepted where a pattern names it, what was changed on the way is said, and the error prints sorted lists.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from img2vid.errors import WeightsError
from img2vid.weights.files import WeightsFile, read_state_dict, read_weights, short

__all__ = ["LoadReport", "WeightsFile", "load_weights", "read_state_dict", "read_weights", "short"]


@dataclass
class LoadReport:
    """Where every key of a model and of a file went."""

    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)  # in the model only, and allowed to be
    dropped: list[str] = field(default_factory=list)  # in the file only, and allowed to be
    missing: list[str] = field(default_factory=list)  # in the model only, unforeseen
    unexpected: list[str] = field(default_factory=list)  # in the file only, unforeseen
    misshapen: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)  # of the loaded ones, those brought to another grid, and which
    notes: list[str] = field(default_factory=list)  # what else there is to know about the file

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        counts = f"{len(self.loaded)} loaded, {len(self.new)} new, {len(self.dropped)} dropped on purpose"
        lists = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.misshapen,
            "resampled": self.resampled,
        }
        counts += "".join(f"\n  {len(keys)} {what}:\n{listed(keys)}" for what, keys in lists.items() if keys)
        return "\n  ".join([counts, *self.notes])

    @property
    def differences(self) -> list[str]:
        """Sentences for the user: everything in which the model is not simply the file."""
        said = {"New, not from the file": self.new, "Dropped on purpose from the file": self.dropped}
        said["Resampled"] = self.resampled
        return [f"{what}: {in_a_row(keys)}." for what, keys in said.items() if keys] + self.notes


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    allow_new: Iterable[str] = (),
    allow_dropped: Iterable[str] = (),
    source: str = "the given state dict",
    assign: bool = False,
    keep_dtypes: bool = False,
) -> LoadReport:
    """Load ``state`` into ``model``, accounting for every key; nothing is loaded unless everything is accounted for.

    Args:
        allow_new: regular expressions (full match) of keys that the model may have beyond the file.
        allow_dropped: regular expressions (full match) of keys that the file may have beyond the model.
        source: what the error calls the state dict, e.g. its path.
        assign: put the given tensors in place of the model's, as is always done with a model on the meta device.
        keep_dtypes: give the model's tensors the precisions of the given ones, instead of the other way round.

    Raises:
        WeightsError: keys missing, unexpected or misshapen, as sorted lists.
    """
    allow_new, allow_dropped = list(allow_new), list(allow_dropped)
    own = model.state_dict()
    report = LoadReport()
    for key in sorted(own.keys() | state.keys()):
        if key not in state:
            (report.new if matches(key, allow_new) else report.missing).append(key)
        elif key not in own:
            (report.dropped if matches(key, allow_dropped) else report.unexpected).append(key)
        elif own[key].shape != state[key].shape:
            report.misshapen.append(f"{key}: {tuple(state[key].shape)} given, {tuple(own[key].shape)} expected")
        elif own[key].is_floating_point() != state[key].is_floating_point():  # quantised weights are no weights as such
            report.misshapen.append(f"{key}: {state[key].dtype} given, {own[key].dtype} expected")
        else:
            report.loaded.append(key)
    if not report.ok:
        raise WeightsError(
            f"{source} does not fit this {type(model).__name__}, nothing was loaded: {report}\n"
            f"{explanation(report)}Check that the file belongs to this architecture and size. In Python, "
            "img2vid.weights.accounting.load_weights takes patterns for differences that are meant (allow_new, "
            "allow_dropped)."
        )
    if keep_dtypes:
        take_dtypes(model, state)
        own = model.state_dict()
    fitting = {key: state[key].to(own[key].dtype) for key in report.loaded}
    # a model without numbers takes the file's own tensors
    assign = assign or any(own[key].is_meta for key in report.loaded)
    model.load_state_dict({**own, **fitting}, assign=assign)
    return report


def explanation(report: LoadReport) -> str:
    """Two frequent reasons for names that do not fit, in a sentence; empty where it is neither."""
    if report.missing and report.unexpected:
        first = report.missing[0]
        for key in report.unexpected:
            prefix = key.removesuffix(first)
            if prefix != key and {prefix + name for name in report.missing} <= set(report.unexpected):
                return (
                    f"The names in the file start with {prefix!r}; without it they fit: save "
                    f"{{key.removeprefix({prefix!r}): t for key, t in state.items()}} as a file of its own.\n"
                )
    if any(re.search(r"temporal_|\btime_?embed|timeattn|tubelet", key) for key in report.unexpected):
        return (
            "The file is a video model's, not an image model's. A published one (TimeSformer, LaViLa, ...): img2vid "
            "import FILE_OR_FOLDER. One of your own: convert with the same settings and random_weights=True, then "
            "model.load_state_dict(...).\n"
        )
    return ""


def take_dtypes(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    tensors = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in itertools.chain(*tensors):
        if name in state:
            tensor.data = tensor.data.to(state[name].dtype)


def listed(keys: list[str], most: int = 20) -> str:
    """Keys one below the other; of a whole wrong file the first ones say enough."""
    lines = keys if len(keys) <= most else [*keys[:most], f"... and {len(keys) - most} more"]
    return "\n".join(f"    {line}" for line in lines)


def in_a_row(keys: list[str], most: int = 20) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def matches(key: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in patterns)
