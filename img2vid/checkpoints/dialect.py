"""A foreign dialect is a table of two columns, their names and ours; this engine reads it in both directions.

How rows of a table are read is in ``img2vid.weights.keytable``. Whatever a table cannot say (a reshaped or divided
tensor) is done by a dialect's ``unpack`` after reading and undone by its ``pack`` before writing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from img2vid.backbones.hf_folder import CONFIG, FILES, read_config, read_folder, read_json, read_pixels
from img2vid.backbones.tower import Preprocess
from img2vid.checkpoints.native import HEADER
from img2vid.config import VideoConfig
from img2vid.errors import WeightsError
from img2vid.weights.accounting import LoadReport, matches, read_state_dict, read_weights
from img2vid.weights.index import SUFFIX
from img2vid.weights.keytable import State, Table, pattern, to_ours, to_theirs

if TYPE_CHECKING:
    from img2vid.model import VideoModel


@dataclass
class Foreign:
    """A checkpoint as it was found: tensors under its own names, and the ``config.json`` beside them, if any."""

    path: Path
    state: State
    config: dict[str, Any] | None = None
    pixels: Preprocess | None = None  # from the preprocessor_config.json beside them
    notes: list[str] = field(default_factory=list)
    num_heads: int | None = None  # given by the user: no state dict knows it

    @classmethod
    def read(cls, path: str | Path, num_heads: int | None = None) -> Foreign:
        """
        Raises:
            WeightsError: it cannot be read, or holds no weights.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        has_name = path.is_file() and path.name.removesuffix(SUFFIX) in FILES
        if not path.is_dir() and not (has_name and "model_type" in (read_json(folder / CONFIG) or {})):
            file = read_weights(path)
            if is_ours(path):  # by names alone it could pass for a TimeSformer
                raise WeightsError(f"{path} already is a model of img2vid: img2vid.load({str(path.parent)!r}).")
            return cls(path, file.state, notes=file.notes, num_heads=num_heads)
        # heads, activation and eps are in the folder, and not in the weights
        config = read_config(folder)  # says what the folder is, before weights are looked for
        state = read_folder(path) if path.is_dir() else read_state_dict(path)  # there may be another file beside it
        return cls(folder, state, config, read_pixels(folder), num_heads=num_heads)

    def require(self, key: str, axes: str) -> Tensor:
        """A tensor that sizes are read from, one letter of ``axes`` for each of its axes."""
        tensor = self.state.get(key)
        if tensor is None:
            raise WeightsError(
                f"{self.path} lacks {key}, from which the size of the model is read; nothing was imported."
            )
        if tensor.ndim != len(axes.split()) or not tensor.numel():
            raise WeightsError(
                f"{self.path}: {key} is {tuple(tensor.shape)}, expected was ({', '.join(axes.split())}); the size of "
                "the model is read from it, so nothing was imported."
            )
        return tensor

    def has(self, row: str) -> bool:
        """Whether any block has it: of a file that lacks it in one block, accounting can then say so."""
        return any(pattern(row).fullmatch(key) for key in self.state)

    def num_outputs(self, linear: str) -> int | None:
        """Rows of a last projection, such as the number of classes; None where there is none."""
        if f"{linear}.weight" in self.state:
            return len(self.require(f"{linear}.weight", "outputs inputs"))
        return len(self.require(f"{linear}.bias", "outputs")) if f"{linear}.bias" in self.state else None


def is_ours(path: Path) -> bool:
    """Whether the header of a safetensors file says that img2vid wrote it."""
    try:
        with safe_open(path, framework="pt") as file:
            return HEADER in (file.metadata() or {})
    except (OSError, SafetensorError):  # no safetensors
        return False


@dataclass(frozen=True)
class Dialect:
    """One way in which video models of a kind are stored.

    Args:
        name: as ``--from`` takes it.
        title: what it is, for people.
        table: their names and ours.
        describe: what model a file holds.
        recognise: whether a state dict, or the configuration beside it, is of this dialect and no other.
        prefix: what names of the video tower begin with in files of a whole model; files of a tower alone lack it.
        dropped: regular expressions of their keys that have no place in a video tower.
        unpack, pack: between what a file holds and what the table names, for a model of that configuration.
        wrapper: the key under which its own files keep the state dict, and what they put before every name.
        configuration: the ``config.json`` that belongs to a model's weights, where they are kept in a folder.
        pixels: the pixel statistics that its models were trained with, where no file says.
    """

    name: str
    title: str
    table: Table
    describe: Callable[[Foreign], VideoConfig]
    recognise: Callable[[Foreign], bool]
    prefix: str = ""
    dropped: tuple[str, ...] = ()
    unpack: Callable[[State, VideoConfig], State] = lambda state, config: state
    pack: Callable[[State, VideoConfig], State] = lambda state, config: state
    configuration: Callable[[VideoModel], dict[str, Any]] | None = None
    wrapper: tuple[str, str] = ("state_dict", "")
    pixels: Preprocess = field(default_factory=Preprocess)

    def with_prefix(self, state: Mapping[str, Tensor]) -> State:
        """Names as in the file of a whole model, also of a tower's that was saved alone."""
        has_prefix = any(key.startswith(self.prefix) for key in state)
        return {key if has_prefix else self.prefix + key: tensor for key, tensor in state.items()}

    def to_ours(self, state: Mapping[str, Tensor], config: VideoConfig) -> State:
        """Their state dict, complete and accounted for, under our names."""
        return to_ours(self.unpack(self.with_prefix(state), config), self.table)

    def to_theirs(self, state: Mapping[str, Tensor], config: VideoConfig) -> State:
        """Our state dict under their names.

        Raises:
            WeightsError: it holds tensors for which the dialect has no name.
        """
        return self.pack(to_theirs(state, self.table, self.title), config)


def account(dialect: Dialect, file: Foreign, expected: Mapping[str, Tensor]) -> LoadReport:
    """Where every key of a file goes, in the file's own names.

    Args:
        expected: what a model of that kind and size has, under their names, on any device.

    Returns:
        A report that is not ``ok`` where keys are missing, unexpected or misshapen.
    """
    given = dialect.with_prefix(file.state)
    report = LoadReport()
    for key in sorted(given.keys() | expected.keys()):
        if key not in given:
            report.missing.append(key)
        elif key not in expected:
            (report.dropped if matches(key, dialect.dropped) else report.unexpected).append(key)
        elif given[key].shape != expected[key].shape:
            shapes = f"{tuple(given[key].shape)} given, {tuple(expected[key].shape)} expected"
            report.misshapen.append(f"{key}: {shapes}")
        elif not given[key].is_floating_point():
            report.misshapen.append(f"{key}: {given[key].dtype} given, numbers with a fraction expected")
        else:
            report.loaded.append(key)
    return report
