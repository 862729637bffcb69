"""An image model learns which way things move: the steps of `img2vid demo`, in order.

    picture model -> converted, with proof -> before -> training -> after -> pictures and a page

Everything is done by the commands' own functions, and every number is measured on the way. What is left in the folder
can be gone on with: the models, the videos, the recipe (train.yaml), the results (*.json).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from img2vid.command import Progress, progress_bar
from img2vid.data.digits import DIGIT_WORDS
from img2vid.data.lists import read_list
from img2vid.data.manifest import VideoList, write_manifest
from img2vid.data.synthetic import CLASS_NAMES, MOTIONS, MotionSettings, make_motion_set
from img2vid.errors import Img2VidError
from img2vid.evaluation.features import Compute, extract
from img2vid.evaluation.honesty import honesty
from img2vid.evaluation.protocols import Lists, gather_lists
from img2vid.evaluation.reading import Views
from img2vid.evaluation.results import write_result
from img2vid.evaluation.store import write_whole
from img2vid.evaluation.zero_shot import zero_shot
from img2vid.two_towers import VideoTextModel

RECIPE = Path(__file__).with_name("recipe.yaml")  # configs/train/nano_motion.yaml
OPPOSITE = {a: b for pair in MOTIONS for a, b in (pair, pair[::-1])}
MARK = "demo.json"  # written last, so a folder that has it is a finished demo


class DemoError(Img2VidError):
    """The demo cannot begin, or one of its steps failed."""


@dataclass(frozen=True)
class Size:
    """How much of everything: videos of each split, training steps, how many of them between two validations, and steps
    in which the text tower learns the words first."""

    train: int
    val: int
    test: int
    steps: int
    look_every: int
    words: int


FULL = Size(train=4000, val=160, test=400, steps=700, look_every=100, words=400)
QUICK = Size(train=96, val=16, test=48, steps=12, look_every=6, words=20)


def tell(folder: Path, size: Size, seed: int = 0) -> dict[str, Any]:
    """Run the demo into ``folder``, which must not exist or be empty; returns the facts that are in its demo.json."""
    check_installed()
    from img2vid.demo import page  # imports matplotlib

    begin(folder)
    progress = Progress()
    facts: dict[str, Any] = {"size": asdict(size), "seed": seed}

    progress.say("1/6  The image model: nano_clip, which comes with the package")
    facts["pictures"] = name_pictures(seed)
    progress.say(f"     names {facts['pictures']['accuracy']:.1%} of {facts['pictures']['number']} held-out digits")

    progress.say("2/6  Converting it into a video model")
    model, facts["certificate"] = make_video_model(folder / "converted", progress)

    progress.say("3/6  Writing digits that move, as video files")
    motion_set = write_videos(folder / "motion", size, seed)
    progress.say(f"     {size.train} + {size.val} + {size.test} videos in {motion_set}")

    progress.say("4/6  Asking the converted model what moves, and which way")
    facts["before"] = measure(model, motion_set, folder / "before")
    progress.say(f"     {sentence(facts['before'])}; bit for bit the mean of its frames: {facts['before']['is_mean']}")

    progress.say(f"5/6  Continued pretraining on the videos, {size.steps} steps")
    trained, facts["log"] = train(folder, motion_set, size, seed)

    progress.say("6/6  Asking again")
    facts["after"] = measure(trained, motion_set, folder / "after")
    progress.say(f"     {sentence(facts['after'])}")
    facts["seconds"] = progress.seconds

    page.write(folder, facts, model, trained, questions(motion_set)[0].videos)
    write_whole(folder / MARK, (json.dumps(facts, indent=1) + "\n").encode())
    progress.say(f"Wrote {folder}: open {folder / 'report.html'}; the trained model is {folder / 'trained'}")
    return facts


def check_installed() -> None:
    """Say before anything is written, not in the middle, what the demo lacks."""
    packages = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "lightning": "lightning"}
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    if missing:
        raise DemoError(f"The demo needs {', '.join(missing)}. Run: pip install 'img2vid[demo]'")


def begin(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DemoError(f"{folder} exists and is not an empty folder. Remove it, or choose another: --out FOLDER.")
    folder.mkdir(parents=True, exist_ok=True)


def name_pictures(seed: int) -> dict[str, Any]:
    """Zero-shot accuracy of the image model on digits it has not seen, drawn at random on textured backgrounds."""
    import numpy as np

    from img2vid.backbones.nano_clip import classify_digits, load_nano_clip
    from img2vid.data.digits import draw, load_digits, random_background, random_style

    digits, labels = load_digits("test")
    rng = np.random.default_rng(seed)
    background = random_background(rng, len(digits), 32)
    pictures = draw(digits, background=background, **random_style(rng, background))
    right = classify_digits(load_nano_clip(), pictures) == torch.from_numpy(labels)
    return {"accuracy": right.float().mean().item(), "number": len(right)}


def make_video_model(folder: Path, progress: Progress) -> tuple[VideoTextModel, dict[str, Any]]:
    """nano_clip, converted as the recipe says, and the proof that nothing has changed yet."""
    from img2vid.certificate import certify
    from img2vid.checkpoints.native import load_reference, save
    from img2vid.convert import convert
    from img2vid.reporting import certificate_table

    video = yaml.safe_load(RECIPE.read_text())["model"]["video"]
    model = convert(**video)
    certificate = certify(model, load_reference(model), at_step_0=True)
    progress.console.print(certificate_table(certificate))
    save(model, folder, certificate)
    if not certificate.ok:
        raise DemoError(f"The certificate failed; {folder} has its details.")
    differences = [max(c.feature_difference, c.frame_difference) for c in certificate.comparisons]
    return model, {"largest_difference": max(differences), "text": str(certificate)}


def write_videos(folder: Path, size: Size, seed: int) -> Path:
    """The motion set; beside it ``digits.csv``, the test videos labelled by digit, and ``captions.txt``, templates."""
    settings = MotionSettings(size.train, size.val, size.test, size=32, num_frames=12, seed=seed)
    with progress_bar("videos", size.train + size.val + size.test) as advance:
        make_motion_set(folder, settings, lambda: advance(1))
    rows = read_list(folder / "test.csv").rows
    digits = [replace(row, label=row.captions[0].split()[2], path=os.path.relpath(row.path, folder)) for row in rows]
    write_manifest(digits, folder / "digits.csv")
    write_whole(folder / "captions.txt", "".join(f"the digit {word} {{}}\n" for word in DIGIT_WORDS).encode())
    return folder


def questions(motion_set: Path) -> tuple[Lists, Lists]:
    """The test videos twice: which motion is it, and which digit?"""
    motions = gather_lists([motion_set / "test.csv"], "list", classes=list(CLASS_NAMES))
    return motions, gather_lists([motion_set / "digits.csv"], "list", classes=list(DIGIT_WORDS))


def measure(model: VideoTextModel, motion_set: Path, name: Path) -> dict[str, Any]:
    """Zero-shot motion under every order of frames, and zero-shot digits; in NAME-motion.json and NAME-digits.json."""
    motions, digits = questions(motion_set)
    views, how = Views(model.config.num_frames), {"compute": Compute(64), "cache": name.parent / "features"}
    with progress_bar("videos", 2 * len(motions.videos)) as advance:
        how["on_progress"] = advance
        panel = honesty(model, motions, views, templates=motion_set / "captions.txt", **how)
        named = zero_shot(model, digits, views, templates="nano_clip", keep_predictions=True, **how)
    write_result(panel, name.with_name(f"{name.name}-motion.json"))
    write_result(named, name.with_name(f"{name.name}-digits.json"))
    return {
        "motion": panel["metrics"]["model"]["top1"],
        "shuffled": panel["metrics"]["shuffled"]["top1"],
        "static": panel["metrics"]["static"]["top1"],
        "backwards": taken_for_the_opposite(panel),
        "digits": named["metrics"]["model"]["summary"]["top1"],
        "is_mean": is_frame_mean(model, motions.videos, views, how["cache"]),
    }


def taken_for_the_opposite(panel: dict[str, Any]) -> float:
    """Share of the videos that, shown backwards, are taken for the opposite motion."""
    counts, names = panel["confusion"]["reversed"], panel["data"]["classes"]
    flipped = sum(counts[i][names.index(OPPOSITE[name])] for i, name in enumerate(names))
    return flipped / sum(map(sum, counts))


def is_frame_mean(model: VideoTextModel, videos: VideoList, views: Views, cache: Path) -> bool:
    """Whether the features are those of the frame mean, to the last bit. They are in the cache already."""
    found = extract(model, videos, views, ["model", "frame_mean"], cache=cache, compute=Compute(64)).of
    return torch.equal(found["model"], found["frame_mean"])


def train(folder: Path, motion_set: Path, size: Size, seed: int) -> tuple[VideoTextModel, str]:
    """Continue pretraining as `img2vid train --config FOLDER/train.yaml` would; the model, and the log's path."""
    try:
        from img2vid.training.fit import main as fit
    except ModuleNotFoundError as error:
        raise DemoError(f"Training needs {error.name}: pip install 'img2vid[train]'.") from error
    from img2vid.checkpoints.native import load

    config = yaml.safe_load(RECIPE.read_text())
    config["seed_everything"] = seed
    config["model"]["save_to"] = str(folder / "trained")
    config["model"]["objective"]["init_args"]["objectives"]["captions"]["init_args"]["spread_steps"] = size.words
    config["model"]["how"]["warmup"] = min(config["model"]["how"]["warmup"], size.steps // 4)
    config["data"] |= {f"{split}_list": str(motion_set / f"{split}.csv") for split in ("train", "val", "test")}
    config["trainer"] |= {
        "default_root_dir": str(folder / "training"),
        "max_steps": size.steps,
        "val_check_interval": size.look_every,
        "log_every_n_steps": max(1, size.steps // 50),
        "callbacks": [],
    }
    write_whole(folder / "train.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    if fit(["fit", "--config", str(folder / "train.yaml")]) != 0:
        raise DemoError(f"Training failed; to see it again: img2vid train --config {folder / 'train.yaml'}")
    (log,) = (folder / "training").glob("version_*/metrics.csv")
    return load(folder / "trained"), str(log)


def sentence(found: dict[str, Any]) -> str:
    return (
        f"motion {found['motion']['value']:.1%} (chance {1 / len(CLASS_NAMES):.1%}), shown backwards the opposite "
        f"{found['backwards']:.1%}, digits {found['digits']['value']:.1%}"
    )
