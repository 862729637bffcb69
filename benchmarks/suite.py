"""What is measured: named groups of cases, each case one or more subjects that take turns.

A case is a dict: what was measured (size, num_frames, precision), seconds of each subject as [median, lowest, highest],
ratios likewise, and who was left out and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import memory
from benchmarks.subjects import Missing, inference, training_step
from benchmarks.timing import ratio, spread, take_turns

Case = dict[str, Any]
INFERENCE = (
    *("img2vid", "img2vid shared", "img2vid fused", "transformers", "timesformer-pytorch", "image model"),
    *("limit", "limit folded", "limit image"),
)
TRAIN = (
    "img2vid",
    "img2vid checkpointed",
    "img2vid temporal only",
    "img2vid last 4 only",
    "transformers",
    "image model",
)
TRAIN += ("limit", "limit folded")
MAIN = ("img2vid", "img2vid fused", "transformers", "limit", "limit folded")  # at other numbers of frames
LONG = ("img2vid", "transformers", "limit")
# (which, over which): what the aims are about
PAIRS = (
    *(
        ("img2vid", "limit"),
        ("img2vid shared", "limit"),
        ("img2vid", "limit folded"),
        ("img2vid fused", "limit folded"),
    ),
    *(("img2vid", "transformers"), ("img2vid shared", "transformers"), ("img2vid fused", "transformers")),
    *(("img2vid", "timesformer-pytorch"), ("img2vid", "image model"), ("image model", "limit image")),
    *(("img2vid checkpointed", "img2vid"), ("img2vid checkpointed", "transformers")),
    *(("img2vid temporal only", "img2vid"), ("img2vid last 4 only", "img2vid")),
    ("img2vid temporal only, trunk twice", "img2vid"),
    *(("transformers", "limit"), ("transformers checkpointed", "transformers")),
)


@dataclass(frozen=True)
class Plan:
    """How much of it.

    Args:
        quick: small enough for trying the suite out: one size, two lengths, one round. Its numbers mean nothing.
    """

    device: str = "cpu"
    threads: int = 2
    quick: bool = False

    @property
    def batch(self) -> int:
        return 8 if self.device == "cuda" else 1

    def rounds(self, wanted: int) -> int:
        return 1 if self.quick else wanted

    def lengths(self, *wanted: int) -> tuple[int, ...]:
        return (2, 4) if self.quick else wanted

    def size(self, wanted: str) -> str:
        return "ViT-S/16" if self.quick else wanted


def compared(plan: Plan, what: Case, makers: dict[str, Callable[[], Callable]], rounds: int) -> Case:
    """Build the subjects that can be built, let them take turns, and note the ratios."""
    runs, left_out = {}, {}
    for name, make in makers.items():
        try:
            runs[name] = make()
        except Missing as error:
            left_out[name] = str(error)
    seconds = take_turns(runs, rounds, plan.device)
    ratios = {f"{of} / {to}": found for of, to in PAIRS if (found := ratio(seconds, of, to))}
    return {
        **what,
        "rounds": rounds,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratios": ratios,
        "left_out": left_out,
    }


def inference_of(plan: Plan, size: str, lengths: dict[int, tuple[tuple[str, ...], int]]) -> Iterator[Case]:
    for num_frames, (names, rounds) in lengths.items():
        makers = {name: partial(inference, name, size, num_frames, plan.device, batch=plan.batch) for name in names}
        what = {"size": size, "num_frames": num_frames, "precision": "float32"}
        yield compared(plan, what, makers, plan.rounds(rounds))


def small_inference(plan: Plan) -> Iterator[Case]:
    main, *others = plan.lengths(8, 4, 16, 32)
    yield from inference_of(plan, "ViT-S/16", {main: (INFERENCE, 3)} | {t: (MAIN, 2) for t in others})


def base_inference(plan: Plan) -> Iterator[Case]:
    main, *others = plan.lengths(8, 4, 16, 32)
    lengths = {main: (INFERENCE, 4)} | {t: (LONG if t > 8 else MAIN, 2) for t in others}
    yield from inference_of(plan, plan.size("ViT-B/16"), lengths)


def bf16(plan: Plan) -> Iterator[Case]:
    """Weights and clips in bfloat16, beside transformers' float32."""
    size, num_frames = plan.size("ViT-B/16"), plan.lengths(8)[0]
    names = ("img2vid", "img2vid shared", "img2vid fused", "transformers", "limit", "limit folded", "image model")
    make = partial(inference, size=size, num_frames=num_frames, device=plan.device, batch=plan.batch)
    makers = {name: partial(make, name, dtype=torch.bfloat16) for name in names}
    makers["transformers float32"] = partial(make, "transformers")
    case = compared(plan, {"size": size, "num_frames": num_frames, "precision": "bfloat16"}, makers, plan.rounds(3))
    for name in ("img2vid", "img2vid fused"):
        of, to = case["seconds"].get("transformers float32"), case["seconds"].get(name)
        if of and to:
            case["ratios"][f"transformers float32 / {name}"] = [of[0] / to[0], of[1] / to[2], of[2] / to[1]]
    yield case


def training_of(
    plan: Plan, size: str, num_frames: int, names: tuple[str, ...], rounds: int, in_bf16: bool = False
) -> Case:
    make = partial(training_step, size=size, num_frames=num_frames, device=plan.device, bf16=in_bf16, batch=plan.batch)
    precision = "bfloat16 autocast" if in_bf16 else "float32"
    what = {"size": size, "num_frames": num_frames, "precision": precision}
    return compared(plan, what, {name: partial(make, name) for name in names}, plan.rounds(rounds))


def small_training(plan: Plan) -> Iterator[Case]:
    main, *others = plan.lengths(8, 4, 16, 32)
    yield training_of(plan, "ViT-S/16", main, (*TRAIN, "img2vid shared", "timesformer-pytorch"), 2)
    for num_frames in others:
        yield training_of(plan, "ViT-S/16", num_frames, LONG, 1)


def base_training(plan: Plan) -> Iterator[Case]:
    size, num_frames = plan.size("ViT-B/16"), plan.lengths(8)[0]
    yield training_of(plan, size, num_frames, (*TRAIN, "img2vid shared"), 2)
    yield training_of(plan, size, num_frames, ("img2vid", "transformers", "limit", "limit folded"), 2, in_bf16=True)


def memory_of(plan: Plan, size: str, num_frames: int, names: tuple[str, ...]) -> Case:
    mebibytes, left_out = {}, {}
    for name in names:
        try:
            mebibytes[name] = round(memory.measure(name, size, num_frames, plan.device, plan.threads)["step"], 1)
        except (Missing, RuntimeError) as error:
            left_out[name] = str(error)
    once = {name: [value] for name, value in mebibytes.items()}
    return {
        **{"size": size, "num_frames": num_frames, "precision": "float32", "mebibytes": mebibytes},
        "ratios": {f"{of} / {to}": found for of, to in PAIRS if (found := ratio(once, of, to))},
        "left_out": left_out,
    }


def training_memory(plan: Plan) -> Iterator[Case]:
    if plan.quick:
        yield memory_of(plan, "ViT-S/16", 2, ("img2vid", "transformers"))
        return
    names = ("img2vid", "img2vid checkpointed", "img2vid temporal only", "img2vid last 4 only", "transformers")
    names += ("img2vid temporal only, trunk twice",)
    yield memory_of(plan, "ViT-B/16", 8, names)
    yield memory_of(plan, "ViT-S/16", 8, ("img2vid", "transformers"))
    yield memory_of(plan, "ViT-B/16", 16, ("img2vid", "transformers"))


def frame_count(plan: Plan) -> Iterator[Case]:
    """Four times as many frames: what that costs."""
    few, many = plan.lengths(8, 32)
    runs = {f"{t} frames": inference("img2vid", "ViT-S/16", t, plan.device, batch=plan.batch) for t in (few, many)}
    seconds = take_turns(runs, plan.rounds(3), plan.device)
    name = f"{many} frames / {few} frames"
    found = ratio(seconds, f"{many} frames", f"{few} frames")
    yield {
        **{"size": "ViT-S/16", "num_frames": many, "precision": "float32", "rounds": plan.rounds(3)},
        **{"seconds": {key: spread(values) for key, values in seconds.items()}, "ratios": {name: found}},
    }


@torch.no_grad()
def streaming(plan: Plan) -> Iterator[Case]:
    """One frame of a stream with a window of 8 that has seen 8 and more, against the image model on one frame."""
    import img2vid
    from benchmarks.subjects import image_model, opened

    for size, steps in ((plan.size("ViT-B/16"), 30), ("ViT-S/16", 90))[: 1 if plan.quick else None]:
        steps = 6 if plan.quick else steps
        image = image_model(size).eval().to(plan.device)
        model = opened(img2vid.convert(image_model(size), num_frames=8, causal=True)).eval().to(plan.device).fuse()
        frame = torch.randn(plan.batch, 3, 224, 224, device=plan.device)
        stream = model.stream(window=8)
        for _ in range(2 if plan.quick else 8):
            stream(frame)
        seconds = take_turns({"stream": lambda: stream(frame), "image": lambda: image(frame)}, steps, plan.device)  # noqa: B023
        third = len(seconds["stream"]) // 3
        early, late = (
            {name: values[part] for name, values in seconds.items()} for part in (slice(third), slice(-third, None))
        )
        yield {
            **{"size": size, "num_frames": 1, "precision": "float32", "rounds": steps},
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "ratios": {
                "stream, a frame / image model, a frame": ratio(seconds, "stream", "image"),
                f"frames {8 + 2 * third} to {8 + steps} / frames 8 to {8 + third}, each over the image model's": [
                    ratio(late, "stream", "image")[0] / ratio(early, "stream", "image")[0]
                ],
            },
        }


def data(plan: Plan) -> Iterator[Case]:
    """Reading a clip as a share of the training step it is for."""
    from benchmarks.share import shares

    yield from shares(plan)


def conversion(plan: Plan) -> Iterator[Case]:
    """Time and memory of converting, over building the image model alone."""
    from benchmarks import convert

    yield from convert.cases("vit_small" if plan.quick else "vit_base", plan.rounds(3))


GROUPS: dict[str, Callable[[Plan], Iterator[Case]]] = {
    "inference-b16": base_inference,
    "training-b16": base_training,
    "memory": training_memory,
    "streaming": streaming,
    "bf16": bf16,
    "frame-count": frame_count,
    "inference-s16": small_inference,
    "training-s16": small_training,
    "data": data,
    "conversion": conversion,
}
