"""``python -m tests.census``: run the census, and write its page."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.census.models import all_names
from tests.census.page import write_page
from tests.census.survey import RESULTS, survey, survey_modes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.census", description=__doc__)
    parser.add_argument("names", nargs="*", help="such as timm:vit_base_patch16_224 (default: all)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page, such as docs/backbones.md")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="keeps results between runs (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    options = parser.parse_args()
    rows = survey(options.names or all_names(), options.results / "rows.jsonl", options.workers)
    for row in rows:
        if row.outcome == "failed" or options.names:
            print(row)
    if options.write:
        write_page(rows, survey_modes(rows, options.results / "modes.jsonl", options.workers), options.write)


if __name__ == "__main__":
    main()
