"""The default reader: PyAV, indexed by packets (packet_index.py), exact against a sequential decode.

Frames no other frame refers to are not decoded unless wanted (`skip_frame = "NONREF"`): bit-exact for the codecs
listed, and only safe with one thread, because the setting must hold for exactly the packet it was made for.
"""

from __future__ import annotations

from contextlib import closing
from fractions import Fraction

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from img2vid.data.backends import Reader, VideoInfo, check_indices
from img2vid.data.backends.declared_size import cut_off_bytes
from img2vid.data.backends.opening import open_container
from img2vid.data.backends.packet_index import DECODE_ERRORS, MP4_FAMILY, PacketIndex, packet_time
from img2vid.data.backends.upright import is_mirrored, quarter_turns, upright_rgb
from img2vid.data.errors import VideoError

SKIP_NONREF_CODECS = {"h264", "hevc", "mpeg4"}
PREDICTED = {PictureType.P, PictureType.B, PictureType.S, PictureType.SP}  # made from other frames


class PyAVReader(Reader):
    """Reads one video. Use as a context manager: an unclosed reader leaks its file descriptor."""

    def __init__(self, source, label: str, on_error: str = "raise"):
        self.source, self.label, self.on_error = source, label, on_error
        self._refused, self._short = set(), 0  # times of packets refused or concealed so far; frames that never came
        self.container = self._count = None
        self._rotation, self.mirrored = 0.0, False
        self._reformatter = VideoReformatter()
        try:
            self._open()
            self.index = PacketIndex(self.container, self.stream)
            if self.container.format.name == MP4_FAMILY:
                self.mirrored = is_mirrored(source, self.stream.id)
            if not self.index.damaged and cut_off_bytes(source):
                self.index.missing = 1  # at least: how many packets were lost with the end, nobody knows
        except DECODE_ERRORS as error:
            self.close()
            raise VideoError.about(label, f"not readable as a video ({_reason(error)})") from error
        except BaseException:
            self.close()
            raise
        if self.index.packets == 0 or (self.index.damaged and on_error == "raise"):
            self.close()
            if self.index.packets == 0:
                raise VideoError.about(label, "the video stream holds no frames")
            raise self._damage(f"packets are damaged or missing (at least {self.index.damaged}); it may be cut off")

    def _open(self) -> None:
        self.close()
        self.container, self.stream = open_container(self.source, self.label)

    # -- what the video is ---------------------------------------------------------------------------------------------

    @property
    def fps(self) -> Fraction | None:
        rate = self.stream.average_rate or self.stream.guessed_rate
        return Fraction(rate) if rate else None

    @property
    def damaged(self) -> int:
        """Packets missing from the container, flagged by it, or refused or concealed by the decoder so far.

        A packet counts once, however often it was decoded and whoever complained of it.
        """
        return self.index.missing + max(len(self.index.flagged | self._refused), self._short)

    @property
    def frames(self) -> int:
        """How many frames there are: from the index if it tells, otherwise by decoding once."""
        if self._count is None and self.index.pts is not None:
            return len(self.index.pts)
        if self._count is None:
            self._count = sum(1 for _ in self._decode_all())
        if not self._count:
            raise VideoError.about(self.label, "none of its frames could be decoded")
        return self._count

    @property
    def likely_frames(self) -> int:
        """`frames` without decoding anything: exact where there is an index, the number of packets elsewhere."""
        return self.frames if self.index.pts is not None or self._count is not None else self.index.packets

    @property
    def info(self) -> VideoInfo:
        frames, fps = self.frames, self.fps
        first = self.read([0])[0]
        return VideoInfo(
            frames=frames,
            fps=fps,
            height=first.shape[0],
            width=first.shape[1],
            codec=self.stream.codec_context.codec.canonical_name,
            container=self.container.format.name,
            duration_seconds=float(frames / fps) if fps else None,
            rotation=90 * quarter_turns(self._rotation, self.mirrored),
            mirrored=self.mirrored,
            damaged_packets=self.damaged,
        )

    def decode_everything(self) -> int:
        """Decode the whole video once and return how many frames came out; damage is counted anew."""
        self._count = sum(1 for _ in self._decode_all())
        return self.frames

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, indices, count: bool = False) -> list[np.ndarray]:
        """uint8 RGB arrays (H, W, 3), one per index. IndexError outside the video, VideoError where it is damaged.

        count: if frames are found by decoding anyway, decode on to the end, so that `frames` is known at no extra pass.
        """
        try:
            indices = [int(index) for index in indices]
            if not indices:
                return []
            if self.index.pts is None:
                return self._read_sequentially(indices, to_end=count and self._count is None)
            check_indices(indices, self.frames, self.label)
            found = self._read_indexed(sorted(set(indices)))
            # A pts that never came out of the decoder: the index was wrong about this file, so trust the decoder.
            return self._read_sequentially(indices) if found is None else [found[i] for i in indices]
        except VideoError:
            raise
        except DECODE_ERRORS as error:
            raise VideoError.about(self.label, f"decoding failed ({_reason(error)})") from error

    def _read_indexed(self, wanted: list[int]) -> dict[int, np.ndarray] | None:
        frame_of = {self.index.pts[i]: i for i in wanted}
        pending = sorted(frame_of)
        found = {}
        skipping = self.stream.codec_context.name in SKIP_NONREF_CODECS
        while pending:
            got = self.decode_from(self.index.keyframe_for(pending[0]), pending, skipping)
            if not got:
                return None
            found.update((frame_of[pts], array) for pts, array in got.items())
            pending = [pts for pts in pending if pts not in got]
        return found

    def decode_from(self, key_pts: int, pending: list[int], skipping: bool = False) -> dict[int, np.ndarray]:
        """Decode from one keyframe until the next wanted frame has a later keyframe: arrays by pts.

        Empty if the seek missed, or if what the container calls a keyframe is none.
        """
        context, got = self.stream.codec_context, {}
        remaining, latest_key = set(pending), None
        self.container.seek(key_pts, stream=self.stream, backward=True)
        with closing(self.container.demux(self.stream)) as packets:  # left open, it keeps some memory for ever
            for packet in packets:
                if latest_key is None:
                    if packet.pts is None or packet.pts > key_pts or not packet.is_keyframe:
                        return {}
                    latest_key = key_pts
                elif packet.is_keyframe and packet.pts is not None:
                    latest_key = max(latest_key, packet.pts)
                if skipping:
                    context.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in remaining else "NONREF"
                for frame in self._decode(packet, since=key_pts):
                    if frame.pts == key_pts and frame.pict_type in PREDICTED:
                        return {}
                    if frame.pts in remaining:
                        got[frame.pts] = self._rgb(frame)
                        remaining.discard(frame.pts)
                if not remaining or self.index.keyframe_for(min(remaining)) > latest_key:
                    break
        context.skip_frame = "DEFAULT"
        return got

    def _read_sequentially(self, indices: list[int], to_end: bool = False) -> list[np.ndarray]:
        if any(index < 0 for index in indices):
            check_indices(indices, self.frames, self.label)
        wanted, last, found, count = set(indices), max(indices), {}, 0
        for frame in self._decode_all():
            if count in wanted:
                found[count] = self._rgb(frame)
            count += 1
            if count > last and not to_end:
                return [found[i] for i in indices]
        promised = len(self.index.pts) if self.index.pts is not None else self.index.packets if self.damaged else count
        self._count = count
        if len(found) == len(wanted):
            return [found[i] for i in indices]
        if not count:
            raise VideoError.about(self.label, "none of its frames could be decoded")
        if last >= promised:
            check_indices(indices, count, self.label)
        return self._repeat_lost(indices, found, count, promised)

    def _repeat_lost(self, indices, found, count, promised) -> list[np.ndarray]:
        """The index promised frames the decoder could not give: an error, or the last good frame, counted."""
        if self.on_error == "raise":
            raise self._damage(f"{promised - count} of {promised} frames could not be decoded")
        last = self._read_sequentially([count - 1])[0]
        self._short = promised - count
        return [found.get(i, last) for i in indices]

    def timed_frames(self):
        """All frames in order, each with its seconds since the first: by the container, or else by the mean rate."""
        first, fps = None, self.fps
        for number, frame in enumerate(self._decode_all()):
            if self.index.pts is not None and frame.time is not None:
                first = frame.time if first is None else first
                yield frame.time - first, self._rgb(frame)
            else:
                yield None if fps is None else float(number / fps), self._rgb(frame)

    def stream_frames(self, first: int, stop: int):
        """The frames first .. stop - 1 in order, one at a time, decoding from the start: for whole videos."""
        for number, frame in enumerate(self._decode_all()):
            if number >= stop:
                return
            if number >= first:
                yield self._rgb(frame)

    # -- decoding ------------------------------------------------------------------------------------------------------

    def _decode_all(self):
        """Every frame in order, from the start: the reference that indexed reading must agree with."""
        self._open()  # not every container can seek back to its very first packet
        self._refused, self._short = set(), 0
        try:
            with closing(self.container.demux(self.stream)) as packets:
                for packet in packets:
                    yield from self._decode(packet)
        except VideoError:
            raise
        except DECODE_ERRORS as error:
            self._refused.add("the end")
            if self.on_error == "raise":
                raise self._damage(f"the container breaks off ({_reason(error)})") from error

    def _decode(self, packet, since: int | None = None) -> list:
        try:
            frames = packet.decode()
        except av.error.EOFError:
            return []
        except DECODE_ERRORS as error:
            self._refused.add(packet_time(packet))
            if self.on_error == "raise":
                raise self._damage(f"a packet could not be decoded ({_reason(error)})") from error
            return []
        # Leading frames of an open GOP lack their references after a seek: broken, but never wanted.
        concealed = {f.pts for f in frames if f.is_corrupt and (since is None or (f.pts or 0) >= since)}
        self._refused |= concealed
        if concealed and self.on_error == "raise":
            raise self._damage("the decoder had to conceal damage")
        return frames

    def _rgb(self, frame) -> np.ndarray:
        self._rotation = frame.rotation
        return upright_rgb(frame, self._reformatter, self.mirrored)

    def _damage(self, what: str) -> VideoError:
        return VideoError.about(
            self.label, f'{what}. Read it all the same with on_error="conceal", which counts damage'
        )

    def close(self) -> None:
        if self.container is not None:
            self.container.close()
            self.container = None


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
