"""``img2vid caption``: what happens in a video, in the words of CoCa's or BLIP's text decoder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="img2vid caption",
        description="Captions of videos, by a converted CoCa or BLIP; at step 0 a still video has its image's caption.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a model folder with a text decoder")
    parser.add_argument("--video", required=True, nargs="+", metavar="FILE", help="videos, or folders of frames")
    parser.add_argument("--num-frames", type=int, metavar="T", help="frames of each video (default: the model's)")
    parser.add_argument("--num-beams", type=int, default=1, help="texts in the running; 1 is greedy (default: 1)")
    parser.add_argument("--max-tokens", type=int, default=30, help="length of a caption at most (default: 30)")
    parser.add_argument("--min-tokens", type=int, default=5, help="length of a caption at least (default: 5)")
    parser.add_argument("--prompt", metavar="TEXT", help="how every caption begins")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="BLIP's tokenizer, where the model's own folder or repository is gone"
    )
    parser.add_argument("--json", action="store_true", help="print captions by video as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    options = make_parser().parse_args(argv)
    from img2vid.captioning import CaptionError, Decoding, caption, check_captioner, frames_of, tokenizer_of
    from img2vid.checkpoints.native import load

    decoding = Decoding(options.num_beams, options.max_tokens, options.min_tokens)
    if options.num_frames is not None and options.num_frames < 1:
        raise CaptionError(f"--num-frames {options.num_frames}: expected at least 1.")
    model = load(options.model)
    check_captioner(model)
    tokenizer = tokenizer_of(model, options.tokenizer)
    captions = {}
    for video in options.video:
        clip = frames_of(video, model, options.num_frames or model.config.num_frames)
        captions[video] = caption(model, clip.unsqueeze(0), tokenizer, decoding, options.prompt)[0]
        if not options.json:
            print(f"{video}: {captions[video]}")
    if options.json:
        print(json.dumps(captions, indent=2, ensure_ascii=False))
    return 0
