"""The demo's pictures, and one page that tells its story with the numbers that were measured."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from img2vid.data.manifest import VideoList
from img2vid.data.reading import read_clip
from img2vid.data.synthetic import CLASS_NAMES, MOTIONS
from img2vid.evaluation.attention import attention_maps
from img2vid.evaluation.report import STYLE, inline, read_curves, section, table
from img2vid.evaluation.results import read_result
from img2vid.evaluation.store import write_whole
from img2vid.evaluation.tables import Sheet, percent
from img2vid.plots import attention_figure, curves_figure, save
from img2vid.plots.canvas import INK, PALE
from img2vid.two_towers import VideoTextModel

ENOUGH_STEPS = 200  # with fewer, motion stays at chance and digits have not come back
TOO_SHORT = (
    "This is a short run, {steps} steps on {train} videos: it shows every stage, and is too short to learn anything "
    "from. Run img2vid demo without --quick for that."
)
RESULTS = ("before-digits", "before-motion", "after-digits", "after-motion")


def write(folder: Path, facts: dict[str, Any], converted: VideoTextModel, trained: VideoTextModel, videos: VideoList):
    """Write the PNGs and ``report.html``, which needs nothing beside it."""
    clips = one_of_each(videos, trained.config.num_frames)
    said = {"converted": captions_of(converted, clips), "trained": captions_of(trained, clips)}
    losses = curves(facts["log"], ["loss", "train/*_loss"])
    looks = curves(facts["log"], ["val/accuracy"])
    norms = curves(facts["log"], ["gate/*"])
    gates = {f"block {i}": [(0, 0.0), *points] for i, points in enumerate(norms.values())}
    figures = {
        "strips": strips_figure(clips, said),
        "accuracy": curves_figure(looks, "accuracy on validation videos, motions"),
        "losses": curves_figure(losses, "losses", log=True),
        "gates": curves_figure(gates, "norm of each block's gate, at zero in the beginning"),
        "attention": attention_picture(trained, clips["moving right"]),
        "before_after": before_after_figure(facts),
    }
    for name, figure in figures.items():
        save(figure, folder / f"{name}.png")
    write_whole(folder / "report.html", tell(folder, facts, figures).encode())


def curves(log: str | Path, patterns: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Columns of the log over steps counted as the lines of the training count them: Lightning's CSV begins at 0."""
    found = read_curves(log, patterns)
    return {name: [(step + 1, value) for step, value in points] for name, points in found.items()}


def one_of_each(videos: VideoList, num_frames: int) -> dict[str, torch.Tensor]:
    """Motion -> a clip of it, uint8 (T, C, H, W), each pair of opposites in their table's order."""
    first = {}
    for row in videos.rows:
        first.setdefault(videos.class_names[row.label], row.path)
    return {name: read_clip(first[name], num_frames=num_frames) for pair in MOTIONS for name in pair}


@torch.no_grad()
def captions_of(model: VideoTextModel, clips: dict[str, torch.Tensor]) -> list[str]:
    """For each clip, the best of the eighty captions."""
    from img2vid.data.digits import DIGIT_WORDS

    captions = [f"the digit {word} {motion}" for word in DIGIT_WORDS for motion in CLASS_NAMES]
    text = model.encode_text(model.tokenize(captions), normalize=True)  # (80, D)
    video = model.encode_video(model.normalize(torch.stack(list(clips.values()))), normalize=True)  # (8, D)
    return [captions[i] for i in (video @ text.T).argmax(dim=1).tolist()]


def strips_figure(clips: dict[str, torch.Tensor], said: dict[str, list[str]]) -> Figure:
    """One film strip for each motion, and the caption that each model finds best; wrong motions are pale."""
    num_frames = len(next(iter(clips.values())))
    figure = Figure(figsize=(5.6 + 0.9 * num_frames, 0.9 * len(clips) + 0.4), layout="constrained")
    widths = [1] * num_frames + [2.4] * len(said)
    axes = figure.subplots(len(clips), len(widths), squeeze=False, width_ratios=widths)
    for line, (motion, clip) in enumerate(clips.items()):
        for t, frame in enumerate(clip.permute(0, 2, 3, 1).numpy()):  # (H, W, C)
            axes[line, t].imshow(frame)
            axes[line, t].set(xticks=[], yticks=[])
        axes[line, 0].set_ylabel(motion.replace(" ", "\n"), fontsize=8, rotation=0, ha="right", va="center")
        for axis, (name, captions) in zip(axes[line, num_frames:], said.items(), strict=True):
            right = captions[line].endswith(motion)
            axis.text(0, 0.5, captions[line], fontsize=8, va="center", color=INK if right else PALE)
            axis.axis("off")
            if line == 0:
                axis.set_title(f"{name}, best of 80 captions", fontsize=8, loc="left")
    return figure


def before_after_figure(facts: dict[str, Any]) -> Figure:
    """What each model names right, with the frames in order, shuffled, and one alone."""
    wanted = {
        "digits": "digit",
        "motion": "motion",
        "shuffled": "motion,\nframes shuffled",
        "static": "motion,\none frame",
    }
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for offset, when, colour in ((-0.2, "before", PALE), (0.2, "after", INK)):
        values = [100 * facts[when][key]["value"] for key in wanted]
        places = [place + offset for place in range(len(wanted))]
        axes.bar(places, values, width=0.38, color=colour, label=when)
        for place, value in zip(places, values, strict=True):
            axes.annotate(f"{value:.1f}", (place, value + 1), ha="center", fontsize=8)
    axes.axhline(100 / len(CLASS_NAMES), color="#444444", linewidth=0.8, linestyle=":", label="chance, of 8 motions")
    axes.set_xticks(range(len(wanted)), wanted.values(), fontsize=8)
    axes.set(ylim=(0, 108))
    axes.set_title("named right without a classifier, %", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return figure


def attention_picture(model: VideoTextModel, clip: torch.Tensor) -> Figure:
    maps = attention_maps(model, model.normalize(clip[None]))
    frames = clip.permute(0, 2, 3, 1).numpy()
    return attention_figure(frames, maps.rows(), maps.frame_to_frame, "where the trained model looks")


def tell(folder: Path, facts: dict[str, Any], figures: dict[str, Figure]) -> str:
    before, after, certificate = facts["before"], facts["after"], facts["certificate"]
    rows = [
        ["digit, zero-shot", percent(before["digits"]), percent(after["digits"])],
        ["motion, zero-shot (chance 12.5)", percent(before["motion"]), percent(after["motion"])],
        ["motion, frames shuffled", percent(before["shuffled"]), percent(after["shuffled"])],
        ["motion, the middle frame alone", percent(before["static"]), percent(after["static"])],
        [
            "shown backwards, taken for the opposite",
            f"{100 * before['backwards']:.1f}",
            f"{100 * after['backwards']:.1f}",
        ],
    ]
    results = {name: read_result(folder / f"{name}.json") for name in RESULTS}
    size = facts["size"]

    def paragraph(text: str) -> str:
        return f"<p>{html.escape(text)}</p>"

    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>img2vid demo</title>",
        f"<style>{STYLE}</style><h1>An image model learns which way things move</h1>",
        paragraph(
            f"nano_clip was trained on pictures of digits. It names {facts['pictures']['accuracy']:.1%} of "
            f"{facts['pictures']['number']} it has never seen, and knows nothing of time."
        ),
        *[paragraph(TOO_SHORT.format(**size))] * (size["steps"] < ENOUGH_STEPS),
        "<h2>The same function, with room for time</h2>",
        paragraph(
            "Converting it puts attention along time into every block, copied from the block's own attention and "
            "waiting behind a gate that is exactly zero. The certificate ran both models on one frame, on static, "
            f"moving and shuffled clips: the largest difference between them was {certificate['largest_difference']:g}."
        ),
        f"<details><summary>certificate</summary><pre>{html.escape(certificate['text'])}</pre></details>",
        "<h2>Which way does it move?</h2>",
        paragraph(
            f"{size['train']} training and {size['test']} test videos of digits that move, grow or turn. Each is there "
            "twice, as it is and backwards, so that no frame, and no bag of frames, tells the two apart: nothing but "
            "attention along time could."
        ),
        inline(figures["strips"], "film strips"),
        table(Sheet("", ["", "converted, %", f"after {size['steps']} steps, %"], rows)),
        inline(figures["before_after"], "before and after"),
        "<h2>Time being learned</h2>",
        *(inline(figures[name], name) for name in ("accuracy", "gates", "losses")),
        "<h2>Where it looks</h2>",
        inline(figures["attention"], "attention"),
        "<h2>The results in full</h2>",
        *(section(name, result) for name, result in results.items()),
        paragraph(f"All of it took {facts['seconds'] / 60:.1f} minutes. Seed {facts['seed']}."),
    ]
    return "\n".join(parts) + "</html>\n"
