"""One trial of a comparison: a real training, shortened, and what came of it. A finished one is not run again.

`benchmarks.ablation` and `benchmarks.recipes` say which trials there are and draw their tables.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import img2vid
from benchmarks.motion import input_size, measure, read_clips

CONFIG = Path(__file__).resolve().parent.parent / "configs/train/nano_motion.yaml"
START, END, WANTED = "at step 0", "at the end", 0.5  # steps until this share of the validation videos is right

read_test_clips = cache(read_clips)


def train(
    name: str, configs: Sequence[Path], settings: Mapping[str, Any], motion_set: Path, folder: Path, shared: dict
) -> Path:
    """Train from the beginning with ``configs`` and ``settings`` on top; the folder of the logs and the model."""
    from img2vid.training.fit import main as fit

    shutil.rmtree(folder, ignore_errors=True)
    settings = {
        **settings,
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
    arguments = ["fit", *(f"--config={path}" for path in configs)]
    if fit([*arguments, *(f"--{key}={value}" for key, value in settings.items())]):
        raise SystemExit(f"{name}: training failed; see above. Finished trials are kept.")
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


def run(
    name: str, configs: Sequence[Path], settings: Mapping[str, Any], motion_set: Path, out: Path, shared: dict
) -> dict[str, Any]:
    """Train, and measure on the test split before and after."""
    began = time.process_time()
    logs = train(name, configs, settings, motion_set, out / "training", shared)
    seconds = time.process_time() - began
    curves = logged(logs / "metrics.csv")
    model = img2vid.load(logs / "model")
    clips = read_test_clips(motion_set, model.config.num_frames, input_size(model))
    clips = [part[: shared["videos"]] for part in clips]  # scene by scene, so all classes are there equally often
    before = img2vid.convert(**{**model.config.to_dict(), "num_classes": None})  # zero-shot, also of what is probed
    found = {
        "name": name,
        "settings": shared,
        START: measure(before, *clips),
        END: measure(model, *clips),
        "steps_to_half": min((step for step, share in curves["validation"].items() if share >= WANTED), default=None),
        **curves,
        "cpu_seconds": round(seconds, 1),
    }
    shutil.rmtree(out / "training")
    return found


def run_all(
    trials: Mapping[str, tuple[Sequence[Path], Mapping[str, Any]]], options: argparse.Namespace, shared: dict[str, Any]
) -> Iterator[list[dict[str, Any]]]:
    """Every trial, by name its configurations and settings, unless it is finished already; after each, all results."""
    results = []
    for name, (configs, settings) in trials.items():
        path = options.out / "trials" / (name.replace("/", "-") + ".json")
        asked = shared | {"configs": [yaml.safe_load(config.read_text()) for config in configs]}
        found = finished(path, asked)
        if found is None:
            found = run(name, configs, settings, options.motion_set, options.out, asked)
            write(path, json.dumps(found, indent=2) + "\n")
        results.append(found)
        print(name, *(f"{key} {value:.1%}" for key, value in found[END].items()), sep="  ", flush=True)
        yield results


def finished(path: Path, shared: dict[str, Any]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    changed = [name for name in shared if found["settings"].get(name) != shared[name]]
    if changed:
        raise SystemExit(f"{path} was made with other {', '.join(changed)}. Choose another --out, or delete it.")
    return found


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def last(curve: dict[Any, float], count: int = 3) -> float:
    """Mean of the last values of a curve: a loss is that of one batch."""
    values = list(curve.values())[-count:]
    return sum(values) / len(values)


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    first, *others = lines
    return "".join("| " + " | ".join(line) + " |\n" for line in [first, ["---"] * len(first), *others])


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def parser(module: str, doc: str, out: str, example: str) -> argparse.ArgumentParser:
    """What all comparisons ask for."""
    parser = argparse.ArgumentParser(f"python -m benchmarks.{module}", description=doc.split("\n")[0])
    parser.add_argument("motion_set", type=Path, help="folder written by img2vid data synth")
    parser.add_argument("--steps", type=at_least_one, default=300, help="training steps per trial (default: 300)")
    parser.add_argument("--every", type=at_least_one, default=50, help="steps between validations (default: 50)")
    parser.add_argument("--videos", type=at_least_one, default=200, help="validated and tested on (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, default=CONFIG, help="training settings (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(out), help="default: %(default)s")
    parser.add_argument("--only", default="", metavar="NAME", help=f"trials whose name contains this, as in {example}")
    return parser


def read(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, names: Sequence[str]
) -> tuple[argparse.Namespace, list[str], dict[str, Any]]:
    """Options, the chosen trials, and the settings that all of them share."""
    options = parser.parse_args(argv)
    chosen = [name for name in names if options.only in name]
    if not chosen:
        parser.error(f"--only {options.only}: no such trial. There are: {', '.join(names)}")
    if not (options.motion_set / "test.csv").exists():
        parser.error(f"{options.motion_set} holds no test.csv. Make the set first: img2vid data synth")
    return options, chosen, {name: getattr(options, name) for name in ("steps", "every", "videos", "seed")}
