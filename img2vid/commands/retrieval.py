"""``img2vid eval retrieval``: videos found by captions, and captions by videos."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from img2vid.command import progress_bar
from img2vid.commands import evaluation


def make_parser() -> argparse.ArgumentParser:
    parser = evaluation.evaluation_parser("retrieval", "Text-to-video and video-to-text retrieval.")
    evaluation.add_data(parser)
    parser.add_argument("--template", default="{}", help="what a caption is put into (default: {}, the caption alone)")
    parser.add_argument("--no-baseline", action="store_true", help="leave out the image model of the same weights")
    parser.add_argument("--predictions", action="store_true", help="keep the rank of every caption's video")
    parser.add_argument("--picture", metavar="FILE.png", help="draw what the first captions find, and similarities")
    evaluation.add_views(parser)
    evaluation.add_compute(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    options = make_parser().parse_args(argv)
    import img2vid.evaluation.options as given
    from img2vid.checkpoints.native import load
    from img2vid.evaluation.processes import processes
    from img2vid.evaluation.results import write_result
    from img2vid.evaluation.retrieval import retrieval
    from img2vid.evaluation.tables import show

    given.ready_to_write(options.out)
    if options.picture is not None:
        given.ready_to_write(options.picture)
        import img2vid.plots  # noqa: F401 (says now that matplotlib is missing, not after an hour)
    with processes() as shared:
        videos = given.lists_of(options, options.data, classes=None).videos
        model = load(options.model)
        with progress_bar("videos", -(-len(videos) // shared.world_size), shared.is_first) as advance:
            result = retrieval(
                model,
                videos,
                given.views_of(options, model),
                template=options.template,
                baseline=not options.no_baseline,
                keep_predictions=options.predictions,
                picture=options.picture,
                **given.how_of(options, shared, advance),
            )
    if result is not None:
        write_result(result, options.out)
        show(
            result, options.out if options.picture is None else f"{options.out}, {options.picture} and its similarities"
        )
    return 0
