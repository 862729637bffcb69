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


def page(results: dict[str, Any]) -> str:
    machine = results["machine"]
    lines = [
        f"{machine['processor']}, {results['threads']} threads, {', '.join(machine['versions'])}. Medians of rounds in "
        "which all take turns, lowest and highest round in brackets. T is frames of 224 x 224 pixels, one clip at a "
        "time" + (" of 8" if results["device"] == "cuda" else "") + ".",
        *(["", "**A quick run: sizes too small, numbers without meaning.**"] if results["quick"] else []),
    ]
    left_out: dict[str, str] = {}
    for name, title in TITLES.items():
        cases = results["groups"].get(name)
        if not cases:
            continue
        lines += ["", f"### {title}", "", *table(cases)]
        for case in cases:
            left_out |= case.get("left_out", {})
    if left_out:
        lines += ["", "Left out:", "", *(f"- {name}: {why}" for name, why in sorted(left_out.items()))]
    return "\n".join(lines) + "\n"


def write(results: dict[str, Any], path: Path) -> None:
    """Exchange what stands between the marks.

    Raises:
        SystemExit: they are not there.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"error: {path} must hold these lines, once each:\n{BEGIN}\n{END}")
    before, rest = text.split(BEGIN)
    text = f"{before}{BEGIN}\n\n{page(results)}\n{END}{rest.split(END)[1]}"
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
