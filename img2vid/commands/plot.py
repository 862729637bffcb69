"""``img2vid plot``: results drawn and compared without a model; training logs; what a model looks at."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from img2vid.commands import plot_attention, plot_curves

OTHERS = {"attention": plot_attention, "curves": plot_curves}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "img2vid plot",
        description="Draw and compare results, without a model.",
        epilog="img2vid plot attention --help: what a model looks at in a video; "
        "img2vid plot curves --help: training logs",
        allow_abbrev=False,
    )
    parser.add_argument("results", nargs="+", metavar="RESULT.json", help="written by img2vid eval")
    parser.add_argument("--out", default="runs/report.html", help="a page (.html) or a picture (.png)")
    return parser


def main(argv: Sequence[str]) -> int:
    if argv[:1] and argv[0] in OTHERS:
        return OTHERS[argv[0]].main(argv[1:])
    options = make_parser().parse_args(argv)
    from img2vid import plots
    from img2vid.evaluation.errors import EvaluationError
    from img2vid.evaluation.report import differences, headline, name_of, report
    from img2vid.evaluation.results import read_result
    from img2vid.evaluation.store import write_whole
    from img2vid.evaluation.tables import percent

    results = {}
    for path in options.results:
        result = read_result(path)
        name = name_of(result, path)
        results[f"{name} ({path})" if name in results else name] = result
    out = Path(options.out)
    if out.suffix.lower() == ".png":
        if len(results) > 1:
            figure = plots.comparison_figure({name: headline(result) for name, result in results.items()})
        else:
            ((name, result),) = results.items()
            figure = plots.figure_of(result) or plots.comparison_figure({name: headline(result)})
        plots.save(figure, out)
    elif out.suffix.lower() in (".html", ".htm"):
        write_whole(out, report(results).encode())
    else:
        raise EvaluationError(f"--out {out}: expected a name that ends in .html or .png.")
    width = max(len(label) for result in results.values() for label, _ in headline(result))
    for name, result in results.items():
        print(name)
        for label, found in headline(result):
            print(f"  {label:<{width}}  {percent(found)}")
    for difference in differences(results) if len(results) > 1 else ():
        print(f"do not compare without a look: {difference}")
    print(f"wrote {out}")
    return 0
