"""Settings of ``VideoConfig`` as command-line options, for every command that takes them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from img2vid.config import CHOICES, MOST, QUIRKS, ConfigError, VideoConfig, image_size_pair, shown, whole_number
from img2vid.errors import nearest

DTYPES = ("float32", "bfloat16", "float16")
GROUPS = {
    "backbone": ("image_size", "backbone_args"),
    "time": (
        "num_frames",
        "attention",
        "prefix_mode",
        "temporal_layers",
        "temporal_init",
        "gate",
        "causal",
        "encoder_layers",
        "tubelet_size",
        "tubelet_init",
        "quirks",
        "grafts",
    ),
    "embedding": ("time_embed", "time_embed_resample"),
    "output": ("num_classes",),
}


def option_groups(parser: argparse.ArgumentParser) -> dict[str, argparse._ArgumentGroup]:
    """The groups of a command's help, by name, in order."""
    return {title: parser.add_argument_group(title) for title in GROUPS}


def add_settings(groups: dict[str, argparse._ArgumentGroup]) -> None:
    """One option for each field of ``VideoConfig`` but the backbone.

    What is not given is absent from the parsed options, so that what a file says can be told from a default.
    """
    described = descriptions()
    fields = {spec.name: spec for spec in dataclasses.fields(VideoConfig)}
    for title, names in GROUPS.items():
        for name in names:
            if name == "grafts":
                add_graft_option(groups[title])
                continue
            parse, metavar, example = FORMS.get(name, (whole, "N", ""))
            choices = get_args(CHOICES[name]) if name in CHOICES else None
            default = fields[name].default
            if default is False:
                about = described.get(name, "").replace("%", "%%")
                groups[title].add_argument("--" + name, action="store_true", default=argparse.SUPPRESS, help=about)
                continue
            groups[title].add_argument(
                "--" + name.replace("_", "-"),
                type=str if choices else parse,
                choices=choices,
                metavar="MODE" if choices else metavar,
                default=argparse.SUPPRESS,
                help=f"{described.get(name, '')}{f'; {example}' if example else ''} "
                f"(default: {'none' if default in (None, (), dataclasses.MISSING) else default})".replace("%", "%%"),
            )


def add_graft_option(group: argparse._ActionsContainer, required: bool = False) -> None:
    """``--graft TYPE [OPTION=VALUE ...]``, as often as there are grafts; together they are ``grafts``."""
    group.add_argument(
        "--graft",
        dest="grafts",
        action=AppendGraft,
        nargs="+",
        metavar=("TYPE", "OPTION=VALUE"),
        required=required,
        default=argparse.SUPPRESS,
        help="what else to insert, by its type, such as --graft lora rank=8 targets=[attn,mlp]; as often as wanted "
        "(docs/grafts.md lists the types)",
    )


class AppendGraft(argparse.Action):
    """``lora rank=8`` -> {"type": "lora", "rank": 8}, appended; values are YAML."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        import yaml

        kind, *options = values
        described = {"type": kind}
        for option in options:
            name, equals, value = option.partition("=")
            if not equals or not name:
                raise argparse.ArgumentError(self, f"{shown(option)}: expected OPTION=VALUE, such as rank=8")
            try:
                described[name] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise argparse.ArgumentError(self, f"{shown(option)}: {shown(value)} is not a value in YAML") from error
        namespace.grafts = [*getattr(namespace, "grafts", []), described]


def descriptions() -> dict[str, str]:
    """What each field of ``VideoConfig`` is, from its docstring; empty under ``python -OO``, which has none."""
    from docstring_parser import parse

    described = {}
    for param in parse(VideoConfig.__doc__ or "").params:
        text = " ".join((param.description or "").split())
        described[param.arg_name] = text.replace("``", "").rstrip(".")
    return described


def add_certificate_options(group: argparse._ActionsContainer) -> None:
    """``--certify-frames`` and ``--certify-size``: what clips the certificate is made with."""
    group.add_argument(
        "--certify-frames",
        *(["--num-frames"] if isinstance(group, argparse.ArgumentParser) else []),
        type=whole,
        nargs="+",
        metavar="T",
        help="numbers of frames to certify with, such as 1 2 8 (default: 1, 2, 3 and the model's own)",
    )
    group.add_argument(
        "--certify-size",
        type=parse_size,
        metavar="PIXELS",
        help="certify with clips of another size than the model's own, such as 112, to save time and memory",
    )


# ---- values of options


def whole(text: str) -> int:
    if not text.removeprefix("-").isdecimal() or len(text) > 20:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number")
    return int(text)


def parse_size(text: str) -> tuple[int, int]:
    """``224`` or ``224x320`` (height x width)."""
    parts = text.lower().replace(",", "x").split("x")
    if not all(part.strip().isdecimal() and len(part) <= 20 for part in parts) or len(parts) > 2:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a size; expected 224, or 224x320 (height x width)")
    numbers = [int(part) for part in parts]
    return (numbers[0], numbers[-1])


def parse_layers(text: str) -> str | tuple[int, ...]:
    """``all``, ``every:2``, ``last:4``, or block numbers ``0,5,11``."""
    parts = text.split(",")
    return tuple(map(whole, parts)) if all(part.strip().isdecimal() for part in parts) else text


def parse_names(text: str) -> tuple[str, ...]:
    """``name,name``; empty for none."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not JSON ({error}); in a shell, put single quotes around it: "
            "'{\"drop_path_rate\": 0.1}'"
        ) from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a JSON object such as '{{\"drop_path_rate\": 0.1}}'")
    return value


FORMS = {  # parser, placeholder, example
    "num_frames": (whole, "T", ""),
    "image_size": (parse_size, "PIXELS", "for example 224, or 224x320 for height x width"),
    "temporal_layers": (parse_layers, "LAYERS", "for example every:2, last:4 or 0,5,11"),
    "quirks": (parse_names, "NAMES", f"of {', '.join(QUIRKS)}"),
    "backbone_args": (parse_json, "JSON", "in a shell, between single quotes"),
}


# ---- options from a file


def read_options_file(path: str, names: Iterable[str]) -> dict[str, Any]:
    """Options by name from YAML or JSON; a model folder's ``config.json`` gives the settings it was made with.

    Args:
        names: options that are known beside the fields of ``VideoConfig``.

    Raises:
        ConfigError: unreadable, no options by name, or an unknown one.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected options by name, such as 'backbone: vit_base'.")
    if isinstance(values.get("video"), dict) and "kind" in values:
        values = {**values["video"], "dtype": values.get("dtype")}
        if values.get("backbone") is None:
            values.pop("backbone", None)
    known = {*names, *(f.name for f in dataclasses.fields(VideoConfig))}
    for name in values:
        if name not in known:
            raise ConfigError(f"--config {path}: unknown option {shown(name)}.{nearest(str(name), known)}")
    return values


def read_yaml(path: str) -> Any:
    import yaml

    if not path:
        raise ConfigError("--config is empty; expected a file. Was it an unset shell variable?")
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not text; expected YAML or JSON in UTF-8.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # endless numbers, endless nesting
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from error


def check_options(options: dict[str, Any]) -> None:
    """Say which option is of the wrong type: a file's can be of any."""
    for name in ("backbone", "weights", "out", "dtype"):
        value = options.get(name)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{name}={shown(value)}: expected a text; in YAML, put it in quotes.")
        if value is not None and not value.strip():
            raise ConfigError(f"{name} is empty. Leave it out or give one. Was it an unset shell variable?")
        if value is not None and "\0" in value:
            raise ConfigError(f"{name}={shown(value)} holds a zero byte, which no name or path can.")
    if not isinstance(options.get("random_weights") or False, bool):
        raise ConfigError(f"random_weights={shown(options['random_weights'])}: expected true or false.")
    frames, size = options.get("certify_frames"), options.get("certify_size")
    if frames is not None:
        if not isinstance(frames, list) or not frames:
            raise ConfigError(f"certify_frames={shown(frames)}: expected numbers of frames, such as [1, 2, 8].")
        for number in frames:
            whole_number("certify_frames", number, most=MOST["num_frames"])
    if size is not None:
        options["certify_size"] = image_size_pair(size, "certify_size")
