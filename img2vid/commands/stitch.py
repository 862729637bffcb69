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
With layers [0, auto], [auto, auto] and [auto, 12] of the parts, of two or more, the junctions are where models are most
alike on the videos of --calibrate; depth: 12 in the recipe then says how many layers there are to be. --rank accuracy
stitches the best of them and asks which tells the classes of the list apart.
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
    parser.add_argument(
        "--rank",
        choices=("cka", "accuracy"),
        default="cka",
        help="of places left open (auto): by how alike both sides are, or by how many held-out videos of a labelled "
        "--calibrate list the stitched model names right, its bridges fitted on the others (default: cka)",
    )
    parser.add_argument("--top", type=int, default=8, help="candidates that --rank accuracy stitches (default: 8)")
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
    from img2vid.stitching import NOTHING_KEPT, save_stitched, stitch

    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / RECIPE).is_file()):
        raise ConfigError(f"{out} is there, and is no stitched backbone. Choose another folder.")
    progress, size = Progress(), recipe.get("image_size")
    chosen, places = with_places(recipe["parts"])
    is_open = any("auto" in two for two in places)
    if is_open and given.untrained:
        raise ConfigError("layers: auto compares the models on videos: give --calibrate LIST.")
    if given.rank == "accuracy" and not is_open:
        raise ConfigError("--rank accuracy chooses among places left open, and this recipe leaves none: layers: auto.")
    if given.top < 1:
        raise ConfigError(f"--top {given.top}: expected at least 1.")
    parts = read_parts(chosen)
    with progress.stage("Loading the parts"):
        loaded = load_parts(parts, size and tuple(size))
    clips, labels, images = None, [], None
    if given.calibrate is not None:
        with progress.stage(f"Reading {given.calibrate}"):
            clips, labels = read_clips(given.calibrate, loaded[0].tower, given.num_frames, given.max_videos)
            images = clips.flatten(0, 1)
        progress.say(f"{len(images)} frames to calibrate on.")
    candidates: Sequence[Any] = ()
    if is_open:
        candidates = choose(given, recipe, parts, places, loaded, clips, labels, progress)
        filled = zip(chosen, candidates[0].layers, strict=True)
        parts = read_parts([{**one, "layers": list(layers)} for one, layers in filled])
    with progress.stage("Stitching"):
        stitched, junctions = stitch(parts, loaded, images)
    if size:
        stitched.arguments["image_size"] = list(size)
    print_junctions(progress.console, junctions)
    progress.say(f"Kept of any part's function: {NOTHING_KEPT}.")
    save_stitched(out, stitched, junctions, candidates)
    progress.say(f"Wrote {out}. Make it a video model: img2vid convert --backbone stitched:{out}")
    return 0


def choose(
    given: Any, recipe: Any, parts: Any, places: Any, loaded: Any, clips: Tensor, labels: Any, progress: Any
) -> Any:
    """Candidates for the places that a recipe leaves open, the best first."""
    from img2vid.junctions import rank_by_accuracy, search
    from img2vid.reporting import print_candidates

    if given.rank == "accuracy" and None in labels:
        raise ConfigError(f"--rank accuracy needs a label for each video, and {given.calibrate} lacks some.")
    with progress.stage("Comparing layers"):
        candidates = every = search(parts, loaded, places, clips.flatten(0, 1), recipe.get("depth"))
    if given.rank == "accuracy":
        with progress.stage(f"Stitching the {min(given.top, len(every))} most alike"):
            candidates = rank_by_accuracy(every[: given.top], parts, loaded, clips, labels)
    print_candidates(progress.console, candidates[:20])
    best = candidates[0]
    ways = f"Of {len(every)} ways to go over, {' + '.join(str(list(layers)) for layers in best.layers)}"
    if best.accuracy is None:
        progress.say(f"{ways} is the most alike, CKA {best.cka:.3f}.")
    else:
        progress.say(f"{ways} tells most apart: it names {best.accuracy:.1%} of the held-out videos right.")
    return candidates


def with_places(parts: list[Any]) -> tuple[list[Any], list[Any]]:
    """Parts with numbers for ``auto``, so that they can be loaded, and [first, end) of each as the recipe has it."""
    layers = [one.get("layers") if isinstance(one, dict) else None for one in parts]
    if not any(isinstance(two, list) and "auto" in two for two in layers):
        return parts, []
    is_right = all(
        isinstance(two, list) and len(two) == 2 and all(type(n) is int or n == "auto" for n in two) for two in layers
    )
    if not is_right or len(layers) < 2 or layers[0][0] == "auto" or layers[-1][1] == "auto":
        raise ConfigError(
            f"layers={shown(layers)}: a junction is chosen between parts, [0, auto], [auto, auto], ..., [auto, END]; "
            "where the first begins and the last ends is a number."
        )
    return [{**one, "layers": [0, 1]} for one in parts], layers


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


def read_clips(path: str, tower: Any, num_frames: int, max_videos: int) -> tuple[Tensor, list[int | None]]:
    """Clips (V, T, 3, H, W) from 0 to 1 of videos spread over a list, and labels; what cannot be read is an error."""
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
    return torch.stack(clips).float() / 255.0, [videos.rows[row].label for row in rows]
