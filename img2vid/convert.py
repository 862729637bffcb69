"""``img2vid.convert(...)`` and ``python -m img2vid.convert``: an image transformer in, a video transformer out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from img2vid.config import CHOICES, ConfigError, VideoConfig, image_size_pair
from img2vid.errors import Img2VidError, nearest

if TYPE_CHECKING:
    from torch import nn

    from img2vid.backbones import Backbone
    from img2vid.model import VideoModel, VideoTextModel

DTYPES = ("float32", "bfloat16", "float16")


def convert(
    backbone: str | nn.Module,
    *,
    weights: str | Path | None = None,
    random_weights: bool = False,
    dtype: str | None = None,
    **settings: Any,
) -> VideoModel | VideoTextModel:
    """Turn a pretrained image transformer into a video transformer that is the same function at step 0.

    Args:
        backbone: an alias (``vit_base``), ``timm:NAME[.TAG]``, ``open_clip:ARCH[/TAG]``, ``nano_clip``, or a timm or
            open_clip module, which is changed in place.
        weights: local weights file instead of the library's pretrained weights.
        random_weights: build the architecture without loading any weights.
        dtype: ``float32`` | ``bfloat16`` | ``float16``; None keeps the backbone's.
        settings: fields of ``VideoConfig``, such as ``num_frames=8``, ``prefix_mode="shared"`` or ``num_classes=400``.

    Returns:
        A ``VideoTextModel`` where the backbone has a text tower and no ``num_classes`` is given, else a ``VideoModel``;
        in eval mode, on the backbone's device. timm backbones loaded by name come without their classifier.

    Raises:
        Img2VidError: what was given is unknown, unsupported, unavailable, or does not fit.
    """
    from img2vid.model import build_model

    loaded = load(backbone, weights=weights, random_weights=random_weights, dtype=dtype, settings=settings)
    for note in loaded.report.notes:  # a choice was made in reading the file
        warnings.warn(note, stacklevel=2)
    return build_model(loaded, make_config(loaded, settings)).eval()


def load(
    backbone: str | nn.Module,
    *,
    weights: str | Path | None,
    random_weights: bool,
    dtype: str | None,
    settings: dict[str, Any],
) -> Backbone:
    """The image model that is to be converted, not yet touched."""
    import torch

    from img2vid.backbones import load_backbone, wrap_module

    dtype = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}.{nearest(dtype, DTYPES)}")
    VideoConfig.from_dict(settings)  # say what is wrong with the settings before loading anything
    image_size = None if settings.get("image_size") is None else image_size_pair(settings["image_size"])
    if isinstance(backbone, str):
        loaded = load_backbone(
            backbone,
            weights=weights,
            random_weights=random_weights,
            image_size=image_size,
            arguments=settings.get("backbone_args"),
        )
    elif weights is not None or random_weights or settings.get("backbone_args"):
        raise ConfigError(
            f"A {type(backbone).__name__} module was given, which already has weights and arguments; weights, "
            "random_weights and backbone_args go with a backbone's name."
        )
    else:
        loaded = wrap_module(backbone, image_size)
    if dtype is not None:
        loaded.model.to(getattr(torch, dtype))
    return loaded


def make_config(loaded: Backbone, settings: dict[str, Any]) -> VideoConfig:
    return VideoConfig.from_dict({**settings, "backbone": loaded.name, "backbone_args": loaded.arguments})


# ---- the command line


def add_options(parser: argparse.ArgumentParser) -> None:
    from docstring_parser import parse

    parser.add_argument("--backbone", metavar="NAME", help="alias, timm:NAME[.TAG], open_clip:ARCH[/TAG] or nano_clip")
    parser.add_argument("--list", action="store_true", help="show the aliases and exit")
    parser.add_argument("--weights", metavar="FILE", help="local .safetensors or .pth file for the backbone")
    parser.add_argument("--random-weights", action="store_true", help="build the architecture without loading weights")
    parser.add_argument("--dtype", choices=DTYPES, help="of the converted weights (default: the backbone's)")
    parser.add_argument("--out", metavar="FOLDER", help="where to write the model (default: runs/convert/NAME)")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with any of these options; options win")
    described = {param.arg_name: param.description for param in parse(VideoConfig.__doc__).params}
    for spec in dataclasses.fields(VideoConfig):
        if spec.name in ("backbone",):
            continue
        choices = get_args(CHOICES[spec.name]) if spec.name in CHOICES else None
        parser.add_argument(
            "--" + spec.name.replace("_", "-"),
            type=None if choices else PARSERS.get(spec.name, int),
            choices=choices,
            default=argparse.SUPPRESS,
            help=f"{described[spec.name].replace('``', '').replace('%', '%%')} (default: {default_text(spec)})",
        )


def default_text(spec: dataclasses.Field) -> str:
    return "none" if spec.default in (None, dataclasses.MISSING) else str(spec.default)


def parse_size(text: str) -> tuple[int, int]:
    """``224`` or ``224x320`` (height x width)."""
    parts = text.lower().replace(",", "x").split("x")
    if not all(part.strip().isdigit() for part in parts) or len(parts) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; expected 224, or 224x320 (height x width)")
    numbers = [int(part) for part in parts]
    return (numbers[0], numbers[-1])


def parse_layers(text: str) -> str | tuple[int, ...]:
    """``all``, ``every:2``, ``last:4``, or block numbers ``0,5,11``."""
    parts = text.split(",")
    return tuple(int(part) for part in parts) if all(part.strip().isdigit() for part in parts) else text


def parse_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object such as '{{\"drop_path_rate\": 0.1}}'")
    return value


PARSERS = {"image_size": parse_size, "temporal_layers": parse_layers, "backbone_args": parse_json}
OPTIONS = ("backbone", "weights", "random_weights", "dtype", "out")


def read_options_file(path: str) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected options by name, such as 'backbone: vit_base'.")
    known = {*OPTIONS, *(f.name for f in dataclasses.fields(VideoConfig))}
    if not isinstance(values.get("random_weights", False), bool):
        raise ConfigError(f"--config {path}: random_weights={values['random_weights']!r}: expected true or false.")
    for name in values:
        if name not in known:
            raise ConfigError(f"--config {path}: unknown option {name!r}.{nearest(str(name), known)}")
    return values


def run(options: dict[str, Any]) -> int:
    """Load, convert, certify, save; says what it does as it goes. Returns the exit code."""
    from rich.console import Console

    console = Console()
    backbone = options.pop("backbone", None)
    if backbone is None:
        raise ConfigError(
            "No backbone was given. Start with --backbone nano_clip, which needs no network; --list shows the others."
        )
    out = Path(options.pop("out", None) or Path("runs/convert") / backbone.replace(":", "_").replace("/", "_"))
    how = {name: options.pop(name, None) for name in ("weights", "random_weights", "dtype")}
    started = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - started:6.1f} s[/dim]  {text}", highlight=False, soft_wrap=True)

    with console.status(f"Loading {backbone}"):
        from img2vid.backbones.tower import structural_copy
        from img2vid.certificate import certify
        from img2vid.checkpoints.native import check_replaceable, save
        from img2vid.evidence import fingerprint, image_weights
        from img2vid.model import build_model
        from img2vid.reporting import certificate_table, parameter_table

        check_replaceable(out)
        loaded = load(
            backbone,
            weights=how["weights"],
            random_weights=bool(how["random_weights"]),
            dtype=how["dtype"],
            settings=options,
        )
    say(f"Loaded {loaded.name}, weights: {loaded.pretrained or 'random'}.")
    for difference in loaded.report.differences:
        say(difference)
    # the reference is the library's own modules around the same weights, so their values are noted separately
    config = make_config(loaded, options)
    reference = structural_copy(loaded.model if config.num_classes is None else loaded.tower.module)
    weights_before = fingerprint(image_weights(reference, reference, config))
    with console.status("Inserting time"):
        model = build_model(loaded, config).eval()
    say(f"Converted: {config.attention}, prefix tokens {config.prefix_mode}, {config.num_frames} frames.")
    console.print(parameter_table(model))
    with console.status("Certifying: running both models on single, static, moving and shuffled clips"):
        certificate = certify(model, reference, weights_before=weights_before)
    console.print(certificate_table(certificate))
    with console.status(f"Writing {out}"):
        save(model, out, certificate)
    if not certificate.ok:
        say(f"The certificate FAILED: do not trust this model. It was written to {out} to be looked at.")
        return 1
    say(f"Wrote {out}. Load it with img2vid.load({str(out)!r}).")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    description = (convert.__doc__ or "").split("\n")[0]
    # no abbreviations: --num-frame would mean another option the day one is added
    parser = argparse.ArgumentParser(prog="img2vid convert", description=description, allow_abbrev=False)
    add_options(parser)
    given = vars(parser.parse_args(argv))
    show_list, config_file = given.pop("list"), given.pop("config")
    try:
        if show_list:
            from img2vid.reporting import print_aliases

            print_aliases()
            return 0
        from_file = read_options_file(config_file) if config_file else {}
        # by identity: 0 equals False, and must reach the check that refuses it
        options = {name: value for name, value in given.items() if value is not None and value is not False}
        return run({**from_file, **options})
    except (Img2VidError, OSError) as error:  # files that cannot be read or written are the user's to mend too
        print(f"error: {error}", file=sys.stderr)
        return 2


class CallableModule(types.ModuleType):
    """``img2vid.convert`` names this module once it has been imported as one, and must still be the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> VideoModel | VideoTextModel:
        return convert(*args, **kwargs)


sys.modules[__name__].__class__ = CallableModule

if __name__ == "__main__":
    sys.exit(main())
