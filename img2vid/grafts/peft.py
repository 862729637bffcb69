"""LoRA as peft keeps it: a folder of ``adapter_config.json`` and ``adapter_model.safetensors``.

Paths are the image library's own, so an adapter on attention over space and MLPs loads into the plain image model with
``PeftModel.from_pretrained``, and one that was trained there loads here; one on attention along time needs the video
model. peft cannot reach everything: of EVA and BEiT it wraps ``qkv``, which they never call, so there the adapter is
loaded by peft and does nothing (it is refused here); of PyTorch's attention it takes both projections or none, so the
missing one is written as zeros. Up to and including 0.21.2 peft also adds B A twice to the output projection of
PyTorch's attention (huggingface/peft pull request 3774), so there somebody has to say what a file means.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from img2vid.checkpoints.folders import replacing
from img2vid.errors import Img2VidError, WeightsError
from img2vid.grafts.base import Graft, GraftError, Site
from img2vid.grafts.fronts import PREFIX, GraftedProjection
from img2vid.grafts.grafting import graft, remove, tower_of
from img2vid.grafts.lora import LoRA, LowRank
from img2vid.model import VideoModel
from img2vid.two_towers import VideoTextModel
from img2vid.weights.accounting import listed
from img2vid.weights.files import read_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."  # what peft's keys begin with
# what would make another function of the same matrices: option, the value that is plain LoRA
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    **dict.fromkeys(("arrow_config", "kasa_config", "monteclora_config", "velora_config"), (None,)),
    # the others change the weights beside them (pissa, olora, corda, loftq, lora_ga)
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica", None),
}


def save_adapter(
    model: VideoModel | VideoTextModel, folder: str | Path, name: str | None = None, out_proj: str | None = None
) -> Path:
    """Write a model's LoRA in peft's format.

    Args:
        name: which, where it has several.
        out_proj: how often the reading peft adds B A to the output projection of PyTorch's attention: ``once``, or
            ``twice`` as peft up to 0.21.2. Needed only where that is adapted.

    Raises:
        GraftError: it has none, or one that peft would load and not apply.
    """
    one, sites = lora_of(model, name), []
    for site in one.sites(tower_of(model)):
        if not (site.about["map"].is_called or is_multihead(site)):
            raise GraftError(
                f"{site.path} is a weight that its library reads and peft only wraps: the adapter would be loaded "
                "and do nothing. Fold it instead, img2vid.grafts.fold(model), and save the model."
            )
        sites.append(site)
    state: dict[str, Tensor] = {}
    for site in sites:
        scion = getattr(site.host, PREFIX + one.name)
        times = times_added(site, scion.zero_B, out_proj)
        for which, tensor in (("A", scion.A), ("B", scion.zero_B / times)):
            state[f"{ROOT}{key_of(model, site)}.lora_{which}.weight"] = tensor.detach().cpu().contiguous().clone()
    targets = {module_of(model, site) for site in sites}
    fill_up(model, sites, state, one.rank)
    described = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": model.config.backbone,
        "r": one.rank,
        "lora_alpha": one.alpha,
        "lora_dropout": one.dropout,
        "use_rslora": one.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(targets),
    }
    folder = Path(folder)
    with replacing(folder, (WEIGHTS, CONFIG), outdated=()) as temporary:
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return folder


def load_adapter(
    model: VideoModel | VideoTextModel, folder: str | Path, name: str = "lora", out_proj: str | None = None
) -> VideoModel | VideoTextModel:
    """Put a LoRA in peft's format on a model, in place; from then on it is one of ours.

    Args:
        name: of the graft.
        out_proj: how often the peft it was trained with adds B A to the output projection of PyTorch's attention:
            ``once``, or ``twice`` as peft up to 0.21.2. Needed only where that is adapted.

    Raises:
        WeightsError: no such folder, or more in it than plain LoRA.
        GraftError: it is for layers that this model does not have.
    """
    folder = Path(folder)
    described, state = read_adapter(folder)
    prefix = model.tower_prefix if isinstance(model, VideoTextModel) else ""
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in state.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if found is None:
            raise WeightsError(f"{folder / WEIGHTS} holds {key}, which is no part of a plain LoRA.")
        path = found[1].replace("base_layer.out_proj", "out_proj")
        if not path.startswith(prefix):
            raise WeightsError(f"{folder / WEIGHTS} adapts {path}, which is not in the image tower ({prefix}...).")
        pairs[path.removeprefix(prefix)][found[2]] = tensor
    torn = [path for path, pair in pairs.items() if set(pair) != {"A", "B"}]
    if torn or not pairs:
        raise WeightsError(
            f"{folder / WEIGHTS} has no whole pairs A and B" + (f" for:\n{listed(torn)}" if torn else ".")
        )
    # zeros on both sides never learn: they only fill up what is written for peft (fill_up)
    pairs = {path: pair for path, pair in pairs.items() if bool(pair["A"].any()) or bool(pair["B"].any())} or pairs
    rank = described["r"]
    one = LoRA(
        name=name,
        rank=rank,
        alpha=described.get("lora_alpha", 8),
        rslora=bool(described.get("use_rslora")),
        dropout=0.0,
        targets=tuple(re.escape(path) for path in sorted(pairs)),
    )
    graft(model, [one])
    try:
        for site in one.sites(tower_of(model)):
            fill(getattr(site.host, PREFIX + name), pairs[site.path], site, out_proj, folder)
    except Img2VidError:
        remove(model, name)
        raise
    return model


@torch.no_grad()
def fill(scion: LowRank, pair: dict[str, Tensor], site: Site, out_proj: str | None, folder: Path) -> None:
    for own, which in ((scion.A, "A"), (scion.zero_B, "B")):
        if own.shape != pair[which].shape:
            raise WeightsError(
                f"{folder / WEIGHTS}: lora_{which} of {site.path} is {tuple(pair[which].shape)}, expected "
                f"{tuple(own.shape)}; nothing was changed."
            )
        own.copy_(pair[which])
    scion.zero_B.mul_(times_added(site, scion.zero_B, out_proj))


def times_added(site: Site, zero_b: Tensor, out_proj: str | None) -> int:
    """How often peft adds B A to a weight."""
    if out_proj not in (None, "once", "twice"):
        raise GraftError(f"out_proj={out_proj!r}: expected once or twice.")
    if not is_multihead(site) or site.front is GraftedProjection or not bool(zero_b.any()):
        return 1
    if out_proj is None:
        raise GraftError(
            f"{site.path} is the output projection of PyTorch's attention, to which peft up to 0.21.2 adds "
            "its B A twice: say what the peft at the other end does, out_proj='twice' or out_proj='once' "
            "(--adapter-out-proj)."
        )
    return 2 if out_proj == "twice" else 1


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{folder} holds no {CONFIG} that can be read: {error.strerror}.") from error
    except ValueError as error:
        raise WeightsError(f"{folder / CONFIG} is not valid JSON: {error}") from error
    if not isinstance(described, dict) or not isinstance(described.get("r"), int):
        raise WeightsError(f"{folder / CONFIG} has no rank r; expected the description of a LoRA by peft.")
    for option, values in PLAIN.items():
        if described.get(option, values[0]) not in values:
            raise WeightsError(
                f"{folder / CONFIG}: {option} is {described[option]!r}; only plain LoRA can be read ({option} "
                f"{values[0]!r}). Merge it with peft, merge_and_unload(), and convert the merged model."
            )
    if not (folder / WEIGHTS).is_file():
        raise WeightsError(f"{folder} has no {WEIGHTS}.")
    return described, read_safetensors(folder / WEIGHTS)


def lora_of(model: VideoModel | VideoTextModel, name: str | None) -> LoRA:
    video = tower_of(model)
    loras: list[Graft] = [one for one in video.grafts if isinstance(one, LoRA) and name in (None, one.name)]
    if len(loras) != 1:
        raise GraftError(
            f"Expected one LoRA{'' if name is None else f' called {name!r}'}, but this model has "
            f"{', '.join(f'{one.name} ({one.type})' for one in video.grafts) or 'no grafts'}."
        )
    return loras[0]


def is_multihead(site: Site) -> bool:
    """Whether peft wraps the attention as a whole, which it does with PyTorch's."""
    return isinstance(site.about["map"].attention, nn.MultiheadAttention)


def module_of(model: VideoModel | VideoTextModel, site: Site) -> str:
    """The module that peft wraps."""
    prefix = model.tower_prefix if isinstance(model, VideoTextModel) else ""
    return prefix + (site.path.removesuffix(".out_proj") if is_multihead(site) else site.path)


def key_of(model: VideoModel | VideoTextModel, site: Site) -> str:
    whole = module_of(model, site)
    is_output = is_multihead(site) and site.front is not GraftedProjection
    return f"{whole}.base_layer.out_proj" if is_output else whole


def fill_up(model: VideoModel | VideoTextModel, sites: list[Site], state: dict[str, Tensor], rank: int) -> None:
    """Zeros for the projections of PyTorch's attentions that have no LoRA, as peft wants both."""
    modules = dict(model.named_modules())
    for site in sites:
        if not is_multihead(site):
            continue
        whole = module_of(model, site)
        attention: nn.MultiheadAttention = modules[whole]
        dim, made = attention.embed_dim, next(iter(state.values()))
        for key, out in ((whole, 3 * dim), (f"{whole}.base_layer.out_proj", dim)):
            state.setdefault(f"{ROOT}{key}.lora_A.weight", torch.zeros(rank, dim, dtype=made.dtype))
            state.setdefault(f"{ROOT}{key}.lora_B.weight", torch.zeros(out, rank, dtype=made.dtype))
