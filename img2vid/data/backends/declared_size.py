"""Was the end of a file lost? AVI and Matroska/WebM write their length at the front, and FFmpeg does not compare.

Formats made for streaming (MPEG-TS, MPEG-PS, raw) declare no length: cut between two packets, they look whole.
Sources: RIFF (Microsoft and IBM, 1991), EBML (RFC 8794), Matroska (RFC 9559).
"""

from __future__ import annotations

EBML_HEADER, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def cut_off_bytes(source) -> int:
    """How many bytes the header promises beyond the end of `source` (a path or a BytesIO); 0 if it promises nothing."""
    if isinstance(source, str):
        with open(source, "rb") as file:
            head, size = file.read(4096), file.seek(0, 2)
    else:
        head, size = bytes(source.getbuffer()[:4096]), source.getbuffer().nbytes
    return max(0, (_declared(head) or 0) - size)


def _declared(head: bytes) -> int | None:
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        size = int.from_bytes(head[4:8], "little")
        return 8 + size if 0 < size < 0xFFFFFF00 else None  # both ends of the range are used for "unknown"
    if head[:4] == EBML_HEADER:
        length, at = _vint(head, 4)
        at += length or 0
        if length is not None and head[at : at + 4] == SEGMENT:
            length, at = _vint(head, at + 4)
            return None if length is None else at + length
    return None


def _vint(data: bytes, at: int) -> tuple[int | None, int]:
    """An EBML length and where it ends: the leading zeros of the first byte say how many more bytes there are.

    All bits set means "unknown", as live recordings have it: None.
    """
    if at >= len(data) or data[at] == 0:
        return None, at
    width = 9 - data[at].bit_length()
    bits = 7 * width
    value = int.from_bytes(data[at : at + width], "big") & ((1 << bits) - 1)
    return (None if value == (1 << bits) - 1 else value), at + width
