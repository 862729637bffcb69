"""Pictures, through matplotlib and nothing else. Results and arrays in, figures out; no model is needed.

save(honesty_figure(result), "honesty.png")
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from img2vid.errors import Img2VidError

LABELS = {
    "model": "as is",
    "shuffled": "shuffled",
    "reversed": "reversed",
    "static": "one frame",
    "half": "half the\nframes",
    "frame_mean": "frame\nmean",
}
INK, PALE, LINE = "#1f4e79", "#9db8d2", "#444444"


class PlotError(Img2VidError):
    """A picture that cannot be made."""


try:
    from matplotlib.figure import Figure  # no pyplot: no windows, no global state
    from matplotlib.patches import Patch
except ImportError as error:
    raise PlotError("Pictures need matplotlib. Run: pip install 'img2vid[plot]'") from error


def save(figure: Figure, path: str | Path) -> Path:
    """Write a PNG, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(png(figure))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


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
    layers = result["layers"]
    for axes, key, title in (
        (gate, "gate_norm", "norm of each layer's gate"),
        (ratio, "branch_to_residual", "|temporal branch| / |residual stream|"),
    ):
        values = [layer[key] or 0.0 for layer in layers]
        axes.bar(range(len(layers)), values, color=INK, width=0.7)
        axes.set_title(title if layers else f"{title}: no temporal layers", loc="left", fontsize=10)
        axes.set_xticks(range(len(layers)))
        axes.spines[["top", "right"]].set_visible(False)
    views = result["protocol"]["views"]
    figure.suptitle(
        f"{result['model']['video']['backbone'] or 'model'} on {Path(result['data']['list']).name}: "
        f"{result['data']['used']} videos, {views['num_frames']} frames",
        fontsize=11,
    )
    return figure


def figure_of(result: dict) -> Figure | None:
    """The picture that belongs to a result; None where a table says all."""
    if result["task"] == "honesty":
        return honesty_figure(result)
    if "confusion" in result:
        return confusion_figure(result["confusion"]["model"], result["data"]["classes"])
    return None


def confusion_figure(counts: Sequence[Sequence[int]], classes: Sequence[str] | None) -> Figure:
    """Share of each true class (rows) that is given each name (columns)."""
    import numpy as np

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


def similarity_figure(scores, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> Figure:
    """A matrix of similarities (texts, videos), with its names where there are few."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(scores, cmap="viridis"), ax=axes, label="cosine")
    for names, put in ((rows, axes.set_yticks), (columns, axes.set_xticks)):
        if 0 < len(names) <= 60:
            put(range(len(names)), names, fontsize=7, **({"rotation": 90} if names is columns else {}))
    return figure


def curves_figure(columns: dict[str, Sequence[tuple[float, float]]], title: str = "", log: bool = False) -> Figure:
    """Training curves or the growth of gates: each name a line of (step, value)."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in columns.items():
        axes.plot(*zip(*points, strict=True), label=name)
    axes.set(xlabel="step", yscale="log" if log else "linear")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    return figure


def retrieval_figure(queries: Sequence[tuple[str, Sequence, int]]) -> Figure:
    """A grid: for each query its text, the pictures (H, W, 3) it found best first, and which of them is right."""
    columns = max(len(pictures) for _, pictures, _ in queries)
    figure = Figure(figsize=(1.6 * columns + 2, 1.7 * len(queries)), layout="constrained")
    for line, (axes, (text, pictures, right)) in enumerate(
        zip(figure.subplots(len(queries), columns, squeeze=False), queries, strict=True)
    ):
        for place, axis in enumerate(axes):
            axis.set(xticks=[], yticks=[])
            axis.axis("on" if place < len(pictures) else "off")
            if place < len(pictures):
                axis.imshow(pictures[place])
                for spine in axis.spines.values():
                    spine.set(edgecolor="green" if place == right else LINE, linewidth=3 if place == right else 0.5)
            if line == 0:
                axis.set_title(f"{place + 1}", fontsize=8)
        axes[0].set_ylabel(text, fontsize=8, rotation=0, ha="right", va="center")
    return figure


def attention_figure(frames, rows: dict, frame_to_frame=None, title: str = "") -> Figure:
    """Frames (T, H, W, 3), and below them maps (T, h, w) by name: bright where much is looked at, dark where little.

    Each row has its own scale, from its smallest value to its largest. ``frame_to_frame`` (T, T) stands beside the row
    ``temporal``.
    """
    columns = len(frames) + (frame_to_frame is not None)
    figure = Figure(figsize=(1.6 * columns + 1, 1.7 * (1 + len(rows))), layout="constrained")
    axes = figure.subplots(1 + len(rows), columns, squeeze=False)
    height, width = frames[0].shape[:2]
    for t, frame in enumerate(frames):
        axes[0, t].imshow(frame)
        axes[0, t].set_title(f"{t}", fontsize=8)
        for axis, maps in zip(axes[1:, t], rows.values(), strict=True):
            axis.imshow(frame.mean(-1), cmap="gray", vmin=0, vmax=255)
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            axis.imshow(maps[t], vmin=maps.min(), vmax=maps.max(), extent=extent, cmap="inferno", alpha=0.65)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, (name, maps) in zip(axes[1:, 0], rows.items(), strict=True):
        axis.set_ylabel(f"{name}\n{maps.min():.2g} to {maps.max():.2g}", fontsize=8)
    axes[0, 0].set_ylabel("frames", fontsize=8)
    if frame_to_frame is not None:
        for axis, name in zip(axes[:, -1], ["frames", *rows], strict=True):
            axis.axis("on" if name == "temporal" else "off")
            if name == "temporal":
                axis.imshow(frame_to_frame, cmap="inferno")
                axis.set_title("frame (down) to frame", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
