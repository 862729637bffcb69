"""How time is best put in: temporal_init x gate x prefix_mode, each trained alike on the synthetic motion set.

    python -m benchmarks.ablation runs/motion --steps 250 --out runs/ablation [--only copy/tanh]

Every cell is `img2vid train` with configs/train/nano_motion.yaml, shortened to --steps (warm-up and cosine included),
and measured as `python -m benchmarks.motion` does. One more row, the control, is space_only. A cell that is finished is
not trained again, so a stopped ablation goes on where it was.

    OUT/cells/*.json     one per cell: its numbers and its validation curve
    OUT/ablation.json    all of them, with the settings they share
    OUT/ablation.md      the table
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, get_args

import yaml

import img2vid
from benchmarks.motion import measure, read_clips
from img2vid.config import Gate, PrefixMode, TemporalInit

CONFIG = Path(__file__).resolve().parent.parent / "configs/train/nano_motion.yaml"
FACTORS = {"temporal_init": get_args(TemporalInit), "gate": get_args(Gate), "prefix_mode": get_args(PrefixMode)}
CONTROL = {"attention": "space_only"}
START, WANTED = "at step 0", 0.5  # steps until this share of the validation videos is right


read_test_clips = cache(read_clips)


def cells() -> list[dict[str, str]]:
    """What each cell asks of the video model, one prefix_mode after the other; the control comes last."""
    found = [dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())]
    return sorted(found, key=lambda cell: FACTORS["prefix_mode"].index(cell["prefix_mode"])) + [CONTROL]


def name_of(cell: dict[str, str]) -> str:
    return "/".join(cell.values())


def train(cell: dict[str, str], motion_set: Path, config: Path, folder: Path, shared: dict[str, Any]) -> Path:
    """Train one cell from the beginning; the folder of its logs and its model."""
    from img2vid.training.fit import main as fit

    shutil.rmtree(folder, ignore_errors=True)
    settings = {
        **{f"model.video.{name}": value for name, value in cell.items()},
        **{f"data.{split}_list": motion_set / f"{split}.csv" for split in ("train", "val", "test")},
        "seed_everything": shared["seed"],
        "model.seed": shared["seed"],
        "data.seed": shared["seed"],
        "trainer.default_root_dir": folder,
        "trainer.max_steps": shared["steps"],
        "trainer.val_check_interval": shared["every"],
        "trainer.num_sanity_val_steps": 0,
        "data.eval_batch_size": shared["videos"],
        "trainer.limit_val_batches": 1,
        "trainer.callbacks": "[]",
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
    }
    arguments = ["fit", "--config", str(config), *(f"--{name}={value}" for name, value in settings.items())]
    if fit(arguments):
        raise SystemExit(f"{name_of(cell)}: training failed; see above. Finished cells are kept.")
    return folder / "version_0"


def logged(metrics: Path) -> dict[str, Any]:
    """From the CSV log, by the number of steps taken: validation accuracy, training loss, and the branches.

    ``branch`` is the norm of what a temporal branch adds over that of the stream, the mean over blocks.
    """
    with metrics.open(newline="") as file:
        rows = [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]

    def by_step(*starts: str) -> dict[int, float]:
        found = {}
        for row in rows:
            values = [value for name, value in row.items() if name.startswith(starts)]
            if values:
                found[int(row["step"]) + 1] = sum(values) / len(values)
        return found

    curves = {"validation": "val/accuracy", "loss": "train/classification_loss", "branch": "branch/"}
    return {name: by_step(start) for name, start in curves.items()}


def run_cell(cell: dict[str, str], motion_set: Path, config: Path, out: Path, shared: dict[str, Any]) -> dict[str, Any]:
    began = time.process_time()
    logs = train(cell, motion_set, config, out / "training", shared)
    seconds = time.process_time() - began
    curves = logged(logs / "metrics.csv")
    model = img2vid.load(logs / "model")
    clips = read_test_clips(motion_set, model.config.num_frames, model.visual.tower.image_size[0])
    clips = [part[: shared["videos"]] for part in clips]  # scene by scene, so all classes are there equally often
    before = img2vid.convert(model.config.backbone, num_frames=model.config.num_frames, **cell)
    found = {
        "cell": cell,
        "settings": shared,
        START: measure(before, *clips),
        "at the end": measure(model, *clips),
        "steps_to_half": min((step for step, share in curves["validation"].items() if share >= WANTED), default=None),
        **curves,
        "cpu_seconds": round(seconds, 1),
    }
    shutil.rmtree(out / "training")
    return found


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def finished(path: Path, shared: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    changed = [name for name in shared if found["settings"].get(name) != shared[name]]
    if changed:
        raise SystemExit(f"{path} was made with other {', '.join(changed)}. Choose another --out, or delete it.")
    return found


def last(curve: dict[Any, float], count: int = 3) -> float:
    """Mean of the last values of a curve: a loss is that of one batch."""
    values = list(curve.values())[-count:]
    return sum(values) / len(values)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown, one row per cell, in the order of the factors."""
    columns = ["temporal_init", "gate", "prefix_mode", "motion, digit at step 0", "steps to 50 %"]
    columns += ["motion", "digit", "still", "backwards", "shuffled", "loss", "branch / stream"]
    lines = [columns, ["---"] * len(columns)]
    for found in results:
        start, end, cell = found[START], found["at the end"], found["cell"]
        label = list(cell.values()) if cell != CONTROL else ["space_only", "", ""]
        lines.append(
            [
                *label,
                f"{start['motion']:.1%}, {start['digit']:.1%}",
                str(found["steps_to_half"] or "not reached"),
                *(f"{end[key]:.1%}" for key in ("motion", "digit", "still", "opposite", "shuffled")),
                *(f"{last(found[key]):.2f}" if found[key] else "-" for key in ("loss", "branch")),
            ]
        )
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.ablation", description=__doc__.split("\n")[0])
    parser.add_argument("motion_set", type=Path, help="folder written by img2vid data synth")
    parser.add_argument("--steps", type=at_least_one, default=250, help="training steps per cell (default: 250)")
    parser.add_argument("--every", type=at_least_one, default=50, help="steps between validations (default: 50)")
    parser.add_argument("--videos", type=at_least_one, default=200, help="validated and tested on (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, default=CONFIG, help="training settings (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="default: runs/ablation")
    parser.add_argument("--only", default="", metavar="NAME", help="cells whose name contains this, as in copy/tanh")
    options = parser.parse_args(argv)
    chosen = [cell for cell in cells() if options.only in name_of(cell)]
    if not chosen:
        parser.error(f"--only {options.only}: no such cell. There are: {', '.join(map(name_of, cells()))}")
    if not (options.motion_set / "test.csv").exists():
        parser.error(f"{options.motion_set} holds no test.csv. Make the set first: img2vid data synth")
    shared = {name: getattr(options, name) for name in ("steps", "every", "videos", "seed")}
    shared["config"] = yaml.safe_load(options.config.read_text())
    results = []
    for cell in chosen:
        path = options.out / "cells" / (name_of(cell).replace("/", "-") + ".json")
        found = finished(path, shared)
        if found is None:
            found = run_cell(cell, options.motion_set, options.config, options.out, shared)
            write(path, json.dumps(found, indent=2) + "\n")
        results.append(found)
        write(options.out / "ablation.json", json.dumps(results, indent=2) + "\n")
        write(options.out / "ablation.md", table(results))
        end = found["at the end"]
        print(name_of(cell), f"motion {end['motion']:.1%}  digit {end['digit']:.1%}", sep="  ", flush=True)
    print(f"Wrote {options.out / 'ablation.md'} and ablation.json beside it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
