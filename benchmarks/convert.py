"""What converting costs beyond building: time and peak memory of both, each in a process of its own.

    python -m benchmarks.convert --backbone vit_base --runs 5
    python -m benchmarks.convert --backbone vit_giant_patch14_dinov2 --runs 1 --from file

With random weights, "build" makes the image model with its library's own factory, "convert" does the same and inserts
time. From files (safetensors, in the page cache), "build" loads an image checkpoint by the library's own means,
"convert" does so by ours and inserts time, "load" reads the converted model's own folder. Files go to --scratch and are
deleted. All take turns, so that a machine that drifts drifts for all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import peak
from benchmarks.timing import spread

Row = dict[str, float]
MEASURED = {
    "time": lambda r: r["seconds"],
    "peak memory of the process": lambda r: r["peak"],
    "peak memory above imports": lambda r: r["peak"] - r["baseline"],
    "parameters": lambda r: r["parameters"],
}


def build(backbone: str, image_file: str | None) -> torch.nn.Module:
    """The image model as its library's users make it."""
    from img2vid.backbones.names import parse_name

    name = parse_name(backbone)
    if name.library == "timm":
        import timm

        return timm.create_model(name.architecture, num_classes=0, checkpoint_path=image_file or "")
    import open_clip

    return open_clip.create_model(name.architecture, pretrained=image_file, pretrained_text=False)


def made(what: str, backbone: str, folder: Path | None) -> torch.nn.Module:
    import img2vid

    image_file = None if folder is None else str(folder / "image.safetensors")
    if what == "build":
        return build(backbone, image_file)
    if what == "convert":
        return img2vid.convert(backbone, weights=image_file, random_weights=image_file is None)
    return img2vid.load(folder / "video")


def prepare(backbone: str, folder: Path) -> None:
    """What loading takes: weights of an image model, and the converted model's own folder."""
    from safetensors.torch import save_file

    import img2vid

    model = img2vid.convert(backbone, random_weights=True)
    state = {name: tensor for name, tensor in model.state_dict().items() if model.origin(name) == "pretrained"}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "image.safetensors")
    model.save_pretrained(folder / "video")


def child(what: str, backbone: str, folder: str) -> None:
    # imports are paid before the clock starts and are in the memory baseline of all
    import open_clip  # noqa: F401
    import timm  # noqa: F401

    import img2vid

    _ = img2vid.convert, img2vid.VideoModel, img2vid.load
    if what == "prepare":
        return prepare(backbone, Path(folder))
    baseline = peak("cpu", current=True)
    started = time.perf_counter()
    model = made(what, backbone, Path(folder) if folder else None)
    seconds = time.perf_counter() - started
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"seconds": seconds, "peak": peak("cpu"), "baseline": baseline, "parameters": parameters}))


def run(what: str, backbone: str, folder: str = "") -> Row:
    """One measurement: seconds, peak and baseline resident memory in MiB, parameters.

    Raises:
        RuntimeError: the process died, of lack of memory perhaps.
    """
    command = [sys.executable, "-m", "benchmarks.convert", "--child", what, "--backbone", backbone, "--scratch", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1][:300]
        raise RuntimeError(f"{what} {backbone}: exit code {done.returncode}: {last}")
    return {} if what == "prepare" else json.loads(done.stdout.strip().splitlines()[-1])


def alternate(backbone: str, runs: int, from_file: bool = False, scratch: str | None = None) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {what: [] for what in ("build", "convert", *(["load"] if from_file else []))}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        if from_file:
            run("prepare", backbone, folder)
        for _ in range(runs):
            for what, results in rows.items():
                results.append(run(what, backbone, folder if from_file else ""))
    return rows


def ratios(rows: dict[str, list[Row]], value: Any, of: str = "convert") -> list[float]:
    """Median, lowest and highest of the runs' ratios over building."""
    return spread([value(c) / value(b) for b, c in zip(rows["build"], rows[of], strict=True)])


def cases(backbone: str, runs: int) -> Iterator[dict[str, Any]]:
    """For the suite."""
    rows = alternate(backbone, runs)
    found = {f"convert / build, {label}": ratios(rows, value) for label, value in MEASURED.items()}
    yield {"size": backbone, "num_frames": 8, "precision": "float32", "rounds": runs, "ratios": found}


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backbone", default="vit_base", help="an alias, timm:NAME or open_clip:ARCH (default: %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=5, help="of each (default: %(default)s)")
    parser.add_argument("--from", dest="source", choices=("random", "file"), default="random", help="whose weights")
    parser.add_argument(
        "--scratch", metavar="FOLDER", help="where there is room for files twice as large as the weights"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.backbone, options.scratch)
        return 0
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: expected at least 1")
    try:
        rows = alternate(options.backbone, options.runs, options.source == "file", options.scratch)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for of in list(rows)[1:]:
        for label, value in MEASURED.items():
            low, high = (statistics.median(map(value, rows[what])) for what in ("build", of))
            found, least, most = ratios(rows, value, of)
            print(
                f"{label:<28} build {low:16,.2f}  {of:<7} {high:16,.2f}  ratio {found:.2f} ({least:.2f} to {most:.2f})"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
