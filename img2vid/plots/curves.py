"""Pictures of training logs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import matplotlib

from img2vid.plots.canvas import Figure


def family(name: str) -> str:
    """Columns that share an axis: ``gate/blocks.0`` and ``gate/blocks.1`` do, a loss and a learning rate do not."""
    return re.split(r"[/.]", name)[0]


def curves_figure(columns: dict[str, Sequence[tuple[float, float]]], title: str = "", log: bool = False) -> Figure:
    """Training curves or the growth of gates: each name a line of (step, value), each family of names a panel."""
    families: dict[str, list[str]] = {}
    for name in columns:
        families.setdefault(family(name), []).append(name)
    across = min(3, len(families))
    down = -(-len(families) // across)
    size = (8, 4.5) if len(families) == 1 else (4.2 * across, 0.4 + 2.8 * down)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for axes, (group, names) in zip(panels, families.items(), strict=False):
        # lines of one family are layers, in order: shades say which is deeper
        shades = matplotlib.colormaps["viridis"].resampled(len(names) + 1)
        for i, name in enumerate(names):
            points = columns[name]
            style = {"marker": "o", "markersize": 3} if len(points) < 20 else {}
            axes.plot(*zip(*points, strict=True), label=name, color=shades(i), linewidth=1.2, **style)
        axes.set_xlabel("step", fontsize=8)
        axes.set_yscale("log" if log else "linear")
        axes.tick_params(labelsize=8)
        axes.set_title(names[0] if len(names) == 1 else group, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axes.legend(fontsize=7, ncols=-(-len(names) // 12))
    for axes in panels[len(families) :]:
        axes.axis("off")
    figure.suptitle(title, fontsize=11)
    return figure
