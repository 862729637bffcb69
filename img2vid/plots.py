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
