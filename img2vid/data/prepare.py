"""`img2vid data prepare LIST FOLDER`: re-encode videos for training, so that any clip is a few frames' work away.

Most videos on the web have a keyframe every 100 to 250 frames, and decoding 8 spread frames means decoding nearly all.
Prepared videos have a short side of 256 pixels, a keyframe every 16 frames and no B-frames; sizes grow a little and
reading is several times faster (measured and printed at the end). Time ranges are cut out on the way.

One file per row, named by what it was made from; a file appears whole or not at all, and a second run makes only what
is missing; a full disk ends the run, and what is finished is kept. The new manifest is FOLDER/manifest.csv, or .jsonl;
rows that failed are in FOLDER/quarantine.csv. Exit code 0: all prepared; 1: some rows are quarantined; 2: the list
itself is wrong, or the disk.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import sys
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from img2vid.data import sampling
from img2vid.data.check import Finding, add_list_arguments, in_processes, named_rows, write_quarantine
from img2vid.data.errors import ListError, VideoError
from img2vid.data.lists import read_list
from img2vid.data.manifest import Row, write_manifest
from img2vid.data.reading import open_video, read_clip

OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}


@dataclass(frozen=True)
class Encoding:
    """short_side: pixels (smaller videos keep their size). keyframe_interval: frames, at most.

    crf: x264's quality, lower is better and larger; 18 is close to invisible.
    """

    short_side: int = 256
    keyframe_interval: int = 16
    crf: int = 18
    preset: str = "veryfast"

    def __post_init__(self):
        if self.short_side < 16 or self.keyframe_interval < 1 or not 0 <= self.crf <= 51:
            raise ValueError(f"expected short_side >= 16, keyframe_interval >= 1 and crf from 0 to 51: {self}")


def prepared_path(row: Row, folder: Path, encoding: Encoding) -> Path:
    """Another source, time range, encoding or a changed file gives another name, so a stale file is never reused."""
    stat = os.stat(row.path)
    facts = (os.path.abspath(row.path), row.start_seconds, row.end_seconds, encoding, stat.st_size, stat.st_mtime_ns)
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=6).hexdigest()
    return folder / "videos" / f"{Path(row.path).stem}-{digest}.mp4"


def prepare_row(row: Row, folder: Path, encoding: Encoding) -> Row | Finding:
    """Make the prepared file of one row unless it is there; the row that points to it, or what was wrong.

    Raises OSError where the trouble is the disk's, not the video's: it would be the next video's too.
    """
    try:
        target = prepared_path(row, folder, encoding)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else os.strerror(error.errno)
        return Finding(row, kind="failed", problem=f"{row.path}: {reason}")
    try:
        frames = _frames_in(target)
        if frames is None:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            try:
                encoded, frames = _encode(row, temporary, encoding), _frames_in(temporary)
                if frames != encoded:  # what a full disk keeps from being written is not always an error
                    raise VideoError.about(str(target), f"{frames or 0} of {encoded} frames arrived on the disk")
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        return replace(row, path=str(target), start_seconds=None, end_seconds=None, frames=frames)
    except (VideoError, OSError, ValueError) as error:
        if getattr(error, "errno", None) in OF_THE_DISK:
            raise OSError(error.errno, os.strerror(error.errno), str(folder)) from None  # FFmpeg's own does not pickle
        return Finding(row, kind="failed", problem=str(error))


def _frames_in(prepared: Path) -> int | None:
    """How many frames a prepared file has; None if it is not there or not whole, as after a power failure."""
    try:
        with open_video(str(prepared)) as reader:
            return reader.frames
    except VideoError:
        return None


def _encode(row: Row, target: Path, encoding: Encoding) -> int:
    """Every frame of the row's time range, in order, at the video's average rate; how many there were."""
    import av
    import numpy as np

    with open_video(row.path) as reader, av.open(str(target), "w", format="mp4") as container:
        first, stop = sampling.frame_range(reader.frames, reader.fps, row.start_seconds, row.end_seconds)
        stream, count = None, 0
        for array in reader.stream_frames(first, stop):  # (H, W, 3)
            if stream is None:
                height, width = array.shape[:2]
                scale = min(1.0, encoding.short_side / min(height, width))
                # x264 stores colour at half the resolution, so sides are even.
                height, width = (max(2, 2 * round(side * scale / 2)) for side in (height, width))
                rate = Fraction(reader.fps or 25).limit_denominator(65535)
                options = {"crf": str(encoding.crf), "preset": encoding.preset, "tune": "fastdecode", "threads": "1"}
                stream = container.add_stream("libx264", rate=rate, options=options)
                stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
                stream.codec_context.gop_size, stream.codec_context.max_b_frames = encoding.keyframe_interval, 0
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame = frame.reformat(width=width, height=height, format="yuv420p", interpolation="BICUBIC", threads=1)
            container.mux(stream.encode(frame))
            count += 1
        if stream is None:
            raise VideoError.about(row.path, "none of its frames could be decoded")
        container.mux(stream.encode(None))
    return count


def measured_speed_up(pairs: list[tuple[Row, Row]], num_frames: int = 8, short_side: int = 256) -> float:
    """Time to read clips from the originals over the time from the prepared files, alternating between the two."""
    seconds = [0.0, 0.0]
    read_clip(pairs[0][0].path, num_frames=1, short_side=short_side)  # the first call also imports
    for pair in pairs:
        for which, row in enumerate(pair):
            started = time.perf_counter()
            read_clip(row.path, num_frames=num_frames, short_side=short_side)
            seconds[which] += time.perf_counter() - started
    return seconds[0] / seconds[1]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("img2vid data prepare", description=__doc__.split("\n\n")[0])
    add_list_arguments(parser)
    parser.add_argument("folder", help="where the prepared videos and the new manifest go")
    defaults = Encoding()
    parser.add_argument("--short-side", type=int, default=defaults.short_side, help="pixels")
    parser.add_argument("--keyframe-interval", type=int, default=defaults.keyframe_interval, help="frames")
    parser.add_argument("--crf", type=int, default=defaults.crf, help="quality, 0 to 51, lower is better and larger")
    parser.add_argument("--shard-videos", type=int, default=0, help="also write webdataset shards of this many videos")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        return _prepare_and_print(args)
    except (ListError, ValueError, OSError) as error:  # OSError: the disk is full, the folder cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept; the same command goes on from here", file=sys.stderr)
        return 130


def _prepare_and_print(args) -> int:
    from img2vid.command import progress_bar

    folder = Path(args.folder).resolve()
    encoding = Encoding(args.short_side, args.keyframe_interval, args.crf)
    videos = read_list(args.list, args.format, args.root, args.classes, args.split, args.subset)
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    with progress_bar("preparing", len(videos)) as advance:
        one = lambda: advance(1)  # noqa: E731
        for number, result in in_processes(prepare_row, videos.rows, (folder, encoding), args.num_workers, one):
            if isinstance(result, VideoError):
                result = Finding(videos.rows[number], kind="failed", problem=str(result))
            results[number] = result
    done = [(videos.rows[n], results[n]) for n in sorted(results) if isinstance(results[n], Row)]
    failed = [results[n] for n in sorted(results) if isinstance(results[n], Finding)]
    for finding in failed:
        print(f"failed: {finding.row.where}: {finding.problem}")
    manifest = folder / "manifest.csv"
    rows = named_rows(videos, [row for _, row in done])
    # Paths below the folder are written relative to it, so that the folder can move.
    write_manifest([replace(row, path=os.path.relpath(row.path, folder)) for row in rows], manifest)
    write_quarantine(failed, folder / "quarantine.csv")
    if args.shard_videos and rows:
        from img2vid.data.shards import write_shards

        print(f"wrote {len(write_shards(rows, folder / 'shards', args.shard_videos))} shards in {folder / 'shards'}")
    print(f"prepared {len(done)} of {len(videos)} videos; wrote {manifest}")
    sample = [pair for pair in done if pair[0].start_seconds is None and pair[0].end_seconds is None][:16]
    if sample:
        speed_up, count = measured_speed_up(sample), len(sample)
        print(f"reading 8 frames at a short side of 256 is {speed_up:.1f} times as fast (measured on {count} videos)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
