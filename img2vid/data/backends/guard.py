"""What decord and torchcodec are not trusted with, decided from the packets before either sees the file.

Both give wrong frames without an error on some files (measured against sequential decoding: decord on every
stream-copied trim, where it may also hang for ever, and after seeks in open GOPs; both on B-frames outside mp4/mkv, on
H.264 with intra refresh, and where a container calls frames keyframes that are none).
A wrong frame is worse than no frame, so such files are refused, with the reason and the reader that can.
"""

from __future__ import annotations

from fractions import Fraction

from img2vid.data.backends.pyav import PyAVReader
from img2vid.data.errors import VideoError


def ordinary_video(source, label: str, backend: str) -> tuple[int, Fraction | None, str, str]:
    """(frames, fps, codec, container) of a file `backend` reads exactly, or a VideoError saying why it would not."""
    with PyAVReader(source, label, on_error="raise") as reader:
        index, context = reader.index, reader.stream.codec_context
        container = reader.container.format.name
        trouble = None
        if index.pts is None and (context.has_b_frames or container != "avi"):
            trouble = f"a {container} file whose frames are only found by decoding in order"
        elif backend == "decord" and index.discarded:
            trouble = f"a trimmed file ({index.discarded} of {index.packets} packets only feed the decoder)"
        elif backend == "decord" and index.open_gop:
            trouble = "a file with open GOPs"
        elif backend == "decord" and context.codec.canonical_name == "av1":
            trouble = "AV1"
        elif reader.mirrored:
            trouble = "a file that asks for a mirror image"
        elif not last_keyframe_holds(reader):
            trouble = "a file whose keyframes do not show whole pictures (intra refresh, or wrong flags)"
        if trouble:
            raise VideoError.about(label, f'{backend} does not read {trouble} correctly. Use backend="pyav"')
        return reader.likely_frames, reader.fps, context.codec.canonical_name, container


def last_keyframe_holds(reader: PyAVReader) -> bool:
    """Does decoding that starts at the last keyframe show that keyframe? One stands for all: encoders do not change."""
    shown = set(reader.index.pts or ())
    keys = [pts for pts in reader.index.keyframes if pts in shown]
    return len(keys) < 2 or keys[-1] in reader.decode_from(keys[-1], [keys[-1]])


def same_count(label: str, backend: str, counted: int, expected: int) -> None:
    if counted != expected:
        raise VideoError.about(
            label, f'{backend} counts {counted} frames where the packets hold {expected}. Use backend="pyav"'
        )
