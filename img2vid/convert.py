"""``img2vid.convert(...)`` and ``python -m img2vid.convert``: an image transformer in, a video transformer out."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from img2vid.command import Parser, Progress, run_command
from img2vid.config import ConfigError, VideoConfig, shown
from img2vid.errors import nearest
from img2vid.options import (
    DTYPES,
    add_certificate_options,
    add_settings,
    check_options,
    option_groups,
    read_options_file,
)

if TYPE_CHECKING:
    from torch import nn

    from img2vid.backbones import Backbone
    from img2vid.model import VideoModel
    from img2vid.two_towers import VideoTextModel


def convert(
    backbone: str | nn.Module,
    config: VideoConfig | None = None,
    *,
    weights: str | Path | None = None,
    random_weights: bool = False,
    dtype: str | None = None,
    **settings: Any,
) -> VideoModel | VideoTextModel:
    """Turn a pretrained image transformer into a video transformer that is the same function at step 0.

    Args:
        backbone: an alias (``vit_base``), ``timm:NAME[.TAG]``, ``open_clip:ARCH[/TAG]``, ``hf:NAME`` or ``hf:FOLDER``
            (transformers), ``nano_clip``, or a module of one of these libraries, which is changed in place.
        config: settings all at once, such as another model's ``model.config``; those given by name override it.
        weights: local weights file instead of the library's pretrained weights.
        random_weights: build the architecture without loading any weights.
        dtype: ``float32`` | ``bfloat16`` | ``float16``; None keeps the backbone's.
        settings: fields of ``VideoConfig``, such as ``num_frames=8``, ``prefix_mode="shared"`` or ``num_classes=400``.
            All of them:

    Returns:
        A ``VideoTextModel`` where the backbone has a text tower and no ``num_classes`` is given, else a ``VideoModel``;
        in eval mode, on the backbone's device. timm backbones loaded by name come without their classifier.

    Raises:
        Img2VidError: what was given is unknown, unsupported, unavailable, or does not fit.
    """
    from img2vid.two_towers import build_model

    settings = merge(backbone, config, settings)
    loaded = load(backbone, weights=weights, random_weights=random_weights, dtype=dtype, settings=settings)
    for note in loaded.report.notes:  # a choice was made in reading the file
        warnings.warn(note, stacklevel=2)
    model = build_model(loaded, make_config(loaded, settings)).eval()
    fetch_for_grafts(model, random_weights)
    return model


def fetch_for_grafts(model: VideoModel | VideoTextModel, random_weights: bool) -> None:
    """Other models' weights, where something grafted is made of them."""
    if model.config.grafts and not random_weights:
        from img2vid.grafts.grafting import fetch

        fetch(model)


def merge(backbone: object, config: VideoConfig | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of ``config`` under those given by name. The backbone is the one given, whatever config's was.

    Raises:
        ConfigError: ``config`` is something else, or holds arguments of another backbone's factory.
    """
    if isinstance(backbone, VideoConfig):
        raise ConfigError("A VideoConfig was given as the backbone. Write img2vid.convert(config.backbone, config).")
    if config is None:
        return settings
    if not isinstance(config, VideoConfig):
        raise ConfigError(
            f"config={shown(config)} is of type {type(config).__name__}, expected a VideoConfig. Settings of a "
            "dict are given by name: img2vid.convert(backbone, **settings)."
        )
    own = {spec.name: getattr(config, spec.name) for spec in dataclasses.fields(config)}
    made_for = own.pop("backbone")
    if own["backbone_args"] and "backbone_args" not in settings and made_for is not None:
        from img2vid.backbones.names import parse_name

        if not isinstance(backbone, str) or str(parse_name(backbone)) != str(parse_name(made_for)):
            raise ConfigError(
                f"config holds backbone_args={shown(own['backbone_args'])}, which are for {made_for}. Beside another "
                "backbone give backbone_args too; {} for none."
            )
    return {**own, **settings}


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
        raise ConfigError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}.{nearest(str(dtype), DTYPES)}")
    checked = VideoConfig.from_dict(settings)  # says what is wrong with any before loading anything
    if checked.grafts:
        from img2vid.grafts import read_grafts

        read_grafts(checked.grafts)
    image_size = checked.image_size
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


def document_settings() -> None:
    """Let ``help(img2vid.convert)`` and editors show the settings, which are VideoConfig's to describe."""
    own = inspect.signature(convert)
    parameters = [p for p in own.parameters.values() if p.name != "settings"]
    fields = [spec for spec in dataclasses.fields(VideoConfig) if spec.name != "backbone"]
    for spec in fields:
        default = {} if spec.default is dataclasses.MISSING else spec.default
        parameters.append(
            inspect.Parameter(spec.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=spec.type)
        )
    convert.__signature__ = own.replace(parameters=parameters)
    if convert.__doc__:  # not under python -OO
        described = re.search(r"( +num_frames: .*?)\n +\"*\Z", VideoConfig.__doc__ + '"', flags=re.DOTALL)
        listed = "".join(f"        {line}\n" for line in described[1].splitlines())
        convert.__doc__ = convert.__doc__.replace("All of them:\n", f"All of them:\n\n{listed}")


document_settings()


# ---- the command line

NAMES = ("backbone", "weights", "random_weights", "dtype", "out", "certify_frames", "certify_size")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="img2vid convert",
        usage="%(prog)s --backbone NAME [options]",
        description=(convert.__doc__ or "").split("\n")[0],
        epilog="example: img2vid convert --backbone nano_clip --num-frames 4 --out runs/digits",
        allow_abbrev=False,  # --num-frame would mean another option the day one is added
    )
    parser.add_argument("--list", action="store_true", help="show the aliases and exit")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML or JSON file of these options, or a model's config.json; options win",
    )
    groups = option_groups(parser)
    backbone, output = groups["backbone"], groups["output"]
    backbone.add_argument(
        "--backbone", metavar="NAME", help="alias, timm:NAME[.TAG], open_clip:ARCH[/TAG], hf:NAME, hf:FOLDER"
    )
    backbone.add_argument("--weights", metavar="FILE", help="local .safetensors or .pth file for the backbone")
    backbone.add_argument("--random-weights", action="store_true", help="build the architecture, load no weights")
    backbone.add_argument("--dtype", choices=DTYPES, help="of the converted weights (default: the backbone's)")
    add_settings(groups)
    output.add_argument("--out", metavar="FOLDER", help="where to write the model (default: runs/convert/NAME)")
    add_certificate_options(output)
    return parser


def run(options: dict[str, Any]) -> int:
    """Load, convert, certify, save; says what it does as it goes. Returns the exit code."""
    check_options(options)
    backbone = options.pop("backbone", None)
    if backbone is None:
        raise ConfigError(
            "No backbone was given. Start with --backbone nano_clip, which needs no network; --list shows the others."
        )
    given_out = options.pop("out", None)
    out = Path("runs/convert", folder_name(backbone)) if given_out is None else Path(given_out)
    how = {name: options.pop(name, None) for name in ("weights", "random_weights", "dtype")}
    tried = {"num_frames": options.pop("certify_frames", None), "image_size": options.pop("certify_size", None)}
    progress = Progress()
    progress.say("Importing torch, timm and open_clip")
    with progress.stage(f"Loading {backbone}"):
        from img2vid.backbones.names import parse_name
        from img2vid.backbones.tower import structural_copy
        from img2vid.certificate import certify
        from img2vid.checkpoints.native import check_replaceable, save
        from img2vid.proof.evidence import fingerprint, image_weights
        from img2vid.reporting import certificate_table, parameter_table
        from img2vid.two_towers import build_model

        parse_name(backbone)  # a wrong name is told before a wrong folder, which may be made from it
        check_replaceable(out)
        loaded = load(
            backbone,
            weights=how["weights"],
            random_weights=bool(how["random_weights"]),
            dtype=how["dtype"],
            settings=options,
        )
    progress.say(f"Loaded {loaded.name}, weights: {loaded.pretrained or 'random'}.")
    for difference in loaded.report.differences:
        progress.say(difference)
    # the reference is the library's own modules around the same weights, so their values are noted separately
    config = make_config(loaded, options)
    reference = structural_copy(loaded.model if config.num_classes is None else loaded.tower.module)
    weights_before = fingerprint(image_weights(reference, reference, config))
    with progress.stage("Inserting time"):
        model = build_model(loaded, config).eval()
        fetch_for_grafts(model, bool(how["random_weights"]))
    attention = f"causal {config.attention}" if config.causal else config.attention
    progress.say(f"Converted: {attention}, prefix tokens {config.prefix_mode}, {config.num_frames} frames.")
    progress.console.print(parameter_table(model))
    with progress.stage("Certifying: running both models (--certify-frames 1 2 or --certify-size make it shorter)"):
        certificate = certify(model, reference, weights_before=weights_before, at_step_0=True, **tried)
    progress.console.print(certificate_table(certificate))
    with progress.stage(f"Writing {out}"):
        save(model, out, certificate)
    if not certificate.ok:
        progress.say(f"The certificate FAILED: do not trust this model. It was written to {out} to be looked at.")
        return 1
    progress.say(f"Wrote {out}. Load it with img2vid.load({str(out)!r}).")
    return 0


def folder_name(backbone: str) -> str:
    """A backbone's name as the name of a folder: the end of it, where it is a path of any length."""
    return re.sub(r"[:/\\\0]", "_", backbone)[-100:]


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: convert_command(argv))


def convert_command(argv: Sequence[str] | None) -> int:
    given = vars(make_parser().parse_args(argv))
    show_list, config_file = given.pop("list"), given.pop("config")
    if show_list:
        from img2vid.reporting import print_aliases

        print_aliases()
        return 0
    from_file = {} if config_file is None else read_options_file(config_file, NAMES)
    # by identity: 0 equals False, and must reach the check that refuses it
    options = {name: value for name, value in given.items() if value is not None and value is not False}
    return run({**from_file, **options})


class CallableModule(types.ModuleType):
    """``img2vid.convert`` names this module once it has been imported as one, and must still be the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> VideoModel | VideoTextModel:
        return convert(*args, **kwargs)


sys.modules[__name__].__class__ = CallableModule
__signature__ = inspect.signature(convert)  # editors ask the module too

if __name__ == "__main__":
    sys.exit(main())
