"""Where a subject's time goes, operator by operator, as text.

    python -m benchmarks.operators "img2vid fused" transformers --size ViT-B/16 --num-frames 8
    python -m benchmarks.operators img2vid "img2vid temporal only" --step         # forward and backward
    python -m benchmarks.operators stream "image model" --num-frames 1          # a frame of a stream with a window of 8

Milliseconds that operators took themselves, without those they call, by torch's profiler, of the median of some calls;
one column for each subject (benchmarks/subjects.py). The profiler slows what it watches, small operators most.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch.profiler import ProfilerActivity

from benchmarks.limit import VIT
from benchmarks.subjects import Missing, inference, training_step

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mkldnn_convolution", "convolution_backward", "mkldnn_linear")


def operators(run: Callable[[], object], calls: int = 3) -> dict[str, float]:
    """Milliseconds of each operator in one call, the median of several."""
    run()
    found: list[dict[str, float]] = []
    for _ in range(calls):
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
            run()
        found.append({event.key: event.self_cpu_time_total / 1000 for event in profiler.key_averages()})
    names = {name for one in found for name in one}
    return {name: statistics.median([one.get(name, 0.0) for one in found]) for name in names}


def named(times: dict[str, float]) -> dict[str, float]:
    """By what they are: matrix products together, the others by their own names."""
    groups: dict[str, float] = {}
    for name, value in times.items():
        short = name.removeprefix("aten::")
        name = "matrix products" if short in PRODUCTS else short
        groups[name] = groups.get(name, 0.0) + value
    return groups


def table(columns: dict[str, dict[str, float]], most: int) -> list[str]:
    """The operators that take longest anywhere, one a row; what is left in one row."""
    longest = {name: max(c.get(name, 0.0) for c in columns.values()) for c in columns.values() for name in c}
    rows = sorted(longest, key=lambda name: -longest[name])
    width = max(map(len, (*rows[:most], "all others")))
    widths = {name: max(9, len(name)) for name in columns}
    lines = [" " * width + "".join(f"  {name:>{widths[name]}}" for name in columns)]

    def line(name: str, values: dict[str, float]) -> str:
        return f"{name:<{width}}" + "".join(f"  {values[column]:>{widths[column]}.1f}" for column in columns)

    for name in rows[:most]:
        lines.append(line(name, {column: times.get(name, 0.0) for column, times in columns.items()}))
    others = {column: sum(times.get(name, 0.0) for name in rows[most:]) for column, times in columns.items()}
    everything = {column: sum(times.values()) for column, times in columns.items()}
    return [*lines, line("all others", others), line("all", everything)]


def stream_of(size: str, dtype: torch.dtype) -> Callable[[], object]:
    """One frame of a stream that has seen as many as its window holds."""
    import img2vid
    from benchmarks.subjects import image_model, opened

    model = opened(img2vid.convert(image_model(size), num_frames=8, causal=True)).eval().to(dtype).fuse()
    stream, frame = model.stream(window=8), torch.randn(1, 3, 224, 224, dtype=dtype)
    with torch.no_grad():
        for _ in range(8):
            stream(frame)
    return lambda: stream(frame)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.operators", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subjects", nargs="+", metavar="SUBJECT", help="names of benchmarks/subjects.py, or stream")
    parser.add_argument("--size", choices=VIT, default="ViT-B/16")
    parser.add_argument("--num-frames", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="weights in bfloat16; with --step, autocast")
    parser.add_argument("--step", action="store_true", help="a training step instead of a forward")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--most", type=int, default=12, metavar="N", help="rows (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    dtype, columns = torch.bfloat16 if options.bf16 else torch.float32, {}
    for name in options.subjects:
        make = partial(inference, name, options.size, options.num_frames, dtype=dtype)
        if name == "stream":
            make = partial(stream_of, options.size, dtype)
        elif options.step:
            make = partial(training_step, name, options.size, options.num_frames, bf16=options.bf16)
        try:
            columns[name] = named(operators(make()))
        except Missing as error:
            print(f"left out: {name} ({error})")
        except ValueError as error:
            parser.error(str(error))
    print("\n".join(table(columns, options.most)) if columns else "nothing was measured")
    return 0 if columns else 1


if __name__ == "__main__":
    sys.exit(main())
