"""Results as pages and pictures, drawn and compared without a model."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from img2vid.data.manifest import numbered_records
from img2vid.evaluation.errors import EvaluationError
from img2vid.evaluation.store import short_hash
from img2vid.evaluation.tables import Sheet, counted, headline, protocol_line, sheet_of

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 1rem } img { max-width: 100% }
td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums }
td.name, th.name { text-align: left }
.facts { color: #666; font-size: 13px } pre { font-size: 12px; overflow: auto; max-height: 24rem; background: #f6f6f6 }
"""


def name_of(result: dict, path: str | Path) -> str:
    """The file's name, with the task where that does not say it."""
    task, stem = result["task"].replace("_", "-"), Path(path).stem
    return stem if stem.replace("_", "-").startswith(task) else f"{stem} ({task})"


# of a protocol: what changes speed, numbers by rounding at most, or what is said beside them
HARMLESS = ("batch_size", "device", "conditions", "bootstrap", "frame_mean")


def facts_of(result: dict) -> dict[str, str]:
    """Everything that has to be the same for the numbers of two results to compare, as texts."""
    data, protocol = result["data"], {k: v for k, v in result["protocol"].items() if k not in HARMLESS}
    left_out = sorted(entry["video"] for kind in ("missing", "undecodable") for entry in data[kind])
    facts = {"task": result["task"], "data list": data["hash"], "videos used": data["used"], "left out": left_out}
    if "train" in result:
        facts |= {"training list": result["train"]["hash"], "training videos used": result["train"]["used"]}
    if "templates" in protocol:
        templates = protocol.pop("templates")
        facts["templates"] = f"{templates['name']} ({templates['hash'][:8]})"
    rounds = protocol.pop("rounds", None)
    if rounds is not None:  # by hash: a round may list hundreds of classes
        facts["rounds"] = f"{len(rounds)} ({short_hash([[r['name'], r['classes']] for r in rounds])[:8]})"
    for group in ("views", "input"):
        facts |= protocol.pop(group, {})
    facts["protocol"] = protocol.pop("name")
    facts |= protocol
    return {key: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for key, v in facts.items()}


def differences(results: dict[str, dict]) -> list[str]:
    """What the protocols of several results do not share: numbers got differently do not compare."""
    of = {name: facts_of(result) for name, result in results.items()}
    facts = dict.fromkeys(fact for known in of.values() for fact in known)
    if len({known["task"] for known in of.values()}) > 1:  # then much else is another question
        facts = [fact for fact in facts if fact != "protocol" and all(fact in known for known in of.values())]
    found = []
    for fact in facts:
        names: dict[str, list[str]] = {}
        for name, known in of.items():
            names.setdefault(known.get(fact, "none"), []).append(name)
        if len(names) > 1:
            found.append(f"{fact} differs: " + "; ".join(f"{value} ({', '.join(who)})" for value, who in names.items()))
    return found


def table(sheet: Sheet) -> str:
    names = [not header for header in sheet.header]  # columns that name the rows

    def line(cells, tag):
        kinds = [f"{tag} class=name" if is_name else tag for is_name in names]
        cells = [f"<{kind}>{html.escape(str(cell))}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)]
        return f"<tr>{''.join(cells)}</tr>"

    return "<table>" + line(sheet.header, "th") + "".join(line(row, "td") for row in sheet.rows) + "</table>"


def inline(figure, name: str) -> str:
    from img2vid.plots import png

    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png(figure)).decode()}">'


def section(name: str, result: dict) -> str:
    """One result: numbers, picture, protocol."""
    from img2vid import plots

    data = result["data"]
    parts = [f"<h2>{html.escape(name)}</h2>"]
    facts = f"{counted(data)} of {data['list']} (hash {data['hash']}). {protocol_line(result['protocol'])}. "
    model = result["model"]
    facts += f"Model {model['folder'] or 'at hand'}, {model['hash'][:12]}."
    parts.append(f'<p class="facts">{html.escape(facts)}</p>')
    sheet = sheet_of(result, brief=False)
    parts.append(f"<p>{html.escape(sheet.title)}</p>{table(sheet)}")
    figure = plots.figure_of(result)
    if figure is not None:
        parts.append(inline(figure, name))
    whole = {key: value for key, value in result.items() if key not in ("predictions", "confusion")}
    parts.append(
        f"<details><summary>result file</summary><pre>{html.escape(json.dumps(whole, indent=1))}</pre></details>"
    )
    return "\n".join(parts)


def report(results: dict[str, dict]) -> str:
    """One HTML page that needs nothing beside it: no scripts, no links, pictures inside."""
    from img2vid import plots

    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>img2vid results</title>",
        f"<style>{STYLE}</style>",
    ]
    parts.append("<h1>Results</h1>")
    if len(results) > 1:
        for difference in differences(results):
            parts.append(f"<p><b>Do not compare without a look:</b> {html.escape(difference)}</p>")
        parts.append(inline(plots.comparison_figure({n: headline(r) for n, r in results.items()}), "comparison"))
    parts += [section(name, result) for name, result in results.items()]
    return "\n".join(parts) + "</html>\n"


def read_curves(path: str | Path, patterns: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Columns of a training log over its column ``step``, as Lightning's CSVLogger writes it; empty cells are left out.

    Raises:
        EvaluationError: no such columns, or a cell that is no number.
    """
    rows = [record for _, record in numbered_records(Path(path))]
    columns = [name for name in (rows[0] if rows else {}) if name not in ("step", "epoch")]
    if not rows or "step" not in rows[0]:
        raise EvaluationError(f"{path}: expected a CSV with a column step and at least one row.")
    wanted = [name for name in columns if any(fnmatch(name, pattern) for pattern in patterns)]
    if not wanted:
        raise EvaluationError(f"{path} has no column like {' or '.join(patterns)}; it has {', '.join(columns)}.")
    try:
        return {name: [(float(r["step"]), float(r[name])) for r in rows if r[name]] for name in wanted}
    except ValueError as error:
        raise EvaluationError(f"{path}: {error}") from error
