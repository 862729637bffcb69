"""Results in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

METRICS = {"top1": "top-1", "top5": "top-5", "mean_class": "mean class", "calibration_error": "calibration"}
LABELS = {
    "model": "video model",
    "frame_mean": "frame mean",
    "shuffled": "frames shuffled",
    "reversed": "frames reversed",
    "static": "middle frame alone",
    "half": "half the frames",
}


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


def counted(data: dict) -> str:
    """How many videos are in the numbers, and which are not."""
    text = f"{data['used']} of {data['videos']} videos"
    for kind in ("missing", "undecodable"):
        if data[kind]:
            names = ", ".join(entry["video"] for entry in data[kind][:3]) + (", ..." if len(data[kind]) > 3 else "")
            text += f"; {len(data[kind])} {kind}: {names}"
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


def classification_table(result: dict) -> Table:
    title = f"{result['task']}, protocol {result['protocol']['name']}, %"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for label in METRICS.values():
        table.add_column(label, justify="right", no_wrap=True)
    for name, found in result["metrics"].items():
        if name == "time_added":
            table.add_row("time added", percent(found["top1"]))
        else:
            cells = [percent(found["summary"][metric], brief=metric == "top5") for metric in METRICS]
            table.add_row(LABELS.get(name, name), *cells)
    return table


def honesty_table(result: dict) -> Table:
    table = Table(title="temporal honesty, %", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for header in ("top-1", "lost", "answers changed"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, found in result["metrics"].items():
        rest = [] if name == "model" else [percent(found["lost"]), percent(found["changed"])]
        table.add_row(LABELS[name], percent(found["top1"]), *rest)
    return table


def retrieval_table(result: dict) -> Table:
    table = Table(title="retrieval: recall in %, ranks from 1", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for header in ("R@1", "R@5", "R@10", "median", "mean"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, found in result["metrics"].items():
        for how, of in (("", found), (" (dual softmax)", found["dual_softmax"])):
            for direction in ("text_to_video", "video_to_text"):
                recall = of[direction]
                cells = [percent(recall[f"r{k}"], brief=True) for k in (1, 5, 10)]
                ranks = (f"{recall['median_rank']:g}", f"{recall['mean_rank']:.1f}")
                table.add_row(f"{LABELS[name]}, {direction.replace('_', ' ')}{how}", *cells, *ranks)
    return table


def probe_table(result: dict) -> Table:
    table = Table(title="probes on frozen features, %", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for label in METRICS.values():
        table.add_column(label, justify="right", no_wrap=True)
    for kind, of in result["metrics"].items():
        for name, found in of.items():
            cells = [percent(found[metric], brief=metric == "top5") for metric in METRICS]
            table.add_row(f"{kind}, {LABELS[name]}", *cells)
    return table


def print_classification(result: dict, path) -> None:
    show(classification_table(result), counted(result["data"]), protocol_line(result["protocol"]), path)


def show(table: Table, *lines) -> None:
    console = Console()
    console.print(table)
    *facts, path = lines
    for fact in facts:
        console.print(fact, markup=False, highlight=False, soft_wrap=True)
    console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
