"""What converting costs beyond building: time and peak memory of both, each in a process of its own.

    python -m benchmarks.convert --backbone vit_base --runs 5

"build" makes the image model with its library's own factory and random weights; "convert" does the same and inserts
time. Runs alternate, so that a machine that drifts drifts for both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.timing import spread

# imports are paid before the clock starts and are in the memory baseline of both
PROGRAM = """
import json, resource, sys, time
import torch
import img2vid
from img2vid.backbones.names import parse_name
import timm, open_clip
img2vid.convert, img2vid.VideoModel
what, backbone = sys.argv[1:]
name = parse_name(backbone)
baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
if what == "convert":
    model = img2vid.convert(backbone, random_weights=True)
elif name.library == "timm":
    model = timm.create_model(name.architecture, num_classes=0)
else:
    model = open_clip.create_model(name.architecture, pretrained_text=False)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
parameters = sum(p.numel() for p in model.parameters())
print(json.dumps({"seconds": seconds, "peak": peak / 1024, "baseline": baseline / 1024, "parameters": parameters}))
"""


def run(what: str, backbone: str) -> dict[str, float]:
    """One measurement: seconds, peak and baseline resident memory in MiB, parameters."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, what, backbone], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


MEASURED = {
    "time": lambda r: r["seconds"],
    "peak memory of the process": lambda r: r["peak"],
    "peak memory above imports": lambda r: r["peak"] - r["baseline"],
    "parameters": lambda r: r["parameters"],
}


def alternate(backbone: str, runs: int) -> dict[str, list[dict[str, float]]]:
    rows: dict[str, list[dict[str, float]]] = {"build": [], "convert": []}
    for _ in range(runs):
        for what, results in rows.items():
            results.append(run(what, backbone))
    return rows


def ratios(rows: dict[str, list[dict[str, float]]], value) -> list[float]:
    """Median, lowest and highest of the runs' ratios."""
    return spread([value(c) / value(b) for b, c in zip(rows["build"], rows["convert"], strict=True)])


def cases(backbone: str, runs: int) -> Iterator[dict]:
    """For the suite."""
    rows = alternate(backbone, runs)
    # a model smaller than what importing took at its worst leaves no trace in the peak
    measured = {label: value for label, value in MEASURED.items() if all(map(value, rows["build"]))}
    found = {f"convert / build, {label}": ratios(rows, value) for label, value in measured.items()}
    yield {"size": backbone, "num_frames": 8, "precision": "float32", "rounds": runs, "ratios": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit_base")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    rows = alternate(options.backbone, options.runs)
    for label, value in MEASURED.items():
        build, convert = (statistics.median(map(value, rows[what])) for what in ("build", "convert"))
        found, low, high = ratios(rows, value)
        print(
            f"{label:<28} build {build:14,.2f}  convert {convert:14,.2f}  ratio {found:.2f} ({low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    main()
