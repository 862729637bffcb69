"""Ways of fine-tuning compared: what each learns of motion, what it keeps of digits, and what a step of it costs.

    python -m benchmarks.recipes runs/motion --steps 300 --out runs/recipes [--only lora]

Each recipe is a file of configs/train/recipes on top of configs/train/nano_motion.yaml: all with the same clips, rates,
steps and text tower. A recipe that is finished is not trained again. Costs are measured first and apart: of the video
tower's step (forward, backward, AdamW) on the training's batch, where recipes take turns; and counted for CLIP ViT-B/16
with 8 frames of 224 x 224, one clip a step.

    OUT/trials/*.json    one per recipe: its numbers and its validation curve
    OUT/recipes.json     all of them, with what they share and what they cost
    OUT/recipes.md       the table
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from benchmarks import trials
from benchmarks.timing import Run, ratio, take_turns
from benchmarks.trials import END
from img2vid.backbones import load_backbone
from img2vid.config import VideoConfig
from img2vid.footprint import Footprint, measure, measure_on_nothing
from img2vid.model import VideoModel
from img2vid.tuning import Tuning, eval_frozen, freeze
from img2vid.two_towers import build_model

FOLDER = trials.CONFIG.parent / "recipes"
NAMES = ("full", "temporal_only", "lora", "aim", "st_adapter", "vpt", "linear_probe")
FIRST = NAMES[0]  # what costs are shares of
ROUNDS = 15  # of steps that are timed


def settings(config: Path, name: str) -> tuple[dict[str, Any], str]:
    """What a recipe asks of the video model, and what it freezes."""
    base, recipe = (yaml.safe_load(path.read_text())["model"] for path in (config, FOLDER / f"{name}.yaml"))
    video = base["video"] | recipe.get("video", {})
    is_probe = recipe.get("objective", {}).get("init_args", {}).get("head") == "linear"
    return video | ({"num_classes": 8} if is_probe else {}), recipe["how"]["freeze"]


def tower(video: dict[str, Any], policy: str, on_meta: bool = False) -> VideoModel:
    """The video tower of a recipe, frozen as it says, its gates opened: nothing may be saved because it is zero."""
    config = VideoConfig.from_dict(video)
    model = build_model(load_backbone(config.backbone, random_weights=not on_meta, on_meta=on_meta), config)
    model = getattr(model, "visual", model)
    if not on_meta:
        for parameter in model.zero_parameters().values():
            nn.init.normal_(parameter, std=0.02)
    freeze(model, policy)
    model.train()
    eval_frozen(model)
    return model


def step_of(model: VideoModel, batch: int) -> Run:
    """Forward, backward and AdamW on random clips."""
    clips = torch.randn(batch, model.config.num_frames, 3, *model.tower.image_size)
    optimizer, _ = Tuning().build(model, total_steps=1000)

    def step() -> None:
        model(clips).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bytes_of(found: Footprint, trainable: int) -> int:
    """What a step needs beside the weights, at its peak: activations, gradients, and AdamW's two moments."""
    return found.peak_bytes + 2 * 4 * trainable


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def costs(config: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By recipe: parameters that learn, step time and memory as shares of the first one's."""
    batch = yaml.safe_load(config.read_text())["data"]["batch_size"]
    names = list(dict.fromkeys([FIRST, *names]))
    steps, found = {}, {}
    for name in names:
        video, policy = settings(config, name)
        model = tower(video, policy)
        clips = torch.randn(batch, model.config.num_frames, 3, *model.tower.image_size)
        small = measure(model, lambda model=model, clips=clips: model(clips).square().mean(), [clips])
        eval_frozen(model)  # measuring puts all of it in training mode
        steps[name] = step_of(model, batch)
        large = tower(video | {"backbone": "clip_b16", "num_frames": 8}, policy, on_meta=True)
        counted = measure_on_nothing(large, 1)
        found[name] = {
            "trainable": trainable(model),
            "bytes": bytes_of(small, trainable(model)),
            "clip_b16": {
                "trainable": trainable(large),
                "bytes": bytes_of(counted, trainable(large)),
                "flops": counted.step_flops,
            },
        }
    seconds = take_turns(steps, ROUNDS)
    for name in names:
        found[name]["time"] = ratio(seconds, name, FIRST)
    return found


def table(results: Sequence[dict[str, Any]], first: dict[str, Any]) -> str:
    """Markdown, one row per recipe; costs as shares of full fine-tuning's."""
    lines = [["recipe", "motion", "digit", "backwards", "steps to 50 %", "learns", "step time", "memory"]]
    lines[0] += ["CLIP B/16: learns", "FLOPs", "memory"]
    for result in results:
        end, own = result[END], result["costs"]
        large, largest = own["clip_b16"], first["clip_b16"]
        median, low, high = own["time"]
        lines.append(
            [
                f"`{result['name']}`",
                *(f"{end[key]:.1%}" if key in end else "no texts" for key in ("motion", "digit", "opposite")),
                str(result["steps_to_half"] or "not reached"),
                f"{own['trainable']:,}",
                f"{median:.2f} ({low:.2f} to {high:.2f})",
                f"{own['bytes'] / first['bytes']:.2f}",
                f"{large['trainable'] / 1e6:.1f} M" if large["trainable"] >= 1e5 else f"{large['trainable']:,}",
                *(f"{large[key] / largest[key]:.2f}" for key in ("flops", "bytes")),
            ]
        )
    return trials.as_markdown(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = trials.parser("recipes", __doc__, "runs/recipes", "lora")
    options, chosen, shared = trials.read(parser, argv, NAMES)
    cost = costs(options.config, chosen)
    asked = {name: ([options.config, FOLDER / f"{name}.yaml"], {}) for name in chosen}
    for results in trials.run_all(asked, options, shared):
        both = [result | {"costs": cost[result["name"]]} for result in results]
        trials.write(options.out / "recipes.json", json.dumps(both, indent=2) + "\n")
        trials.write(options.out / "recipes.md", table(both, cost[FIRST]))
    print(f"Wrote {options.out / 'recipes.md'} and recipes.json beside it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
