"""A folder of JPEG or PNG frames as a video: frame i is the i-th file name, numbers in names counted as numbers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from img2vid.data.backends import Reader, check_indices
from img2vid.data.errors import VideoError

SUFFIXES = {".jpg", ".jpeg", ".png"}


def natural_key(path: Path) -> list:
    """frame_2 before frame_10: digits compare as numbers, the rest as text; 1.png and 01.png by their full names."""
    parts = re.split(r"(\d+)", path.name)  # text at even places, digits at odd ones
    return [(0, int(part), "") if place % 2 else (1, 0, part) for place, part in enumerate(parts)] + [(2, 0, path.name)]


class FrameFolderReader(Reader):
    """Reads a folder of images as one video. Its rate is unknown: `fps` is None."""

    fps = None

    def __init__(self, source: str, label: str, on_error: str = "raise"):
        self.label, self.on_error = label, on_error
        if not Path(source).is_dir():
            raise VideoError.about(label, 'not a folder; backend="frames" reads a folder of JPEG or PNG files')
        # Names starting with a dot are other programs' companions ("._x.jpg"), not frames.
        found = (p for p in Path(source).iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        self.files = sorted(found, key=natural_key)
        if not self.files:
            raise VideoError.about(label, "a folder without frames (.jpg, .jpeg or .png files); a video is a file")
        self.frames, self.container = len(self.files), "folder"
        self.codec = self.files[0].suffix.lower().lstrip(".").replace("jpg", "jpeg")

    def read(self, indices, count: bool = False) -> list:
        indices = check_indices(indices, self.frames, self.label)
        decoded = {index: self._image(self.files[index]) for index in sorted(set(indices))}
        return [decoded[index] for index in indices]

    def stream_frames(self, first: int, stop: int):
        """The frames first .. stop - 1 in order, one at a time."""
        return (self._image(file) for file in self.files[first:stop])

    def timed_frames(self):
        """All frames in order, without times: a folder has no clock."""
        return ((None, self._image(file)) for file in self.files)

    def _image(self, file: Path):
        from torchvision.io import ImageReadMode, decode_image, read_file

        try:
            # Upright, as videos are: cameras write a turn beside the pixels here too.
            image = decode_image(read_file(str(file)), ImageReadMode.RGB, apply_exif_orientation=True)  # (3, H, W)
        except RuntimeError as error:
            raise VideoError.about(self.label, f"frame {file.name} is not readable ({_first_line(error)})") from error
        array = image.permute(1, 2, 0).numpy()  # (H, W, 3)
        return array if array.dtype == np.uint8 else (array >> 8).astype(np.uint8)  # 16 bits per colour: the upper 8


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
