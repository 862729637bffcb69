"""Results as tables: one ``Sheet`` for each task, shown in the terminal here and in a page by ``report``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table

from img2vid.evaluation.errors import EvaluationError

METRICS = {"top1": "top-1", "top5": "top-5", "mean_class": "mean class", "calibration_error": "ECE"}
LABELS = {
    "model": "video model",
    "frame_mean": "frame mean",
    "shuffled": "frames shuffled",
    "reversed": "frames reversed",
    "static": "middle frame alone",
    "half": "half the frames",
}
DIRECTIONS = {"text_to_video": "text to video", "video_to_text": "video to text"}


@dataclass
class Sheet:
    """A table as texts; the first column names the rows."""

    title: str
    header: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)


def percent(found: dict | None, brief: bool = False) -> str:
    """A share with what is known of its spread; without, if brief."""
    if found is None:
        return "-"
    text = f"{100 * found['value']:.1f}"
    if brief:
        return text
    if found.get("std") is not None:
        return f"{text} ± {100 * found['std']:.1f}"
    if "interval" in found:
        return text + " [{:.1f}, {:.1f}]".format(*(100 * v for v in found["interval"]))
    if "base" in found:
        return f"{text} (base {100 * found['base']:.1f}, novel {100 * found['novel']:.1f})"
    return text


def sheet_of(result: dict, brief: bool = True) -> Sheet:
    """The table of a result.

    Args:
        brief: intervals of the main numbers only, for a terminal's width.

    Raises:
        EvaluationError: a task of another version.
    """
    if result["task"] not in SHEETS:
        raise EvaluationError(f"A result of task {result['task']!r} is not known to this version.")
    return SHEETS[result["task"]](result, brief)


def classification_sheet(result: dict, brief: bool) -> Sheet:
    name = result["task"].replace("_", "-")
    sheet = Sheet(f"{name}, protocol {result['protocol']['name']}, %", ["", *METRICS.values()])
    for name, found in result["metrics"].items():
        if name == "time_added":
            sheet.rows.append(["time added", percent(found["top1"]), "", "", ""])
        else:
            sheet.rows.append([LABELS[name], *metric_cells(found["summary"], brief)])
    return sheet


def metric_cells(found: dict, brief: bool) -> list[str]:
    return [percent(found[metric], brief and metric == "top5") for metric in METRICS]


def honesty_sheet(result: dict, brief: bool) -> Sheet:
    sheet = Sheet("temporal honesty, %", ["", "top-1", "lost", "answers changed"])
    for name, found in result["metrics"].items():
        rest = ["", ""] if name == "model" else [percent(found["lost"]), percent(found["changed"])]
        sheet.rows.append([LABELS[name], percent(found["top1"]), *rest])
    return sheet


def retrieval_sheet(result: dict, brief: bool) -> Sheet:
    sheet = Sheet("retrieval: recall in %, ranks from 1", ["", "", "R@1", "R@5", "R@10", "median", "mean"])
    for name, found in result["metrics"].items():
        label = LABELS[name]
        for how, of in (("", found), (", dual softmax", found["dual_softmax"])):
            for direction, text in DIRECTIONS.items():
                recall = of[direction]
                cells = [percent(recall[f"r{k}"], brief) for k in (1, 5, 10)]
                ranks = [f"{recall['median_rank']:g}", f"{recall['mean_rank']:.1f}"]
                sheet.rows.append([label, text + how, *cells, *ranks])
                label = ""
    return sheet


def probe_sheet(result: dict, brief: bool) -> Sheet:
    sheet = Sheet("probes on frozen features, %", ["", "", *METRICS.values()])
    for kind, of in result["metrics"].items():
        for i, (name, found) in enumerate(of.items()):
            sheet.rows.append([kind if i == 0 else "", LABELS[name], *metric_cells(found, brief)])
    return sheet


SHEETS: dict[str, Callable[[dict, bool], Sheet]] = {
    "zero_shot": classification_sheet,
    "classification": classification_sheet,
    "honesty": honesty_sheet,
    "retrieval": retrieval_sheet,
    "probe": probe_sheet,
}


def headline(result: dict) -> list[tuple[str, dict | None]]:
    """The numbers of a result that stand in a comparison, by name."""
    metrics, task = result["metrics"], result["task"]
    if task in ("zero_shot", "classification"):
        return [(f"top-1, {LABELS[name]}", of["summary"]["top1"]) for name, of in metrics.items() if name in LABELS]
    if task == "honesty":
        return [(f"top-1, {LABELS[name]}", of["top1"]) for name, of in metrics.items()]
    if task == "retrieval":
        return [
            (f"R@1 {text}, {LABELS[name]}", of[direction]["r1"])
            for name, of in metrics.items()
            for direction, text in DIRECTIONS.items()
        ]
    if task == "probe":
        return [
            (f"top-1, {kind}, {LABELS[name]}", found["top1"])
            for kind, of in metrics.items()
            for name, found in of.items()
        ]
    raise EvaluationError(f"A result of task {task!r} is not known to this version.")


def counted(data: dict) -> str:
    """How many videos are in the numbers, and which are not."""
    text = f"{data['used']} of {data['videos']} videos"
    for kind in ("missing", "undecodable"):
        if data[kind]:
            names = ", ".join(entry["video"] for entry in data[kind][:3]) + (", ..." if len(data[kind]) > 3 else "")
            text += f"; {len(data[kind])} {kind}: {names}"
    if data.get("repeated"):
        text += f"; {data['repeated']} rows repeat a video and count again"
    if data.get("unlabelled"):
        text += f"; {data['unlabelled']} without a label, in no number"
    return text


def protocol_line(protocol: dict) -> str:
    views = protocol["views"]
    stride = f" every {views['frame_interval']}" if views["frame_interval"] else ""
    stride = f" at {views['target_fps']:g} per second" if views["target_fps"] else stride
    parts = [f"{views['num_frames']} frames{stride}", f"{views['num_clips']} x {views['num_crops']} views"]
    parts += [f"{key} {protocol[key]}" for key in ("fusion", "precision") if key in protocol]
    if "templates" in protocol:
        parts.append(f"templates {protocol['templates']['name']} ({len(protocol['templates']['texts'])})")
    return ", ".join(parts)


def show(result: dict, written: object, *facts: str) -> None:
    """A result in the terminal: its table, the videos and protocol behind it, further facts, and where it went."""
    sheet = sheet_of(result)
    table = Table(title=sheet.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in range(len(sheet.header)):
        is_name = not sheet.header[column]
        table.add_column(sheet.header[column], justify="left" if is_name else "right", no_wrap=True)
    for row in sheet.rows:
        table.add_row(*row)
    # no number is ever cut short: a narrow terminal breaks the lines instead
    natural = Console(width=1000).measure(table).maximum
    console = Console(width=max(Console().width, natural))
    console.print(table)
    for fact in (counted(result["data"]), *facts, protocol_line(result["protocol"]), f"wrote {written}"):
        console.print(fact, markup=False, highlight=False, soft_wrap=True)
