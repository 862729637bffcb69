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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit_base")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    rows = {"build": [], "convert": []}
    for _ in range(options.runs):
        for what, results in rows.items():
            results.append(run(what, options.backbone))

    def ratios(value) -> list[float]:
        return [value(c) / value(b) for b, c in zip(rows["build"], rows["convert"], strict=True)]

    for label, value in (
        ("time", lambda r: r["seconds"]),
        ("peak memory of the process", lambda r: r["peak"]),
        ("peak memory above imports", lambda r: r["peak"] - r["baseline"]),
        ("parameters", lambda r: r["parameters"]),
    ):
        build, convert = (statistics.median(map(value, rows[what])) for what in ("build", "convert"))
        found = ratios(value)
        print(
            f"{label:<28} build {build:14,.2f}  convert {convert:14,.2f}  "
            f"ratio {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
        )


if __name__ == "__main__":
    main()
