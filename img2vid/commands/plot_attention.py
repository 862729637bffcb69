"""``img2vid plot attention``: what a model looks at in a video."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "img2vid plot attention", description="Draw what a model looks at on the frames of a video.", allow_abbrev=False
    )
    parser.add_argument("--model", metavar="FOLDER", help="written by img2vid.convert or save_pretrained")
    parser.add_argument("--video", metavar="FILE")
    parser.add_argument("--num-frames", type=int, help="default: the model's own")
    parser.add_argument("--out", default="runs/attention.png", help="default: runs/attention.png")
    parser.add_argument("--self-test", action="store_true", help="plant a moving dot and see that it lights up")
    return parser


def main(argv: Sequence[str]) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.self_test:
        from img2vid.evaluation.dot import self_test

        lit = self_test()
        print("a planted moving dot lights up where it is" if lit else "FAILED: the planted dot does not light up")
        return 0 if lit else 1
    if options.model is None or options.video is None:
        parser.error("give --model and --video, or --self-test")
    from img2vid import read_clip
    from img2vid.checkpoints.native import load
    from img2vid.data.transforms import TestTransform
    from img2vid.evaluation.attention import attention_maps
    from img2vid.evaluation.conditions import video_part
    from img2vid.evaluation.errors import EvaluationError
    from img2vid.evaluation.reading import input_spec
    from img2vid.plots import attention_figure, save

    model = load(options.model)
    num_frames = model.config.num_frames if options.num_frames is None else options.num_frames
    size = video_part(model).config.tubelet_size
    if num_frames < 1 or num_frames % size:
        raise EvaluationError(
            f"--num-frames {num_frames}: expected a multiple of this model's tubelets of {size} frames."
        )
    pixels = read_clip(options.video, num_frames=num_frames)
    pixels = TestTransform(input_spec(model))(pixels)[0]  # (T, C, size, size)
    maps = attention_maps(model, model.normalize(pixels[None]).to(next(model.parameters()).dtype))
    if maps.refused:
        print(f"not drawn: spatial, rollout ({maps.refused})")
    if not maps.rows():
        raise EvaluationError("There is nothing to draw: no frame of this clip attends to another one either.")
    frames = pixels[size // 2 :: size].permute(0, 2, 3, 1).numpy()
    figure = attention_figure(frames, maps.rows(), maps.frame_to_frame, Path(options.video).name)
    print(f"wrote {save(figure, options.out)}")
    return 0
