"""How time is best put in: temporal_init x gate x prefix_mode, each trained alike on the synthetic motion set.

    python -m benchmarks.ablation runs/motion --steps 300 --out runs/ablation [--only copy/tanh]

Every cell is `img2vid train` with configs/train/nano_motion.yaml, shortened to --steps (warm-up and cosine included),
and measured as `python -m benchmarks.motion` does. One more row, the control, is space_only. A cell that is finished is
not trained again, so a stopped ablation goes on where it was.

    OUT/trials/*.json    one per cell: its numbers and its validation curve
    OUT/ablation.json    all of them, with the settings they share
    OUT/ablation.md      the table
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import product
from typing import Any, get_args

from benchmarks import trials
from benchmarks.trials import END, START
from img2vid.config import Gate, PrefixMode, TemporalInit

FACTORS = {"temporal_init": get_args(TemporalInit), "gate": get_args(Gate), "prefix_mode": get_args(PrefixMode)}
CONTROL = {"attention": "space_only"}


def cells() -> dict[str, dict[str, str]]:
    """By name, what each cell asks of the video model, one prefix_mode after the other; the control comes last."""
    found = [dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())]
    found.sort(key=lambda cell: FACTORS["prefix_mode"].index(cell["prefix_mode"]))
    return {"/".join(cell.values()): cell for cell in [*found, CONTROL]}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown, one row per cell, in the order of the factors."""
    lines = [[*FACTORS, "motion, digit at step 0", "steps to 50 %"]]
    lines[0] += ["motion", "digit", "still", "backwards", "shuffled", "loss", "branch / stream"]
    for found in results:
        start, end, name = found[START], found[END], found["name"]
        lines.append(
            [
                *(name.split("/") if "/" in name else [name, "", ""]),
                f"{start['motion']:.1%}, {start['digit']:.1%}",
                str(found["steps_to_half"] or "not reached"),
                *(f"{end[key]:.1%}" for key in ("motion", "digit", "still", "opposite", "shuffled")),
                *(f"{trials.last(found[key]):.2f}" if found[key] else "-" for key in ("loss", "branch")),
            ]
        )
    return trials.as_markdown(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = trials.parser("ablation", __doc__, "runs/ablation", "copy/tanh")
    options, chosen, shared = trials.read(parser, argv, list(cells()))
    asked = {
        name: ([options.config], {f"model.video.{key}": value for key, value in cells()[name].items()})
        for name in chosen
    }
    for results in trials.run_all(asked, options, shared):
        trials.write(options.out / "ablation.json", json.dumps(results, indent=2) + "\n")
        trials.write(options.out / "ablation.md", table(results))
    print(f"Wrote {options.out / 'ablation.md'} and ablation.json beside it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
