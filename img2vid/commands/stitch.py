"""``img2vid stitch``: one image model of layers of several, as a recipe says."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from img2vid.command import Progress
from img2vid.config import ConfigError, shown

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """recipe:
  image_size: [224, 224]
  parts:
    - {backbone: vit_base, layers: [0, 6]}
    - {backbone: clip_b16, layers: [6, 12]}
With layers [0, auto] and [auto, 12] of two parts, the junction is where both models are most alike on the videos of
--calibrate; depth: 12 in the recipe then says how many layers there are to be.
Then: img2vid convert --backbone stitched:FOLDER"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2vid stitch",
        description="Stitch layers of several backbones together; bridges between widths are fitted on videos.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file: parts with layers [first, end), in order")
    parser.add_argument("--calibrate", metavar="LIST", help="list or folder of videos to fit and to measure on")
    parser.add_argument("--num-frames", type=int, default=2, help="frames of each video (default: 2)")
    parser.add_argument("--max-videos", type=int, default=64, help="of the list, evenly spread (default: 64)")
    parser.add_argument("--untrained", action="store_true", help="leave bridges as they start, and measure nothing")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where to write the stitched backbone")
    return parser


def main(argv: Sequence[str]) -> int:
    given = make_parser().parse_args(argv)
    recipe = read_recipe(Path(given.recipe))
    if given.calibrate is None and not given.untrained:
        raise ConfigError("Nothing to fit and measure on: give --calibrate LIST, a list of videos; or --untrained.")
    if given.calibrate is not None and given.untrained:
        raise ConfigError(
            "--untrained leaves everything as it starts, so --calibrate has nothing to do: leave out one."
        )
    out = Path(given.out)
    from img2vid.backbones.stitched import RECIPE, load_parts, read_parts
    from img2vid.reporting import print_junctions
    from img2vid.stitching import NOTHING_KEPT, save_stitched, search, stitch

    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / RECIPE).is_file()):
        raise ConfigError(f"{out} is there, and is no stitched backbone. Choose another folder.")
    progress, size = Progress(), recipe.get("image_size")
    chosen, is_open = with_places(recipe["parts"])
    if is_open and given.untrained:
        raise ConfigError("layers: auto compares the models on videos: give --calibrate LIST.")
    parts = read_parts(chosen)
    with progress.stage("Loading the parts"):
        loaded = load_parts(parts, size and tuple(size))
    images = None
    if given.calibrate is not None:
        with progress.stage(f"Reading {given.calibrate}"):
            images = read_images(given.calibrate, loaded[0].tower, given.num_frames, given.max_videos)
        progress.say(f"{len(images)} frames to calibrate on.")
    candidates: Sequence[Any] = ()
    if is_open:
        with progress.stage("Comparing layers"):
            candidates = search(loaded[0], loaded[1], images, recipe.get("depth"))
        best = candidates[0]
        ends = [[0, best.end], [best.begin, len(loaded[1].tower.blocks)]]
        parts = read_parts([{**one, "layers": layers} for one, layers in zip(chosen, ends, strict=True)])
        progress.say(
            f"Of {len(candidates)} junctions, {best.end} -> {best.begin} is the most alike, CKA {best.cka:.3f}."
        )
    with progress.stage("Stitching"):
        stitched, junctions = stitch(parts, loaded, images)
    if size:
        stitched.arguments["image_size"] = list(size)
    print_junctions(progress.console, junctions)
    progress.say(f"Kept of any part's function: {NOTHING_KEPT}.")
    save_stitched(out, stitched, junctions, candidates)
    progress.say(f"Wrote {out}. Make it a video model: img2vid convert --backbone stitched:{out}")
    return 0


def with_places(parts: list[Any]) -> tuple[list[Any], bool]:
    """Parts with numbers for ``auto``, and whether there was any."""
    layers = [one.get("layers") if isinstance(one, dict) else None for one in parts]
    if not any(isinstance(two, list) and "auto" in two for two in layers):
        return parts, False
    is_right = len(layers) == 2 and all(isinstance(two, list) and len(two) == 2 for two in layers)
    if not is_right or layers[0] != [0, "auto"] or layers[1][0] != "auto":
        raise ConfigError(f"layers={shown(layers)}: a junction is chosen of two parts, [0, auto] and [auto, END].")
    return [{**one, "layers": [0, 1]} for one in parts], True


def read_recipe(path: Path) -> dict[str, Any]:
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    known = ("parts", "image_size", "depth")
    if not isinstance(recipe, dict) or not isinstance(recipe.get("parts"), list) or set(recipe) - set(known):
        raise ConfigError(f"{path}: expected a recipe of {', '.join(known)}, given {shown(recipe)}.\n{EXAMPLE}")
    size = recipe.get("image_size")
    size = [size, size] if isinstance(size, int) else size
    if size is not None and not (isinstance(size, list) and len(size) == 2 and all(type(n) is int for n in size)):
        raise ConfigError(f"{path}: image_size={shown(size)}: expected pixels, or [height, width].")
    return {**recipe, "image_size": size}


def read_images(path: str, tower: Any, num_frames: int, max_videos: int) -> Tensor:
    """Frames (n, 3, H, W) from 0 to 1 of videos spread over a list; what cannot be read is an error."""
    import torch

    from img2vid.data.lists import read_list
    from img2vid.data.transforms import InputSpec
    from img2vid.evaluation.reading import Videos, Views

    videos = read_list(path)
    if num_frames < 1 or max_videos < 1:
        raise ConfigError(f"--num-frames {num_frames} --max-videos {max_videos}: expected at least 1.")
    spec = InputSpec(tower.image_size[0], tuple(tower.preprocess.mean), tuple(tower.preprocess.std))
    reader = Videos(videos, Views(num_frames), spec)
    rows = sorted({i * len(videos) // min(max_videos, len(videos)) for i in range(min(max_videos, len(videos)))})
    clips = []
    for row in rows:
        _, clip, problem = reader[row]
        if problem is not None:
            raise ConfigError(f"To calibrate on it, all of {path} must be readable: {problem.text}")
        clips.append(clip.flatten(0, 1))  # (T, C, H, W)
    return torch.cat(clips).float() / 255.0
