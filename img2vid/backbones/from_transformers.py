"""transformers (https://github.com/huggingface/transformers): its own modules as image towers, ``hf:NAME``.

Not to be confused with ``hf_folder``, which reads transformers' *checkpoints* into towers of timm and open_clip
(``--weights FOLDER``). Here the model stays transformers': its code runs, its keys are kept.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from img2vid.backbones import hf_two_towers
from img2vid.backbones.building import building, say_loading
from img2vid.backbones.hf_folder import CONFIG, PIXELS, pixel_statistics, read_json
from img2vid.backbones.hf_towers import TOWERS, describe_transformers, set_image_size
from img2vid.backbones.hub import ONLINE, WEIGHTS_WAYS, fetching
from img2vid.backbones.names import BackboneName
from img2vid.backbones.tower import Backbone, Preprocess
from img2vid.config import shown
from img2vid.errors import BackboneError, WeightsError, nearest
from img2vid.weights.accounting import LoadReport, listed, read_state_dict

LOCAL_WAY = "download it elsewhere, and give the folder: --backbone hf:FOLDER"


VIDEO_TYPES = ("timesformer", "vivit")  # what img2vid import takes in
# model_type of config.json: the classes it can be loaded as, the first where the checkpoint is of none of them. A
# classifier is left out, as it is everywhere where a backbone is loaded by name.
MODEL_TYPES: dict[str, tuple[str, ...]] = {
    "clip": ("CLIPModel", "CLIPVisionModelWithProjection", "CLIPVisionModel"),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "siglip": ("SiglipModel", "SiglipVisionModel"),
    "siglip_vision_model": ("SiglipVisionModel",),
    "blip": ("BlipForConditionalGeneration", "BlipForImageTextRetrieval"),
    "blip_vision_model": ("BlipVisionModel",),
    "vit": ("ViTModel",),
    "dinov2": ("Dinov2Model",),
    "dinov2_with_registers": ("Dinov2WithRegistersModel",),
}
OWN = ("architecture", "config", "revision", "add_pooling_layer")  # arguments that are not the configuration's


def library() -> types.ModuleType:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise BackboneError("Backbones hf:NAME need transformers: pip install 'img2vid[hf]'.") from error
    return transformers


def load_transformers(
    name: BackboneName,
    *,
    weights: str | Path | None = None,
    random_weights: bool = False,
    image_size: tuple[int, int] | None = None,
    arguments: dict[str, Any] | None = None,
    device: str = "cpu",
) -> Backbone:
    """Build a model of transformers and load its weights: both towers where it has two, no classifier.

    Args:
        name: repository on the hub, or folder, as ``from_pretrained`` takes them.
        weights: file or folder in transformers' layout, instead of the model's own.
        image_size: pixels (height, width) that clips have by default; transformers resamples positions in forward.
        arguments: ``revision`` of the repository; ``architecture``, the class to load where a checkpoint serves
            several; ``add_pooling_layer`` of ``ViTModel``; and fields of the configuration, such as
            ``{"drop_path_rate": 0.1}``. A whole ``config`` needs no repository any more: what saved models keep.

    Raises:
        BackboneError: a model that is not supported, or ``WeightsUnavailable``.
        WeightsError: weights that leave part of the model random.
    """
    library()
    arguments = dict(arguments or {})
    config = fetch_config(name, arguments)
    cls = class_of(name, config, arguments.get("architecture"))
    if not isinstance(config, cls.config_class):  # the image tower alone of a model with text
        config.vision_config.projection_dim = getattr(config, "projection_dim", None)
        config = config.vision_config
    with building(str(name), {key: value for key, value in arguments.items() if key != "config"}):
        override(config, {key: value for key, value in arguments.items() if key not in OWN})
        options = {}
        if cls.__name__ == "ViTModel":
            published = architecture_of(config)
            options["add_pooling_layer"] = arguments.get("add_pooling_layer", published in (None, "ViTModel"))
        elif "add_pooling_layer" in arguments:
            raise BackboneError(f"add_pooling_layer is of ViTModel; {name} is a {cls.__name__}.")
        with torch.device("meta"):
            skeleton = cls._from_config(config, **options)
    describe_transformers(tower_of(skeleton))  # refuse before downloading anything
    say_loading(str(name), skeleton, weights, random_weights)
    report, source, pixels = LoadReport(), None, None
    if random_weights:
        with torch.device(device):
            model = cls._from_config(config, **options)
    else:
        model, report = read(cls, name, config, weights, options, arguments.get("revision"))
        source = f"the file {Path(weights).name}" if weights is not None else f"transformers {name.architecture}"
        pixels = read_pixel_statistics(str(weights) if weights and os.path.isdir(weights) else name.architecture)
    tower = tower_of(model)
    if pixels is not None:
        tower.preprocess = pixels  # read by describe_transformers
    set_image_size(tower, image_size)
    described = {
        **{key: value for key, value in arguments.items() if key == "revision"},
        **options,
        "architecture": cls.__name__,
        "config": config.to_diff_dict(),  # a saved model is built again from it, wherever it came from
    }
    model = hf_two_towers.speak_openly(model.eval())
    return Backbone(model, describe_transformers(tower), str(name), described, source, report)


def fetch_config(name: BackboneName, arguments: dict[str, Any]) -> Any:
    """The configuration: given in full, or read from the folder or repository."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    content, place = arguments.get("config"), name.architecture
    if content is None and os.path.isabs(place):
        content = read_json(Path(place, CONFIG))
        if content is None:
            there = "holds no" if os.path.isdir(place) else "is no folder with a"
            raise BackboneError(f"{place} {there} {CONFIG}, which save_pretrained of transformers writes.")
        if "kind" in content and "video" in content:
            raise BackboneError(f"{place} already is a model of img2vid: img2vid.load({place!r}).")
    elif content is None:
        if os.path.isfile(place):
            raise BackboneError(f"{place} is a file. Give the folder that holds it: hf:{os.path.dirname(place) or '.'}")
        what = f"{CONFIG} of {name}, which says what model it is"
        with building(str(name), {}), fetching(what, (LOCAL_WAY, ONLINE)):
            content, _ = PretrainedConfig.get_config_dict(place, revision=arguments.get("revision"))
    if not isinstance(content, dict):
        raise BackboneError(f"config={shown(content)}: expected transformers' fields by name, with a model_type.")
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        hint = nearest(str(model_type), MODEL_TYPES)
        raise BackboneError(
            f"{name} is of model_type {shown(model_type)}, which cannot become a video model here.{hint} Supported "
            f"of transformers are {', '.join(MODEL_TYPES)}. Others may exist in timm or open_clip."
            + f" It is a video model already: img2vid import {place}"
            * (model_type in VIDEO_TYPES)
        )
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):  # the towers' own, too
        if "/" in str(part.get("attn_implementation")):
            raise BackboneError(
                f"{name} asks for attention by {shown(part['attn_implementation'])}, code from a hub. A description "
                "runs no code here: take attn_implementation out of its config.json, or set it to 'sdpa' or 'eager'."
            )
    with building(str(name), {}):
        return CONFIG_MAPPING[model_type].from_dict(content)


def class_of(name: BackboneName, config: Any, wanted: str | None) -> type[nn.Module]:
    """The class to load a configuration as: the one asked for, the checkpoint's own, or the type's usual one."""
    import transformers

    possible = MODEL_TYPES[config.model_type]
    published = architecture_of(config)
    chosen = wanted if wanted is not None else published if published in possible else possible[0]
    if chosen not in possible:
        raise BackboneError(f"architecture={shown(chosen)}: {name} can be loaded as {', '.join(possible)}.")
    if published == "BlipForQuestionAnswering" and wanted is None:
        raise BackboneError(
            f"{name} is a {published}, which answers questions with two text towers at once and is not supported. "
            f"There are: {', '.join(possible)}."
        )
    return getattr(transformers, chosen)


def architecture_of(config: Any) -> str | None:
    """The class that a checkpoint was saved from, where its configuration says."""
    named = getattr(config, "architectures", None)
    return named[0] if isinstance(named, list) and named else None


def override(config: Any, settings: dict[str, Any]) -> None:
    """Fields of the image tower's configuration, in place."""
    image = getattr(config, "vision_config", config)
    for key, value in settings.items():
        if not hasattr(image, key):
            known = sorted(set(image.to_dict()) - {"architectures", "transformers_version"})
            raise BackboneError(
                f"{type(image).__name__} has no field {key!r}.{nearest(key, known)} It has: {', '.join(known)}. "
                f"Beside those there are: {', '.join(OWN)}."
            )
        setattr(image, key, value)


def read(
    cls: type[nn.Module],
    name: BackboneName,
    config: Any,
    weights: str | Path | None,
    options: dict[str, Any],
    revision: str | None,
) -> tuple[nn.Module, LoadReport]:
    """The model with its weights, every key accounted for: transformers itself makes up what a file lacks.

    Raises:
        WeightsError: weights that leave part of the model random.
    """
    how = {"config": config, "output_loading_info": True, **options}
    place: str | None = str(weights) if weights is not None else name.architecture
    if weights is not None and not os.path.isdir(weights):
        place, how["state_dict"] = None, read_state_dict(weights)
    is_local = place is None or os.path.isabs(place) or os.path.isdir(place)
    if not is_local:
        how["revision"] = revision
    what = f"the pretrained weights of {name}"
    with building(str(name), {}), quiet_transformers():
        if is_local:
            try:
                model, info = cls.from_pretrained(place, **how)
            except OSError as error:
                raise WeightsError(f"The weights in {place} cannot be read: {str(error).splitlines()[0]}") from error
        else:
            with fetching(what, (LOCAL_WAY, *WEIGHTS_WAYS)):
                model, info = cls.from_pretrained(place, **how)
    missing, misshapen = sorted(info["missing_keys"]), sorted(str(key) for key in info["mismatched_keys"])
    if missing or misshapen:
        advice = ""
        if any(key.startswith("pooler.") for key in missing):
            advice = "\nWithout its pooler, the feature is the class token: backbone_args={'add_pooling_layer': False}."
        raise WeightsError(
            f"{place or weights} does not fill this {cls.__name__}, transformers would leave these at random:\n"
            f"{listed(missing + misshapen)}{advice}"
        )
    dropped = sorted(info["unexpected_keys"])
    if len(dropped) and not all(is_known_extra(key, cls.__name__) for key in dropped):
        strange = [key for key in dropped if not is_known_extra(key, cls.__name__)]
        raise WeightsError(
            f"{place or weights} holds what this {cls.__name__} has no place for; it is of another model:\n"
            f"{listed(strange)}"
        )
    return model, LoadReport(loaded=sorted(model.state_dict()), dropped=dropped)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no report of keys: what matters in it is an error here, with a sentence."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def is_known_extra(key: str, class_name: str) -> bool:
    """What checkpoints hold beyond an image tower on purpose: heads, the other tower, tables that are computed."""
    heads = ("classifier.", "decoder.", "pooler.", "embeddings.mask_token", "vit.pooler.")
    other_tower = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
    is_tower = class_name in TOWERS
    return key.endswith("position_ids") or (is_tower and key.startswith((*heads, *other_tower)))


def read_pixel_statistics(place: str) -> Preprocess | None:
    """What the image processor beside a model says; None where there is none."""
    if os.path.isdir(place):
        path: str | None = os.path.join(place, PIXELS)
    else:
        from transformers.utils import cached_file

        path = cached_file(place, PIXELS, _raise_exceptions_for_missing_entries=False)
    described = None if path is None else read_json(Path(path))
    return None if described is None else pixel_statistics(described, Path(path))


def wrap_transformers(model: nn.Module, image_size: tuple[int, int] | None = None) -> Backbone:
    """A backbone from a module that the user has built.

    Raises:
        BackboneError: a class that is not supported.
    """
    tower = tower_of(model)
    describe_transformers(tower)
    set_image_size(tower, image_size)
    model = hf_two_towers.speak_openly(model)
    return Backbone(model, describe_transformers(tower), pretrained="the given module")


def tower_of(model: nn.Module) -> nn.Module:
    """The image tower of a model with text, or the image model itself."""
    return model.vision_model if hf_two_towers.front_of(model) is not None else model


def tokenizer(name: BackboneName) -> Callable[[list[str]], Tensor]:
    """A callable from n texts to token ids (n, L), filled up as the model's texts were in training."""
    loaded = load_tokenizer(name)
    kind = type(loaded).__name__.lower()
    if "clip" in kind or "siglip" in kind:  # to one length, of which nothing is hidden from the text tower
        how: dict[str, Any] = {"padding": "max_length", "max_length": min(loaded.model_max_length, 77)}
        if "siglip" in kind:
            how["max_length"] = 64
    else:
        how = {"padding": "longest", "max_length": min(loaded.model_max_length, 512)}
    return lambda texts: loaded(texts, truncation=True, return_tensors="pt", **how)["input_ids"]


def load_tokenizer(name: BackboneName) -> Any:
    """
    Raises:
        BackboneError: it is not in the folder, or cannot be had from the hub.
    """
    from transformers import AutoTokenizer

    place = name.architecture
    if os.path.isabs(place):
        if not os.path.isdir(place):
            raise BackboneError(f"There is no folder {place}, where the tokenizer was. Give another with --tokenizer.")
        try:
            return with_words(AutoTokenizer.from_pretrained(place, trust_remote_code=False), place)
        except BackboneError:
            raise
        except Exception as error:  # of many kinds, by what of the tokenizer's files is missing
            reason = str(error).strip().splitlines()[0]
            raise BackboneError(
                f"{place} holds no tokenizer that transformers can load ({reason}). Put its files there, or give "
                "another folder with --tokenizer."
            ) from error
    ways_out = (LOCAL_WAY, ONLINE, "or make token ids yourself, with the tokenizer the text tower was trained with")
    with building(str(name), {}), fetching(f"the tokenizer of {name}", ways_out):
        return with_words(AutoTokenizer.from_pretrained(place, trust_remote_code=False), place)


def with_words(tokenizer: Any, place: str) -> Any:
    """Where config.json is all there is, transformers makes a tokenizer of special tokens alone, and says nothing."""
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise BackboneError(
            f"{place} holds no tokenizer: transformers makes one without a single word there. Put the files of the "
            "model's own there: tokenizer.json, or vocab.txt and the like. (img2vid caption takes --tokenizer FOLDER.)"
        )
    return tokenizer
