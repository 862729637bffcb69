"""Rebuild nano_clip, the image-text model inside the package: its tokenizer's merges and its weights, from one seed.

    python scripts/train_nano_clip.py            # about 13 minutes on two idle CPU cores
    python scripts/train_nano_clip.py --help

The pictures are made as training goes: one of the 1,258 handwritten digits of the training split, drawn by
`img2vid.data.digits` in a random style on a random background, then degraded a little, as video coding would.

The loss is open_clip's ClipLoss, on groups of ten. A plain batch would hold many pictures of the same digit, each of
them a false negative for the others' captions; in a group every digit occurs once, so each wrong pair is truly wrong.
"""

import argparse
import gzip
import io
import json
import math
import os
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.pos_embed import get_2d_sincos_pos_embed
from PIL import Image
from safetensors.torch import save_file

from img2vid.backbones.nano_clip import (
    CONFIG_PATH,
    MERGES_PATH,
    NANO_CLIP_DIR,
    TEMPLATES,
    WEIGHTS_PATH,
    classify_digits,
    images_to_input,
    load_nano_clip,
    nano_clip_tokenizer,
)
from img2vid.data.digits import DIGIT_WORDS, draw, load_digits, random_background, random_style

# Words that are single tokens, besides those of the captions. The image model never sees the motion words: they are
# here so that a video model, trained on from this one, reads "moving left" as two tokens rather than ten letters.
WORDS = """
    a an the this that these is are was be being of in on at to from by with without and or not no its it some
    photo picture image drawing painting video clip frame film movie scene animation recording
    digit digits number numbers numeral figure object shape thing person hand written handwritten
    moving moves move motion still standing static going coming staying
    left right up down upward upwards downward downwards leftward rightward forward backward sideways diagonally
    growing grows grow shrinking shrinks shrink getting becoming larger smaller bigger zooming zoom
    rotating rotates rotate rotation turning turns turn spinning spins clockwise counterclockwise anticlockwise
    appearing disappearing entering leaving fading bouncing falling rising jumping running walking
    fast slow quickly slowly before after then while first last next
    top bottom middle centre center corner side across over under around towards away into out
    big small large little tiny huge bright dark light pale blurry sharp clear
    red orange yellow green blue purple pink brown black white grey gray
    coloured colored colourful plain textured gradient noisy smooth background canvas somewhere
    zero one two three four five six seven eight nine ten
"""

EVAL_SEED = 1234  # the pictures on which accuracy is reported; the test suite draws its own
WARMUP_STEPS = 100
EASED_SHARE = 0.25  # of the steps, over which the pictures go from easy to full difficulty


def learn_merges(words):
    """Byte-pair merges that make a single token of each word, the most frequent pair first.

    Returns:
        A list of pairs of symbols; a word's last symbol ends in "</w>", as in open_clip's SimpleTokenizer.
    """
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges = []
    while True:
        pairs = Counter(pair for spelling in spellings for pair in pairwise(spelling))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for spelling in spellings:
            for i in range(len(spelling) - 2, -1, -1):
                if tuple(spelling[i : i + 2]) == best:
                    spelling[i : i + 2] = ["".join(best)]


def write_merges(path):
    """Learn the merges of the captions' words and WORDS, and write them in the format of SimpleTokenizer."""
    words = (
        WORDS.split()
        + [word for template in TEMPLATES for word in template.split() if word != "{}"]
        + list(DIGIT_WORDS)
    )
    lines = ["#nano_clip byte-pair merges, most frequent first"] + [" ".join(pair) for pair in learn_merges(words)]
    # No newline at the end: SimpleTokenizer would read it as one more, empty, merge. mtime=0: equal words, equal bytes.
    write_atomically(path, lambda temporary: temporary.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0)))


def write_atomically(path, write):
    """Call `write` with a temporary path beside `path`, then move the result there: no half-written file remains."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def degrade(rng, images):
    """Blur half of the pictures and pass half through JPEG, as scaling and video coding would. uint8 (n, H, W, 3)."""
    blurred = images.astype(np.float32)
    for axis in (1, 2):  # the binomial kernel 1 2 1, along rows and columns
        width = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(blurred, width, mode="edge")
        before, after = (np.take(padded, np.arange(images.shape[axis]) + shift, axis=axis) for shift in (0, 2))
        blurred = (before + 2 * blurred + after) / 4
    strength = rng.uniform(-1, 1, (len(images), 1, 1, 1)).clip(0)  # half of them stay sharp
    images = np.rint(images + strength * (blurred - images)).astype(np.uint8)
    for i in np.flatnonzero(rng.random(len(images)) < 0.5):
        coded = io.BytesIO()
        Image.fromarray(images[i]).save(coded, "JPEG", quality=int(rng.integers(30, 96)))
        images[i] = np.asarray(Image.open(coded))
    return images


def ease(background, style, amount):
    """Make pictures easier, by an amount from 0 (as they are) to 1: large, upright, in the middle, black and white.

    Started on the full task, the model stays at chance for many hundred steps; started here, it learns from the first.
    """
    size, hard = background.shape[1], 1 - amount
    # Each picture moves towards its own side, light on dark or dark on light: crossing over would hide the digit.
    lighter = style["colour"].mean(axis=1) >= background.mean(axis=(1, 2, 3))  # (n,)
    ink, paper = np.where(lighter, 255.0, 0.0)[:, None], np.where(lighter, 0.0, 255.0)[:, None, None, None]
    eased = {
        "centre": size / 2 + hard * (style["centre"] - size / 2),
        "scale": size * 0.9 + hard * (style["scale"] - size * 0.9),
        "angle": hard * style["angle"],
        "colour": ink + hard * (style["colour"] - ink),
    }
    return np.rint(paper + hard * (background - paper)).astype(np.uint8), eased


def training_batch(rng, digits, by_label, groups, size, easing):
    """Pictures in `groups` groups of ten, the digits 0 to 9 in each: uint8 (groups * 10, size, size, 3)."""
    chosen = np.stack([rng.choice(members, groups) for members in by_label], axis=1)  # (groups, 10)
    background = random_background(rng, groups * 10, size)
    background, style = ease(background, random_style(rng, background), easing)
    return degrade(rng, draw(digits[chosen.ravel()], background=background, **style))


def evaluation_pictures(split, size, kinds, repeats=1, seed=EVAL_SEED):
    """Each digit of a split drawn `repeats` times: uint8 pictures (n, size, size, 3) and their labels (n,)."""
    rng = np.random.default_rng(seed)
    digits, labels = load_digits(split)
    digits, labels = np.tile(digits, (repeats, 1, 1)), np.tile(labels, repeats)
    background = random_background(rng, len(digits), size, kinds)
    return draw(digits, background=background, **random_style(rng, background)), torch.from_numpy(labels)


def parameter_groups(model, weight_decay):
    """Decay the matrices; leave biases, norms and embeddings: a token not yet seen must not shrink to nothing."""
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        (keep if parameter.ndim < 2 or "embedding" in name else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


def learning_rate(step, steps, peak):
    """Linear warm-up, then a cosine down to zero."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    return peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def initialise(model):
    """Start the image tower's position embedding from sines and cosines, so that it begins with a sense of place."""
    position = model.visual.positional_embedding  # (1 + grid * grid, width)
    grid = get_2d_sincos_pos_embed(position.shape[1], model.visual.grid_size[0], cls_token=True)
    with torch.no_grad():
        position.copy_(0.3 * torch.from_numpy(grid))  # a third of full strength: the patches must be heard


def train(model, tokenizer, args):
    """Train the model in place; returns it in eval mode."""
    initialise(model)
    size = model.visual.image_size[0]
    digits, labels = load_digits("train")
    by_label = [np.flatnonzero(labels == digit) for digit in range(10)]
    captions = tokenizer([template.format(word) for template in TEMPLATES for word in DIGIT_WORDS])
    captions = captions.view(len(TEMPLATES), 10, -1)  # (templates, 10, context_length)
    rng = np.random.default_rng(args.seed)

    loss_function = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.98), fused=True)
    started, running = time.perf_counter(), None
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        easing = max(0.0, 1 - step / (EASED_SHARE * args.steps))
        pictures = training_batch(rng, digits, by_label, args.groups, size, easing)
        templates = rng.choice(len(TEMPLATES), args.templates, replace=False)

        model.train()
        image_features = model.encode_image(images_to_input(pictures, model), normalize=True)  # (groups * 10, D)
        text_features = model.encode_text(captions[templates].flatten(0, 1), normalize=True)  # (templates * 10, D)
        scale = model.logit_scale.exp()
        texts = text_features.split(10)
        losses = [
            loss_function(images, texts[i % len(texts)], scale) for i, images in enumerate(image_features.split(10))
        ]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # as CLIP does

        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            model.eval()
            accuracy = evaluate(model, tokenizer, "val")
            minutes = (time.perf_counter() - started) / 60
            left = minutes / (step + 1) * (args.steps - step - 1)
            print(
                f"step {step + 1}/{args.steps}  loss {running:.3f}  val plain {accuracy['plain']:.3f} "
                f"textured {accuracy['textured']:.3f}  {minutes:.1f} min, {left:.1f} to go",
                flush=True,
            )
    return model.eval()


def evaluate(model, tokenizer, split, repeats=1):
    """Zero-shot accuracy on the digits of a split, on plain and on textured backgrounds."""
    accuracy = {}
    for name, kinds in (("plain", ("plain",)), ("textured", ("gradient", "noise"))):
        pictures, labels = evaluation_pictures(split, model.visual.image_size[0], kinds, repeats)
        accuracy[name] = (classify_digits(model, pictures, tokenizer) == labels).float().mean().item()
    return accuracy


def parse_args():
    parser = argparse.ArgumentParser(
        description="Rebuild nano_clip: the tokenizer's merges and the weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=NANO_CLIP_DIR, help="folder that receives the two files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of every picture")
    parser.add_argument("--steps", type=int, default=2300, help="training steps")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--groups", type=int, default=10, help="groups of ten pictures in a step")
    parser.add_argument("--templates", type=int, default=2, help="caption templates in a step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="AdamW's weight decay of the matrices")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between two looks at the val split")
    args = parser.parse_args()
    for name in ("steps", "threads", "groups", "eval_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not 1 <= args.templates <= len(TEMPLATES):
        parser.error(f"--templates must be from 1 to {len(TEMPLATES)}, got {args.templates}")
    return args


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    merges = args.out / MERGES_PATH.name
    write_merges(merges)
    tokenizer = nano_clip_tokenizer(merges)

    model = load_nano_clip(pretrained=False)
    if tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            f"the merges give {tokenizer.vocab_size} tokens but {CONFIG_PATH.name} says {model.vocab_size}: "
            f"set text_cfg.vocab_size to {tokenizer.vocab_size} there"
        )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"nano_clip: {parameters:,} parameters, {tokenizer.vocab_size} tokens, seed {args.seed}", flush=True)

    started = time.perf_counter()
    train(model, tokenizer, args)
    minutes = (time.perf_counter() - started) / 60

    model.half().float()  # what the file holds is what is measured
    accuracy = evaluate(model, tokenizer, "test", repeats=5)
    facts = {
        "model": "nano_clip",
        "data": "scikit-learn digits (UCI optical recognition of handwritten digits), train split",
        "settings": json.dumps({name: value for name, value in vars(args).items() if name != "out"}, sort_keys=True),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "minutes": f"{minutes:.1f}",
        "test_accuracy": json.dumps({name: round(value, 4) for name, value in accuracy.items()}),
    }
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    path = args.out / WEIGHTS_PATH.name
    write_atomically(path, lambda temporary: save_file(weights, temporary, metadata=facts))
    print(f"test plain {accuracy['plain']:.4f} textured {accuracy['textured']:.4f}, {minutes:.1f} minutes")
    print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB) and {merges}")


if __name__ == "__main__":
    main()
