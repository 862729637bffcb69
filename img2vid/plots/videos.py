"""Pictures of videos: what is attended to in them, and what was found for a text."""

from __future__ import annotations

from collections.abc import Sequence

from img2vid.plots.canvas import LINE, Figure

MOST_FRAMES = 16  # beside each other


def attention_figure(frames, rows: dict, frame_to_frame=None, title: str = "") -> Figure:
    """Frames (T, H, W, 3), and below them maps (T, h, w) by name: bright where much is looked at, dark where little.

    Each row has its own scale, from its smallest value to its largest. ``frame_to_frame`` (T, T) stands beside the row
    ``temporal``. Of more than ``MOST_FRAMES`` some are shown, under their own numbers.
    """
    shown = range(len(frames))
    if len(frames) > MOST_FRAMES:  # evenly, the first and the last among them
        shown = [round(i * (len(frames) - 1) / (MOST_FRAMES - 1)) for i in range(MOST_FRAMES)]
    columns = len(shown) + (frame_to_frame is not None)
    figure = Figure(figsize=(1.6 * columns + 1, 1.7 * (1 + len(rows))), layout="constrained")
    axes = figure.subplots(1 + len(rows), columns, squeeze=False)
    height, width = frames[0].shape[:2]
    for column, t in enumerate(shown):
        frame = frames[t]
        axes[0, column].imshow(frame)
        axes[0, column].set_title(f"{t}", fontsize=8)
        for axis, maps in zip(axes[1:, column], rows.values(), strict=True):
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


def similarity_figure(scores, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> Figure:
    """A matrix of similarities (texts, videos), with its names where there are few."""
    height, width = (max(2.5, 0.14 * n) for n in scores.shape)  # room for a name beside each row and column
    figure = Figure(figsize=(width + 5, height + 1.5), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(scores, cmap="viridis"), ax=axes, label="cosine", shrink=0.6)
    for names, put in ((rows, axes.set_yticks), (columns, axes.set_xticks)):
        if 0 < len(names) <= 60:
            put(range(len(names)), names, fontsize=7, **({"rotation": 90} if names is columns else {}))
    return figure
