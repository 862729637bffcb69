"""``img2vid eval honesty``: does the order of frames matter to a model at all?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from img2vid.choices import FUSIONS
from img2vid.command import progress_bar
from img2vid.commands import evaluation


def make_parser() -> argparse.ArgumentParser:
    parser = evaluation.evaluation_parser("honesty", "Was time learned? The same videos, frames in other orders.")
    parser.add_argument("--no-picture", action="store_true", help="write no PNG beside the result")
    evaluation.add_data(parser)
    evaluation.add_templates(parser)
    parser.add_argument("--fusion", choices=FUSIONS, help="of views (default: feature)")
    evaluation.add_views(parser)
    evaluation.add_compute(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    options = make_parser().parse_args(argv)
    import img2vid.evaluation.options as given
    from img2vid.checkpoints.native import load
    from img2vid.evaluation.honesty import honesty
    from img2vid.evaluation.processes import processes
    from img2vid.evaluation.results import write_result
    from img2vid.evaluation.tables import show

    given.ready_to_write(options.out)
    if not options.no_picture:
        from img2vid.plots import honesty_figure, save  # says now, not after an hour, that matplotlib is not there
    with processes() as shared:
        lists = given.lists_of(options, options.data)
        model = load(options.model)
        with progress_bar("videos", -(-len(lists.videos) // shared.world_size), shared.is_first) as advance:
            result = honesty(
                model,
                lists,
                given.views_of(options, model),
                templates=given.templates_of(options),
                fusion=options.fusion,
                **given.how_of(options, shared, advance),
            )
    if result is not None:
        written = write_result(result, options.out)
        if not options.no_picture:
            picture = save(honesty_figure(result), written.with_suffix(".png"))
            written = f"{written} and {picture}"
        show(result, written)
    return 0
