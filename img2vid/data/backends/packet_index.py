"""Where the frames of a video are, from its packets alone, without decoding.

Three facts about containers carry this file:

- A packet flagged "discard" (edit lists, stream-copied trims) feeds the decoder but is not a frame; nor is a VP8 frame
  coded only to be referred to ("alternate reference").
- In mp4/mov/mkv/webm every other packet is one frame, and sorting their pts gives display order; so frame i is a pts.
  Elsewhere (avi, mpeg-ts, raw streams) timestamps do not say as much, and frames are counted by decoding.
- Decoding can start at a keyframe, for every frame whose pts is not smaller than the keyframe's. The "leading" frames
  of an open GOP come after the keyframe in the file but before it on screen, and need the previous keyframe.
"""

from __future__ import annotations

from bisect import bisect_right

import av

MP4_FAMILY = "mov,mp4,m4a,3gp,3g2,mj2"
INDEXED_CONTAINERS = {MP4_FAMILY, "matroska,webm"}
DECODE_ERRORS = (av.FFmpegError, ValueError, OverflowError)


class PacketIndex:
    """Where the frames are: display timestamps in order, and the keyframes decoding can start from.

    `pts` is None if the packets do not tell (then only a sequential decode does).
    """

    def __init__(self, container, stream):
        timestamps, self.keyframes = [], []
        self.missing, self.flagged = 0, set()  # packets lost, and the times of those the container calls corrupt
        self.packets = self.discarded = self.hidden = 0
        self.open_gop = False
        codec, empty = stream.codec_context.codec.canonical_name, 0
        try:
            for packet in container.demux(stream):
                if packet.size == 0:
                    empty += packet.pts is not None  # a repeated picture; without a time it is the end's mark
                    continue
                self.packets += 1
                if packet.is_corrupt:
                    self.flagged.add(packet_time(packet))
                if packet.is_keyframe and packet.pts is not None:
                    self.keyframes.append(packet.pts)
                elif self.keyframes and packet.pts is not None and packet.pts < self.keyframes[-1]:
                    self.open_gop = True
                if packet.is_discard:
                    self.discarded += 1
                elif is_hidden(packet, codec):
                    self.hidden += 1
                else:
                    timestamps.append(packet.pts)
        except DECODE_ERRORS:
            self.missing += 1  # the container breaks off here; what came before is still readable
        # An mp4 lists its packets up front (without those an edit list cuts off): missing ones were lost.
        if container.format.name == MP4_FAMILY:
            self.missing += max(0, len(stream.index_entries) - self.packets - empty)
        self.pts = sorted(timestamps) if self._tells(container, timestamps) else None

    @property
    def damaged(self) -> int:
        return self.missing + len(self.flagged)

    def _tells(self, container, timestamps) -> bool:
        if container.format.name not in INDEXED_CONTAINERS or not timestamps or not self.keyframes:
            return False
        if None in timestamps or len(set(timestamps)) < len(timestamps):
            return False
        # Frames before the first keyframe may or may not survive decoding; only decoding tells.
        return min(timestamps) >= self.keyframes[0] and self.keyframes == sorted(set(self.keyframes))

    def keyframe_for(self, pts: int) -> int:
        """The pts of the keyframe from which decoding must start to show the frame at `pts`."""
        return self.keyframes[bisect_right(self.keyframes, pts) - 1]


def packet_time(packet):
    """What tells a packet from the others in every pass over the file: its display time, or its place."""
    return packet.pts if packet.pts is not None else ("at byte", packet.pos)


def is_hidden(packet, codec: str) -> bool:
    """Is it a VP8 frame that is never shown? (VP9 and AV1 put such frames inside the packet of a shown one.)

    Source: RFC 6386, section 9.1.
    """
    return codec == "vp8" and not memoryview(packet)[0] & 0x10
