"""The tokenizer that a text tower was trained with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from img2vid.backbones.hub import ONLINE, fetching
from img2vid.backbones.names import parse_name
from img2vid.errors import BackboneError
from img2vid.weights.files import short


def tokenize(model: Any, texts: list[str]) -> Tensor:
    """Token ids (n, L) of texts for a video-text model.

    Raises:
        BackboneError: there is no tokenizer, or it has ids that the text tower has not.
    """
    backbone = model.config.backbone
    if backbone == "stitched":  # the text tower is the first part's
        backbone = model.config.backbone_args["parts"][0]["backbone"]
    ids, known = tokenizer_for(backbone)(texts), getattr(model, "vocab_size", None)
    if isinstance(known, int) and ids.numel() and int(ids.max()) >= known:
        raise BackboneError(
            f"The tokenizer of {backbone} is not its text tower's: it gives the id {int(ids.max())}, the tower knows "
            f"ids up to {known - 1}. Put the files of the tokenizer that it was trained with in the place of these."
        )
    return ids


@cache
def tokenizer_for(backbone: str | None) -> Callable[[list[str]], Tensor]:
    """A callable from n texts to token ids (n, L).

    Raises:
        BackboneError: the model was made from a module without a name, or has no text tower.
    """
    if backbone is None:
        raise BackboneError(
            "This model was made from a module passed in by hand, so its tokenizer is not known. Use the one you built "
            "the module with, such as open_clip.get_tokenizer(name), and pass token ids."
        )
    name = parse_name(backbone)
    if name.library == "nano_clip":
        from img2vid.backbones.nano_clip import nano_clip_tokenizer

        return nano_clip_tokenizer()
    if name.library == "hf":
        from img2vid.backbones.from_transformers import tokenizer

        return tokenizer(name)
    if name.library != "open_clip":
        raise BackboneError(f"{backbone} has no text tower, so there is nothing to tokenize for.")
    import open_clip
    from open_clip.factory import get_model_config

    ways_out = [ONLINE, "or make token ids yourself, with the tokenizer the text tower was trained with"]
    if name.scheme == "local-dir:":
        ways_out.insert(0, f"put the tokenizer's files into {name.place}, where open_clip looks for them")
    try:
        with fetching(f"the tokenizer of {backbone}", ways_out):
            text = (get_model_config(name.architecture) or {}).get("text_cfg", {})
            # what describes a model may ask for this, and get the code run that lies beside it
            never = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
            return open_clip.get_tokenizer(name.architecture, **never)
    except BackboneError:
        raise
    except ModuleNotFoundError as error:
        raise BackboneError(f"The tokenizer of {backbone} needs {error.name}: pip install 'img2vid[hf]'.") from error
    except (TypeError, ValueError) as error:
        raise BackboneError(f"The tokenizer that {backbone} describes cannot be built: {short(error)}.") from error
