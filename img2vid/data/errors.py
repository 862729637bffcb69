"""The errors of this package. All are made from one string, so a DataLoader worker can send them home intact."""

from __future__ import annotations

from typing import Any

from img2vid.errors import Img2VidError


class VideoError(Img2VidError, RuntimeError):
    """A video could not be read as asked. The message starts with the path; `path` holds it too."""

    def __init__(self, message: str, path: str | None = None):
        super().__init__(message)
        self.path = path

    @classmethod
    def about(cls, path: str, problem: str) -> VideoError:
        return cls(f"{path}: {problem}", path)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.path)


class ListError(Img2VidError):
    """A list of videos is wrong. The message starts with the file and, where there is one, the row (counted from 1)."""


class DamagedVideoWarning(UserWarning):
    """Frames were concealed by the decoder, or repeated because they could not be decoded; the message counts them."""


class MissingExtraError(Img2VidError, ImportError):
    """An optional dependency is not installed. The user can mend it, so commands print the message alone."""


def missing_extra(package: str, extra: str, why: str) -> MissingExtraError:
    """The error for an optional dependency that is not installed, naming the extra that brings it."""
    return MissingExtraError(f"{why} needs {package}, which is not installed. Run: pip install 'img2vid[{extra}]'")
