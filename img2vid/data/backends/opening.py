"""Opening a file with PyAV for reading: one thread, local files only, and nothing that is no video."""

from __future__ import annotations

import av

from img2vid.data.errors import VideoError

# Demuxers that take text for video: a typescript as ANSI art, a playlist or a script as somebody else's files.
REFUSED_CONTAINERS = {"tty", "hls", "concat", "dash", "vapoursynth", "lavfi", "sdp", "webm_dash_manifest"}
MAX_PIXELS = 16384 * 8192  # a flipped bit in a header can ask for a frame of many gigabytes


def open_container(source, label: str):
    """An open container (the caller closes it) and its best video stream. VideoError if there is no such stream."""
    if hasattr(source, "seek"):
        source.seek(0)
    container = av.open(
        source,
        mode="r",
        metadata_errors="replace",
        options={"threads": "1"},
        container_options={"protocol_whitelist": "file"},
    )
    try:
        return container, _video_stream(container, label)
    except BaseException:
        container.close()
        raise


def _video_stream(container, label: str):
    name = container.format.name
    if REFUSED_CONTAINERS & set(name.split(",")):
        raise VideoError.about(label, f"this is a {name} file, not a video")
    stream = container.streams.best("video")  # .video[0] may be the cover picture
    if stream is None or stream.codec_context is None:
        kinds = sorted({other.type for other in container.streams}) or ["nothing"]
        raise VideoError.about(label, f"holds no decodable video stream (it holds: {', '.join(kinds)})")
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream
