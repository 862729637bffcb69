"""Results as tables, between two marks of a Markdown page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BEGIN, END = "<!-- benchmarks: begin (python -m benchmarks --write) -->", "<!-- benchmarks: end -->"

TITLES = {
    "inference-b16": "Inference, ViT-B/16",
    "inference-s16": "Inference, ViT-S/16",
    "training-b16": "Training step, ViT-B/16",
    "training-s16": "Training step, ViT-S/16",
    "memory": "Memory a training step adds to the weights",
    "bf16": "Inference in bfloat16",
    "streaming": "Streaming",
    "frame-count": "Frame count",
    "data": "Reading, as a share of the training step",
    "conversion": "Converting against building",
}


# what, ratio, its group, where it is measured (size, T, precision), at most or at least
BASE = ("ViT-B/16", 8, "float32")
AIMS = (
    ("inference, over the limit", "img2vid / limit", "inference-b16", BASE, "<=", 1.08),
    ("inference, folded", "img2vid fused / limit folded", "inference-b16", BASE, "<=", 1.08),
    ("inference", "img2vid / transformers", "inference-b16", BASE, "<=", 1.0),
    ("inference, folded (1.12 times as fast)", "img2vid fused / transformers", "inference-b16", BASE, "<=", 1 / 1.12),
    ("bfloat16", "transformers float32 / img2vid", "bf16", ("ViT-B/16", 8, "bfloat16"), ">=", 3.0),
    ("bfloat16 (1.1 times)", "img2vid / transformers", "bf16", ("ViT-B/16", 8, "bfloat16"), "<=", 1 / 1.1),
    ("training step", "img2vid / transformers", "training-b16", BASE, "<=", 1.0),
    ("its memory", "img2vid / transformers", "memory", BASE, "<=", 0.85),
    ("checkpointed, memory", "img2vid checkpointed / transformers", "memory", BASE, "<=", 0.4),
    ("temporal only, time", "img2vid temporal only / img2vid", "training-b16", BASE, "<=", 0.6),
    ("temporal only, memory", "img2vid temporal only / img2vid", "memory", BASE, "<=", 0.5),
    (
        "temporal only, trunk run twice, memory",
        "img2vid temporal only, trunk twice / img2vid",
        "memory",
        BASE,
        "<=",
        0.5,
    ),
    ("temporal only, last 4 blocks, time", "img2vid last 4 only / img2vid", "training-b16", BASE, "<=", 0.6),
    ("temporal only, last 4 blocks, memory", "img2vid last 4 only / img2vid", "memory", BASE, "<=", 0.5),
    (
        *("streaming", "stream, a frame / image model, a frame", "streaming"),
        *(("ViT-B/16", 1, "float32"), "<=", 1.35),
    ),
    ("four times the frames", "32 frames / 8 frames", "frame-count", ("ViT-S/16", 32, "float32"), "<=", 4.3),
    ("converting, time", "convert / build, time", "conversion", ("vit_base", 8, "float32"), "<=", 1.5),
)


def aims(groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What was aimed at beside what was measured, by the median."""
    lines = ["| aim | ratio | wanted | measured | |", "|---|---|---|---|---|"]
    for what, name, group, where, relation, wanted in AIMS:
        for case in groups.get(group, []):
            found = case["ratios"].get(name)
            if found and (case["size"], case["num_frames"], case["precision"]) == where:
                is_met = found[0] <= wanted if relation == "<=" else found[0] >= wanted
                verdict = "met" if is_met else f"**off by {abs(found[0] / wanted - 1):.0%}**"
                lines.append(f"| {what} | {name} | {relation} {wanted:.3g} | {shown(found)} | {verdict} |")
    return lines if len(lines) > 2 else []


def shown(found: list[float]) -> str:
    middle, *ends = (f"{value:.3g}" if value < 0.1 else f"{value:.2f}" for value in found)
    return f"{middle} ({ends[0]} to {ends[1]})" if ends and ends[0] != ends[1] else middle


def table(cases: list[dict[str, Any]]) -> list[str]:
    """One row a ratio, one column a case."""
    heads = [f"{c['size']}, T={c['num_frames']}, {c['precision']}" for c in cases]
    names = list(dict.fromkeys(name for case in cases for name in case["ratios"]))
    lines = [f"| ratio | {' | '.join(heads)} |", "|---" * (1 + len(cases)) + "|"]
    for name in names:
        cells = [shown(case["ratios"][name]) if name in case["ratios"] else "" for case in cases]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def bound(case: dict[str, Any]) -> str:
    """Which of the two a training run waits for, reading or the step, in a sentence."""
    share = case["ratios"]["img2vid / training step"][0]
    if share <= 1.0:
        return f"- {case['size']}: the step bounds training. One core reads for {1 / share:,.0f} that train."
    return f"- {case['size']}: reading bounds training, unless {share:,.1f} cores read for it."


def page(results: dict[str, Any]) -> str:
    machine = results["machine"]
    lines = [
        f"{machine['processor']}, {results['threads']} threads, {', '.join(machine['versions'])}. Medians of rounds in "
        "which all take turns, lowest and highest round in brackets. T is frames of 224 x 224 pixels, one clip at a "
        "time" + (" of 8" if results["device"] == "cuda" else "") + ".",
        *(["", "**A quick run: sizes too small, numbers without meaning.**"] if results["quick"] else []),
        "",
        *aims(results["groups"]),
    ]
    left_out: dict[str, str] = {}
    for name, title in TITLES.items():
        cases = results["groups"].get(name)
        if not cases:
            continue
        lines += ["", f"### {title}", "", *table(cases)]
        if name == "data":
            lines += ["", *map(bound, cases)]
        for case in cases:
            left_out |= case.get("left_out", {})
    if left_out:
        lines += ["", "Left out:", "", *(f"- {name}: {why}" for name, why in sorted(left_out.items()))]
    return "\n".join(lines) + "\n"


def parts(path: Path) -> tuple[str, str]:
    """What stands before and after the marks.

    Raises:
        SystemExit: there is no such page, or they are not there.
    """
    if not path.is_file():
        raise SystemExit(f"error: there is no page {path} to write tables into")
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"error: {path} must hold these lines, once each:\n{BEGIN}\n{END}")
    before, rest = text.split(BEGIN)
    return before, rest.split(END)[1]


def write(results: dict[str, Any], path: Path) -> None:
    """Exchange what stands between the marks."""
    before, after = parts(path)
    text = f"{before}{BEGIN}\n\n{page(results)}\n{END}{after}"
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
