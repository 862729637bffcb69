"""``img2vid eval zero-shot``: videos named by words, with the image model of the same weights beside it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from img2vid.choices import FUSIONS, PROTOCOLS
from img2vid.command import progress_bar
from img2vid.commands import evaluation


def make_parser() -> argparse.ArgumentParser:
    parser = evaluation.evaluation_parser("zero-shot", "Zero-shot classification of videos, and what time added to it.")
    evaluation.add_data(parser)
    group = parser.add_argument_group("protocol")
    group.add_argument("--protocol", default="list", choices=PROTOCOLS, help="docs/evaluation.md (default: list)")
    evaluation.add_templates(group)
    group.add_argument("--fusion", choices=FUSIONS, help="of views (default: feature)")
    group.add_argument("--num-rounds", type=int, default=10, help="of protocol halves (default: 10)")
    group.add_argument("--class-splits", nargs="+", default=(), metavar="FILE", help="classes of each round")
    group.add_argument("--base-classes", metavar="FILE", help="of base-to-novel (default: the first half)")
    group.add_argument("--no-baseline", action="store_true", help="leave out the image model of the same weights")
    group.add_argument("--predictions", action="store_true", help="keep what was said of each video")
    evaluation.add_views(parser)
    evaluation.add_compute(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    options = make_parser().parse_args(argv)
    import img2vid.evaluation.options as given
    from img2vid.checkpoints.native import load
    from img2vid.evaluation.processes import processes
    from img2vid.evaluation.results import write_result
    from img2vid.evaluation.tables import show
    from img2vid.evaluation.zero_shot import zero_shot

    given.ready_to_write(options.out)
    with processes() as shared:
        lists = given.lists_of(options, options.data, options.protocol)
        model = load(options.model)
        with progress_bar("videos", -(-len(lists.videos) // shared.world_size), shared.is_first) as advance:
            result = zero_shot(
                model,
                lists,
                given.views_of(options, model),
                templates=given.templates_of(options),
                protocol=options.protocol,
                fusion=options.fusion,
                baseline=not options.no_baseline,
                keep_predictions=options.predictions,
                num_rounds=options.num_rounds,
                class_splits=options.class_splits,
                base_classes=options.base_classes,
                **given.how_of(options, shared, advance),
            )
    if result is not None:
        write_result(result, options.out)
        show(result, options.out)
    return 0
