"""``img2vid stream``: a causal model watches a video or a camera, and says after each frame what it sees."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

from img2vid.config import ConfigError


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2vid stream",
        description="Running scores of a video or a camera, one frame at a time. The model must be causal "
        "(img2vid convert --causal).",
        epilog="example: img2vid stream runs/convert/clip_b16 0 --classes 'waving' 'clapping' 'nobody there'",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a folder written by img2vid.convert or save_pretrained")
    parser.add_argument("video", metavar="VIDEO", help="a video file, a folder of frames, or a camera's number")
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="what to score, for a model with text: names, or one text file with a name a line, or kinetics400, ...; "
        "for one with a classifier: the names of its classes",
    )
    parser.add_argument("--templates", default="action", help="name of a set of texts, or a file (default: action)")
    parser.add_argument(
        "--target-fps", type=float, default=2.0, metavar="N", help="frames a second that it sees (default: 2)"
    )
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument(
        "--window",
        type=int,
        metavar="STEPS",
        help="frames (or tubelets) that a frame sees and scores are the mean of (default: the model's number)",
    )
    memory.add_argument("--no-window", action="store_true", help="all frames since the beginning; memory grows")
    parser.add_argument("--max-frames", type=int, metavar="N", help="stop after so many frames")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="classes to print (default: 3)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--fuse", action="store_true", help="fold the gates first: faster, the same up to rounding")
    parser.add_argument("--conceal", action="store_true", help="go on where packets are damaged")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def main(argv: Sequence[str]) -> int:
    options = make_parser().parse_args(argv)
    for name in ("max_frames", "top"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least 1.")
    if not 0.0 < options.target_fps <= 1000.0:
        raise ConfigError(f"--target-fps {options.target_fps}: expected frames per second, above 0.")
    return watch_and_say(options)


def watch_and_say(options: argparse.Namespace) -> int:
    import numpy as np
    import torch

    from img2vid.checkpoints.native import load
    from img2vid.data.live import watch
    from img2vid.data.transforms import TestTransform
    from img2vid.evaluation.reading import input_spec
    from img2vid.evaluation.results import device_of

    model = load(options.model)
    model = (model.fuse() if options.fuse else model).to(device_of(options.device, 0))
    weight, size = next(model.parameters()), model.config.tubelet_size
    window = model.config.num_steps if options.window is None else options.window
    stream = model.stream(None if options.no_window else window)
    names, score = scorer(model, options)
    fit = TestTransform(input_spec(model))
    frames = watch(options.video, options.target_fps, "conceal" if options.conceal else "raise")
    waiting = []
    for seen, (seconds, frame) in enumerate(frames, start=1):
        began = time.perf_counter()
        waiting.append(fit(torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None])[0])  # (1, C, H, W)
        if len(waiting) == size:
            pixels = torch.stack(waiting, dim=1).to(weight.device)  # (1, K, C, H, W)
            now = stream(model.normalize(pixels).to(weight.dtype))
            shares = score(now)[0, -1]  # (classes,)
            say(options, seconds, seen, names, shares.tolist(), time.perf_counter() - began)
            waiting = []
        if seen == options.max_frames:
            break
    if not stream.num_frames:
        raise ConfigError(f"{options.video} has fewer frames at --target-fps {options.target_fps} than one tubelet.")
    return 0


def scorer(model: Any, options: argparse.Namespace) -> tuple[list[str], Any]:
    """Names of the classes, and what makes their probabilities (B, T, classes) of a moment."""
    from torch.nn import functional as F

    from img2vid.evaluation.prompts import check_distinct, class_embeddings, class_list, read_templates
    from img2vid.evaluation.scores import TextHead
    from img2vid.two_towers import VideoTextModel

    given = options.classes or []
    names = class_list(given[0]) if len(given) == 1 else list(given)
    if isinstance(model, VideoTextModel):
        if not names:
            raise ConfigError("Say what to score: --classes 'waving' 'clapping', or a text file with one name a line.")
        if len(set(names)) < len(names):
            raise ConfigError(f"--classes names {next(n for n in names if names.count(n) > 1)!r} twice.")
        check_distinct(names)
        head = TextHead.of(model, class_embeddings(model, names, read_templates(options.templates)[0]))
        return names, lambda now: head.logits(F.normalize(now.clip.float().cpu(), dim=-1)).softmax(dim=-1)
    own = model.num_logits
    if own is None:
        raise ConfigError(
            "This model has neither a text tower nor a classifier, so there is nothing to score. Convert an open_clip "
            "backbone with --causal, or train one with num_classes."
        )
    if names and len(names) != own:
        raise ConfigError(f"{len(names)} classes were named, but this model's classifier has {own}.")
    names = names or list(model.class_names or (f"class {i}" for i in range(own)))
    return names, lambda now: (now.clip if now.logits is None else now.logits).float().cpu().softmax(dim=-1)


def say(
    options: argparse.Namespace, seconds: float | None, seen: int, names: list[str], shares: list[float], took: float
) -> None:
    ranked = sorted(zip(shares, names, strict=True), key=lambda pair: -pair[0])[: options.top]
    if options.json:
        scores = {name: round(share, 6) for share, name in ranked}
        print(json.dumps({"seconds": seconds, "frame": seen, "took": round(took, 4), "scores": scores}), flush=True)
        return
    at = f"frame {seen:>6}" if seconds is None else f"{seconds:8.2f} s"
    print(at, *(f"{name} {share:.1%}" for share, name in ranked), sep="  ", flush=True)
