"""Which layer a parameter belongs to: the order in which data passes through the two towers.

``tests/test_tuning.py`` holds the names below against what autograd says reaches the first block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from img2vid.backbones.tower import ImageTower

# what acts before an image tower's first block; whatever else is outside the blocks acts after the last one
IMAGE_STEM = (
    r"(trunk\.|encoder\.|vision_model\.|vit\.|dinov2\.|dinov2_with_registers\.)?(embeddings|pre_layrnorm|patch_embed|embeds|conv1|ln_pre|norm_pre|rope|rel_pos_bias|pos_embed\w*|positional_embedding"
    r"|class_embedding|(cls|dist|reg|mask)_token|time_embed|tubelet_weight)(\..*)?"
)
TEXT_STEM = r"(.*\.)?(token_embedding|positional_embedding|cls_emb|embeddings|embed_tokens|shared|wte|wpe)(\..*)?"
TEXT_BLOCK = r"(?:.*?\.)?(?:resblocks|layers?|block|h)\.(\d+)\..*"
IMAGE_HEAD = r"(visual_projection|vision_proj)\..*"  # which transformers keeps outside of the image tower
TEMPERATURE = r"logit_(scale|bias)"
# tables that are looked up or added, as opposed to matrices that multiply
TABLES = (
    r"(.*\.)?(\w*pos_embed\w*|\w*embeddings?|\w*_tokens?|\w*_emb|time_embed|latent|probe|query|relative_position\w*"
    r"|freqs)"
)


class Place(NamedTuple):
    """A layer: ``depth`` counts from its tower's input, ``from_output`` from its tower's output."""

    tower: str  # image | text | both
    name: str
    depth: int
    from_output: int


def place_in_image_tower(tower: ImageTower, name: str) -> Place:
    """The layer of an image tower's parameter, named as in the tower's own state dict."""
    depth = len(tower.blocks)
    for i, (path, _) in enumerate(tower.blocks):
        if name.startswith(path + "."):
            return Place("image", f"block_{i}", i + 1, depth - i)
    if re.fullmatch(IMAGE_STEM, name):
        return Place("image", "embeddings", 0, depth + 1)
    return Place("image", "head", depth + 1, 0)


def places_beside_image_tower(names: Iterable[str], num_image_blocks: int = 0) -> dict[str, Place]:
    """The layers of everything in an image-text model that is not its image tower: text tower, decoder, temperature."""
    names = list(names)
    is_encoder = {name: not name.startswith("text_decoder.") for name in names}
    blocks = {name: re.fullmatch(TEXT_BLOCK, name) for name in names if is_encoder[name]}
    depth = 1 + max((int(match[1]) for match in blocks.values() if match), default=-1)
    places = {}
    for name in names:
        if re.fullmatch(TEMPERATURE, name):
            places[name] = Place("both", "logit_scale", depth + 1, 0)
        elif re.fullmatch(IMAGE_HEAD, name):
            places[name] = Place("image", "head", num_image_blocks + 1, 0)
        elif not is_encoder[name]:  # CoCa's captioner reads both towers' features
            places[name] = Place("text", "text_decoder", depth + 2, 0)
        elif blocks[name]:
            i = int(blocks[name][1])
            places[name] = Place("text", f"text_block_{i}", i + 1, depth - i)
        elif re.fullmatch(TEXT_STEM, name):
            places[name] = Place("text", "text_embeddings", 0, depth + 1)
        else:
            places[name] = Place("text", "text_head", depth + 1, 0)
    return places
