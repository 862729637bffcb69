"""Every benchmark of speed and memory in one command; some twelve minutes on two cores.

    python -m benchmarks --suite cpu --out results.json --write docs/performance.md
    python -m benchmarks --suite cpu --out results.json --only inference-b16 streaming
    python -m benchmarks --suite cpu --out /tmp/try.json --quick        # does it run? (numbers mean nothing)

Results are written after each group; stopped (Ctrl-C) or failed, the same command again goes on with the groups that
are missing. Peers that are not installed are left out by name: pip install timesformer-pytorch adds one,
'img2vid[test]' the others and the videos that are read.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks import page
from benchmarks.subjects import Missing
from benchmarks.suite import GROUPS, Plan


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=("cpu", "gpu"), required=True)
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="NAME", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: a trial of the suite itself")
    parser.add_argument("--again", action="store_true", help="measure groups anew that the file already has")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks.json"), help="JSON (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put tables of it into a Markdown page")
    options = parser.parse_args(argv)
    device = "cuda" if options.suite == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--suite gpu: torch sees no CUDA device here; --suite cpu runs anywhere")
    if options.threads < 1:
        parser.error(f"--threads {options.threads}: expected at least 1")
    if options.write is not None:
        page.parts(options.write)  # told now, not after the measuring
    torch.set_num_threads(options.threads)
    plan = Plan(device, options.threads, options.quick)
    results = begin(options.out, plan)
    save(results, options.out)
    try:
        failed = measure(results, options, plan)
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {options.out}, and the same command goes on with the rest")
        return 130
    print(f"{sum(results['minutes'].values()):.1f} minutes in all; results in {options.out}")
    if options.write is not None:
        page.write(results, options.write)
        print(f"Wrote the tables into {options.write}")
    if failed:
        print(f"FAILED: {', '.join(failed)}. The same command tries them again.")
    return 1 if failed else 0


def measure(results: dict[str, Any], options: argparse.Namespace, plan: Plan) -> list[str]:
    """The groups asked for into ``results`` and its file, one after the other; returns those that failed."""
    failed = []
    for name in options.only or GROUPS:
        if name in results["groups"] and not options.again:
            print(f"{name}: already in {options.out}", flush=True)
            continue
        started = time.perf_counter()
        cases = []
        try:
            for case in GROUPS[name](plan):
                cases.append(case)
                say(name, case)
        except Missing as error:
            print(f"{name}: left out ({error})", flush=True)
            continue
        except Exception:
            traceback.print_exc()
            print(f"{name}: FAILED, see above; the other groups go on", flush=True)
            failed.append(name)
            continue
        results["groups"][name] = cases
        results["minutes"][name] = round((time.perf_counter() - started) / 60, 2)
        save(results, options.out)
    return failed


def begin(out: Path, plan: Plan) -> dict[str, Any]:
    """An earlier run's results, if they are of the same machine and settings; else empty ones."""
    about = {"machine": machine(plan), "device": plan.device, "threads": plan.threads, "quick": plan.quick}
    if not out.is_file():
        return {**about, "minutes": {}, "groups": {}}
    try:
        found = json.loads(out.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"error: {out} is not readable as results ({error}). Give another --out, or remove it."
        ) from error
    if not isinstance(found, dict) or not {"minutes", "groups"} <= found.keys():
        raise SystemExit(f"error: {out} holds no results of benchmarks. Give another --out.")
    different = [name for name, value in about.items() if found.get(name) != value]
    if different:
        raise SystemExit(
            f"error: {out} is of a run with another {' and '.join(different)}. Results of different runs are not "
            "mixed: give another --out, or remove it."
        )
    return found


def machine(plan: Plan) -> dict[str, Any]:
    packages = ("torch", "timm", "transformers", "timesformer-pytorch")
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    name = torch.cuda.get_device_name() if plan.device == "cuda" else processor()
    return {"processor": name, "python": platform.python_version(), "versions": versions}


def processor() -> str:
    """As the system names it, with what its cores can do that matters here."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = fields.get("flags", "").split()
    able = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{fields.get('model name', platform.machine())} ({', '.join(able) or 'no AVX'})"


def say(group: str, case: dict[str, Any]) -> None:
    print(f"{group}: {case['size']}, T={case['num_frames']}, {case['precision']}")
    for name, (middle, low, high) in case.get("seconds", {}).items():
        print(f"    {name:<28} {middle:8.3f} s ({low:.3f} to {high:.3f})")
    for name, value in case.get("mebibytes", {}).items():
        print(f"    {name:<28} {value:8,.0f} MiB")
    for name, found in case["ratios"].items():
        print(f"    {name:<44} {page.shown(found)}")
    for name, why in case.get("left_out", {}).items():
        print(f"    left out: {name} ({why})")
    sys.stdout.flush()


def save(results: dict[str, Any], out: Path) -> None:
    if out.is_dir():
        raise SystemExit(f"error: results cannot be written to {out}: it is a folder; name a file in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(out.name + ".new")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(out)
    except OSError as error:
        raise SystemExit(f"error: results cannot be written to {out}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
