"""nano_clip: a small image-text model with its trained weights, inside the package.

An open_clip model, built and loaded by open_clip's own factory from three files beside this module: the model config,
the weights in half precision, and the tokenizer's merges. README.md is the model card.
"""

from functools import cache
from pathlib import Path

from img2vid.data.digits import DIGIT_WORDS

NANO_CLIP = "nano_clip"  # the name that open_clip's factory knows the model by, once it is registered
NANO_CLIP_DIR = Path(__file__).resolve().parent
CONFIG_PATH = NANO_CLIP_DIR / "nano_clip.json"
WEIGHTS_PATH = NANO_CLIP_DIR / "nano_clip.safetensors"
MERGES_PATH = NANO_CLIP_DIR / "nano_clip_merges.txt.gz"

# Captions of a digit; zero-shot classification averages over all of them. Their lengths differ on purpose: the end of
# the text, where the text tower reads out, must not always be at the same position.
TEMPLATES = (
    "a photo of the digit {}",
    "a photo of a {}",
    "a picture of the number {}",
    "the handwritten digit {}",
    "a small image of the digit {}",
    "digit {}",
    "the number {} written by hand",
    "a video frame of the digit {}",
    "the digit {} on a coloured background",
    "this is a {}",
    "a blurry picture of the digit {} somewhere on the canvas",
    "{}",
)


@cache
def register_nano_clip():
    """Make "nano_clip" known to open_clip's factory; once for each process. Returns the name."""
    import open_clip

    open_clip.add_model_config(CONFIG_PATH)
    return NANO_CLIP


def load_nano_clip(pretrained=True):
    """Build nano_clip with open_clip's factory.

    Args:
        pretrained: True for the weights in the package, False for random weights, or the path of a weights file.

    Returns:
        An `open_clip.model.CLIP` in float32 and in eval mode.
    """
    import open_clip

    weights = WEIGHTS_PATH if pretrained is True else pretrained
    if weights and not Path(weights).is_file():
        raise FileNotFoundError(
            f"no nano_clip weights at {weights}. The package's own are rebuilt by `python scripts/train_nano_clip.py`; "
            "pretrained=False builds the model with random weights"
        )
    return open_clip.create_model(register_nano_clip(), pretrained=str(weights) if weights else None).eval()


def nano_clip_tokenizer(merges=MERGES_PATH):
    """The tokenizer: open_clip's SimpleTokenizer over nano_clip's own merges.

    Words of the captions are single tokens; any other text falls back to pieces, down to bytes. What does not fit the
    context is cut off, as in every CLIP.

    Returns:
        A callable from a text, or a list of n texts, to a LongTensor (n, context_length).
    """
    import open_clip

    # The path in the config is only a name: open_clip would look for it in the working directory. (Without it,
    # get_tokenizer("nano_clip") alone would not fail, but return CLIP's 49,408 tokens, far outside this vocabulary.)
    return open_clip.get_tokenizer(register_nano_clip(), bpe_path=str(merges))


def images_to_input(images, model):
    """uint8 pictures (n, height, width, 3) at the model's own size -> its normalised float input (n, 3, height, width).

    The same as open_clip's own transform for pictures that need no resizing, for a whole batch at once.
    """
    import torch

    size = tuple(model.visual.image_size)
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (*size, 3):
        raise ValueError(
            f"images must be uint8 of shape (n, {size[0]}, {size[1]}, 3), got {images.dtype} {tuple(images.shape)}"
        )
    mean, std = (torch.tensor(model.visual.preprocess_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def classify_digits(model, images, tokenizer=None):
    """Name the digit in each picture, zero-shot: the class whose captions, averaged over TEMPLATES, are nearest.

    Args:
        model: a nano_clip.
        images: uint8 (n, height, width, 3) at the model's own size, such as `img2vid.data.digits.draw` returns.
        tokenizer: by default `nano_clip_tokenizer()`.

    Returns:
        LongTensor (n,), the digits 0 to 9.
    """
    import open_clip
    import torch

    classifier = open_clip.build_zero_shot_classifier(model, tokenizer or nano_clip_tokenizer(), DIGIT_WORDS, TEMPLATES)
    with torch.no_grad():
        batches = images_to_input(images, model).split(256)
        features = torch.cat([model.encode_image(batch, normalize=True) for batch in batches])  # (n, embed_dim)
    return (features @ classifier).argmax(dim=1)  # classifier: (embed_dim, 10)
