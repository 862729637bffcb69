"""What a model looks at in a video: attention maps drawn on its frames.

    img2vid plot attention --model FOLDER --video video.mp4 --out attention.png

spatial      the last block: how much the tokens that the model's pooling reads attend to each patch
temporal     the last attention along time: how much the other frames attend to each place of a frame
rollout      all blocks, followed from the clip feature back to the patches (Abnar and Zuidema 2020, arXiv:2005.00928)

The weights are those of the forward pass itself (``img2vid.evaluation.capture``).

differs from the paper: a temporal branch counts as much as it adds to the stream (branch-to-residual ratio), not one
half. Behind a gate at zero it counts nothing, and the rollout is the image model's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from img2vid.backbones.reading import read_block
from img2vid.evaluation.capture import Captured, Layer, capturing
from img2vid.evaluation.conditions import video_part
from img2vid.evaluation.errors import EvaluationError
from img2vid.proof.evidence import in_eval_mode
from img2vid.temporal.infront import own_class

# what is done to the weights after the softmax, so that they no longer say where the output comes from
NOT_SHARES = {
    "differential softmax": "it subtracts one softmax from another",
    "talking-heads mixing": "it mixes its heads after the softmax, with weights of either sign",
}


@dataclass
class Attention:
    """Maps of one clip, (T, h, w) over its patches; T counts tubelets where frames are grouped.

    ``temporal`` and ``frame_to_frame`` are None where no frame attends to another one; ``spatial`` and ``rollout`` are
    None where the backbone's attention is no share of its keys, and ``refused`` says why.
    """

    spatial: Tensor | None
    temporal: Tensor | None
    rollout: Tensor | None
    frame_to_frame: Tensor | None  # (T, T): mean over places of the temporal attention, rows sum to 1
    refused: str | None = None

    def rows(self) -> dict[str, Tensor]:
        maps = {"spatial": self.spatial, "temporal": self.temporal, "rollout": self.rollout}
        return {name: m for name, m in maps.items() if m is not None}


def attention_maps(model, clip: Tensor) -> Attention:
    """Attention of one normalised clip (1, T, C, H, W).

    Raises:
        EvaluationError: more clips than one; tokens that are no grid of patches.
    """
    video = video_part(model)
    if clip.ndim != 5 or len(clip) != 1:
        raise EvaluationError(f"Expected one clip (1, T, C, H, W), given {tuple(clip.shape)}.")
    for graft in video.grafts:
        if graft.attends:
            raise EvaluationError(
                f"The graft {graft.name} lets tokens attend to more than the image model's attention shows, so maps of "
                f"that would not say where the model looks. Without it: img2vid graft FOLDER --remove {graft.name}."
            )
    with in_eval_mode(model), capturing(video) as found:
        video.frame_features(clip)
    tokens = Tokens.of(video, clip, found)
    refused = why_no_shares(video, found)
    spatial = rollout = None
    if refused is None:
        read = reading(found, tokens)
        spatial = tokens.grid(through(read, found.blocks[-1], tokens))
        rollout = tokens.grid(roll_back(read, found, tokens))
    temporal, frame_to_frame = None, None
    if tokens.num_steps > 1:
        temporal, frame_to_frame = along_time(found, tokens)
    return Attention(spatial, temporal, rollout, frame_to_frame, refused)


@dataclass
class Tokens:
    """How the tokens of a clip lie: T steps of P prefix tokens and h x w patches. Shares of them are (T, P + h * w)."""

    num_steps: int
    num_prefix: int
    height: int
    width: int
    attention: str
    prefix_mode: str

    @classmethod
    def of(cls, video, clip: Tensor, found: Captured) -> Tokens:
        pixels, patches = clip.shape[-2:], video.tower.patch_size
        height, width = (-(-n // p) if video.tower.pads else n // p for n, p in zip(pixels, patches, strict=True))
        num_prefix, num_tokens = video.tower.num_prefix_tokens, found.reads.shape[1]
        if num_prefix + height * width != num_tokens:
            raise EvaluationError(
                f"This model's {num_tokens} tokens are no grid of {height} x {width} patches and {num_prefix} others, "
                "so its attention cannot be drawn on frames."
            )
        config = video.config
        return cls(len(found.reads), num_prefix, height, width, config.attention, config.prefix_mode)

    def grid(self, shares: Tensor) -> Tensor:
        """(T, P + N) -> (T, h, w)."""
        return shares[:, self.num_prefix :].unflatten(1, (self.height, self.width))

    @property
    def num_shared(self) -> int:
        """Prefix tokens that belong to the clip; every frame has an equal copy."""
        return 0 if self.prefix_mode == "per_frame" else self.num_prefix

    def as_sequence(self, shares: Tensor) -> Tensor:
        """(T, P + N) -> the row of tokens that attention over all frames sees; copies of a token are one."""
        shared, own = shares[:, : self.num_shared], shares[:, self.num_shared :]
        return torch.cat([shared.sum(0), own.flatten()])

    def as_frames(self, sequence: Tensor) -> Tensor:
        """The opposite of ``as_sequence``: what the clip's token has is spread over its copies."""
        shared, own = sequence[: self.num_shared], sequence[self.num_shared :]
        return torch.cat([(shared / self.num_steps).expand(self.num_steps, -1), own.view(self.num_steps, -1)], dim=1)


def why_no_shares(video, found: Captured) -> str | None:
    block = video.tower.blocks[-1][1]
    name, parts = own_class(block).__name__, read_block(block).left_behind
    for part in parts:
        if part in NOT_SHARES:
            return f"attention of {name} is no share of its keys: {NOT_SHARES[part]}"
    if not all(layer.attention for layer in found.blocks):
        return f"attention of {name} does not end in a softmax that can be seen"
    return None


def reading(found: Captured, tokens: Tokens) -> Tensor:
    """Which tokens of the last block each frame's feature is made of, (T, P + N); rows sum to 1.

    An attention pool tells by its weights; of a class token, a mean or a maximum, those that the feature depends on
    count alike.
    """
    reads = found.reads.float()  # (T, P + N)
    chain = None
    for weights in reversed(found.pooling):  # the first query of the last pool, and through the pools before it
        if chain is None:
            chain = weights[:, 0]
        elif weights.shape[1] == chain.shape[1]:
            chain = torch.einsum("tq,tqk->tk", chain, weights)
    if chain is not None and 0 <= (before := reads.shape[1] - chain.shape[1]) <= tokens.num_prefix:
        reads = torch.nn.functional.pad(chain, (before, 0))
    return reads / reads.sum(1, keepdim=True)


def through(shares: Tensor, layer: Layer, tokens: Tokens) -> Tensor:
    """Shares of a block's outputs -> of its inputs, (T, P + N), by its attention alone."""
    if tokens.attention == "joint_space_time":
        across = torch.stack(layer.attention).mean(0)[0]  # (P + T*N, P + T*N)
        return tokens.as_frames(tokens.as_sequence(shares) @ across)
    num_shared = tokens.num_shared
    within, of_clip = layer.attention, None
    if tokens.prefix_mode == "global" and num_shared:
        *within, of_clip = within  # the clip's tokens ask once more, all frames: (1, P, P + T*N)
    across = torch.stack(within).mean(0)  # (T, P + N, P + N); several where attentions run in parallel
    if not num_shared:
        return torch.einsum("ts,tsu->tu", shares, across)
    own, asked = shares.clone(), shares[:, :num_shared].mean(0)  # copies are made equal after attention
    own[:, :num_shared] = 0.0 if of_clip is not None else asked
    back = torch.einsum("ts,tsu->tu", own, across)
    if of_clip is not None:
        back = back + tokens.as_frames(tokens.num_steps * asked @ of_clip[0])
    return back


def roll_back(read: Tensor, found: Captured, tokens: Tokens) -> Tensor:
    """How much of the clip feature comes from each token that enters the first block, (T, P + N); sums to 1."""
    frames = torch.full((1, tokens.num_steps), 1 / tokens.num_steps)  # the clip feature is their mean
    for layer in reversed(found.encoder):
        frames = (frames + layer.ratio * frames @ layer.temporal[0, 0]) / (1 + layer.ratio)
    shares = frames.T * read
    for layer in reversed(found.blocks):
        shares = 0.5 * shares + 0.5 * through(shares, layer, tokens)
        if layer.temporal is not None:
            along = layer.temporal[0]  # (S, T, T)
            first = shares.shape[1] - len(along)  # tokens of the whole clip do not attend along time
            moved = torch.einsum("ts,stu->us", shares[:, first:], along)
            shares[:, first:] = (shares[:, first:] + layer.ratio * moved) / (1 + layer.ratio)
    return shares


def along_time(found: Captured, tokens: Tokens) -> tuple[Tensor | None, Tensor | None]:
    """What other frames attend to (T, h, w), and frame to frame (T, T), by the last attention that sees several."""
    steps, num_patches = tokens.num_steps, tokens.height * tokens.width
    if tokens.attention == "joint_space_time":
        if not found.blocks[-1].attention:
            return None, None
        across = torch.stack(found.blocks[-1].attention).mean(0)[0, tokens.num_shared :, tokens.num_shared :]
        across = across.view(steps, -1, steps, across.shape[0] // steps)[..., -num_patches:]
        across = across[:, -num_patches:].mean(1)  # (T, T, N): patches of a frame, to each patch
        pairs = across.sum(-1)
        return received(across).unflatten(1, (tokens.height, tokens.width)), pairs / pairs.sum(1, keepdim=True)
    if found.encoder:  # one token for each frame
        pairs = found.encoder[-1].temporal[0, 0]
        return received(pairs[..., None])[..., None].expand(-1, tokens.height, tokens.width), pairs
    last = next((layer.temporal[0] for layer in reversed(found.blocks) if layer.temporal is not None), None)
    if last is None:
        return None, None
    last = last[-num_patches:]  # (N, T, T)
    return received(last.permute(1, 2, 0)).unflatten(1, (tokens.height, tokens.width)), last.mean(0)


def received(attention: Tensor) -> Tensor:
    """Attention of frames to frames at each place (T, T, N) -> what each gets from the others, on average, (T, N)."""
    steps = len(attention)
    return (attention * (1 - torch.eye(steps))[..., None]).sum(0) / (steps - 1)
