"""Original TimeSformer (Bertasius et al. 2021, arXiv:2102.05095; github.com/facebookresearch/TimeSformer).

One class token a clip, whose updates are averaged over frames; divided, joint or space-only attention. Its names are
ours, or rather ours are its. Released files keep them under ``model_state`` with the prefix ``model.``; others under
``state_dict`` with ``module.``, or under ``model``. Its tokens are ordered (place, time), ours (time, place): attention
does not see the order, so no weight depends on it.
"""

from __future__ import annotations

from img2vid.backbones.tower import Preprocess
from img2vid.checkpoints.dialect import Dialect, Foreign
from img2vid.checkpoints.plain_vit import plain_vit, sizes_of, square
from img2vid.config import VideoConfig

TABLE = (
    # TimeSformer                         img2vid
    ("cls_token", "cls_token"),
    ("pos_embed", "pos_embed"),
    ("time_embed", "time_embed"),
    ("patch_embed.proj", "patch_embed.proj"),
    ("blocks.{i}.temporal_norm1", "blocks.{i}.temporal_norm1"),
    ("blocks.{i}.temporal_attn.qkv", "blocks.{i}.temporal_attn.qkv"),
    ("blocks.{i}.temporal_attn.proj", "blocks.{i}.temporal_attn.proj"),
    ("blocks.{i}.temporal_fc", "blocks.{i}.temporal_fc"),
    ("blocks.{i}.norm1", "blocks.{i}.norm1"),
    ("blocks.{i}.attn.qkv", "blocks.{i}.attn.qkv"),
    ("blocks.{i}.attn.proj", "blocks.{i}.attn.proj"),
    ("blocks.{i}.norm2", "blocks.{i}.norm2"),
    ("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
    ("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
    ("norm", "norm"),
    ("head", "classifier"),
)
FRAMES = 8  # of a space-only model, whose file does not say: TimeSformer's own default
DROP_PATH = 0.1  # fixed in its code
ATTENTION_SETTINGS = {
    "divided_space_time": {"prefix_mode": "shared", "quirks": ("drop_path_before_gate",)},
    "joint_space_time": {"prefix_mode": "shared", "quirks": ()},
    "space_only": {"quirks": ("mean_before_norm",)},
}


NEAREST = ("nearest_positions",)  # at other image sizes; MMAction2's takes none


def describe(file: Foreign) -> VideoConfig:
    sizes = sizes_of(file, block="blocks.{i}.", conv="patch_embed.proj", fc1="mlp.fc1", qkv="attn.qkv.bias")
    settings = time_settings(file, "time_embed", "blocks.{i}.temporal_fc", "head")
    settings["quirks"] += NEAREST
    return VideoConfig(
        **plain_vit(**sizes, image_size=square(file, "pos_embed", sizes["patch_size"]), drop_path_rate=DROP_PATH),
        **settings,
    )


def time_settings(file: Foreign, time_embed: str, temporal: str, head: str) -> dict:
    """What kind of attention a file's keys show, for all models that are TimeSformers under whatever names."""
    is_divided = file.has(temporal)
    if time_embed in file.state or is_divided:
        attention = "divided_space_time" if is_divided else "joint_space_time"
        num_frames = file.require(time_embed, "1 T D").shape[1]
    else:
        attention, num_frames = "space_only", FRAMES
        file.notes.append(f"No {time_embed}, so it is space_only; T is not in the file and was set to {FRAMES}.")
    return {
        "attention": attention,
        "num_frames": num_frames,
        "time_embed_resample": "nearest",
        "num_classes": file.num_outputs(head),
        **ATTENTION_SETTINGS[attention],
    }


def recognise(file: Foreign) -> bool:
    # a space-only TimeSformer cannot be told from an image ViT, so it is never recognised, only asked for
    return {"time_embed", "patch_embed.proj.weight", "cls_token"} <= file.state.keys()


TIMESFORMER = Dialect(
    name="timesformer",
    title="TimeSformer",
    table=TABLE,
    describe=describe,
    recognise=recognise,
    wrapper=("model_state", "model."),
    pixels=Preprocess((0.45,) * 3, (0.225,) * 3, "bilinear"),
)
