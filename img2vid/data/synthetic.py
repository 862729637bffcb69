"""`img2vid data synth FOLDER`: a motion set made of real files, in which only time tells the classes apart.

Handwritten digits move left or right, up or down, grow or shrink, or turn either way, on textured backgrounds. Every
scene is written twice: as it is, and with its frames in reverse order under the opposite class. All frames are coded
alone (no frame refers to another, one quantiser for all), so the two files hold the same pictures bit for bit. Hence
the bag of all frames says no more than chance about the class, nor does one frame at an unknown time; the order does.

A frame at a known time does tell: what moves right begins on the left. So a model that is to see no order must be given
frames that lie symmetrically in time, such as all of them, or the middles of equal parts of an odd length (8 of 24
frames; 8 of 16 are the frames 1, 3, ... 15, and backwards 14, 12, ... 0).

    FOLDER/train.csv, val.csv, test.csv      manifests: path, label ("moving left"), caption ("the digit seven moving
                                             left"), frames
    FOLDER/videos/train-000000.mp4 ...       scene 0 and, as 000001, its reversal
    FOLDER/settings.json                     everything needed to make the set again

The splits use disjoint digit images. The set depends on its settings alone; the files, also on the version of x264.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from img2vid.data.digits import (
    DIGIT_GRID,
    DIGIT_WORDS,
    MIN_SCALE,
    SPLITS,
    draw,
    load_digits,
    random_background,
    random_style,
)
from img2vid.data.manifest import Row, write_manifest

# (forward, its time reversal); the axis of a scene is a row of this table.
MOTIONS = (
    ("moving right", "moving left"),
    ("moving down", "moving up"),
    ("growing", "shrinking"),
    ("turning counterclockwise", "turning clockwise"),
)
CLASS_NAMES = tuple(sorted(name for pair in MOTIONS for name in pair))


@dataclass(frozen=True)
class Difficulty:
    """backgrounds: kinds to choose from. extent: share of the possible motion that is used, (lowest, highest).

    noise: standard deviation of the noise added to each frame, of 255. distractor: a second digit that stands still.
    """

    backgrounds: tuple[str, ...]
    extent: tuple[float, float]
    noise: float = 0.0
    distractor: bool = False


DIFFICULTIES = {
    "easy": Difficulty(("plain",), (0.8, 1.0)),
    "medium": Difficulty(("plain", "gradient", "noise"), (0.5, 0.9), noise=3.0),
    "hard": Difficulty(("gradient", "noise"), (0.3, 0.5), noise=8.0, distractor=True),
}


@dataclass(frozen=True)
class MotionSettings:
    """train, val, test: videos per split, multiples of 8 (so that classes are equally frequent). size: pixels, even."""

    train: int = 800
    val: int = 160
    test: int = 160
    size: int = 64
    num_frames: int = 24  # the middles of 8 equal parts lie symmetrically in time; those of 16 frames do not
    frames_per_second: int = 12
    difficulty: str = "medium"
    seed: int = 0

    def __post_init__(self):
        smallest = 2 * round(MIN_SCALE / 0.4 / 2)
        for split in SPLITS:
            if getattr(self, split) < 0 or getattr(self, split) % len(CLASS_NAMES):
                raise ValueError(f"{split}={getattr(self, split)}: expected a multiple of {len(CLASS_NAMES)}")
        if self.size < smallest or self.size % 2:
            raise ValueError(f"size={self.size}: expected an even number of pixels, {smallest} or more")
        if self.num_frames < 2 or self.frames_per_second < 1:
            raise ValueError(f"expected 2 frames or more and a rate of 1 or more: {self}")
        if self.difficulty not in DIFFICULTIES:
            raise ValueError(f"difficulty={self.difficulty!r}: expected {', '.join(map(repr, DIFFICULTIES))}")


def scene(rng: np.random.Generator, images: np.ndarray, labels: np.ndarray, axis: int, settings: MotionSettings):
    """One scene moving forward along `axis` (a row of MOTIONS): (frames uint8 (T, size, size, 3), digit 0 to 9).

    images: float (n, 8, 8) to choose from, labels: (n,) their digits. Equal state of rng, equal scene.
    """
    hard, size = DIFFICULTIES[settings.difficulty], settings.size
    chosen, other = rng.choice(len(images), 2, replace=False)
    canvas = random_background(rng, 1, size, hard.backgrounds)
    style, still = random_style(rng, canvas), random_style(rng, canvas)
    if hard.distractor:
        faint = (still["colour"] + canvas.mean((1, 2))) / 2  # readable, but the weaker of the two
        side = max(MIN_SCALE, 0.3 * size)
        canvas = draw(images[other], still["centre"], side, still["angle"], faint, canvas)
    at = np.linspace(0, 1, settings.num_frames)  # (T,), the way travelled
    extent, place = rng.uniform(*hard.extent), rng.uniform(0, 1, 2)
    # Digits turn by 120 degrees at most, half of it to each side, so that a 6 never becomes a 9.
    scale, angle = style["scale"][0] * 0.7, style["angle"][0] / 3
    scale, angle = np.full(settings.num_frames, max(scale, MIN_SCALE)), np.full(settings.num_frames, angle)
    if axis == 2:
        low, high = max(MIN_SCALE, 0.3 * size), 0.75 * size
        middle = (1 - extent) * place[0]
        scale = low + (high - low) * (middle + extent * at)
    if axis == 3:
        angle = 120 * ((1 - extent) * place[0] + extent * at - 0.5)
    # A turned square is wider, and its ink fades out half a cell beyond it.
    turned = np.abs(np.cos(np.deg2rad(angle))) + np.abs(np.sin(np.deg2rad(angle)))
    width = (scale * turned).max() * (DIGIT_GRID + 1) / DIGIT_GRID
    room = size - width  # how far the centre can go with the whole digit on the canvas
    centre = width / 2 + room * np.stack([np.full(settings.num_frames, p) for p in place], -1)  # (T, 2)
    if axis in (0, 1):
        centre[:, axis] = width / 2 + room * ((1 - extent) * place[axis] + extent * at)
    frames = draw(images[chosen], centre, scale, angle, style["colour"][0], canvas[0])  # (T, size, size, 3)
    if hard.noise:
        frames = np.rint(np.clip(frames + rng.normal(0, hard.noise, frames.shape), 0, 255)).astype(np.uint8)
    return frames, int(labels[chosen])


def write_video(frames: np.ndarray, path: Path, frames_per_second: int) -> None:
    """Encode uint8 (T, H, W, 3) so that each frame's picture depends on that frame alone."""
    import av

    # One quantiser and only keyframes: nothing depends on neighbours, on the past or on a bit budget.
    alone = "keyint=1:qp=18:aq-mode=0:mbtree=0:scenecut=0"
    with av.open(str(path), "w") as container:
        options = {"preset": "medium", "threads": "1", "x264-params": alone}
        stream = container.add_stream("libx264", rate=frames_per_second, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", threads=1)))
        container.mux(stream.encode(None))


def make_motion_set(folder, settings: MotionSettings | None = None, on_progress=lambda: None) -> Path:
    """Write the set into `folder`, which must not exist or be empty; whole or not at all. Returns the folder."""
    settings, folder = settings or MotionSettings(), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not an empty folder; remove it or choose another")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        (unfinished / "videos").mkdir(parents=True)
        for number, split in enumerate(SPLITS):
            images, labels = load_digits(split)
            rows = []
            for pair in range(getattr(settings, split) // 2):
                axis = pair % len(MOTIONS)
                rng = np.random.default_rng([settings.seed, number, pair])
                frames, digit = scene(rng, images, labels, axis, settings)
                for reverse, motion in enumerate(MOTIONS[axis]):
                    path = f"videos/{split}-{2 * pair + reverse:06d}.mp4"
                    write_video(frames[::-1] if reverse else frames, unfinished / path, settings.frames_per_second)
                    caption = f"the digit {DIGIT_WORDS[digit]} {motion}"
                    rows.append(Row(path, motion, (caption,), frames=settings.num_frames))
                    on_progress()
            write_manifest(rows, unfinished / f"{split}.csv")
        (unfinished / "settings.json").write_text(json.dumps(asdict(settings), indent=1) + "\n")
        if folder.exists():
            folder.rmdir()
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("img2vid data synth", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="where the set goes; must not exist or be empty")
    defaults = MotionSettings()
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=int, default=getattr(defaults, split), help="videos, a multiple of 8")
    parser.add_argument("--size", type=int, default=defaults.size, help="pixels, even")
    parser.add_argument("--num-frames", type=int, default=defaults.num_frames, help="of each video")
    parser.add_argument("--frames-per-second", type=int, default=defaults.frames_per_second, help="of each video")
    parser.add_argument("--difficulty", default=defaults.difficulty, choices=list(DIFFICULTIES))
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of everything drawn")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = vars(make_parser().parse_args(argv))
    folder = args.pop("folder")
    try:
        settings = MotionSettings(**args)
        from img2vid.command import progress_bar

        with progress_bar("drawing", sum(getattr(settings, split) for split in SPLITS)) as advance:
            make_motion_set(folder, settings, lambda: advance(1))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(f"wrote {settings.train} + {settings.val} + {settings.test} videos and their manifests to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
