"""Peak memory of a training step, each subject in a process of its own.

    python -m benchmarks.memory "img2vid" ViT-B/16 8

On a CPU: how far the peak of the process's resident memory rises above what it was with the model built, which is what
its activations and gradients take. What is freed is given back at once (glibc would keep much of it, which adds a fifth
and more to anybody's peak). On a GPU: the same by torch's own count.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch


def measure(name: str, size: str, num_frames: int, device: str = "cpu", threads: int = 1) -> dict[str, float]:
    """In a process of its own: MiB of weights, and of what the step adds.

    Raises:
        Missing: the subject's library is not installed.
        RuntimeError: the process died, of lack of memory perhaps.
    """
    from benchmarks.subjects import Missing

    command = [sys.executable, "-m", "benchmarks.memory", name, size, str(num_frames), device, str(threads)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['killed'])[-1][:200]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if "missing" in found:
        raise Missing(found["missing"])
    return found


def main(name: str, size: str, num_frames: str, device: str = "cpu", threads: str = "1") -> None:
    from benchmarks.subjects import Missing, training_step

    torch.set_num_threads(int(threads))
    try:
        step = training_step(name, size, int(num_frames), device)
    except Missing as error:
        print(json.dumps({"missing": str(error)}))
        return
    before = peak(device, current=True)
    step()
    print(json.dumps({"step": peak(device) - before, "before": before}))


def peak(device: str, current: bool = False) -> float:
    """MiB, the most there has been at a time; ``current`` begins anew from what there is now."""
    if device == "cuda":
        if current:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if not Path("/proc/self/clear_refs").exists():  # not Linux: building the model counts as well
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    if current:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**10


if __name__ == "__main__":
    if not 3 <= len(sys.argv[1:]) <= 5:
        sys.exit(f"{__doc__}\nusage: python -m benchmarks.memory SUBJECT SIZE FRAMES [cpu|cuda [THREADS]]")
    main(*sys.argv[1:])
