"""Captions of videos: a converted image tower, and the text decoder of CoCa or BLIP as it was trained.

How T frames reach a decoder that was trained on the tokens of one image: each token is averaged over the frames at its
position, so the decoder sees as many tokens as it always has. The average is taken around the first frame, so that a
static clip gives the image's tokens bit for bit whatever T is, hence its caption. Frames one behind the other would be
T times as many keys: the same attention for a static clip only up to rounding, and a sequence length the decoder has
never seen.

CoCa (arXiv:2205.01917) is decoded here, from open_clip's own forward: the ``generate`` of open_clip 3.3 needs a class
that transformers 5 no longer has. BLIP (arXiv:2201.12086) is decoded by transformers' ``generate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from img2vid.config import shown
from img2vid.errors import Img2VidError
from img2vid.model import VideoModel
from img2vid.temporal.infront import own_class
from img2vid.two_towers import VideoTextModel

SUPPORTED = "CoCa of open_clip (coca_b32, coca_l14) and BLIP of transformers (hf:..., BlipForConditionalGeneration)"


class CaptionError(Img2VidError):
    """A model that writes no captions, or captions that cannot be asked for."""


@dataclass(frozen=True)
class Decoding:
    """How text is chosen, token by token.

    Args:
        num_beams: 1 takes the likeliest token each time; more keep so many texts in the running and take the one with
            the highest mean log-probability.
        max_tokens: length at most, with the first and the last token.
        min_tokens: length at least.
    """

    num_beams: int = 1
    max_tokens: int = 30
    min_tokens: int = 5

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_tokens", "min_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CaptionError(f"{name}={shown(value)}: expected a whole number of at least 1.")
        if self.max_tokens <= self.min_tokens:
            raise CaptionError(f"max_tokens={self.max_tokens} must be larger than min_tokens={self.min_tokens}.")


@dataclass(frozen=True)
class Special:
    """Ids of the tokens that begin, end and fill up a text."""

    begin: int
    end: int
    fill: int


@torch.no_grad()
def caption(
    model: VideoTextModel, clips: Tensor, tokenizer: Any, decoding: Decoding | None = None, prompt: str | None = None
) -> list[str]:
    """Captions of clips (B, T, C, H, W), normalised like the backbone's images.

    Args:
        tokenizer: open_clip's or transformers', of the model's text decoder (``tokenizer_of``).
        prompt: how every caption begins.

    Raises:
        CaptionError: the model writes no captions.
    """
    check_captioner(model)
    decoding = decoding or Decoding()
    if is_blip(model):
        ids = None
        if prompt is not None:
            ids = tokenizer([prompt] * len(clips), return_tensors="pt")["input_ids"].to(clips.device)
            if int(ids.max()) >= model.vocab_size:
                raise CaptionError(
                    f"The tokenizer is not this decoder's: the prompt has the id {int(ids.max())}, the decoder knows "
                    f"{model.vocab_size}. Give the folder of its own (--tokenizer)."
                )
        tokens = blip_tokens(model, clips, decoding, ids)
        return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    special = Special(tokenizer.sot_token_id, tokenizer.eot_token_id, model.pad_id)
    begun = [] if prompt is None else tokenizer.encode(prompt)
    tokens = coca_tokens(model, clips, special, decoding, begun)
    return [text_of(tokenizer, row, special) for row in tokens.tolist()]


def text_of(tokenizer: Any, tokens: list[int], special: Special) -> str:
    end = tokens.index(special.end) if special.end in tokens else len(tokens)
    return tokenizer.decode([token for token in tokens[:end] if token != special.begin]).strip()


def check_captioner(model: Any) -> None:
    if isinstance(model, VideoTextModel) and hasattr(model.base, "text_decoder"):
        return
    what = own_class(model.base).__name__ if isinstance(model, (VideoModel, VideoTextModel)) else type(model).__name__
    raise CaptionError(f"{what} has no text decoder, so it writes no captions. Those that do: {SUPPORTED}.")


def check_length(model: VideoTextModel, decoding: Decoding) -> None:
    if decoding.max_tokens > model.context_length:
        raise CaptionError(
            f"max_tokens={decoding.max_tokens}: this decoder takes texts of up to {model.context_length} tokens."
        )


def is_blip(model: VideoTextModel) -> bool:
    return own_class(model.base).__name__ == "BlipForConditionalGeneration"


def tokenizer_of(model: VideoTextModel, given: str | None = None) -> Any:
    """The tokenizer of the model's text decoder, by the name of its backbone or from a folder of transformers.

    Raises:
        BackboneError: it cannot be had.
        CaptionError: one whose first and last token are not known.
    """
    from img2vid.backbones.names import parse_name
    from img2vid.backbones.tokenizers import tokenizer_for

    check_captioner(model)
    if is_blip(model):
        from img2vid.backbones.from_transformers import load_tokenizer

        if given is None and model.config.backbone is None:
            raise CaptionError("This model was made from a module without a name. Give the folder of its tokenizer.")
        return load_tokenizer(parse_name(model.config.backbone if given is None else f"hf:{given}"))
    if given is not None:
        raise CaptionError("CoCa's tokenizer is open_clip's own; none can be given.")
    tokenizer = tokenizer_for(model.config.backbone)
    if not hasattr(tokenizer, "sot_token_id"):
        raise CaptionError(f"Captions with a {type(tokenizer).__name__} are not supported, with open_clip's own are.")
    return tokenizer


def frames_of(video: str, model: VideoTextModel, num_frames: int) -> Tensor:
    """A video's frames as the model takes them: (T, C, H, W), the centre at the image tower's size, normalised."""
    from torchvision.transforms import v2

    from img2vid.data.reading import read_clip
    from img2vid.data.transforms import INTERPOLATIONS

    tower = model.visual.tower
    clip = read_clip(video, num_frames=num_frames)  # uint8 (T, C, H, W)
    scale = max(wanted / given for wanted, given in zip(tower.image_size, clip.shape[-2:], strict=True))
    size = [max(w, round(g * scale)) for w, g in zip(tower.image_size, clip.shape[-2:], strict=True)]
    interpolation = INTERPOLATIONS.get(tower.preprocess.interpolation, INTERPOLATIONS["bicubic"])
    clip = v2.functional.resize(clip, size, interpolation, antialias=True)
    clip = v2.functional.center_crop(clip, list(tower.image_size))
    return model.normalize(clip).to(next(model.parameters()).dtype)


def blip_tokens(model: VideoTextModel, clips: Tensor, decoding: Decoding, prompt: Tensor | None = None) -> Tensor:
    """Clips (B, T, C, H, W) -> token ids (B, L), by transformers' own ``generate``."""
    check_captioner(model)
    check_length(model, decoding)
    if prompt is not None and prompt.shape[1] > decoding.max_tokens:
        raise CaptionError(
            f"The prompt of {prompt.shape[1]} tokens leaves no room in max_tokens={decoding.max_tokens}."
        )
    return model.base.generate(
        pixel_values=clips,
        input_ids=prompt,
        num_beams=decoding.num_beams,
        max_length=decoding.max_tokens,
        min_length=decoding.min_tokens,
        do_sample=False,
    )


@torch.no_grad()
def coca_tokens(
    model: VideoTextModel, clips: Tensor, special: Special, decoding: Decoding, prompt: Sequence[int] = ()
) -> Tensor:
    """Clips (B, T, C, H, W) -> token ids (B, L), from the first token on, filled up behind the last one."""
    check_captioner(model)
    check_length(model, decoding)
    if len(prompt) + 2 > decoding.max_tokens:
        raise CaptionError(f"The prompt of {len(prompt)} tokens leaves no room in max_tokens={decoding.max_tokens}.")
    feature, image_tokens = model.visual(clips)  # (B, D), (B, N, D): as of one image
    num_clips, num_beams = len(clips), decoding.num_beams
    feature, image_tokens = (x.repeat_interleave(num_beams, dim=0) for x in (feature, image_tokens))
    texts = torch.tensor([[special.begin, *prompt]], device=clips.device).repeat(num_clips * num_beams, 1)
    # all beams are the same text to begin with, so only the first counts
    scores = torch.full((num_clips, num_beams), -torch.inf, device=clips.device)
    scores[:, 0] = 0.0
    ended = torch.zeros(num_clips * num_beams, dtype=torch.bool, device=clips.device)
    lengths = torch.full((num_clips, num_beams), texts.shape[1], device=clips.device)
    while texts.shape[1] < decoding.max_tokens and not ended.all():
        logits = model.base(None, texts, image_latent=feature, image_embs=image_tokens, output_labels=False)["logits"]
        log_probs = F.log_softmax(logits[:, -1].float(), dim=-1)  # (B * beams, vocabulary)
        if texts.shape[1] < decoding.min_tokens:
            log_probs[:, special.end] = -torch.inf
        if texts.shape[1] == decoding.max_tokens - 1:  # as open_clip: the last one ends the text
            only_end = torch.full_like(log_probs, -torch.inf)
            only_end[:, special.end] = log_probs[:, special.end]
            log_probs = only_end
        log_probs[ended] = -torch.inf
        log_probs[ended, special.fill] = 0.0  # what has ended stays as it is
        total = (scores.view(-1, 1) + log_probs).view(num_clips, -1)  # (B, beams * vocabulary)
        longer = (~ended).view(num_clips, num_beams).long() + lengths
        mean = (total.view(num_clips, num_beams, -1) / longer.unsqueeze(-1)).view(num_clips, -1)
        chosen = mean.topk(num_beams, dim=1).indices  # (B, beams)
        scores = total.gather(1, chosen)
        vocabulary = log_probs.shape[1]
        lengths = longer.gather(1, chosen // vocabulary)
        source = (chosen // vocabulary + num_beams * torch.arange(num_clips, device=clips.device)[:, None]).flatten()
        token = (chosen % vocabulary).flatten()
        texts = torch.cat([texts[source], token.unsqueeze(1)], dim=1)
        ended = ended[source] | (token == special.end)
    best = (scores / lengths).argmax(dim=1) + num_beams * torch.arange(num_clips, device=clips.device)
    return texts[best]
