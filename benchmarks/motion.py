"""Does it learn time, and keep what it knew? Motion and digits, zero-shot, on the synthetic motion set's test split.

    python -m benchmarks.motion runs/motion runs/train/nano_motion/version_0/model [more] [--json out.json]

For each model, and for the image model it was converted from:
    motion      of 8: that of the best of 80 captions, "the digit zero moving left", ...
    digit       of 10, on the same moving clips; nano_clip's own twelve templates, averaged
    still       of 10, on clips that show one frame of each video again and again
    opposite    share of the clips that, shown backwards, are taken for the opposite motion
    shuffled    motion, with each clip's frames in random order

A model with a classifier of motions has no texts any more: what it answers counts, and digits are not asked.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import img2vid
from img2vid.backbones.nano_clip import TEMPLATES
from img2vid.data.digits import DIGIT_WORDS
from img2vid.data.module import VideoData
from img2vid.data.synthetic import CLASS_NAMES, MOTIONS
from img2vid.data.transforms import InputSpec


def read_clips(motion_set: Path, num_frames: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """All test clips, uint8 (N, T, C, H, W), their motions (N,) and their digits (N,)."""
    spec = InputSpec(size, (0.5,) * 3, (0.5,) * 3)
    data = VideoData(
        test_list=str(motion_set / "test.csv"),
        classes=list(CLASS_NAMES),
        num_frames=num_frames,
        batch_size=64,
        num_workers=0,
        spec=spec,
    )
    data.setup()
    batches = list(data.test_dataloader())
    words = [caption.split()[2] for batch in batches for caption in batch["caption"]]
    return (
        torch.cat([batch["clip"][:, 0] for batch in batches]),
        torch.cat([batch["label"] for batch in batches]),
        torch.tensor([DIGIT_WORDS.index(word) for word in words]),
    )


def input_size(model) -> int:
    return getattr(model, "visual", model).tower.image_size[0]


@torch.no_grad()
def classes(model, prompts: list[list[str]]) -> Tensor:
    """Prompts of each class -> (classes, D): normalised, averaged, normalised."""
    text = model.encode_text(model.tokenize([p for of_class in prompts for p in of_class]), normalize=True)
    return F.normalize(text.unflatten(0, (len(prompts), -1)).mean(dim=1), dim=-1)


@torch.no_grad()
def features(model, clips: Tensor) -> Tensor:
    return torch.cat([model.encode_video(model.normalize(part), normalize=True) for part in clips.split(64)])


def measure(model, clips: Tensor, motion: Tensor, digit: Tensor) -> dict[str, float]:
    pairs = [pair for forth in MOTIONS for pair in (forth, forth[::-1])]
    opposite = torch.tensor([CLASS_NAMES.index(dict(pairs)[name]) for name in CLASS_NAMES])
    orders = torch.rand(clips.shape[:2], generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    shuffled = torch.stack([clip[order] for clip, order in zip(clips, orders, strict=True)])
    middle = clips[:, clips.shape[1] // 2, None].expand_as(clips)
    has_texts = hasattr(model, "encode_text")
    motions_of = by_captions(model) if has_texts else classified(model)

    def share(found: Tensor, wanted: Tensor) -> float:
        return (found == wanted).float().mean().item()

    found = {
        "motion": share(motions_of(clips), motion),
        "opposite": share(motions_of(clips.flip(1)), opposite[motion]),
        "shuffled": share(motions_of(shuffled), motion),
    }
    if has_texts:
        digits = classes(model, [[template.format(word) for template in TEMPLATES] for word in DIGIT_WORDS])
        for name, shown in (("digit", clips), ("still", middle)):
            found[name] = share((features(model, shown) @ digits.T).argmax(dim=1), digit)
    return found


def by_captions(model) -> Callable[[Tensor], Tensor]:
    """Clips (N, T, C, H, W) -> motions (N,): that of the best of 80 captions."""
    captions = [[f"the digit {word} {name}"] for name in CLASS_NAMES for word in DIGIT_WORDS]
    texts = classes(model, captions)  # (80, D), ten of each motion
    return lambda clips: (features(model, clips) @ texts.T).argmax(dim=1) // len(DIGIT_WORDS)


def classified(model) -> Callable[[Tensor], Tensor]:
    """Clips (N, T, C, H, W) -> motions (N,): what the model's classifier says."""
    places = torch.tensor([CLASS_NAMES.index(name) for name in model.class_names])

    @torch.no_grad()
    def motions(clips: Tensor) -> Tensor:
        return places[torch.cat([model(model.normalize(part)).argmax(dim=1) for part in clips.split(64)])]

    return motions


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.motion", description=__doc__.split("\n")[0])
    parser.add_argument("motion_set", type=Path, help="folder written by img2vid data synth")
    parser.add_argument("models", nargs="+", help="model folders, or nano_clip as it is")
    parser.add_argument("--num-frames", type=int, help="frames per clip (default: the model's own)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(argv)
    results = {}
    for name in options.models:
        model = img2vid.convert(name, num_frames=4) if name == "nano_clip" else img2vid.load(name)
        num_frames = options.num_frames or model.config.num_frames
        numbers = measure(
            model, *read_clips(options.motion_set, num_frames, getattr(model, "visual", model).tower.image_size[0])
        )
        results[name] = numbers
        print(name, *(f"{key} {value:.1%}" for key, value in numbers.items()), sep="  ", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
