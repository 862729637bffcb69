"""docs/grafts.md: its Python runs, and its table is what the classes say of themselves."""

import re
from pathlib import Path

from img2vid.grafts import GRAFTS

PAGE = Path(__file__).parents[1] / "docs" / "grafts.md"


def table():
    rows = [(cls.type, cls.where, cls.new, cls.gate, cls.identity, cls.folds) for cls in GRAFTS.values()]
    return "".join(f"| `{kind}` | {' | '.join(answers)} |\n" for kind, *answers in rows if kind != "shift")


def test_the_table_is_that_of_the_classes():
    text = PAGE.read_text()
    shown = re.search(r"\|---\|---\|---\|---\|---\|---\|\n(.*?)<!-- end", text, flags=re.DOTALL)[1]
    assert shown == table(), f"docs/grafts.md should say:\n{table()}"


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE):
        exec(compile(code, "grafts.md", "exec"), names)
    assert capsys.readouterr().out.strip() == "True"
    del GRAFTS["shift"]
