"""Pictures of result files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.patches import Patch

from img2vid.plots.canvas import INK, LINE, PALE, Figure

LABELS = {
    "model": "as is",
    "shuffled": "shuffled",
    "reversed": "reversed",
    "static": "one frame",
    "half": "half the\nframes",
    "frame_mean": "frame\nmean",
}


def layer_bars(axes, layers: Sequence[dict], key: str, title: str) -> None:
    """One bar for each layer with a branch along time. What is not there is said, not drawn as zero."""
    values = [layer[key] for layer in layers]
    known = [(i, value) for i, value in enumerate(values) if value is not None]
    axes.bar([i for i, _ in known], [value for _, value in known], color=INK, width=0.7)
    note = None
    if not layers:
        note = "no layer attends along time behind a gate"
    elif not known:
        note = "no gates"
    elif not any(value for _, value in known):
        note = "zero in every layer"
    if note is not None:
        axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center", color=LINE)
        axes.set_yticks([0])
    axes.set_ylim(bottom=0, top=1 if note else None)
    axes.set_xlim(-0.6, max(len(layers), 1) - 0.4)
    axes.set_xticks(range(len(layers)))
    axes.set_xlabel("layer", fontsize=8)
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def figure_of(result: dict) -> Figure | None:
    """The picture that belongs to a result; None where a table says all."""
    if result["task"] == "honesty":
        return honesty_figure(result)
    if "confusion" in result:
        return confusion_figure(result["confusion"]["model"], result["data"]["classes"])
    return None


def bars(
    axes, names: Sequence[str], found: Sequence[dict | None], title: str, colours: Sequence[str] | str = INK
) -> None:
    """Shares as per cent with their intervals (or standard deviations)."""
    values = [100 * f["value"] if f else 0.0 for f in found]
    axes.bar(range(len(names)), values, color=colours, width=0.7)
    for i, f in enumerate(found):
        spread = f and (f.get("interval") or (f.get("std") and [f["value"] - f["std"], f["value"] + f["std"]]))
        if spread:
            axes.vlines(i, 100 * spread[0], 100 * spread[1], color=LINE)
        top = max(values[i], 100 * spread[1] if spread else 0.0)
        axes.annotate("-" if f is None else f"{values[i]:.1f}", (i, top + 1), ha="center", color=LINE, fontsize=8)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(0, 106)  # room for a number above a full bar
    axes.set_yticks(range(0, 101, 20))
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def honesty_figure(result: dict) -> Figure:
    """The panel: accuracy under each condition, predictions that change, and what each temporal layer adds."""
    found = result["metrics"]
    names = [name for name in LABELS if name in found]
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    (top, change), (gate, ratio) = figure.subplots(2, 2)
    colours = [INK if name == "model" else PALE for name in names]
    bars(top, [LABELS[n] for n in names], [found[n]["top1"] for n in names], "top-1 accuracy, %", colours)
    others = [name for name in names if name != "model"]
    bars(change, [LABELS[n] for n in others], [found[n]["changed"] for n in others], "predictions that change, %", PALE)
    layer_bars(gate, result["layers"], "gate_norm", "norm of each layer's gate")
    layer_bars(ratio, result["layers"], "branch_to_residual", "|temporal branch| / |residual stream|")
    views = result["protocol"]["views"]
    figure.suptitle(
        f"{result['model']['video']['backbone'] or 'model'} on {Path(result['data']['list']).name}: "
        f"{result['data']['used']} videos, {views['num_frames']} frames",
        fontsize=11,
    )
    return figure


def confusion_figure(counts: Sequence[Sequence[int]], classes: Sequence[str] | None) -> Figure:
    """Share of each true class (rows) that is given each name (columns)."""
    counts = np.asarray(counts, dtype=float)
    share = counts / counts.sum(1, keepdims=True).clip(min=1)
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if classes is not None and len(classes) <= 60:
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
        axes.set_yticks(range(len(classes)), classes, fontsize=7)
    if len(counts) <= 15:  # few enough to read the counts
        for (row, column), count in np.ndenumerate(counts):
            ink = "white" if share[row, column] > 0.5 else LINE
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=ink, fontsize=7)
    return figure


def comparison_figure(numbers: dict[str, Sequence[tuple[str, dict | None]]]) -> Figure:
    """The same numbers of several results side by side, with their intervals."""
    labels = list(dict.fromkeys(label for of in numbers.values() for label, _ in of))
    figure = Figure(figsize=(10, 1.2 + 0.32 * sum(len(of) for of in numbers.values())), layout="constrained")
    axes = figure.subplots()
    colours = [f"C{i}" for i in range(10)]
    at, ticks = 0.0, []
    for label in labels:
        start = at
        for number, of in enumerate(numbers.values()):
            found = dict(of).get(label)
            if found is None:
                continue
            value, spread = 100 * found["value"], found.get("interval")
            axes.barh(at, value, color=colours[number % 10])
            if spread:
                axes.hlines(at, 100 * spread[0], 100 * spread[1], color=LINE)
            axes.annotate(
                f"{value:.1f}", (max(value, 100 * spread[1] if spread else 0) + 1, at), va="center", fontsize=8
            )
            at += 1
        ticks.append(((start + at - 1) / 2, label))
        at += 0.6
    axes.set_yticks([t for t, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 110)
    axes.set_xlabel("%")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colours[i % 10], label=name) for i, name in enumerate(numbers)]
    axes.legend(handles=handles, fontsize=8, loc="lower right")
    return figure
