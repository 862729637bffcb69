"""``img2vid eval probe``: frozen features asked by linear, k-NN and attentive probes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from img2vid.choices import PROBES
from img2vid.command import progress_bar
from img2vid.commands import evaluation


def make_parser() -> argparse.ArgumentParser:
    parser = evaluation.evaluation_parser("probe", "What frozen features know, by small classifiers on top of them.")
    evaluation.add_data(parser)
    parser.add_argument("--train", required=True, nargs="+", metavar="LIST", help="videos to learn from")
    parser.add_argument("--probes", nargs="+", default=list(PROBES), choices=PROBES, help="default: all")
    parser.add_argument("--no-baseline", action="store_true", help="leave out the image model of the same weights")
    evaluation.add_views(parser)
    evaluation.add_compute(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    options = make_parser().parse_args(argv)
    import img2vid.evaluation.options as given
    from img2vid.checkpoints.native import load
    from img2vid.evaluation.probe import probe
    from img2vid.evaluation.processes import processes
    from img2vid.evaluation.results import write_result
    from img2vid.evaluation.tables import counted, show

    given.ready_to_write(options.out)
    with processes() as shared:
        train = given.lists_of(options, options.train, subset="train").videos
        test = given.lists_of(options, options.data, classes=options.classes or train.class_names).videos
        model = load(options.model)
        total = -(-len(train) // shared.world_size) + -(-len(test) // shared.world_size)
        with progress_bar("videos", total, shared.is_first) as advance:
            result = probe(
                model,
                train,
                test,
                given.views_of(options, model),
                kinds=options.probes,
                baseline=not options.no_baseline,
                **given.how_of(options, shared, advance),
            )
    if result is not None:
        write_result(result, options.out)
        learned = f"learned from {counted(result['train'])}"
        if result["data"]["also_in_train"]:
            learned += f"; {result['data']['also_in_train']} test videos are among the training videos"
        show(result, options.out, learned)
    return 0
